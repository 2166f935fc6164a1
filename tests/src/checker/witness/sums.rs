//! Replaying transfers, additions to a set, and increments.

use std::collections::BTreeSet;

use crate::checker::bank::{Balances, Subset, UNKNOWN_MAX, apply, balances, difference, subset};
use crate::checker::counter::count;
use crate::checker::report::{Class, Report, UNCHECKED, describe};
use crate::history::{Kind, Op, Operation};

/// Replays transfers in this order.
///
/// Money that has moved without an acknowledged transfer was moved by some of the transfers of unknown
/// outcome. If it cannot be known by which, later reads may be explained by others than the true ones; a
/// read that cannot be explained then is counted as `unchecked`, and the replay goes on from it.
pub(super) fn bank(operations: &[Operation], order: &[usize], opening: &Balances, report: &mut Report) {
    let mut waiting: Vec<&Operation> = operations.iter().filter(|operation| is_unknown(operation)).collect();
    let mut state = if opening.is_empty() { None } else { Some(opening.clone()) };
    let mut certain = true;
    for number in order {
        let operation = &operations[*number];
        let Some(found) = balances(operation) else {
            if let Some(state) = &mut state {
                apply(state, operation.op(), 1);
            }
            continue;
        };
        let ended = operation.acknowledged();
        let candidates: Vec<usize> =
            (0..waiting.len()).filter(|place| Some(waiting[*place].begun()) < ended).collect();
        let Some(held) = &mut state else {
            // Whatever took place before the first read is in it.
            certain = candidates.is_empty();
            state = Some(found.clone());
            continue;
        };
        let difference = difference(found, held);
        if difference.is_empty() {
            continue;
        }
        let transfers: Vec<&Op> = candidates.iter().map(|place| waiting[*place].op()).collect();
        let exhaustive = transfers.len() <= UNKNOWN_MAX;
        let explained =
            if exhaustive { subset(&transfers, &difference) } else { few(&transfers, &difference) };
        match explained {
            Some(Subset { places, unique }) => {
                certain &= unique;
                report.count("placed", places.len());
                let taken: BTreeSet<usize> = places.iter().map(|place| candidates[*place]).collect();
                let mut place = 0..;
                waiting.retain(|_| place.next().is_some_and(|place| !taken.contains(&place)));
            }
            None if certain && exhaustive => report.add(Class::WitnessMismatch, || {
                let held = Op::Balances(Some(held.clone()));
                format!("{}\nby timestamps, the accounts hold {held}", describe(operation))
            }),
            None => report.count(UNCHECKED, 1),
        }
        *held = found.clone();
    }
}

/// One or two of many transfers that make a difference. Others may make it too.
fn few(transfers: &[&Op], difference: &Balances) -> Option<Subset> {
    let explains = |places: &[usize]| {
        let mut rest = difference.clone();
        places.iter().for_each(|place| apply(&mut rest, transfers[*place], -1));
        rest.values().all(|balance| *balance == 0)
    };
    let singles = (0..transfers.len()).map(|one| vec![one]);
    let pairs = (0..transfers.len()).flat_map(|one| (0..one).map(move |other| vec![one, other]));
    let places = singles.chain(pairs).find(|places| explains(places))?;
    Some(Subset { places, unique: false })
}

/// Replays additions in this order. An addition of unknown outcome takes place when its element is seen.
pub(super) fn set(operations: &[Operation], order: &[usize], report: &mut Report) {
    let mut unknown = BTreeSet::new();
    for operation in operations.iter().filter(|operation| is_unknown(operation)) {
        if let Op::Add(element) = operation.op() {
            unknown.insert(*element);
        }
    }
    let mut state: BTreeSet<i64> = BTreeSet::new();
    for number in order {
        let operation = &operations[*number];
        if let Op::Add(element) = operation.op() {
            state.insert(*element);
        }
        let Op::Elements(Some(found)) = operation.op() else { continue };
        let appeared: Vec<i64> = unknown.intersection(found).copied().collect();
        report.count("placed", appeared.len());
        for element in appeared {
            unknown.remove(&element);
            state.insert(element);
        }
        if *found != state {
            report.add(Class::WitnessMismatch, || {
                let missing: Vec<_> = state.difference(found).collect();
                let surplus: Vec<_> = found.difference(&state).collect();
                let story = format!("by timestamps, {missing:?} should be there, and {surplus:?} should not");
                format!("{}\n{story}", describe(operation))
            });
        }
    }
}

/// Replays increments in this order. Those of unknown outcome take place when they are counted.
pub(super) fn counter(operations: &[Operation], order: &[usize], report: &mut Report) {
    let unknown = operations.iter().filter(|operation| is_unknown(operation));
    let unknown: Vec<u64> = unknown.map(Operation::begun).collect();
    let (mut state, mut placed) = (0, 0);
    for number in order {
        let operation = &operations[*number];
        let Some(found) = count(operation) else { continue };
        if let Op::Increment(_) = operation.op() {
            state += 1;
        }
        let more = found - state;
        let begun = unknown.partition_point(|begun| Some(*begun) < operation.acknowledged());
        if (1..=begun as i64 - placed).contains(&more) {
            placed += more;
        } else if more != 0 {
            report.add(Class::WitnessMismatch, || {
                format!("{}\nby timestamps, the count is {state}", describe(operation))
            });
        }
        state = found;
    }
    report.count("placed", placed as usize);
}

/// Whether it may have changed something, and nobody knows.
fn is_unknown(operation: &Operation) -> bool {
    let unknown = match operation.outcome() {
        Kind::Info | Kind::Invoke => true,
        Kind::Ok | Kind::Fail => false,
    };
    unknown && !operation.op().is_read_only()
}
