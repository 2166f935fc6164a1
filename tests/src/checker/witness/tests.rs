//! Histories whose timestamps are wrong, and such as are not.

use crate::checker::planted::history;
use crate::checker::{Class, Options, Report, witness};
use crate::history::Workload;

fn check(workload: Workload, text: &str, expected: &[Class]) -> Report {
    let report = witness::check(&history(workload, text), workload, &Options::default());
    assert_eq!(report.classes(), expected, "{report}");
    report
}

#[test]
fn reads_must_find_what_the_timestamps_say() {
    let read = |list: &str, at: u64| {
        format!(
            "0 invoke :txn [[:append 1 1]]
             1 invoke :txn [[:append 1 2]]
             2 ok :txn [[:r 1 {list}]], :commit-ts {at}
             0 ok :txn [[:append 1 1]], :commit-ts 20
             1 ok :txn [[:append 1 2]], :commit-ts 10"
        )
    };
    check(Workload::Append, &read("nil", 9), &[]);
    check(Workload::Append, &read("[2]", 10), &[]);
    check(Workload::Append, &read("[2]", 19), &[]);
    check(Workload::Append, &read("[2 1]", 20), &[]);
    check(Workload::Append, &read("nil", 10), &[Class::WitnessMismatch]);
    check(Workload::Append, &read("[1]", 10), &[Class::WitnessMismatch]);
    check(Workload::Append, &read("[1 2]", 20), &[Class::WitnessMismatch]);
}

#[test]
fn transactions_must_find_their_own_writes() {
    check(Workload::Append, "0 ok :txn [[:append 1 1] [:r 1 [1]] [:append 1 2]], :commit-ts 1", &[]);
    check(Workload::Append, "0 ok :txn [[:append 1 1] [:r 1 nil]], :commit-ts 1", &[Class::WitnessMismatch]);
}

#[test]
fn writers_that_meet_must_have_timestamps_of_their_own() {
    let text = |key: u64, at: u64| {
        format!(
            "0 invoke :txn [[:append 1 1]]
             1 ok :txn [[:append {key} 2]], :commit-ts 1
             0 ok :txn [[:append 1 1]], :commit-ts {at}"
        )
    };
    check(Workload::Append, &text(1, 1), &[Class::DuplicateTimestamp]);
    check(Workload::Append, &text(1, 2), &[]);
    check(Workload::Append, &text(2, 1), &[]);
    let also = |read: &str| {
        format!(
            "0 invoke :txn [[:append 1 1] [:r 3 nil]]
             1 ok :txn [[:append 2 1] {read}], :commit-ts 1
             0 ok :txn [[:append 1 1] [:r 3 nil]], :commit-ts 1"
        )
    };
    check(Workload::Append, &also("[:r 3 nil]"), &[]);
    check(Workload::Append, &also("[:r 1 [1]]"), &[Class::DuplicateTimestamp]);
    let readers = "0 ok :txn [[:r 1 nil]], :commit-ts 1\n1 ok :txn [[:r 1 nil]], :commit-ts 1";
    check(Workload::Append, readers, &[]);
}

#[test]
fn timestamps_must_agree_with_real_time() {
    let after = |first: &str, then: &str| format!("0 ok :txn {first}\n1 ok :txn {then}");
    let (write, read) = ("[[:append 1 1]], :commit-ts", "[[:r 2 nil]], :commit-ts");
    let other = "[[:append 3 1]], :commit-ts";
    let backwards: &[Class] = &[Class::TimestampBackwards];
    for (first, at, then, expected) in [
        (write, 4, other, backwards),
        (write, 6, other, &[]),
        (write, 4, read, backwards),
        (write, 5, read, &[]),
        (read, 4, read, backwards),
        (read, 5, read, &[]),
        (read, 5, write, backwards),
        (read, 6, write, &[]),
    ] {
        check(Workload::Append, &after(&format!("{first} 5"), &format!("{then} {at}")), expected);
    }
    let concurrent = "0 invoke :txn [[:append 1 1]]
             1 ok :txn [[:append 2 1]], :commit-ts 5
             0 ok :txn [[:append 1 1]], :commit-ts 4";
    check(Workload::Append, concurrent, &[]);
}

#[test]
fn acknowledged_operations_must_have_timestamps() {
    check(Workload::Append, "0 ok :txn [[:append 1 1]]", &[Class::NoTimestamp]);
    let history =
        history(Workload::Append, "0 ok :txn [[:append 1 1]], :commit-ts 1\n0 ok :txn [[:r 1 [1]]]");
    assert!(!witness::applies(&history));
}

#[test]
fn what_is_unknown_takes_place_where_the_list_shows_it() {
    let second = |list: &str| {
        format!(
            "0 info :txn [[:append 1 1] [:append 2 1]]
             1 ok :txn [[:append 2 2]], :commit-ts 5
             2 ok :txn [[:r 1 [1]]], :commit-ts 6
             2 ok :txn [[:r 2 {list}]], :commit-ts 7"
        )
    };
    let report = check(Workload::Append, &second("[1 2]"), &[]);
    assert_eq!((report.counts["placed"], report.counts["unplaced"]), (1, 0));
    check(Workload::Append, &second("[2 1]"), &[]);
    check(Workload::Append, &second("[2]"), &[Class::WitnessMismatch]);
}

#[test]
fn what_is_unknown_may_need_something_else_that_is_unknown() {
    check(
        Workload::Append,
        "0 info :txn [[:append 1 1] [:append 2 1]]
         1 info :txn [[:append 2 2] [:append 3 2]]
         2 ok :txn [[:r 3 [2]]], :commit-ts 5
         2 ok :txn [[:r 1 [1]] [:r 2 [1 2]]], :commit-ts 6",
        &[],
    );
}

#[test]
fn a_register_holds_what_was_written_last() {
    let read = |value: &str| {
        format!(
            "0 ok :txn [[:w 1 1]], :commit-ts 1
             1 info :txn [[:w 1 2]]
             0 ok :txn [[:w 1 3]], :commit-ts 2
             2 ok :txn [[:r 1 {value}]], :commit-ts 2"
        )
    };
    check(Workload::Register, &read("3"), &[]);
    check(Workload::Register, &read("2"), &[]);
    check(Workload::Register, &read("1"), &[Class::WitnessMismatch]);
    check(Workload::Register, &read("nil"), &[Class::WitnessMismatch]);
}

#[test]
fn an_unknown_write_takes_place_once() {
    let last = |value: u32| {
        format!(
            "0 info :txn [[:w 1 2]]
             1 ok :txn [[:r 1 2]], :commit-ts 1
             1 ok :txn [[:w 1 3]], :commit-ts 2
             1 ok :txn [[:r 1 {value}]], :commit-ts 3"
        )
    };
    check(Workload::Register, &last(3), &[]);
    check(Workload::Register, &last(2), &[Class::WitnessMismatch]);
}

#[test]
fn an_unknown_transaction_takes_place_at_one_instant() {
    let text = |first: &str| {
        format!(
            "0 info :txn [[:w 1 2] [:w 2 2]]
             1 ok :txn [[:r 1 {first}] [:r 2 nil]], :commit-ts 1
             1 ok :txn [[:r 1 2] [:r 2 2]], :commit-ts 1
             1 ok :txn [[:w 1 3]], :commit-ts 2"
        )
    };
    check(Workload::Register, &text("nil"), &[]);
    check(Workload::Register, &text("2"), &[Class::WitnessMismatch]);
}

#[test]
fn transfers_are_replayed() {
    let read = |balances: &str, at: u64| {
        format!(
            "2 ok :read {{1 10, 2 10}}, :commit-ts 1
             0 invoke :transfer {{:from 1, :to 2, :amount 3}}
             2 ok :read {balances}, :commit-ts {at}
             0 ok :transfer {{:from 1, :to 2, :amount 3}}, :commit-ts 5"
        )
    };
    check(Workload::Bank, &read("{1 10, 2 10}", 4), &[]);
    check(Workload::Bank, &read("{1 7, 2 13}", 5), &[]);
    check(Workload::Bank, &read("{1 7, 2 13}", 4), &[Class::WitnessMismatch]);
    check(Workload::Bank, &read("{1 8, 2 12}", 5), &[Class::WitnessMismatch]);
}

#[test]
fn unknown_transfers_are_found_by_what_they_move() {
    let read = |balances: &str| {
        format!(
            "2 ok :read {{1 10, 2 10}}, :commit-ts 1
             0 info :transfer {{:from 1, :to 2, :amount 3}}
             1 info :transfer {{:from 1, :to 2, :amount 4}}
             2 ok :read {balances}, :commit-ts 2
             2 ok :read {balances}, :commit-ts 2"
        )
    };
    for balances in ["{1 10, 2 10}", "{1 7, 2 13}", "{1 6, 2 14}", "{1 3, 2 17}"] {
        check(Workload::Bank, &read(balances), &[]);
    }
    check(Workload::Bank, &read("{1 9, 2 11}"), &[Class::WitnessMismatch]);
}

#[test]
fn sets_and_counters_are_replayed() {
    let read = |elements: &str| {
        format!(
            "0 ok :add 1, :commit-ts 1
             1 info :add 2
             2 ok :read {elements}, :commit-ts 1
             2 ok :read {elements}, :commit-ts 1"
        )
    };
    check(Workload::Set, &read("#{1}"), &[]);
    check(Workload::Set, &read("#{1 2}"), &[]);
    check(Workload::Set, &read("#{2}"), &[Class::WitnessMismatch]);
    check(Workload::Set, &read("#{1 3}"), &[Class::WitnessMismatch]);
    let read = |count: u32| {
        format!("0 ok :add 1, :count 1, :commit-ts 1\n1 info :add 1\n2 ok :read {count}, :commit-ts 1")
    };
    check(Workload::Counter, &read(1), &[]);
    check(Workload::Counter, &read(2), &[]);
    check(Workload::Counter, &read(0), &[Class::WitnessMismatch]);
    check(Workload::Counter, &read(3), &[Class::WitnessMismatch]);
}
