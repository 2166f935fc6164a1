//! Taking over under load: what a dead leader leaves behind, servers that are restarted one after
//! another, disks that stall.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;
use troth_protocol::ShardId;
use troth_sdk::harness::bank::{Audit, Bank};
use troth_sdk::harness::load::Load;
use troth_sdk::operator::{FaultPoint, Peer};
use troth_sdk::{Commit, Error, Key, KeyRange, Outcome};
use troth_tests::drill::{Drill, Server, THREE};
use troth_tests::{PATIENCE, eventually, in_time};

/// These tests take times, and a change of leader that nobody asked for would be one too many: so they
/// run one after another.
static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// Transactions that are left in doubt.
const MANY: usize = 1000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_transactions_in_doubt_are_settled_within_two_seconds() {
    let _alone = ALONE.lock().await;
    let folder = tempfile::tempdir().expect("a folder");
    let mut drill = Drill::start(folder.path(), THREE).await;
    drill.until_shared().await;
    let shards = drill.client.map().shards;
    let home = |key: &String| Key::copy_from(key.as_bytes()).shard(shards);
    let pairs = (0..).map(|number| (format!("a/{number}"), format!("b/{number}")));
    let mut begun = Vec::new();
    for (a, b) in pairs.filter(|(a, b)| home(a) != home(b)).take(MANY) {
        let tx = in_time(drill.client.begin()).await.expect("begins");
        tx.put(a, "in doubt").expect("small");
        tx.put(b, "in doubt").expect("small");
        begun.push(tx);
    }
    // The driver stops at its first `Prepare` until all of them wait behind it, and then before the
    // first decision.
    let leader = drill.leading_coordinator().await;
    drill.hold_at(leader, FaultPoint::BeforeDecide, 0).await;
    drill.hold_for(leader, FaultPoint::BeforePrepare, Duration::from_secs(2)).await;
    let commits: Vec<JoinHandle<Result<Commit, Error>>> =
        begun.into_iter().map(|tx| tokio::spawn(tx.commit())).collect();
    drill.until_held(leader, FaultPoint::BeforeDecide).await;
    eventually("all are prepared at both of their shards", async || {
        drill.operator.in_doubt().await.is_ok_and(|records| records.len() == 2 * MANY)
    })
    .await;

    drill.process(leader).kill().expect("it runs");
    let killed = Instant::now();
    let standbys: Vec<Peer> =
        (1..=3).map(Server::Coordinator).filter(|id| *id != leader).map(|id| drill.peer(id)).collect();
    eventually("a standby leads", async || {
        let leads =
            async |peer| drill.operator.coordinator(peer).await.is_ok_and(|told| told.epoch.is_some());
        leads(&standbys[0]).await || leads(&standbys[1]).await
    })
    .await;
    let elected = Instant::now();
    eventually("nothing is in doubt", async || {
        drill.operator.in_doubt().await.is_ok_and(|records| records.is_empty())
    })
    .await;
    let settled = elected.elapsed();
    println!("{MANY} in doubt; elected after {:?}, settled {settled:?} later", elected - killed);
    assert!(settled < Duration::from_secs(2), "{settled:?}");

    // No decision was made, so none may have happened, and everybody is told so.
    for commit in commits {
        let told = in_time(commit).await.expect("no panic").expect("there is a leader");
        let aborted = match told {
            Commit::Aborted { .. } => true,
            Commit::Committed { .. } => false,
            Commit::Unknown { handle } => {
                let outcome = in_time(handle.resolve(PATIENCE)).await.expect("there is a leader");
                matches!(outcome, Outcome::Aborted { .. })
            }
        };
        assert!(aborted, "nobody has decided that");
    }
    let snapshot = in_time(drill.client.snapshot()).await.expect("a snapshot");
    for part in ["a/", "b/"] {
        let found = in_time(snapshot.scan(KeyRange::prefix(part.as_bytes()), 1)).await.expect("readable");
        assert!(found.is_empty(), "{found:?}");
    }
    drill.process(leader).start().expect("it starts again");
    drill.until_nothing_is_held().await;
    drill.end().await;
}

/// Counts all money again and again, until told to stop, and returns how often.
fn audits(bank: &Bank, expected: Audit, stop: &Arc<AtomicBool>) -> JoinHandle<usize> {
    let (bank, stop) = (bank.clone(), stop.clone());
    tokio::spawn(async move {
        let mut count = 0;
        while !stop.load(Ordering::Relaxed) {
            let audit = in_time(bank.audit_within(PATIENCE)).await.expect("readable");
            assert_eq!(audit, expected, "audit {count}");
            count += 1;
        }
        count
    })
}

/// Writes to two shards at once, by hand and so without the retries of `transact`, until told to stop,
/// and counts.
fn writer(drill: &Drill, name: usize, stop: &Arc<AtomicBool>) -> (Arc<AtomicUsize>, JoinHandle<()>) {
    let written = Arc::new(AtomicUsize::new(0));
    let (client, count, stop) = (drill.client.clone(), written.clone(), stop.clone());
    let writing = tokio::spawn(async move {
        for number in 0u64.. {
            if stop.load(Ordering::Relaxed) {
                return;
            }
            let tx = in_time(client.begin()).await.expect("no begin fails by a switchover");
            for part in ["a", "b"] {
                tx.put(format!("{part}/{name}/{number}"), "1").expect("small");
            }
            let commit = in_time(tx.commit()).await;
            assert!(matches!(commit, Ok(Commit::Committed { .. })), "{commit:?} by a switchover");
            count.fetch_add(1, Ordering::Relaxed);
        }
    });
    (written, writing)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_audit_is_wrong_while_servers_restart_and_leaders_change() {
    let _alone = ALONE.lock().await;
    let folder = tempfile::tempdir().expect("a folder");
    let mut drill = Drill::start(folder.path(), THREE).await;
    let bank = Bank::new(&drill.client, 100);
    let opened = in_time(bank.open()).await.expect("the accounts are opened");
    let before = in_time(bank.balances()).await.expect("readable");
    let stop = Arc::new(AtomicBool::new(false));
    let load = Load::start(&bank, 8, 20);
    let auditors: Vec<_> = (0..2).map(|_| audits(&bank, opened, &stop)).collect();

    let servers = (1..=3).map(Server::Coordinator).chain((1..=3).map(Server::Participant));
    for server in servers {
        let process = drill.process(server);
        let status = process.stop(Duration::from_secs(20)).expect("it stops");
        assert_eq!(status.code(), Some(0), "{server:?}");
        process.start().expect("it starts again");
        // The next one stops when this one is back: two of three must be there.
        eventually("it is back", async || {
            let status = drill.operator.status().await;
            status.down() == 0 && status.leader().is_some()
        })
        .await;
        drill.until_shared().await;
    }
    let after_restarts = load.counts();
    assert_eq!((after_restarts.failed, after_restarts.unknown), (0, 0), "{:?}", after_restarts.error);

    let halt = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..4).map(|name| writer(&drill, name, &halt)).collect();
    let written = || writers.iter().map(|(written, _)| written.load(Ordering::Relaxed)).collect::<Vec<_>>();
    for _ in 0..10 {
        let leader = drill.leading_coordinator().await;
        // It may be refused, if no other one has answered for half a second.
        eventually("leadership is handed over", async || {
            drill
                .operator
                .switchover(None, PATIENCE)
                .await
                .is_ok_and(|to| Server::Coordinator(to.0) != leader)
        })
        .await;
        eventually("another one leads", async || drill.leading_coordinator().await != leader).await;
        // Each has met it, and gone on.
        let before = written();
        eventually("writes go on", async || {
            written().iter().zip(&before).all(|(now, before)| *now >= before + 2)
        })
        .await;
    }
    halt.store(true, Ordering::Relaxed);
    let by_hand: usize = written().iter().sum();
    for (_, writing) in writers {
        in_time(writing).await.expect("no transaction fails by a switchover");
    }
    stop.store(true, Ordering::Relaxed);
    let mut audited = 0;
    for auditor in auditors {
        audited += in_time(auditor).await.expect("no audit is wrong");
    }
    let ended = in_time(load.stop(PATIENCE)).await.expect("they end");
    println!("{audited} audits, {by_hand} writes by hand, {:?}", ended.counts);
    assert_eq!((ended.counts.failed, ended.counts.unknown), (0, 0), "{:?}", ended.counts.error);
    assert!(audited > 20 && ended.counts.committed > 100);
    let after = in_time(bank.balances_within(PATIENCE)).await.expect("readable");
    assert_eq!(ended.wrong_accounts(&before, &after), 0, "all that was acknowledged is there");
    drill.until_nothing_is_held().await;
    drill.end().await;
}

/// The disk of a server stalls for longer than the test lasts: others must lead, and transfers go on.
async fn a_stall(whom: impl AsyncFnOnce(&Drill) -> Server) {
    let _alone = ALONE.lock().await;
    let folder = tempfile::tempdir().expect("a folder");
    let drill = Drill::start(folder.path(), THREE).await;
    drill.until_shared().await;
    let bank = Bank::new(&drill.client, 100);
    in_time(bank.open()).await.expect("the accounts are opened");
    let before = in_time(bank.balances()).await.expect("readable");
    let load = Load::start(&bank, 4, 20);
    let all = || (0..THREE.shards).map(ShardId);
    let began = Instant::now();
    eventually("transfers are made", async || load.outage(began, all()).is_some()).await;

    let victim = whom(&drill).await;
    drill.hold_at(victim, FaultPoint::LogSync, 0).await;
    let struck = Instant::now();
    eventually("the stalled one leads nothing", async || {
        let status = drill.operator.status().await;
        match victim {
            Server::Coordinator(id) => status.leader().is_some_and(|leader| leader.0 != id),
            Server::Participant(id) => {
                let serving = status.serving();
                serving.len() == usize::from(THREE.shards) && serving.values().all(|node| node.0 != id)
            }
        }
    })
    .await;
    assert!(struck.elapsed() < Duration::from_secs(20), "not only when the stall was over");
    eventually("transfers go on at all shards", async || load.outage(struck, all()).is_some()).await;
    let outage = load.outage(struck, all()).expect("seen just now");
    println!("{victim:?}: its disk stalled, and no transfer was made at a shard for {:?}", outage.gap);
    assert!(outage.gap < Duration::from_secs(10), "{outage:?}");

    drill.release(victim).await;
    let ended = in_time(load.stop(PATIENCE)).await.expect("they end");
    assert_eq!((ended.counts.failed, ended.counts.unknown), (0, 0), "{:?}", ended.counts.error);
    let after = in_time(bank.balances_within(PATIENCE)).await.expect("readable");
    assert_eq!(ended.wrong_accounts(&before, &after), 0, "all that was acknowledged is there");
    drill.until_nothing_is_held().await;
    drill.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_coordinator_whose_disk_stalls_does_not_lead_on() {
    a_stall(async |drill| drill.leading_coordinator().await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_participant_whose_disk_stalls_does_not_lead_on() {
    a_stall(async |drill| drill.two_keys("stall").await[0].1).await;
}
