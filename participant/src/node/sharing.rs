//! Who of the replicas leads: every node its share.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::sleep;
use troth_protocol::ShardId;
use troth_replication::Follower;

use super::Node;
use crate::shard::Shard;

/// How often a node looks for leaderships that another one should have, and how often in a row that one
/// must have been found fit before it is handed one.
const SHARE_INTERVAL: Duration = Duration::from_millis(250);
const FIT_TIMES: u32 = 8;

/// Fit is who answers, and is this many entries behind at most.
const BEHIND_MAX: u64 = 256;

/// How long a change of leaders may take.
const TRANSFER_PATIENCE: Duration = Duration::from_secs(2);

/// The same before a stop. Not as long as it takes until others give leaderships back.
const STOP_PATIENCE: Duration = Duration::from_secs(1);

impl Node {
    /// Hands leaderships back to the nodes that should have them: one at a time, and only to a node
    /// that has kept up for a while, so that one that is just back is not buried in them.
    pub(super) async fn share_leading(self: Arc<Node>) {
        let mut fit: BTreeMap<ShardId, u32> = BTreeMap::new();
        loop {
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = sleep(SHARE_INTERVAL) => {}
            }
            let map = self.router.map();
            let preferred = map.preferred_leaders();
            let shards: Vec<(ShardId, Shard)> =
                self.shards.read().iter().map(|(id, shard)| (*id, shard.clone())).collect();
            let mut handed_over = false;
            for (id, shard) in shards {
                let wanted = preferred.get(usize::from(id.0)).filter(|node| **node != self.record.id);
                // A shard on its way has other worries.
                let wanted = wanted.filter(|_| map.move_of(id).is_none());
                let ready = wanted.filter(|node| {
                    let followers = shard.group().followers();
                    let follower = followers.iter().find(|follower| follower.node == **node);
                    follower.is_some_and(|follower| follower.behind <= BEHIND_MAX && follower.can_lead())
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
            let mut fit: Vec<&Follower> = followers.iter().filter(|follower| follower.can_lead()).collect();
            let least = fit.iter().map(|follower| follower.behind).min().unwrap_or(0);
            fit.retain(|follower| follower.behind == least);
            // Not all to the same one.
            let turn = usize::from(id.0) % fit.len().max(1);
            let Some(to) = fit.get(turn) else { return false };
            shard.group().transfer_leader(to.node, STOP_PATIENCE).await.is_ok()
        }));
        handed_over.await.contains(&true)
    }
}
