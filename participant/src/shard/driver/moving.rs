//! Taking a shard to other nodes: what its leader does when the cluster map says so.
//!
//! ```text
//!  newcomers become learners ─► receive the shard ─► catch up ─► this leader stays?
//!                                                                 │ no: hands leadership to one that does
//!                                                                 ▼ yes
//!                    the coordinators are told ◄─ committed ◄─ the voters are changed
//! ```
//!
//! Every step looks at the group as it is and does what is missing. So whoever leads goes on where
//! another one has stopped, and a shard that is sent elsewhere on its way turns around.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::time::sleep;
use troth_protocol::message::admin::FaultPoint;
use troth_protocol::message::coordinator::Request;
use troth_protocol::message::overview::{MoveStage, Moving};
use troth_protocol::routing::{Resend, RouteError};
use troth_protocol::{ClusterMap, MapEpoch, Move, NodeId, fault};
use troth_replication::{Follower, Leadership, ProposeError, SnapshotBytes};

use super::{ASK_TIMEOUT, Inner};

/// How often it is looked at what is missing.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// How often it is looked at whether the group is what the map says, while nothing moves.
const KEEP_INTERVAL: Duration = Duration::from_secs(2);

/// A newcomer that is this many entries behind at most has caught up.
const BEHIND_MAX: u64 = 200;

/// How long telling how much was sent may take: nothing but a count depends on it.
const REPORT_TIMEOUT: Duration = Duration::from_millis(200);

/// How long handing leadership over may take.
const TRANSFER_PATIENCE: Duration = Duration::from_secs(2);

/// A move that this leader is at.
#[derive(Clone)]
pub(super) struct Underway {
    stage: MoveStage,
    began: Instant,
    /// Bytes that had left in snapshots before it began.
    before: SnapshotBytes,
    /// Bytes that had left, and that the coordinators know of.
    reported: u64,
}

/// What is missing could not be done now.
#[derive(Debug, thiserror::Error)]
enum Hindrance {
    #[error("{0}")]
    Group(#[from] ProposeError),
    #[error("{0}")]
    Coordinators(#[from] RouteError),
}

impl Inner {
    /// Takes the shard wherever the map says, whenever this replica leads.
    pub(super) async fn follow_moves(self: Arc<Inner>) {
        let mut maps = self.router.follow_map();
        let mut leadership = self.group.leadership();
        let follow = async {
            loop {
                let step = maps.borrow_and_update().move_of(self.shard).cloned();
                let leads = matches!(&*leadership.borrow_and_update(), Leadership::Leader { .. });
                let work = async {
                    if let Some(step) = &step {
                        // Also where it follows: it may be the next one to send.
                        self.group.forget_the_beginning().await;
                        if leads {
                            self.carry_out(step).await;
                        }
                    } else if leads {
                        self.keep_members().await;
                    }
                    std::future::pending::<()>().await;
                };
                let ended = tokio::select! {
                    () = work => false,
                    ended = until_other(&mut maps, &step, &self) => ended,
                    changed = leadership.changed() => changed.is_err(),
                };
                *self.moving.lock() = None;
                if ended {
                    return;
                }
            }
        };
        self.stop.run_until_cancelled(follow).await;
    }

    /// Does what is missing until nothing is.
    async fn carry_out(&self, step: &Move) {
        let before = self.group.snapshot_bytes();
        let began = Instant::now();
        *self.moving.lock() =
            Some(Underway { stage: MoveStage::Joining, began, before, reported: before.sent });
        loop {
            match self.advance(step).await {
                Ok(true) => return,
                Ok(false) => {}
                Err(error) => tracing::debug!(shard = %self.shard, %error, "the move has to wait"),
            }
            sleep(LOOK_INTERVAL).await;
        }
    }

    /// Sees to it that the group is what the map says also while nothing moves. It is, unless the coordinators
    /// took one leader's word for the end of a move while another one that had not heard of that move went on
    /// with the one before. Who has no replica any more, by the map, has erased it, and may have a vote.
    async fn keep_members(&self) {
        // The map by which they were found to be others.
        let mut differs_from: Option<MapEpoch> = None;
        loop {
            sleep(if differs_from.is_some() { LOOK_INTERVAL } else { KEEP_INTERVAL }).await;
            let map = self.router.map();
            let replicas = map.replicas_of(self.shard);
            if differs_from.is_some_and(|epoch| epoch == map.epoch) {
                let step = Move { shard: self.shard, to: replicas.to_vec() };
                match self.advance(&step).await {
                    Ok(true) => differs_from = None,
                    Ok(false) => {}
                    Err(error) => {
                        tracing::debug!(shard = %self.shard, %error, "the members have to wait");
                    }
                }
                continue;
            }
            let members = self.group.members();
            let wanted: BTreeSet<NodeId> = replicas.iter().copied().collect();
            let others = members.voters != wanted || !members.learners.is_empty() || members.joint;
            differs_from = None;
            if others && !replicas.is_empty() {
                tracing::warn!(shard = %self.shard, ?members, ?replicas, "the group is not what the map says");
                differs_from = Some(map.epoch);
                // A map that is on its way may say more.
                sleep(KEEP_INTERVAL).await;
            }
        }
    }

    /// Does the next step. True: the shard has arrived, and the coordinators know.
    async fn advance(&self, step: &Move) -> Result<bool, Hindrance> {
        let (group, own) = (&self.group, self.group.node());
        let wanted: BTreeSet<NodeId> = step.to.iter().copied().collect();
        let members = group.members();
        if !members.committed {
            return Ok(false);
        }
        if members.joint {
            self.stage(MoveStage::Changing);
            group.finish_change().await?;
            return Ok(false);
        }
        let unwanted: BTreeSet<NodeId> = members.learners.difference(&wanted).copied().collect();
        if !unwanted.is_empty() {
            group.remove_learners(&unwanted).await?;
            return Ok(false);
        }
        if members.voters == wanted {
            self.stage(MoveStage::Reporting);
            fault::pass(FaultPoint::BeforeMoved).await;
            // One that was deposed and does not know it would report members of long ago.
            group.read_barrier().await?;
            if group.members() != members {
                return Ok(false);
            }
            let formed = members.set_by.expect("a configuration that is committed has an entry");
            let voters = step.to.clone();
            self.report_bytes().await;
            let request = Request::Moved { shard: self.shard, voters, formed };
            let deadline = tokio::time::Instant::now() + ASK_TIMEOUT;
            self.router.coordinator(request, Resend::Idempotent, deadline).await?;
            return Ok(true);
        }
        let newcomers = wanted.iter().filter(|node| !members.voters.contains(node));
        let strangers: Vec<NodeId> =
            newcomers.clone().filter(|node| !members.learners.contains(node)).copied().collect();
        if !strangers.is_empty() {
            self.stage(MoveStage::Joining);
            for node in strangers {
                tracing::info!(shard = %self.shard, %node, "a replica is taken in");
                group.add_learner(node).await?;
            }
            return Ok(false);
        }
        let followers = group.followers();
        let follower = |node: &NodeId| followers.iter().find(|follower| follower.node == *node);
        // Who has the entry that took it in has all that the shard had then.
        let taken_in = members.set_by.map(|id| id.index);
        let ready = |follower: &Follower| {
            follower.answers() && follower.matched >= taken_in && follower.behind <= BEHIND_MAX
        };
        if !newcomers.clone().all(|node| follower(node).is_some_and(ready)) {
            let copying = !group.transfers().is_empty();
            self.stage(if copying { MoveStage::Copying } else { MoveStage::CatchingUp });
            return Ok(false);
        }
        fault::pass(FaultPoint::BeforeChange).await;
        if wanted.contains(&own) {
            self.stage(MoveStage::Changing);
            group.change_voters(&wanted).await?;
            return Ok(false);
        }
        // Somebody who stays shall lead, before this one loses its vote.
        let staying = members.voters.intersection(&wanted).filter_map(follower).filter(|f| f.answers());
        match staying.min_by_key(|follower| follower.behind) {
            Some(successor) => {
                self.stage(MoveStage::HandingOver);
                self.report_bytes().await;
                group.transfer_leader(successor.node, TRANSFER_PATIENCE).await?;
            }
            // Nobody does who has a vote yet.
            None if members.voters.is_disjoint(&wanted) => {
                self.stage(MoveStage::Changing);
                group.change_voters(&members.voters.union(&wanted).copied().collect()).await?;
            }
            None => {}
        }
        Ok(false)
    }

    fn stage(&self, stage: MoveStage) {
        if let Some(underway) = &mut *self.moving.lock() {
            underway.stage = stage;
        }
    }

    /// Tells the coordinators how many bytes this leader has sent that it has not told of. Each is told of
    /// at most once.
    async fn report_bytes(&self) {
        let sent = self.group.snapshot_bytes().sent;
        let bytes = {
            let mut moving = self.moving.lock();
            let Some(underway) = &mut *moving else { return };
            sent - std::mem::replace(&mut underway.reported, sent)
        };
        if bytes == 0 {
            return;
        }
        let deadline = tokio::time::Instant::now() + REPORT_TIMEOUT;
        let told = self.router.coordinator(Request::Carried { bytes }, Resend::OnlyUnsent, deadline).await;
        if let Err(error) = told {
            tracing::debug!(shard = %self.shard, bytes, %error, "nobody counts what was sent");
            if !error.is_ambiguous()
                && let Some(underway) = &mut *self.moving.lock()
            {
                underway.reported -= bytes;
            }
        }
    }

    /// How far this leader is, if the shard is on its way.
    pub(super) fn progress(&self) -> Option<Moving> {
        let underway = self.moving.lock().clone()?;
        let transfers = self.group.transfers();
        let shares: Option<Vec<f64>> = transfers.iter().map(|transfer| transfer.share).collect();
        let permille = shares.filter(|shares| !shares.is_empty()).map(|shares| {
            let mean = shares.iter().sum::<f64>() / shares.len() as f64;
            (mean * 1000.0) as u32
        });
        let now = self.group.snapshot_bytes();
        Some(Moving {
            stage: underway.stage,
            sent: now.sent - underway.before.sent,
            known: now.known - underway.before.known,
            permille,
            taken_ms: underway.began.elapsed().as_millis() as u64,
        })
    }
}

/// Returns when the map says something else of a shard than that step; true: there are no more maps.
async fn until_other(
    maps: &mut watch::Receiver<Arc<ClusterMap>>,
    step: &Option<Move>,
    inner: &Inner,
) -> bool {
    maps.wait_for(|map| map.move_of(inner.shard) != step.as_ref()).await.is_err()
}
