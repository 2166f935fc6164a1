//! The command line: `troth dev` and what talks to it, and how the programs refuse what makes no
//! sense.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::UdpSocket;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use troth_tests::{PATIENCE, programs};

/// A child that is killed when the test is over.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn troth(cluster: &Path, words: &[&str]) -> Output {
    let mut command = Command::new(programs().join("troth"));
    command.arg("--cluster").arg(cluster).args(words).stdin(Stdio::null());
    command.output().expect("troth runs")
}

fn printed(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
}

/// Starts `troth dev` and waits until it says that it is ready.
fn dev(folder: &Path) -> Running {
    let mut command = Command::new(programs().join("troth"));
    command.args(["dev", "--port", "0", "--dir"]).arg(folder);
    command.env("XDG_STATE_HOME", folder).stdout(Stdio::piped());
    let mut child = command.spawn().expect("troth runs");
    let mut line = String::new();
    BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("it speaks");
    assert!(line.contains("ready"), "{line}");
    Running(child)
}

#[test]
fn a_dev_cluster_keeps_what_it_acknowledged_when_it_is_killed() {
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = folder.path().join("dev");
    let first = dev(&cluster);
    printed(&troth(&cluster, &["put", "greeting", "hello world"]));
    printed(&troth(&cluster, &["put", "list/b", "2"]));
    printed(&troth(&cluster, &["put", "list/a", "1"]));
    let script = folder.path().join("script");
    fs::write(&script, "# a transfer\nadd from -5\nadd to 5\nput \"with space\" 'a b'\nget from\n")
        .expect("written");
    let output = printed(&troth(&cluster, &["txn", script.to_str().expect("a plain path")]));
    assert!(output.starts_with("from\t-5\ncommitted "), "{output}");
    // SIGKILL: no moment to tidy up.
    drop(first);

    let _second = dev(&cluster);
    assert_eq!(printed(&troth(&cluster, &["get", "greeting"])), "hello world");
    assert_eq!(printed(&troth(&cluster, &["scan", "list/"])), "list/a\t1\nlist/b\t2");
    assert_eq!(printed(&troth(&cluster, &["get", "with space"])), "a b");
    assert_eq!(printed(&troth(&cluster, &["get", "to"])), "5");
    let json = printed(&troth(&cluster, &["--json", "get", "greeting"]));
    assert_eq!(json, r#"{"found":true,"key":"greeting","value":"hello world"}"#);
    printed(&troth(&cluster, &["delete", "greeting"]));
    let missing = troth(&cluster, &["get", "greeting"]);
    assert_eq!(missing.status.code(), Some(3), "a key without value has an exit code of its own");

    fs::write(&script, "expect to 6\nput to 0\n").expect("written");
    let refused = troth(&cluster, &["txn", script.to_str().expect("a plain path")]);
    assert_eq!(refused.status.code(), Some(4));
    assert_eq!(printed(&troth(&cluster, &["get", "to"])), "5", "nothing of it happened");
    fs::write(&script, "put a\n").expect("written");
    let malformed = troth(&cluster, &["txn", script.to_str().expect("a plain path")]);
    assert_eq!(malformed.status.code(), Some(2));
    let error = String::from_utf8_lossy(&malformed.stderr).into_owned();
    assert!(error.contains(":1: \"put\" with 2 words is no step"), "{error}");

    let status = printed(&troth(&cluster, &["status"]));
    assert!(status.contains("leader") && status.contains("PARTICIPANT"), "{status}");
    let ring = printed(&troth(&cluster, &["--json", "ring"]));
    assert!(ring.contains("\"shards\":[{\"leader\":"), "{ring}");
}

#[test]
fn a_cluster_that_is_not_there_is_one_line() {
    let folder = tempfile::tempdir().expect("a folder");
    let refused = troth(folder.path(), &["get", "k"]);
    assert_eq!(refused.status.code(), Some(2));
    let error = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(error.lines().count() == 1 && error.contains("client.toml"), "{error}");
}

/// The files of a cluster on ports that are free.
fn init(folder: &Path) {
    let free: Vec<UdpSocket> = (0..4).map(|_| UdpSocket::bind("127.0.0.1:0").expect("a free port")).collect();
    let address = |at: usize| free[at].local_addr().expect("bound").to_string();
    let mut command = Command::new(programs().join("troth"));
    command.args(["init", "--http", "off", "--coordinator", &address(0)]);
    for at in 1..4 {
        command.args(["--participant", &address(at)]);
    }
    printed(&command.arg("--dir").arg(folder).output().expect("troth runs"));
}

/// Runs a server that must refuse to start: with one line that contains the words, and this exit
/// code.
fn refuses(program: &str, arguments: &[&str], exit: i32, words: &str) {
    let mut command = Command::new(programs().join(program));
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = Running(command.spawn().expect("it runs"));
    let deadline = Instant::now() + PATIENCE;
    let status = loop {
        match child.0.try_wait().expect("a child") {
            Some(status) => break status,
            None if Instant::now() > deadline => panic!("{program} {arguments:?} goes on"),
            None => std::thread::sleep(Duration::from_millis(10)),
        }
    };
    let error = std::io::read_to_string(child.0.stderr.take().expect("piped")).expect("text");
    let said: Vec<&str> = error.lines().filter(|line| line.starts_with(program)).collect();
    assert_eq!(status.code(), Some(exit), "{error}");
    assert!(said.len() == 1 && said[0].contains(words), "expected {words:?} in one line: {error}");
}

#[test]
fn what_makes_no_sense_is_refused_in_one_line() {
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = folder.path().join("a");
    init(&cluster);
    let file = |name: &str| cluster.join(name).to_str().expect("a plain path").to_owned();
    let (coordinator, participant) = (file("coordinator-1.toml"), file("participant-1.toml"));

    let wrong = file("wrong.toml");
    let with = |line: &str| {
        let text = fs::read_to_string(&participant).expect("written by init");
        fs::write(&wrong, format!("{line}\n{text}")).expect("written");
    };
    with("colour = \"red\"");
    refuses("troth-participant", &["--config", &wrong], 2, "wrong.toml:1: unknown field `colour`");
    with("weight = 1000");
    refuses("troth-participant", &["--config", &wrong], 2, "wrong.toml:1: weight: must be from 1 to 100");
    refuses("troth-participant", &["--config", "/no/such/file"], 2, "/no/such/file: ");
    refuses("troth-participant", &["--config", &participant, "--listen", "nowhere"], 2, "host:port");
    refuses("troth-coordinator", &["--config", &coordinator, "--replicas", "2"], 2, "must be 1, 3 or 5");
    let certificate = file("participant-1.pem");
    let key = file("participant-1-key.pem");
    let stranger = ["--config", &coordinator, "--cert", &certificate, "--key", &key];
    refuses("troth-coordinator", &stranger, 2, "is a participant's certificate");

    let data = folder.path().join("data").to_str().expect("a plain path").to_owned();
    let bare = ["--id", "1", "--data", &data];
    refuses("troth-coordinator", &bare, 2, "tls.ca: is missing; for example: ca = \"/etc/troth/ca.pem\"");

    // A port that somebody else has.
    let taken = UdpSocket::bind("127.0.0.1:0").expect("a free port");
    let address = taken.local_addr().expect("bound").to_string();
    let words = ["--config", &coordinator, "--listen", &address];
    refuses("troth-coordinator", &words, 1, "another process listens there");

    // A data folder that cannot be one: its name is that of a file. (Permissions do not stop root.)
    let blocked = folder.path().join("file");
    fs::File::create(&blocked).and_then(|mut file| file.write_all(b"x")).expect("written");
    let inside = blocked.join("data").to_str().expect("a plain path").to_owned();
    refuses(
        "troth-participant",
        &["--config", &participant, "--data", &inside],
        1,
        "choose a folder that this user may write to",
    );
    // A folder in which nobody may make another, not even root.
    let words = ["--config", &participant, "--data", "/proc/troth"];
    refuses("troth-participant", &words, 1, "choose a folder that this user may write to");
    let closed = folder.path().join("closed");
    fs::create_dir(&closed).expect("made");
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o500)).expect("set");
    if fs::write(closed.join("probe"), "").is_err() {
        let closed = closed.to_str().expect("a plain path");
        refuses("troth-participant", &["--config", &participant, "--data", closed], 1, "may write to");
    }
}

#[test]
fn a_data_folder_of_another_cluster_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let (ours, theirs) = (folder.path().join("a"), folder.path().join("b"));
    init(&ours);
    init(&theirs);
    let path = |folder: &Path, name: &str| folder.join(name).to_str().expect("a plain path").to_owned();
    let mut first = Command::new(programs().join("troth-coordinator"));
    first.args(["--config", &path(&ours, "coordinator-1.toml")]).stdin(Stdio::null()).stderr(Stdio::null());
    let first = Running(first.spawn().expect("it runs"));
    let data = path(&ours, "data/coordinator-1");
    let deadline = Instant::now() + PATIENCE;
    while !Path::new(&data).join("address").exists() {
        assert!(Instant::now() < deadline, "the first cluster does not start");
        std::thread::sleep(Duration::from_millis(10));
    }
    let theirs = path(&theirs, "coordinator-1.toml");
    refuses("troth-coordinator", &["--config", &theirs, "--data", &data], 1, "in use by another process");
    drop(first);
    refuses(
        "troth-coordinator",
        &["--config", &theirs, "--data", &data],
        1,
        "belongs to coordinator 1 of cluster",
    );
}
