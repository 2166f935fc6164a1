//! A member of a group: what its process sees of it.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use openraft::errors::{
    ClientWriteError, ForwardToLeader, InitializeError, LinearizableReadError, RaftError,
};
use openraft::impls::ProgressResponder;
use openraft::raft::linearizable_read::LinearizerOption;
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, ClientWriteResult, TransferLeaderRequest, VoteRequest,
};
use openraft::type_config::alias::{SnapshotMetaOf, SnapshotOf};
use openraft::{Config, Raft, ServerState, SnapshotPolicy};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use troth_protocol::message::raft::{self as wire, Appended, Body};
use troth_protocol::net::Transport;
use troth_protocol::{GroupId, NodeId, Reject};

use crate::adapter::Adapter;
use crate::log::{Log, LogWriter};
use crate::machine::Machine;
use crate::network::{Directory, Network};
use crate::rocks::Store;
use crate::snapshot::{self, Transfer};
use crate::types::{self, Command, Types};

/// How patient the members of a group are with each other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Timing {
    /// A leader gives a sign of life this often.
    pub heartbeat: Duration,
    /// The unit of patience. A leader may count on not being replaced for twice as long after a
    /// majority has heard of it; a member that hears nothing waits for that to pass, and then for a
    /// random time between this and its double, before it asks to be elected: three to four times this.
    pub election: Duration,
    /// A leader whose disk takes longer than this for one write steps down.
    pub stall: Duration,
}

impl Default for Timing {
    fn default() -> Timing {
        Timing {
            heartbeat: Duration::from_millis(100),
            election: Duration::from_millis(300),
            stall: Duration::from_millis(1000),
        }
    }
}

/// A follower that was not heard of for this long is not fit to lead.
const SILENT_MAX: Duration = Duration::from_millis(500);

/// What a member needs to start.
pub struct GroupConfig {
    /// The group.
    pub group: GroupId,
    /// This member.
    pub node: NodeId,
    /// All voters, this member among them, if the group is new; ignored when it is not.
    pub members: BTreeSet<NodeId>,
    /// How to reach the others.
    pub transport: Arc<dyn Transport>,
    /// Where they are.
    pub directory: Arc<dyn Directory>,
    /// How patient to be.
    pub timing: Timing,
    /// The log is cut after this many entries that are in the state.
    pub log_entries_max: u64,
}

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
}

/// The member cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Its records are damaged, or the store cannot be read.
    #[error("{0}")]
    Store(#[from] io::Error),
    /// The Raft library refused.
    #[error("the {group} cannot start: {reason}")]
    Raft {
        /// The group.
        group: GroupId,
        /// What it says.
        reason: String,
    },
}

/// A proposal brought no output.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum ProposeError {
    /// This member does not lead. The command is in no log.
    #[error("not the leader")]
    NotLeader {
        /// Who leads, as far as it knows.
        leader: Option<NodeId>,
    },
    /// Leadership was lost after the command was written. It may be applied later, or never.
    #[error("leadership was lost before the command was committed")]
    Unknown,
    /// Too many commands wait. This one is in no log.
    #[error("too many commands wait")]
    Overloaded,
    /// The member has stopped. What it was about to do may be done after it starts again, or never.
    #[error("the group has stopped: {0}")]
    Stopped(String),
}

impl From<ProposeError> for Reject {
    fn from(error: ProposeError) -> Reject {
        match error {
            ProposeError::NotLeader { leader } => Reject::NotLeader { leader },
            ProposeError::Unknown | ProposeError::Stopped(_) => Reject::Deposed,
            ProposeError::Overloaded => Reject::overloaded(Duration::from_millis(50)),
        }
    }
}

/// A snapshot that is arriving.
struct Incoming {
    transfer: u64,
    next: u64,
}

/// A member of a group. Cheap to clone.
pub struct Group<M: Machine> {
    inner: Arc<Inner<M>>,
}

impl<M: Machine> Clone for Group<M> {
    fn clone(&self) -> Group<M> {
        Group { inner: self.inner.clone() }
    }
}

struct Inner<M: Machine> {
    group: GroupId,
    node: NodeId,
    raft: Raft<Types, Adapter<M>>,
    writer: LogWriter,
    leadership: watch::Receiver<Leadership>,
    /// It leads and is the only voter, so nobody can depose it. To be cleared before a change of
    /// members is proposed.
    sole: Arc<AtomicBool>,
    /// Before this, it neither votes nor asks for votes.
    silent_until: Instant,
    /// A write that takes longer than this is a stall.
    stall: Duration,
    /// Held while a piece is stored or the whole is put in place, so that no two snapshots mix.
    incoming: tokio::sync::Mutex<Option<Incoming>>,
    watcher: Mutex<Option<JoinHandle<()>>>,
}

impl<M: Machine> Inner<M> {
    fn hint(&self, forward: &ForwardToLeader<Types>) -> Option<NodeId> {
        forward.leader_id.map(NodeId).filter(|leader| *leader != self.node)
    }
}

impl<M: Machine> Group<M> {
    /// Starts a member with what is in the store: nothing, or where it was when it stopped.
    ///
    /// # Errors
    /// If a record is damaged, or the store cannot be read. Nothing was served then.
    pub async fn start(
        config: GroupConfig,
        store: &Store,
        writer: &LogWriter,
        machine: M,
    ) -> Result<Group<M>, StartError> {
        let GroupConfig { group, node, members, transport, directory, timing, log_entries_max } = config;
        let failed = |reason: String| StartError::Raft { group, reason };
        let log = Log::open(group.to_u32(), writer)?;
        let had_a_life = log.had_a_life();
        let adapter = Adapter::new(group.to_u32(), writer, store, machine)?;
        let network = Network { group, from: node, transport, directory };
        let raft_config = raft_config(group, timing, log_entries_max).map_err(&failed)?;
        let raft = Raft::new(node.0, Arc::new(raft_config), network, log, adapter)
            .await
            .map_err(|error| failed(error.to_string()))?;
        let members: BTreeSet<u64> = members.iter().map(|node| node.0).collect();
        match raft.initialize(members).await {
            // It was initialized before, by this member or by another.
            Ok(()) | Err(RaftError::APIError(InitializeError::NotAllowed(_))) => {}
            Err(error) => return Err(failed(error.to_string())),
        }
        let silent_until = keep_promises(&raft, node, timing, had_a_life).await.map_err(&failed)?;
        let (sender, leadership) = watch::channel(Leadership::Follower { leader: None });
        let sole = Arc::new(AtomicBool::new(false));
        let watcher = tokio::spawn(watch_leadership(raft.clone(), group, silent_until, sole.clone(), sender));
        let inner = Inner {
            group,
            node,
            raft,
            writer: writer.clone(),
            leadership,
            sole,
            silent_until,
            stall: timing.stall,
            incoming: tokio::sync::Mutex::new(None),
            watcher: Mutex::new(Some(watcher)),
        };
        Ok(Group { inner: Arc::new(inner) })
    }

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
        let follower = |(node, matched): (&u64, &Option<types::LogId>)| Follower {
            node: NodeId(*node),
            behind: last.saturating_sub(matched.as_ref().map_or(0, |matched| matched.index)),
            silent: heard.get(node).copied().flatten().map(|heard| heard.elapsed()),
        };
        matched.iter().filter(|(node, _)| **node != self.inner.node.0).map(follower).collect()
    }

    /// The follower that is best fit to lead: heard of lately, and the least behind.
    pub fn successor(&self) -> Option<NodeId> {
        let followers = self.followers();
        let fit = followers.iter().filter(|follower| follower.answers());
        fit.min_by_key(|follower| follower.behind).map(|follower| follower.node)
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
    /// to lead after `patience`.
    pub async fn transfer_leader(&self, to: NodeId, patience: Duration) -> Result<NodeId, ProposeError> {
        let mut leadership = self.leadership();
        match &*leadership.borrow_and_update() {
            Leadership::Leader { .. } => {}
            Leadership::Follower { leader } => return Err(ProposeError::NotLeader { leader: *leader }),
            Leadership::Failed { reason } => return Err(ProposeError::Stopped(reason.clone())),
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

    /// While this is held, no snapshot takes the place of the machine's state: for whoever changes
    /// that state beside the log, as every replica may for itself.
    pub async fn hold_state(&self) -> impl Send + '_ {
        self.inner.incoming.lock().await
    }

    /// The group.
    pub fn id(&self) -> GroupId {
        self.inner.group
    }

    /// This member.
    pub fn node(&self) -> NodeId {
        self.inner.node
    }

    /// The role of this member, now and from now on.
    pub fn leadership(&self) -> watch::Receiver<Leadership> {
        self.inner.leadership.clone()
    }

    /// The last entry that is applied here.
    pub fn applied(&self) -> u64 {
        use openraft::async_runtime::watch::WatchReceiver;
        self.inner.raft.metrics().borrow_watched().last_applied.map_or(0, |id| id.index)
    }

    /// Proposes a command. Commands enter the log in the order of these calls; it does not wait, so
    /// a caller may hold a lock to fix that order.
    ///
    /// # Errors
    /// [`ProposeError::Overloaded`] if too many wait already, [`ProposeError::Stopped`]; the command
    /// was not proposed then.
    pub fn submit(&self, command: Bytes) -> Result<Proposal<M>, ProposeError> {
        let (responder, answer) = ProgressResponder::complete_only();
        let sending = self.inner.raft.client_write_ff(Command(command), Some(responder));
        match tokio::task::unconstrained(sending).now_or_never() {
            Some(Ok(())) => Ok(Proposal { inner: self.inner.clone(), answer }),
            Some(Err(error)) => Err(ProposeError::Stopped(error.to_string())),
            None => Err(ProposeError::Overloaded),
        }
    }

    /// Proposes a command, and waits until it is committed and applied here.
    ///
    /// # Errors
    /// See [`Proposal::output`] and [`Group::submit`].
    pub async fn propose(&self, command: Bytes) -> Result<M::Output, ProposeError> {
        self.submit(command)?.output().await
    }

    /// Returns when it is certain that this member led at some moment after the call, and has
    /// applied everything that was committed before the call. Uses the leader's lease while a
    /// majority has confirmed it recently, and asks a majority otherwise.
    ///
    /// # Errors
    /// If it does not lead.
    pub async fn read_barrier(&self) -> Result<(), ProposeError> {
        if self.inner.sole.load(Ordering::Acquire) {
            return Ok(());
        }
        let lease_or_ask = LinearizerOption::new(None, true);
        match self.inner.raft.ensure_linearizable(lease_or_ask).await {
            Ok(_) => Ok(()),
            Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(forward))) => {
                Err(ProposeError::NotLeader { leader: self.hint(&forward) })
            }
            Err(RaftError::APIError(LinearizableReadError::QuorumNotEnough(_))) => {
                Err(ProposeError::NotLeader { leader: None })
            }
            Err(RaftError::Fatal(error)) => Err(ProposeError::Stopped(error.to_string())),
        }
    }

    fn hint(&self, forward: &ForwardToLeader<Types>) -> Option<NodeId> {
        forward.leader_id.map(NodeId).filter(|leader| *leader != self.inner.node)
    }

    /// Answers another member.
    ///
    /// # Errors
    /// If the message is not for this member, or the member has stopped.
    pub async fn step(&self, request: wire::Request) -> Result<wire::Response, Reject> {
        if request.to != self.inner.node {
            return Err(Reject::WrongNode { actual: self.inner.node });
        }
        let raft = &self.inner.raft;
        let stopped = |error: String| {
            tracing::debug!(group = %self.inner.group, error, "a message for a stopped member");
            Reject::ShuttingDown
        };
        match request.body {
            Body::Append { vote, previous, entries, committed } => {
                let request = AppendEntriesRequest {
                    vote: types::vote(vote),
                    prev_log_id: previous.map(types::log_id),
                    entries: entries.into_iter().map(types::entry).collect(),
                    leader_commit: committed.map(types::log_id),
                };
                let response =
                    raft.append_entries(request).await.map_err(|error| stopped(error.to_string()))?;
                Ok(wire::Response::Append(match response {
                    AppendEntriesResponse::Success => Appended::Success,
                    AppendEntriesResponse::PartialSuccess(upto) => {
                        Appended::Partial(upto.as_ref().map(types::log_id_to_wire))
                    }
                    AppendEntriesResponse::Conflict => Appended::Conflict,
                    AppendEntriesResponse::HigherVote(vote) => {
                        Appended::HigherVote(types::vote_to_wire(&vote))
                    }
                }))
            }
            Body::Vote { .. } | Body::PreVote { .. } if Instant::now() < self.inner.silent_until => {
                Err(Reject::overloaded(self.inner.silent_until - Instant::now()))
            }
            Body::Vote { vote, last, leadership_transfer } => {
                let mut request = VoteRequest::new(types::vote(vote), last.map(types::log_id));
                request.leadership_transfer = leadership_transfer;
                let response = raft.vote(request).await.map_err(|error| stopped(error.to_string()))?;
                Ok(vote_response(&response))
            }
            Body::PreVote { vote, last } => {
                let request = VoteRequest::new(types::vote(vote), last.map(types::log_id));
                let response = raft.pre_vote(request).await.map_err(|error| stopped(error.to_string()))?;
                Ok(vote_response(&response))
            }
            Body::TransferLeader { vote, to, last } => {
                let request = TransferLeaderRequest::new(types::vote(vote), to.0, last.map(types::log_id));
                let accepted =
                    raft.handle_transfer_leader(request).await.map_err(|error| stopped(error.to_string()))?;
                Ok(wire::Response::TransferLeader { accepted: accepted.is_ok() })
            }
            Body::Snapshot { vote, last, membership, transfer, sequence, chunk, done } => {
                let mut incoming = self.inner.incoming.lock().await;
                self.receive_piece(&mut incoming, transfer, sequence, chunk).await?;
                if !done {
                    return Ok(wire::Response::SnapshotContinue);
                }
                *incoming = None;
                let snapshot = SnapshotOf::<Types, Transfer> {
                    meta: SnapshotMetaOf::<Types> {
                        last_log_id: last.map(types::log_id),
                        last_membership: types::stored_membership(membership),
                    },
                    snapshot: Transfer::Staged,
                };
                let installed = raft.install_full_snapshot(types::vote(vote), snapshot).await;
                let response = installed.map_err(|error| stopped(error.to_string()))?;
                Ok(wire::Response::SnapshotDone { vote: types::vote_to_wire(&response.vote) })
            }
        }
    }

    async fn receive_piece(
        &self,
        incoming: &mut Option<Incoming>,
        transfer: u64,
        sequence: u64,
        piece: Bytes,
    ) -> Result<(), Reject> {
        match incoming {
            _ if sequence == 0 => *incoming = Some(Incoming { transfer, next: 1 }),
            Some(current) if current.transfer == transfer && current.next == sequence => current.next += 1,
            _ => return Err(Reject::malformed("this piece does not follow the last one of its snapshot")),
        }
        snapshot::stage(&self.inner.writer, self.inner.group.to_u32(), sequence, piece)
            .await
            .map_err(|error| Reject::Internal { reason: error.to_string() })
    }

    /// Stops this member. What was acknowledged stays.
    pub async fn shutdown(&self) {
        // An error means that its core ended before, for a reason that was logged then.
        let _ = self.inner.raft.shutdown().await;
        let watcher = self.inner.watcher.lock().take();
        if let Some(watcher) = watcher {
            let _ = watcher.await;
        }
    }
}

/// A command on its way through the log.
pub struct Proposal<M: Machine> {
    inner: Arc<Inner<M>>,
    answer: openraft::type_config::alias::OneshotReceiverOf<Types, ClientWriteResult<Types>>,
}

impl<M: Machine> Proposal<M> {
    /// Waits until the command is committed and applied here. Dropping the future changes nothing
    /// about that.
    ///
    /// # Errors
    /// [`ProposeError::NotLeader`] means that the command will never be applied;
    /// [`ProposeError::Unknown`] and [`ProposeError::Stopped`] leave that open.
    pub async fn output(self) -> Result<M::Output, ProposeError> {
        let answer = self.answer.await.map_err(|_| ProposeError::Stopped("it has ended".into()))?;
        let response =
            answer.map_err(|error| match error {
                ClientWriteError::ForwardToLeader(forward) => {
                    ProposeError::NotLeader { leader: self.inner.hint(&forward) }
                }
                ClientWriteError::LogEntryDiscarded(_) => ProposeError::Unknown,
                error @ (ClientWriteError::ChangeMembershipError(_)
                | ClientWriteError::PreconditionFailed(_)) => ProposeError::Stopped(error.to_string()),
            })?;
        let output = response.data.0.expect("every command has an output");
        Ok(*output.downcast::<M::Output>().expect("the machine of this group made it"))
    }
}

fn vote_response(response: &openraft::raft::VoteResponse<Types>) -> wire::Response {
    wire::Response::Vote {
        vote: types::vote_to_wire(&response.vote),
        granted: response.vote_granted,
        last: response.last_log_id.as_ref().map(types::log_id_to_wire),
    }
}

fn raft_config(group: GroupId, timing: Timing, log_entries_max: u64) -> Result<Config, String> {
    let config = Config {
        cluster_name: group.to_string(),
        heartbeat_interval: timing.heartbeat.as_millis() as u64,
        election_timeout_min: timing.election.as_millis() as u64,
        election_timeout_max: 2 * timing.election.as_millis() as u64,
        enable_pre_vote: Some(true),
        // A leader that was killed and is back within an election timeout may have replicated
        // entries that it never wrote itself. In a new term it cannot write others in their place.
        enable_leader_restore: Some(false),
        snapshot_policy: SnapshotPolicy::LogsSinceLast(log_entries_max),
        max_in_snapshot_log_to_keep: log_entries_max / 2,
        purge_batch_size: (log_entries_max / 4).max(1),
        replication_lag_threshold: log_entries_max * 2,
        ..Config::default()
    };
    config.validate().map_err(|error| error.to_string())
}

/// Makes a member that starts again keep what it may have promised before: not to help elect
/// another leader while the one that it has just heard from counts on that. It does not remember
/// whom it heard from when, so it waits for as long as such a promise can last, and returns until
/// when. A group of one has nobody to promise anything, and leads at once.
async fn keep_promises<M: Machine>(
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

/// Turns what the library reports into a role. A leader is only announced when it has caught up
/// with what was committed before it: until then its state may be older than what was served.
async fn watch_leadership<M: Machine>(
    raft: Raft<Types, Adapter<M>>,
    group: GroupId,
    silent_until: Instant,
    sole: Arc<AtomicBool>,
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
        let (state, leader, term, alone) = {
            let now = metrics.borrow_watched();
            let mut voters = now.membership_config.voter_ids();
            let alone = voters.next() == Some(now.id) && voters.next().is_none();
            (now.state, now.current_leader, now.vote.leader_id.term, alone)
        };
        if state != ServerState::Leader || !alone {
            sole.store(false, Ordering::Release);
        }
        let leads = *leadership.borrow() == Leadership::Leader { term };
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
                sole.store(alone, Ordering::Release);
            } else {
                announce(Leadership::Follower { leader: None });
            }
            if still && !caught_up {
                continue;
            }
        } else if state != ServerState::Leader {
            announce(Leadership::Follower { leader: leader.map(NodeId) });
        }
        let changed = if silent {
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
                    tracing::error!(%group, %error, "the group has failed and serves no more");
                    error.to_string()
                }
            };
            sole.store(false, Ordering::Release);
            announce(Leadership::Failed { reason });
            return;
        }
    }
}
