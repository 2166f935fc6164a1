//! Giving up old versions and outcomes.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep, timeout};
use troth_protocol::message::coordinator;
use troth_protocol::routing::Resend;
use troth_protocol::{ShardId, Timestamp};

use super::Node;
use crate::mvcc::gc;
use crate::shard::Shard;

/// How long the shards may take to note that old versions are given up.
const RETIRE_TIMEOUT: Duration = Duration::from_secs(5);

/// Versions that one step of garbage collection looks at.
const COLLECT_STEP: usize = 20_000;

impl Node {
    /// Gives up old versions and outcomes, now and then.
    pub(super) async fn retire(self: Arc<Node>) {
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
        let request = coordinator::Request::Timestamps { count: 1, begins: None };
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
            let Some(held) = shard.group().hold_state().await else { return Ok(()) };
            let (after, removed) = spawn_blocking(step).await.map_err(io::Error::other)??;
            drop(held);
            total += removed;
            next = after;
            if next.is_none() {
                break;
            }
        }
        self.metrics.collected(total as u64);
        if total > 0 {
            tracing::debug!(shard = %id, removed = total, "collected old versions");
        }
        Ok(())
    }
}
