//! The ring grows and shrinks: nodes come and go while money moves and is counted, and anybody may die
//! or be cut off in the middle of a move. No audit is ever wrong, and every move ends.

use std::fs;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use troth_protocol::message::admin::FaultPoint;
use troth_protocol::message::raft::LogId;
use troth_protocol::message::{Request, Response, coordinator, shard};
use troth_protocol::{KeyRange, NodeId, Reject, ShardId};
use troth_sdk::harness::processes::{Process, Processes, Shape};
use troth_sdk::operator::{MoveStage, Moving, NodeChange, Overview};
use troth_sdk::{Client, ClientConfig, Commit, Key};
use troth_tests::drill::{Drill, Server};
use troth_tests::network::Network;
use troth_tests::witness::Witness;
use troth_tests::{PATIENCE, eventually, in_time};

/// Three of each, and few shards, so that each has something to carry.
const THREE: Shape = Shape { coordinators: 3, nodes: 3, replicas: 3, shards: 6 };

/// What each shard carries besides accounts, so that it does not move in one piece.
const BALLAST_KEYS: usize = 240;
const BALLAST_BYTES: usize = 100_000;

/// Adds lines to a server's configuration.
fn configure(process: &Process, before: &str, after: &str) {
    let text = fs::read_to_string(process.config()).expect("a configuration");
    fs::write(process.config(), format!("{before}\n{text}\n{after}\n")).expect("writable");
}

/// Fills the shards.
async fn load_ballast(drill: &Drill) {
    let keys: Vec<String> = (0..BALLAST_KEYS).map(|number| format!("ballast/{number}")).collect();
    for chunk in keys.chunks(24) {
        let write = drill.client.transact(async |tx| {
            for key in chunk {
                tx.put(key, vec![7; BALLAST_BYTES])?;
            }
            Ok::<_, troth_sdk::Error>(())
        });
        in_time(write).await.expect("it is written");
    }
}

async fn check_ballast(drill: &Drill) {
    let snapshot = in_time(drill.client.snapshot()).await.expect("a snapshot");
    for number in 0..BALLAST_KEYS {
        let value = in_time(snapshot.get(format!("ballast/{number}"))).await.expect("readable");
        assert!(value.is_some_and(|value| value.len() == BALLAST_BYTES && value[0] == 7), "ballast {number}");
    }
}

/// Every node holds what the map gives it, and nothing else: what has left it is gone.
async fn until_tidy(drill: &Drill) {
    eventually("every node holds what it should", async || {
        let status = drill.operator.status().await;
        let map = status.map.clone();
        status.participants.iter().filter_map(|(node, told)| Some((node.id, told.as_ref().ok()?))).all(
            |(node, told)| {
                let held: Vec<ShardId> = told.shards.iter().map(|shard| shard.shard).collect();
                let should: Vec<ShardId> = (0..map.shards)
                    .map(ShardId)
                    .filter(|shard| map.replicas_of(*shard).contains(&node))
                    .collect();
                held == should
            },
        )
    })
    .await;
}

fn held_by(overview: &Overview, node: u64) -> usize {
    overview.map.shards_on(NodeId(node))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_joins_and_another_one_leaves() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut drill = Drill::start(folder.path(), THREE).await;
    load_ballast(&drill).await;
    let witness = Witness::start(&drill, 6).await;
    witness.until_it_goes_on().await;

    drill.join().await;
    let with_four = drill.until_placed().await;
    let taken = held_by(&with_four, 4);
    assert!(taken > 0, "the ring gives the newcomer something");
    assert_eq!(with_four.moved_shards, taken as u64, "only what the newcomer takes has moved");
    assert!(with_four.moved_bytes > 0);
    until_tidy(&drill).await;
    witness.until_it_goes_on().await;

    // It leaves in peace, and may not come back.
    let refused = drill.operator.change_node(NodeId(1), NodeChange::Remove).await;
    let refused = refused.expect_err("it is active").to_string();
    assert!(refused.contains("node 1 is active; drain it first"), "{refused}");
    drill.drain(1).await;
    let drained = drill.until_placed().await;
    assert_eq!(held_by(&drained, 1), 0);
    let refused = drill.operator.change_node(NodeId(2), NodeChange::Drain).await;
    let refused = refused.expect_err("three replicas need three nodes").to_string();
    assert!(refused.contains("too few for 3 replicas"), "{refused}");
    until_tidy(&drill).await;
    let process = drill.process(Server::Participant(1));
    let status = process.stop(Duration::from_secs(20)).expect("it stops");
    assert_eq!(status.code(), Some(0));
    drill.operator.change_node(NodeId(1), NodeChange::Remove).await.expect("it holds nothing");
    // Whoever has not heard the answer asks again.
    drill.operator.change_node(NodeId(1), NodeChange::Remove).await.expect("it is removed");
    let admit = NodeChange::Admit { weight: None, zone: None };
    let refused = drill.operator.change_node(NodeId(1), admit).await;
    let refused = refused.expect_err("its id is used up").to_string();
    assert!(refused.contains("an id is never used again"), "{refused}");
    let process = drill.process(Server::Participant(1));
    process.start().expect("it starts");
    let status = process.wait(PATIENCE).expect("it ends by itself");
    assert_eq!(status.code(), Some(1));
    let log = fs::read_to_string(process.log()).expect("a log");
    assert!(log.contains("node 1 was removed from this cluster"), "{log}");

    witness.testify(&drill).await;
    check_ballast(&drill).await;
    drill.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_that_is_under_way_when_its_shard_leaves_gets_no_answer_from_what_is_left() {
    let folder = tempfile::tempdir().expect("a folder");
    let shape = Shape { coordinators: 1, nodes: 3, replicas: 1, shards: 6 };
    let drill = Drill::start(folder.path(), shape).await;
    let [(key, server), _] = drill.two_keys("read").await;
    let Server::Participant(node) = server else { panic!("shards are led by participants") };
    in_time(drill.client.transact(async |tx| tx.put(&key, "1"))).await.expect("it is written");
    let snapshot = in_time(drill.client.snapshot()).await.expect("a moment");
    drill.hold_all_at(server, FaultPoint::DiskRead).await;

    // As a client would ask that waits for long.
    let key = Key::copy_from(key.as_bytes());
    let shard = key.shard(drill.client.map().shards);
    let scan =
        shard::Request::Scan { at: snapshot.timestamp(), range: KeyRange::new(key, None), rows_max: 1 };
    let (transport, peer) = (drill.client.transport().clone(), drill.peer(server));
    let request = Request::Shard { shard, request: scan };
    let asked = tokio::spawn(async move { transport.call(&peer, request, Instant::now() + PATIENCE).await });
    drill.until_held(server, FaultPoint::DiskRead).await;
    drill.drain(node).await;
    drill.until_placed().await;
    until_tidy(&drill).await;
    drill.release(server).await;
    let answer = in_time(asked).await.expect("no panic");
    assert!(matches!(answer, Ok(Response::Rejected(Reject::NotLeader { .. }))), "{answer:?}");
    drill.end().await;
}

/// The coordinators take somebody's word for the end of a move that has not ended: a node erases its replica
/// though it has a vote, and one without a vote is counted on. The leader sees that and mends it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_that_is_not_what_the_map_says_is_mended() {
    let folder = tempfile::tempdir().expect("a folder");
    let shape = Shape { coordinators: 1, nodes: 4, replicas: 3, shards: 1 };
    let mut drill = Drill::start(folder.path(), shape).await;
    drill.until_shared().await;
    let map = drill.client.map();
    let (shard, replicas) = (ShardId(0), map.replicas_of(ShardId(0)).to_vec());
    let leader = map.preferred_leaders()[0];
    let others: Vec<NodeId> = replicas.iter().copied().filter(|node| *node != leader).collect();
    let (leaving, staying) = (others[0].0, others[1].0);
    let leader = Server::Participant(leader.0);
    let turned_to = async |drill: &Drill, wanted: &[NodeId]| {
        eventually("the shard is on its way there", async || {
            let map = drill.operator.status().await.map;
            map.move_of(shard).is_some_and(|step| wanted.iter().all(|node| step.to.contains(node)))
        })
        .await;
    };

    // The voters are others now, and the map is about to say so, when all turns around.
    drill.hold_at(leader, FaultPoint::BeforeMoved, 0).await;
    drill.drain(leaving).await;
    drill.until_held(leader, FaultPoint::BeforeMoved).await;
    drill.hold_at(leader, FaultPoint::BeforeChange, 0).await;
    drill.admit(leaving).await;
    turned_to(&drill, &replicas).await;
    drill.until_held(leader, FaultPoint::BeforeChange).await;

    // Somebody who has missed all that says that all replicas are where they should be.
    let files = drill.cluster.layout().credentials("participant-1");
    let coordinators = map.coordinators.iter().map(|node| node.address.clone()).collect::<Vec<String>>();
    let config = ClientConfig::new(coordinators, files.load().expect("credentials"));
    let liar = in_time(Client::connect(config)).await.expect("it is let in");
    let moved =
        coordinator::Request::Moved { shard, voters: replicas.clone(), formed: LogId { term: 1, index: 0 } };
    let peer = drill.peer(Server::Coordinator(1));
    let deadline = Instant::now() + PATIENCE;
    let noted = liar.transport().call(&peer, Request::Coordinator(moved), deadline).await;
    assert!(matches!(noted, Ok(Response::Coordinator(coordinator::Response::Noted))), "{noted:?}");
    liar.close().await;
    eventually("nothing moves", async || drill.operator.status().await.map.moves.is_empty()).await;
    // Only what the leader does when nothing moves can help now.
    eventually("the leader has heard that", async || {
        let map = drill.operator.map();
        let told = drill.operator.participant(&drill.peer(leader)).await;
        map.moves.is_empty() && told.is_ok_and(|told| told.map_epoch >= map.epoch)
    })
    .await;
    drill.release(leader).await;

    eventually("the group is formed again", async || {
        let formed = drill.operator.status().await.map.formed[0];
        formed.is_some_and(|formed| formed.index > 0)
    })
    .await;
    // So one that stays is not needed, and the one that erased its replica is not missed.
    drill.process(Server::Participant(staying)).kill().expect("it runs");
    let write = drill.client.transact(async |tx| tx.put("key", "value"));
    in_time(write).await.expect("a majority is there");
    drill.end().await;
}

/// A node joins; the first shard that moves to it stops in the middle, and something happens. Whatever
/// it is, the move ends. The strike gets the node that sends, and says what is to be done afterwards.
async fn in_the_middle_of_a_move(
    point: FaultPoint,
    skip: u32,
    strike: impl AsyncFnOnce(&mut Drill, Server) -> Vec<Server>,
) {
    let folder = tempfile::tempdir().expect("a folder");
    let mut drill = Drill::start_with(folder.path(), THREE, async |cluster: &mut Processes| {
        for process in &cluster.participants {
            configure(process, "", "[moves]\nbytes_per_second = 1048576");
        }
    })
    .await;
    load_ballast(&drill).await;
    drill.until_shared().await;
    let witness = Witness::start(&drill, 4).await;
    witness.until_it_goes_on().await;
    let sources: Vec<Server> = (1..=3).map(Server::Participant).collect();
    for source in &sources {
        drill.hold_at(*source, point, skip).await;
    }
    drill.join().await;
    let held = until_one_is_held(&drill, &sources, point).await;
    let killed = strike(&mut drill, held).await;
    for source in sources.iter().filter(|source| !killed.contains(source)) {
        drill.release(*source).await;
    }
    witness.until_it_goes_on().await;
    for server in killed {
        drill.process(server).start().expect("it starts again");
    }
    let placed = drill.until_placed().await;
    assert!(held_by(&placed, 4) > 0);
    until_tidy(&drill).await;
    witness.testify(&drill).await;
    check_ballast(&drill).await;
    drill.end().await;
}

/// Waits until the signs of life tell this of a shard on its way.
async fn until_moving(drill: &Drill, is: impl Fn(&Moving) -> bool) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let overview = in_time(drill.operator.overview()).await;
        let shards =
            overview.iter().flat_map(|overview| &overview.nodes).flat_map(|view| &view.report.shards);
        let seen: Vec<Moving> = shards.filter_map(|shard| shard.moving).collect();
        if seen.iter().any(&is) {
            return;
        }
        assert!(Instant::now() < deadline, "the progress is not shown: {seen:?}");
        sleep(Duration::from_millis(50)).await;
    }
}

async fn until_one_is_held(drill: &Drill, servers: &[Server], point: FaultPoint) -> Server {
    let deadline = Instant::now() + PATIENCE;
    loop {
        for server in servers {
            if drill.is_held(*server, point).await {
                return *server;
            }
        }
        assert!(Instant::now() < deadline, "nobody comes to {point}");
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_newcomer_is_killed_in_the_middle_of_a_move_and_the_rest_is_sent_when_it_is_back() {
    in_the_middle_of_a_move(FaultPoint::SnapshotParts, 4, async |drill, source| {
        let newcomer = Server::Participant(4);
        drill.process(newcomer).kill().expect("it runs");
        drill.release(source).await;
        drill.process(newcomer).start().expect("it starts again");
        // What had arrived is not sent again.
        until_moving(drill, |moving| moving.known > 300_000).await;
        Vec::new()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_sends_is_killed_in_the_middle_of_a_move() {
    in_the_middle_of_a_move(FaultPoint::SnapshotParts, 4, async |drill, source| {
        drill.process(source).kill().expect("it runs");
        vec![source]
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_coordinators_leader_is_killed_in_the_middle_of_a_move() {
    in_the_middle_of_a_move(FaultPoint::SnapshotParts, 4, async |drill, _| {
        let leader = drill.leading_coordinator().await;
        drill.process(leader).kill().expect("it runs");
        vec![leader]
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_is_killed_before_it_changes_the_voters() {
    in_the_middle_of_a_move(FaultPoint::BeforeChange, 0, async |drill, source| {
        drill.process(source).kill().expect("it runs");
        vec![source]
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_is_killed_before_it_tells_that_a_shard_has_moved() {
    in_the_middle_of_a_move(FaultPoint::BeforeMoved, 0, async |drill, source| {
        drill.process(source).kill().expect("it runs");
        vec![source]
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everybody_is_killed_in_the_middle_of_a_move() {
    in_the_middle_of_a_move(FaultPoint::SnapshotParts, 4, async |drill, _| {
        drill.cluster.kill_all().expect("they run");
        drill.cluster.start().expect("all start again");
        Vec::new()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_sends_and_who_receives_are_cut_off_from_each_other_and_healed() {
    let folder = tempfile::tempdir().expect("a folder");
    let network = Network::new();
    let mut addresses: Vec<SocketAddr> = Vec::new();
    let mut drill = Drill::start_with(folder.path(), THREE, async |cluster: &mut Processes| {
        for process in &cluster.participants {
            addresses.push(behind_a_proxy(&network, process).await);
        }
    })
    .await;
    load_ballast(&drill).await;
    drill.until_shared().await;
    let witness = Witness::start(&drill, 4).await;
    let sources: Vec<Server> = (1..=3).map(Server::Participant).collect();
    for source in &sources {
        drill.hold_at(*source, FaultPoint::SnapshotParts, 4).await;
    }
    let newcomer = drill.cluster.add_participant().expect("laid out");
    addresses.push(behind_a_proxy(&network, newcomer).await);
    newcomer.start().expect("started");
    drill.admit(4).await;
    let Server::Participant(source) = until_one_is_held(&drill, &sources, FaultPoint::SnapshotParts).await
    else {
        unreachable!("only participants send shards")
    };
    let cut = network.links().cut(addresses[source as usize - 1], addresses[3]);
    for source in &sources {
        drill.release(*source).await;
    }
    eventually("their connections have died, and new ones are not made", async || {
        network.links().traffic().refused > 0
    })
    .await;
    witness.until_it_goes_on().await;
    let overview = in_time(drill.operator.overview()).await.expect("a coordinator leads");
    assert!(!overview.map.moves.is_empty(), "what is cut off cannot arrive");
    drop(cut);
    let placed = drill.until_placed().await;
    assert!(held_by(&placed, 4) > 0);
    until_tidy(&drill).await;
    witness.testify(&drill).await;
    check_ballast(&drill).await;
    drill.end().await;
}

/// Puts a proxy in front of a participant that is not started yet: others find it there.
async fn behind_a_proxy(network: &Network, process: &Process) -> SocketAddr {
    let text = fs::read_to_string(process.config()).expect("a configuration");
    let listen = text.lines().find_map(|line| line.strip_prefix("listen = ")).expect("it listens");
    let listen: SocketAddr = listen.trim_matches('"').parse().expect("an address");
    let front = network.serve(listen).await;
    configure(process, &format!("advertise = \"{front}\""), "");
    listen
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_stays_dead_is_replaced_and_gets_its_share_again_when_it_is_back() {
    let folder = tempfile::tempdir().expect("a folder");
    let shape = Shape { nodes: 4, ..THREE };
    let mut drill = Drill::start_with(folder.path(), shape, async |cluster: &mut Processes| {
        for process in &cluster.coordinators {
            configure(process, "", "[placement]\nreplace_after_s = 5");
        }
    })
    .await;
    let witness = Witness::start(&drill, 4).await;
    let whole = drill.until_placed().await;
    assert!(held_by(&whole, 2) > 0);
    let dead = Server::Participant(2);
    drill.process(dead).kill().expect("it runs");
    eventually("others have taken its place", async || {
        drill.operator.overview().await.is_ok_and(|overview| {
            held_by(&overview, 2) == 0 && overview.map.placement.iter().all(|replicas| replicas.len() == 3)
        })
    })
    .await;
    witness.until_it_goes_on().await;
    drill.process(dead).start().expect("it starts again");
    eventually("it has its share again", async || {
        let overview = drill.operator.overview().await;
        overview.is_ok_and(|overview| overview.map.placement == whole.map.placement)
    })
    .await;
    until_tidy(&drill).await;
    witness.testify(&drill).await;
    drill.end().await;
}

/// One replica of each shard: whoever leads must hand the shard over to somebody who has no vote yet.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn promises_and_outcomes_travel_with_a_shard_that_has_one_replica() {
    let folder = tempfile::tempdir().expect("a folder");
    let shape = Shape { coordinators: 1, nodes: 2, replicas: 1, shards: 4 };
    let mut drill = Drill::start(folder.path(), shape).await;
    let keys = drill.two_keys("promise").await;

    // One shard, one phase: its outcome is known to the shard only.
    let alone = in_time(drill.client.begin()).await.expect("begins");
    let settled = alone.id();
    alone.put(&keys[0].0, "before").expect("small");
    assert!(matches!(in_time(alone.commit()).await, Ok(Commit::Committed { .. })));
    let outcome = in_time(drill.client.outcome(settled)).await.expect("it is known");

    // Two shards: both have promised, and one vote is not counted yet.
    drill.join().await;
    drill.until_placed().await;
    let leader = drill.leading_coordinator().await;
    drill.hold_at(leader, FaultPoint::VoteReceived, 0).await;
    let tx = in_time(drill.client.begin()).await.expect("begins");
    let promised = tx.id();
    for (key, _) in &keys {
        tx.put(key, "after").expect("small");
    }
    let commit = tokio::spawn(tx.commit());
    let promises = async || {
        let records = drill.operator.in_doubt().await.unwrap_or_default();
        records.iter().filter(|record| record.txn == promised).count()
    };
    eventually("both shards have promised", async || promises().await == 2).await;
    drill.until_held(leader, FaultPoint::VoteReceived).await;
    for node in [1, 2] {
        drill.drain(node).await;
    }
    let placed = drill.until_placed().await;
    assert_eq!(held_by(&placed, 3), 4, "all is at the newcomer now");
    assert_eq!(promises().await, 2, "and so are the promises");
    drill.release(leader).await;
    let committed = in_time(commit).await.expect("no panic");
    assert!(matches!(committed, Ok(Commit::Committed { .. })), "{committed:?}");
    let snapshot = in_time(drill.client.snapshot()).await.expect("a snapshot");
    for (key, _) in &keys {
        assert_eq!(in_time(snapshot.get(key)).await.expect("readable").as_deref(), Some(&b"after"[..]));
    }
    assert_eq!(in_time(drill.client.outcome(settled)).await.expect("it is known"), outcome);
    drill.until_nothing_is_held().await;
    drill.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn progress_is_shown_and_a_throttle_is_kept() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut drill = Drill::start_with(folder.path(), THREE, async |cluster: &mut Processes| {
        for process in &cluster.participants {
            configure(process, "", "[moves]\nbytes_per_second = 1048576");
        }
    })
    .await;
    load_ballast(&drill).await;
    let sources: Vec<Server> = (1..=3).map(Server::Participant).collect();
    for source in &sources {
        drill.hold_at(*source, FaultPoint::SnapshotParts, 4).await;
    }
    let began = Instant::now();
    drill.join().await;
    until_one_is_held(&drill, &sources, FaultPoint::SnapshotParts).await;
    until_moving(&drill, |moving| moving.stage == MoveStage::Copying && moving.sent > 1_000_000).await;
    for source in &sources {
        drill.release(*source).await;
    }
    let placed = drill.until_placed().await;
    // Two megabytes may pass at once; the rest takes its time. Three nodes send, each by itself.
    let least = placed.moved_bytes.saturating_sub(3 * (2 << 20)) / 3 / (1 << 20);
    assert!(
        began.elapsed() >= Duration::from_secs(least),
        "{:?} for {}",
        began.elapsed(),
        placed.moved_bytes
    );
    let home = |number: usize| Key::copy_from(format!("ballast/{number}").as_bytes()).shard(THREE.shards);
    let moved = (0..BALLAST_KEYS).filter(|number| placed.map.replicas_of(home(*number)).contains(&NodeId(4)));
    assert!(placed.moved_bytes >= (moved.count() * BALLAST_BYTES) as u64, "all of it was sent");
    check_ballast(&drill).await;
    drill.end().await;
}
