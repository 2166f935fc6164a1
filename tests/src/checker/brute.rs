//! The checkers against brute force: whether a small history has a serial order can be found out by trying
//! all orders.

use super::{Class, Options, check, witness};
use crate::history::generate::store::Store;
use crate::history::generate::{Flaw, OPENING, Plan, history};
use crate::history::{History, Kind, Operation, Workload};

/// Whether there is an order of all that was acknowledged, and some of what is unknown, in which each reads
/// what a store would say, and which agrees with real time.
fn has_serial_order(history: &History, store: Store) -> bool {
    let operations = history.operations();
    let left: Vec<&Operation> =
        operations.iter().filter(|operation| operation.outcome() != Kind::Fail).collect();
    extend(&left, &store)
}

/// Whether some operations can come next, in some order.
fn extend(left: &[&Operation], store: &Store) -> bool {
    // Whoever begins later than this has to wait for somebody.
    let Some(end) = left.iter().filter_map(|operation| operation.acknowledged()).min() else { return true };
    let mut ready = (0..left.len()).filter(|place| left[*place].begun() <= end);
    ready.any(|place| {
        let mut store = store.clone();
        let answer = store.execute(left[place].op()).map(|(answer, _)| answer);
        let fits = left[place].acknowledged().is_none() || answer.as_ref() == Some(left[place].op());
        let others: Vec<_> = [&left[..place], &left[place + 1..]].concat();
        fits && extend(&others, &store)
    })
}

fn small(workload: Workload, seed: u64, flaw: Flaw, infos: f64) -> Plan {
    let plan = Plan::new(workload, seed, 7);
    Plan { flaw, infos, fails: 0.1, clients: 4, keys: 2, writes_per_key: 20, steps_max: 3, ..plan }
}

/// Checks small histories of stores with a flaw, each after a change. Returns how many have no serial
/// order, and of how many the checker has noticed.
fn compare(workload: Workload, flaw: Flaw, change: impl Fn(&mut History, u64)) -> (usize, usize) {
    let (mut wrong, mut noticed) = (0, 0);
    for seed in 0..1000 {
        let plan = small(workload, seed, flaw, 0.2);
        let mut history = history(&plan);
        change(&mut history, seed);
        let opening = (0..plan.keys as i64).map(|account| (account, OPENING)).collect();
        let options = Options { opening, witness: false, ..Options::default() };
        let report = check(&history, workload, &options);
        let is_right = has_serial_order(&history, Store::new(plan.keys as i64, OPENING));
        assert!(report.valid() || !is_right, "{plan:?} has a serial order\n{report}");
        wrong += usize::from(!is_right);
        noticed += usize::from(!report.valid());
    }
    println!("{workload} {flaw:?}: {wrong} of 1000 are wrong, and {noticed} were noticed");
    (wrong, noticed)
}

#[test]
fn whatever_a_checker_finds_is_wrong_for_sure() {
    for workload in Workload::ALL {
        for flaw in [Flaw::None, Flaw::Snapshot, Flaw::Unchecked, Flaw::Stale] {
            let (wrong, _) = compare(workload, flaw, |_, _| {});
            assert!(flaw != Flaw::None || wrong == 0);
        }
    }
}

/// Exchanges the answers to two equal questions.
fn exchange(history: &mut History, seed: u64) {
    let answers: Vec<usize> =
        (0..history.events.len()).filter(|place| history.events[*place].kind == Kind::Ok).collect();
    let pairs = answers.iter().flat_map(|one| answers.iter().map(move |other| (*one, *other)));
    let ops = |one: usize, other: usize| (&history.events[one].op, &history.events[other].op);
    let differ = |(one, other): &(usize, usize)| {
        let (one, other) = ops(*one, *other);
        one != other && one.answers(other)
    };
    let pairs: Vec<_> = pairs.filter(differ).collect();
    if let Some((one, other)) = pairs.get(seed as usize % pairs.len().max(1)).copied() {
        let op = history.events[one].op.clone();
        history.events[one].op = std::mem::replace(&mut history.events[other].op, op);
    }
}

#[test]
fn whatever_a_checker_finds_in_exchanged_answers_is_wrong_for_sure() {
    for workload in Workload::ALL {
        for flaw in [Flaw::None, Flaw::Unchecked] {
            compare(workload, flaw, exchange);
        }
    }
}

#[test]
fn little_is_overlooked_where_reads_say_enough() {
    for workload in [Workload::Append, Workload::WriteSkew, Workload::Register] {
        for flaw in [Flaw::Snapshot, Flaw::Unchecked] {
            let (wrong, noticed) = compare(workload, flaw, |_, _| {});
            assert!(wrong >= 20 && noticed * 100 >= wrong * 85, "{workload} {flaw:?}: {noticed} of {wrong}");
        }
    }
}

#[test]
fn what_the_witness_approves_has_a_serial_order() {
    for workload in Workload::ALL {
        for flaw in [Flaw::None, Flaw::Snapshot, Flaw::Unchecked, Flaw::Stale] {
            for seed in 0..300 {
                let plan = small(workload, seed, flaw, 0.0);
                let history = history(&plan);
                let opening = (0..plan.keys as i64).map(|account| (account, OPENING)).collect();
                let report = witness::check(&history, workload, &Options { opening, ..Options::default() });
                let is_right = has_serial_order(&history, Store::new(plan.keys as i64, OPENING));
                assert!(is_right || !report.valid(), "{plan:?} has no serial order\n{report}");
                let unexplained = !report.valid() && flaw == Flaw::None;
                assert!(!unexplained, "{plan:?}\n{report}");
                assert!(!report.found.contains_key(&Class::NoTimestamp));
            }
        }
    }
}
