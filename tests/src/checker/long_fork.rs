//! Single writes, and reads of several keys: no two reads may see two writes in opposite orders.
//!
//! ```text
//! one read      x is written    y is not yet
//! the other     x is not yet    y is written
//! ```
//!
//! Every key is written at most once, so each of the reads says which of the two writes came first. A
//! store that shows each reader a snapshot, but not all readers the same snapshots, answers so: parallel
//! snapshot isolation. A fork is a cycle too, and all else that can be wrong is as in any history of
//! [registers](super::register).

use std::collections::{BTreeMap, HashMap};

use super::register::registers::steps;
use super::report::{Class, Report, describe, name};
use crate::history::{History, Kind, Operation, RwMop, Workload};

/// Whether keys were written.
type Written = BTreeMap<i64, bool>;

/// What a read saw.
type State<'s> = (&'s Written, &'s Operation<'s>);

/// Checks a history of single writes and reads of several keys. At most so many anomalies of a class are
/// explained.
pub(super) fn check(history: &History, explained_max: usize) -> Report {
    let mut report = Report::new(Workload::LongFork, explained_max);
    let operations = history.operations();
    if has_two_writes_of_a_key(&operations, &mut report) {
        return report;
    }
    // Of reads that saw the same of the same keys, the first stands for all.
    let mut states: BTreeMap<Written, &Operation> = BTreeMap::new();
    for operation in operations.iter().filter(|operation| operation.outcome() == Kind::Ok) {
        if operation.op().is_read_only() {
            states.entry(written(operation)).or_insert(operation);
        }
    }
    let mut reading: HashMap<i64, Vec<State>> = HashMap::new();
    for (state, read) in &states {
        // Two reads that disagree on two keys are told once, at the first key that only the other saw.
        for (key, _) in state.iter().filter(|(_, written)| !**written) {
            for (other, other_read) in reading.get(key).into_iter().flatten() {
                compare((state, read), (other, other_read), &mut report);
            }
        }
        for key in state.keys() {
            reading.entry(*key).or_default().push((state, read));
        }
    }
    report.count("states", states.len());
    report
}

fn has_two_writes_of_a_key(operations: &[Operation], report: &mut Report) -> bool {
    let mut writers = HashMap::new();
    for operation in operations {
        for mop in steps(operation) {
            if let RwMop::Write { key, .. } = mop
                && let Some(other) = writers.insert(*key, operation)
            {
                report.add(Class::Malformed, || {
                    format!("{} and {} both write key {key}, and one may", name(other), name(operation))
                });
                return true;
            }
        }
    }
    false
}

/// Which keys were written when a read took place.
fn written(read: &Operation) -> Written {
    let keys = steps(read).iter().filter_map(|mop| match mop {
        RwMop::Read { key, value } => Some((*key, value.is_some())),
        RwMop::Write { .. } => None,
    });
    keys.collect()
}

fn compare((one, one_read): State, (other, other_read): State, report: &mut Report) {
    let differ = |wanted: bool| {
        let mut common = one.iter().filter_map(|(key, written)| Some((key, *written, *other.get(key)?)));
        common.find(|(_, written, other)| *written == wanted && *other != wanted).map(|(key, ..)| *key)
    };
    if let (Some(only_one), Some(only_other)) = (differ(true), differ(false)) {
        report.add(Class::LongFork, || {
            let (first, second) = (name(one_read), name(other_read));
            let story = format!("{first} saw key {only_one} written and {only_other} not yet");
            let story = format!("{story}, and {second} saw it the other way round");
            format!("{story}\n{}\n{}", describe(one_read), describe(other_read))
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checker::planted;

    fn found(text: &str) -> Report {
        super::check(&planted::history(Workload::LongFork, text), 10)
    }

    fn check(reads: [&str; 2], expected: &[Class]) {
        let text = format!(
            "0 invoke :write [[:w 1 1]]
             1 invoke :write [[:w 2 1]]
             2 ok :read {}
             3 ok :read {}
             0 ok :write [[:w 1 1]]
             1 ok :write [[:w 2 1]]",
            reads[0], reads[1]
        );
        assert_eq!(found(&text).classes(), expected);
    }

    #[test]
    fn two_reads_must_not_see_two_writes_in_opposite_orders() {
        check(["[[:r 1 1] [:r 2 nil]]", "[[:r 1 nil] [:r 2 1]]"], &[Class::LongFork]);
        check(["[[:r 2 1] [:r 1 nil]]", "[[:r 1 1] [:r 2 nil] [:r 3 nil]]"], &[Class::LongFork]);
        check(["[[:r 1 1] [:r 2 nil]]", "[[:r 1 1] [:r 2 1]]"], &[]);
        check(["[[:r 1 nil] [:r 2 nil]]", "[[:r 1 nil] [:r 2 1]]"], &[]);
        check(["[[:r 1 1] [:r 3 nil]]", "[[:r 1 nil] [:r 2 1]]"], &[]);
    }

    #[test]
    fn a_fork_is_told_once() {
        let reads = "2 invoke :read [[:r 1 nil] [:r 2 nil] [:r 3 nil]]
                     3 ok :read [[:r 1 nil] [:r 2 nil] [:r 3 1]]
                     3 ok :read [[:r 1 nil] [:r 2 nil] [:r 3 1]]
                     2 ok :read [[:r 1 1] [:r 2 1] [:r 3 nil]]";
        let writes = "0 ok :write [[:w 1 1]]\n0 ok :write [[:w 2 1]]\n0 ok :write [[:w 3 1]]";
        assert_eq!(found(&format!("{reads}\n{writes}")).found, [(Class::LongFork, 1)].into());
    }

    #[test]
    fn all_that_can_be_wrong_with_registers_is_looked_for_too() {
        let check = |text: &str, expected: &[Class]| {
            planted::check(Workload::LongFork, text, expected);
        };
        check("0 ok :write [[:w 1 1]]\n0 ok :read [[:r 1 9]]", &[Class::GarbageRead]);
        check("0 fail :write [[:w 1 1]]\n0 ok :read [[:r 1 1]]", &[Class::G1a]);
        let stale = "0 ok :write [[:w 1 1]]\n0 ok :read [[:r 1 nil]]";
        check(stale, &[Class::CyclicVersions, Class::GSingleRealtime]);
        let forked = "0 invoke :write [[:w 1 1]]
                      1 invoke :write [[:w 2 1]]
                      3 invoke :read [[:r 1 nil] [:r 2 nil]]
                      2 ok :read [[:r 1 1] [:r 2 nil]]
                      3 ok :read [[:r 1 nil] [:r 2 1]]";
        check(forked, &[Class::G2Item, Class::LongFork]);
    }

    #[test]
    fn a_key_is_written_once() {
        let text = "0 ok :write [[:w 1 1]]\n0 ok :write [[:w 1 1]]";
        planted::check(Workload::LongFork, text, &[Class::Malformed]);
        let text = "0 ok :write [[:w 1 1]]\n0 ok :write [[:w 1 2]]";
        planted::check(Workload::LongFork, text, &[Class::Malformed]);
    }
}
