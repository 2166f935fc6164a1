//! Versions on a real RocksDB, against a map of maps.

use std::collections::BTreeMap;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use troth_protocol::process::Memory;
use troth_protocol::{Key, KeyRange, ShardId, Timestamp, Value};
use troth_replication::{Reach, Store};

use super::{Mvcc, gc};
use crate::families::{ALL, DATA};

const SHARD: ShardId = ShardId(7);

/// Keys that begin with one another, and one byte that must be escaped on disk.
const KEYS: [&str; 6] = ["", "a", "a\0", "a\0b", "ab", "b"];

/// Later than every version.
const END: u64 = 40;

/// Keys, and for each its versions: values, or deletions.
type Model = BTreeMap<Key, BTreeMap<Timestamp, Option<Value>>>;

fn model() -> impl Strategy<Value = Model> {
    let version = (0..KEYS.len(), 1..END, proptest::option::of(0u8..9));
    proptest::collection::vec(version, 0..40).prop_map(|versions| {
        let mut model = Model::new();
        for (key, at, value) in versions {
            let value = value.map(|byte| Value::from(vec![byte; usize::from(byte)]));
            model.entry(KEYS[key].into()).or_default().insert(Timestamp(at), value);
        }
        model
    })
}

fn range() -> impl Strategy<Value = KeyRange> {
    let end = proptest::option::of(0..KEYS.len()).prop_map(|end| end.map(|end| Key::from(KEYS[end])));
    (0..KEYS.len(), end).prop_map(|(start, end)| KeyRange::new(KEYS[start].into(), end))
}

fn visible(model: &Model, key: &Key, at: Timestamp) -> (Timestamp, Option<Value>) {
    let newest = model.get(key).and_then(|versions| versions.range(..=at).next_back());
    newest.map_or((Timestamp::ZERO, None), |(at, value)| (*at, value.clone()))
}

/// A store that holds the model, between neighbours that must never show.
fn filled(store: &Store, model: &Model) {
    let mut batch = store.batch();
    for (key, versions) in model {
        for (at, value) in versions {
            Mvcc::new(store, SHARD).put(&mut batch, key, *at, value.as_ref());
        }
    }
    for neighbour in [ShardId(SHARD.0 - 1), ShardId(SHARD.0 + 1)] {
        for key in KEYS {
            Mvcc::new(store, neighbour).put(&mut batch, &key.into(), Timestamp(3), Some(&"no".into()));
        }
    }
    batch.commit().expect("written");
}

fn rows_on_disk(store: &Store, shard: ShardId) -> usize {
    let (start, end) = (super::key::shard_start(shard), super::key::shard_end(shard));
    let mut count = 0;
    let counted = store.scan(DATA, &start, &end, |_, _| {
        count += 1;
        true
    });
    counted.expect("readable");
    count
}

/// Everything that can be asked from a moment on must be answered as the model says.
fn check(mvcc: &Mvcc, model: &Model, from: u64, range: &KeyRange, rows_max: usize) {
    for at in (from..=END).map(Timestamp) {
        for key in KEYS.map(Key::from) {
            let read = mvcc.read(&key, at, Reach::Disk).expect("readable");
            let (version, value) = visible(model, &key, at);
            assert_eq!(read.value, value, "{key} at {at}");
            // Of a key without a value, the mark of its deletion may be gone.
            assert!(read.version == version || value.is_none(), "{key} at {at}");
        }
        let within = || KEYS.map(Key::from).into_iter().filter(|key| range.contains(key));
        let expected: Vec<(Key, Value)> =
            within().filter_map(|key| Some((key.clone(), visible(model, &key, at).1?))).collect();
        let (mut found, mut rest) = (Vec::new(), Some(range.clone()));
        while let Some(asked) = rest.take() {
            let page = mvcc.scan(&asked, at, rows_max, usize::MAX).expect("readable");
            assert!(page.rows.len() <= rows_max && (!page.more || !page.rows.is_empty()));
            if let Some(last) = page.rows.last().filter(|_| page.more) {
                let next = [last.key.as_bytes(), &[0]].concat();
                rest = Some(KeyRange::new(Key::copy_from(&next), range.end.clone()));
            }
            found.extend(page.rows.into_iter().map(|row| (row.key, row.value)));
        }
        assert_eq!(found, expected, "{range} at {at}");

        let newer =
            |key: &Key| model.get(key).is_some_and(|versions| versions.keys().any(|version| *version > at));
        let changed = mvcc.newer_in_range(range, at, Reach::Disk).expect("readable");
        assert_eq!(changed.as_ref().map(|(key, _)| key), within().find(newer).as_ref(), "{range} after {at}");
        assert!(changed.is_none_or(|(_, version)| version > at));
    }
}

/// What must be left after collection.
fn kept(model: &Model, safe_point: Timestamp) -> usize {
    let of_key = |versions: &BTreeMap<Timestamp, Option<Value>>| {
        let newest = versions.range(..=safe_point).next_back();
        let needed = usize::from(newest.is_some_and(|(_, value)| value.is_some()));
        needed + versions.keys().filter(|version| **version > safe_point).count()
    };
    model.values().map(of_key).sum()
}

#[test]
fn whatever_was_written_is_read_and_collection_changes_nothing_from_the_safe_point_on() {
    let mut runner = TestRunner::new(Config { cases: 48, ..Config::default() });
    let cases = (model(), range(), 1..4usize, 0..END, 1..8usize);
    let result = runner.run(&cases, |(model, range, rows_max, safe_point, step)| {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(folder.path(), "test", &ALL, Memory::default()).expect("a new folder");
        filled(&store, &model);
        let mvcc = Mvcc::new(&store, SHARD);
        for key in KEYS.map(Key::from) {
            let newest = model.get(&key).and_then(|versions| versions.keys().next_back());
            let found = mvcc.newest(&key, Reach::Disk).expect("readable");
            assert_eq!(found, newest.copied().unwrap_or(Timestamp::ZERO), "{key}");
        }
        check(&mvcc, &model, 0, &range, rows_max);

        let (mut next, mut removed) = (None, 0);
        loop {
            let mut batch = store.batch();
            let safe_point = Timestamp(safe_point);
            let (rest, count) =
                gc::collect(&store, SHARD, safe_point, next, step, &mut batch).expect("readable");
            batch.commit().expect("written");
            removed += count;
            next = rest;
            if next.is_none() {
                break;
            }
        }
        let written: usize = model.values().map(BTreeMap::len).sum();
        assert_eq!(rows_on_disk(&store, SHARD), kept(&model, Timestamp(safe_point)));
        assert_eq!(removed, written - kept(&model, Timestamp(safe_point)));
        for neighbour in [ShardId(SHARD.0 - 1), ShardId(SHARD.0 + 1)] {
            assert_eq!(rows_on_disk(&store, neighbour), KEYS.len());
        }
        check(&mvcc, &model, safe_point, &range, rows_max);
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}

#[test]
fn a_page_ends_with_the_row_that_fills_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = Store::open(folder.path(), "test", &ALL, Memory::default()).expect("a new folder");
    let mvcc = Mvcc::new(&store, SHARD);
    let mut batch = store.batch();
    for key in ["a", "b", "c"] {
        mvcc.put(&mut batch, &key.into(), Timestamp(1), Some(&Value::from(vec![0; 100])));
    }
    batch.commit().expect("written");
    let all = KeyRange::new("".into(), None);
    let page = |bytes_max| {
        let page = mvcc.scan(&all, Timestamp(1), usize::MAX, bytes_max).expect("readable");
        (page.rows.len(), page.more)
    };
    assert_eq!(page(1), (1, true));
    assert_eq!(page(101), (1, true));
    assert_eq!(page(102), (2, true));
    assert_eq!(page(303), (3, false));
}

#[test]
fn what_cannot_be_in_the_store_is_an_error_not_an_answer() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = Store::open(folder.path(), "test", &ALL, Memory::default()).expect("a new folder");
    let mvcc = Mvcc::new(&store, SHARD);
    let mut batch = store.batch();
    batch.put(DATA, &super::key::version(SHARD, &"a".into(), Timestamp(1)), b"?");
    batch.commit().expect("written");
    let error = mvcc.read(&"a".into(), Timestamp(1), Reach::Disk).expect_err("neither value nor deletion");
    assert_eq!(error.to_string(), "the store holds a malformed version: ?");
}
