//! What survives a power cut, what does not, and what a disk does as any other.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};

use crate::common::{EIO, Scene, create, errno, names};
use rustix::fs::{FallocateFlags, OFlags, fallocate};
use troth_tests::disk::{Disk, Options};

const PAGE: usize = 4096;

#[test]
fn a_file_that_was_synced_survives_with_its_name() {
    for seed in 0..20 {
        let scene = Scene::new(seed);
        fs::create_dir_all(scene.at("a/b")).expect("folders");
        let _file = scene.write_synced("a/b/file", &[7; 3 * PAGE + 5]);
        scene.disk.power_cut();
        assert_eq!(scene.read("a/b/file").expect("it is there"), [7; 3 * PAGE + 5]);
    }
}

#[test]
fn a_large_file_with_holes_is_synced_to_the_last_byte() {
    let scene = Scene::new(1);
    let file = create(&scene.at("file"));
    let mut expected = vec![0; 4_700_027];
    for (number, start) in (0..expected.len()).step_by(1_700_003).enumerate() {
        let end = expected.len().min(start + 1_300_021);
        expected[start..end].fill(number as u8 + 1);
        file.write_all_at(&expected[start..end], start as u64).expect("written");
    }
    assert!(scene.read("file").expect("seen") == expected);
    file.sync_data().expect("synced");
    scene.disk.power_cut();
    assert!(scene.read("file").expect("durable") == expected);
    assert!(fs::read(scene.backing.join("file")).expect("durable") == expected);
}

#[test]
fn an_unsynced_file_is_in_memory_only_until_it_is_synced() {
    let scene = Scene::new(1);
    let file = scene.write("file", b"hello");
    assert_eq!(scene.read("file").expect("processes see it"), b"hello");
    assert!(names(&scene.backing).is_empty());
    assert_eq!(scene.disk.dirty_bytes(), PAGE as u64);
    file.sync_data().expect("it is synced");
    assert_eq!(fs::read(scene.backing.join("file")).expect("it is durable"), b"hello");
    assert_eq!(scene.disk.dirty_bytes(), 0);
}

#[test]
fn a_power_cut_may_lose_an_unsynced_file_or_leave_it_torn() {
    let (mut absent, mut empty, mut torn, mut whole) = (0, 0, 0, 0);
    for seed in 0..200 {
        let scene = Scene::new(seed);
        let file = scene.write("file", &[7; 4 * PAGE]);
        let lost = scene.disk.power_cut();
        drop(file);
        match scene.read("file") {
            Err(_) => {
                absent += 1;
                assert_eq!((lost.metadata_ops, lost.pages, lost.bytes), (1, 4, 4 * PAGE as u64));
            }
            Ok(bytes) if bytes.is_empty() => empty += 1,
            Ok(bytes) if bytes == [7; 4 * PAGE] => whole += 1,
            Ok(bytes) => {
                assert!(bytes.len() <= 4 * PAGE);
                for sector in bytes.chunks(512) {
                    assert!(sector.iter().all(|byte| *byte == 7) || sector.iter().all(|byte| *byte == 0));
                }
                torn += 1;
            }
        }
    }
    assert!(absent > 50 && empty > 10 && torn > 20 && whole > 0, "{absent} {empty} {torn} {whole}");
}

#[test]
fn pages_over_a_durable_file_survive_one_by_one() {
    let (mut mixed, mut torn) = (0, 0);
    for seed in 0..40 {
        let scene = Scene::new(seed);
        let file = scene.write_synced("file", &[1; 8 * PAGE]);
        file.write_all_at(&[2; 8 * PAGE], 0).expect("written");
        let lost = scene.disk.power_cut();
        let bytes = scene.read("file").expect("it is durable");
        assert_eq!(bytes.len(), 8 * PAGE);
        let new = bytes.iter().filter(|byte| **byte == 2).count();
        assert_eq!(lost.bytes as usize, 8 * PAGE - new);
        mixed += usize::from(new > 0 && new < 8 * PAGE);
        torn += lost.torn;
        assert!(bytes.chunks(512).all(|sector| sector == [1; 512] || sector == [2; 512]));
    }
    assert!(mixed > 20 && torn > 20, "{mixed} {torn}");
}

#[test]
fn what_the_journal_loses_is_a_suffix() {
    let mut kept = BTreeSet::new();
    for seed in 0..60 {
        let scene = Scene::new(seed);
        for name in ["a", "b", "c", "d"] {
            fs::create_dir(scene.at(name)).expect("a folder");
        }
        let lost = scene.disk.power_cut();
        let names = scene.names("");
        assert_eq!(names, ["a", "b", "c", "d"][..names.len()]);
        assert_eq!(lost.metadata_ops as usize, 4 - names.len());
        assert_eq!(names, crate::common::names(&scene.backing));
        kept.insert(names.len());
    }
    assert_eq!(kept.len(), 5);
}

#[test]
fn a_sync_of_any_file_or_folder_commits_the_journal() {
    for seed in 0..20 {
        let scene = Scene::new(seed);
        let _other = scene.write("other", b"unsynced");
        fs::rename(scene.at("other"), scene.at("renamed")).expect("renamed");
        if seed % 2 == 0 {
            scene.write_synced("file", b"synced");
        } else {
            scene.sync_folder();
        }
        scene.disk.power_cut();
        assert!(scene.at("renamed").exists() && !scene.at("other").exists());
    }
}

#[test]
fn a_file_that_was_renamed_without_a_sync_may_be_empty() {
    let mut seen = BTreeSet::new();
    for seed in 0..100 {
        let scene = Scene::new(seed);
        scene.write_synced("file", b"old");
        scene.write("file.part", b"new");
        fs::rename(scene.at("file.part"), scene.at("file")).expect("renamed");
        scene.disk.power_cut();
        seen.insert(String::from_utf8(scene.read("file").expect("one of them")).expect("UTF-8"));
    }
    assert!(seen.contains("old") && seen.contains("") && seen.contains("new"), "{seen:?}");
    assert!(seen.iter().all(|seen| ["old", "", "new", "\0\0\0"].contains(&seen.as_str())), "{seen:?}");
}

#[test]
fn a_file_that_was_synced_and_then_renamed_is_the_old_one_or_the_new_one() {
    for seed in 0..50 {
        let scene = Scene::new(seed);
        scene.write_synced("file", b"old");
        scene.write_synced("file.part", b"new");
        fs::rename(scene.at("file.part"), scene.at("file")).expect("renamed");
        let synced = seed % 2 == 0;
        if synced {
            scene.sync_folder();
        }
        scene.disk.power_cut();
        let bytes = scene.read("file").expect("one of them");
        assert!(bytes == b"new" || (bytes == b"old" && !synced));
        assert_eq!(scene.names("").len(), if bytes == b"new" { 1 } else { 2 });
    }
}

#[test]
fn a_write_to_a_file_opened_with_o_dsync_is_durable() {
    for flag in [OFlags::DSYNC, OFlags::SYNC] {
        for seed in 0..10 {
            let scene = Scene::new(seed);
            let mut options = OpenOptions::new();
            options.write(true).create(true).custom_flags(flag.bits().cast_signed());
            let mut file = options.open(scene.at("file")).expect("opened");
            file.write_all(b"hello").expect("written");
            scene.disk.power_cut();
            assert_eq!(scene.read("file").expect("it is there"), b"hello");
        }
    }
}

#[test]
fn closing_and_syncfs_make_nothing_durable() {
    let scene = Scene::new(3);
    drop(scene.write("file", b"hello"));
    let folder = File::open(scene.disk.path()).expect("opened");
    rustix::fs::syncfs(&folder).expect("it does nothing");
    assert!(names(&scene.backing).is_empty());
}

#[test]
fn a_truncation_that_was_lost_leaves_the_old_bytes_whole() {
    let mut outcomes = BTreeSet::new();
    for seed in 0..60 {
        let scene = Scene::new(seed);
        let file = scene.write_synced("file", &[1; 2 * PAGE]);
        file.set_len(0).expect("cut off");
        file.write_all_at(&[2; PAGE], 0).expect("written");
        assert_eq!(scene.read("file").expect("seen"), [2; PAGE]);
        file.set_len(PAGE as u64 + 10).expect("extended");
        assert_eq!(scene.read("file").expect("seen")[PAGE..], [0; 10]);
        let lost = scene.disk.power_cut();
        let bytes = scene.read("file").expect("it is durable");
        if lost.metadata_ops == 2 {
            assert_eq!(bytes, [1; 2 * PAGE]);
        } else {
            assert!(bytes.iter().all(|byte| *byte != 1), "the cut is durable");
        }
        outcomes.insert(lost.metadata_ops);
    }
    assert_eq!(outcomes.len(), 3);
}

#[test]
fn a_truncation_in_the_middle_of_a_page_leaves_zeros_beyond() {
    let scene = Scene::new(1);
    let file = scene.write_synced("file", &[1; PAGE]);
    file.set_len(100).expect("cut off");
    file.set_len(300).expect("extended");
    file.write_all_at(&[2; 10], 200).expect("written");
    let expected = [vec![1; 100], vec![0; 100], vec![2; 10], vec![0; 90]].concat();
    assert_eq!(scene.read("file").expect("seen"), expected);
    file.sync_all().expect("synced");
    assert_eq!(fs::read(scene.backing.join("file")).expect("durable"), expected);
}

#[test]
fn handles_from_before_a_power_cut_fail_and_new_ones_do_not() {
    let scene = Scene::new(4);
    let mut file = scene.write_synced("file", b"hello");
    let folder = File::open(scene.disk.path()).expect("opened");
    scene.disk.power_cut();
    assert_eq!(errno(file.read(&mut [0; 5])), EIO);
    assert_eq!(errno(file.write_all_at(b"x", 0)), EIO);
    assert_eq!(errno(file.sync_all()), EIO);
    assert_eq!(errno(folder.sync_all()), EIO);
    assert_eq!(scene.read("file").expect("it is durable"), b"hello");
    assert_eq!(errno(file.metadata()), EIO, "also after it was looked up again");
    assert_eq!(errno(file.read(&mut [0; 5])), EIO);
}

#[test]
fn an_open_file_that_was_deleted_can_be_read_until_it_is_closed() {
    for sync in [false, true] {
        let scene = Scene::new(5);
        let durable = scene.write_synced("durable", b"hello");
        let fresh = scene.write("fresh", b"hello");
        fs::remove_file(scene.at("durable")).expect("deleted");
        fs::remove_file(scene.at("fresh")).expect("deleted");
        if sync {
            scene.sync_folder();
        }
        for file in [durable, fresh] {
            file.write_all_at(b"w", 5).expect("written");
            let mut bytes = [0; 6];
            file.read_exact_at(&mut bytes, 0).expect("read");
            assert_eq!(&bytes, b"hellow");
            file.sync_all().expect("synced");
            assert_eq!(file.metadata().expect("attributes").nlink(), 0);
        }
        assert!(names(&scene.backing).is_empty(), "the deletions are durable");
        assert!(names(scene.disk.path()).is_empty());
    }
}

#[test]
fn a_replaced_file_that_is_open_stays_readable() {
    let scene = Scene::new(6);
    let old = scene.write_synced("file", b"old");
    scene.write_synced("new", b"new");
    fs::rename(scene.at("new"), scene.at("file")).expect("renamed");
    scene.sync_folder();
    let mut bytes = [0; 3];
    old.read_exact_at(&mut bytes, 0).expect("read");
    assert_eq!((&bytes, scene.read("file").expect("read").as_slice()), (b"old", b"new".as_slice()));
}

#[test]
fn hard_links_are_one_file() {
    let scene = Scene::new(7);
    let file = scene.write("a", b"one");
    fs::hard_link(scene.at("a"), scene.at("b")).expect("linked");
    file.write_all_at(b"two", 0).expect("written");
    assert_eq!(scene.read("b").expect("read"), b"two");
    assert_eq!(file.metadata().expect("attributes").nlink(), 2);
    fs::remove_file(scene.at("a")).expect("deleted");
    file.sync_all().expect("synced");
    scene.disk.power_cut();
    assert_eq!(scene.names(""), ["b"]);
    assert_eq!(scene.read("b").expect("read"), b"two");
}

#[test]
fn reserved_space_does_not_change_the_size_unless_asked_to() {
    let scene = Scene::new(8);
    let file = scene.write("file", b"hello");
    fallocate(&file, FallocateFlags::KEEP_SIZE, 0, 1 << 20).expect("reserved");
    assert_eq!(file.metadata().expect("attributes").len(), 5);
    fallocate(&file, FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE, 1, 2).expect("punched");
    assert_eq!(scene.read("file").expect("read"), b"h\0\0lo");
    fallocate(&file, FallocateFlags::empty(), 0, 8).expect("extended");
    assert_eq!(scene.read("file").expect("read"), b"h\0\0lo\0\0\0");
    file.sync_all().expect("synced");
    assert_eq!(fs::read(scene.backing.join("file")).expect("durable"), b"h\0\0lo\0\0\0");
}

#[test]
fn appending_truncating_and_direct_reads_work() {
    let scene = Scene::new(9);
    scene.write("file", &[1; 2 * PAGE]);
    let mut file = OpenOptions::new().append(true).open(scene.at("file")).expect("opened");
    file.write_all(&[2; 10]).expect("appended");
    file.write_all(&[3; 10]).expect("appended");
    let direct = OFlags::DIRECT.bits().cast_signed();
    let mut file = OpenOptions::new().read(true).custom_flags(direct).open(scene.at("file")).expect("opened");
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).expect("read");
    assert_eq!(bytes, [vec![1; 2 * PAGE], vec![2; 10], vec![3; 10]].concat());
    drop(create(&scene.at("file")));
    assert!(scene.read("file").expect("read").is_empty());
}

#[test]
fn folders_refuse_what_they_must() {
    let scene = Scene::new(10);
    fs::create_dir_all(scene.at("a/b")).expect("folders");
    scene.write("file", b"");
    assert_eq!(errno(fs::remove_dir(scene.at("a"))), Some(39), "ENOTEMPTY");
    assert_eq!(errno(fs::create_dir(scene.at("a"))), Some(17), "EEXIST");
    assert_eq!(errno(fs::rename(scene.at("file"), scene.at("a"))), Some(21), "EISDIR");
    assert_eq!(errno(fs::rename(scene.at("a"), scene.at("file"))), Some(20), "ENOTDIR");
    assert_eq!(errno(fs::read(scene.at("nothing"))), Some(2), "ENOENT");
    fs::rename(scene.at("a"), scene.at("c")).expect("renamed");
    assert_eq!(scene.names("c"), ["b"]);
}

#[test]
fn large_folders_are_listed_whole() {
    let scene = Scene::new(11);
    let names: Vec<String> = (0..3000).map(|number| format!("a file with the number {number:05}")).collect();
    names.iter().for_each(|name| drop(scene.write(name, b"")));
    assert_eq!(scene.names(""), names);
}

#[test]
fn attributes_and_symbolic_links_survive_when_they_are_committed() {
    let scene = Scene::new(12);
    let file = scene.write("file", b"");
    fs::set_permissions(scene.at("file"), fs::Permissions::from_mode(0o640)).expect("changed");
    std::os::unix::fs::chown(scene.at("file"), Some(7), Some(8)).expect("changed");
    std::os::unix::fs::symlink("file", scene.at("link")).expect("linked");
    file.sync_all().expect("synced");
    scene.disk.power_cut();
    let attributes = fs::metadata(scene.at("link")).expect("it leads to the file");
    assert_eq!((attributes.mode() & 0o777, attributes.uid(), attributes.gid()), (0o640, 7, 8));
    assert_eq!(fs::read_link(scene.at("link")).expect("a link").to_str(), Some("file"));
}

#[test]
fn too_many_dirty_bytes_are_written_back_oldest_first() {
    let scene = Scene::with(13, Options { dirty_bytes_max: 32 << 20, ..Options::default() });
    let (old, new) = (vec![1; 24 << 20], vec![2; 24 << 20]);
    let _old = scene.write("old", &old);
    let _new = scene.write("new", &new);
    assert!(scene.disk.dirty_bytes() <= 32 << 20);
    let durable = fs::read(scene.backing.join("old")).expect("it was committed");
    assert!(durable.len() >= 16 << 20 && durable.iter().all(|byte| *byte == 1), "{}", durable.len());
    assert!(scene.read("old").expect("seen") == old && scene.read("new").expect("seen") == new);
    scene.disk.power_cut();
    assert!(scene.read("old").expect("durable").starts_with(&durable));
}

#[test]
fn a_disk_that_is_mounted_again_holds_what_was_durable() {
    let folder = tempfile::tempdir().expect("a folder");
    let (backing, mountpoint) = crate::common::folders(folder.path());
    let disk = Disk::mount(&backing, &mountpoint, 1).expect("it mounts");
    fs::create_dir(mountpoint.join("folder")).expect("a folder");
    fs::write(mountpoint.join("folder/file"), b"hello").expect("written");
    fs::hard_link(mountpoint.join("folder/file"), mountpoint.join("link")).expect("linked");
    File::open(mountpoint.join("link")).and_then(|file| file.sync_all()).expect("synced");
    fs::write(mountpoint.join("lost"), b"hello").expect("written");
    drop(disk);
    assert!(names(&mountpoint).is_empty());
    let _disk = Disk::mount(&backing, &mountpoint, 1).expect("it mounts");
    assert_eq!(names(&mountpoint), ["folder", "link"]);
    fs::write(mountpoint.join("link"), b"world").expect("written");
    assert_eq!(fs::read(mountpoint.join("folder/file")).expect("read"), b"world");
}

#[test]
fn folders_that_overlap_are_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let (backing, _) = crate::common::folders(folder.path());
    assert!(Disk::mount(&backing, &backing, 1).is_err());
    assert!(Disk::mount(&backing, folder.path(), 1).is_err());
    assert!(Disk::mount(folder.path(), &backing, 1).is_err());
}

#[test]
fn the_same_seed_and_calls_lose_the_same() {
    let run = || {
        let scene = Scene::new(99);
        let mut outcome = Vec::new();
        for round in 0..10_u8 {
            for name in ["a", "b", "c"] {
                scene.write(name, &[round; 20_000]);
            }
            let lost = scene.disk.power_cut();
            outcome
                .push((lost, scene.names("").iter().map(|name| scene.read(name).ok()).collect::<Vec<_>>()));
        }
        outcome
    };
    assert!(run() == run());
}
