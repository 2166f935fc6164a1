//! Histories survive being written and read.

use std::collections::{BTreeMap, BTreeSet};

use proptest::collection::{btree_map, btree_set, vec};
use proptest::prelude::{Just, Strategy, any, prop_assert_eq, prop_oneof, proptest};
use proptest::{option, sample};

use super::{Value, read, write};
use crate::history::{Event, History, Kind, Mop, Op, RwMop, Workload};

fn text(history: &History) -> String {
    let mut text = Vec::new();
    write(history, &mut text).expect("all numbers are small enough");
    String::from_utf8(text).expect("it is text")
}

fn one(op: Op) -> Event {
    Event { index: 0, time_nanos: 0, process: 0, kind: Kind::Invoke, op, error: None, commit_ts: None }
}

fn line(event: Event) -> String {
    text(&History { events: vec![event] }).trim_end().to_owned()
}

#[test]
fn lines_are_as_jepsen_writes_them() {
    let value = |op: Op| {
        let line = line(one(op));
        let start = line.find(":f ").expect("it has a function");
        line[start..line.len() - 1].to_owned()
    };
    let op = Op::Txn(vec![Mop::Read { key: 1, list: None }, Mop::Append { key: 1, value: 2 }]);
    let whole = "{:index 0, :time 0, :type :invoke, :process 0, :f :txn, :value [[:r 1 nil] [:append 1 2]]}";
    assert_eq!(line(one(op)), whole);
    let op = Op::Txn(vec![Mop::Read { key: 1, list: Some(vec![4, -5]) }]);
    assert_eq!(value(op), ":f :txn, :value [[:r 1 [4 -5]]]");
    let op = Op::RwTxn(vec![RwMop::Write { key: 1, value: 2 }, RwMop::Read { key: 1, value: Some(2) }]);
    assert_eq!(value(op), ":f :txn, :value [[:w 1 2] [:r 1 2]]");
    let op = Op::Transfer { from: 1, to: 2, amount: 5 };
    assert_eq!(value(op), ":f :transfer, :value {:from 1, :to 2, :amount 5}");
    assert_eq!(value(Op::Balances(None)), ":f :read, :value nil");
    let op = Op::Balances(Some([(0, 10), (1, 20)].into()));
    assert_eq!(value(op), ":f :read, :value {0 10, 1 20}");
    assert_eq!(value(Op::Add(3)), ":f :add, :value 3");
    assert_eq!(value(Op::Elements(Some([1, 2].into()))), ":f :read, :value #{1 2}");
    let op = Op::Fork(vec![RwMop::Write { key: 3, value: 1 }]);
    assert_eq!(value(op), ":f :write, :value [[:w 3 1]]");
    let op = Op::Fork(vec![RwMop::Read { key: 3, value: None }, RwMop::Read { key: 4, value: Some(1) }]);
    assert_eq!(value(op), ":f :read, :value [[:r 3 nil] [:r 4 1]]");
    assert_eq!(value(Op::Increment(None)), ":f :add, :value 1");
    assert_eq!(value(Op::Increment(Some(5))), ":f :add, :value 1, :count 5");
    assert_eq!(value(Op::Count(Some(5))), ":f :read, :value 5");
}

#[test]
fn errors_are_quoted_and_timestamps_come_last() {
    let failed = Event { kind: Kind::Fail, error: Some("a \"b\"\\\n\u{7}é".to_owned()), ..one(Op::Add(1)) };
    let written = line(failed);
    assert!(written.ends_with(r#", :value 1, :error "a \"b\"\\\n\u0007é"}"#), "{written}");
    let done = Event { kind: Kind::Ok, commit_ts: Some(123), ..one(Op::Add(1)) };
    assert!(line(done).ends_with(", :value 1, :commit-ts 123}"));
}

#[test]
fn numbers_beyond_long_are_neither_written_nor_read() {
    let late = Event { commit_ts: Some(i64::MAX as u64 + 1), ..one(Op::Add(1)) };
    let error = write(&History { events: vec![late] }, &mut Vec::new()).expect_err("it is too large");
    assert_eq!(error.to_string(), "event 0 has a number beyond 9223372036854775807");
    let last = Event { commit_ts: Some(i64::MAX as u64), ..one(Op::Add(i64::MIN)) };
    let history = History { events: vec![last] };
    assert_eq!(read(text(&history).as_bytes(), Workload::Set).expect("it is read"), history);
    let large = "{:type :ok, :process 0, :f :add, :value 9223372036854775808}";
    assert!(read(large.as_bytes(), Workload::Set).is_err());
}

#[test]
fn a_counter_grows_by_one() {
    let more = "{:process 0, :type :ok, :f :add, :value 2}";
    let error = read(more.as_bytes(), Workload::Counter).expect_err("it is wrong");
    assert_eq!(error.to_string(), "line 1: this counter grows by 1, not by 2");
}

#[test]
fn errors_name_the_line() {
    let check = |bad: &str, problem: &str| {
        let good = "; a remark\n\n{:process 0, :type :invoke, :f :add, :value 1}\n";
        let error = read(format!("{good}{bad}\n{good}").as_bytes(), Workload::Set).expect_err("it is wrong");
        assert_eq!(error.to_string(), format!("line 4: {problem}"));
    };
    check("[1 2]", "a vector is not a map");
    check("{:process 0, :type :ok, :f :add, :value 1", "the value is cut off");
    check("{:process 0, :type :ok, :f :add, :value 1} 2", "there is '2' after the value");
    check("{:process 0, :type :ok, :f :add, :value}", "a map has no value for :value");
    check("{:process 0, :type :ok, :f :add, :value 1N}", "\"1N\" is not a value of a history");
    check("{:process 0, :type :ok, :f :add, :value nil}", "nil is not an integer");
    check("{:process 0, :type :yes, :f :add, :value 1}", ":type is :yes");
    check("{:process -1, :type :ok, :f :add, :value 1}", ":process is -1");
    check("{:process :nemesis, :type :ok, :f :add, :value 1}", ":nemesis is not an integer");
    check("{:type :ok, :f :add, :value 1}", "there is no :process");
    check("{:process 0, :type :ok, :value 1}", "there is no :f");
    check("{:process 0, :type :ok, :f :inc, :value 1}", "the workload set has no :f :inc");
    check("{:process 0, :type :ok, :f :read, :value [1]}", "a vector is not a set");
    check("{:process 0, :type :ok, :f :add, :value 1, :error {}}", ":error is a map, not a string");
    check("{:process 0, :type :ok, :f :add, :value 1, :error \"a", "a string is cut off");
    check(
        "{:process 0, :type :ok, :f :add, :value 1, :error \"\\x\"}",
        "a string has a wrong escape: Some('x')",
    );
}

#[test]
fn events_without_a_number_are_numbered_as_they_come() {
    let text = "{:process 0, :type :invoke, :f :add, :value 1}\n{:process 0 :type :ok :f :add :value 1}";
    let history = read(text.as_bytes(), Workload::Set).expect("it is read");
    let numbers: Vec<_> = history.events.iter().map(|event| (event.index, event.time_nanos)).collect();
    assert_eq!(numbers, [(0, 0), (1, 1)]);
}

#[test]
fn a_string_may_hold_anything() {
    assert_eq!(Value::read(r#""\u00e9\t""#), Ok(Value::Str("é\t".to_owned())));
    assert!(Value::read(r#""\ud800""#).is_err(), "half of a character");
}

fn rw_mops(writes_only: Option<bool>) -> impl Strategy<Value = Vec<RwMop>> {
    let mop = (any::<bool>(), any::<i64>(), any::<Option<i64>>());
    let mop = mop.prop_map(move |(write, key, value)| match (writes_only.unwrap_or(write), value) {
        (true, value) => RwMop::Write { key, value: value.unwrap_or(0) },
        (false, value) => RwMop::Read { key, value },
    });
    vec(mop, 1..5)
}

fn ops(workload: Workload) -> impl Strategy<Value = Op> {
    match workload {
        Workload::Append | Workload::WriteSkew => {
            let append = (any::<i64>(), any::<i64>()).prop_map(|(key, value)| Mop::Append { key, value });
            let list = option::of(vec(any::<i64>(), 0..5));
            let read = (any::<i64>(), list).prop_map(|(key, list)| Mop::Read { key, list });
            vec(prop_oneof![append, read], 0..5).prop_map(Op::Txn).boxed()
        }
        Workload::Register => rw_mops(None).prop_map(Op::RwTxn).boxed(),
        Workload::LongFork => {
            prop_oneof![rw_mops(Some(true)), rw_mops(Some(false))].prop_map(Op::Fork).boxed()
        }
        Workload::Bank => {
            let transfer = (any::<i64>(), any::<i64>(), any::<i64>());
            let transfer = transfer.prop_map(|(from, to, amount)| Op::Transfer { from, to, amount });
            let balances = btree_map(any::<i64>(), any::<i64>(), 0..5);
            let balances = option::of(balances.prop_map(BTreeMap::from)).prop_map(Op::Balances);
            prop_oneof![transfer, balances].boxed()
        }
        Workload::Set => {
            let elements = btree_set(any::<i64>(), 0..5).prop_map(BTreeSet::from);
            prop_oneof![any::<i64>().prop_map(Op::Add), option::of(elements).prop_map(Op::Elements)].boxed()
        }
        Workload::Counter => {
            let count = any::<Option<i64>>;
            prop_oneof![count().prop_map(Op::Increment), count().prop_map(Op::Count)].boxed()
        }
    }
}

fn events(workload: Workload) -> impl Strategy<Value = Event> {
    let number = || 0..=i64::MAX as u64;
    let kind = sample::select(vec![Kind::Invoke, Kind::Ok, Kind::Fail, Kind::Info]);
    let error = option::of(any::<String>());
    let event = (number(), number(), any::<u32>(), kind, ops(workload), error, option::of(number()));
    event.prop_map(|(index, time_nanos, process, kind, op, error, commit_ts)| Event {
        index,
        time_nanos,
        process,
        kind,
        op,
        error,
        commit_ts,
    })
}

proptest! {
    #[test]
    fn whatever_is_written_is_read(
        (workload, events) in sample::select(Workload::ALL.to_vec())
            .prop_flat_map(|workload| (Just(workload), vec(events(workload), 0..8))),
    ) {
        let history = History { events };
        prop_assert_eq!(read(text(&history).as_bytes(), workload).expect("it is read"), history);
    }
}
