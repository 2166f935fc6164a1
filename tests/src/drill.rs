//! Bringing a cluster to an exact instant, and seeing what becomes of it.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use troth_protocol::NodeId;
use troth_sdk::harness::moving::{change_node, until_placed};
use troth_sdk::harness::processes::{Process, Processes, Shape};
use troth_sdk::harness::until_settled;
use troth_sdk::operator::{
    Fault, FaultAction, FaultPoint, FaultStatus, NodeChange, Operator, OperatorError, Overview, Peer,
};
use troth_sdk::{Client, Key};

use crate::{PATIENCE, connect, eventually, logging, programs, until_nothing_is_held};

/// Three coordinators, three participants, three replicas.
pub const THREE: Shape = Shape { coordinators: 3, nodes: 3, replicas: 3, shards: 6 };

/// A server, by its number from 1.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Server {
    /// A coordinator.
    Coordinator(u64),
    /// A participant.
    Participant(u64),
}

impl Server {
    /// Its process.
    pub fn process(self, cluster: &mut Processes) -> &mut Process {
        match self {
            Server::Coordinator(id) => &mut cluster.coordinators[id as usize - 1],
            Server::Participant(id) => &mut cluster.participants[id as usize - 1],
        }
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Server::Coordinator(id) => write!(f, "coordinator-{id}"),
            Server::Participant(id) => write!(f, "participant-{id}"),
        }
    }
}

/// A cluster of real processes, with an application and an operator.
pub struct Drill {
    /// The processes.
    pub cluster: Processes,
    /// The application.
    pub client: Client,
    /// The operator.
    pub operator: Operator,
}

impl Drill {
    /// Starts a cluster in a folder, and waits until every shard has a leader.
    pub async fn start(folder: &Path, shape: Shape) -> Drill {
        Drill::start_with(folder, shape, async |_| {}).await
    }

    /// The same, after the files of the cluster were changed.
    pub async fn start_with(folder: &Path, shape: Shape, change: impl AsyncFnOnce(&mut Processes)) -> Drill {
        logging();
        let mut cluster = Processes::create(folder, programs(), shape).expect("laid out");
        change(&mut cluster).await;
        cluster.start().expect("started");
        let client = connect(&cluster).await;
        let operator = cluster.operator().expect("certificates");
        let drill = Drill { cluster, client, operator };
        drill.until_served().await;
        drill
    }

    /// Starts one more participant, waits until the coordinators know it, and puts it on the ring.
    pub async fn join(&mut self) -> Server {
        let process = self.cluster.add_participant().expect("laid out");
        process.start().expect("started");
        let id = self.cluster.participants.len() as u64;
        self.admit(id).await;
        Server::Participant(id)
    }

    /// Puts a participant on the ring, as soon as it has made itself known.
    pub async fn admit(&self, id: u64) {
        self.change(id, NodeChange::Admit { weight: None, zone: None }).await;
    }

    /// Lets a participant hand over all that it holds.
    pub async fn drain(&self, id: u64) {
        self.change(id, NodeChange::Drain).await;
    }

    async fn change(&self, id: u64, change: NodeChange) {
        change_node(&self.operator, NodeId(id), change, PATIENCE).await.expect("it is done");
    }

    /// Waits until no shard is on its way, and all are where they should be.
    pub async fn until_placed(&self) -> Overview {
        until_placed(&self.operator, PATIENCE).await.expect("all moves end")
    }

    /// Waits until every shard is served.
    pub async fn until_served(&self) {
        eventually("every shard is served", async || {
            self.operator.status().await.serving().len() == usize::from(self.client.map().shards)
        })
        .await;
    }

    /// Where a server listens.
    pub fn peer(&self, server: Server) -> Peer {
        let map = self.operator.map();
        let address = |nodes: &[troth_protocol::Node], id: u64| {
            let node = nodes.iter().find(|node| node.id == NodeId(id));
            node.expect("it is in the map").address.clone()
        };
        match server {
            Server::Coordinator(id) => Peer::coordinator(&address(&map.coordinators, id)),
            Server::Participant(id) => Peer::participant(&address(&map.nodes, id)),
        }
    }

    /// The process of a server.
    pub fn process(&mut self, server: Server) -> &mut Process {
        server.process(&mut self.cluster)
    }

    /// The coordinator that leads, once one does; the newest, if an older one has not noticed yet.
    pub async fn leading_coordinator(&self) -> Server {
        let mut leader = None;
        eventually("a coordinator leads", async || {
            leader = self.operator.status().await.leader();
            leader.is_some()
        })
        .await;
        Server::Coordinator(leader.expect("found just now").0)
    }

    /// Arms a fault point: whoever comes to it is held there, after it was passed `skip` times, until
    /// released.
    pub async fn hold_at(&self, server: Server, point: FaultPoint, skip: u32) {
        self.arm(server, point, FaultAction::Hold { millis: 60_000 }, skip).await;
    }

    /// The same for everybody who comes to it.
    pub async fn hold_all_at(&self, server: Server, point: FaultPoint) {
        self.arm(server, point, FaultAction::HoldAll { millis: 60_000 }, 0).await;
    }

    /// Holds one at once and for so long.
    pub async fn hold_for(&self, server: Server, point: FaultPoint, time: Duration) {
        self.arm(server, point, FaultAction::Hold { millis: time.as_millis() as u32 }, 0).await;
    }

    async fn arm(&self, server: Server, point: FaultPoint, action: FaultAction, skip: u32) {
        let armed = self.fault(server, Fault::Arm { point, action, skip }).await;
        assert!(armed.expect("it answers").iter().any(|status| status.point == point), "{point} is armed");
    }

    /// Waits until somebody has come to an armed fault point.
    pub async fn until_held(&self, server: Server, point: FaultPoint) {
        eventually(point.name(), async || self.is_held(server, point).await).await;
    }

    /// Whether somebody has come to an armed fault point of a server, and it still answers.
    pub async fn is_held(&self, server: Server, point: FaultPoint) -> bool {
        let status = self.fault(server, Fault::List).await.unwrap_or_default();
        status.iter().any(|status| status.point == point && status.fired)
    }

    /// Lets everybody go on who is held in a server.
    pub async fn release(&self, server: Server) {
        self.fault(server, Fault::Disarm).await;
    }

    async fn fault(&self, server: Server, fault: Fault) -> Option<Vec<FaultStatus>> {
        match self.operator.fault(&self.peer(server), fault).await {
            Ok(faults) => Some(faults),
            Err(OperatorError::Call(_)) => None,
            Err(error) => panic!("{server:?}: {error}"),
        }
    }

    /// Waits until every shard is served by the node that should lead it.
    pub async fn until_shared(&self) {
        until_settled(&self.operator, PATIENCE).await.expect("every shard is led from where it should be");
    }

    /// Two keys on two shards that different participants serve, and these.
    pub async fn two_keys(&self, tag: &str) -> [(String, Server); 2] {
        self.until_shared().await;
        let map = self.client.map();
        let preferred = map.preferred_leaders();
        let home = |number: u32| {
            let key = format!("{tag}/{number}");
            let shard = Key::copy_from(key.as_bytes()).shard(map.shards);
            (key, Server::Participant(preferred[usize::from(shard.0)].0))
        };
        let first = home(0);
        let second = (1..).map(home).find(|(_, server)| *server != first.1).expect("two nodes lead");
        [first, second]
    }

    /// Waits until no transaction is prepared anywhere and no lock is held.
    pub async fn until_nothing_is_held(&self) {
        until_nothing_is_held(&self.operator).await;
    }

    /// Says goodbye; the processes end with the cluster.
    pub async fn end(self) {
        self.client.close().await;
        self.operator.close().await;
    }
}
