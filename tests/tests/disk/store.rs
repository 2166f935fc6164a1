//! The store of a server on a disk whose power is cut: it opens, and what it has acknowledged is there; or it is
//! damaged, and it says so.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;

use crate::common::Scene;
use crate::rocks::{FOLDER, ROUND, live};
use troth_protocol::process::Memory;
use troth_replication::{LogWriter, OpenError, Store, families};

const OWNER: &str = "somebody";

fn open(folder: &Path) -> Result<Store, OpenError> {
    // So little that there are many tables, and several write-ahead logs at a time.
    Store::open(folder, OWNER, &[], Memory { cache: 4 << 20, write_buffers: 4 << 20 })
}

/// The same for whoever knows the key, and a few pages long, so that it can be torn in the middle.
fn value(key: &str) -> Vec<u8> {
    key.bytes().cycle().take(9_000).collect()
}

/// Not a test: the child process of the others. It writes and says which keys are acknowledged.
#[tokio::test]
async fn child() {
    let Ok(folder) = std::env::var(FOLDER) else { return };
    let round = std::env::var(ROUND).expect("it is told which");
    let store = open(Path::new(&folder)).expect("it opens");
    let writer = LogWriter::start(&store);
    for number in 0_u64.. {
        let key = format!("{round}-{number}");
        writer.put_durably(families::META, key.as_bytes(), value(&key)).await.expect("written");
        writeln!(std::io::stdout(), "acknowledged {key}").expect("said");
        // These nobody is told of.
        for part in 0..3 {
            let mut batch = store.batch();
            batch.put(families::META, format!("{key}-{part}").as_bytes(), &[0; 9_000]);
            batch.commit().expect("written");
        }
    }
}

/// How many of the keys are not there.
fn missing(store: &Store, acknowledged: &BTreeSet<String>) -> usize {
    let is_there = |key: &&String| {
        let found = store.get(families::META, key.as_bytes()).expect("it can be read");
        found.is_some_and(|found| found[..] == value(key))
    };
    acknowledged.len() - acknowledged.iter().filter(is_there).count()
}

#[test]
fn it_opens_after_every_power_cut_with_all_that_was_acknowledged() {
    for seed in 0..3 {
        let scene = Scene::new(seed);
        let folder = scene.at("db");
        let mut acknowledged = BTreeSet::new();
        for round in 0..12 {
            acknowledged.extend(live("store::child", &folder, round));
            let lost = scene.disk.power_cut();
            println!("seed {seed}, round {round}: {} keys, {lost:?}", acknowledged.len());
            let store = open(&folder).expect("a power cut is no damage");
            assert_eq!(missing(&store, &acknowledged), 0, "seed {seed}, round {round}");
        }
    }
}

#[test]
fn a_flipped_bit_of_its_log_is_found_and_does_no_harm_once_it_is_put_right() {
    let mut found = 0;
    for seed in 0..12 {
        let scene = Scene::new(seed);
        let folder = scene.at("db");
        let acknowledged: BTreeSet<String> = live("store::child", &folder, 1).into_iter().collect();
        let flipped = scene.disk.flip_bit(".log").expect("there is a log");
        match open(&folder) {
            // What was hit was not synced, or is not needed any more.
            Ok(store) => assert_eq!(missing(&store, &acknowledged), 0, "seed {seed}: {flipped:?}"),
            Err(OpenError::Damaged { .. } | OpenError::Lost { .. }) => {
                found += 1;
                assert!(scene.disk.repair(&flipped), "seed {seed}: the log is not there any more");
                let store = open(&folder).expect("all is well again");
                assert_eq!(missing(&store, &acknowledged), 0, "seed {seed}: {flipped:?}");
            }
            Err(error) => panic!("seed {seed}: {error}"),
        }
    }
    assert!(found > 0, "none of twelve was found");
}
