//! Registers that transactions write and read: whether all transactions can have taken place one after
//! another, each between its question and its answer.
//!
//! Every write to a key has a value of its own, so a read says whose write it found. It does not say what
//! was there before, so the order of the values is known only in part. See [`versions`].

pub(super) mod registers;
mod versions;

use std::collections::{BTreeMap, HashMap, HashSet};

use super::cycles;
use super::graph::{Edge, Graph};
use super::report::{Class, Report, describe, name};
use crate::history::{History, Kind, Operation, RwMop, Workload};
use registers::{Key, Registers, steps};
use versions::Versions;

/// Checks a history of transactions on registers. At most so many anomalies of a class are explained.
pub(super) fn check(history: &History, explained_max: usize) -> Report {
    let mut report = Report::new(Workload::Register, explained_max);
    let operations = history.operations();
    let registers = Registers::new(&operations);
    for (key, value, one, other) in &registers.twice {
        report.add(Class::Malformed, || {
            let (one, other) = (name(&operations[*one]), name(&operations[*other]));
            format!("{one} and {other} both write {value} to key {key}, and writes must be unique")
        });
    }
    if !registers.twice.is_empty() {
        return report;
    }
    let took_place = registers.took_place(&operations);
    inside_of_transactions(&operations, &mut report);
    for (key, register) in &registers.keys {
        values(*key, register, &registers, &operations, &mut report);
        updates(*key, register, &operations, &mut report);
    }
    let mut graph = Graph::new(operations.len());
    for (key, register) in &registers.keys {
        let versions = versions::order(*key, register, &operations, &took_place);
        edges(&mut graph, *key, register, &registers, &took_place, &versions);
        if let Some(story) = versions.contradiction {
            report.add(Class::CyclicVersions, || story);
        }
    }
    let in_time = operations.iter().enumerate().filter(|(number, _)| took_place[*number]);
    graph.add_realtime(&in_time.collect::<Vec<_>>());
    cycles::report(&graph, &operations, "wrote", &mut report);
    report.count("keys", registers.keys.len());
    report
}

/// A transaction must find its own writes, and must not see registers change otherwise.
fn inside_of_transactions(operations: &[Operation], report: &mut Report) {
    for operation in operations.iter().filter(|operation| operation.outcome() == Kind::Ok) {
        let mut known: BTreeMap<i64, Option<i64>> = BTreeMap::new();
        for mop in steps(operation) {
            match mop {
                RwMop::Write { key, value } => {
                    known.insert(*key, Some(*value));
                }
                RwMop::Read { key, value } => {
                    let before = known.insert(*key, *value);
                    if let Some(before) = before.filter(|before| before != value) {
                        report.add(Class::Internal, || {
                            let text = before.map_or("nothing".to_owned(), |value| value.to_string());
                            format!("{}\nreads key {key} when it holds {text}", describe(operation))
                        });
                    }
                }
            }
        }
    }
}

/// Every value must have been written, by somebody who has not failed, and who has not written another.
fn values(key: i64, register: &Key, registers: &Registers, operations: &[Operation], report: &mut Report) {
    let mut told = HashSet::new();
    for used in &register.uses {
        let Some(value) = used.found.flatten() else { continue };
        let reader = &operations[used.by];
        let Some(write) = registers.writes.get(&(key, value)) else {
            if told.insert(value) {
                report.add(Class::GarbageRead, || {
                    format!("nobody wrote {value} to key {key}\n{}", describe(reader))
                });
            }
            continue;
        };
        let writer = &operations[write.by];
        let story = || {
            let (one, other) = (name(writer), name(reader));
            let story = format!("{one} wrote {value} to key {key}, and {other} read it");
            format!("{story}\n{}\n{}", describe(writer), describe(reader))
        };
        if writer.outcome() == Kind::Fail && told.insert(value) {
            report.add(Class::G1a, story);
        } else if !write.last && write.by != used.by {
            report.add(Class::G1b, story);
        }
    }
}

/// Of all who find the same value and leave another, only one can succeed.
fn updates(key: i64, register: &Key, operations: &[Operation], report: &mut Report) {
    let mut updates: BTreeMap<Option<i64>, Vec<usize>> = BTreeMap::new();
    for used in register.uses.iter().filter(|used| used.left.is_some()) {
        if let Some(found) = used.found {
            updates.entry(found).or_default().push(used.by);
        }
    }
    for (found, by) in updates.into_iter().filter(|(_, by)| by.len() > 1) {
        report.add(Class::LostUpdate, || {
            let found = found.map_or("nothing".to_owned(), |value| value.to_string());
            let updaters: Vec<_> = by.iter().map(|by| describe(&operations[*by])).collect();
            format!("key {key} held {found} when all of these wrote it\n{}", updaters.join("\n"))
        });
    }
}

/// Adds what the versions of a key say about their writers and readers.
fn edges(
    graph: &mut Graph,
    key: i64,
    register: &Key,
    registers: &Registers,
    took_place: &[bool],
    versions: &Versions,
) {
    let writer = |value: i64| {
        let write = registers.writes.get(&(key, value)).filter(|write| took_place[write.by]);
        write.map(|write| write.by)
    };
    let mut readers: HashMap<Option<i64>, Vec<usize>> = HashMap::new();
    for used in &register.uses {
        let Some(found) = used.found else { continue };
        readers.entry(found).or_default().push(used.by);
        if let Some(value) = found
            && let Some(writer) = writer(value)
        {
            graph.add(writer, used.by, Edge::Wr { key, value });
        }
    }
    for (before, after, basis) in versions.pairs.iter().copied() {
        let later = writer(after).expect("only what took place has left versions");
        if let Some(before) = before
            && let Some(earlier) = writer(before)
        {
            graph.add(earlier, later, Edge::Ww { key, before, after, basis });
        }
        for reader in readers.get(&before).into_iter().flatten() {
            graph.add(*reader, later, Edge::Rw { key, read: before, after, basis });
        }
    }
}

#[cfg(test)]
mod tests;
