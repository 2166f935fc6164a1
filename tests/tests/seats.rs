//! Coordinators come and go under load: from one to three to five and back, one that has lost its folder, the leader
//! itself. Nothing that was acknowledged is lost, and transactions go on.

use std::fs;
use std::time::Duration;

use rand::seq::IndexedRandom;
use troth_protocol::{MemberState, NodeId};
use troth_sdk::Client;
use troth_sdk::harness::processes::Shape;
use troth_sdk::operator::{CoordinatorChange, Operator};
use troth_tests::drill::{Drill, Server};
use troth_tests::ledger::{Findings, Writers};
use troth_tests::{PATIENCE, eventually, in_time};

const ONE: Shape = Shape { coordinators: 1, nodes: 3, replicas: 3, shards: 6 };
const CLIENTS: usize = 8;

/// How many transactions are acknowledged between two changes.
const BETWEEN: usize = 40;

/// A cluster whose coordinators change, and clients that write meanwhile.
struct Scene {
    drill: Drill,
    writers: Writers,
    changes: usize,
}

impl Scene {
    fn operator(&self) -> Operator {
        self.drill.operator.clone()
    }

    async fn voters(&self) -> Vec<u64> {
        let members = self.operator().members().await.unwrap_or_default();
        let settled = members.iter().all(|member| member.state == MemberState::Voting);
        if settled { members.iter().map(|member| member.id.0).collect() } else { Vec::new() }
    }

    /// Makes a change, waits until it is done, and until transactions have gone on after it.
    async fn change(&mut self, what: &str, change: CoordinatorChange, start: &[u64], voters: &[u64]) {
        let operator = self.operator();
        self.writers.take_pause();
        eventually("the leader takes it", async || {
            operator.change_coordinators(change.clone()).await.is_ok()
        })
        .await;
        if let CoordinatorChange::Replace { id, .. } = &change {
            let joins = async || {
                let members = operator.members().await.unwrap_or_default();
                members.iter().any(|member| member.id == *id && member.state == MemberState::Joining)
            };
            eventually("it has lost its vote", joins).await;
        }
        for id in start {
            self.process(*id).start().expect("started");
        }
        eventually("it is done", async || self.voters().await == voters).await;
        let before = self.writers.count();
        eventually("transactions go on", async || self.writers.count() >= before + BETWEEN).await;
        self.changes += 1;
        println!("{what}: the longest pause was {:?}", self.writers.take_pause());
    }

    fn process(&mut self, id: u64) -> &mut troth_sdk::harness::processes::Process {
        self.drill.process(Server::Coordinator(id))
    }

    /// Lets coordinators in whose folders are empty.
    async fn add(&mut self, ids: &[u64], voters: &[u64]) {
        for id in ids {
            while self.drill.cluster.coordinators.len() < *id as usize {
                self.drill.cluster.add_coordinator().expect("laid out");
            }
            self.empty(*id);
            self.configure_to_join(*id);
        }
        let address = |id: &u64| (NodeId(*id), self.drill.cluster.addresses()[*id as usize - 1].clone());
        let change = CoordinatorChange::Add { members: ids.iter().map(address).collect() };
        self.change(&format!("add {ids:?}"), change, ids, voters).await;
    }

    /// Its configuration says where all others are, and no more that it founds a cluster.
    fn configure_to_join(&mut self, id: u64) {
        let addresses = self.drill.cluster.addresses().to_vec();
        let config = self.process(id).config().to_owned();
        let text = fs::read_to_string(&config).expect("readable");
        let kept =
            text.lines().filter(|line| !line.starts_with("founding") && !line.starts_with("coordinators"));
        let text: Vec<&str> = kept.collect();
        fs::write(config, format!("coordinators = {addresses:?}\n{}\n", text.join("\n"))).expect("writable");
    }

    /// Sends coordinators away, and waits until they have ended by themselves.
    async fn remove(&mut self, ids: &[u64], voters: &[u64]) {
        let change = CoordinatorChange::Remove { ids: ids.iter().copied().map(NodeId).collect() };
        self.change(&format!("remove {ids:?}"), change, &[], voters).await;
        for id in ids {
            let process = self.process(*id);
            eventually("it ends by itself", async || process.ended().expect("it was started").is_some())
                .await;
            let words = process.last_words().expect("it has a log");
            assert!(words.contains(&format!("coordinator {id} was removed")), "{words}");
        }
    }

    /// A coordinator loses its folder, and gets its place back with an empty one.
    async fn lose_and_replace(&mut self, id: u64, voters: &[u64]) {
        self.process(id).kill().expect("it runs");
        self.empty(id);
        let change = CoordinatorChange::Replace { id: NodeId(id), address: None };
        self.change(&format!("replace {id}"), change, &[id], voters).await;
    }

    fn empty(&self, id: u64) {
        let data = self.drill.cluster.layout().folder().join(format!("data/coordinator-{id}"));
        if data.exists() {
            fs::remove_dir_all(data).expect("removed");
        }
    }

    async fn leader(&self) -> u64 {
        match self.drill.leading_coordinator().await {
            Server::Coordinator(id) => id,
            Server::Participant(id) => unreachable!("participant {id} is no coordinator"),
        }
    }
}

fn without(all: &[u64], gone: &[u64]) -> Vec<u64> {
    all.iter().copied().filter(|id| !gone.contains(id)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn coordinators_come_and_go_and_nothing_is_lost() {
    let rounds: usize =
        std::env::var("TROTH_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(1);
    let folder = tempfile::tempdir().expect("a folder");
    let drill = Drill::start(folder.path(), ONE).await;
    let mut config = drill.cluster.client_config().expect("certificates");
    config.timeout = Duration::from_secs(10);
    let client = in_time(Client::connect(config)).await.expect("the cluster is there");
    let writers = Writers::start(&client, CLIENTS);
    let mut scene = Scene { drill, writers, changes: 0 };

    scene.add(&[2, 3], &[1, 2, 3]).await;
    for _ in 0..rounds {
        let three = scene.voters().await;
        let others = without(&[1, 2, 3, 4, 5], &three);
        scene.add(&others, &[1, 2, 3, 4, 5]).await;
        // The leader, and then another one.
        let leader = scene.leader().await;
        let four = without(&[1, 2, 3, 4, 5], &[leader]);
        scene.remove(&[leader], &four).await;
        let heir = scene.leader().await;
        let idle = without(&four, &[heir]);
        let gone = *idle.choose(&mut rand::rng()).expect("there are three");
        let three = without(&four, &[gone]);
        scene.remove(&[gone], &three).await;
        let heir = scene.leader().await;
        let lost = *without(&three, &[heir]).choose(&mut rand::rng()).expect("there are two");
        scene.lose_and_replace(lost, &three).await;
    }
    let ledger = scene.writers.stop().await;
    println!(
        "{} changes, {} acknowledged, {} failed",
        scene.changes,
        ledger.acknowledged.len(),
        ledger.failed
    );
    scene.drill.until_served().await;
    let mut config = scene.drill.cluster.client_config().expect("certificates");
    config.timeout = PATIENCE;
    let reader = in_time(Client::connect(config)).await.expect("the cluster is there");
    assert_eq!(ledger.audit(&reader).await, Findings::default());
    reader.close().await;
    client.close().await;
    scene.drill.end().await;
}
