//! A set that elements are added to: whatever was acknowledged, or seen, is there from then on.
//!
//! After `set-full` of Jepsen.

use std::collections::{BTreeMap, BTreeSet};

use super::report::{Class, Report, describe, name};
use crate::history::{History, Kind, Op, Operation, Workload};

/// Checks a history of additions and reads of the set. At most so many anomalies of a class are explained.
pub(super) fn check(history: &History, explained_max: usize) -> Report {
    let mut report = Report::new(Workload::Set, explained_max);
    let operations = history.operations();
    // In the order in which they began.
    let reads: Vec<Read> = operations.iter().filter_map(Read::new).collect();
    report.count("reads", reads.len());
    let Some(mut elements) = elements(&operations, &mut report) else { return report };
    let mut garbage = BTreeSet::new();
    for read in &reads {
        walk(&mut elements, read.elements, |found| match found {
            Found::Present(element) => element.saw(read),
            Found::Surplus(value) if garbage.insert(value) => report
                .add(Class::GarbageRead, || format!("nobody added {value}\n{}", describe(read.operation))),
            Found::Surplus(_) | Found::Missing(_) => {}
        });
    }
    for read in &reads {
        walk(&mut elements, read.elements, |found| match found {
            Found::Missing(element) => element.missed(read),
            Found::Present(_) | Found::Surplus(_) => {}
        });
    }
    for element in &elements {
        element.judge(&mut report);
    }
    report
}

struct Read<'h> {
    operation: &'h Operation<'h>,
    elements: &'h BTreeSet<i64>,
    ended: u64,
}

impl<'h> Read<'h> {
    fn new(operation: &'h Operation<'h>) -> Option<Read<'h>> {
        let ended = operation.acknowledged()?;
        match operation.op() {
            Op::Elements(elements) => Some(Read { operation, elements: elements.as_ref()?, ended }),
            Op::Txn(_)
            | Op::RwTxn(_)
            | Op::Fork(_)
            | Op::Transfer { .. }
            | Op::Balances(_)
            | Op::Add(_)
            | Op::Increment(_)
            | Op::Count(_) => None,
        }
    }

    fn begun(&self) -> u64 {
        self.operation.begun()
    }
}

/// An element that somebody adds, and what reads say about it.
struct Element<'h> {
    value: i64,
    add: &'h Operation<'h>,
    /// Of the reads that have seen it, the first to end and the last to begin.
    seen: Option<(&'h Read<'h>, &'h Read<'h>)>,
    /// Of the reads that should have seen it and have not, the last to begin.
    missed: Option<&'h Read<'h>>,
}

/// The elements in their order; nothing if one is added twice.
fn elements<'h>(operations: &'h [Operation<'h>], report: &mut Report) -> Option<Vec<Element<'h>>> {
    let mut adds = BTreeMap::new();
    for operation in operations {
        if let Op::Add(element) = operation.op()
            && let Some(other) = adds.insert(*element, operation)
        {
            report.add(Class::Malformed, || {
                format!(
                    "{} and {} both add {element}, and elements must be unique",
                    name(other),
                    name(operation)
                )
            });
            return None;
        }
    }
    let element = |(value, add)| Element { value, add, seen: None, missed: None };
    Some(adds.into_iter().map(element).collect())
}

enum Found<'w, 'h> {
    Present(&'w mut Element<'h>),
    Missing(&'w mut Element<'h>),
    Surplus(i64),
}

/// Compares all elements with those that a read has seen, in one walk along both.
fn walk<'h>(elements: &mut [Element<'h>], seen: &BTreeSet<i64>, mut tell: impl FnMut(Found<'_, 'h>)) {
    let mut seen = seen.iter().copied().peekable();
    for element in elements {
        while let Some(surplus) = seen.next_if(|value| *value < element.value) {
            tell(Found::Surplus(surplus));
        }
        match seen.next_if_eq(&element.value) {
            Some(_) => tell(Found::Present(element)),
            None => tell(Found::Missing(element)),
        }
    }
    seen.for_each(|surplus| tell(Found::Surplus(surplus)));
}

impl<'h> Element<'h> {
    /// A read has seen it. Reads come in the order in which they began.
    fn saw(&mut self, read: &'h Read<'h>) {
        let first = self.seen.map(|(first, _)| first).filter(|first| first.ended < read.ended);
        self.seen = Some((first.unwrap_or(read), read));
    }

    /// A read has not seen it, after all that have seen it are known.
    fn missed(&mut self, read: &'h Read<'h>) {
        let seen = self.seen.map(|(first, _)| first.ended);
        // From when on it must be there.
        let known = self.add.acknowledged().into_iter().chain(seen).min();
        if known.is_some_and(|known| known < read.begun()) {
            self.missed = Some(read);
        }
    }

    /// It must have been added, by somebody who has not failed, before it was seen; and once it was
    /// acknowledged, or seen, every read that begins has it.
    fn judge(&self, report: &mut Report) {
        let Element { value, add, seen, missed } = self;
        if let Some((first, _)) = seen {
            let witnesses = || format!("{}\n{}", describe(add), describe(first.operation));
            if add.outcome() == Kind::Fail {
                report.add(Class::G1a, || format!("{value} was not added\n{}", witnesses()));
            } else if add.begun() > first.ended {
                report.add(Class::GarbageRead, || {
                    format!("{value} was seen before it was added\n{}", witnesses())
                });
            }
        }
        let Some(missed) = missed else { return };
        let earlier = seen.map(|(first, _)| first).filter(|first| first.ended < missed.begun());
        let later = seen.map(|(_, latest)| latest).filter(|latest| latest.begun() > missed.begun());
        let (class, story) = match (seen, earlier) {
            (None, _) => (Class::LostElement, "was acknowledged, and never seen"),
            (Some(_), Some(_)) => (Class::VanishedElement, "was seen, and then it was not"),
            (Some(_), None) => (Class::StaleElement, "was acknowledged, and not seen at once"),
        };
        report.add(class, || {
            let witnesses = earlier.into_iter().chain([*missed]).chain(later);
            let witnesses: Vec<_> = witnesses.map(|read| describe(read.operation)).collect();
            format!("{value} {story}\n{}\n{}", describe(add), witnesses.join("\n"))
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checker::planted;

    fn check(text: &str, expected: &[Class]) {
        planted::check(Workload::Set, text, expected);
    }

    #[test]
    fn what_was_acknowledged_must_be_seen() {
        check("0 ok :add 1\n0 ok :read #{}", &[Class::LostElement]);
        check("0 ok :add 1\n0 ok :read #{1}", &[]);
        check("0 info :add 1\n1 ok :read #{}", &[]);
        check("1 invoke :read nil\n0 ok :add 1\n1 ok :read #{}", &[]);
        check("0 ok :add 1", &[]);
    }

    #[test]
    fn what_was_acknowledged_must_be_seen_at_once() {
        check("0 ok :add 1\n0 ok :read #{}\n0 ok :read #{1}", &[Class::StaleElement]);
        check("0 invoke :add 1\n1 ok :read #{}\n1 ok :read #{1}\n0 ok :add 1", &[]);
    }

    #[test]
    fn what_was_seen_must_stay() {
        check("0 ok :add 1\n0 ok :read #{1}\n0 ok :read #{}", &[Class::VanishedElement]);
        check("0 invoke :add 1\n1 ok :read #{1}\n1 ok :read #{}\n1 ok :read #{1}", &[Class::VanishedElement]);
        check("0 ok :add 1\n0 ok :read #{1}\n0 ok :read #{1}", &[]);
        let concurrent = "0 invoke :add 1\n1 invoke :read nil\n2 ok :read #{1}\n1 ok :read #{}";
        check(concurrent, &[]);
    }

    #[test]
    fn what_was_not_added_must_not_be_seen() {
        check("0 ok :read #{7}", &[Class::GarbageRead]);
        check("0 ok :read #{7}\n0 ok :add 7", &[Class::GarbageRead]);
        check("0 fail :add 1\n0 ok :read #{1}", &[Class::G1a]);
        check("0 fail :add 1\n0 ok :read #{}", &[]);
        check("0 info :add 1\n1 ok :read #{1}", &[]);
    }

    #[test]
    fn elements_must_be_unique() {
        check("0 ok :add 1\n0 ok :add 1", &[Class::Malformed]);
    }
}
