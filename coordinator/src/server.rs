//! One coordinator process: store, network, group.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::sync::watch;
use tokio::time::Instant;
use troth_protocol::clock::Clock;
use troth_protocol::message::{Request, Response, admin, coordinator};
use troth_protocol::net::quic::{EndpointError, Quic};
use troth_protocol::net::tls::Credentials;
use troth_protocol::net::{BoxFuture, Identity, Peer, Service, Transport};
use troth_protocol::process;
use troth_protocol::routing::Router;
use troth_protocol::{GroupId, Node, NodeId, Reject};
use troth_replication::{Directory, GroupConfig, Leadership, LogWriter, OpenError, StartError, Store};

use crate::command::Settings;
use crate::config::Config;
use crate::driver::{Coordinator, CoordinatorConfig};
use crate::machine::{Core, FAMILIES};

/// The coordinator cannot start. Every message is one line and says what to do.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The address cannot be listened on.
    #[error("{0}")]
    Endpoint(#[from] EndpointError),
    /// The data folder cannot be used.
    #[error("{0}")]
    Open(#[from] OpenError),
    /// What is stored is damaged.
    #[error("{0}")]
    Start(#[from] StartError),
    /// The address cannot be written into the data folder.
    #[error("cannot write into the data folder: {0}")]
    Publish(#[from] std::io::Error),
}

/// Where the coordinators are, by configuration.
struct Configured(BTreeMap<NodeId, Peer>);

impl Directory for Configured {
    fn peer(&self, _: GroupId, node: NodeId) -> Option<Peer> {
        self.0.get(&node).cloned()
    }
}

/// A running coordinator.
pub struct Server {
    quic: Arc<Quic>,
    coordinator: Coordinator,
    store: Store,
}

impl Server {
    /// Starts a coordinator.
    ///
    /// # Errors
    /// See [`ServerError`].
    pub async fn start(
        config: Config,
        credentials: &Credentials,
        clock: Clock,
    ) -> Result<Server, ServerError> {
        let cluster = credentials.identity().cluster;
        let owner = format!("coordinator {} of cluster {cluster}", config.id);
        let store = Store::open(&config.data, &owner, &FAMILIES)?;
        let quic = Quic::bind(config.quic.clone(), credentials)?;
        process::publish_address(&config.data, quic.local_addr())?;

        let node =
            |id: u64, address: String| Node { id: NodeId(id), address, zone: String::new(), weight: 0 };
        let mut coordinators: Vec<Node> =
            config.coordinators.iter().map(|peer| node(peer.id, peer.address.clone())).collect();
        if coordinators.is_empty() {
            let address = config.advertise.clone().unwrap_or_else(|| quic.local_addr().to_string());
            coordinators.push(node(config.id, address));
        }
        coordinators.sort_by_key(|node| node.id);
        let peers: BTreeMap<NodeId, Peer> =
            coordinators.iter().map(|node| (node.id, Peer::coordinator(&node.address))).collect();

        let transport: Arc<dyn Transport> = Arc::new(quic.clone());
        let router = Arc::new(Router::new(transport.clone(), peers.values().cloned().collect()));
        let writer = LogWriter::start(&store);
        let core = Core::new(&store, &clock);
        let group = GroupConfig {
            group: GroupId::Coordinator,
            node: NodeId(config.id),
            members: peers.keys().copied().collect(),
            transport,
            directory: Arc::new(Configured(peers)),
            timing: config.timing,
            log_entries_max: config.log_entries_max,
        };
        let settings =
            Settings { cluster, shards: config.shards, replicas: config.replicas, nodes: config.nodes };
        let setup =
            CoordinatorConfig { id: NodeId(config.id), coordinators, settings, limits: config.limits };
        tracing::info!(coordinator = config.id, %cluster, address = %quic.local_addr(), "coordinator");
        let coordinator = Coordinator::start(setup, group, &store, &writer, core, router).await?;
        quic.serve(Arc::new(Front(coordinator.clone())));
        Ok(Server { quic, coordinator, store })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.quic.local_addr()
    }

    /// Its role in the group of coordinators; [`Leadership::Failed`] once it cannot go on.
    pub fn leadership(&self) -> watch::Receiver<Leadership> {
        self.coordinator.group().leadership()
    }

    /// Stops, and returns when its folder can be opened again. What was acknowledged stays.
    pub async fn shutdown(self) {
        let Server { quic, coordinator, store } = self;
        quic.close().await;
        coordinator.shutdown().await;
        drop((quic, coordinator));
        store.closed().await;
    }
}

/// Answers for a coordinator.
struct Front(Coordinator);

impl Service for Front {
    fn handle(&self, caller: &Identity, request: Request, deadline: Instant) -> BoxFuture<'static, Response> {
        let coordinator = self.0.clone();
        let caller = caller.name.clone();
        Box::pin(async move {
            let answer = match request {
                Request::Coordinator(request) => {
                    if let coordinator::Request::Register { node, .. } = &request {
                        tracing::trace!(caller, node = %node.id, "a sign of life");
                    }
                    coordinator.handle(request, deadline).await.map(Response::Coordinator)
                }
                Request::Raft(request) => match request.group {
                    GroupId::Coordinator => coordinator.group().step(request).await.map(Response::Raft),
                    GroupId::Shard(_) => Err(Reject::malformed("this is a coordinator")),
                },
                Request::Admin(admin::Request::Status) => {
                    Ok(Response::Admin(admin::Response::Coordinator(coordinator.status())))
                }
                Request::Shard { .. } => Err(Reject::malformed("this is a coordinator, not a participant")),
            };
            answer.unwrap_or_else(Response::Rejected)
        })
    }
}
