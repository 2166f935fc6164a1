//! Anomalies of registers, planted by hand, and what resembles them but is none.

use crate::checker::{self, Class, Options, planted};
use crate::history::Workload;

fn check(text: &str, expected: &[Class]) {
    planted::check(Workload::Register, text, expected);
}

#[test]
fn a_transaction_must_find_its_own_writes() {
    check("0 ok :txn [[:w 1 1] [:r 1 nil]]", &[Class::Internal]);
    check("0 ok :txn [[:w 1 1] [:r 1 1]]", &[]);
    check("0 ok :txn [[:r 1 nil] [:w 1 1] [:w 1 2] [:r 1 2] [:r 1 2]]", &[]);
}

#[test]
fn a_register_must_not_change_inside_a_transaction() {
    let text = |second: &str| {
        format!(
            "1 invoke :txn [[:r 1 nil] [:r 1 nil]]
             0 ok :txn [[:w 1 1]]
             1 ok :txn [[:r 1 nil] [:r 1 {second}]]"
        )
    };
    check(&text("1"), &[Class::Internal]);
    check(&text("nil"), &[]);
}

#[test]
fn what_failed_must_not_be_read() {
    check("0 fail :txn [[:w 1 1]]\n1 ok :txn [[:r 1 1]]", &[Class::G1a]);
    check("0 fail :txn [[:w 1 1]]\n1 ok :txn [[:r 1 nil]]", &[]);
    check("0 info :txn [[:w 1 1]]\n1 ok :txn [[:r 1 1]]", &[]);
}

#[test]
fn what_nobody_wrote_must_not_be_read() {
    check("0 ok :txn [[:w 1 1]]\n1 ok :txn [[:r 1 9]]", &[Class::GarbageRead]);
}

#[test]
fn what_is_overwritten_at_once_must_not_be_read() {
    let read = |value: u32| format!("0 ok :txn [[:w 1 1] [:w 1 2]]\n1 ok :txn [[:r 1 {value}]]");
    check(&read(1), &[Class::G1b]);
    check(&read(2), &[]);
}

#[test]
fn two_updates_of_one_value_lose_one() {
    let second = |found: &str| {
        format!(
            "0 invoke :txn [[:r 1 nil] [:w 1 1]]
             1 invoke :txn [[:r 1 nil] [:w 1 2]]
             0 ok :txn [[:r 1 nil] [:w 1 1]]
             1 ok :txn [[:r 1 {found}] [:w 1 2]]"
        )
    };
    // Which of the two is later, nobody knows: each read what the other overwrote.
    check(&second("nil"), &[Class::LostUpdate, Class::G2Item]);
    check(&second("1"), &[]);
}

#[test]
fn values_must_not_be_older_than_one_another() {
    check(
        "0 invoke :txn [[:r 1 nil] [:w 1 1]]
         1 invoke :txn [[:r 1 nil] [:w 1 2]]
         0 ok :txn [[:r 1 2] [:w 1 1]]
         1 ok :txn [[:r 1 1] [:w 1 2]]",
        &[Class::CyclicVersions, Class::G1c],
    );
}

#[test]
fn a_stale_read_is_a_cycle_of_versions_and_of_transactions() {
    let read =
        |value: &str| format!("0 ok :txn [[:w 1 1]]\n0 ok :txn [[:w 1 2]]\n1 ok :txn [[:r 1 {value}]]");
    check(&read("1"), &[Class::CyclicVersions, Class::GSingleRealtime]);
    check(&read("nil"), &[Class::CyclicVersions, Class::GSingleRealtime]);
    check(&read("2"), &[]);
    let concurrent = |value: &str| {
        format!(
            "1 invoke :txn [[:r 1 nil]]
             0 ok :txn [[:w 1 1]]
             0 ok :txn [[:w 1 2]]
             1 ok :txn [[:r 1 {value}]]"
        )
    };
    ["nil", "1", "2"].into_iter().for_each(|value| check(&concurrent(value), &[]));
}

#[test]
fn readers_one_after_the_other_must_not_see_the_order_of_writes_reversed() {
    let reads = |one: u32, other: u32| {
        format!(
            "0 invoke :txn [[:w 1 1]]
             1 invoke :txn [[:w 1 2]]
             2 ok :txn [[:r 1 {one}]]
             2 ok :txn [[:r 1 {other}]]
             2 ok :txn [[:r 1 1]]
             0 ok :txn [[:w 1 1]]
             1 ok :txn [[:w 1 2]]"
        )
    };
    check(&reads(1, 2), &[Class::CyclicVersions]);
    check(&reads(2, 1), &[]);
}

#[test]
fn writers_of_two_keys_must_agree_on_their_order() {
    let second = |value: u32| {
        format!(
            "0 invoke :txn [[:w 1 1] [:w 2 1]]
             1 invoke :txn [[:w 1 2] [:w 2 2]]
             2 ok :txn [[:r 1 1] [:w 1 3]]
             0 ok :txn [[:w 1 1] [:w 2 1]]
             1 ok :txn [[:w 1 2] [:w 2 2]]
             3 ok :txn [[:r 1 2] [:w 1 4]]
             3 ok :txn [[:r 2 {value}]]"
        )
    };
    check(&second(2), &[]);
    check(&second(1), &[Class::G0]);
}

#[test]
fn two_transactions_must_not_read_each_other() {
    let text = |value: &str| {
        format!(
            "0 invoke :txn [[:w 1 1] [:r 2 nil]]
             1 invoke :txn [[:w 2 2] [:r 1 nil]]
             0 ok :txn [[:w 1 1] [:r 2 2]]
             1 ok :txn [[:w 2 2] [:r 1 {value}]]"
        )
    };
    check(&text("1"), &[Class::G1c]);
    check(&text("nil"), &[]);
}

#[test]
fn nobody_reads_what_is_written_in_the_future() {
    check("0 ok :txn [[:r 1 1]]\n1 ok :txn [[:w 1 1]]", &[Class::G1cRealtime]);
    check("1 invoke :txn [[:w 1 1]]\n0 ok :txn [[:r 1 1]]\n1 ok :txn [[:w 1 1]]", &[]);
}

#[test]
fn a_read_must_see_all_of_a_transaction_or_nothing() {
    let text = |first: &str| {
        format!(
            "0 invoke :txn [[:w 1 1] [:w 2 1]]
             1 ok :txn [[:r 1 {first}] [:r 2 1]]
             0 ok :txn [[:w 1 1] [:w 2 1]]"
        )
    };
    check(&text("nil"), &[Class::GSingle]);
    check(&text("1"), &[]);
}

#[test]
fn write_skew_is_a_cycle_of_two_overwritten_reads() {
    let text = |value: &str| {
        format!(
            "0 invoke :txn [[:r 1 nil] [:r 2 nil] [:w 1 1]]
             1 invoke :txn [[:r 1 nil] [:r 2 nil] [:w 2 2]]
             0 ok :txn [[:r 1 nil] [:r 2 nil] [:w 1 1]]
             1 ok :txn [[:r 1 {value}] [:r 2 nil] [:w 2 2]]"
        )
    };
    check(&text("nil"), &[Class::G2Item]);
    check(&text("1"), &[]);
}

#[test]
fn a_long_fork_is_a_cycle_of_two_overwritten_reads() {
    let text = "0 invoke :write [[:w 1 1]]
         1 invoke :write [[:w 2 1]]
         3 invoke :read [[:r 1 nil] [:r 2 nil]]
         2 ok :read [[:r 1 1] [:r 2 nil]]
         3 ok :read [[:r 1 nil] [:r 2 1]]
         0 ok :write [[:w 1 1]]
         1 ok :write [[:w 2 1]]";
    let forked = planted::history(Workload::LongFork, text);
    let report = checker::check(&forked, Workload::Register, &Options::default());
    assert_eq!(report.classes(), [Class::G2Item], "{report}");
}

#[test]
fn writes_must_be_unique() {
    check("0 ok :txn [[:w 1 1]]\n1 fail :txn [[:w 1 1]]", &[Class::Malformed]);
}
