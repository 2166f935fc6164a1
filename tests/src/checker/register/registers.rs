//! Registers, as the transactions of a history wrote them and read them.

use std::collections::{BTreeMap, HashMap};

use crate::history::{Kind, Op, Operation, RwMop};

/// All writes and all acknowledged reads.
pub(in crate::checker) struct Registers {
    /// Who writes a value to a key, by key and value.
    pub writes: HashMap<(i64, i64), Write>,
    /// Writes of a value to a key that somebody else writes too: key, value, and both.
    pub twice: Vec<(i64, i64, usize, usize)>,
    pub keys: BTreeMap<i64, Key>,
}

/// A write.
#[derive(Clone, Copy)]
pub(in crate::checker) struct Write {
    /// Whose it is, by the number of the operation.
    pub by: usize,
    /// Whether it is the last write of its transaction to this key.
    pub last: bool,
}

/// A register.
#[derive(Default)]
pub(in crate::checker) struct Key {
    /// What transactions do to it, in the order of their questions.
    pub uses: Vec<Use>,
}

/// What a transaction does to a register, as others can see it.
#[derive(Clone, Copy)]
pub(in crate::checker) struct Use {
    /// Whose it is, by the number of the operation.
    pub by: usize,
    /// What it found, if it has read the register before it wrote it, and was acknowledged.
    pub found: Option<Option<i64>>,
    /// What it left there, if it has written it.
    pub left: Option<i64>,
}

/// The steps of a transaction on registers.
pub(in crate::checker) fn steps<'h>(operation: &'h Operation) -> &'h [RwMop] {
    match operation.op() {
        Op::RwTxn(mops) | Op::Fork(mops) => mops,
        Op::Txn(_)
        | Op::Transfer { .. }
        | Op::Balances(_)
        | Op::Add(_)
        | Op::Elements(_)
        | Op::Increment(_)
        | Op::Count(_) => &[],
    }
}

/// What a transaction does to each register.
pub(in crate::checker) fn uses(by: usize, operation: &Operation) -> BTreeMap<i64, Use> {
    let acknowledged = operation.outcome() == Kind::Ok;
    let mut uses = BTreeMap::new();
    for mop in steps(operation) {
        match mop {
            RwMop::Write { key, value } => {
                uses.entry(*key).or_insert(Use { by, found: None, left: None }).left = Some(*value);
            }
            RwMop::Read { key, value } if acknowledged => {
                uses.entry(*key).or_insert(Use { by, found: Some(*value), left: None });
            }
            RwMop::Read { .. } => {}
        }
    }
    uses
}

impl Registers {
    /// Sorts the steps of all operations by key.
    pub fn new(operations: &[Operation]) -> Registers {
        let mut registers = Registers { writes: HashMap::new(), twice: Vec::new(), keys: BTreeMap::new() };
        for (by, operation) in operations.iter().enumerate() {
            let uses = uses(by, operation);
            for mop in steps(operation) {
                if let RwMop::Write { key, value } = mop {
                    let last = uses.get(key).and_then(|used| used.left) == Some(*value);
                    if let Some(other) = registers.writes.insert((*key, *value), Write { by, last }) {
                        registers.twice.push((*key, *value, other.by, by));
                    }
                }
            }
            for (key, used) in uses {
                registers.keys.entry(key).or_default().uses.push(used);
            }
        }
        registers
    }

    /// Which operations have taken place as far as is known: those that were acknowledged, and those of
    /// which something was read.
    pub fn took_place(&self, operations: &[Operation]) -> Vec<bool> {
        let acknowledged = |operation: &Operation| operation.outcome() == Kind::Ok;
        let mut took_place: Vec<_> = operations.iter().map(acknowledged).collect();
        for (key, register) in &self.keys {
            for value in register.uses.iter().filter_map(|used| used.found.flatten()) {
                if let Some(write) = self.writes.get(&(*key, value)) {
                    took_place[write.by] |= operations[write.by].outcome() == Kind::Info;
                }
            }
        }
        took_place
    }
}
