//! A whole cluster in this process: the real servers, over real QUIC on loopback, on real RocksDB.
//!
//! For development and tests, and for applications that start small: what runs here runs unchanged
//! on a cluster of machines.

use std::fs;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};

use futures_util::future::join_all;
use troth_coordinator::config::PeerSection;
use troth_protocol::clock::Clock;
use troth_protocol::net::tls::CERTIFICATE_VALIDITY;
use troth_protocol::process::{HttpConfig, Token};
use troth_replication::server::Running;

use crate::Role;
use crate::client::Client;
use crate::config::ClientConfig;
use crate::error::Error;
use crate::layout::{HTTP_PORT_DISTANCE, Layout, console_url};

/// What an embedded cluster is like.
#[derive(Clone, Debug)]
pub struct ClusterConfig {
    /// Coordinators: 1, 3 or 5.
    pub coordinators: u16,
    /// Participants: at least as many as replicas.
    pub nodes: u16,
    /// Replicas of each shard: 1, 3 or 5.
    pub replicas: u16,
    /// Shards.
    pub shards: u16,
    /// The folder for data and certificates. A cluster that was there before goes on.
    pub dir: PathBuf,
    /// The port of the first coordinator, the others following; `None`: the system chooses.
    pub port: Option<u16>,
    /// Whether servers show metrics and health, and coordinators the console, over HTTP on loopback; see
    /// [`Cluster::console`].
    pub http: bool,
}

impl Default for ClusterConfig {
    /// One coordinator, three participants, one replica, sixteen shards, in `./troth`.
    fn default() -> ClusterConfig {
        ClusterConfig {
            coordinators: 1,
            nodes: 3,
            replicas: 1,
            shards: 16,
            dir: "troth".into(),
            port: None,
            http: false,
        }
    }
}

/// A running embedded cluster.
pub struct Cluster {
    layout: Layout,
    addresses: Vec<String>,
    clock: Clock,
    coordinators: Vec<troth_coordinator::Server>,
    participants: Vec<troth_participant::Server>,
}

impl Cluster {
    /// Starts a cluster, or goes on with the one in the folder.
    ///
    /// # Errors
    /// [`Error::Config`] if the configuration makes no sense, a folder or port cannot be used, or
    /// what is stored is damaged.
    pub async fn start(config: ClusterConfig) -> Result<Cluster, Error> {
        let layout = Layout::at(&config.dir);
        prepare_certificates(&layout, &config)?;
        let addresses = coordinator_addresses(&config)?;
        layout.write_clients(&addresses).map_err(broken)?;
        let mut cluster = Cluster {
            layout,
            addresses,
            clock: Clock::system(),
            coordinators: Vec::new(),
            participants: Vec::new(),
        };
        if let Err(error) = cluster.start_servers(&config).await {
            cluster.shutdown().await;
            return Err(error);
        }
        Ok(cluster)
    }

    async fn start_servers(&mut self, config: &ClusterConfig) -> Result<(), Error> {
        let peers: Vec<PeerSection> = self
            .addresses
            .iter()
            .zip(1..)
            .map(|(address, id)| PeerSection { id, address: address.clone() })
            .collect();
        let founding = self.layout.founding().map_err(broken)?;
        let mut starting = Vec::new();
        for peer in &peers {
            let name = format!("coordinator-{}", peer.id);
            let mut server = troth_coordinator::Config::new(peer.id, config.dir.join("data").join(&name));
            server.basics.quic.bind = peer.address.parse().map_err(broken)?;
            server.basics.http = self.http(config, Some(server.basics.quic.bind))?;
            server.coordinators = peers.clone();
            server.shards = config.shards;
            server.replicas = config.replicas;
            server.nodes = config.nodes;
            server.founding = Some(founding);
            let (credentials, clock) =
                (self.layout.credentials(&name).load().map_err(broken)?, self.clock.clone());
            starting.push(async move { troth_coordinator::Server::start(server, &credentials, clock).await });
        }
        // Together: each waits for most of the others.
        let mut failed = None;
        for started in join_all(starting).await {
            match started {
                Ok(server) => self.coordinators.push(server),
                Err(error) => failed = Some(error),
            }
        }
        if let Some(error) = failed {
            return Err(broken(error));
        }
        for id in 1..=config.nodes {
            let name = format!("participant-{id}");
            let data = config.dir.join("data").join(&name);
            let mut server = troth_participant::Config::new(id.into(), data, self.addresses.clone());
            server.basics.quic.bind = address_of(&config.dir, &name)?;
            server.basics.http = self.http(config, None)?;
            let credentials = self.layout.credentials(&name).load().map_err(broken)?;
            let started = troth_participant::Server::start(server, &credentials, self.clock.clone()).await;
            self.participants.push(started.map_err(broken)?);
        }
        Ok(())
    }

    /// Where a server shows itself: a coordinator that listens there with the console.
    fn http(
        &self,
        config: &ClusterConfig,
        coordinator: Option<SocketAddr>,
    ) -> Result<Option<HttpConfig>, Error> {
        if !config.http {
            return Ok(None);
        }
        let anywhere = SocketAddr::from(([127, 0, 0, 1], 0));
        let Some(own) = coordinator else {
            return Ok(Some(HttpConfig { listen: anywhere, console: None }));
        };
        let token = self.layout.console_token().map_err(broken)?;
        let console = Some(Token::new(&token).map_err(broken)?);
        let beside = own.port().checked_add(HTTP_PORT_DISTANCE).map(|port| SocketAddr::new(own.ip(), port));
        let free = |address: &SocketAddr| TcpListener::bind(address).is_ok();
        Ok(Some(HttpConfig { listen: beside.filter(free).unwrap_or(anywhere), console }))
    }

    /// Where the console is, for a browser, if the cluster has one.
    ///
    /// # Errors
    /// [`Error::Config`] if its folder cannot be read.
    pub fn console(&self) -> Result<Option<String>, Error> {
        let Some(address) = self.coordinators.first().and_then(|server| server.http_addr()) else {
            return Ok(None);
        };
        let token = self.layout.console_token().map_err(broken)?;
        Ok(Some(console_url(&address.to_string(), &token)))
    }

    /// How to connect to this cluster.
    ///
    /// # Errors
    /// [`Error::Config`] if the certificates are gone.
    pub fn client_config(&self) -> Result<ClientConfig, Error> {
        let credentials = self.layout.credentials(Role::Client.name()).load().map_err(broken)?;
        Ok(ClientConfig::new(self.addresses.clone(), credentials))
    }

    /// Connects to this cluster, and waits until it is ready.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub async fn client(&self) -> Result<Client, Error> {
        Client::connect(self.client_config()?).await
    }

    /// Where the coordinators listen.
    pub fn coordinators(&self) -> &[String] {
        &self.addresses
    }

    /// The files of this cluster.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The wall clock of all its servers, so that a test can move it.
    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    /// Stops all servers, and returns when the folder can be used again.
    pub async fn shutdown(self) {
        for server in self.participants {
            server.shutdown().await;
        }
        for server in self.coordinators {
            server.shutdown().await;
        }
    }
}

fn broken(error: impl std::fmt::Display) -> Error {
    Error::Config(error.to_string())
}

/// Makes the certificates that are missing.
fn prepare_certificates(layout: &Layout, config: &ClusterConfig) -> Result<(), Error> {
    let authority =
        if layout.exists() { layout.authority() } else { layout.create_authority() }.map_err(broken)?;
    let coordinators = (1..=config.coordinators).map(|id| (Role::Coordinator, format!("coordinator-{id}")));
    let participants = (1..=config.nodes).map(|id| (Role::Participant, format!("participant-{id}")));
    let clients = [Role::Client, Role::Admin].map(|role| (role, role.name().to_owned()));
    for (role, name) in coordinators.chain(participants).chain(clients) {
        if !layout.folder().join(format!("{name}.pem")).exists() {
            layout.issue(&authority, role, &name, CERTIFICATE_VALIDITY).map_err(broken)?;
        }
    }
    Ok(())
}

/// Coordinators must know each other's addresses before they start.
fn coordinator_addresses(config: &ClusterConfig) -> Result<Vec<String>, Error> {
    let address = |number: u16| match config.port {
        Some(first) => Ok(SocketAddr::from(([127, 0, 0, 1], first + number))),
        None => address_of(&config.dir, &format!("coordinator-{}", number + 1)),
    };
    (0..config.coordinators).map(|number| Ok(address(number)?.to_string())).collect()
}

/// Where a server may listen: where it did the last time, so that others find it there, or else
/// where nobody does.
fn address_of(dir: &Path, name: &str) -> Result<SocketAddr, Error> {
    let last = fs::read_to_string(dir.join("data").join(name).join("address")).ok();
    let last = last.and_then(|address| address.trim().parse::<SocketAddr>().ok());
    let free = |address: &SocketAddr| UdpSocket::bind(address).is_ok();
    match last.filter(free) {
        Some(address) => Ok(address),
        None => UdpSocket::bind(("127.0.0.1", 0)).and_then(|socket| socket.local_addr()).map_err(broken),
    }
}
