//! The machines of a cluster, and what runs on them.

use std::collections::BTreeMap;
use std::fmt;
use std::future::pending;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use tokio::task::JoinSet;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use troth_coordinator::config::PeerSection;
use troth_protocol::FoundingId;
use troth_protocol::clock::Clock;
use troth_protocol::net::BoxFuture;
use troth_protocol::net::tls::{CERTIFICATE_VALIDITY, Credentials};
use troth_protocol::process::Basics;
use troth_replication::OpenError;
use troth_replication::server::{Running, ServerError};
use troth_sdk::layout::Layout;
use troth_sdk::operator::{ClusterStatus, Operator};
use troth_sdk::{Client, ClientConfig, Role};

use super::fabric::Fabric;
use super::host::{Condition, Host};
use crate::chaos::application::{Applications, OP_TIMEOUT};
use crate::drill::Server;

/// The steps in which time passes.
const MOMENT: Duration = Duration::from_millis(1);

/// What wall clocks show at first: milliseconds since the Unix epoch.
const WALL_MILLIS: u64 = 1_800_000_000_000;

/// How often a folder is tried that the one before has not let go of yet, a millisecond apart.
const FOLDER_TRIES: u32 = 10_000;

/// How often the operator looks.
const LOOKS_EVERY: Duration = Duration::from_millis(100);

/// Who runs on a machine.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Who {
    /// A server.
    Server(Server),
    /// An application, with several processes.
    Application(usize),
    /// The operator, whom nothing happens to.
    Operator,
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Who::Server(server) => server.fmt(f),
            Who::Application(number) => write!(f, "application-{number}"),
            Who::Operator => f.write_str("operator"),
        }
    }
}

impl Who {
    fn address(self) -> SocketAddr {
        let host = match self {
            Who::Server(Server::Coordinator(id)) => [10, 0, 1, id as u8],
            Who::Server(Server::Participant(id)) => [10, 0, 2, id as u8],
            Who::Application(number) => [10, 0, 3, number as u8 + 1],
            Who::Operator => [10, 0, 4, 1],
        };
        SocketAddr::from((host, 7450))
    }
}

/// What a cluster is like.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shape {
    /// Coordinators.
    pub coordinators: u64,
    /// Participants at first.
    pub nodes: u64,
    /// Shards, with three replicas each.
    pub shards: u16,
    /// Applications.
    pub applications: usize,
    /// What each of them does at a time.
    pub processes: usize,
}

/// What the operator has seen last.
#[derive(Debug, Default)]
pub struct Seen {
    /// How the cluster is.
    pub status: Mutex<Option<ClusterStatus>>,
    /// How often it was looked at.
    pub looks: AtomicUsize,
    /// How many shards have moved.
    pub moved_shards: AtomicU64,
}

/// A cluster on machines of which the time is held.
pub struct Cluster {
    /// Their network.
    pub fabric: Fabric,
    /// How long it has been.
    pub now: Duration,
    /// What the applications share.
    pub applications: Arc<Applications>,
    /// What the operator sees.
    pub seen: Arc<Seen>,
    /// The operator, once it is there.
    pub operator: Arc<Mutex<Option<Operator>>>,
    /// The clients of the applications that live.
    pub clients: BTreeMap<usize, Arc<Mutex<Option<Client>>>>,
    /// Processes of applications that have not ended.
    pub busy: Arc<AtomicUsize>,
    shape: Shape,
    layout: Layout,
    hosts: BTreeMap<Who, Host>,
    stops: BTreeMap<Who, CancellationToken>,
    rng: StdRng,
}

impl Cluster {
    /// A cluster whose machines do not run yet.
    pub fn new(
        folder: &Path,
        shape: Shape,
        fabric: Fabric,
        applications: Arc<Applications>,
        rng: StdRng,
    ) -> Result<Cluster, String> {
        let layout = Layout::at(folder);
        layout.create_authority().map_err(|error| error.to_string())?;
        let mut cluster = Cluster {
            fabric,
            now: Duration::ZERO,
            applications,
            seen: Arc::default(),
            operator: Arc::default(),
            clients: BTreeMap::new(),
            busy: Arc::default(),
            shape,
            layout,
            hosts: BTreeMap::new(),
            stops: BTreeMap::new(),
            rng,
        };
        for role in [Role::Client, Role::Admin] {
            cluster.issue(role, role.name())?;
        }
        for id in 1..=shape.coordinators {
            cluster.add(Who::Server(Server::Coordinator(id)))?;
        }
        for id in 1..=shape.nodes {
            cluster.add(Who::Server(Server::Participant(id)))?;
        }
        (0..shape.applications).try_for_each(|number| cluster.add(Who::Application(number)))?;
        cluster.add(Who::Operator)?;
        Ok(cluster)
    }

    fn issue(&self, role: Role, name: &str) -> Result<(), String> {
        let issued =
            self.layout.authority().and_then(|by| self.layout.issue(&by, role, name, CERTIFICATE_VALIDITY));
        issued.map(drop).map_err(|error| error.to_string())
    }

    fn credentials(&self, name: &str) -> Result<Credentials, String> {
        self.layout.credentials(name).load().map_err(|error| error.to_string())
    }

    /// Adds a machine, which does not run yet.
    pub fn add(&mut self, who: Who) -> Result<(), String> {
        match who {
            Who::Server(Server::Coordinator(_)) => self.issue(Role::Coordinator, &who.to_string())?,
            Who::Server(Server::Participant(_)) => self.issue(Role::Participant, &who.to_string())?,
            Who::Application(_) | Who::Operator => {}
        }
        self.hosts.insert(who, Host::new(who.to_string(), who.address()));
        Ok(())
    }

    /// Takes a machine away for good.
    pub fn remove(&mut self, who: Who) {
        self.host(who).crash();
        self.hosts.remove(&who);
    }

    /// All machines.
    pub fn all(&self) -> impl Iterator<Item = Who> {
        self.hosts.keys().copied()
    }

    /// The servers among them.
    pub fn servers(&self) -> impl Iterator<Item = Server> {
        self.all().filter_map(|who| match who {
            Who::Server(server) => Some(server),
            Who::Application(_) | Who::Operator => None,
        })
    }

    /// Whether a machine was added and not taken away.
    pub fn is_there(&self, who: Who) -> bool {
        self.hosts.contains_key(&who)
    }

    /// A machine.
    pub fn host(&mut self, who: Who) -> &mut Host {
        self.hosts.get_mut(&who).expect("it was added")
    }

    /// Its name and where it talks from.
    pub fn party(&self, who: Who) -> (String, SocketAddr) {
        (who.to_string(), who.address())
    }

    /// Starts what is to run on a machine, if it does not run.
    pub fn boot(&mut self, who: Who) -> Result<(), String> {
        if self.host(who).condition() != Condition::Down {
            return Ok(());
        }
        match who {
            Who::Server(Server::Coordinator(id)) => self.boot_coordinator(who, id),
            Who::Server(Server::Participant(id)) => self.boot_participant(who, id),
            Who::Application(number) => self.boot_application(number),
            Who::Operator => self.boot_operator(),
        }
    }

    /// Asks a server to stop.
    pub fn stop(&mut self, server: Server) {
        if let Some(stop) = self.stops.get(&Who::Server(server)) {
            stop.cancel();
        }
    }

    fn coordinator_addresses(&self) -> Vec<String> {
        let coordinator = |id| Who::Server(Server::Coordinator(id)).address().to_string();
        (1..=self.shape.coordinators).map(coordinator).collect()
    }

    fn prepare(&self, basics: &mut Basics, who: Who) {
        basics.quic.bind = who.address();
        basics.quic.sockets = self.fabric.sockets();
        // There is no kernel to cut packets.
        basics.quic.segmentation_offload = Some(false);
    }

    fn data(&self, who: Who) -> std::path::PathBuf {
        self.layout.folder().join("data").join(who.to_string())
    }

    fn boot_coordinator(&mut self, who: Who, id: u64) -> Result<(), String> {
        let mut config = troth_coordinator::Config::new(id, self.data(who));
        self.prepare(&mut config.basics, who);
        let peer = |(address, id)| PeerSection { id, address };
        config.coordinators = self.coordinator_addresses().into_iter().zip(1..).map(peer).collect();
        config.shards = self.shape.shards;
        config.replicas = 3;
        config.nodes = self.shape.nodes as u16;
        config.founding = Some(FoundingId(1));
        // So that logs are cut, and members that were away get snapshots.
        config.log_entries_max = 200;
        self.boot_server(who, move |credentials, clock| {
            let config = config.clone();
            Box::pin(async move { troth_coordinator::Server::start(config, &credentials, clock).await })
        })
    }

    fn boot_participant(&mut self, who: Who, id: u64) -> Result<(), String> {
        let mut config = troth_participant::Config::new(id, self.data(who), self.coordinator_addresses());
        self.prepare(&mut config.basics, who);
        config.log_entries_max = 200;
        self.boot_server(who, move |credentials, clock| {
            let config = config.clone();
            Box::pin(async move { troth_participant::Server::start(config, &credentials, clock).await })
        })
    }

    fn boot_server<S: Running + 'static>(
        &mut self,
        who: Who,
        start: impl Fn(Arc<Credentials>, Clock) -> BoxFuture<'static, Result<S, ServerError>> + 'static,
    ) -> Result<(), String> {
        let credentials = Arc::new(self.credentials(&who.to_string())?);
        let stop = CancellationToken::new();
        self.stops.insert(who, stop.clone());
        let clock = self.host(who).clock();
        self.host(who).boot(serve(stop, move || start(credentials.clone(), clock.clone())));
        Ok(())
    }

    fn client_config(&self, role: Role, who: Who) -> Result<ClientConfig, String> {
        let mut config = ClientConfig::new(self.coordinator_addresses(), self.credentials(role.name())?);
        config.bind = who.address();
        config.sockets = Some(self.fabric.sockets());
        config.timeout = OP_TIMEOUT;
        Ok(config)
    }

    fn boot_application(&mut self, number: usize) -> Result<(), String> {
        let who = Who::Application(number);
        let config = self.client_config(Role::Client, who)?;
        let slot: Arc<Mutex<Option<Client>>> = Arc::default();
        self.clients.insert(number, slot.clone());
        let (applications, busy) = (self.applications.clone(), Busy::new(&self.busy));
        let (processes, seed) = (self.shape.processes, self.rng.random::<u64>());
        self.host(who).boot(async move {
            let busy = busy;
            let client = loop {
                match Client::connect(config.clone()).await {
                    Ok(client) => break client,
                    Err(error) => {
                        tracing::debug!(%error, "an application does not find its cluster yet");
                        sleep(LOOKS_EVERY).await;
                    }
                }
            };
            *slot.lock() = Some(client.clone());
            let mut running = JoinSet::new();
            for process in 0..processes {
                running.spawn(applications.clone().run(client.clone(), seed.wrapping_add(process as u64)));
            }
            while running.join_next().await.is_some() {}
            drop(busy);
            pending().await
        });
        Ok(())
    }

    /// Starts an application that does one thing, and tells how it went.
    pub fn visit<F>(
        &mut self,
        who: Who,
        told: Arc<Mutex<Option<Result<(), String>>>>,
        work: impl FnOnce(Client, Arc<Applications>) -> F + 'static,
    ) -> Result<(), String>
    where
        F: Future<Output = Result<(), String>>,
    {
        let config = self.client_config(Role::Client, who)?;
        let applications = self.applications.clone();
        self.host(who).boot(async move {
            let result = match Client::connect(config).await {
                Ok(client) => work(client, applications).await,
                Err(error) => Err(error.to_string()),
            };
            *told.lock() = Some(result);
            pending().await
        });
        Ok(())
    }

    fn boot_operator(&mut self) -> Result<(), String> {
        let config = self.client_config(Role::Admin, Who::Operator)?;
        let (seen, slot) = (self.seen.clone(), self.operator.clone());
        self.host(Who::Operator).boot(async move {
            let operator = Operator::new(&config).map_err(|error| error.to_string())?;
            *slot.lock() = Some(operator.clone());
            loop {
                let status = operator.status().await;
                *seen.status.lock() = Some(status);
                if let Ok(overview) = operator.overview().await {
                    seen.moved_shards.store(overview.moved_shards, Ordering::Relaxed);
                }
                seen.looks.fetch_add(1, Ordering::Relaxed);
                sleep(LOOKS_EVERY).await;
            }
        });
        Ok(())
    }

    /// Lets a moment pass. Which machine has its turn first, chance decides.
    pub fn tick(&mut self) {
        self.now += MOMENT;
        self.fabric.advance(self.now);
        let wall_millis = WALL_MILLIS + self.now.as_millis() as u64;
        let mut hosts: Vec<&mut Host> = self.hosts.values_mut().collect();
        hosts.shuffle(&mut self.rng);
        for host in hosts {
            host.tick(MOMENT, wall_millis);
        }
    }

    /// Servers that have ended, and why.
    pub fn ended(&mut self) -> Vec<(Who, Result<(), String>)> {
        self.hosts.iter_mut().filter_map(|(who, host)| Some((*who, host.ended()?))).collect()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // What is kept here belongs to machines, and must go before them.
        self.clients.clear();
        self.operator.lock().take();
    }
}

/// One that is busy for as long as this lives.
struct Busy(Arc<AtomicUsize>);

impl Busy {
    fn new(count: &Arc<AtomicUsize>) -> Busy {
        count.fetch_add(1, Ordering::Relaxed);
        Busy(count.clone())
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A server from its start to its end.
async fn serve<S: Running>(
    stop: CancellationToken,
    start: impl Fn() -> BoxFuture<'static, Result<S, ServerError>>,
) -> Result<(), String> {
    let mut tries = 0;
    let server = loop {
        match start().await {
            // The one before has died while the disk was writing for it, and that is real.
            Err(ServerError::Open(OpenError::InUse { .. })) if tries < FOLDER_TRIES => {
                tries += 1;
                std::thread::sleep(Duration::from_millis(1));
            }
            started => break started.map_err(|error| error.to_string())?,
        }
    };
    tokio::select! {
        reason = server.failed() => return Err(reason),
        () = stop.cancelled() => {}
    }
    server.hand_over().await;
    server.shutdown().await;
    Ok(())
}
