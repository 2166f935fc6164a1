//! A counter that only counts up: every count lies between the increments that were acknowledged when it
//! was asked for and those that were attempted when it was answered, and none is less than an earlier one.

use std::collections::BTreeMap;

use super::report::{Class, Report, describe, name};
use crate::history::{History, Kind, Op, Operation, Workload};

/// Checks a history of increments and reads. At most so many anomalies of a class are explained.
pub(super) fn check(history: &History, explained_max: usize) -> Report {
    let mut report = Report::new(Workload::Counter, explained_max);
    let operations = history.operations();
    bounds(&operations, &mut report);
    backwards(&operations, &mut report);
    let mut reached: BTreeMap<i64, &Operation> = BTreeMap::new();
    for operation in &operations {
        if let (Op::Increment(_), Some(count)) = (operation.op(), count(operation))
            && let Some(other) = reached.insert(count, operation)
        {
            report.add(Class::DuplicateCount, || {
                format!("{} and {} both reached {count}", name(other), name(operation))
            });
        }
    }
    report.count("increments", reached.len());
    report
}

/// The count that an operation has read or reached, if it was acknowledged.
pub(super) fn count(operation: &Operation) -> Option<i64> {
    operation.acknowledged()?;
    match operation.op() {
        Op::Increment(count) | Op::Count(count) => *count,
        Op::Txn(_)
        | Op::RwTxn(_)
        | Op::Fork(_)
        | Op::Transfer { .. }
        | Op::Balances(_)
        | Op::Add(_)
        | Op::Elements(_) => None,
    }
}

fn is_increment(operation: &Operation) -> bool {
    matches!(operation.op(), Op::Increment(_))
}

/// Every count is at least the increments that were acknowledged when it was asked for, and at most those
/// that had been asked for when it was answered, without those that failed. An increment counts itself.
fn bounds(operations: &[Operation], report: &mut Report) {
    let increments = || operations.iter().filter(|operation| is_increment(operation));
    let mut acknowledged: Vec<_> = increments().filter_map(Operation::acknowledged).collect();
    acknowledged.sort_unstable();
    let attempted: Vec<_> =
        increments().filter(|op| op.outcome() != Kind::Fail).map(Operation::begun).collect();
    let before = |events: &[u64], event: u64| events.partition_point(|other| *other < event) as i64;
    for operation in operations {
        let (Some(count), Some(ended)) = (count(operation), operation.acknowledged()) else { continue };
        let least = before(&acknowledged, operation.begun()) + i64::from(is_increment(operation));
        let most = before(&attempted, ended);
        if !(least..=most).contains(&count) {
            report.add(Class::CountOutOfBounds, || {
                format!("{count} is not between {least} and {most}\n{}", describe(operation))
            });
        }
    }
}

/// If one operation had ended before another began, the other's count is not less, and more if it
/// is an increment.
fn backwards(operations: &[Operation], report: &mut Report) {
    let counted = || operations.iter().filter_map(|operation| Some((operation, count(operation)?)));
    let mut ended: Vec<_> = counted().collect();
    ended.sort_unstable_by_key(|(operation, _)| operation.acknowledged());
    let mut ended = ended.into_iter().peekable();
    let mut greatest: Option<(&Operation, i64)> = None;
    // Operations are in the order in which they began.
    for (operation, count) in counted() {
        while let Some(earlier) =
            ended.next_if(|(earlier, _)| earlier.acknowledged() < Some(operation.begun()))
        {
            if greatest.is_none_or(|(_, count)| earlier.1 > count) {
                greatest = Some(earlier);
            }
        }
        let Some((earlier, before)) = greatest else { continue };
        if count < before || (count == before && is_increment(operation)) {
            report.add(Class::CountBackwards, || {
                let story = format!("{count} comes after {before}");
                format!("{story}\n{}\n{}", describe(earlier), describe(operation))
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checker::planted;

    fn check(text: &str, expected: &[Class]) {
        planted::check(Workload::Counter, text, expected);
    }

    #[test]
    fn acknowledged_increments_must_be_counted() {
        check("0 ok :add 1, :count 1\n0 ok :read 0", &[Class::CountOutOfBounds, Class::CountBackwards]);
        check("0 ok :add 1, :count 1\n0 ok :read 1", &[]);
        check("1 invoke :read nil\n0 ok :add 1, :count 1\n1 ok :read 0", &[]);
    }

    #[test]
    fn only_what_was_attempted_is_counted() {
        check("0 ok :add 1, :count 1\n0 ok :read 2", &[Class::CountOutOfBounds]);
        check("0 fail :add 1\n0 ok :read 1", &[Class::CountOutOfBounds]);
        check("0 info :add 1\n1 ok :read 1", &[]);
        check("0 info :add 1\n1 ok :read 0\n1 ok :read 1", &[]);
        check("0 invoke :add 1\n1 ok :add 1, :count 2\n0 ok :add 1, :count 1", &[]);
        check("0 ok :add 1, :count 0", &[Class::CountOutOfBounds]);
    }

    #[test]
    fn counts_must_not_go_backwards() {
        let reads = |one: u32, other: u32| {
            format!("0 invoke :add 1\n1 ok :read {one}\n1 ok :read {other}\n0 ok :add 1, :count 1")
        };
        check(&reads(1, 0), &[Class::CountBackwards]);
        check(&reads(0, 1), &[]);
        let concurrent =
            "0 invoke :add 1\n1 invoke :read nil\n2 ok :read 1\n1 ok :read 0\n0 ok :add 1, :count 1";
        check(concurrent, &[]);
    }

    #[test]
    fn an_increment_must_count_more_than_what_was_read_before() {
        let increment = |count: u32| format!("0 info :add 1\n1 ok :read 1\n1 ok :add 1, :count {count}");
        check(&increment(1), &[Class::CountBackwards]);
        check(&increment(2), &[]);
    }

    #[test]
    fn two_increments_must_not_reach_the_same_count() {
        let both =
            |other: u32| format!("0 invoke :add 1\n1 ok :add 1, :count 1\n0 ok :add 1, :count {other}");
        check(&both(1), &[Class::DuplicateCount]);
        check(&both(2), &[]);
    }
}
