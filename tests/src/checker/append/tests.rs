//! Anomalies of lists, planted by hand, and what resembles them but is none.

use crate::checker::Class;
use crate::checker::planted;
use crate::history::Workload;

fn check(text: &str, expected: &[Class]) {
    planted::check(Workload::Append, text, expected);
}

#[test]
fn a_transaction_must_find_its_own_appends() {
    check("0 ok :txn [[:append 1 1] [:r 1 nil]]", &[Class::Internal]);
    check("0 ok :txn [[:append 1 1] [:r 1 [1]]]", &[]);
    check("0 ok :txn [[:r 1 nil] [:append 1 1] [:r 1 [1]] [:r 1 [1]]]", &[]);
}

#[test]
fn a_list_must_not_change_inside_a_transaction() {
    check(
        "0 ok :txn [[:append 1 1]]
         1 invoke :txn [[:r 1 nil] [:r 1 nil]]
         0 ok :txn [[:append 1 2]]
         1 ok :txn [[:r 1 [1]] [:r 1 [1 2]]]",
        &[Class::Internal],
    );
}

#[test]
fn an_element_must_not_be_there_twice() {
    let read = |list: &str| {
        format!("0 ok :txn [[:append 1 1]]\n1 ok :txn [[:append 1 2]]\n0 ok :txn [[:r 1 {list}]]")
    };
    check(&read("[1 2 1]"), &[Class::DuplicateElements]);
    check(&read("[1 2]"), &[]);
}

#[test]
fn reads_must_be_beginnings_of_one_another() {
    let reads = |one: &str, other: &str| {
        format!(
            "0 invoke :txn [[:append 1 1]]
             1 invoke :txn [[:append 1 2]]
             2 ok :txn [[:r 1 {one}]]
             0 ok :txn [[:append 1 1]]
             1 ok :txn [[:append 1 2]]
             3 ok :txn [[:r 1 {other}]]"
        )
    };
    check(&reads("[2]", "[1 2]"), &[Class::IncompatibleOrder]);
    check(&reads("[1]", "[1 2]"), &[]);
    check(&reads("[2]", "[2 1]"), &[]);
}

#[test]
fn what_failed_must_not_be_read() {
    check("0 fail :txn [[:append 1 1]]\n1 ok :txn [[:r 1 [1]]]", &[Class::G1a]);
    check("0 fail :txn [[:append 1 1]]\n1 ok :txn [[:r 1 nil]]", &[]);
}

#[test]
fn what_is_unknown_may_be_read_or_not() {
    check("0 info :txn [[:append 1 1]]\n1 ok :txn [[:r 1 [1]]]", &[]);
    check("0 info :txn [[:append 1 1]]\n1 ok :txn [[:r 1 []]]\n1 ok :txn [[:r 1 [1]]]", &[]);
    check("0 info :txn [[:append 1 1]]\n1 ok :txn [[:r 1 []]]", &[]);
    check("0 invoke :txn [[:append 1 1]]\n1 ok :txn [[:r 1 [1]]]", &[]);
}

#[test]
fn what_nobody_appended_must_not_be_read() {
    check("0 ok :txn [[:append 1 1]]\n0 ok :txn [[:r 1 [1 9]]]", &[Class::GarbageRead]);
}

#[test]
fn what_is_in_the_middle_of_a_transaction_must_not_be_read() {
    let read = |list: &str| {
        format!(
            "1 invoke :txn [[:r 1 nil]]
             0 ok :txn [[:append 1 1] [:append 1 2]]
             1 ok :txn [[:r 1 {list}]]
             2 ok :txn [[:r 1 [1 2]]]"
        )
    };
    check(&read("[1]"), &[Class::G1b, Class::GSingle]);
    check(&read("[1 2]"), &[]);
    check(&read("[]"), &[]);
    let own = "0 ok :txn [[:append 1 1] [:r 1 [1]] [:append 1 2]]\n1 ok :txn [[:r 1 [1 2]]]";
    check(own, &[]);
}

#[test]
fn nothing_must_be_appended_to_what_failed() {
    let read = |list: &str| {
        format!("0 fail :txn [[:append 1 1]]\n0 ok :txn [[:append 1 2]]\n1 ok :txn [[:r 1 {list}]]")
    };
    check(&read("[1 2]"), &[Class::G1a, Class::DirtyUpdate]);
    check(&read("[2]"), &[]);
}

#[test]
fn two_updates_of_one_version_lose_one() {
    let second = |found: &str| {
        format!(
            "0 invoke :txn [[:r 1 nil] [:append 1 1]]
             1 invoke :txn [[:r 1 nil] [:append 1 2]]
             0 ok :txn [[:r 1 nil] [:append 1 1]]
             1 ok :txn [[:r 1 {found}] [:append 1 2]]
             2 ok :txn [[:r 1 [1 2]]]"
        )
    };
    check(&second("nil"), &[Class::LostUpdate, Class::GSingle]);
    check(&second("[1]"), &[]);
}

#[test]
fn an_acknowledged_append_must_be_in_a_later_read() {
    check("0 ok :txn [[:append 1 1]]\n1 ok :txn [[:r 1 nil]]", &[Class::LostAppend]);
    let concurrent = "1 invoke :txn [[:r 1 nil]]\n0 ok :txn [[:append 1 1]]\n1 ok :txn [[:r 1 nil]]";
    check(concurrent, &[]);
    check("0 info :txn [[:append 1 1]]\n1 ok :txn [[:r 1 nil]]", &[]);
    check("0 ok :txn [[:append 1 1]]\n1 ok :txn [[:r 2 nil]]", &[]);
}

#[test]
fn an_acknowledged_append_must_not_be_overwritten() {
    check(
        "0 ok :txn [[:append 1 1]]
         0 ok :txn [[:append 1 2]]
         1 ok :txn [[:r 1 [2]]]",
        &[Class::LostAppend],
    );
}

#[test]
fn an_append_that_was_seen_must_not_be_gone_at_the_end() {
    let last =
        |list: &str| format!("0 ok :txn [[:append 1 1]]\n1 ok :txn [[:r 1 [1]]]\n1 ok :txn [[:r 1 {list}]]");
    check(&last("nil"), &[Class::LostAppend, Class::GSingleRealtime]);
    check(&last("[1]"), &[]);
}

#[test]
fn a_stale_read_is_a_cycle_of_one_overwritten_read_and_real_time() {
    check(
        "0 ok :txn [[:append 1 1]]
         1 ok :txn [[:r 1 nil]]
         2 ok :txn [[:r 1 [1]]]",
        &[Class::GSingleRealtime],
    );
}

#[test]
fn writers_of_two_keys_must_agree_on_their_order() {
    let second = |list: &str| {
        format!(
            "0 invoke :txn [[:append 1 1] [:append 2 1]]
             1 ok :txn [[:append 1 2] [:append 2 2]]
             0 ok :txn [[:append 1 1] [:append 2 1]]
             2 ok :txn [[:r 1 [1 2]]]
             3 ok :txn [[:r 2 {list}]]"
        )
    };
    check(&second("[2 1]"), &[Class::G0]);
    check(&second("[1 2]"), &[]);
}

#[test]
fn writers_must_agree_with_real_time() {
    let text = |list: &str| {
        format!("0 ok :txn [[:append 1 1]]\n1 ok :txn [[:append 1 2]]\n2 ok :txn [[:r 1 {list}]]")
    };
    check(&text("[2 1]"), &[Class::G0Realtime]);
    check(&text("[1 2]"), &[]);
    let concurrent = "0 invoke :txn [[:append 1 1]]
             1 ok :txn [[:append 1 2]]
             0 ok :txn [[:append 1 1]]
             2 ok :txn [[:r 1 [2 1]]]";
    check(concurrent, &[]);
}

#[test]
fn two_transactions_must_not_read_each_other() {
    let text = |list: &str| {
        format!(
            "0 invoke :txn [[:append 1 1] [:r 2 nil]]
             1 invoke :txn [[:append 2 2] [:r 1 nil]]
             0 ok :txn [[:append 1 1] [:r 2 [2]]]
             1 ok :txn [[:append 2 2] [:r 1 {list}]]"
        )
    };
    check(&text("[1]"), &[Class::G1c]);
    check(&text("nil"), &[]);
}

#[test]
fn nobody_reads_what_is_appended_in_the_future() {
    check("0 ok :txn [[:r 1 [1]]]\n1 ok :txn [[:append 1 1]]", &[Class::G1cRealtime]);
    check("0 ok :txn [[:r 1 [1]]]\n1 info :txn [[:append 1 1]]", &[Class::G1cRealtime]);
    check("1 invoke :txn [[:append 1 1]]\n0 ok :txn [[:r 1 [1]]]\n1 ok :txn [[:append 1 1]]", &[]);
}

#[test]
fn a_read_must_see_all_of_a_transaction_or_nothing() {
    let text = |first: &str| {
        format!(
            "0 invoke :txn [[:append 1 1] [:append 2 1]]
             1 ok :txn [[:r 1 {first}] [:r 2 [1]]]
             0 ok :txn [[:append 1 1] [:append 2 1]]
             2 ok :txn [[:r 1 [1]] [:r 2 [1]]]"
        )
    };
    check(&text("nil"), &[Class::GSingle]);
    check(&text("[1]"), &[]);
}

#[test]
fn a_read_must_see_all_of_an_unknown_transaction_or_nothing() {
    let text = |second: &str| {
        format!("0 info :txn [[:append 1 1] [:append 2 1]]\n1 ok :txn [[:r 1 [1]] [:r 2 {second}]]")
    };
    check(&text("nil"), &[Class::GSingle]);
    check(&text("[1]"), &[]);
}

#[test]
fn write_skew_is_a_cycle_of_two_overwritten_reads() {
    let text = |list: &str| {
        format!(
            "0 invoke :txn [[:r 1 nil] [:r 2 nil] [:append 1 1]]
             1 invoke :txn [[:r 1 nil] [:r 2 nil] [:append 2 2]]
             0 ok :txn [[:r 1 nil] [:r 2 nil] [:append 1 1]]
             1 ok :txn [[:r 1 {list}] [:r 2 nil] [:append 2 2]]"
        )
    };
    planted::check(Workload::WriteSkew, &text("nil"), &[Class::G2Item]);
    planted::check(Workload::WriteSkew, &text("[1]"), &[]);
}

#[test]
fn two_stale_reads_and_real_time_make_a_cycle_too() {
    // 0 misses what 2 appends, and 1, which comes later, misses what 0 appends.
    let text = |list: &str| {
        format!(
            "2 invoke :txn [[:append 2 2] [:r 3 nil]]
             0 invoke :txn [[:append 1 1] [:r 2 nil]]
             0 ok :txn [[:append 1 1] [:r 2 nil]]
             1 ok :txn [[:append 3 3]]
             2 ok :txn [[:append 2 2] [:r 3 {list}]]
             3 ok :txn [[:r 1 [1]] [:r 2 [2]] [:r 3 [3]]]"
        )
    };
    check(&text("nil"), &[]);
    check(
        "2 invoke :txn [[:r 1 nil] [:append 2 2]]
         0 ok :txn [[:r 2 nil] [:append 3 3]]
         1 ok :txn [[:r 4 nil] [:append 1 1]]
         2 ok :txn [[:r 1 nil] [:append 2 2]]
         3 ok :txn [[:r 1 [1]] [:r 2 [2]] [:r 3 [3]]]",
        &[],
    );
    check(
        "2 invoke :txn [[:r 1 nil] [:append 2 2]]
         1 ok :txn [[:append 1 1]]
         0 ok :txn [[:r 2 nil] [:append 3 3]]
         2 ok :txn [[:r 1 nil] [:append 2 2]]
         3 ok :txn [[:r 1 [1]] [:r 2 [2]] [:r 3 [3]]]",
        &[Class::G2ItemRealtime],
    );
}

#[test]
fn a_story_names_the_transactions_and_says_why() {
    let text = "0 ok :txn [[:append 1 1]]\n1 ok :txn [[:r 1 nil]]\n2 ok :txn [[:r 1 [1]]]";
    let report = planted::check(Workload::Append, text, &[Class::GSingleRealtime]);
    let story = [
        "2 transactions, each before the next:",
        "T3 = [[:r 1 nil]], process 1, ok",
        "T1 = [[:append 1 1]], process 0, ok",
        "rw: T3 read nothing in key 1, and T1 appended 1, which is later in the list",
        "rt: T1 ended (event 1) before T3 began (event 2)",
    ];
    assert_eq!(report.anomalies[0].explanation, story.join("\n"));
}

#[test]
fn appends_must_be_unique() {
    check("0 ok :txn [[:append 1 1]]\n1 fail :txn [[:append 1 1]]", &[Class::Malformed]);
    check("0 ok :txn [[:append 1 1]]\n1 fail :txn [[:append 2 1]]", &[]);
}
