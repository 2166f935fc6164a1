//! A disk that is full, slow or broken.

use std::fs;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

use crate::common::{EIO, ENOSPC, Scene, errno};
use rustix::fs::{FallocateFlags, fallocate};
use troth_tests::disk::{FailReads, Flipped, Options};

const PAGE: usize = 4096;

#[test]
fn a_full_disk_refuses_what_needs_space_and_nothing_else() {
    let scene = Scene::new(1);
    let file = scene.write_synced("file", &[1; PAGE]);
    scene.disk.set_full(true);
    assert_eq!(errno(file.write_all_at(b"x", PAGE as u64)), ENOSPC);
    assert_eq!(errno(fs::write(scene.at("new"), b"")), ENOSPC);
    assert_eq!(errno(fs::create_dir(scene.at("new"))), ENOSPC);
    assert_eq!(errno(fs::hard_link(scene.at("file"), scene.at("new"))), ENOSPC);
    assert!(fallocate(&file, FallocateFlags::KEEP_SIZE, 0, 1 << 20).is_err());
    assert_eq!(scene.disk.struck().full, 5);
    file.write_all_at(&[2; PAGE], 0).expect("it has that space");
    file.sync_all().expect("synced");
    fs::rename(scene.at("file"), scene.at("renamed")).expect("renamed");
    let free = rustix::fs::statvfs(scene.disk.path()).expect("statistics").f_bavail;
    assert_eq!(free, 0);
    assert_eq!(scene.names(""), ["renamed"]);
    scene.disk.set_full(false);
    file.write_all_at(b"x", PAGE as u64).expect("there is space again");
    assert!(rustix::fs::statvfs(scene.disk.path()).expect("statistics").f_bavail > 0);
    assert_eq!(scene.disk.struck().full, 5);
}

#[test]
fn a_slow_sync_makes_nobody_else_wait() {
    let delay = Duration::from_millis(700);
    let scene = Scene::new(2);
    let files: Vec<_> = (0..12).map(|number| scene.write(&number.to_string(), b"hello")).collect();
    scene.disk.set_sync_delay(Some(delay));
    let begun = Instant::now();
    // More of them at a time than the disk has threads.
    thread::scope(|scope| {
        for file in &files {
            scope.spawn(|| file.sync_all().expect("synced"));
        }
        thread::sleep(Duration::from_millis(100));
        let asked = Instant::now();
        scene.write("other", b"hello");
        assert_eq!(scene.read("other").expect("read"), b"hello");
        assert_eq!(scene.names("").len(), 13);
        assert!(asked.elapsed() < Duration::from_millis(300), "{:?}", asked.elapsed());
    });
    assert!(begun.elapsed() >= delay && begun.elapsed() < 2 * delay, "{:?}", begun.elapsed());
    assert_eq!(scene.disk.struck().slow_syncs, 12);
    scene.disk.set_sync_delay(None);
    let begun = Instant::now();
    files[0].sync_all().expect("synced");
    assert!(begun.elapsed() < delay);
}

#[test]
fn a_power_cut_during_a_slow_sync_finds_nothing_synced() {
    let scene = Scene::new(3);
    let file = scene.write_synced("file", &[1; 64 * PAGE]);
    file.write_all_at(&[2; 64 * PAGE], 0).expect("written");
    scene.disk.set_sync_delay(Some(Duration::from_millis(300)));
    thread::scope(|scope| {
        let sync = scope.spawn(|| file.sync_all());
        thread::sleep(Duration::from_millis(100));
        assert!(scene.disk.power_cut().pages > 0);
        assert_eq!(errno(sync.join().expect("no panic")), EIO);
    });
    assert!(scene.read("file").expect("read").contains(&1));
}

#[test]
fn slow_reads_take_longer_and_writes_do_not() {
    let delay = Duration::from_millis(200);
    let scene = Scene::new(4);
    let file = scene.write("file", b"hello");
    scene.disk.set_read_delay(Some(delay));
    let begun = Instant::now();
    file.write_all_at(b"world", 0).expect("written");
    assert!(begun.elapsed() < delay);
    file.read_exact_at(&mut [0; 5], 0).expect("read");
    assert!(begun.elapsed() >= delay);
    assert_eq!(scene.disk.struck().slow_reads, 1);
}

#[test]
fn the_next_reads_of_files_with_such_names_fail() {
    let scene = Scene::new(5);
    let table = scene.write_synced("1.sst", b"hello");
    let log = scene.write_synced("2.log", b"hello");
    scene.disk.fail_reads(".sst", FailReads::Next(2));
    let read = |file: &fs::File| errno(file.read_exact_at(&mut [0; 5], 0));
    assert_eq!([read(&table), read(&log), read(&table), read(&table)], [EIO, None, EIO, None]);
    assert_eq!(scene.disk.struck().failed_reads, 2);
}

#[test]
fn a_fraction_of_the_reads_fails_until_it_is_switched_off() {
    let scene = Scene::new(6);
    let file = scene.write_synced("1.sst", b"hello");
    scene.disk.fail_reads("", FailReads::Fraction(0.25));
    let fails = || (0..400).filter(|_| file.read_exact_at(&mut [0; 5], 0).is_err()).count();
    let failed = fails();
    assert!((60..140).contains(&failed), "{failed}");
    assert_eq!(scene.disk.struck().failed_reads, failed as u64);
    scene.disk.fail_reads("", FailReads::Never);
    assert_eq!(fails(), 0);
}

#[test]
fn a_sync_that_failed_has_lost_the_dirty_pages() {
    let scene = Scene::new(7);
    let file = scene.write_synced("file", &[1; PAGE]);
    file.write_all_at(&[2; 2 * PAGE], 0).expect("written");
    scene.disk.fail_syncs(1);
    assert_eq!(errno(file.sync_data()), EIO);
    assert_eq!(scene.disk.dirty_bytes(), 0);
    assert_eq!(scene.read("file").expect("read"), [[1; PAGE], [0; PAGE]].concat());
    // The trap: this one says that all is well.
    file.sync_data().expect("synced");
    scene.disk.power_cut();
    assert_eq!(scene.read("file").expect("read"), [[1; PAGE], [0; PAGE]].concat());
    assert_eq!(scene.disk.struck().failed_syncs, 1);
}

#[test]
fn a_sync_of_a_folder_that_failed_commits_nothing() {
    let mut lost = 0;
    for seed in 0..20 {
        let scene = Scene::new(seed);
        fs::create_dir(scene.at("folder")).expect("a folder");
        scene.disk.fail_syncs(1);
        let root = fs::File::open(scene.disk.path()).expect("opened");
        assert_eq!(errno(root.sync_all()), EIO);
        lost += scene.disk.power_cut().metadata_ops;
    }
    assert!(lost > 0);
}

#[test]
fn a_flipped_bit_is_seen_by_later_reads_and_after_a_power_cut() {
    let scene = Scene::new(8);
    let mut open = scene.write_synced("1.sst", &[0; 3 * PAGE]);
    scene.write_synced("2.log", &[0; PAGE]);
    let mut bytes = Vec::new();
    open.read_to_end(&mut bytes).expect("the kernel has seen it");
    assert_eq!(scene.disk.flip_bit(".txt"), None);
    let flipped = scene.disk.flip_bit(".sst").expect("there is one");
    assert_eq!(flipped.path.to_str(), Some("1.sst"));
    let mut byte = [0];
    open.read_exact_at(&mut byte, flipped.offset).expect("read");
    assert_eq!(byte, [1 << flipped.bit]);
    scene.disk.power_cut();
    let bytes = scene.read("1.sst").expect("read");
    assert_eq!(bytes.iter().map(|byte| byte.count_ones()).sum::<u32>(), 1);
    assert_eq!(bytes[flipped.offset as usize], 1 << flipped.bit);
    assert_eq!(scene.disk.struck().flipped_bits, 1);
    assert!(scene.disk.repair(&flipped));
    scene.disk.power_cut();
    assert_eq!(scene.read("1.sst").expect("read"), [0; 3 * PAGE]);
    assert!(!scene.disk.repair(&Flipped { path: "3.sst".into(), ..flipped }), "there is no such file");
}

#[test]
fn a_bit_is_flipped_only_where_it_is_seen() {
    let scene = Scene::new(9);
    let file = scene.write("file", &[0; 2 * PAGE]);
    assert_eq!(scene.disk.flip_bit(""), None, "nothing is durable");
    file.sync_all().expect("synced");
    file.write_all_at(&[0; PAGE], 0).expect("written");
    for _ in 0..20 {
        assert!(scene.disk.flip_bit("").expect("the second page is durable").offset >= PAGE as u64);
    }
    file.set_len(PAGE as u64).expect("cut off");
    assert_eq!(scene.disk.flip_bit(""), None);
}

#[test]
fn a_disk_that_ignores_syncs_loses_what_was_synced() {
    let options = Options { ignore_syncs: true, ..Options::default() };
    let lost = (0..20).filter(|seed| {
        let scene = Scene::with(*seed, options);
        scene.write_synced("file", b"hello");
        scene.disk.power_cut();
        scene.read("file").ok().as_deref() != Some(b"hello")
    });
    assert!(lost.count() > 5);
}
