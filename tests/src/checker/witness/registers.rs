//! Replaying transactions on registers.
//!
//! A write of unknown outcome takes place just before the first who finds its value, once. If several
//! writes of a transaction were found, there must be one instant for all. A write that nobody has found is
//! left out: if it took place, it was overwritten unseen, and nothing would be different without it.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::checker::register::registers::{Registers, Use, uses};
use crate::checker::report::{Class, Report, describe};
use crate::history::{Kind, Operation};

/// Replays acknowledged transactions in this order.
pub(super) fn replay(operations: &[Operation], order: &[usize], report: &mut Report) {
    let registers = Registers::new(operations);
    let mut state: HashMap<i64, Register> = HashMap::new();
    let mut unknown: BTreeMap<usize, Instants> = BTreeMap::new();
    let mut placed = HashSet::new();
    for (now, number) in order.iter().enumerate() {
        let operation = &operations[*number];
        for (key, Use { found, left, .. }) in uses(*number, operation) {
            let register = state.entry(key).or_default();
            if let Some(found) = found {
                let write = found.and_then(|value| registers.writes.get(&(key, value)));
                let write = write.filter(|write| operations[write.by].outcome() == Kind::Info);
                if let Some(write) = write.filter(|_| found != register.value)
                    && placed.insert((key, found))
                {
                    let instants =
                        unknown.entry(write.by).or_insert(Instants { after: 0, until: usize::MAX });
                    instants.after = instants.after.max(register.used);
                    instants.until = instants.until.min(now);
                    register.value = found;
                }
                if found != register.value {
                    report.add(Class::WitnessMismatch, || {
                        let held = register.value.map_or("nothing".to_owned(), |value| value.to_string());
                        format!("{}\nby timestamps, key {key} holds {held}", describe(operation))
                    });
                }
            }
            register.value = left.or(register.value);
            // Before the next operation, but not before this one.
            register.used = now + 1;
        }
    }
    for (number, _) in unknown.iter().filter(|(_, instants)| instants.after > instants.until) {
        report.add(Class::WitnessMismatch, || {
            format!("{}\nby timestamps, it was seen in part at first", describe(&operations[*number]))
        });
    }
    report.count("placed", unknown.len());
}

#[derive(Default)]
struct Register {
    value: Option<i64>,
    /// The first instant after its last use.
    used: usize,
}

/// When an operation can have taken place, as the place in the order of the operation just after it.
struct Instants {
    after: usize,
    until: usize,
}
