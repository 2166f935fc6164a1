//! The table of failures, row by row: real processes, brought to the exact instant by fault points,
//! and then killed, or stopped for so long that somebody else takes over.
//!
//! In every row a transaction writes two keys on two shards that two participants serve. Whatever
//! happens, both writes are there or neither, the client hears which, nothing stays locked, and the
//! next transaction on the same keys commits.

use rustix::process::Signal;
use tokio::task::JoinHandle;
use troth_protocol::message::admin::FaultPoint;
use troth_sdk::{Client, Commit, Error, Outcome};
use troth_tests::drill::{Drill, Server, THREE};
use troth_tests::{PATIENCE, in_time};

/// What is done to the process that is held.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Blow {
    /// SIGKILL, and a new start after the transaction has ended.
    Kill,
    /// SIGSTOP, and SIGCONT after the transaction has ended: a zombie that knows nothing of what
    /// happened meanwhile.
    Stop,
}

/// What must have become of the transaction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum End {
    Committed,
    Aborted,
}

/// Commits writes to both keys, in a task of its own.
fn commit(
    client: &Client,
    keys: &[(String, Server); 2],
    value: &'static str,
) -> JoinHandle<Result<End, Error>> {
    let (client, keys) = (client.clone(), keys.clone());
    tokio::spawn(async move {
        let tx = client.begin().await?;
        for (key, _) in &keys {
            tx.get(key).await?;
            tx.put(key, value)?;
        }
        match tx.commit().await? {
            Commit::Committed { .. } => Ok(End::Committed),
            Commit::Aborted { .. } => Ok(End::Aborted),
            Commit::Unknown { handle } => match handle.resolve(PATIENCE).await? {
                Outcome::Committed { .. } => Ok(End::Committed),
                Outcome::Aborted { .. } => Ok(End::Aborted),
                Outcome::Expired => panic!("it is young"),
            },
        }
    })
}

async fn values(client: &Client, keys: &[(String, Server); 2]) -> [Option<String>; 2] {
    let snapshot = in_time(client.snapshot()).await.expect("a snapshot");
    let found = in_time(snapshot.get_many(keys.iter().map(|(key, _)| key))).await.expect("readable");
    let text = |value: &Option<troth_sdk::Bytes>| {
        value.as_ref().map(|value| String::from_utf8_lossy(value).into_owned())
    };
    [text(&found[0]), text(&found[1])]
}

/// Plays a row: arms these points, begins a commit, waits until the last of them is reached, strikes
/// the victim, and sees what becomes of it. `victim`: `None` is the coordinator that leads when the
/// points are reached. `answered`: the client must have its answer before.
struct Row {
    points: Vec<(Server, FaultPoint, u32)>,
    victim: Option<Server>,
    end: End,
    answered: bool,
}

async fn play(blow: Blow, row: impl AsyncFnOnce(&Drill, &[(String, Server); 2]) -> Row) {
    let folder = tempfile::tempdir().expect("a folder");
    let mut drill = Drill::start(folder.path(), THREE).await;
    let keys = drill.two_keys("row").await;
    assert_eq!(
        in_time(commit(&drill.client, &keys, "before")).await.expect("no panic").ok(),
        Some(End::Committed)
    );
    drill.until_nothing_is_held().await;

    let Row { points, victim, end, answered } = row(&drill, &keys).await;
    for (server, point, skip) in &points {
        drill.hold_at(*server, *point, *skip).await;
    }
    let mut ended = None;
    let mut commit_task = commit(&drill.client, &keys, "after");
    if answered {
        ended = Some(in_time(&mut commit_task).await);
    }
    for (server, point, _) in &points {
        drill.until_held(*server, *point).await;
    }
    // Who led before may not be who has sent these.
    let victim = match victim {
        Some(victim) => victim,
        None => drill.leading_coordinator().await,
    };
    match blow {
        Blow::Kill => drop(drill.process(victim).kill().expect("it runs")),
        Blow::Stop => drill.process(victim).signal(Signal::STOP).expect("it runs"),
    }
    for (server, _, _) in points.iter().filter(|(server, _, _)| *server != victim) {
        drill.release(*server).await;
    }
    let ended = match ended {
        Some(ended) => ended,
        None => in_time(commit_task).await,
    };
    assert_eq!(ended.expect("no panic").expect("the cluster goes on"), end);

    let expected = if end == End::Committed { "after" } else { "before" };
    let expected = [Some(expected.to_owned()), Some(expected.to_owned())];
    assert_eq!(values(&drill.client, &keys).await, expected, "while the victim is away");
    match blow {
        Blow::Kill => drill.process(victim).start().expect("it starts again"),
        Blow::Stop => {
            drill.process(victim).signal(Signal::CONT).expect("it is there");
            drill.release(victim).await;
        }
    }
    drill.until_nothing_is_held().await;
    drill.until_served().await;
    assert_eq!(values(&drill.client, &keys).await, expected, "when the victim is back");
    let next = in_time(drill.client.transact(async |tx| {
        for (key, _) in &keys {
            tx.get(key).await?;
            tx.put(key, "next")?;
        }
        Ok::<_, Error>(())
    }));
    next.await.expect("the next transaction commits");
    drill.until_nothing_is_held().await;
    drill.end().await;
}

/// The coordinators' leader is struck where these points of its are reached.
async fn leader_at(blow: Blow, points: &[(FaultPoint, u32)], end: End, answered: bool) {
    play(blow, async |drill, _| {
        let victim = drill.leading_coordinator().await;
        let points = points.iter().map(|(point, skip)| (victim, *point, *skip)).collect();
        Row { points, victim: Some(victim), end, answered }
    })
    .await;
}

/// A shard's leader is struck where this point of its is reached.
async fn shard_leader_at(blow: Blow, point: FaultPoint, answered: bool) {
    play(blow, async |_, keys| {
        let victim = keys[0].1;
        Row { points: vec![(victim, point, 0)], victim: Some(victim), end: End::Committed, answered }
    })
    .await;
}

macro_rules! rows {
    ($($name:ident($($argument:expr),*) = $how:ident;)*) => {
        mod killed {
            use super::*;
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    $how(Blow::Kill, $($argument),*).await;
                }
            )*
        }
        mod stopped {
            use super::*;
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    $how(Blow::Stop, $($argument),*).await;
                }
            )*
        }
    };
}

use FaultPoint::*;

rows! {
    the_leader_before_prepare_is_sent(&[(BeforePrepare, 0)], End::Aborted, false) = leader_at;
    the_leader_after_prepare_was_sent_and_before_any_vote() = leader_before_votes;
    the_leader_before_all_votes(&[(VoteReceived, 1)], End::Aborted, false) = leader_at;
    the_leader_after_all_votes(&[(BeforeDecide, 0)], End::Aborted, false) = leader_at;
    the_leader_after_the_decision_and_before_the_reply(
        &[(BeforeFinish, 0), (BeforeReply, 0)], End::Committed, false
    ) = leader_at;
    the_leader_after_the_reply_and_before_finish(&[(BeforeFinish, 0)], End::Committed, true) = leader_at;
    the_leader_after_some_finish(&[(BeforeFinish, 1)], End::Committed, true) = leader_at;
    a_shards_leader_before_prepared_is_committed(PrepareReceived, false) = shard_leader_at;
    a_shards_leader_after_prepared_is_committed(Prepared, false) = shard_leader_at;
    a_shards_leader_before_finish_is_applied(FinishReceived, true) = shard_leader_at;
    a_shards_leader_after_finish_is_applied(Finished, true) = shard_leader_at;
}

/// Both promises are durable, and neither vote has left its shard.
async fn leader_before_votes(blow: Blow) {
    play(blow, async |_, keys| {
        let points = keys.iter().map(|(_, server)| (*server, Prepared, 0)).collect();
        Row { points, victim: None, end: End::Aborted, answered: false }
    })
    .await;
}

/// The application itself dies.
mod client {
    use std::io::{BufRead, BufReader, Write};
    use std::path::Path;
    use std::process::{Child, Command, Stdio};

    use troth_sdk::TxnId;

    use super::*;

    /// Starts the application, and waits until it has everything but the commit behind it.
    fn start(folder: &Path, keys: &[(String, Server); 2]) -> (Child, TxnId) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_application"));
        command.arg(folder).args(keys.iter().map(|(key, _)| key));
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it starts");
        let lines = BufReader::new(child.stdout.as_mut().expect("piped")).lines();
        let mut lines = lines.map(|line| line.expect("text"));
        let ready = lines.find_map(|line| line.split_once("ready ").map(|(_, txn)| txn.to_owned()));
        (child, ready.expect("it gets ready").parse().expect("a transaction"))
    }

    /// Kills the application before it sends its commit, or while the commit is held at the leader.
    async fn dies(sent: bool) {
        let folder = tempfile::tempdir().expect("a folder");
        let drill = Drill::start(folder.path(), THREE).await;
        let keys = drill.two_keys("client").await;
        let before = in_time(commit(&drill.client, &keys, "before")).await;
        assert_eq!(before.expect("no panic").ok(), Some(End::Committed));
        let (mut application, txn) = start(folder.path(), &keys);
        let leader = drill.leading_coordinator().await;
        if sent {
            drill.hold_at(leader, CommitReceived, 0).await;
            application.stdin.as_mut().expect("piped").write_all(b"go on\n").expect("it listens");
            drill.until_held(leader, CommitReceived).await;
        }
        application.kill().expect("it runs");
        application.wait().expect("it is dead");
        drill.release(leader).await;
        drill.until_nothing_is_held().await;

        let outcome = in_time(drill.client.outcome(txn)).await.expect("the cluster knows");
        let expected = match outcome {
            Outcome::Committed { .. } => "after",
            Outcome::Aborted { .. } => "before",
            Outcome::Expired => panic!("it is young"),
        };
        assert!(sent || expected == "before", "nothing was sent");
        assert_eq!(
            values(&drill.client, &keys).await,
            [Some(expected.to_owned()), Some(expected.to_owned())]
        );
        let next = in_time(commit(&drill.client, &keys, "next")).await.expect("no panic");
        assert_eq!(next.ok(), Some(End::Committed));
        drill.until_nothing_is_held().await;
        assert_eq!(in_time(drill.client.outcome(txn)).await.expect("the cluster knows"), outcome);
        drill.end().await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn before_it_sends_its_commit() {
        dies(false).await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn after_it_has_sent_its_commit() {
        dies(true).await;
    }
}
