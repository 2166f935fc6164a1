//! What an operator sees of a shard, and does to it.

use std::io;
use std::time::Duration;

use troth_protocol::message::admin::{Blocked, InDoubt, ShardStatus, TxnAtShard};
use troth_protocol::message::overview::ShardReport;
use troth_protocol::message::shard::{Decision, Request};
use troth_protocol::message::txn::Outcome;
use troth_protocol::{Key, Reject, Timestamp, TxnId};
use troth_replication::Leadership;

use super::Shard;
use crate::shard::leader::Leader;
use crate::shard::machine::{StoredView, spans};
use crate::shard::state::{Prepared, View as _};

/// Transactions in doubt that one answer names.
const IN_DOUBT_MAX: usize = 1000;

/// Reads that are named that wait for one of them.
const BLOCKED_MAX: usize = 4;

/// The oldest of these reads.
fn blocked<'a>(reads: impl Iterator<Item = (Timestamp, &'a Key)>) -> Vec<Blocked> {
    let mut blocked: Vec<Blocked> = reads.map(|(at, key)| Blocked { at, key: key.clone() }).collect();
    blocked.sort();
    blocked.truncate(BLOCKED_MAX);
    blocked
}

impl Shard {
    /// How it is.
    pub fn status(&self) -> ShardStatus {
        let inner = &self.inner;
        let core = inner.core.lock();
        let leader = match &*inner.group.leadership().borrow() {
            Leadership::Follower { leader } => *leader,
            Leadership::Leader { .. } => Some(inner.group.node()),
            Leadership::Failed { .. } => None,
        };
        ShardStatus {
            shard: inner.shard,
            leader,
            serving: core.leader.is_some() && !inner.group.is_stalled() && inner.group.is_led(),
            lead: core.state.marks().lead,
            applied: inner.group.applied(),
            prepared: core.state.prepared().len() as u64,
            locks: core.state.locks().len() as u64,
            waiting: core.leader.as_ref().map_or(0, Leader::waiting) as u64,
        }
    }

    /// The age of the oldest transaction that is prepared here, if this replica leads.
    pub fn oldest_in_doubt(&self) -> Option<Duration> {
        let core = self.inner.core.lock();
        let oldest = core.leader.as_ref().and_then(|_| core.state.prepared().keys().next())?;
        Some(Duration::from_millis(self.inner.clock.millis().saturating_sub(oldest.start.millis())))
    }

    /// How it is, for a sign of life.
    pub fn report(&self) -> ShardReport {
        let inner = &self.inner;
        let ShardStatus { shard, serving, lead, prepared, locks, waiting, .. } = self.status();
        let bytes = inner.store.size(&spans(shard));
        ShardReport { shard, serving, lead, prepared, locks, waiting, bytes, moving: inner.progress() }
    }

    /// The transactions that are prepared here, if this replica leads; by age.
    pub fn in_doubt(&self) -> Vec<InDoubt> {
        let inner = &self.inner;
        let now = inner.clock.millis();
        let core = inner.core.lock();
        let Some(leader) = &core.leader else {
            return Vec::new();
        };
        let record = |(txn, record): (&TxnId, &Prepared)| InDoubt {
            txn: *txn,
            shard: inner.shard,
            age_ms: now.saturating_sub(txn.start.millis()),
            epoch: record.epoch,
            participants: record.participants.clone(),
            writes: record.work.writes.len() as u64,
            locks: record.work.keys() as u64,
            waiting: leader.waiting_for(*txn).len() as u64,
            blocked: blocked(leader.waiting_for(*txn)),
        };
        core.state.prepared().iter().take(IN_DOUBT_MAX).map(record).collect()
    }

    /// What this replica knows of a transaction; `None`: nothing.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub fn knowledge(&self, txn: TxnId) -> io::Result<Option<TxnAtShard>> {
        let inner = &self.inner;
        let leads = matches!(&*inner.group.leadership().borrow(), Leadership::Leader { .. });
        let core = inner.core.lock();
        let prepared = core.state.prepared().get(&txn).map(|record| record.participants.clone());
        let ended = StoredView::new(&inner.store, inner.shard).outcome(txn)?.map(|outcome| match outcome {
            Outcome::Committed { commit_ts } => Decision::Commit { commit_ts },
            Outcome::Aborted { .. } => Decision::Abort,
        });
        if prepared.is_none() && ended.is_none() {
            return Ok(None);
        }
        let floor = core.state.prepared().get(&txn).map_or(Timestamp::ZERO, |record| record.floor);
        let read = core.leader.as_ref().map_or(Timestamp::ZERO, |leader| leader.vote_above(&core.state));
        let above = floor.max(core.state.marks().last_commit).max(read);
        Ok(Some(TxnAtShard { shard: inner.shard, leads, prepared, ended, above }))
    }

    /// Ends a prepared transaction by an operator's word.
    ///
    /// # Errors
    /// If this replica does not lead its group, or the transaction is not prepared here, or cannot
    /// commit at that moment.
    pub async fn resolve(&self, txn: TxnId, decision: Decision) -> Result<(), Reject> {
        let inner = &self.inner;
        let epoch = {
            let core = inner.core.lock();
            let Some(record) = core.state.prepared().get(&txn) else {
                return Err(Reject::malformed(format!("{txn} is not prepared at shard {}", inner.shard)));
            };
            // What others have committed here since is no obstacle: its locks have stood all the time.
            if let Decision::Commit { commit_ts } = decision
                && commit_ts <= record.floor
            {
                return Err(Reject::malformed(format!("{txn} cannot commit at {commit_ts} any more")));
            }
            core.state.marks().epoch
        };
        inner.core.note(txn, "ended by an operator");
        // By the leader, as a coordinator's: what it lets commit after that must be later.
        inner.answer(Request::Finish { epoch, decisions: vec![(txn, decision)] }).await?;
        Ok(())
    }
}
