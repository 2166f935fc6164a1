//! One coordinator process: store, network, group.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use troth_protocol::clock::Clock;
use troth_protocol::fault;
use troth_protocol::message::{Request, Response, admin, coordinator};
use troth_protocol::net::tls::Credentials;
use troth_protocol::net::{BoxFuture, Identity, Peer, Service, Transport};
use troth_protocol::routing::Router;
use troth_protocol::{GroupId, Node, NodeId, NodeState, Reject};
use troth_replication::server::{Base, Running, ServerError};
use troth_replication::{Directory, GroupConfig, Leadership, LogWriter};

use crate::command::Settings;
use crate::config::Config;
use crate::console::{self, Console};
use crate::driver::{Coordinator, CoordinatorConfig};
use crate::machine::{Core, FAMILIES};
use crate::metrics;

/// How long a coordinator that stops tries to hand leadership over.
const HAND_OVER_TIMEOUT: Duration = Duration::from_secs(4);

/// Where the coordinators are, by configuration.
struct Configured(BTreeMap<NodeId, Peer>);

impl Directory for Configured {
    fn peer(&self, _: GroupId, node: NodeId) -> Option<Peer> {
        self.0.get(&node).cloned()
    }
}

/// A running coordinator.
pub struct Server {
    base: Base,
    coordinator: Coordinator,
}

impl Server {
    /// Starts a coordinator.
    ///
    /// # Errors
    /// See [`ServerError`].
    pub fn start(
        config: Config,
        credentials: &Credentials,
        clock: Clock,
    ) -> BoxFuture<'_, Result<Server, ServerError>> {
        // Boxed, so that it is compiled here and not in every program that starts a server.
        Box::pin(Server::open(config, credentials, clock))
    }

    async fn open(config: Config, credentials: &Credentials, clock: Clock) -> Result<Server, ServerError> {
        let cluster = credentials.identity().cluster;
        let mut base = Base::open(&config.basics, credentials, &FAMILIES)?;
        let id = config.basics.id;

        let node = |id: u64, address: String| Node {
            id: NodeId(id),
            address,
            zone: String::new(),
            weight: 0,
            state: NodeState::Active,
        };
        let mut coordinators: Vec<Node> =
            config.coordinators.iter().map(|peer| node(peer.id, peer.address.clone())).collect();
        if coordinators.is_empty() {
            coordinators.push(node(id, base.address.clone()));
        }
        coordinators.sort_by_key(|node| node.id);
        let peers: BTreeMap<NodeId, Peer> =
            coordinators.iter().map(|node| (node.id, Peer::coordinator(&node.address))).collect();

        let transport: Arc<dyn Transport> = Arc::new(base.quic.clone());
        let known = peers.clone();
        let router = Arc::new(Router::new(transport.clone(), peers.values().cloned().collect()));
        let writer = LogWriter::start(&base.store);
        let core = Core::new(&base.store, &clock);
        let group = GroupConfig {
            group: GroupId::Coordinator,
            node: NodeId(id),
            members: peers.keys().copied().collect(),
            transport: transport.clone(),
            directory: Arc::new(Configured(peers)),
            timing: config.timing,
            log_entries_max: config.log_entries_max,
            throttle: None,
        };
        let settings =
            Settings { cluster, shards: config.shards, replicas: config.replicas, nodes: config.nodes };
        let setup = CoordinatorConfig {
            id: NodeId(id),
            coordinators,
            settings,
            limits: config.limits,
            rules: config.rules,
            slow: config.basics.slow,
        };
        let coordinator = Coordinator::start(setup, group, &base.store, &writer, core, router).await?;
        base.quic.serve(Arc::new(Front(coordinator.clone())));
        let (registry, vitals) = metrics::registered(base.registry(&writer), &coordinator);
        let console =
            Console { coordinator: coordinator.downgrade(), id: NodeId(id), peers: known, transport };
        base.show(registry, vitals, |http, stop| match &http.console {
            Some(token) => console::router(console, token.clone(), stop.clone()),
            None => axum::Router::new(),
        })
        .await?;
        Ok(Server { base, coordinator })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.base.local_addr()
    }

    /// Where metrics, health and the console are shown, if anywhere.
    pub fn http_addr(&self) -> Option<SocketAddr> {
        self.base.http_addr()
    }
}

impl Running for Server {
    fn failed(&self) -> BoxFuture<'_, String> {
        Box::pin(async {
            let mut leadership = self.coordinator.group().leadership();
            match leadership.wait_for(|role| matches!(role, Leadership::Failed { .. })).await.as_deref() {
                Ok(Leadership::Failed { reason }) => reason.clone(),
                _ => "the coordinator has ended".into(),
            }
        })
    }

    fn hand_over(&self) -> BoxFuture<'_, bool> {
        Box::pin(async {
            let deadline = Instant::now() + HAND_OVER_TIMEOUT;
            match self.coordinator.resign(deadline).await {
                Ok(_) => true,
                Err(reject) => {
                    tracing::debug!(%reject, "there is no leadership to hand over");
                    false
                }
            }
        })
    }

    fn shutdown(self) -> BoxFuture<'static, ()> {
        Box::pin(async {
            let Server { base, coordinator } = self;
            base.quic.close().await;
            coordinator.shutdown().await;
            drop(coordinator);
            base.close().await;
        })
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
                Request::Admin(admin::Request::Fault(request)) => {
                    Ok(Response::Admin(admin::Response::Faults(fault::handle(request))))
                }
                Request::Admin(admin::Request::Switchover { to }) => {
                    let switched = coordinator.switchover(to, deadline).await;
                    switched.map(|to| Response::Admin(admin::Response::Switched { to }))
                }
                Request::Admin(admin::Request::Overview) => {
                    let overview = coordinator.overview().await;
                    overview.map(|overview| Response::Admin(admin::Response::Overview(overview)))
                }
                Request::Admin(admin::Request::Node { node, change }) => {
                    let changed = coordinator.change_node(node, change).await;
                    changed.map(|()| Response::Admin(admin::Response::NodeChanged))
                }
                Request::Admin(admin::Request::Txn { txn }) => {
                    coordinator.knowledge(txn).map(|known| Response::Admin(admin::Response::Txn(known)))
                }
                Request::Admin(admin::Request::InDoubt | admin::Request::Resolve { .. }) => {
                    Err(Reject::malformed("this is a coordinator, not a participant"))
                }
                Request::Admin(admin::Request::Status) => {
                    Ok(Response::Admin(admin::Response::Coordinator(coordinator.status())))
                }
                Request::Shard { .. } => Err(Reject::malformed("this is a coordinator, not a participant")),
            };
            answer.unwrap_or_else(Response::Rejected)
        })
    }
}
