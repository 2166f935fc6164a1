//! Histories that were made up: those of a store that keeps its promises are valid, those of others are not,
//! and those that were changed afterwards are not either.

use std::collections::BTreeMap;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::{Class, Options, Report, check, run};
use crate::history::generate::{Flaw, OPENING, Plan, history};
use crate::history::{History, Kind, Mop, Op, Workload, edn};

fn options(plan: &Plan) -> Options {
    let opening = (0..plan.keys as i64).map(|account| (account, OPENING)).collect();
    Options { opening, ..Options::default() }
}

/// Without commit timestamps, so that the witness has nothing to say.
fn untimed(mut history: History) -> History {
    history.events.iter_mut().for_each(|event| event.commit_ts = None);
    history
}

fn assert_valid(plan: &Plan) {
    let report = check(&history(plan), plan.workload, &options(plan));
    assert!(report.valid(), "{plan:?}\n{report}");
    assert_eq!(report.counts.get("unplaced").copied().unwrap_or(0), 0, "{plan:?}\n{report}");
    assert_eq!(report.unchecked(), 0, "{plan:?}\n{report}");
}

#[test]
fn a_store_that_keeps_its_promises_is_valid() {
    for workload in Workload::ALL {
        for seed in 0..60 {
            assert_valid(&Plan::new(workload, seed, 300));
        }
    }
}

#[test]
fn a_store_that_keeps_its_promises_is_valid_when_hardly_anybody_learns_what_happened() {
    for workload in Workload::ALL.into_iter().filter(|workload| *workload != Workload::Bank) {
        for seed in 0..60 {
            let plan = Plan::new(workload, seed, 200);
            assert_valid(&Plan { infos: 0.6, fails: 0.2, keys: 3, writes_per_key: 8, clients: 4, ..plan });
        }
    }
}

#[test]
fn a_bank_of_which_hardly_anybody_learns_what_happened_is_valid() {
    for seed in 0..60 {
        let plan = Plan { infos: 0.5, ..Plan::new(Workload::Bank, seed, 200) };
        let report = check(&history(&plan), plan.workload, &options(&plan));
        assert!(report.valid(), "{plan:?}\n{report}");
    }
}

#[test]
fn a_store_that_keeps_its_promises_is_valid_with_one_client_and_with_many() {
    for workload in Workload::ALL {
        for seed in 0..10 {
            let plan = Plan::new(workload, seed, 200);
            assert_valid(&Plan { clients: 1, ..plan.clone() });
            assert_valid(&Plan { clients: 50, keys: 2, ..plan });
        }
    }
}

/// In how many of so many histories something is found, by class.
fn found(workload: Workload, flaw: Flaw, seeds: u64) -> BTreeMap<Class, u64> {
    let mut found = BTreeMap::new();
    for seed in 0..seeds {
        let plan = Plan { flaw, ..Plan::new(workload, seed, 300) };
        let report = check(&untimed(history(&plan)), workload, &options(&plan));
        report.classes().into_iter().for_each(|class| *found.entry(class).or_default() += 1);
    }
    found
}

#[test]
fn snapshot_isolation_shows_as_write_skew_and_as_nothing_worse() {
    for workload in [Workload::WriteSkew, Workload::Append, Workload::Register] {
        let found = found(workload, Flaw::Snapshot, 20);
        let skew = |class: &Class| matches!(class, Class::G2Item | Class::G2ItemRealtime);
        assert!(found.get(&Class::G2Item).is_some_and(|times| *times >= 10), "{workload}: {found:?}");
        // A snapshot is as old as its transaction, so real time adds no other class.
        let worse: Vec<_> = found.keys().filter(|class| !skew(class)).collect();
        assert!(worse.is_empty(), "{workload}: {found:?}");
    }
}

#[test]
fn no_isolation_shows_as_lost_updates() {
    let lists = found(Workload::WriteSkew, Flaw::Unchecked, 10);
    assert_eq!(lists.get(&Class::LostUpdate), Some(&10), "{lists:?}");
    assert_eq!(lists.get(&Class::GSingle), Some(&10), "{lists:?}");
    let registers = found(Workload::Register, Flaw::Unchecked, 10);
    assert!(registers.contains_key(&Class::LostUpdate), "{registers:?}");
    let counter = found(Workload::Counter, Flaw::Unchecked, 10);
    assert_eq!(counter.get(&Class::DuplicateCount), Some(&10), "{counter:?}");
}

#[test]
fn stale_reads_are_found_in_every_workload_that_claims_real_time() {
    let check = |workload, class| {
        let found = found(workload, Flaw::Stale, 10);
        // Now and then a read is stale by so little that nobody can tell.
        assert!(found.get(&class).is_some_and(|times| *times >= 8), "{workload}: {found:?}");
    };
    check(Workload::Set, Class::StaleElement);
    check(Workload::Counter, Class::CountBackwards);
    check(Workload::Append, Class::GSingleRealtime);
    check(Workload::Register, Class::GSingleRealtime);
}

#[test]
fn the_witness_finds_stale_reads_by_their_timestamps() {
    // Write skew has no transactions that only read.
    for workload in Workload::ALL.into_iter().filter(|workload| *workload != Workload::WriteSkew) {
        for seed in 0..10 {
            let plan = Plan { flaw: Flaw::Stale, ..Plan::new(workload, seed, 300) };
            let report = check(&history(&plan), workload, &options(&plan));
            assert!(report.found.contains_key(&Class::TimestampBackwards), "{workload}, {seed}: {report}");
        }
    }
}

/// Reads of lists that were acknowledged: the event, the step, the key, and what was read.
fn reads(history: &History) -> Vec<(usize, usize, i64, Vec<i64>)> {
    let mut reads = Vec::new();
    for (place, event) in history.events.iter().enumerate().filter(|(_, event)| event.kind == Kind::Ok) {
        let Op::Txn(mops) = &event.op else { continue };
        for (step, mop) in mops.iter().enumerate() {
            if let Mop::Read { key, list: Some(list) } = mop {
                reads.push((place, step, *key, list.clone()));
            }
        }
    }
    reads
}

fn change(history: &mut History, event: usize, step: usize, change: impl FnOnce(&mut Vec<i64>)) {
    if let Op::Txn(mops) = &mut history.events[event].op
        && let Mop::Read { list: Some(list), .. } = &mut mops[step]
    {
        change(list);
    }
}

/// Checks many histories, each after a change that somebody must notice, once with timestamps and once
/// without.
fn changed(seeds: u64, mut change: impl FnMut(&mut History, &mut StdRng)) -> Vec<[Report; 2]> {
    let changed = (0..seeds).map(|seed| {
        let plan = Plan::new(Workload::Append, seed, 300);
        let mut history = history(&plan);
        change(&mut history, &mut StdRng::seed_from_u64(seed));
        let timed = super::witness::check(&history, Workload::Append, &Options::default());
        let untimed = check(&untimed(history), Workload::Append, &Options::default());
        assert!(!timed.valid() && !untimed.valid(), "{plan:?}\n{timed}\n{untimed}");
        [timed, untimed]
    });
    changed.collect()
}

#[test]
fn an_acknowledged_append_that_is_dropped_is_found() {
    let reports = changed(30, |history, rng| {
        let acknowledged: Vec<(i64, i64)> = history
            .operations()
            .iter()
            .filter(|operation| operation.outcome() == Kind::Ok)
            .filter_map(|operation| match operation.op() {
                Op::Txn(mops) => mops.iter().find_map(|mop| match mop {
                    Mop::Append { key, value } => Some((*key, *value)),
                    Mop::Read { .. } => None,
                }),
                other => panic!("{other} is not a transaction"),
            })
            .collect();
        let (key, value) = acknowledged[rng.random_range(0..acknowledged.len())];
        for (event, step, _, _) in reads(history).into_iter().filter(|read| read.2 == key) {
            change(history, event, step, |list| list.retain(|other| *other != value));
        }
    });
    assert!(reports.iter().all(|[_, untimed]| untimed.found.contains_key(&Class::LostAppend)));
}

#[test]
fn two_elements_that_are_swapped_in_a_read_are_found() {
    changed(30, |history, rng| {
        let long: Vec<_> = reads(history).into_iter().filter(|read| read.3.len() > 2).collect();
        // An early one, which later reads contradict.
        let (event, step, _, list) = &long[rng.random_range(0..long.len() / 2)];
        change(history, *event, *step, |found| found.swap(list.len() - 1, list.len() - 2));
    });
}

#[test]
fn two_answers_that_are_exchanged_are_found() {
    let reports = changed(30, |history, rng| {
        let reads = reads(history);
        let pairs: Vec<_> = reads
            .iter()
            .flat_map(|one| reads.iter().map(move |other| (one, other)))
            .filter(|(one, other)| one.2 == other.2 && one.3.len() + 5 < other.3.len())
            .collect();
        let (one, other) = pairs[rng.random_range(0..pairs.len())];
        change(history, one.0, one.1, |list| *list = other.3.clone());
        change(history, other.0, other.1, |list| *list = one.3.clone());
    });
    assert!(reports.iter().all(|[timed, _]| timed.found.contains_key(&Class::WitnessMismatch)));
}

#[test]
fn a_read_of_an_old_version_is_found() {
    changed(30, |history, _| {
        let reads = reads(history);
        // The reads at the end come after everything.
        let (event, step, ..) =
            reads.iter().rev().find(|read| !read.3.is_empty()).expect("something was appended");
        change(history, *event, *step, |list| list.truncate(list.len() / 2));
    });
}

#[test]
fn the_stalest_read_of_a_long_history_is_told_in_two_steps() {
    let mut history = untimed(history(&Plan::new(Workload::Append, 1, 3000)));
    let reads = reads(&history);
    let (last, ..) = *reads.iter().rfind(|read| read.2 == 0).expect("it was read at the end");
    for (event, step, ..) in reads.into_iter().filter(|(event, ..)| *event == last) {
        change(&mut history, event, step, Vec::clear);
    }
    // Nearly all transactions are between that read and what it misses, so they are on a cycle with it.
    let report = check(&history, Workload::Append, &Options::default());
    assert_eq!(report.found.get(&Class::GSingleRealtime), Some(&1), "{report}");
    let story = report.anomalies.iter().find(|anomaly| anomaly.class == Class::GSingleRealtime);
    let story = &story.expect("it is explained").explanation;
    assert!(story.starts_with("2 transactions"), "{story}");
}

#[test]
fn an_unknown_workload_is_an_error() {
    let error = run("elle", &History::default(), &Options::default()).expect_err("there is none");
    assert!(error.to_string().contains("\"elle\""));
    let text = "{:process 0, :type :invoke, :f :add, :value 1}";
    let history = edn::read(text.as_bytes(), Workload::Set).expect("it is a history");
    let report = run("bank", &history, &Options::default()).expect("there is a bank");
    assert_eq!(report.classes(), [Class::Malformed]);
}

#[test]
fn what_is_no_history_is_malformed() {
    let text = "{:process 0, :type :ok, :f :add, :value 1}";
    let history = edn::read(text.as_bytes(), Workload::Set).expect("it is read");
    let report = check(&history, Workload::Set, &Options::default());
    assert_eq!(report.classes(), [Class::Malformed]);
    assert_eq!(report.anomalies[0].explanation, "event 0: process 0 has asked nothing");
}

#[test]
fn only_the_first_of_a_class_are_explained_and_all_are_counted() {
    let lines = (0..30).map(|element| {
        let question = format!("{{:process 0, :type :invoke, :f :add, :value {element}}}\n");
        question.clone() + &question.replace("invoke", "ok")
    });
    let read =
        "{:process 0, :type :invoke, :f :read, :value nil}\n{:process 0, :type :ok, :f :read, :value #{}}";
    let text = lines.collect::<String>() + read;
    let history = edn::read(text.as_bytes(), Workload::Set).expect("it is a history");
    let report = check(&history, Workload::Set, &Options { explained_max: 3, ..Options::default() });
    assert_eq!((report.found[&Class::LostElement], report.anomalies.len()), (30, 3));
    let json = report.to_json();
    assert_eq!((&json["valid"], &json["found"]["lost-element"]), (&false.into(), &30.into()));
    assert_eq!(json["anomalies"][0]["class"], "lost-element");
    let text = report.to_string();
    assert!(text.starts_with("set: INVALID\n"), "{text}");
    assert!(text.contains("lost-element, 30 times"), "{text}");
}
