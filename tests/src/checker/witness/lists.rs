//! Replaying transactions on lists.
//!
//! A list shows where an append of unknown outcome belongs: before whatever is later in the list.

use std::collections::HashMap;

use crate::checker::append::lists::Lists;
use crate::checker::append::took_place;
use crate::checker::report::{Class, Report, describe, list};
use crate::history::{Kind, Mop, Op, Operation};

/// Replays acknowledged transactions in this order. What was read of transactions of unknown outcome is
/// counted as `placed`, or as `unplaced` if the lists do not say where it belongs.
pub(super) fn replay(operations: &[Operation], order: &[usize], report: &mut Report) {
    let lists = Lists::new(operations);
    let unknown = |operation: &Operation| operation.outcome() == Kind::Info;
    let took_place = took_place(operations, &lists);
    let waiting = operations.iter().zip(&took_place).map(|(operation, took)| *took && unknown(operation));
    let waiting: Vec<bool> = waiting.collect();
    let many = waiting.iter().filter(|waiting| **waiting).count();
    let mut places = HashMap::new();
    for (key, list) in lists.keys.iter().filter(|(_, list)| list.is_order) {
        places.extend(list.order.iter().enumerate().map(|(place, value)| ((*key, *value), place)));
    }
    let mut replay = Replay { operations, lists: &lists, places, waiting, state: HashMap::new() };
    for number in order {
        replay.execute(*number, report);
    }
    let unplaced = replay.waiting.iter().filter(|waiting| **waiting).count();
    report.count("unplaced", unplaced);
    report.count("placed", many - unplaced);
}

struct Replay<'r> {
    operations: &'r [Operation<'r>],
    lists: &'r Lists<'r>,
    /// Where a value is in the longest list of its key.
    places: HashMap<(i64, i64), usize>,
    /// Which operations have no timestamp, have taken place, and have not been replayed.
    waiting: Vec<bool>,
    state: HashMap<i64, Vec<i64>>,
}

impl<'r> Replay<'r> {
    fn execute(&mut self, number: usize, report: &mut Report) {
        let operation = &self.operations[number];
        let Op::Txn(mops) = operation.op() else { return };
        for mop in mops {
            match mop {
                Mop::Append { key, value } => self.place_before(*key, *value),
                Mop::Read { key, list } => self.place_all_of(*key, list.as_deref().unwrap_or_default()),
            }
        }
        for mop in mops {
            match mop {
                Mop::Append { key, value } => self.state.entry(*key).or_default().push(*value),
                Mop::Read { key, list: found } => {
                    let found = found.as_deref().unwrap_or_default();
                    let held = self.state.get(key).map(Vec::as_slice).unwrap_or_default();
                    if found != held {
                        report.add(Class::WitnessMismatch, || {
                            let differs =
                                found.iter().zip(held).take_while(|(one, other)| one == other).count();
                            let held = list(held);
                            let story = format!("key {key} differs from the element at {differs} on");
                            format!("{}\n{story}: by timestamps it holds {held}", describe(operation))
                        });
                    }
                }
            }
        }
    }

    /// Lets take place what comes before a value of a list and has no timestamp.
    fn place_before(&mut self, key: i64, value: i64) {
        if let Some(place) = self.places.get(&(key, value)) {
            self.place_all_of(key, &self.lists.keys[&key].order[..*place]);
        }
    }

    /// Lets take place what is needed for a list and has no timestamp.
    fn place_all_of(&mut self, key: i64, list: &[i64]) {
        while let Some(next) = list.get(self.state.get(&key).map_or(0, Vec::len)) {
            match self.lists.writes.get(&(key, *next)) {
                Some(write) if self.waiting[write.by] => self.place(write.by),
                Some(_) | None => return,
            }
        }
    }

    fn place(&mut self, number: usize) {
        self.waiting[number] = false;
        let Op::Txn(mops) = self.operations[number].op() else { return };
        let appends = || {
            mops.iter().filter_map(|mop| match mop {
                Mop::Append { key, value } => Some((*key, *value)),
                Mop::Read { .. } => None,
            })
        };
        appends().for_each(|(key, value)| self.place_before(key, value));
        appends().for_each(|(key, value)| self.state.entry(key).or_default().push(value));
    }
}
