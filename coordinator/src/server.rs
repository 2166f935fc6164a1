//! One coordinator process: store, network, group.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::time::Instant;
use troth_protocol::clock::Clock;
use troth_protocol::fault;
use troth_protocol::message::admin::CoordinatorStatus;
use troth_protocol::message::greeting::Plan;
use troth_protocol::message::{Request, Response, admin, coordinator};
use troth_protocol::net::tls::Credentials;
use troth_protocol::net::{BoxFuture, Identity, Peer, Service, Transport};
use troth_protocol::routing::Router;
use troth_protocol::{ClusterId, GroupId, Lineage, MapEpoch, NodeId, Reject};
use troth_replication::server::{Base, Running, ServerError};
use troth_replication::{GroupConfig, Leadership, LogWriter, StartError};

use crate::command::{Founding, Settings};
use crate::config::Config;
use crate::console::{self, Console};
use crate::door::Door;
use crate::door::peers::Peers;
use crate::driver::{Coordinator, CoordinatorConfig};
use crate::machine::{Core, FAMILIES};
use crate::metrics;
use crate::notices::Notices;

/// How long a coordinator that stops tries to hand leadership over.
const HAND_OVER_TIMEOUT: Duration = Duration::from_secs(4);

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
        let id = NodeId(config.basics.id);
        let writer = LogWriter::start(&base.store);

        let listed = config.coordinators.iter().map(|peer| (NodeId(peer.id), peer.address.clone()));
        let mut listed: BTreeMap<NodeId, String> = listed.collect();
        listed.entry(id).or_insert_with(|| base.address.clone());
        let plan = Plan { founding: config.founding, listed: listed.keys().copied().collect() };
        let founding = Founding {
            founders: listed.iter().map(|(id, address)| (*id, address.clone())).collect(),
            lineage: Lineage(rand::random()),
            settings: Settings {
                cluster,
                shards: config.shards,
                replicas: config.replicas,
                nodes: config.nodes,
            },
        };
        let seeds = listed.values().chain(&config.seeds).map(|address| Peer::coordinator(address)).collect();
        let peers = Peers::open(id, listed, plan, &base.store, &writer).map_err(StartError::from)?;
        let (peers, notices) = (Arc::new(peers), Arc::new(Notices::new(&clock)));

        let transport: Arc<dyn Transport> = Arc::new(base.quic.clone());
        let inside = Arc::new(OnceLock::new());
        let front =
            Front { id, cluster, peers: peers.clone(), notices: notices.clone(), inside: inside.clone() };
        base.quic.serve(Arc::new(front));
        let address = base.address.clone();
        let at = (&base.store, &writer);
        let door = Door::new(
            id,
            address,
            peers.clone(),
            transport.clone(),
            notices.clone(),
            config.seeds.clone(),
            at,
        );
        let door = door.await.map_err(StartError::from)?;
        let entry = match door.enter().await {
            Ok(entry) => entry,
            Err(refusal) => {
                let reason = refusal.to_string();
                door.say_farewell(&reason).await;
                return Err(ServerError::Refused(reason));
            }
        };

        let router = Arc::new(Router::new(transport.clone(), seeds));
        let core = Core::new(&base.store, &clock, entry.last);
        let group = GroupConfig {
            group: GroupId::Coordinator,
            node: id,
            incarnation: door.incarnation(),
            members: entry.founders,
            transport: transport.clone(),
            directory: peers.clone(),
            timing: config.timing,
            log_entries_max: config.log_entries_max,
            throttle: None,
        };
        let setup = CoordinatorConfig {
            id,
            founding,
            door,
            peers: peers.clone(),
            notices,
            limits: config.limits,
            rules: config.rules,
            slow: config.basics.slow,
        };
        let coordinator = Coordinator::start(setup, group, &base.store, &writer, core, router).await?;
        let _ = inside.set(coordinator.clone());
        let (registry, vitals) = metrics::registered(base.registry(&writer), &coordinator);
        let console = Console { coordinator: coordinator.downgrade(), id, peers, transport };
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
            let (mut leadership, mut failure) =
                (self.coordinator.group().leadership(), self.coordinator.failure());
            let stopped = leadership.wait_for(|role| matches!(role, Leadership::Failed { .. }));
            tokio::select! {
                role = stopped => match role.as_deref() {
                    Ok(Leadership::Failed { reason }) => reason.clone(),
                    _ => "the coordinator has ended".into(),
                },
                reason = failure.wait_for(Option::is_some) => match reason.as_deref() {
                    Ok(Some(reason)) => reason.clone(),
                    _ => "the coordinator has ended".into(),
                },
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
            // Its last greeting says how far its folder was in the end.
            coordinator.shutdown().await;
            base.quic.close().await;
            drop(coordinator);
            base.close().await;
        })
    }
}

/// Answers for a coordinator, also while it is at the door.
struct Front {
    id: NodeId,
    cluster: ClusterId,
    peers: Arc<Peers>,
    notices: Arc<Notices>,
    inside: Arc<OnceLock<Coordinator>>,
}

impl Front {
    /// How a coordinator is that does not take part yet.
    fn status(&self) -> CoordinatorStatus {
        CoordinatorStatus {
            cluster: self.cluster,
            id: self.id,
            version: env!("CARGO_PKG_VERSION").into(),
            leader: None,
            epoch: None,
            map_epoch: MapEpoch(0),
            in_flight: 0,
            unfinished: 0,
            committed: 0,
            aborted: 0,
            nodes_seen: Vec::new(),
            members: self.peers.members(),
            notices: self.notices.latest(),
        }
    }
}

impl Service for Front {
    fn handle(&self, caller: &Identity, request: Request, deadline: Instant) -> BoxFuture<'static, Response> {
        let Some(coordinator) = self.inside.get().cloned() else {
            let (peers, notices) = (self.peers.clone(), self.notices.clone());
            let status = self.status();
            return Box::pin(async move {
                match request {
                    Request::Coordinator(coordinator::Request::Greet(greeting)) => {
                        let welcome = peers.welcome(greeting).await.map(coordinator::Response::Welcome);
                        welcome.map_or_else(Response::Rejected, Response::Coordinator)
                    }
                    Request::Coordinator(coordinator::Request::Ends { server, reason }) => {
                        notices.refused(&server, &reason);
                        Response::Coordinator(coordinator::Response::Noted)
                    }
                    Request::Admin(admin::Request::Status) => {
                        Response::Admin(admin::Response::Coordinator(status))
                    }
                    _ => Response::Rejected(Reject::NotLeader { leader: None }),
                }
            });
        };
        let caller = caller.name.clone();
        Box::pin(async move {
            answer(coordinator, caller, request, deadline).await.unwrap_or_else(Response::Rejected)
        })
    }
}

async fn answer(
    coordinator: Coordinator,
    caller: String,
    request: Request,
    deadline: Instant,
) -> Result<Response, Reject> {
    match request {
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
        Request::Admin(request) => administer(coordinator, request, deadline).await.map(Response::Admin),
        Request::Shard { .. } => Err(Reject::malformed("this is a coordinator, not a participant")),
    }
}

async fn administer(
    coordinator: Coordinator,
    request: admin::Request,
    deadline: Instant,
) -> Result<admin::Response, Reject> {
    use admin::Response;
    match request {
        admin::Request::Fault(request) => Ok(Response::Faults(fault::handle(request))),
        admin::Request::Switchover { to } => {
            coordinator.switchover(to, deadline).await.map(|to| Response::Switched { to })
        }
        admin::Request::Overview => coordinator.overview().await.map(Response::Overview),
        admin::Request::Node { node, change } => {
            coordinator.change_node(node, change).await.map(|()| Response::NodeChanged)
        }
        admin::Request::Coordinators(change) => {
            coordinator.change_coordinators(change).await.map(|()| Response::CoordinatorsChanged)
        }
        admin::Request::Txn { txn } => coordinator.knowledge(txn).map(Response::Txn),
        admin::Request::InDoubt | admin::Request::Resolve { .. } => {
            Err(Reject::malformed("this is a coordinator, not a participant"))
        }
        admin::Request::Status => Ok(Response::Coordinator(coordinator.status())),
    }
}
