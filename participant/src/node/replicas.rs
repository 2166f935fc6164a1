//! Which replicas a node has: those that the cluster map gives it, and no others.
//!
//! The node makes itself known to the coordinators again and again, as a sign of life, and learns of
//! every new map at once, since the answer waits for one. The last map is kept on disk, so that a node
//! can start while no coordinator can be reached.
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
use troth_protocol::message::coordinator;
use troth_protocol::message::overview::NodeReport;
use troth_protocol::net::Peer;
use troth_protocol::routing::{Resend, RouteError, Router};
use troth_protocol::wire::{decode, encode};
use troth_protocol::{ClusterMap, GroupId, MapEpoch, NodeId, Reject, ShardId};
use troth_replication::families::META;
use troth_replication::{Directory, GroupConfig, StartError, erase, is_known};

use super::{Node, damaged, node_key};
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

/// Transactions in doubt that a sign of life names, and from which age on.
const IN_DOUBT_MAX: usize = 20;
const IN_DOUBT_AGE_MS: u64 = 1000;

/// Where the replicas of shards are, by the newest map.
struct MapDirectory(Arc<Router>);

impl Directory for MapDirectory {
    fn peer(&self, _: GroupId, node: NodeId) -> Option<Peer> {
        self.0.map().node(node).map(|node| Peer::participant(&node.address))
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
        let request = coordinator::Request::Register {
            node: self.record.clone(),
            folder: self.folder,
            known,
            report: self.report(),
        };
        let deadline = Instant::now() + PATIENCE;
        match self.router.coordinator(request, Resend::Idempotent, deadline).await {
            Ok(coordinator::Response::Map(map)) => {
                let kept = self.keep_map(&map).map_err(StartError::from);
                self.router.learn(map.clone());
                let followed = match kept {
                    Ok(()) => self.follow(&map).await,
                    Err(error) => Err(error),
                };
                if let Err(error) = followed {
                    self.failure.send_replace(Some(error.to_string()));
                }
                return true;
            }
            Ok(coordinator::Response::MapUnchanged) => return true,
            Ok(_) => tracing::warn!("the coordinator answered something else than a map"),
            Err(RouteError::Rejected(Reject::NodeTaken { node, address })) => {
                // Its shards would vote and acknowledge as if they had never promised anything.
                let reason = format!(
                    "node {node} of this cluster is known with another data folder, last at {address}: \
                     start it with that folder, or give this one an id that was never used"
                );
                self.failure.send_replace(Some(reason));
            }
            Err(RouteError::Rejected(Reject::NodeRemoved { node })) => {
                let reason = format!(
                    "node {node} was removed from this cluster: its data folder can be deleted; \
                     to use this machine again, give it an id that was never used, and an empty folder"
                );
                self.failure.send_replace(Some(reason));
            }
            Err(error) => tracing::debug!(%error, "cannot register now"),
        }
        false
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
