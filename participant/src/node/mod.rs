//! The shards of a process, and its place in the cluster.
//!
//! | module | what it does |
//! | --- | --- |
//! | `replicas` | makes the node known, and starts and stops replicas as the map says |
//! | `sharing` | gives leaderships to whom they belong |
//! | `retiring` | gives up old versions and outcomes |

mod replicas;
mod retiring;
mod sharing;

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use futures_util::future::join_all;
use parking_lot::{Mutex, RwLock};
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use troth_protocol::clock::Clock;
use troth_protocol::fault;
use troth_protocol::message::admin::{self, ParticipantStatus, TxnKnowledge};
use troth_protocol::message::shard::Decision;
use troth_protocol::message::{Request, Response};
use troth_protocol::net::{BoxFuture, Identity, Service};
use troth_protocol::routing::Router;
use troth_protocol::timeline::Timeline;
use troth_protocol::wire::{decode, encode};
use troth_protocol::{
    ClusterId, ClusterMap, Epoch, FolderId, GroupId, Node as NodeRecord, NodeId, NodeState, Reject, ShardId,
    TxnId,
};
use troth_replication::{Incarnations, LogWriter, StartError, Store, Throttle, families::META};

use crate::config::Config;
use crate::hearing::Hearing;
use crate::metrics::{self, Metrics};
use crate::records::{damaged, node_key};
use crate::shard::Shard;
use crate::shard::driver::DISK_READS_MAX;

/// A node with its shards.
pub struct Node {
    config: Config,
    cluster: ClusterId,
    record: NodeRecord,
    folder: FolderId,
    incarnations: Incarnations,
    hearing: Arc<Hearing>,
    /// Whether the coordinators have admitted this start.
    admitted: watch::Sender<bool>,
    /// Since when the coordinators say that another process is alive under this id.
    elsewhere_since: Mutex<Option<Instant>>,
    store: Store,
    writer: LogWriter,
    router: Arc<Router>,
    clock: Clock,
    timeline: Arc<Timeline>,
    throttle: Throttle,
    metrics: Metrics,
    disk_reads: Arc<Semaphore>,
    shards: RwLock<BTreeMap<ShardId, Shard>>,
    failure: watch::Sender<Option<String>>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

/// The id of this data folder, made now if it is new.
async fn folder_id(store: &Store, writer: &LogWriter) -> io::Result<FolderId> {
    let key = node_key("folder");
    if let Some(record) = store.get(META, &key)? {
        return decode(&record).map_err(|error| damaged("id of the data folder", error));
    }
    let id = FolderId(rand::random());
    writer.put_durably(META, &key, encode(&id)).await?;
    Ok(id)
}

impl Node {
    /// Begins to make the node known. The shards that it had start when the coordinators have admitted it.
    ///
    /// # Errors
    /// If what is stored is damaged, or the store cannot be read.
    pub async fn start(
        config: Config,
        cluster: ClusterId,
        address: String,
        store: Store,
        router: Arc<Router>,
        clock: Clock,
    ) -> Result<Arc<Node>, StartError> {
        let writer = LogWriter::start(&store);
        let folder = folder_id(&store, &writer).await?;
        let incarnations = Incarnations::begin(&store, &writer).await?;
        let record = NodeRecord {
            id: NodeId(config.basics.id),
            address,
            zone: config.zone.clone(),
            weight: config.weight,
            state: NodeState::Waiting,
            incarnation: incarnations.current(),
        };
        let node = Arc::new(Node {
            throttle: Throttle::new(config.move_bytes_per_second),
            disk_reads: Arc::new(Semaphore::new(DISK_READS_MAX)),
            metrics: Metrics::default(),
            config,
            cluster,
            record,
            folder,
            incarnations,
            hearing: Arc::new(Hearing::open(&store)?),
            admitted: watch::channel(false).0,
            elsewhere_since: Mutex::default(),
            store,
            writer,
            router,
            timeline: Arc::new(Timeline::new(&clock)),
            clock,
            shards: RwLock::default(),
            failure: watch::channel(None).0,
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
        });
        if let Some(map) = node.stored_map()? {
            node.router.learn(map);
        }
        node.tasks.spawn(node.clone().stay_registered());
        node.tasks.spawn(node.clone().retire());
        node.tasks.spawn(node.clone().share_leading());
        Ok(node)
    }

    /// Which node it is.
    pub fn id(&self) -> NodeId {
        self.record.id
    }

    /// Whether the coordinators have admitted this start of it.
    pub fn is_admitted(&self) -> bool {
        *self.admitted.borrow()
    }

    /// The newest map that it has.
    pub fn map(&self) -> Arc<ClusterMap> {
        self.router.map()
    }

    /// Its replicas, by shard.
    pub fn shards(&self) -> Vec<Shard> {
        self.shards.read().values().cloned().collect()
    }

    /// What it counts and measures.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// What makes its log durable.
    pub fn writer(&self) -> &LogWriter {
        &self.writer
    }

    /// Why this node cannot go on, once it cannot.
    pub fn failure(&self) -> watch::Receiver<Option<String>> {
        self.failure.subscribe()
    }

    /// Stops all shards. What was acknowledged stays.
    pub async fn shutdown(&self) {
        let admitted = self.admitted.send_replace(false);
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        let shards: Vec<Shard> = std::mem::take(&mut *self.shards.write()).into_values().collect();
        join_all(shards.iter().map(Shard::shutdown)).await;
        if admitted {
            self.say_farewell().await;
        }
    }

    fn first_failure(&self) -> Option<String> {
        self.shards.read().values().find_map(Shard::failure)
    }

    /// What a leader of the coordinators may ask for with a shard.
    fn shard_for(&self, id: ShardId, epoch: Option<Epoch>) -> Result<Shard, Reject> {
        if let Some(epoch) = epoch {
            self.hearing.obey(epoch)?;
        }
        self.shard(id)
    }

    fn shard(&self, id: ShardId) -> Result<Shard, Reject> {
        if !*self.admitted.borrow() {
            return Err(Reject::NotAdmitted { node: self.record.id });
        }
        let shard = self.shards.read().get(&id).cloned();
        shard.ok_or_else(|| Reject::StaleMap { epoch: self.router.map().epoch })
    }

    fn knowledge(&self, txn: TxnId) -> Result<TxnKnowledge, Reject> {
        let unreadable = |error: io::Error| Reject::Internal { reason: error.to_string() };
        let mut known = Vec::new();
        for shard in self.shards() {
            known.extend(shard.knowledge(txn).map_err(unreadable)?);
        }
        let mut audit = Vec::new();
        let (start, end) = (node_key(&format!("audit/{txn}/")), node_key(&format!("audit/{txn}0")));
        let read = self.store.scan(META, &start, &end, |_, record| {
            audit.push(String::from_utf8_lossy(record).into_owned());
            true
        });
        read.map_err(|error| unreadable(error.into()))?;
        Ok(TxnKnowledge { decision: None, shards: known, moments: self.timeline.of(txn), audit })
    }

    /// Ends a transaction by an operator's word, which is on record first.
    async fn resolve(&self, id: ShardId, txn: TxnId, decision: Decision, note: String) -> Result<(), Reject> {
        let shard = self.shard(id)?;
        let unwritable = |error: io::Error| Reject::Internal { reason: error.to_string() };
        let record = format!("{} ms: shard {id}: {decision:?}: {note}", self.clock.millis());
        tracing::warn!(%txn, record, "an operator ends a transaction");
        let key = node_key(&format!("audit/{txn}/{id}"));
        self.writer.put_durably(META, &key, record.into_bytes()).await.map_err(unwritable)?;
        shard.resolve(txn, decision).await
    }

    fn status(&self) -> ParticipantStatus {
        ParticipantStatus {
            cluster: self.cluster,
            id: self.record.id,
            version: env!("CARGO_PKG_VERSION").into(),
            map_epoch: self.router.map().epoch,
            shards: self.shards.read().values().map(Shard::status).collect(),
        }
    }
}

/// Answers for a node.
pub struct Front(pub Arc<Node>);

impl Service for Front {
    fn handle(&self, _: &Identity, request: Request, deadline: Instant) -> BoxFuture<'static, Response> {
        let node = self.0.clone();
        Box::pin(async move {
            let answer = match request {
                Request::Shard { shard, request } => match node.shard_for(shard, request.epoch()) {
                    Ok(shard) => {
                        let (name, began) = (metrics::name(&request), std::time::Instant::now());
                        let answer = shard.handle(request, deadline).await;
                        node.metrics.answered(name, &answer, began);
                        answer.map(Response::Shard)
                    }
                    Err(reject) => Err(reject),
                },
                Request::Raft(request) => match request.group {
                    GroupId::Shard(shard) => match node.shard(shard) {
                        Ok(shard) => shard.group().step(request).await.map(Response::Raft),
                        Err(reject) => Err(reject),
                    },
                    GroupId::Coordinator => Err(Reject::malformed("this is a participant")),
                },
                Request::Admin(admin::Request::Fault(request)) => {
                    Ok(Response::Admin(admin::Response::Faults(fault::handle(request))))
                }
                Request::Admin(admin::Request::InDoubt) => {
                    let in_doubt = node.shards().iter().flat_map(Shard::in_doubt).collect();
                    Ok(Response::Admin(admin::Response::InDoubt(in_doubt)))
                }
                Request::Admin(admin::Request::Txn { txn }) => {
                    node.knowledge(txn).map(|known| Response::Admin(admin::Response::Txn(known)))
                }
                Request::Admin(admin::Request::Resolve { shard, txn, decision, note }) => {
                    let resolved = node.resolve(shard, txn, decision, note).await;
                    resolved.map(|()| Response::Admin(admin::Response::Resolved))
                }
                Request::Admin(
                    admin::Request::Switchover { .. }
                    | admin::Request::Overview
                    | admin::Request::Coordinators(_)
                    | admin::Request::Node { .. },
                ) => Err(Reject::malformed("this is a participant, not a coordinator")),
                Request::Admin(admin::Request::Status) => {
                    Ok(Response::Admin(admin::Response::Participant(node.status())))
                }
                Request::Coordinator(_) => Err(Reject::malformed("this is a participant, not a coordinator")),
            };
            answer.unwrap_or_else(Response::Rejected)
        })
    }
}
