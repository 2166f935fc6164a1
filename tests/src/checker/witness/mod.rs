//! A second opinion: the system says when each transaction took place, and this looks whether it did.
//!
//! Every acknowledged operation has a timestamp: a writer the one that it committed at, a reader the one of
//! its snapshot. In their order, writers before the readers of the same timestamp, all are replayed on a
//! model, and every read must find what the model holds. This is complete, where the search for cycles has
//! to infer the order from what was read: a system that passes has a serial order, and this is it. The
//! order must also agree with real time.
//!
//! An operation that was not acknowledged has no timestamp. It takes place as late as it can: just before
//! somebody finds what it wrote.

mod lists;
mod registers;
mod sums;

use std::collections::HashMap;

use super::Options;
use super::report::{Class, Report, describe};
use crate::history::{History, Kind, Operation, Workload};

/// Whether every acknowledged operation has a timestamp.
pub fn applies(history: &History) -> bool {
    let mut acknowledged = history.events.iter().filter(|event| event.kind == Kind::Ok);
    acknowledged.all(|event| event.commit_ts.is_some())
}

/// Replays a well-formed history in the order of its timestamps.
pub fn check(history: &History, workload: Workload, options: &Options) -> Report {
    let mut report = Report::new(workload, options.explained_max);
    let operations = history.operations();
    let mut order = Vec::new();
    for (number, operation) in operations.iter().enumerate() {
        match (operation.acknowledged(), operation.commit_ts()) {
            (Some(_), Some(commit_ts)) => {
                order.push(Timed { commit_ts, reads_only: operation.op().is_read_only(), number });
            }
            (Some(_), None) => report.add(Class::NoTimestamp, || describe(operation)),
            (None, _) => {}
        }
    }
    if report.valid() {
        order.sort_unstable();
        report.count("replayed", order.len());
        timestamps(&operations, &order, &mut report);
        let order: Vec<usize> = order.iter().map(|timed| timed.number).collect();
        match workload {
            Workload::Append | Workload::WriteSkew => lists::replay(&operations, &order, &mut report),
            Workload::Register | Workload::LongFork => registers::replay(&operations, &order, &mut report),
            Workload::Bank => sums::bank(&operations, &order, &options.opening, &mut report),
            Workload::Set => sums::set(&operations, &order, &mut report),
            Workload::Counter => sums::counter(&operations, &order, &mut report),
        }
    }
    report
}

/// An acknowledged operation, in the order in which it took place.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Timed {
    commit_ts: u64,
    reads_only: bool,
    /// Its number. Those of the same timestamp that only read may take place in any order.
    number: usize,
}

/// No two writers have the same timestamp, and whoever begins after another has ended has none that is less;
/// a writer has a greater one.
fn timestamps(operations: &[Operation], order: &[Timed], report: &mut Report) {
    let mut writers: HashMap<u64, Vec<usize>> = HashMap::new();
    for timed in order.iter().filter(|timed| !timed.reads_only) {
        let at_once = writers.entry(timed.commit_ts).or_default();
        let operation = &operations[timed.number];
        // Where they do not meet, their order does not matter.
        for other in at_once.iter().filter(|other| operations[**other].op().meets(operation.op())) {
            report.add(Class::DuplicateTimestamp, || {
                format!("{}\n{}", describe(&operations[*other]), describe(operation))
            });
        }
        at_once.push(timed.number);
    }
    let mut begun = order.to_vec();
    begun.sort_unstable_by_key(|timed| operations[timed.number].begun());
    let mut ended = order.to_vec();
    ended.sort_unstable_by_key(|timed| operations[timed.number].acknowledged());
    let mut ended = ended.into_iter().peekable();
    let mut greatest: Option<Timed> = None;
    for timed in begun {
        let operation = &operations[timed.number];
        let is_earlier = |other: &Timed| operations[other.number].acknowledged() < Some(operation.begun());
        while let Some(earlier) = ended.next_if(is_earlier) {
            greatest = greatest.max(Some(earlier));
        }
        let Some(earlier) = greatest else { continue };
        let backwards = timed.commit_ts < earlier.commit_ts;
        if backwards || (timed.commit_ts == earlier.commit_ts && !timed.reads_only) {
            report.add(Class::TimestampBackwards, || {
                let earlier = describe(&operations[earlier.number]);
                format!("{earlier}\nended before this began:\n{}", describe(operation))
            });
        }
    }
}

#[cfg(test)]
mod tests;
