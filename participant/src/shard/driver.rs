//! Performs what a shard wants done: proposes to its group, reads its versions, answers, and asks
//! the coordinator.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tokio::task::spawn_blocking;
use tokio::time::{sleep, sleep_until, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use troth_protocol::clock::Clock;
use troth_protocol::fault;
use troth_protocol::limits::{READ_AHEAD_MAX, READ_BYTES_MAX, SCAN_BYTES_MAX, SCAN_ROWS_MAX};
use troth_protocol::message::admin::{FaultPoint, InDoubt, ShardStatus, TxnAtShard};
use troth_protocol::message::coordinator;
use troth_protocol::message::shard::{
    CommitOnePhase, Decision, Prepare, PreparedTxn, Request, Response, Version, Vote,
};
use troth_protocol::message::txn::{Cause, Outcome, Work};
use troth_protocol::routing::{Resend, RouteError, Router};
use troth_protocol::timeline::Timeline;
use troth_protocol::wire::encode;
use troth_protocol::{Epoch, Key, KeyRange, Reject, ShardId, Timestamp, TxnId};
use troth_replication::{
    Group, GroupConfig, Leadership, LogWriter, Proposal, ProposeError, Reach, StartError, Store,
};

use super::command::{Command, Output};
use super::leader::{Effect, Event, Leader, Target};
use super::machine::{Core, Inner as CoreInner, ShardMachine, StoredView, Wake};
use super::state::View as _;
use crate::mvcc::{Mvcc, Page};

/// Reads of at most this many keys may be answered without leaving the task.
const KEYS_INLINE_MAX: usize = 64;

/// A read that waits is told who blocks it this long before its caller gives up.
const ANSWER_MARGIN: Duration = Duration::from_millis(10);

/// Prepared transactions that one page names.
const PREPARED_MAX: usize = 4096;

/// Transactions in doubt that one answer names.
const IN_DOUBT_MAX: usize = 1000;

/// How long one question to the coordinator may take, and the pause after it could not be asked.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);
const ASK_PAUSE: Duration = Duration::from_millis(20);

/// One replica of a shard. Cheap to clone.
#[derive(Clone)]
pub struct Shard {
    inner: Arc<Inner>,
}

struct Inner {
    shard: ShardId,
    store: Store,
    mvcc: Mvcc,
    core: Arc<Core>,
    group: Group<ShardMachine>,
    router: Arc<Router>,
    clock: Clock,
    next_read: AtomicU64,
    /// The newest timestamp that a coordinator has shown.
    newest_known: AtomicU64,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Shard {
    /// Starts a replica with what is in the store.
    ///
    /// # Errors
    /// If what is stored is damaged, or the store cannot be read. Nothing was served then.
    pub async fn start(
        shard: ShardId,
        config: GroupConfig,
        store: &Store,
        writer: &LogWriter,
        router: &Arc<Router>,
        clock: &Clock,
        timeline: &Arc<Timeline>,
    ) -> Result<Shard, StartError> {
        let core = Core::new(shard, timeline);
        let machine = ShardMachine::new(store, shard, &core);
        let group = Group::start(config, store, writer, machine).await?;
        let inner = Arc::new(Inner {
            shard,
            store: store.clone(),
            mvcc: Mvcc::new(store, shard),
            core,
            group,
            router: router.clone(),
            clock: clock.clone(),
            next_read: AtomicU64::new(0),
            newest_known: AtomicU64::new(0),
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
        });
        inner.tasks.spawn(inner.clone().follow_leadership());
        inner.tasks.spawn(inner.clone().drive());
        inner.tasks.spawn(inner.clone().watch_the_disk());
        Ok(Shard { inner })
    }

    /// The group of this replica, for its other members.
    pub fn group(&self) -> &Group<ShardMachine> {
        &self.inner.group
    }

    /// Answers a request.
    pub async fn handle(&self, request: Request, deadline: tokio::time::Instant) -> Result<Response, Reject> {
        let inner = &self.inner;
        match request {
            Request::Read { at, keys } => inner.read(at, keys, deadline).await.map(Response::Values),
            Request::Scan { at, range, rows_max } => {
                let page = inner.scan(at, range, rows_max as usize, deadline).await?;
                Ok(Response::Page { rows: page.rows, more: page.more })
            }
            Request::WhoLeads => inner.who_leads().await,
            Request::Prepare(prepare) => inner.prepare(prepare).await.map(Response::Vote),
            Request::CommitOnePhase(commit) => inner.commit_one_phase(commit).await,
            Request::Finish { epoch, decisions } => {
                inner.finish(epoch, decisions).await.map(|()| Response::Finished)
            }
            Request::Prepared { epoch, after, count_max } => {
                inner.prepared(epoch, after, count_max as usize).await
            }
            Request::Outcome { txn } => inner.outcome(txn).await,
        }
    }

    /// Gives up old versions and outcomes: first by a command, then, on every replica in its own
    /// time, on disk.
    pub async fn retire(&self, safe_point: Timestamp, outcomes_before: Timestamp) {
        let inner = &self.inner;
        let wanted = {
            let core = inner.core.lock();
            core.leader.is_some() && core.state.marks().safe_point < safe_point
        };
        if wanted && let Err(error) = inner.propose(&Command::Retire { safe_point, outcomes_before }).await {
            tracing::debug!(shard = %inner.shard, %error, "cannot retire old versions now");
        }
    }

    /// No snapshot before this is read any more.
    pub fn safe_point(&self) -> Timestamp {
        self.inner.core.lock().state.marks().safe_point
    }

    /// The largest commit timestamp so far.
    pub fn last_commit(&self) -> Timestamp {
        self.inner.core.lock().state.marks().last_commit
    }

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
            serving: core.leader.is_some(),
            applied: inner.group.applied(),
            prepared: core.state.prepared().len() as u64,
            locks: core.state.locks().len() as u64,
            waiting: core.leader.as_ref().map_or(0, Leader::waiting) as u64,
        }
    }

    /// The transactions that are prepared here, if this replica leads; by age.
    pub fn in_doubt(&self) -> Vec<InDoubt> {
        let inner = &self.inner;
        let now = inner.clock.millis();
        let core = inner.core.lock();
        let Some(leader) = &core.leader else {
            return Vec::new();
        };
        let record = |(txn, record): (&TxnId, &super::state::Prepared)| InDoubt {
            txn: *txn,
            shard: inner.shard,
            age_ms: now.saturating_sub(txn.start.millis()),
            epoch: record.epoch,
            participants: record.participants.clone(),
            writes: record.work.writes.len() as u64,
            locks: record.work.keys() as u64,
            waiting: leader.waiting_for(*txn) as u64,
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
        inner.propose(&Command::Finish { epoch, decisions: vec![(txn, decision)] }).await?;
        Ok(())
    }

    /// Why this replica has stopped for good, if it has.
    pub fn failure(&self) -> Option<String> {
        match &*self.inner.group.leadership().borrow() {
            Leadership::Failed { reason } => Some(reason.clone()),
            Leadership::Follower { .. } | Leadership::Leader { .. } => None,
        }
    }

    /// Stops. What was acknowledged stays.
    pub async fn shutdown(&self) {
        self.inner.stop.cancel();
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
        self.inner.group.shutdown().await;
    }
}

impl Inner {
    fn not_leader(&self) -> Reject {
        let leader = match &*self.group.leadership().borrow() {
            Leadership::Follower { leader } => *leader,
            Leadership::Leader { .. } | Leadership::Failed { .. } => None,
        };
        Reject::NotLeader { leader }
    }

    async fn who_leads(&self) -> Result<Response, Reject> {
        self.group.read_barrier().await?;
        if self.core.lock().leader.is_none() { Err(self.not_leader()) } else { Ok(Response::Leading) }
    }

    // --- reading ----------------------------------------------------------------------------

    async fn read(
        &self,
        at: Timestamp,
        keys: Vec<Key>,
        deadline: tokio::time::Instant,
    ) -> Result<Vec<Version>, Reject> {
        let shards = self.router.map().shards;
        for key in &keys {
            key.check(self.shard, shards).map_err(Reject::malformed)?;
        }
        self.admit(at, Target::Keys(keys.clone()), deadline).await?;
        // An answer ends like a page of a scan: the caller asks again for the rest.
        let read = move |mvcc: &Mvcc, keys: &[Key], reach: Reach| -> io::Result<Vec<Version>> {
            let mut versions = Vec::with_capacity(keys.len());
            let mut bytes = 0;
            for key in keys {
                let version = mvcc.read(key, at, reach)?;
                bytes += version.value.as_ref().map_or(0, |value| value.len());
                versions.push(version);
                if bytes >= READ_BYTES_MAX {
                    break;
                }
            }
            Ok(versions)
        };
        let inline =
            if keys.len() <= KEYS_INLINE_MAX { read(&self.mvcc, &keys, Reach::Memory).ok() } else { None };
        let versions = match inline {
            Some(versions) => versions,
            None => {
                let mvcc = self.mvcc.clone();
                self.blocking(move || read(&mvcc, &keys, Reach::Disk)).await?
            }
        };
        self.still_readable(at)?;
        Ok(versions)
    }

    async fn scan(
        &self,
        at: Timestamp,
        range: KeyRange,
        rows_max: usize,
        deadline: tokio::time::Instant,
    ) -> Result<Page, Reject> {
        self.admit(at, Target::Range(range.clone()), deadline).await?;
        let mvcc = self.mvcc.clone();
        let rows_max = rows_max.clamp(1, SCAN_ROWS_MAX);
        let page = self.blocking(move || mvcc.scan(&range, at, rows_max, SCAN_BYTES_MAX)).await?;
        self.still_readable(at)?;
        Ok(page)
    }

    async fn blocking<T: Send + 'static>(
        &self,
        read: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> Result<T, Reject> {
        let result = spawn_blocking(read).await.map_err(io::Error::other).flatten();
        result.map_err(|error| {
            tracing::error!(shard = %self.shard, %error, "cannot read");
            Reject::Internal { reason: format!("shard {} cannot be read", self.shard) }
        })
    }

    /// Waits until a read may look: this replica leads, and nothing that may have been written
    /// before the moment is still undecided.
    async fn admit(
        &self,
        at: Timestamp,
        target: Target,
        deadline: tokio::time::Instant,
    ) -> Result<(), Reject> {
        if !self.is_credible(at) {
            // The oracle may be ahead of this machine's clock: ask it before calling anybody a liar.
            self.ask_the_time().await.map_err(|error| {
                tracing::debug!(shard = %self.shard, %error, "cannot ask the time");
                Reject::DeadlineExceeded
            })?;
            if at.0 > self.newest_known.load(Ordering::Relaxed) {
                return Err(Reject::malformed(format!("read timestamp {at} lies in the future")));
            }
        }
        self.group.read_barrier().await?;
        let id = self.next_read.fetch_add(1, Ordering::Relaxed);
        let (sender, wake) = oneshot::channel();
        let mut wait = {
            let mut core = self.core.lock();
            if core.leader.is_none() {
                return Err(self.not_leader());
            }
            if at < core.state.marks().safe_point {
                return Err(Reject::SnapshotTooOld);
            }
            core.readers.insert(id, sender);
            self.core.handle(&mut core, Event::Read { id, at, target });
            Wait { core: &self.core, id, wake }
        };
        match wait.wake.try_recv() {
            Ok(Wake::Serve) => return Ok(()),
            Ok(Wake::Refuse) => return Err(Reject::overloaded(Duration::from_millis(50))),
            Err(oneshot::error::TryRecvError::Closed) => return Err(self.not_leader()),
            Err(oneshot::error::TryRecvError::Empty) => {}
        }
        match timeout_at(deadline - ANSWER_MARGIN, &mut wait.wake).await {
            Ok(Ok(Wake::Serve)) => Ok(()),
            Ok(Ok(Wake::Refuse)) => Err(Reject::overloaded(Duration::from_millis(50))),
            Ok(Err(_)) => Err(self.not_leader()),
            Err(_) => {
                let core = self.core.lock();
                let blocker = core.leader.as_ref().and_then(|leader| leader.blocker(id)).cloned();
                Err(blocker.map_or(Reject::DeadlineExceeded, |conflict| Reject::Blocked {
                    key: conflict.key,
                    by: conflict.by,
                }))
            }
        }
    }

    /// Whether the oracle can have given out a timestamp, as far as this replica can tell. One from
    /// a client is not trusted further, so that nobody can push time to its end.
    fn is_credible(&self, at: Timestamp) -> bool {
        at.0 <= self.newest_known.load(Ordering::Relaxed)
            || at <= Timestamp::from_millis(self.clock.millis()).plus(READ_AHEAD_MAX)
    }

    /// A coordinator has shown that time has come this far.
    fn learn_the_time(&self, seen: Timestamp) {
        self.newest_known.fetch_max(seen.0, Ordering::Relaxed);
    }

    async fn ask_the_time(&self) -> Result<Timestamp, RouteError> {
        let request = coordinator::Request::Timestamps { count: 1 };
        let deadline = tokio::time::Instant::now() + ASK_TIMEOUT;
        match self.router.coordinator(request, Resend::Idempotent, deadline).await? {
            coordinator::Response::Timestamps { first, .. } => {
                self.learn_the_time(first);
                Ok(first)
            }
            _ => Err(RouteError::WrongAnswer),
        }
    }

    /// What was read is what it should be only if it was not given up meanwhile.
    fn still_readable(&self, at: Timestamp) -> Result<(), Reject> {
        let safe_point = self.core.lock().state.marks().safe_point;
        if at < safe_point { Err(Reject::SnapshotTooOld) } else { Ok(()) }
    }

    // --- committing -------------------------------------------------------------------------

    fn submit(&self, command: &Command) -> Result<Proposal<ShardMachine>, ProposeError> {
        self.group.submit(encode(command).into())
    }

    async fn propose(&self, command: &Command) -> Result<Output, ProposeError> {
        self.submit(command)?.output().await
    }

    async fn prepare(&self, prepare: Prepare) -> Result<Vote, Reject> {
        let txn = prepare.txn;
        self.core.note(txn, "prepare received");
        self.learn_the_time(prepare.floor);
        {
            let core = self.core.lock();
            let Some(leader) = &core.leader else {
                return Err(self.not_leader());
            };
            if prepare.epoch < core.state.marks().epoch {
                return Ok(Vote::No { cause: Cause::Superseded });
            }
            match core.state.prepared().get(&txn) {
                // Asked again by the same leader: the promise stands in the log.
                Some(record) if record.epoch == prepare.epoch => {
                    return Ok(Vote::Yes { above: leader.vote_above(&core.state) });
                }
                Some(_) => {}
                None => {
                    if let Some(cause) = self.hopeless(&core, txn, &prepare.work)? {
                        self.core.note(txn, "voted no");
                        return Ok(Vote::No { cause });
                    }
                }
            }
        }
        fault::pass(FaultPoint::PrepareReceived).await;
        match self.propose(&Command::Prepare(prepare)).await? {
            Output::Vote(Ok(())) => {
                fault::pass(FaultPoint::Prepared).await;
                let core = self.core.lock();
                // Without a leader here the promise still stands; the next one will say so.
                let leader = core.leader.as_ref().ok_or(Reject::Deposed)?;
                Ok(Vote::Yes { above: leader.vote_above(&core.state) })
            }
            Output::Vote(Err(cause)) => {
                self.core.note(txn, "voted no");
                Ok(Vote::No { cause })
            }
            other => unreachable!("a prepare leads to a vote, not to {other:?}"),
        }
    }

    /// Why it is certain already that a transaction cannot commit here. A No that needs no log.
    fn hopeless(&self, core: &CoreInner, txn: TxnId, work: &Work) -> Result<Option<Cause>, Reject> {
        let view = StoredView::in_memory(&self.store, self.shard);
        match core.state.objection(txn, work, &view) {
            Ok(cause) => Ok(cause),
            // Not to be seen without waiting for the disk: the log will tell.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(Reject::Internal { reason: error.to_string() }),
        }
    }

    async fn commit_one_phase(&self, commit: CommitOnePhase) -> Result<Response, Reject> {
        let CommitOnePhase { txn, floor, work } = commit;
        self.learn_the_time(floor);
        let (proposal, chosen) = {
            let mut core = self.core.lock();
            let CoreInner { state, leader, .. } = &mut *core;
            let Some(leader) = leader else {
                return Err(self.not_leader());
            };
            match leader.begin_one_phase(state, txn, floor, &work) {
                Ok(commit_ts) => {
                    // Proposed under the lock, so that timestamps enter the log in their order.
                    let lead = leader.lead();
                    (self.submit(&Command::CommitOnePhase { lead, txn, commit_ts, work }), true)
                }
                // Durable like any answer here, so that a copy of this request that was delayed
                // cannot commit later.
                Err(cause) => (self.submit(&Command::Fence { txn, cause }), false),
            }
        };
        let output = match proposal {
            Ok(proposal) => proposal.output().await,
            Err(error) => Err(error),
        };
        match output {
            Ok(output) => Ok(outcome_response(output)),
            Err(error) => {
                if chosen && matches!(error, ProposeError::NotLeader { .. } | ProposeError::Overloaded) {
                    // It is in no log: readers need not wait for it.
                    self.core.handle(&mut self.core.lock(), Event::NotProposed { txn });
                }
                Err(error.into())
            }
        }
    }

    async fn outcome(&self, txn: TxnId) -> Result<Response, Reject> {
        if self.core.lock().leader.is_none() {
            return Err(self.not_leader());
        }
        let fence = Command::Fence { txn, cause: Cause::Settled };
        Ok(outcome_response(self.propose(&fence).await?))
    }

    async fn finish(&self, epoch: Epoch, decisions: Vec<(TxnId, Decision)>) -> Result<(), Reject> {
        fault::pass(FaultPoint::FinishReceived).await;
        let proposal = {
            let mut core = self.core.lock();
            let CoreInner { state, leader, .. } = &mut *core;
            let Some(leader) = leader else {
                return Err(self.not_leader());
            };
            let known = |(txn, _): &(TxnId, Decision)| state.prepared().contains_key(txn);
            let decisions: Vec<_> = decisions.into_iter().filter(known).collect();
            if decisions.is_empty() && epoch <= state.marks().epoch {
                // All of it was applied before. That it is durable too, a barrier makes sure of.
                None
            } else {
                leader.begin_finish(&decisions);
                Some(self.submit(&Command::Finish { epoch, decisions })?)
            }
        };
        match proposal {
            Some(proposal) => drop(proposal.output().await?),
            None => self.group.read_barrier().await?,
        }
        fault::pass(FaultPoint::Finished).await;
        Ok(())
    }

    async fn prepared(
        &self,
        epoch: Epoch,
        after: Option<TxnId>,
        count_max: usize,
    ) -> Result<Response, Reject> {
        let follows = {
            let core = self.core.lock();
            if core.leader.is_none() {
                return Err(self.not_leader());
            }
            core.state.marks().epoch >= epoch
        };
        if follows {
            self.group.read_barrier().await?;
        } else {
            self.propose(&Command::Follow { epoch }).await?;
        }
        let core = self.core.lock();
        let from = after.map_or(std::ops::Bound::Unbounded, std::ops::Bound::Excluded);
        let mut records = core.state.prepared().range((from, std::ops::Bound::Unbounded));
        let record = |(txn, record): (&TxnId, &super::state::Prepared)| PreparedTxn {
            txn: *txn,
            participants: record.participants.clone(),
        };
        let txns = records.by_ref().take(count_max.clamp(1, PREPARED_MAX)).map(record).collect();
        Ok(Response::Prepared { txns, more: records.next().is_some() })
    }

    // --- leading ----------------------------------------------------------------------------

    /// Takes the lead when the group is led from here, and gives it up when it is not.
    async fn follow_leadership(self: Arc<Inner>) {
        let depose = || {
            let mut core = self.core.lock();
            core.leader = None;
            // Whoever waits is told that this is not the leader any more.
            core.readers.clear();
            core.todo.clear();
        };
        let follow = self.group.follow_leadership(depose, || self.take_lead());
        self.stop.run_until_cancelled(follow).await;
    }

    /// Voids what earlier leaders proposed, and learns up to when they may have served reads. This
    /// future is dropped when the group is not led from here any more.
    async fn take_lead(&self) {
        let lead = loop {
            match self.propose(&Command::Lead).await {
                Ok(Output::Leads(lead)) => break lead,
                Ok(other) => unreachable!("a lead leads to a lead, not to {other:?}"),
                Err(error) => {
                    tracing::debug!(shard = %self.shard, %error, "cannot take the lead yet");
                    sleep(ASK_PAUSE).await;
                }
            }
        };
        let fresh = loop {
            match self.ask_the_time().await {
                Ok(fresh) => break fresh,
                Err(error) => {
                    tracing::debug!(shard = %self.shard, %error, "no timestamp yet, not serving yet");
                    sleep(ASK_PAUSE).await;
                }
            }
        };
        let mut core = self.core.lock();
        if core.state.marks().lead != lead {
            return;
        }
        core.leader = Some(Leader::new(lead, fresh, Instant::now(), &core.state));
        tracing::info!(shard = %self.shard, lead, "serving");
        self.core.changed.notify_one();
    }

    async fn watch_the_disk(self: Arc<Inner>) {
        self.stop.run_until_cancelled(self.group.step_down_on_stalls()).await;
    }

    /// Performs what the leader leaves to a task of its own: questions, proposals, timeouts.
    async fn drive(self: Arc<Inner>) {
        loop {
            let (todo, timeout) = {
                let mut core = self.core.lock();
                let todo = std::mem::take(&mut core.todo);
                (todo, core.leader.as_ref().and_then(Leader::poll_timeout))
            };
            for effect in todo {
                self.tasks.spawn(self.clone().perform(effect));
            }
            let due = async {
                match timeout {
                    Some(at) => sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = self.core.changed.notified() => {}
                () = due => {
                    let mut core = self.core.lock();
                    if let Some(leader) = &mut core.leader {
                        leader.handle_timeout(Instant::now());
                    }
                    core.perform();
                }
            }
        }
    }

    async fn perform(self: Arc<Inner>, effect: Effect) {
        match effect {
            Effect::Serve { .. } | Effect::Refuse { .. } => unreachable!("performed where it arises"),
            Effect::Finish { epoch, decisions } => {
                tracing::info!(shard = %self.shard, count = decisions.len(), "finishing transactions in doubt");
                let finished = tokio::select! {
                    () = self.stop.cancelled() => return,
                    finished = self.finish(epoch, decisions) => finished,
                };
                if let Err(error) = finished {
                    tracing::debug!(shard = %self.shard, %error, "cannot finish now");
                }
            }
            Effect::Ask { txns } => {
                let event = tokio::select! {
                    () = self.stop.cancelled() => return,
                    event = self.ask(txns) => event,
                };
                self.core.handle(&mut self.core.lock(), event);
            }
        }
    }

    async fn ask(&self, txns: Vec<TxnId>) -> Event {
        let request = coordinator::Request::Resolve { txns: txns.clone() };
        let deadline = tokio::time::Instant::now() + ASK_TIMEOUT;
        match self.router.coordinator(request, Resend::Idempotent, deadline).await {
            Ok(coordinator::Response::Resolved { epoch, resolutions }) if resolutions.len() == txns.len() => {
                Event::Resolved { epoch, resolutions: txns.into_iter().zip(resolutions).collect() }
            }
            Ok(_) => {
                tracing::warn!(shard = %self.shard, "the coordinator answered something else");
                Event::NotResolved { txns }
            }
            Err(error) => {
                tracing::debug!(shard = %self.shard, %error, "the coordinator cannot be asked");
                Event::NotResolved { txns }
            }
        }
    }
}

fn outcome_response(output: Output) -> Response {
    match output {
        Output::Outcome(outcome) => Response::Outcome(outcome),
        Output::Expired => Response::Expired,
        other => unreachable!("a one-shard transaction leads to an outcome, not to {other:?}"),
    }
}

/// A read's place among those that wait; given up when dropped.
struct Wait<'a> {
    core: &'a Core,
    id: u64,
    wake: oneshot::Receiver<Wake>,
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        let mut core = self.core.lock();
        if core.readers.remove(&self.id).is_some() {
            self.core.handle(&mut core, Event::GaveUp { id: self.id });
        }
    }
}
