//! A member of a group: what its process sees of it.

mod leading;
mod members;
mod peer;
mod retention;

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
use openraft::raft::ClientWriteResult;
use openraft::raft::linearizable_read::LinearizerOption;
use openraft::{Config, Raft, SnapshotPolicy};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::Instant;
use troth_protocol::net::Transport;
use troth_protocol::{GroupId, Incarnation, NodeId, Reject};

pub use self::leading::{Follower, Leadership};
pub use self::members::Members;
use crate::adapter::Adapter;
use crate::log::{Log, LogWriter};
use crate::machine::Machine;
use crate::network::{Directory, Network};
use crate::rocks::Store;
use crate::snapshot::incoming::{Session, Site};
use crate::snapshot::outgoing::{Outgoing, SnapshotBytes, Throttle, TransferProgress};
use crate::types::{Command, Types};

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

/// What a member needs to start.
pub struct GroupConfig {
    /// The group.
    pub group: GroupId,
    /// This member.
    pub node: NodeId,
    /// This start of it.
    pub incarnation: Incarnation,
    /// All voters, this member among them, if the group is new; ignored if this member has been in it
    /// before. Empty: it waits to be taken into the group by those who are.
    pub members: BTreeSet<NodeId>,
    /// How to reach the others.
    pub transport: Arc<dyn Transport>,
    /// Where they are.
    pub directory: Arc<dyn Directory>,
    /// How patient to be.
    pub timing: Timing,
    /// The log is cut after this many entries that are in the state.
    pub log_entries_max: u64,
    /// What bounds the snapshots that leave this process; `None`: nothing.
    pub throttle: Option<Throttle>,
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
    sole: Arc<Sole>,
    /// When a leader was heard of last, as far as this member followed one.
    heard: Mutex<Option<Instant>>,
    /// Before this, it neither votes nor asks for votes.
    silent_until: Instant,
    /// A write that takes longer than this is a stall.
    stall: Duration,
    directory: Arc<dyn Directory>,
    outgoing: Arc<Outgoing>,
    /// Where snapshots arrive.
    site: Arc<Site>,
    /// Held while something of a snapshot is stored or the whole is put in place, so that no two mix.
    incoming: Arc<tokio::sync::Mutex<Option<Session>>>,
    watcher: Mutex<Option<JoinHandle<()>>>,
    cutter: AbortHandle,
    /// Its sender is gone when nothing is applied any more.
    machine_runs: watch::Receiver<()>,
}

/// Whether this member leads and is the only voter, so that nobody can depose it.
#[derive(Default)]
struct Sole {
    is: AtomicBool,
    /// Counts the changes of members that were proposed from here.
    changes: Mutex<u64>,
}

impl Sole {
    fn is(&self) -> bool {
        self.is.load(Ordering::Acquire)
    }

    /// A change of members is about to be proposed: from then on others may come to vote.
    fn end(&self) {
        *self.changes.lock() += 1;
        self.is.store(false, Ordering::Release);
    }

    fn changes(&self) -> u64 {
        *self.changes.lock()
    }

    /// It is so, unless a change was proposed since there were `changes`.
    fn set(&self, is: bool, changes: u64) {
        let now = self.changes.lock();
        self.is.store(is && *now == changes, Ordering::Release);
    }
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
        let GroupConfig { group, node, incarnation, members, transport, directory, .. } = config;
        let GroupConfig { timing, log_entries_max, throttle, .. } = config;
        let failed = |reason: String| StartError::Raft { group, reason };
        let log = Log::open(group.to_u32(), writer)?;
        let had_a_life = log.had_a_life();
        let site = Arc::new(Site::open(store, writer, group.to_u32(), machine.spans())?);
        let (running, machine_runs) = watch::channel(());
        let adapter = Adapter::new(group.to_u32(), store, &site, machine, running)?;
        let outgoing = Arc::new(Outgoing::default());
        let network = Network {
            group,
            from: node,
            incarnation,
            transport,
            directory: directory.clone(),
            outgoing: outgoing.clone(),
            throttle,
        };
        let raft_config = raft_config(group, timing, log_entries_max).map_err(&failed)?;
        let raft = Raft::new(node.0, Arc::new(raft_config), network, log, adapter)
            .await
            .map_err(|error| failed(error.to_string()))?;
        if !members.is_empty() {
            let members: BTreeSet<u64> = members.iter().map(|node| node.0).collect();
            match raft.initialize(members).await {
                // It was initialized before, by this member or by another.
                Ok(()) | Err(RaftError::APIError(InitializeError::NotAllowed(_))) => {}
                Err(error) => return Err(failed(error.to_string())),
            }
        }
        let silent_until = leading::keep_promises(&raft, node, timing, had_a_life).await.map_err(&failed)?;
        let (sender, leadership) = watch::channel(Leadership::Follower { leader: None });
        let sole = Arc::new(Sole::default());
        let watching =
            leading::watch_leadership(raft.clone(), group, store.clone(), silent_until, sole.clone(), sender);
        let cutting = retention::keep_log_short(raft.clone(), outgoing.clone(), log_entries_max);
        let (watcher, cutter) = (tokio::spawn(watching), tokio::spawn(cutting).abort_handle());
        let inner = Inner {
            group,
            node,
            raft,
            writer: writer.clone(),
            leadership,
            sole,
            heard: Mutex::default(),
            silent_until,
            stall: timing.stall,
            directory,
            outgoing,
            site,
            incoming: Arc::default(),
            watcher: Mutex::new(Some(watcher)),
            cutter,
            machine_runs,
        };
        Ok(Group { inner: Arc::new(inner) })
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
        if self.inner.sole.is() {
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
        self.inner.hint(forward)
    }

    /// Entries that are committed, as far as this member knows, and not applied here.
    pub fn behind(&self) -> u64 {
        use openraft::async_runtime::watch::WatchReceiver;
        let metrics = self.inner.raft.metrics();
        let now = metrics.borrow_watched();
        let index = |id: &Option<crate::types::LogId>| id.map_or(0, |id| id.index);
        index(&now.cluster_committed).saturating_sub(index(&now.last_applied))
    }

    /// The snapshots that are on their way from here to other members.
    pub fn transfers(&self) -> Vec<TransferProgress> {
        self.inner.outgoing.progress()
    }

    /// Bytes of all snapshots that have left since the start of the process.
    pub fn snapshot_bytes(&self) -> SnapshotBytes {
        self.inner.outgoing.totals()
    }

    /// Stops this member. What was acknowledged stays, and nothing is written any more: what the group has in
    /// the store can be erased.
    pub async fn shutdown(&self) {
        // An error means that its core ended before, for a reason that was logged then.
        let _ = self.inner.raft.shutdown().await;
        // What applies the log goes on for a while when the core has ended, and so does what arrives.
        let mut machine_runs = self.inner.machine_runs.clone();
        while machine_runs.changed().await.is_ok() {}
        let arriving = self.inner.incoming.lock().await;
        self.inner.site.end();
        drop(arriving);
        self.inner.cutter.abort();
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
        // See `retention`.
        snapshot_policy: SnapshotPolicy::Never,
        max_in_snapshot_log_to_keep: u64::MAX,
        replication_lag_threshold: log_entries_max * 2,
        ..Config::default()
    };
    config.validate().map_err(|error| error.to_string())
}
