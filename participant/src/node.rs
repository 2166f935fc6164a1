//! The shards of a process, and its place in the cluster.
//!
//! A node makes itself known to the coordinators again and again, as a sign of life, and learns the
//! cluster map in return. It holds a replica of every shard that the map gives it. The last map is
//! kept on disk, so that a node can start while no coordinator can be reached.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use parking_lot::RwLock;
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use troth_protocol::clock::Clock;
use troth_protocol::fault;
use troth_protocol::message::admin::{self, ParticipantStatus, TxnKnowledge};
use troth_protocol::message::shard::Decision;
use troth_protocol::message::{Request, Response, coordinator};
use troth_protocol::net::{BoxFuture, Identity, Peer, Service};
use troth_protocol::routing::{Resend, RouteError, Router};
use troth_protocol::timeline::Timeline;
use troth_protocol::wire::{decode, encode};
use troth_protocol::{
    ClusterId, ClusterMap, FolderId, GroupId, MapEpoch, Node as NodeRecord, NodeId, Reject, ShardId,
    Timestamp, TxnId,
};
use troth_replication::{Directory, Follower, GroupConfig, LogWriter, StartError, Store, families::META};

use crate::config::Config;
use crate::mvcc::gc;
use crate::shard::Shard;

/// How often a node makes itself known: while it waits for the first map, and after.
const REGISTER_EAGERLY: Duration = Duration::from_millis(50);
const REGISTER_INTERVAL: Duration = Duration::from_secs(1);

/// How often a node looks for leaderships that another one should have, and how often in a row that one
/// must have been found fit before it is handed one.
const SHARE_INTERVAL: Duration = Duration::from_millis(250);
const FIT_TIMES: u32 = 8;

/// The same before a stop. Not as long as it takes until others give leaderships back.
const STOP_PATIENCE: Duration = Duration::from_secs(1);

/// Fit is who answers, and is this many entries behind at most.
const BEHIND_MAX: u64 = 256;

/// How long a change of leaders may take.
const TRANSFER_PATIENCE: Duration = Duration::from_secs(2);

/// How long the shards may take to note that old versions are given up.
const RETIRE_TIMEOUT: Duration = Duration::from_secs(5);

/// Versions that one step of garbage collection looks at.
const COLLECT_STEP: usize = 20_000;

/// A node with its shards.
pub struct Node {
    config: Config,
    cluster: ClusterId,
    record: NodeRecord,
    folder: FolderId,
    store: Store,
    writer: LogWriter,
    router: Arc<Router>,
    clock: Clock,
    timeline: Arc<Timeline>,
    shards: RwLock<BTreeMap<ShardId, Shard>>,
    failure: watch::Sender<Option<String>>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

/// Where the replicas of shards are, by the newest map.
struct MapDirectory(Arc<Router>);

impl Directory for MapDirectory {
    fn peer(&self, _: GroupId, node: NodeId) -> Option<Peer> {
        self.0.map().node(node).map(|node| Peer::participant(&node.address))
    }
}

/// The key of something that belongs to the node, not to one of its groups.
fn node_key(name: &str) -> Vec<u8> {
    [&u32::MAX.to_be_bytes()[..], name.as_bytes()].concat()
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

fn damaged(what: &str, error: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the stored {what} is damaged: {error}"))
}

impl Node {
    /// Starts the shards that this node had, and begins to make itself known.
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
        let record = NodeRecord {
            id: NodeId(config.basics.id),
            address,
            zone: config.zone.clone(),
            weight: config.weight,
        };
        let writer = LogWriter::start(&store);
        let folder = folder_id(&store, &writer).await?;
        let node = Arc::new(Node {
            config,
            cluster,
            record,
            folder,
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
            node.start_shards().await?;
        }
        node.tasks.spawn(node.clone().stay_registered());
        node.tasks.spawn(node.clone().retire());
        node.tasks.spawn(node.clone().share_leading());
        Ok(node)
    }

    /// Why this node cannot go on, once it cannot.
    pub fn failure(&self) -> watch::Receiver<Option<String>> {
        self.failure.subscribe()
    }

    /// Stops all shards. What was acknowledged stays.
    pub async fn shutdown(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        let shards: Vec<Shard> = std::mem::take(&mut *self.shards.write()).into_values().collect();
        join_all(shards.iter().map(Shard::shutdown)).await;
    }

    fn stored_map(&self) -> io::Result<Option<ClusterMap>> {
        let Some(record) = self.store.get(META, &node_key("map"))? else {
            return Ok(None);
        };
        decode(&record).map(Some).map_err(|error| damaged("cluster map", error))
    }

    fn keep_map(&self, map: &ClusterMap) -> io::Result<()> {
        let mut batch = self.store.batch();
        batch.put(META, &node_key("map"), &encode(map));
        batch.commit()?;
        Ok(())
    }

    /// Starts a replica of every shard that the map gives this node and that it does not have yet.
    async fn start_shards(&self) -> Result<(), StartError> {
        let map = self.router.map();
        for shard in (0..map.shards).map(ShardId) {
            let replicas = map.replicas_of(shard);
            if !replicas.contains(&self.record.id) || self.shards.read().contains_key(&shard) {
                continue;
            }
            let config = GroupConfig {
                group: GroupId::Shard(shard),
                node: self.record.id,
                members: replicas.iter().copied().collect(),
                transport: self.router.transport().clone(),
                directory: Arc::new(MapDirectory(self.router.clone())),
                timing: self.config.timing,
                log_entries_max: self.config.log_entries_max,
            };
            let started = Shard::start(
                shard,
                config,
                &self.store,
                &self.writer,
                &self.router,
                &self.clock,
                &self.timeline,
            )
            .await?;
            self.shards.write().insert(shard, started);
        }
        Ok(())
    }

    async fn stay_registered(self: Arc<Node>) {
        loop {
            let known = self.router.map().epoch;
            let interval = if known == MapEpoch(0) { REGISTER_EAGERLY } else { REGISTER_INTERVAL };
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = self.register(known) => {}
            }
            if let Some(reason) = self.first_failure() {
                self.failure.send_replace(Some(reason));
                return;
            }
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = sleep(interval) => {}
            }
        }
    }

    async fn register(&self, known: MapEpoch) {
        let request =
            coordinator::Request::Register { node: self.record.clone(), folder: self.folder, known };
        let deadline = Instant::now() + Duration::from_secs(2);
        match self.router.coordinator(request, Resend::Idempotent, deadline).await {
            Ok(coordinator::Response::Map(map)) => {
                let kept = self.keep_map(&map).map_err(StartError::from);
                self.router.learn(map);
                let started = match kept {
                    Ok(()) => self.start_shards().await,
                    Err(error) => Err(error),
                };
                if let Err(error) = started {
                    self.failure.send_replace(Some(error.to_string()));
                }
            }
            Ok(coordinator::Response::MapUnchanged) => {}
            Ok(_) => tracing::warn!("the coordinator answered something else than a map"),
            Err(RouteError::Rejected(Reject::NodeTaken { node, address })) => {
                // Its shards would vote and acknowledge as if they had never promised anything.
                let reason = format!(
                    "node {node} of this cluster is known with another data folder, last at {address}: \
                     start it with that folder, or give this one an id that was never used"
                );
                self.failure.send_replace(Some(reason));
            }
            Err(error) => tracing::debug!(%error, "cannot register now"),
        }
    }

    /// Hands leaderships back to the nodes that should have them: one at a time, and only to a node
    /// that has kept up for a while, so that one that is just back is not buried in them.
    async fn share_leading(self: Arc<Node>) {
        let mut fit: BTreeMap<ShardId, u32> = BTreeMap::new();
        loop {
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = sleep(SHARE_INTERVAL) => {}
            }
            let preferred = self.router.map().preferred_leaders();
            let shards: Vec<(ShardId, Shard)> =
                self.shards.read().iter().map(|(id, shard)| (*id, shard.clone())).collect();
            let mut handed_over = false;
            for (id, shard) in shards {
                let wanted = preferred.get(usize::from(id.0)).filter(|node| **node != self.record.id);
                let ready = wanted.filter(|node| {
                    let followers = shard.group().followers();
                    let follower = followers.iter().find(|follower| follower.node == **node);
                    follower.is_some_and(|follower| follower.behind <= BEHIND_MAX && follower.answers())
                });
                let Some(node) = ready else {
                    fit.remove(&id);
                    continue;
                };
                let times = fit.entry(id).or_default();
                *times += 1;
                if *times >= FIT_TIMES && !handed_over {
                    handed_over = true;
                    fit.remove(&id);
                    if let Err(error) = shard.group().transfer_leader(*node, TRANSFER_PATIENCE).await {
                        tracing::debug!(shard = %id, %error, "leadership was not handed over");
                    }
                }
            }
        }
    }

    /// Hands all leaderships over that others can have, and tells whether there were any.
    pub async fn hand_over(&self) -> bool {
        let shards: Vec<(ShardId, Shard)> =
            self.shards.read().iter().map(|(id, shard)| (*id, shard.clone())).collect();
        let handed_over = join_all(shards.iter().map(async |(id, shard)| {
            let followers = shard.group().followers();
            let mut fit: Vec<&Follower> = followers.iter().filter(|follower| follower.answers()).collect();
            let least = fit.iter().map(|follower| follower.behind).min().unwrap_or(0);
            fit.retain(|follower| follower.behind == least);
            // Not all to the same one.
            let turn = usize::from(id.0) % fit.len().max(1);
            let Some(to) = fit.get(turn) else { return false };
            shard.group().transfer_leader(to.node, STOP_PATIENCE).await.is_ok()
        }));
        handed_over.await.contains(&true)
    }

    fn first_failure(&self) -> Option<String> {
        self.shards.read().values().find_map(Shard::failure)
    }

    /// Gives up old versions and outcomes, now and then.
    async fn retire(self: Arc<Node>) {
        let mut collected: BTreeMap<ShardId, (Timestamp, Timestamp)> = BTreeMap::new();
        loop {
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = sleep(self.config.retire_interval) => {}
            }
            let round = self.retire_once(&mut collected);
            tokio::select! {
                () = self.stop.cancelled() => return,
                result = round => if let Err(error) = result {
                    tracing::error!(%error, "cannot collect old versions");
                }
            }
        }
    }

    async fn retire_once(&self, collected: &mut BTreeMap<ShardId, (Timestamp, Timestamp)>) -> io::Result<()> {
        let request = coordinator::Request::Timestamps { count: 1 };
        let deadline = Instant::now() + Duration::from_secs(2);
        let now = match self.router.coordinator(request, Resend::Idempotent, deadline).await {
            Ok(coordinator::Response::Timestamps { first, .. }) => first,
            Ok(_) | Err(_) => return Ok(()),
        };
        let shards: Vec<(ShardId, Shard)> =
            self.shards.read().iter().map(|(id, shard)| (*id, shard.clone())).collect();
        let safe_point = now.minus(self.config.version_retention);
        let outcomes_before = now.minus(self.config.outcome_retention);
        // One shard that cannot now must not keep the others from it.
        let proposals = shards
            .iter()
            .map(|(_, shard)| timeout(RETIRE_TIMEOUT, shard.retire(safe_point, outcomes_before)));
        join_all(proposals).await;
        for (id, shard) in shards {
            let reached = (shard.safe_point(), shard.last_commit());
            let before = collected.get(&id).copied().unwrap_or_default();
            // Nothing to forget if nothing was written since the safe point of the last time.
            if reached.0 > before.0 && reached.1 > before.0 {
                self.collect(&shard, id, reached.0).await?;
                collected.insert(id, reached);
            }
        }
        Ok(())
    }

    async fn collect(&self, shard: &Shard, id: ShardId, safe_point: Timestamp) -> io::Result<()> {
        let mut next = None;
        let mut total = 0;
        loop {
            let store = self.store.clone();
            let step = move || {
                let mut batch = store.batch();
                let (next, removed) = gc::collect(&store, id, safe_point, next, COLLECT_STEP, &mut batch)?;
                batch.commit()?;
                Ok::<_, io::Error>((next, removed))
            };
            // Were a snapshot put in place in the middle, it could bring back an old version whose
            // newer ones this step removes.
            let held = shard.group().hold_state().await;
            let (after, removed) = spawn_blocking(step).await.map_err(io::Error::other)??;
            drop(held);
            total += removed;
            next = after;
            if next.is_none() {
                break;
            }
        }
        if total > 0 {
            tracing::debug!(shard = %id, removed = total, "collected old versions");
        }
        Ok(())
    }

    fn shard(&self, id: ShardId) -> Result<Shard, Reject> {
        let shard = self.shards.read().get(&id).cloned();
        shard.ok_or_else(|| Reject::StaleMap { epoch: self.router.map().epoch })
    }

    fn knowledge(&self, txn: TxnId) -> Result<TxnKnowledge, Reject> {
        let unreadable = |error: io::Error| Reject::Internal { reason: error.to_string() };
        let shards: Vec<Shard> = self.shards.read().values().cloned().collect();
        let mut known = Vec::new();
        for shard in shards {
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
                Request::Shard { shard, request } => match node.shard(shard) {
                    Ok(shard) => shard.handle(request, deadline).await.map(Response::Shard),
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
                    let shards: Vec<Shard> = node.shards.read().values().cloned().collect();
                    let in_doubt = shards.iter().flat_map(Shard::in_doubt).collect();
                    Ok(Response::Admin(admin::Response::InDoubt(in_doubt)))
                }
                Request::Admin(admin::Request::Txn { txn }) => {
                    node.knowledge(txn).map(|known| Response::Admin(admin::Response::Txn(known)))
                }
                Request::Admin(admin::Request::Resolve { shard, txn, decision, note }) => {
                    let resolved = node.resolve(shard, txn, decision, note).await;
                    resolved.map(|()| Response::Admin(admin::Response::Resolved))
                }
                Request::Admin(admin::Request::Switchover { .. }) => {
                    Err(Reject::malformed("only coordinators have a switchover"))
                }
                Request::Admin(admin::Request::Status) => {
                    Ok(Response::Admin(admin::Response::Participant(node.status())))
                }
                Request::Coordinator(_) => Err(Reject::malformed("this is a participant, not a coordinator")),
            };
            answer.unwrap_or_else(Response::Rejected)
        })
    }
}
