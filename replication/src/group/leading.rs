//! Who leads a group: following it, giving it up, handing it over.

use std::collections::BTreeSet;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use openraft::{Raft, ServerState};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use troth_protocol::{GroupId, NodeId};

use super::{Group, ProposeError, Sole, Timing};
use crate::adapter::Adapter;
use crate::machine::Machine;
use crate::rocks::Store;
use crate::types::{self, Types};

/// A follower that was not heard of for this long is not fit to lead.
const SILENT_MAX: Duration = Duration::from_millis(500);

/// A group that nothing was heard of its leader for this long has none.
const UNHEARD_MAX: Duration = Duration::from_secs(2);

/// The role of a member.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Leadership {
    /// It follows, or there is no leader.
    Follower {
        /// Who leads, as far as it knows.
        leader: Option<NodeId>,
    },
    /// It leads, and has applied everything that earlier leaders committed.
    Leader {
        /// Its term.
        term: u64,
    },
    /// It has stopped for good.
    Failed {
        /// Why.
        reason: String,
    },
}

/// Another member, as the leader sees it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Follower {
    /// Which.
    pub node: NodeId,
    /// It has a vote, and so can lead.
    pub votes: bool,
    /// The last entry that it is known to have; `None`: it is not known to have any.
    pub matched: Option<u64>,
    /// Entries that it does not have yet.
    pub behind: u64,
    /// Since when nothing was heard of it; `None`: since it is led from here.
    pub silent: Option<Duration>,
}

impl Follower {
    /// Whether it was heard of lately.
    pub fn answers(&self) -> bool {
        self.silent.is_some_and(|silent| silent < SILENT_MAX)
    }

    /// Whether it may be handed the leadership: it has a vote, and was heard of lately.
    pub fn can_lead(&self) -> bool {
        self.votes && self.answers()
    }
}

impl<M: Machine> Group<M> {
    /// Follows the role of this member for ever. With every change `depose` is called, and then, if it
    /// leads now, `lead`, which is dropped with the next change.
    pub async fn follow_leadership<F>(&self, mut depose: impl FnMut(), lead: impl Fn() -> F)
    where
        F: Future<Output = ()>,
    {
        let mut leadership = self.leadership();
        loop {
            let role = leadership.borrow_and_update().clone();
            depose();
            let leading = async {
                if let Leadership::Leader { .. } = role {
                    lead().await;
                }
                std::future::pending::<()>().await;
            };
            tokio::select! {
                () = leading => {}
                changed = leadership.changed() => if changed.is_err() { return },
            }
        }
    }

    /// The other members, as their leader sees them; empty if this member does not lead.
    pub fn followers(&self) -> Vec<Follower> {
        use openraft::Instant as _;
        use openraft::async_runtime::watch::WatchReceiver;
        let metrics = self.inner.raft.metrics();
        let now = metrics.borrow_watched();
        let (Some(matched), Some(heard)) = (&now.replication, &now.heartbeat) else {
            return Vec::new();
        };
        let last = now.last_log_index.unwrap_or(0);
        let voters: BTreeSet<u64> = now.membership_config.voter_ids().collect();
        let follower = |(node, matched): (&u64, &Option<types::LogId>)| Follower {
            node: NodeId(*node),
            votes: voters.contains(node),
            matched: matched.as_ref().map(|matched| matched.index),
            behind: last.saturating_sub(matched.as_ref().map_or(0, |matched| matched.index)),
            silent: heard.get(node).copied().flatten().map(|heard| heard.elapsed()),
        };
        matched.iter().filter(|(node, _)| **node != self.inner.node.0).map(follower).collect()
    }

    /// The follower that is best fit to lead: heard of lately, and the least behind.
    pub fn successor(&self) -> Option<NodeId> {
        let followers = self.followers();
        let fit = followers.iter().filter(|follower| follower.can_lead());
        fit.min_by_key(|follower| follower.behind).map(|follower| follower.node)
    }

    /// Whether somebody leads the group who can: this member, and a majority has heard of it lately; or
    /// another one that this member has heard of lately.
    pub fn is_led(&self) -> bool {
        use openraft::Instant as _;
        use openraft::async_runtime::watch::WatchReceiver;
        let leads = matches!(&*self.inner.leadership.borrow(), Leadership::Leader { .. });
        if leads {
            let metrics = self.inner.raft.metrics();
            let acknowledged = metrics.borrow_watched().last_quorum_acked;
            return self.inner.sole.is() || acknowledged.is_some_and(|at| at.elapsed() < UNHEARD_MAX);
        }
        self.inner.heard.lock().is_some_and(|at| at.elapsed() < UNHEARD_MAX)
    }

    /// Whether the disk takes longer for one write than a leader's may. What this member says of its
    /// leadership may be out of date then: it cannot even note that another one leads.
    pub fn is_stalled(&self) -> bool {
        self.inner.writer.busy_for() > self.inner.stall
    }

    /// Gives up leadership whenever the disk stalls: a leader that cannot write is none, though its
    /// heartbeats go out.
    pub async fn step_down_on_stalls(&self) {
        let poll = self.inner.stall / 4;
        loop {
            sleep(poll).await;
            let Some(to) = self.successor().filter(|_| self.is_stalled()) else {
                continue;
            };
            tracing::error!(group = %self.inner.group, "the disk stalls: stepping down");
            if let Err(error) = self.transfer_leader(to, self.inner.stall).await {
                tracing::debug!(group = %self.inner.group, %error, "nobody is known to lead now");
            }
            // Once is enough: from then on it sends no heartbeats, and the others elect somebody.
            while self.is_stalled() {
                sleep(poll).await;
            }
        }
    }

    /// Hands leadership to another member, and returns who leads then: that one, unless it could not
    /// take over and there was an election. From the call on this member proposes nothing and gives no
    /// sign of life, until somebody is elected.
    ///
    /// # Errors
    /// [`ProposeError::NotLeader`] if it did not lead, [`ProposeError::Unknown`] if nobody else is known
    /// to lead after `patience`, or at once if that member has no vote: then it still leads.
    pub async fn transfer_leader(&self, to: NodeId, patience: Duration) -> Result<NodeId, ProposeError> {
        let mut leadership = self.leadership();
        match &*leadership.borrow_and_update() {
            Leadership::Leader { .. } => {}
            Leadership::Follower { leader } => return Err(ProposeError::NotLeader { leader: *leader }),
            Leadership::Failed { reason } => return Err(ProposeError::Stopped(reason.clone())),
        }
        // The library would wait for it until somebody is elected, and with one voter nobody ever is.
        if !self.followers().iter().any(|follower| follower.node == to && follower.votes) {
            tracing::warn!(group = %self.inner.group, %to, "who has no vote cannot lead");
            return Err(ProposeError::Unknown);
        }
        tracing::info!(group = %self.inner.group, %to, "handing over leadership");
        let sent = self.inner.raft.trigger().transfer_leader(to.0).await;
        sent.map_err(|error| ProposeError::Stopped(error.to_string()))?;
        let led_by_another =
            leadership.wait_for(|role| matches!(role, Leadership::Follower { leader: Some(_) }));
        match timeout(patience, led_by_another).await {
            Ok(Ok(role)) => match &*role {
                Leadership::Follower { leader: Some(leader) } => Ok(*leader),
                _ => Err(ProposeError::Unknown),
            },
            Ok(Err(_)) | Err(_) => Err(ProposeError::Unknown),
        }
    }
}

/// Makes a member that starts again keep what it may have promised before: not to help elect
/// another leader while the one that it has just heard from counts on that. It does not remember
/// whom it heard from when, so it waits for as long as such a promise can last, and returns until
/// when. A group of one has nobody to promise anything, and leads at once.
pub(super) async fn keep_promises<M: Machine>(
    raft: &Raft<Types, Adapter<M>>,
    node: NodeId,
    timing: Timing,
    had_a_life: bool,
) -> Result<Instant, String> {
    if !had_a_life {
        return Ok(Instant::now());
    }
    let voters = raft.with_raft_state(|state| state.membership_state.effective().voter_ids().collect()).await;
    let voters: BTreeSet<u64> = voters.map_err(|error| error.to_string())?;
    if voters == BTreeSet::from([node.0]) {
        raft.trigger().elect(false).await.map_err(|error| error.to_string())?;
        return Ok(Instant::now());
    }
    raft.runtime_config().elect(false);
    Ok(Instant::now() + 2 * timing.election)
}

/// Between two attempts of a new leader to catch up.
const CATCH_UP_PAUSE: Duration = Duration::from_millis(5);

/// Turns what the library reports into a role. A leader is only announced when it has caught up
/// with what was committed before it: until then its state may be older than what was served.
pub(super) async fn watch_leadership<M: Machine>(
    raft: Raft<Types, Adapter<M>>,
    group: GroupId,
    store: Store,
    silent_until: Instant,
    sole: Arc<Sole>,
    leadership: watch::Sender<Leadership>,
) {
    use openraft::async_runtime::watch::WatchReceiver;
    let mut silent = Instant::now() < silent_until;
    // Changes with roles and members only, not with every entry.
    let mut metrics = raft.server_metrics();
    let announce = |role: Leadership| {
        leadership.send_if_modified(|current| {
            let changed = *current != role;
            if changed {
                tracing::debug!(%group, ?role, "leadership");
                *current = role;
            }
            changed
        })
    };
    loop {
        let changes = sole.changes();
        let (state, leader, term, alone) = {
            let now = metrics.borrow_watched();
            let mut voters = now.membership_config.voter_ids();
            let alone = voters.next() == Some(now.id) && voters.next().is_none();
            (now.state, now.current_leader, now.vote.leader_id.term, alone)
        };
        if state != ServerState::Leader || !alone {
            sole.set(false, changes);
        }
        let leads = *leadership.borrow() == Leadership::Leader { term };
        let mut lagging = false;
        if state == ServerState::Leader && !leads {
            // A quarter of a second at a time, so that a leader that is deposed before it could
            // catch up is noticed.
            let patience = Duration::from_millis(250);
            let caught_up = raft.wait_for_recovery(Some(patience)).await.is_ok()
                && raft.ensure_linearizable(openraft::raft::ReadPolicy::ReadIndex).await.is_ok();
            let still = {
                let now = metrics.borrow_watched();
                now.state == ServerState::Leader && now.vote.leader_id.term == term
            };
            if still && caught_up {
                announce(Leadership::Leader { term });
                sole.set(alone, changes);
            } else {
                announce(Leadership::Follower { leader: None });
            }
            lagging = still && !caught_up;
        } else if state != ServerState::Leader {
            announce(Leadership::Follower { leader: leader.map(NodeId) });
        }
        let changed = if lagging {
            // A core that has died while it led looks like this for ever, and says so nowhere but here.
            match timeout(CATCH_UP_PAUSE, metrics.changed()).await {
                Ok(changed) => changed,
                Err(_) => continue,
            }
        } else if silent {
            match timeout_at(silent_until, metrics.changed()).await {
                Ok(changed) => changed,
                Err(_) => {
                    silent = false;
                    raft.runtime_config().elect(true);
                    continue;
                }
            }
        } else {
            metrics.changed().await
        };
        if changed.is_err() {
            let reason = match raft.metrics().borrow_watched().running_state.clone() {
                Err(openraft::errors::Fatal::Stopped) | Ok(()) => "the group has stopped".to_owned(),
                Err(error) => {
                    // The library says where it was when that happened, and more than once.
                    let error = store.failure().unwrap_or_else(|| error.to_string());
                    tracing::error!(%group, %error, "the group has failed and serves no more");
                    error
                }
            };
            sole.set(false, changes);
            announce(Leadership::Failed { reason });
            return;
        }
    }
}
