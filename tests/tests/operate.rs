//! What an operator does: the real command line, against real processes.

use std::path::Path;
use std::process::{Command, Output};

use troth_sdk::operator::FaultPoint;
use troth_sdk::{Commit, Key};
use troth_tests::drill::{Drill, Server, THREE};
use troth_tests::{eventually, in_time, programs};

fn troth(cluster: &Path, words: &[&str]) -> Output {
    let mut command = Command::new(programs().join("troth"));
    command.arg("--cluster").arg(cluster).args(words).output().expect("troth runs")
}

/// What a command prints that must succeed.
fn says(cluster: &Path, words: &[&str]) -> String {
    let output = troth(cluster, words);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words:?}: {error}");
    String::from_utf8(output.stdout).expect("text")
}

/// A command that must be refused, in one line with these words.
fn refuses(cluster: &Path, words: &[&str], expected: &str) {
    let output = troth(cluster, words);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{words:?}: {error}");
    assert!(error.lines().count() == 1 && error.contains(expected), "{error}");
}

/// Leaves a transaction in doubt: all have promised, and the leader is held before its decision.
async fn in_doubt(drill: &Drill, keys: &[(String, Server); 2]) -> String {
    let leader = drill.leading_coordinator().await;
    drill.hold_at(leader, FaultPoint::BeforeDecide, 0).await;
    let tx = in_time(drill.client.begin()).await.expect("begins");
    let id = tx.id().to_string();
    for (key, _) in keys {
        tx.put(key, "in doubt").expect("small");
    }
    // Its answer is of no interest: the coordinators are about to be lost.
    tokio::spawn(tx.commit());
    drill.until_held(leader, FaultPoint::BeforeDecide).await;
    id
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_in_doubt_is_listed_shown_and_ended_by_hand() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut drill = Drill::start(folder.path(), THREE).await;
    let keys = drill.two_keys("operate").await;
    let cluster = folder.path();
    assert_eq!(says(cluster, &["txn", "list", "--in-doubt"]), "nothing is in doubt\n");

    let id = in_doubt(&drill, &keys).await;
    let listed = says(cluster, &["--json", "txn", "list", "--in-doubt"]);
    assert!(
        listed.lines().count() == 1 && listed.contains(&id) && listed.contains("\"locks\":2"),
        "{listed}"
    );
    let shown = says(cluster, &["txn", "show", &id]);
    for what in ["commit received", "asked to prepare", "prepare received", "prepared", "voted yes"] {
        assert!(shown.contains(what), "{what} is missing: {shown}");
    }
    refuses(cluster, &["txn", "resolve", &id, "--commit", "--yes"], "they settle");

    // The coordinators are lost; the operator names the participants.
    let addresses: Vec<String> =
        (1..=3).map(|id| drill.peer(Server::Participant(id)).address.to_string()).collect();
    let named: Vec<&str> = addresses.iter().flat_map(|address| ["--participant", address]).collect();
    for coordinator in &mut drill.cluster.coordinators {
        coordinator.kill().expect("it runs");
    }
    let resolve = |words: &[&'static str]| [&["txn", "resolve", id.as_str()], words, &named[..]].concat();
    let plan = says(cluster, &resolve(&["--commit"]));
    assert!(plan.starts_with("would end") && plan.contains("--yes does it"), "{plan}");
    let done = says(cluster, &resolve(&["--commit", "--yes", "--note", "the coordinators burned down"]));
    assert!(done.starts_with("ended") && done.contains("committed at"), "{done}");
    refuses(cluster, &resolve(&["--abort", "--yes"]), "prepared nowhere");
    let shown = says(cluster, &[&["txn", "show", id.as_str()], &named[..]].concat());
    assert!(shown.contains("the coordinators burned down") && shown.contains("committed at"), "{shown}");
    drill.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_one_shard_has_committed_is_committed_at_the_others_too() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut drill = Drill::start(folder.path(), THREE).await;
    let keys = drill.two_keys("evidence").await;
    // The second shard is told of the decision, and does not get to apply it.
    let (late, server) = &keys[1];
    drill.hold_at(*server, FaultPoint::FinishReceived, 0).await;
    let tx = in_time(drill.client.begin()).await.expect("begins");
    let id = tx.id().to_string();
    for (key, _) in &keys {
        tx.put(key, "decided").expect("small");
    }
    assert!(matches!(in_time(tx.commit()).await, Ok(Commit::Committed { .. })));
    drill.until_held(*server, FaultPoint::FinishReceived).await;
    // Others commit there meanwhile, later than that.
    let shards = drill.client.map().shards;
    let home = |key: &str| Key::copy_from(key.as_bytes()).shard(shards);
    let mut others = (0..).map(|number| format!("other/{number}"));
    let other = others.find(|key| home(key) == home(late)).expect("there are many");
    in_time(drill.client.transact(async |tx| tx.put(&other, "later"))).await.expect("it commits");
    for coordinator in &mut drill.cluster.coordinators {
        coordinator.kill().expect("it runs");
    }

    let addresses: Vec<String> =
        (1..=3).map(|id| drill.peer(Server::Participant(id)).address.to_string()).collect();
    let named: Vec<&str> = addresses.iter().flat_map(|address| ["--participant", address]).collect();
    let resolve = |words: &[&'static str]| [&["txn", "resolve", id.as_str()], words, &named[..]].concat();
    refuses(folder.path(), &resolve(&["--abort", "--yes"]), "is committed at");
    let done = says(folder.path(), &resolve(&["--commit", "--yes"]));
    assert!(done.starts_with("ended") && done.contains("committed at"), "{done}");
    drill.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leadership_is_handed_over_on_request() {
    let folder = tempfile::tempdir().expect("a folder");
    let drill = Drill::start(folder.path(), THREE).await;
    let Server::Coordinator(leader) = drill.leading_coordinator().await else {
        unreachable!("it coordinates")
    };
    let said = says(folder.path(), &["switchover"]);
    assert!(said.contains("leads now"), "{said}");
    eventually("another one leads", async || {
        drill.leading_coordinator().await != Server::Coordinator(leader)
    })
    .await;
    let to = leader.to_string();
    let said = says(folder.path(), &["--json", "switchover", "--to", &to]);
    assert!(said.contains(&format!("\"leader\":{to}")), "{said}");
    eventually("it leads again", async || drill.leading_coordinator().await == Server::Coordinator(leader))
        .await;
    refuses(folder.path(), &["switchover", "--to", &to], "leads already");
    refuses(folder.path(), &["switchover", "--to", "9"], "there is no coordinator 9");
    drill.end().await;
}
