//! A store of everything that the workloads need, all in memory.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::history::{Mop, Op, RwMop};

/// What is stored, and the timestamp of the last change.
#[derive(Clone, Debug)]
pub(crate) struct Store {
    lists: HashMap<i64, Vec<i64>>,
    registers: HashMap<i64, i64>,
    balances: BTreeMap<i64, i64>,
    elements: BTreeSet<i64>,
    count: i64,
    now: u64,
}

impl Store {
    /// Empty but for some accounts.
    pub fn new(accounts: i64, opening: i64) -> Store {
        Store {
            lists: HashMap::new(),
            registers: HashMap::new(),
            balances: (0..accounts).map(|account| (account, opening)).collect(),
            elements: BTreeSet::new(),
            count: 0,
            now: 0,
        }
    }

    /// Lets an operation take place. Returns the answer and the timestamp, or `None` if it is refused.
    pub fn execute(&mut self, op: &Op) -> Option<(Op, u64)> {
        let answer = match op {
            Op::Txn(mops) => Op::Txn(mops.iter().map(|mop| self.mop(mop)).collect()),
            Op::RwTxn(mops) => Op::RwTxn(mops.iter().map(|mop| self.rw_mop(mop)).collect()),
            Op::Fork(mops) => Op::Fork(mops.iter().map(|mop| self.rw_mop(mop)).collect()),
            Op::Transfer { from, to, amount } => {
                if self.balances.get(from).is_none_or(|balance| balance < amount) {
                    return None;
                }
                *self.balances.entry(*from).or_default() -= amount;
                *self.balances.entry(*to).or_default() += amount;
                op.clone()
            }
            Op::Balances(_) => Op::Balances(Some(self.balances.clone())),
            Op::Add(element) => {
                self.elements.insert(*element);
                op.clone()
            }
            Op::Elements(_) => Op::Elements(Some(self.elements.clone())),
            Op::Increment(_) => {
                self.count += 1;
                Op::Increment(Some(self.count))
            }
            Op::Count(_) => Op::Count(Some(self.count)),
        };
        self.now += u64::from(!op.is_read_only());
        Some((answer, self.now))
    }

    /// Whether something that an operation writes has changed between this and a later state.
    pub fn conflicts(&self, later: &Store, op: &Op) -> bool {
        let registers = |mops: &[RwMop]| {
            mops.iter().any(|mop| match mop {
                RwMop::Write { key, .. } => self.registers.get(key) != later.registers.get(key),
                RwMop::Read { .. } => false,
            })
        };
        match op {
            Op::Txn(mops) => mops.iter().any(|mop| match mop {
                Mop::Append { key, .. } => self.lists.get(key) != later.lists.get(key),
                Mop::Read { .. } => false,
            }),
            Op::RwTxn(mops) | Op::Fork(mops) => registers(mops),
            Op::Transfer { from, to, .. } => {
                [from, to].iter().any(|account| self.balances.get(account) != later.balances.get(account))
            }
            Op::Increment(_) => self.count != later.count,
            Op::Add(_) | Op::Balances(_) | Op::Elements(_) | Op::Count(_) => false,
        }
    }

    /// Lets accounts of a transfer hold again what they did in an earlier state.
    pub fn forget_since(&mut self, earlier: &Store, op: &Op) {
        if let Op::Transfer { from, to, .. } = op {
            for account in [from, to] {
                let balance = earlier.balances.get(account).copied().unwrap_or(0);
                self.balances.insert(*account, balance);
            }
        }
    }

    fn mop(&mut self, mop: &Mop) -> Mop {
        match mop {
            Mop::Append { key, value } => {
                self.lists.entry(*key).or_default().push(*value);
                mop.clone()
            }
            Mop::Read { key, list: _ } => Mop::Read { key: *key, list: self.lists.get(key).cloned() },
        }
    }

    fn rw_mop(&mut self, mop: &RwMop) -> RwMop {
        match mop {
            RwMop::Write { key, value } => {
                self.registers.insert(*key, *value);
                mop.clone()
            }
            RwMop::Read { key, value: _ } => {
                RwMop::Read { key: *key, value: self.registers.get(key).copied() }
            }
        }
    }
}
