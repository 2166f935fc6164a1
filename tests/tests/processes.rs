//! Real processes, killed with SIGKILL at random moments: nothing acknowledged is lost, nothing
//! stays locked, no money appears or vanishes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::task::JoinSet;
use tokio::time::sleep;
use troth_sdk::harness::bank::Bank;
use troth_sdk::harness::processes::{Processes, Shape};
use troth_sdk::{Client, Error, KeyRange, Outcome};
use troth_tests::{PATIENCE, SMALL, connect, eventually, in_time, processes, seed, until_nothing_is_held};

const ACCOUNTS: u32 = 200;
const CLIENTS: u64 = 12;

/// Moves money and, in the same transaction, writes a receipt, until told to stop. Returns the
/// receipts that were acknowledged, and those that certainly were not written.
async fn move_money(
    client: Client,
    bank: Bank,
    name: u64,
    done: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
) -> (Vec<String>, Vec<String>) {
    let (mut acknowledged, mut denied) = (Vec::new(), Vec::new());
    for round in 0u64.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let (from, to) = bank.pick();
        let receipt = format!("receipt/{name}/{round:06}");
        let result = client
            .transact(async |tx| {
                bank.transfer_in(&tx, from, to, 1).await?;
                tx.put(&receipt, "done")
            })
            .await;
        done.fetch_add(1, Ordering::Relaxed);
        match result {
            Ok(()) => acknowledged.push(receipt),
            Err(Error::Unknown(handle)) => match in_time(handle.resolve(PATIENCE)).await {
                Ok(Outcome::Committed { .. }) => acknowledged.push(receipt),
                Ok(Outcome::Aborted { .. }) => denied.push(receipt),
                other => panic!("the cluster is there again: {other:?}"),
            },
            Err(error) => panic!("no transfer may fail for good: {error}"),
        }
    }
    (acknowledged, denied)
}

/// A cluster in a storm, with clients that move money meanwhile.
struct Storm {
    cluster: Processes,
    random: StdRng,
    done: Arc<AtomicU64>,
}

impl Storm {
    async fn a_while(&mut self) {
        sleep(Duration::from_millis(self.random.random_range(50..700))).await;
    }

    fn any_of(&mut self, count: usize) -> usize {
        self.random.random_range(0..count)
    }

    /// Waits until transfers are made again.
    async fn until_it_goes_on(&self) {
        let before = self.done.load(Ordering::Relaxed);
        let goes_on = async || self.done.load(Ordering::Relaxed) >= before + 3 * CLIENTS;
        eventually("transfers go on", goes_on).await;
    }
}

/// Lets clients move money while `disturb` does what it does; then checks that all is well.
async fn survives(shape: Shape, disturb: impl AsyncFnOnce(&mut Storm)) {
    let random = StdRng::seed_from_u64(seed());
    let folder = tempfile::tempdir().expect("a folder");
    let (cluster, client) = processes(folder.path(), shape).await;
    let bank = Bank::new(&client, ACCOUNTS);
    let opened = in_time(bank.open()).await.expect("the accounts are opened");

    let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut clients = JoinSet::new();
    for name in 0..CLIENTS {
        clients.spawn(move_money(client.clone(), bank.clone(), name, done.clone(), stop.clone()));
    }
    let mut storm = Storm { cluster, random, done };
    disturb(&mut storm).await;
    // It must go on after the last disturbance, not only have been right before.
    storm.until_it_goes_on().await;
    stop.store(true, Ordering::Relaxed);
    let (mut acknowledged, mut denied) = (Vec::new(), Vec::new());
    while let Some(done) = in_time(clients.join_next()).await {
        let (yes, no) = done.expect("no panic in a client");
        acknowledged.extend(yes);
        denied.extend(no);
    }
    println!("{} transfers acknowledged, {} settled as aborted", acknowledged.len(), denied.len());

    let audit = in_time(bank.audit_within(PATIENCE)).await.expect("readable");
    assert_eq!(audit, opened, "no money appears or vanishes");
    let snapshot = in_time(client.snapshot()).await.expect("a snapshot");
    let found = in_time(snapshot.scan(KeyRange::prefix(b"receipt/"), usize::MAX)).await.expect("readable");
    let found: std::collections::BTreeSet<String> =
        found.into_iter().map(|(key, _)| key.to_string()).collect();
    let lost: Vec<&String> = acknowledged.iter().filter(|receipt| !found.contains(*receipt)).collect();
    assert!(lost.is_empty(), "acknowledged and lost: {lost:?}");
    let undead: Vec<&String> = denied.iter().filter(|receipt| found.contains(*receipt)).collect();
    assert!(undead.is_empty(), "said to be aborted, and there: {undead:?}");
    until_nothing_is_held(&client.operator()).await;
    client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn participants_are_killed_at_random_moments() {
    survives(SMALL, async |storm| {
        for _ in 0..6 {
            storm.a_while().await;
            let victim = storm.any_of(3);
            storm.cluster.participants[victim].kill().expect("it runs");
            storm.a_while().await;
            storm.cluster.participants[victim].start().expect("it starts again");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_coordinator_is_killed_at_random_moments() {
    survives(SMALL, async |storm| {
        for _ in 0..6 {
            storm.a_while().await;
            storm.cluster.coordinators[0].kill().expect("it runs");
            storm.a_while().await;
            storm.cluster.coordinators[0].start().expect("it starts again");
        }
    })
    .await;
}

/// Three of each.
const TRIPLE: Shape = Shape { coordinators: 3, replicas: 3, ..SMALL };

async fn everything_is_killed_at_once(shape: Shape) {
    survives(shape, async |storm| {
        for _ in 0..3 {
            storm.a_while().await;
            storm.cluster.kill_all().expect("they run");
            storm.cluster.start().expect("all start again");
            storm.until_it_goes_on().await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_is_killed_at_once_where_there_is_one_replica() {
    everything_is_killed_at_once(SMALL).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_is_killed_at_once_where_there_are_three_of_each() {
    everything_is_killed_at_once(TRIPLE).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_process_is_killed_where_there_are_three_of_each() {
    survives(TRIPLE, async |storm| {
        for _ in 0..6 {
            storm.a_while().await;
            let victim = storm.any_of(6);
            let process = storm.cluster.all_mut().nth(victim).expect("there are six");
            process.kill().expect("it runs");
            storm.until_it_goes_on().await;
            let process = storm.cluster.all_mut().nth(victim).expect("there are six");
            process.start().expect("it starts again");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_lost_its_data_folder_is_not_taken_back() {
    let folder = tempfile::tempdir().expect("a folder");
    let (mut cluster, client) = processes(folder.path(), SMALL).await;
    client.close().await;
    let victim = &mut cluster.participants[1];
    victim.kill().expect("it runs");
    std::fs::remove_dir_all(folder.path().join("data/participant-2")).expect("its folder is there");
    victim.start().expect("it starts");
    let status = victim.wait(PATIENCE).expect("it ends by itself");
    assert_eq!(status.code(), Some(1));
    let log = std::fs::read_to_string(victim.log()).expect("a log");
    let expected =
        "troth-participant: node 2 of this cluster is known with another data folder, last at 127.0.0.1:";
    assert!(log.lines().any(|line| line.starts_with(expected)), "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_graceful_stop_loses_nothing_and_exits_with_zero() {
    let folder = tempfile::tempdir().expect("a folder");
    let (mut cluster, client) = processes(folder.path(), SMALL).await;
    client.transact(async |tx| tx.put("kept", "yes")).await.expect("commits");
    client.close().await;
    for process in cluster.all_mut() {
        let status = process.stop(Duration::from_secs(10)).expect("it stops");
        assert_eq!(status.code(), Some(0), "{}", process.name);
    }
    cluster.start().expect("all start again");
    let client = connect(&cluster).await;
    let snapshot = in_time(client.snapshot()).await.expect("a snapshot");
    assert_eq!(in_time(snapshot.get("kept")).await.expect("readable").as_deref(), Some(&b"yes"[..]));
    client.close().await;
}
