//! A process that ends while a thread of it still has a database open.

#![allow(missing_docs, reason = "a test program")]

mod support;

use std::env;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::Duration;

use support::open;

/// Says to this program that it is the process that ends, and where its data is.
const FOLDER: &str = "TROTH_TEST_FOLDER";

#[test]
fn a_process_that_ends_waits_for_its_databases() {
    if let Some(folder) = env::var_os(FOLDER) {
        let store = open(&PathBuf::from(folder));
        // Nobody waits for this thread, as nobody waits for a log writer; it lets go when the process is ending.
        thread::spawn(move || {
            thread::sleep(Duration::from_millis(300));
            drop(store);
        });
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let program = env::current_exe().expect("this one");
    let arguments = ["--exact", "a_process_that_ends_waits_for_its_databases"];
    let ended = Command::new(program).args(arguments).env(FOLDER, folder.path()).output().expect("it starts");
    assert!(ended.status.success(), "{}: {}", ended.status, String::from_utf8_lossy(&ended.stderr));
    // What RocksDB itself says of it.
    let said = fs::read_to_string(folder.path().join("LOG")).expect("it was open");
    assert!(said.contains("Shutdown complete"), "it ended with its database open: {said}");
}
