//! Operations: what clients ask, and the workloads that they belong to.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

/// What a client asks. Answers have the same form, with what was read filled in.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Op {
    /// Appends to lists and reads of lists, in one transaction.
    Txn(Vec<Mop>),
    /// Writes and reads of registers, in one transaction.
    RwTxn(Vec<RwMop>),
    /// The same, as the long fork workload has it: one write, or a read of several keys.
    Fork(Vec<RwMop>),
    /// Moves money.
    Transfer {
        /// The account that pays.
        from: i64,
        /// The account that is paid.
        to: i64,
        /// How much.
        amount: i64,
    },
    /// Reads all accounts.
    Balances(Option<BTreeMap<i64, i64>>),
    /// Adds an element to the set.
    Add(i64),
    /// Reads the set.
    Elements(Option<BTreeSet<i64>>),
    /// Counts up by one; answered by the count that was reached.
    Increment(Option<i64>),
    /// Reads the counter.
    Count(Option<i64>),
}

/// A step of a transaction on lists.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Mop {
    /// Puts a value at the end of a list.
    Append {
        /// Which list.
        key: i64,
        /// Unique in its list.
        value: i64,
    },
    /// Reads a list.
    Read {
        /// Which list.
        key: i64,
        /// What it held. `None` in questions; in answers, the list is not there, which is as good as empty.
        list: Option<Vec<i64>>,
    },
}

/// A step of a transaction on registers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RwMop {
    /// Overwrites a register.
    Write {
        /// Which register.
        key: i64,
        /// Unique among the writes to this register.
        value: i64,
    },
    /// Reads a register.
    Read {
        /// Which register.
        key: i64,
        /// What it held. `None` in questions; in answers, it was never written.
        value: Option<i64>,
    },
}

impl Op {
    /// The function name, as histories have it after `:f`.
    pub fn function(&self) -> &'static str {
        match self {
            Op::Txn(_) | Op::RwTxn(_) => "txn",
            Op::Fork(mops) if mops.iter().any(RwMop::is_write) => "write",
            Op::Transfer { .. } => "transfer",
            Op::Add(_) | Op::Increment(_) => "add",
            Op::Fork(_) | Op::Balances(_) | Op::Elements(_) | Op::Count(_) => "read",
        }
    }

    /// Whether it changes nothing.
    pub fn is_read_only(&self) -> bool {
        match self {
            Op::Txn(mops) => mops.iter().all(|mop| matches!(mop, Mop::Read { .. })),
            Op::RwTxn(mops) | Op::Fork(mops) => !mops.iter().any(RwMop::is_write),
            Op::Balances(_) | Op::Elements(_) | Op::Count(_) => true,
            Op::Transfer { .. } | Op::Add(_) | Op::Increment(_) => false,
        }
    }

    /// Whether it matters which of the two comes first: one writes what the other reads or writes. Those that
    /// read or write all there is touch everything.
    pub fn meets(&self, other: &Op) -> bool {
        let (Some(one), Some(other)) = (self.keys(), other.keys()) else { return true };
        one.iter().any(|(key, writes)| other.get(key).is_some_and(|also| *writes || *also))
    }

    /// What it touches, and whether it writes that; `None` if it touches everything.
    fn keys(&self) -> Option<BTreeMap<i64, bool>> {
        let mut keys = BTreeMap::new();
        let mut touch = |key: i64, writes: bool| *keys.entry(key).or_default() |= writes;
        match self {
            Op::Txn(mops) => mops.iter().for_each(|mop| match mop {
                Mop::Append { key, .. } => touch(*key, true),
                Mop::Read { key, .. } => touch(*key, false),
            }),
            Op::RwTxn(mops) | Op::Fork(mops) => mops.iter().for_each(|mop| match mop {
                RwMop::Write { key, .. } => touch(*key, true),
                RwMop::Read { key, .. } => touch(*key, false),
            }),
            Op::Transfer { from, to, .. } => [from, to].into_iter().for_each(|account| touch(*account, true)),
            Op::Add(element) => touch(*element, true),
            Op::Balances(_) | Op::Elements(_) | Op::Increment(_) | Op::Count(_) => return None,
        }
        Some(keys)
    }

    /// Whether this can be an answer to a question: they differ in nothing but what was read.
    pub fn answers(&self, question: &Op) -> bool {
        self.question() == question.question()
    }

    /// The same without what was read.
    pub fn question(&self) -> Op {
        let registers = |mops: &[RwMop]| {
            let blank = |mop: &RwMop| match mop {
                RwMop::Write { key, value } => RwMop::Write { key: *key, value: *value },
                RwMop::Read { key, value: _ } => RwMop::Read { key: *key, value: None },
            };
            mops.iter().map(blank).collect()
        };
        let lists = |mop: &Mop| match mop {
            Mop::Append { key, value } => Mop::Append { key: *key, value: *value },
            Mop::Read { key, list: _ } => Mop::Read { key: *key, list: None },
        };
        match self {
            Op::Txn(mops) => Op::Txn(mops.iter().map(lists).collect()),
            Op::RwTxn(mops) => Op::RwTxn(registers(mops)),
            Op::Fork(mops) => Op::Fork(registers(mops)),
            Op::Transfer { from, to, amount } => Op::Transfer { from: *from, to: *to, amount: *amount },
            Op::Add(element) => Op::Add(*element),
            Op::Balances(_) => Op::Balances(None),
            Op::Elements(_) => Op::Elements(None),
            Op::Increment(_) => Op::Increment(None),
            Op::Count(_) => Op::Count(None),
        }
    }

    /// Whether it belongs to a workload. The transactions of the long fork are also some on registers.
    pub fn is_of(&self, workload: Workload) -> bool {
        match self {
            Op::Txn(_) => matches!(workload, Workload::Append | Workload::WriteSkew),
            Op::RwTxn(_) => workload == Workload::Register,
            Op::Fork(_) => matches!(workload, Workload::LongFork | Workload::Register),
            Op::Transfer { .. } | Op::Balances(_) => workload == Workload::Bank,
            Op::Add(_) | Op::Elements(_) => workload == Workload::Set,
            Op::Increment(_) | Op::Count(_) => workload == Workload::Counter,
        }
    }
}

impl RwMop {
    /// Whether it is a write.
    pub fn is_write(&self) -> bool {
        match self {
            RwMop::Write { .. } => true,
            RwMop::Read { .. } => false,
        }
    }
}

/// What the clients of a run do.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Workload {
    /// Transactions that append to lists and read them.
    Append,
    /// The same on pairs of lists: read both, append to one.
    WriteSkew,
    /// Transactions that write registers and read them.
    Register,
    /// Transfers between accounts, and reads of all accounts.
    Bank,
    /// Additions to a set, and reads of the set.
    Set,
    /// Single writes, and reads of several keys.
    LongFork,
    /// Increments of a counter, and reads of it.
    Counter,
}

impl Workload {
    /// All of them.
    pub const ALL: [Workload; 7] = [
        Workload::Append,
        Workload::WriteSkew,
        Workload::Register,
        Workload::Bank,
        Workload::Set,
        Workload::LongFork,
        Workload::Counter,
    ];

    /// What command lines and reports call it.
    pub fn name(self) -> &'static str {
        match self {
            Workload::Append => "append",
            Workload::WriteSkew => "write-skew",
            Workload::Register => "register",
            Workload::Bank => "bank",
            Workload::Set => "set",
            Workload::LongFork => "long-fork",
            Workload::Counter => "counter",
        }
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// There is no workload of this name.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "there is no workload {0:?}; there are append, write-skew, register, bank, set, long-fork and counter"
)]
pub struct UnknownWorkload(pub String);

impl FromStr for Workload {
    type Err = UnknownWorkload;

    fn from_str(name: &str) -> Result<Workload, UnknownWorkload> {
        let found = Workload::ALL.into_iter().find(|workload| workload.name() == name);
        found.ok_or_else(|| UnknownWorkload(name.to_owned()))
    }
}
