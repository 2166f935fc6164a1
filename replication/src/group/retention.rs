//! How much of the log is kept.
//!
//! An entry that is in the state is needed only by members that do not have it yet. Some are kept for
//! those that are a little behind. More are kept while a snapshot is on its way to somebody, or a member
//! is catching up: what it needs next must still be there, or it would need another snapshot, for ever.

use std::sync::Arc;
use std::time::Duration;

use openraft::async_runtime::watch::WatchReceiver;
use openraft::{Instant as _, Raft};
use tokio::time::sleep;

use super::Group;
use crate::adapter::Adapter;
use crate::machine::Machine;
use crate::snapshot::outgoing::Outgoing;
use crate::types::Types;

/// How often the length of the log is looked at.
const INTERVAL: Duration = Duration::from_millis(500);

/// A log that is kept for somebody may grow to this many times its usual length.
const PATIENCE_FACTOR: u64 = 100;

/// A member that was not heard of for this long is not waited for.
const SILENT_MAX: Duration = Duration::from_secs(5);

impl<M: Machine> Group<M> {
    /// The first entry that the log still has.
    pub fn log_begins_at(&self) -> u64 {
        let metrics = self.inner.raft.metrics();
        let now = metrics.borrow_watched();
        now.purged.map_or(0, |purged| purged.index + 1)
    }

    /// Cuts the first entry off the log if that was never done, so that whoever comes new gets a snapshot
    /// and not the history: that is less, is throttled, and goes on from where it was after an
    /// interruption.
    pub async fn forget_the_beginning(&self) {
        let raft = &self.inner.raft;
        for _ in 0..BEGINNING_TRIES {
            {
                let metrics = raft.metrics();
                let now = metrics.borrow_watched();
                if now.purged.is_some() || now.last_applied.is_none() {
                    return;
                }
            }
            // Errors mean that the group has stopped.
            if raft.trigger().snapshot().await.is_err() || raft.trigger().purge_log(0).await.is_err() {
                return;
            }
            sleep(BEGINNING_PAUSE).await;
        }
    }
}

/// How often, and how long apart, it is tried to cut a log for the first time.
const BEGINNING_TRIES: u32 = 50;
const BEGINNING_PAUSE: Duration = Duration::from_millis(20);

/// Cuts the log, now and then, until the group has stopped. `entries_max`: it is cut after this many
/// entries that are in the state, and half of that is kept.
pub(super) async fn keep_log_short<M: Machine>(
    raft: Raft<Types, Adapter<M>>,
    outgoing: Arc<Outgoing>,
    entries_max: u64,
) {
    let metrics = raft.metrics();
    loop {
        sleep(INTERVAL).await;
        let (applied, purged, snapshot, slowest) = {
            let now = metrics.borrow_watched();
            let index = |id: &Option<crate::types::LogId>| id.map(|id| id.index);
            let heard = |node: &u64| {
                let heard = now.heartbeat.as_ref().and_then(|heard| heard.get(node).copied().flatten());
                heard.is_some_and(|heard| heard.elapsed() < SILENT_MAX)
            };
            let behind = now.replication.iter().flatten().filter(|(node, _)| **node != now.id && heard(node));
            let slowest = behind.filter_map(|(_, matched)| matched.map(|id| id.index)).min();
            (index(&now.last_applied).unwrap_or(0), index(&now.purged), index(&now.snapshot), slowest)
        };
        let kept_from = purged.map_or(0, |purged| purged + 1);
        if applied < kept_from + entries_max {
            continue;
        }
        let needed = [slowest, outgoing.oldest()].into_iter().flatten().min().unwrap_or(u64::MAX);
        let longest = applied.saturating_sub(PATIENCE_FACTOR * entries_max);
        let upto = (applied - entries_max / 2).min(needed).max(longest);
        if purged.is_some_and(|purged| upto <= purged + entries_max / 8) {
            continue;
        }
        // Only what a snapshot contains may go, and since the state on disk is the snapshot, to make one
        // is to note where it stands. An error means that the group has stopped.
        if snapshot < Some(upto) && raft.trigger().snapshot().await.is_err() {
            return;
        }
        if raft.trigger().purge_log(upto).await.is_err() {
            return;
        }
    }
}
