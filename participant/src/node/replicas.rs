//! Which replicas a node has: those that the cluster map gives it, and no others.
//!
//! The node makes itself known to the coordinators again and again, as a sign of life, and learns of
//! every new map at once, since the answer waits for one. It starts no replica, and so neither votes nor serves,
//! before the coordinators have admitted this start of it: they remember the one before, and whether the folder has
//! forgotten anything since.
//!
//! ```text
//!  the map says                     what the node does
//!  a replica since the beginning    starts it, and founds the group with the others
//!  on its way here                  starts it empty, and waits to be taken into the group
//!  not here (any more)              stops it, and removes all of it but the vote
//! ```

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use troth_protocol::message::coordinator::{self, Heard};
use troth_protocol::message::overview::NodeReport;
use troth_protocol::mutation::{self, Bug};
use troth_protocol::net::Peer;
use troth_protocol::routing::{Resend, RouteError, Router};
use troth_protocol::wire::{decode, encode};
use troth_protocol::{ClusterMap, GroupId, Incarnation, MapEpoch, NodeId, Reject, ShardId};
use troth_replication::families::META;
use troth_replication::{Directory, GroupConfig, StartError, erase, is_known};

use super::Node;
use crate::records::{damaged, node_key};
use crate::shard::Shard;
use crate::shard::driver::Context;
use crate::shard::machine::spans;

/// The pause between signs of life: while the node waits for its first map, after a failure, and
/// otherwise at least.
const EAGERLY: Duration = Duration::from_millis(50);
const AFTER_FAILURE: Duration = Duration::from_millis(500);
const REGULARLY: Duration = Duration::from_millis(200);

/// How long a coordinator may take to answer a sign of life.
const PATIENCE: Duration = Duration::from_secs(3);

/// How long it may take to the last sign of life.
const FAREWELL_PATIENCE: Duration = Duration::from_secs(1);

/// How long another process that is alive elsewhere under the same id is given to end.
const ELSEWHERE_PATIENCE: Duration = Duration::from_secs(20);

/// Transactions in doubt that a sign of life names, and from which age on.
const IN_DOUBT_MAX: usize = 20;
const IN_DOUBT_AGE_MS: u64 = 1000;

/// Where the replicas of shards are, by the newest map.
struct MapDirectory(Arc<Router>);

impl Directory for MapDirectory {
    fn peer(&self, _: GroupId, node: NodeId) -> Option<Peer> {
        self.0.map().node(node).map(|node| Peer::participant(&node.address))
    }

    fn admits(&self, _: GroupId, node: NodeId, incarnation: Incarnation) -> bool {
        self.0.map().node(node).is_some_and(|node| node.incarnation == incarnation)
            || mutation::on(Bug::AcceptsAnOlderCopy)
    }

    fn committed(&self, group: GroupId) -> Option<troth_protocol::message::raft::LogId> {
        match group {
            GroupId::Shard(shard) => self.0.map().formed.get(usize::from(shard.0)).copied().flatten(),
            GroupId::Coordinator => None,
        }
    }
}

impl Node {
    pub(super) fn stored_map(&self) -> io::Result<Option<ClusterMap>> {
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

    /// Starts and stops replicas, until they are those that the map gives this node.
    pub(super) async fn follow(&self, map: &ClusterMap) -> Result<(), StartError> {
        for shard in (0..map.shards).map(ShardId) {
            let held = map.members_of(shard).contains(&self.record.id);
            let running = self.shards.read().get(&shard).cloned();
            match running {
                Some(_) if held => {}
                None if held => {
                    let started = self.start_replica(shard, map).await?;
                    self.shards.write().insert(shard, started);
                }
                Some(replica) => {
                    tracing::info!(%shard, "the shard has left this node");
                    self.shards.write().remove(&shard);
                    replica.shutdown().await;
                    self.remove_replica(shard).await?;
                }
                // A crash may have come in between.
                None if is_known(&self.store, GroupId::Shard(shard))? => self.remove_replica(shard).await?,
                None => {}
            }
        }
        Ok(())
    }

    async fn remove_replica(&self, shard: ShardId) -> Result<(), StartError> {
        erase(&self.writer, GroupId::Shard(shard), &spans(shard)).await?;
        self.store.reclaim(spans(shard)).await?;
        Ok(())
    }

    async fn start_replica(&self, shard: ShardId, map: &ClusterMap) -> Result<Shard, StartError> {
        let replicas = map.replicas_of(shard);
        // Only those that were there from the beginning found the group.
        let founds = replicas.contains(&self.record.id) && map.formed[usize::from(shard.0)].is_none();
        let members = if founds { replicas } else { &[] };
        let config = GroupConfig {
            group: GroupId::Shard(shard),
            node: self.record.id,
            incarnation: self.record.incarnation,
            members: members.iter().copied().collect(),
            transport: self.router.transport().clone(),
            directory: Arc::new(MapDirectory(self.router.clone())),
            timing: self.config.timing,
            log_entries_max: self.config.log_entries_max,
            throttle: Some(self.throttle.clone()),
        };
        let context = Context {
            store: self.store.clone(),
            writer: self.writer.clone(),
            router: self.router.clone(),
            hearing: self.hearing.clone(),
            clock: self.clock.clone(),
            timeline: self.timeline.clone(),
            metrics: self.metrics.clone(),
            disk_reads: self.disk_reads.clone(),
        };
        Shard::start(shard, config, context).await
    }

    pub(super) async fn stay_registered(self: Arc<Node>) {
        loop {
            let known = self.router.map().epoch;
            let registered = tokio::select! {
                () = self.stop.cancelled() => return,
                registered = self.register(known) => registered,
            };
            if let Some(reason) = self.first_failure() {
                self.failure.send_replace(Some(reason));
                return;
            }
            let pause = match registered {
                _ if known == MapEpoch(0) => EAGERLY,
                true => REGULARLY,
                false => AFTER_FAILURE,
            };
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = sleep(pause) => {}
            }
        }
    }

    /// Gives a sign of life, and follows the map that comes back. Tells whether a coordinator answered.
    async fn register(&self, known: MapEpoch) -> bool {
        let deadline = Instant::now() + PATIENCE;
        // What it has heard may change between two attempts.
        let sign = |previous| move || self.sign(previous, known);
        let first = sign(self.incarnations.previous());
        let mut answer = self.router.coordinator_afresh(first, Resend::Idempotent, deadline).await;
        if let Err(RouteError::Rejected(Reject::NodePassed { incarnation, progress, .. })) = &answer
            && self.incarnations.follows(*incarnation)
            && *progress <= self.store.progress()
            && !*self.admitted.borrow()
        {
            let again = sign(Some(*incarnation));
            answer = self.router.coordinator_afresh(again, Resend::Idempotent, deadline).await;
        }
        match answer {
            Ok(coordinator::Response::Registered { heard, map }) => {
                if let Err(error) = self.registered(heard, map).await {
                    self.failure.send_replace(Some(error.to_string()));
                }
                return true;
            }
            Ok(_) => tracing::warn!("the coordinator answered something else"),
            Err(RouteError::Rejected(reject)) => match self.refused(&reject) {
                Some(reason) => {
                    self.say_why_it_ends(&reason).await;
                    self.failure.send_replace(Some(reason));
                }
                None => tracing::debug!(%reject, "cannot register now"),
            },
            Err(error) => tracing::debug!(%error, "cannot register now"),
        }
        false
    }

    /// A sign of life.
    fn sign(&self, previous: Option<Incarnation>, known: MapEpoch) -> coordinator::Request {
        coordinator::Request::Register {
            node: self.record.clone(),
            folder: self.folder,
            previous,
            progress: self.store.progress(),
            heard: self.hearing.heard(),
            known,
            report: self.report(),
        }
    }

    /// The coordinators have admitted this start.
    async fn registered(&self, heard: Heard, map: Option<ClusterMap>) -> Result<(), StartError> {
        if !self.hearing.hear(heard, &self.writer).await? {
            tracing::warn!(lineage = %heard.lineage, epoch = %heard.epoch, "a coordinator that knows too little is not obeyed");
            return Ok(());
        }
        if let Some(map) = map {
            self.keep_map(&map)?;
            self.router.learn(map);
        }
        let first = !*self.admitted.borrow();
        self.follow(&self.router.map()).await?;
        if first {
            self.admitted.send_replace(true);
        }
        Ok(())
    }

    /// Why this node must not go on, if a refusal says so.
    fn refused(&self, reject: &Reject) -> Option<String> {
        match reject {
            // Its shards would vote and acknowledge as if they had never promised anything.
            Reject::NodeTaken { node, address } => Some(format!(
                "node {node} of this cluster is known with another data folder, last at {address}: \
                 start it with that folder, or give this one an id that was never used"
            )),
            Reject::NodeRemoved { node } => Some(format!(
                "node {node} was removed from this cluster: its data folder can be deleted; \
                 to use this machine again, give it an id that was never used, and an empty folder"
            )),
            Reject::NodePassed { node, incarnation, progress, address } => {
                let own = self.store.progress();
                let older =
                    *incarnation == self.record.incarnation || self.incarnations.follows(*incarnation);
                Some(if older {
                    format!(
                        "the data folder of node {node} is an older copy: {progress} synced batches are known of it, \
                         last at {address}, and here are {own}. Put the newest folder back; if that cannot be: see \
                         \"A data folder that is lost, or old\" in docs/operations.md"
                    )
                } else {
                    format!(
                        "the data folder of node {node} is a copy: another process was started from this folder, or \
                         from a newer one, last at {address}, and only one may run. Put the newest folder back, and \
                         start one process; if that cannot be: see \"A data folder that is lost, or old\" in docs/operations.md"
                    )
                })
            }
            Reject::NodeElsewhere { node, address } => {
                let waited = *self.elsewhere_since.lock().get_or_insert_with(Instant::now);
                (waited.elapsed() >= ELSEWHERE_PATIENCE).then(|| {
                    format!(
                        "node {node} runs already, at {address}: stop one of the two processes; only the newest data \
                         folder may be used"
                    )
                })
            }
            _ => None,
        }
    }

    /// Tells the coordinators that this node ends, for those who look at them.
    async fn say_why_it_ends(&self, reason: &str) {
        let (server, reason) = (format!("participant {}", self.record.id), reason.to_owned());
        let request = coordinator::Request::Ends { server, reason };
        let deadline = Instant::now() + FAREWELL_PATIENCE;
        if let Err(error) = self.router.coordinator(request, Resend::Idempotent, deadline).await {
            tracing::debug!(%error, "nobody is told why this node ends");
        }
    }

    /// Tells the coordinators how far this folder was, as nobody may know less of it when it comes back.
    pub(super) async fn say_farewell(&self) {
        let farewell = self.sign(self.incarnations.previous(), MapEpoch(0));
        let deadline = Instant::now() + FAREWELL_PATIENCE;
        if let Err(error) = self.router.coordinator(farewell, Resend::Idempotent, deadline).await {
            tracing::debug!(%error, "nobody is told how far this node was");
        }
    }

    fn report(&self) -> NodeReport {
        let shards = self.shards();
        let mut in_doubt: Vec<_> = shards.iter().flat_map(Shard::in_doubt).collect();
        in_doubt.retain(|record| record.age_ms >= IN_DOUBT_AGE_MS);
        in_doubt.sort_by_key(|record| record.txn);
        in_doubt.truncate(IN_DOUBT_MAX);
        NodeReport { shards: shards.iter().map(Shard::report).collect(), in_doubt }
    }
}
