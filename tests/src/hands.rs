//! A cluster in the hands of an operator whose slips it must survive: lists that are edited, folders that are emptied,
//! copied or put back.

use std::fs;
use std::path::{Path, PathBuf};

use troth_protocol::mutation::Bug;
use troth_sdk::harness::processes::{Process, Processes, Shape, free_ports};
use troth_sdk::operator::{CoordinatorChange, FaultPoint, Operator};
use troth_sdk::{Client, Role};

use crate::drill::{Drill, Server};
use crate::ledger::{Findings, Ledger, TIMEOUT, Writers};
use crate::{PATIENCE, eventually, in_time};

/// The environment variable by which a process has a deliberate bug.
const BUG: &str = "TROTH_MUTATION";

/// Clients that write meanwhile.
pub const CLIENTS: usize = 8;

/// Enough transactions that something must be lost if a folder forgets.
pub const MANY: usize = 60;

/// One coordinator, and one replica of each shard.
pub const ONE: Shape = Shape { coordinators: 1, nodes: 3, replicas: 1, shards: 8 };
/// Three coordinators, and one replica of each shard.
pub const THREE: Shape = Shape { coordinators: 3, nodes: 3, replicas: 1, shards: 8 };
/// One coordinator, and three replicas of each shard.
pub const REPLICATED: Shape = Shape { coordinators: 1, nodes: 3, replicas: 3, shards: 4 };

/// A client that does not wait for long.
pub async fn hasty(cluster: &Processes) -> Client {
    let mut config = cluster.client_config().expect("certificates");
    config.timeout = PATIENCE;
    let client = in_time(Client::connect(config.clone())).await.expect("the cluster is there");
    client.close().await;
    config.timeout = TIMEOUT;
    in_time(Client::connect(config)).await.expect("the cluster is there")
}

/// Lets clients write until so many more are acknowledged.
pub async fn until_more(writers: &Writers, more: usize) {
    let before = writers.count();
    eventually("transactions are acknowledged", async || writers.count() >= before + more).await;
}

/// Waits until a process has ended by itself, and returns its last words.
pub async fn until_refused(process: &mut Process) -> String {
    let mut status = None;
    eventually("it ends by itself", async || {
        status = process.ended().expect("it was started");
        status.is_some()
    })
    .await;
    assert_eq!(status.and_then(|status| status.code()), Some(1), "{}", process.name);
    process.last_words().expect("it has a log")
}

/// Copies the files of a data folder.
pub fn copy_folder(from: &Path, to: &Path) {
    let _ = fs::remove_dir_all(to);
    fs::create_dir_all(to).expect("writable");
    for entry in fs::read_dir(from).expect("a folder") {
        let path = entry.expect("an entry").path();
        // A table may go while it is copied, as it would with any tool; RocksDB would not open the copy then.
        fs::copy(&path, to.join(path.file_name().expect("a name"))).expect("copied");
    }
}

/// Stops a server as an operator does.
pub fn stop(process: &mut Process) {
    assert!(process.stop(PATIENCE).expect("it stops").success(), "{}", process.name);
}

impl Scene {
    /// A data folder.
    pub fn data(&self, name: &str) -> PathBuf {
        self.drill.cluster.layout().folder().join("data").join(name)
    }

    /// A cluster of such a shape.
    pub async fn start(shape: Shape) -> Scene {
        Scene::start_with(shape, None).await
    }

    /// The same, whose servers have a deliberate bug.
    pub async fn start_with(shape: Shape, bug: Option<Bug>) -> Scene {
        let folder = tempfile::tempdir().expect("a folder");
        let infected = async |cluster: &mut Processes| {
            for process in cluster.all_mut() {
                if let Some(bug) = bug {
                    process.set_env(BUG, bug.name());
                }
            }
        };
        let drill = Drill::start_with(folder.path(), shape, infected).await;
        Scene { drill, _folder: folder }
    }

    /// A coordinator, by its number from 1.
    pub fn coordinator(&mut self, id: usize) -> &mut Process {
        &mut self.drill.cluster.coordinators[id - 1]
    }

    /// A participant, by its number from 1.
    pub fn participant(&mut self, id: usize) -> &mut Process {
        &mut self.drill.cluster.participants[id - 1]
    }

    /// Everything is served, and nothing that was acknowledged is missing.
    pub async fn nothing_is_lost(&self, ledgers: &[&Ledger]) {
        self.drill.until_served().await;
        let client = hasty(&self.drill.cluster).await;
        for ledger in ledgers {
            assert!(
                ledger.acknowledged.len() >= MANY,
                "{} acknowledged: this shows nothing",
                ledger.acknowledged.len()
            );
            assert_eq!(ledger.audit(&client).await, Findings::default());
        }
        client.close().await;
    }

    /// A load until so many were acknowledged.
    pub async fn load(&self, many: usize) -> Ledger {
        let client = hasty(&self.drill.cluster).await;
        let writers = Writers::start(&client, CLIENTS);
        until_more(&writers, many).await;
        let ledger = writers.stop().await;
        client.close().await;
        ledger
    }

    /// Writes another configuration of a server beside its own: elsewhere, and with another folder.
    pub fn configure_copy(&mut self, role: Role, id: usize, name: &str) -> Process {
        let process = if role == Role::Coordinator { self.coordinator(id) } else { self.participant(id) };
        let (text, own) =
            (fs::read_to_string(process.config()).expect("readable"), format!("data/{role}-{id}\""));
        let port = free_ports(1).expect("a free port")[0];
        let lines = text.lines().map(|line| match line {
            line if line.starts_with("listen") => format!("listen = \"127.0.0.1:{port}\""),
            line => line.replace(&own, &format!("data/{name}\"")),
        });
        let text: Vec<String> = lines.collect();
        let folder = self.drill.cluster.layout().folder().to_owned();
        fs::write(folder.join(format!("{name}.toml")), text.join("\n")).expect("writable");
        self.drill.cluster.beside(role, name).expect("the program is there")
    }
}

/// A cluster in the hands of an operator.
pub struct Scene {
    /// The cluster.
    pub drill: Drill,
    _folder: tempfile::TempDir,
}

/// Asks for a change of the coordinators, as soon as somebody leads.
pub async fn change(operator: &Operator, change: CoordinatorChange) {
    eventually("the leader takes it", async || operator.change_coordinators(change.clone()).await.is_ok())
        .await;
}

/// The coordinators, and where each stands.
pub async fn members(operator: &Operator) -> Vec<(u64, &'static str)> {
    let members = operator.members().await.unwrap_or_default();
    members.iter().map(|member| (member.id.0, member.state.name())).collect()
}

/// A participant is started from an older copy of its folder, and whatever comes of that, its data is audited. `None`:
/// it was refused.
pub async fn older_copy(bug: Option<Bug>) -> Option<Findings> {
    let mut scene = Scene::start_with(ONE, bug).await;
    let (data, older) = (scene.data("participant-1"), scene.data("older"));
    stop(scene.participant(1));
    copy_folder(&data, &older);
    scene.participant(1).start().expect("started");
    let ledger = scene.load(MANY).await;
    stop(scene.participant(1));
    fs::remove_dir_all(&data).expect("removed");
    fs::rename(&older, &data).expect("moved");
    scene.participant(1).start().expect("started");
    scene.audit_unless_refused(Server::Participant(1), &ledger).await
}

/// Of three coordinators one is away, two die, and one of these comes back with an empty folder, beside the one that was
/// away. Whatever comes of that, the data is audited. `None`: the emptied one was refused.
pub async fn emptied_coordinator(bug: Option<Bug>) -> Option<Findings> {
    let mut scene = Scene::start_with(THREE, bug).await;
    let Server::Coordinator(leader) = scene.drill.leading_coordinator().await else { return None };
    let leader = leader as usize;
    let (emptied, away) = (leader % 3 + 1, (leader + 1) % 3 + 1);
    stop(scene.coordinator(away));
    let client = hasty(&scene.drill.cluster).await;
    let writers = Writers::start(&client, CLIENTS);
    until_more(&writers, MANY).await;
    // What is decided from here on no participant hears of.
    let server = Server::Coordinator(leader as u64);
    scene.drill.hold_all_at(server, FaultPoint::BeforeFinish).await;
    scene.drill.until_held(server, FaultPoint::BeforeFinish).await;
    scene.coordinator(leader).kill().expect("it runs");
    scene.coordinator(emptied).kill().expect("it runs");
    let ledger = writers.stop().await;
    client.close().await;
    fs::remove_dir_all(scene.data(&format!("coordinator-{emptied}"))).expect("removed");
    scene.coordinator(emptied).start().expect("started");
    scene.coordinator(away).start().expect("started");
    scene.audit_unless_refused(Server::Coordinator(emptied as u64), &ledger).await
}

impl Scene {
    /// Waits until a server has ended, or everything is served again, and then looks for what was acknowledged.
    async fn audit_unless_refused(mut self, server: Server, ledger: &Ledger) -> Option<Findings> {
        let mut refused = false;
        eventually("it is refused or serves", async || {
            let ended = self.drill.process(server).ended();
            refused |= ended.map_or(true, |ended| ended.is_some());
            let status = self.drill.operator.status().await;
            let shards = usize::from(self.drill.client.map().shards);
            refused || status.leader().is_some() && status.serving().len() == shards
        })
        .await;
        if refused {
            return None;
        }
        // What is in doubt is settled before anybody can see it.
        self.drill.until_nothing_is_held().await;
        let client = hasty(&self.drill.cluster).await;
        let findings = ledger.audit(&client).await;
        client.close().await;
        Some(findings)
    }
}
