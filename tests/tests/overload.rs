//! Too much to do, and a shard that does nothing: who suffers from it, and who does not.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use troth_protocol::message::{Request, Response, shard};
use troth_protocol::{KeyRange, Reject, ShardId};
use troth_sdk::harness::processes::{Processes, Shape};
use troth_sdk::operator::FaultPoint;
use troth_sdk::{Client, Commit, Error, Key};
use troth_tests::drill::{Drill, Server};
use troth_tests::{connect, in_time};

const SMALL: Shape = Shape { coordinators: 1, nodes: 3, replicas: 1, shards: 12 };

/// A cluster whose coordinator takes so many transactions.
async fn start(folder: &Path, in_flight: usize) -> Drill {
    Drill::start_with(folder, SMALL, async |cluster: &mut Processes| {
        let config = cluster.coordinators[0].config();
        let text = fs::read_to_string(config).expect("a configuration");
        fs::write(config, text + &format!("\n[limits]\nin_flight = {in_flight}\n")).expect("writable");
    })
    .await
}

/// What clients did.
#[derive(Default)]
struct Counts {
    committed: AtomicU64,
    /// Met the locks of their own last one, which is decided and not applied yet.
    aborted: AtomicU64,
    refused: AtomicU64,
    failed: AtomicU64,
    slowest_ms: AtomicU64,
}

/// Writes two keys in one transaction, once.
async fn write(client: &Client, keys: [&str; 2]) -> Result<Commit, Error> {
    let tx = client.begin().await?;
    for key in keys {
        tx.put(key, "1")?;
    }
    tx.commit().await
}

/// Keys that one writer takes in turn, so that it does not meet the locks of its own last one.
const TURNS: usize = 50;

/// Transactions that are waited for where their rate is measured.
const MANY: u64 = 1000;

/// Writes again and again, each to keys of its own. Who is not patient comes back soon, whatever it is
/// told.
fn writers(
    client: &Client,
    name: &str,
    count: usize,
    keys: impl Fn(usize) -> Vec<[String; 2]>,
    patient: bool,
    stop: &Arc<AtomicBool>,
) -> (Arc<Counts>, JoinSet<()>) {
    let (counts, mut set) = (Arc::new(Counts::default()), JoinSet::new());
    for number in 0..count {
        let (client, counts, stop) = (client.clone(), counts.clone(), stop.clone());
        let (keys, name) = (keys(number), name.to_owned());
        set.spawn(async move {
            for [first, second] in keys.iter().cycle() {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                let began = Instant::now();
                match write(&client, [first, second]).await {
                    Ok(Commit::Committed { .. }) => {
                        counts.committed.fetch_add(1, Ordering::Relaxed);
                        counts.slowest_ms.fetch_max(began.elapsed().as_millis() as u64, Ordering::Relaxed);
                    }
                    Err(Error::Overloaded { retry_after }) => {
                        assert!(retry_after > Duration::ZERO, "{name} is told when to come back");
                        counts.refused.fetch_add(1, Ordering::Relaxed);
                        let pause = if patient { retry_after } else { Duration::from_millis(20) };
                        tokio::time::sleep(pause).await;
                    }
                    Ok(Commit::Aborted { .. }) => _ = counts.aborted.fetch_add(1, Ordering::Relaxed),
                    Ok(Commit::Unknown { .. }) | Err(_) => {
                        counts.failed.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
        });
    }
    (counts, set)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_greedy_client_is_refused_and_a_modest_one_is_not() {
    let folder = tempfile::tempdir().expect("a folder");
    let drill = start(folder.path(), 24).await;
    let modest = connect(&drill.cluster).await;
    let stop = Arc::new(AtomicBool::new(false));
    let keys = |who: &str| {
        let who = who.to_owned();
        let pair =
            move |number: usize, turn: usize| ["a", "b"].map(|part| format!("{who}/{number}/{turn}/{part}"));
        move |number: usize| (0..TURNS).map(|turn| pair(number, turn)).collect()
    };
    let (greedy_counts, greedy) = writers(&drill.client, "greedy", 150, keys("greedy"), false, &stop);
    let (modest_counts, others) = writers(&modest, "modest", 3, keys("modest"), true, &stop);
    let enough = || {
        let refused = greedy_counts.refused.load(Ordering::Relaxed);
        refused > 1000 && modest_counts.committed.load(Ordering::Relaxed) > 100
    };
    troth_tests::eventually("both have got their answers", async || enough()).await;
    stop.store(true, Ordering::Relaxed);
    for mut set in [greedy, others] {
        while let Some(ended) = in_time(set.join_next()).await {
            ended.expect("no panic");
        }
    }
    let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    println!(
        "greedy: {} committed, {} refused; modest: {} committed, {} refused, the slowest in {} ms",
        of(&greedy_counts.committed),
        of(&greedy_counts.refused),
        of(&modest_counts.committed),
        of(&modest_counts.refused),
        of(&modest_counts.slowest_ms),
    );
    assert_eq!((of(&modest_counts.refused), of(&modest_counts.failed)), (0, 0), "it has its share");
    assert_eq!(of(&greedy_counts.failed), 0, "what is admitted is done");
    assert!(of(&greedy_counts.committed) > 0, "the greedy one has its share too");
    modest.close().await;
    drill.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_shard_holds_up_nobody_who_does_not_need_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let drill = start(folder.path(), 512).await;
    drill.until_shared().await;
    let map = drill.client.map();
    // All shards of one node are slow.
    let slow: Vec<ShardId> =
        (0..SMALL.shards).map(ShardId).filter(|s| map.replicas_of(*s)[0].0 == 1).collect();
    let home = move |key: &String| Key::copy_from(key.as_bytes()).shard(SMALL.shards);
    let pairs = |name: String, wanted: Box<dyn Fn(ShardId) -> bool>| -> Vec<[String; 2]> {
        let mut keys = (0..).map(|number| format!("{name}/{number}")).filter(|key| wanted(home(key)));
        let mut next = || keys.next().expect("there are many");
        (0..TURNS).map(|_| [next(), next()]).collect()
    };
    let (needs, avoids) = (slow.clone(), slow.clone());
    let stop = Arc::new(AtomicBool::new(false));
    let quick_keys = |number: usize| {
        let avoids = avoids.clone();
        pairs(format!("quick/{number}"), Box::new(move |shard| !avoids.contains(&shard)))
    };
    let (quick, mut quick_set) = writers(&drill.client, "quick", 16, quick_keys, true, &stop);
    let committed = |counts: &Counts| counts.committed.load(Ordering::Relaxed);
    troth_tests::eventually("they are at it", async || committed(&quick) > 200).await;
    let (began, before) = (Instant::now(), committed(&quick));
    let many = async || committed(&quick) >= before + MANY;
    troth_tests::eventually("many in peace", many).await;
    let calm = MANY as f64 / began.elapsed().as_secs_f64();
    quick.slowest_ms.store(0, Ordering::Relaxed);

    drill.hold_for(Server::Participant(1), FaultPoint::LogSync, Duration::from_secs(6)).await;
    let other = connect(&drill.cluster).await;
    let slow_keys = |number: usize| {
        let needs = needs.clone();
        pairs(format!("slow/{number}"), Box::new(move |shard| needs.contains(&shard)))
    };
    let (held, mut slow_set) = writers(&other, "slow", 400, slow_keys, true, &stop);
    drill.until_held(Server::Participant(1), FaultPoint::LogSync).await;
    let (began, before) = (Instant::now(), committed(&quick));
    let many = async || committed(&quick) >= before + MANY && held.refused.load(Ordering::Relaxed) > 0;
    troth_tests::eventually("many meanwhile, and not all who need the slow shard can wait for it", many)
        .await;
    let meanwhile = (committed(&quick) - before) as f64 / began.elapsed().as_secs_f64();
    let slowest = quick.slowest_ms.load(Ordering::Relaxed);
    let refused = held.refused.load(Ordering::Relaxed);
    println!(
        "{calm:.0}/s in peace, {meanwhile:.0}/s meanwhile, the slowest in {slowest} ms; {refused} refused"
    );
    assert!(meanwhile > calm / 2.0, "{meanwhile:.0}/s instead of {calm:.0}/s");
    assert!(slowest < 1000, "{slowest} ms");
    assert_eq!(quick.failed.load(Ordering::Relaxed) + quick.refused.load(Ordering::Relaxed), 0);

    troth_tests::eventually("the slow ones go on", async || committed(&held) > 400).await;
    stop.store(true, Ordering::Relaxed);
    for set in [&mut quick_set, &mut slow_set] {
        while let Some(ended) = in_time(set.join_next()).await {
            ended.expect("no panic");
        }
    }
    drill.until_nothing_is_held().await;
    other.close().await;
    drill.end().await;
}

/// Reads of one node that may wait for the disk: `DISK_READS_MAX` of the participant.
const DISK_READS: usize = 256;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_that_a_disk_does_not_answer_are_refused_and_what_needs_no_disk_goes_on() {
    let folder = tempfile::tempdir().expect("a folder");
    let drill = start(folder.path(), 512).await;
    let [(slow, server), (quick, _)] = drill.two_keys("read").await;
    let write = drill.client.transact(async |tx| {
        tx.put(&slow, "1")?;
        tx.put(&quick, "1")
    });
    in_time(write).await.expect("it commits");
    let snapshot = in_time(drill.client.snapshot()).await.expect("a moment");
    drill.hold_all_at(server, FaultPoint::DiskRead).await;

    // More than may wait, as another client would ask: without a pause.
    let (peer, map) = (drill.peer(server), drill.client.map());
    let range = KeyRange::new(Key::copy_from(slow.as_bytes()), None);
    let shard = Key::copy_from(slow.as_bytes()).shard(map.shards);
    let scan = shard::Request::Scan { at: snapshot.timestamp(), range, rows_max: 1 };
    let request = Request::Shard { shard, request: scan };
    let mut scans = JoinSet::new();
    for _ in 0..DISK_READS + 50 {
        let (transport, peer, request) = (drill.client.transport().clone(), peer.clone(), request.clone());
        scans.spawn(async move {
            transport.call(&peer, request, tokio::time::Instant::now() + troth_tests::PATIENCE).await
        });
    }
    for _ in 0..50 {
        let ended = in_time(scans.join_next()).await.expect("some end").expect("no panic");
        let refused = matches!(ended, Ok(Response::Rejected(Reject::Overloaded { retry_after_millis })) if retry_after_millis > 0);
        assert!(refused, "{ended:?}");
    }
    // What is in memory is read and written, at this node too; and others scan.
    let others = in_time(snapshot.scan(KeyRange::prefix(format!("{{{quick}}}").as_bytes()), 10)).await;
    assert_eq!(others.expect("it is scanned").len(), 0);
    let read = in_time(snapshot.get_many([&slow, &quick])).await.expect("they are read");
    assert!(read.iter().all(|value| value.as_deref() == Some(b"1".as_slice())), "{read:?}");
    let write = drill.client.transact(async |tx| {
        tx.get(&slow).await?;
        tx.put(&slow, "2")?;
        tx.put(&quick, "2")
    });
    in_time(write).await.expect("it commits");

    drill.release(server).await;
    while let Some(ended) = in_time(scans.join_next()).await {
        let ended = ended.expect("no panic").expect("an answer");
        assert!(matches!(ended, Response::Shard(shard::Response::Page { .. })), "{ended:?}");
    }
    drill.end().await;
}
