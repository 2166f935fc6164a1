//! RocksDB on a disk whose power is cut: what it has acknowledged as synced is there, or the disk lies.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::{Scene, create};
use rocksdb::{DB, WriteBatch, WriteOptions};
use troth_replication::manifest::Torn;
use troth_tests::disk::{FailReads, Options};

pub const FOLDER: &str = "DISK_TEST_FOLDER";
pub const ROUND: &str = "DISK_TEST_ROUND";

fn options() -> rocksdb::Options {
    let mut options = rocksdb::Options::default();
    options.create_if_missing(true);
    // Small, so that there are many flushes, new logs and compactions.
    options.set_write_buffer_size(64 << 10);
    options.set_target_file_size_base(128 << 10);
    options.set_level_zero_file_num_compaction_trigger(2);
    options.set_max_open_files(64);
    options
}

/// The same for whoever knows the key, and long.
fn value(key: &str) -> Vec<u8> {
    key.bytes().cycle().take(300).collect()
}

/// Not a test: the child process of the others. It writes and says which keys are acknowledged.
#[test]
fn child() {
    let Ok(folder) = std::env::var(FOLDER) else { return };
    let round = std::env::var(ROUND).expect("it is told which");
    let db = DB::open(&options(), folder).expect("it opens");
    let mut synced = WriteOptions::default();
    synced.set_sync(true);
    let mut output = std::io::stdout().lock();
    for number in 0_u64.. {
        let keys: Vec<String> = (0..8).map(|part| format!("{round}-{number}-{part}")).collect();
        let mut batch = WriteBatch::default();
        keys.iter().for_each(|key| batch.put(key, value(key)));
        db.write_opt(batch, &synced).expect("written");
        writeln!(output, "acknowledged {}", keys.join(" ")).expect("said");
        // These nobody is told of.
        db.put(format!("{round}-{number}-unsynced"), [0; 1000]).expect("written");
    }
}

/// Lets a child write, kills it and cuts the power, again and again. Hands back how many acknowledged keys
/// are missing: `None` if the database does not even open.
fn missing(seed: u64, rounds: u32, disk: Options) -> Option<usize> {
    let scene = Scene::with(seed, disk);
    let folder = scene.at("db");
    let mut acknowledged = BTreeSet::new();
    for round in 0..rounds {
        acknowledged.extend(live("rocks::child", &folder, round));
        let before = acknowledged.len();
        let lost = scene.disk.power_cut();
        println!("round {round}: {before} keys, {lost:?}");
        let open = || DB::open(&options(), &folder).inspect_err(|error| println!("{error}")).ok();
        // RocksDB does not stand everything that a power cut does to its manifest.
        let db = open().or_else(|| Torn::cut_off(&folder).expect("readable").and_then(|_| open()))?;
        let is_there = |key: &&String| db.get(key).ok().flatten().is_some_and(|found| found == value(key));
        let missing = acknowledged.len() - acknowledged.iter().filter(is_there).count();
        if missing > 0 {
            return Some(missing);
        }
    }
    Some(0)
}

/// One life of a child: the keys that it has had acknowledged.
pub fn live(child: &str, folder: &Path, round: u32) -> Vec<String> {
    let mut child = Command::new(std::env::current_exe().expect("a path"))
        .args(["--exact", child, "--nocapture"])
        .envs([(FOLDER, folder.to_str().expect("UTF-8")), (ROUND, &round.to_string())])
        .stdout(Stdio::piped())
        .spawn()
        .expect("it starts");
    let lines = BufReader::new(child.stdout.take().expect("piped")).lines().map_while(Result::ok);
    let count = 100 + round as usize * 13 % 150;
    let mut keys = Vec::new();
    let mut lines = lines.filter_map(|line| line.strip_prefix("acknowledged ").map(str::to_owned));
    let mut keep = |line: String| keys.extend(line.split(' ').map(str::to_owned));
    lines.by_ref().take(count).for_each(&mut keep);
    child.kill().expect("killed");
    child.wait().expect("it ends");
    // What it said before it died was acknowledged too.
    lines.for_each(keep);
    assert!(keys.len() >= count, "it has ended too early");
    keys
}

#[test]
fn acknowledged_keys_survive_twenty_power_cuts() {
    assert_eq!(missing(1, 20, Options::default()), Some(0));
}

#[test]
fn acknowledged_keys_survive_with_little_memory() {
    let options = Options { dirty_bytes_max: 256 << 10, ..Options::default() };
    assert_eq!(missing(2, 5, options), Some(0));
}

#[test]
fn a_disk_that_lies_is_found_out() {
    let options = Options { ignore_syncs: true, ..Options::default() };
    let honest = (0..5).filter(|seed| missing(*seed, 20, options) == Some(0)).count();
    assert_eq!(honest, 0);
}

#[test]
fn a_flipped_bit_and_a_failed_read_are_errors_and_not_wrong_values() {
    let scene = Scene::new(3);
    let folder = scene.at("db");
    live("rocks::child", &folder, 100);
    let db = DB::open(&options(), &folder).expect("it opens");
    db.flush().expect("flushed");
    scene.disk.fail_reads(".sst", FailReads::Fraction(1.0));
    drop(db);
    let scan = || {
        DB::open(&options(), &folder).and_then(|db| {
            db.iterator(rocksdb::IteratorMode::Start).try_for_each(|item| {
                let (key, found) = item?;
                let key = String::from_utf8(key.to_vec()).expect("UTF-8");
                assert!(*found == value(&key) || key.ends_with("unsynced"));
                Ok(())
            })
        })
    };
    assert!(scan().is_err(), "no table can be read");
    assert!(scene.disk.struck().failed_reads > 0);
    scene.disk.fail_reads(".sst", FailReads::Never);
    scan().expect("all is well again");
    for _ in 0..20 {
        scene.disk.flip_bit(".sst").expect("there are tables");
    }
    assert!(scan().is_err(), "twenty bits were flipped");
}

/// Says how fast a disk is, beside the folder that it is over.
#[test]
fn it_is_fast_enough() {
    let scene = Scene::new(4);
    let plain = scene.backing.with_file_name("plain");
    fs::create_dir(&plain).expect("a folder");
    println!("        4 KiB, fdatasync: a second   64 MiB written, MiB/s   synced   4 KiB read: a second");
    for (name, folder) in [("folder", plain.as_path()), ("disk", scene.disk.path())] {
        let path = folder.join("log");
        let log = create(&path);
        let (begun, mut count) = (Instant::now(), 0);
        while begun.elapsed() < Duration::from_secs(2) {
            log.write_all_at(&[count as u8; 4096], count * 4096).expect("written");
            log.sync_data().expect("synced");
            count += 1;
        }
        let syncs = count as f64 / begun.elapsed().as_secs_f64();
        let table = create(&folder.join("table"));
        let (begun, chunk) = (Instant::now(), vec![7; 1 << 20]);
        (0..64).for_each(|number| table.write_all_at(&chunk, number << 20).expect("written"));
        let written = 64.0 / begun.elapsed().as_secs_f64();
        table.sync_all().expect("synced");
        let synced = 64.0 / begun.elapsed().as_secs_f64();
        let table = OpenOptions::new().read(true).open(folder.join("table")).expect("opened");
        let (begun, mut page) = (Instant::now(), [0; 4096]);
        let reads = (0..20_000).map(|number| number * 7919 % 16_384 * 4096);
        reads.for_each(|offset| table.read_exact_at(&mut page, offset).expect("read"));
        let reads = 20_000.0 / begun.elapsed().as_secs_f64();
        println!("{name:7} {syncs:27.0} {written:21.0} {synced:11.0} {reads:21.0}");
        // How fast the machine's own is, is not ours to say.
        assert!(name == "folder" || syncs > 100.0 && synced > 10.0, "{name}");
    }
}
