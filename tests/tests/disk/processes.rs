//! Processes that use a disk and are killed, and the one that serves it and is killed.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::common::{ECONNABORTED, ENOTCONN, Scene, errno, folders};
use rustix::fs::{FlockOperation, fcntl_lock};
use troth_tests::disk::{Disk, cleanup};

/// What a child process is to do, and where.
const ROLE: &str = "DISK_TEST_ROLE";
const FOLDER: &str = "DISK_TEST_FOLDER";

/// Not a test: what the child processes of the others run.
#[test]
fn child() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let folder = std::env::var(FOLDER).expect("it is told where");
    let folder = Path::new(&folder);
    match role.as_str() {
        "write" => {
            let mut file = File::create(folder.join("file")).expect("created");
            for number in 0_u64.. {
                file.write_all(&number.to_be_bytes()).expect("written");
                println!("at {number}");
            }
        }
        "serve" => {
            let (backing, mountpoint) = folders(folder);
            let _disk = Disk::mount(&backing, &mountpoint, 1).expect("it mounts");
            fs::write(mountpoint.join("file"), b"hello").expect("written");
            println!("at 0");
            sleep(Duration::from_secs(60));
        }
        "serve and wait" => {
            let (backing, mountpoint) = folders(folder);
            let disk = Disk::mount(&backing, &mountpoint, 1).expect("it mounts");
            fs::write(mountpoint.join("file"), b"hello").expect("written");
            disk.set_read_delay(Some(Duration::from_secs(60)));
            println!("at 0");
            let _ = fs::read(mountpoint.join("file"));
        }
        "panic" => {
            let (backing, mountpoint) = folders(folder);
            let _disk = Disk::mount(&backing, &mountpoint, 1).expect("it mounts");
            println!("at 0");
            panic!("as it is meant to");
        }
        "lock" => {
            let _lock = lock(&folder.join("LOCK")).expect("nobody has it");
            println!("at 0");
            sleep(Duration::from_secs(60));
        }
        role => panic!("nobody is {role}"),
    }
}

/// Locks a file as databases do, until it is dropped.
fn lock(path: &Path) -> std::io::Result<File> {
    let file = OpenOptions::new().write(true).create(true).truncate(false).open(path)?;
    fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive)?;
    Ok(file)
}

/// Starts one, behind a command like `unshare`, and waits until it has said something.
fn start(prefix: &[&str], role: &str, folder: &Path) -> (Child, BufReader<std::process::ChildStdout>) {
    let me = std::env::current_exe().expect("a path");
    let mut words = prefix.iter().map(std::ffi::OsString::from).chain([me.into_os_string()]);
    let mut command = Command::new(words.next().expect("at least this program"));
    command.args(words).args(["--exact", "processes::child", "--nocapture"]);
    command.env(ROLE, role).env(FOLDER, folder).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().expect("it starts");
    let mut output = BufReader::new(child.stdout.take().expect("piped"));
    let mut line = String::new();
    while !line.contains("at ") {
        line.clear();
        assert!(output.read_line(&mut line).expect("read") > 0, "it has ended");
    }
    (child, output)
}

/// Kills it and hands back the last thing it said.
fn kill(mut child: Child, mut output: BufReader<std::process::ChildStdout>) -> Option<u64> {
    child.kill().expect("killed");
    child.wait().expect("it ends");
    let mut said = String::new();
    output.read_to_string(&mut said).expect("read");
    said.lines().rev().find_map(|line| line.strip_prefix("at ")?.parse().ok())
}

fn is_mounted(folder: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("read");
    mounts.contains(folder.to_str().expect("UTF-8"))
}

#[test]
fn a_process_that_is_killed_loses_nothing() {
    let scene = Scene::new(1);
    let (child, output) = start(&[], "write", scene.disk.path());
    sleep(Duration::from_millis(300));
    let last = kill(child, output).expect("it has said more");
    let bytes = scene.read("file").expect("read");
    let numbers: Vec<u64> =
        bytes.chunks_exact(8).map(|bytes| u64::from_be_bytes(bytes.try_into().expect("8"))).collect();
    assert!(numbers.len() as u64 > last, "{} of {last}", numbers.len());
    assert!(numbers.iter().enumerate().all(|(index, number)| index as u64 == *number));
}

#[test]
fn processes_in_other_network_namespaces_use_the_disk() {
    for prefix in [&["unshare", "--net"][..], &["unshare", "--net", "--mount"]] {
        let scene = Scene::new(2);
        let (child, output) = start(prefix, "write", scene.disk.path());
        sleep(Duration::from_millis(100));
        let last = kill(child, output).expect("it has said more");
        assert!(scene.read("file").expect("read").len() as u64 > last * 8);
        // A namespace of mounts that has a copy of this one ends with its process.
        let path = scene.disk.path().to_owned();
        drop(scene);
        assert!(!is_mounted(&path));
    }
}

#[test]
fn a_process_in_a_named_network_namespace_uses_a_disk_that_was_mounted_before_it_started() {
    let name = format!("disk-{}", std::process::id());
    let ip = |words: &[&str]| Command::new("ip").args(words).status().expect("ip runs").success();
    assert!(ip(&["netns", "add", &name]));
    let scene = Scene::new(3);
    let (child, output) = start(&["ip", "netns", "exec", &name], "write", scene.disk.path());
    sleep(Duration::from_millis(100));
    let last = kill(child, output).expect("it has said more");
    assert!(ip(&["netns", "delete", &name]));
    assert!(scene.read("file").expect("read").len() as u64 > last * 8);
}

#[test]
fn a_disk_is_unmounted_although_files_are_open() {
    let scene = Scene::new(4);
    let path = scene.disk.path().to_owned();
    let file = scene.write_synced("file", b"hello");
    let (mut child, _output) = start(&[], "write", &path);
    drop(scene.disk);
    assert!(!is_mounted(&path));
    let error = errno(file.read_exact_at(&mut [0; 5], 0));
    assert!(error == ENOTCONN || error == ECONNABORTED, "{error:?}");
    assert!(!child.wait().expect("it ends").success(), "it could write no more");
    assert_eq!(fs::read(scene.backing.join("file")).expect("durable"), b"hello");
}

#[test]
fn a_panic_unmounts() {
    let folder = tempfile::tempdir().expect("a folder");
    let (mut child, _output) = start(&[], "panic", folder.path());
    assert!(!child.wait().expect("it ends").success());
    assert!(!is_mounted(folder.path()));
    assert_eq!(cleanup(folder.path()).expect("nothing to do"), 0);
}

#[test]
fn a_killed_server_leaves_a_dead_mount_that_is_cleaned_up() {
    let folder = tempfile::Builder::new().prefix("with blanks ").tempdir().expect("a folder");
    let mountpoint = folder.path().join("disk");
    let (child, output) = start(&[], "serve", folder.path());
    let file = File::open(mountpoint.join("file")).expect("opened");
    assert_eq!(cleanup(folder.path()).expect("it looks"), 0, "it is served");
    kill(child, output);
    assert!(is_mounted(Path::new("with\\040blanks")));
    assert_eq!(errno(fs::read_dir(&mountpoint)), ENOTCONN);
    assert!(file.read_exact_at(&mut [0; 5], 0).is_err());
    assert_eq!(cleanup(folder.path()).expect("it may"), 1);
    assert!(!is_mounted(Path::new("with\\040blanks")));
    assert_eq!(fs::read_dir(&mountpoint).expect("a folder again").count(), 0);
    let disk = Disk::mount(&folder.path().join("backing"), &mountpoint, 1).expect("it mounts again");
    drop(disk);
}

#[test]
fn a_killed_server_that_waits_for_itself_is_freed() {
    let folder = tempfile::tempdir().expect("a folder");
    let (mut child, _output) = start(&[], "serve and wait", folder.path());
    sleep(Duration::from_millis(200));
    child.kill().expect("killed");
    let begun = Instant::now();
    // Whether it is stuck is up to the kernel.
    let mut cleaned = 0;
    while child.try_wait().expect("a child").is_none() || cleaned == 0 {
        cleaned += cleanup(folder.path()).expect("it may");
        assert!(begun.elapsed() < Duration::from_secs(10), "it does not end");
        sleep(Duration::from_millis(20));
    }
    assert_eq!(cleaned, 1);
    assert!(!is_mounted(folder.path()));
}

#[test]
fn locks_of_files_are_kept_between_processes_and_end_with_them() {
    let scene = Scene::new(5);
    let lock = || lock(&scene.at("LOCK"));
    let (child, output) = start(&[], "lock", scene.disk.path());
    assert!(lock().is_err(), "the child has it");
    kill(child, output);
    assert!(lock().is_ok());
}
