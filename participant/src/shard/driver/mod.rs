//! Performs what a shard wants done: proposes to its group, reads its versions, answers, and asks
//! the coordinator.

mod moving;
mod operator;
mod reading;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{Instrument, Span};
use troth_protocol::clock::{Clock, monotonic};
use troth_protocol::fault;
use troth_protocol::message::admin::FaultPoint;
use troth_protocol::message::coordinator;
use troth_protocol::message::shard::{Decision, Prepare, Request, Response, Vote};
use troth_protocol::routing::{Resend, Router};
use troth_protocol::timeline::Timeline;
use troth_protocol::wire::encode;
use troth_protocol::{Epoch, Reject, ShardId, Timestamp, TxnId, txn_span};
use troth_replication::{
    Group, GroupConfig, Leadership, LogWriter, Proposal, ProposeError, StartError, Store,
};

pub use self::reading::DISK_READS_MAX;
use crate::hearing::Hearing;
use crate::metrics::Metrics;
use crate::mvcc::Mvcc;
use crate::shard::command::{Command, Output};
use crate::shard::leader::{Effect, Event, Leader};
use crate::shard::machine::{Core, Inner as CoreInner, ShardMachine, StoredView};
use crate::shard::requests::{self, Need, Rest};

/// How long one question to the coordinator may take, and the pause after it could not be asked.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);
const ASK_PAUSE: Duration = Duration::from_millis(20);

/// What the replicas of a node share.
pub struct Context {
    /// Where they keep what they have.
    pub store: Store,
    /// What makes their logs durable.
    pub writer: LogWriter,
    /// The way to coordinators.
    pub router: Arc<Router>,
    /// The wall clock.
    pub clock: Clock,
    /// Which coordinators may be obeyed.
    pub hearing: Arc<Hearing>,
    /// What happened to transactions lately.
    pub timeline: Arc<Timeline>,
    /// What is counted.
    pub metrics: Metrics,
    /// The places of those that wait for the disk.
    pub disk_reads: Arc<Semaphore>,
}

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
    hearing: Arc<Hearing>,
    clock: Clock,
    metrics: Metrics,
    next_read: AtomicU64,
    disk_reads: Arc<Semaphore>,
    /// The newest timestamp that a coordinator has shown.
    newest_known: AtomicU64,
    /// The move that this leader is at.
    moving: Mutex<Option<moving::Underway>>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Shard {
    /// Starts a replica with what is in the store.
    ///
    /// # Errors
    /// If what is stored is damaged, or the store cannot be read. Nothing was served then.
    pub async fn start(shard: ShardId, config: GroupConfig, context: Context) -> Result<Shard, StartError> {
        let Context { store, writer, router, hearing, clock, timeline, metrics, disk_reads } = context;
        let core = Core::new(shard, &timeline);
        let machine = ShardMachine::new(&store, shard, &core);
        let group = Group::start(config, &store, &writer, machine).await?;
        let inner = Arc::new(Inner {
            shard,
            mvcc: Mvcc::new(&store, shard),
            store,
            core,
            group,
            router,
            hearing,
            clock,
            metrics,
            next_read: AtomicU64::new(0),
            disk_reads,
            newest_known: AtomicU64::new(0),
            moving: Mutex::default(),
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
        });
        inner.tasks.spawn(inner.clone().follow_leadership());
        inner.tasks.spawn(inner.clone().drive());
        inner.tasks.spawn(inner.clone().watch_the_disk());
        inner.tasks.spawn(inner.clone().follow_moves());
        Ok(Shard { inner })
    }

    /// The group of this replica, for its other members.
    pub fn group(&self) -> &Group<ShardMachine> {
        &self.inner.group
    }

    /// Answers a request.
    pub async fn handle(&self, request: Request, deadline: Instant) -> Result<Response, Reject> {
        let inner = &self.inner;
        match request {
            Request::Read { at, keys } => inner.read(at, keys, deadline).await.map(Response::Values),
            Request::Scan { at, range, rows_max } => {
                let page = inner.scan(at, range, rows_max as usize, deadline).await?;
                Ok(Response::Page { rows: page.rows, more: page.more })
            }
            Request::Prepare(prepare) => {
                let span = txn_span!("prepare", prepare.txn, shard = %inner.shard);
                inner.prepare(prepare).instrument(span).await
            }
            Request::CommitOnePhase(commit) => {
                let span = txn_span!("commit in one phase", commit.txn, shard = %inner.shard);
                inner.learn_the_time(commit.floor);
                inner.answer(Request::CommitOnePhase(commit)).instrument(span).await
            }
            Request::Finish { epoch, decisions } => {
                let span = |(txn, _): &(TxnId, Decision)| txn_span!("finish", *txn, shard = %inner.shard);
                let _spans: Vec<Span> = decisions.iter().map(span).collect();
                inner.finish(epoch, decisions).await
            }
            request @ (Request::WhoLeads | Request::Prepared { .. } | Request::Outcome { .. }) => {
                inner.answer(request).await
            }
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
        // What is read from now on is no answer: the data may be on its way out.
        self.inner.core.lock().depose();
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

    // --- committing -------------------------------------------------------------------------

    fn submit(&self, command: &Command) -> Result<Proposal<ShardMachine>, ProposeError> {
        self.group.submit(encode(command).into())
    }

    async fn propose(&self, command: &Command) -> Result<Output, ProposeError> {
        self.submit(command)?.output().await
    }

    /// Answers a request as the leader says: after a barrier, or after a command.
    async fn answer(self: &Arc<Inner>, request: Request) -> Result<Response, Reject> {
        let opened = {
            let mut core = self.core.lock();
            let CoreInner { state, leader, .. } = &mut *core;
            let Some(leader) = leader else {
                return Err(self.not_leader());
            };
            let view = StoredView::in_memory(&self.store, self.shard);
            match leader.open(state, &view, request)? {
                Need::Nothing(response) => return Ok(response),
                Need::Barrier(rest) => (None, rest),
                // Proposed under the lock, so that timestamps enter the log in their order.
                Need::Entry(command, rest) => (Some(self.submit(&command)), rest),
                Need::Read(_) => unreachable!("reads have their own way"),
            }
        };
        let (output, rest) = match opened {
            (None, rest) => {
                self.group.read_barrier().await?;
                (None, rest)
            }
            (Some(proposal), rest) => (Some(self.output(proposal, &rest).await?), rest),
        };
        if matches!(output, Some(Output::Vote(Ok(())))) {
            fault::pass(FaultPoint::Prepared).await;
        }
        let core = self.core.lock();
        requests::close(rest, output, &core.state, core.leader.as_ref()).map_err(|reject| match reject {
            Reject::NotLeader { leader: None } => self.not_leader(),
            reject => reject,
        })
    }

    /// Waits for what a command brings.
    async fn output(
        self: &Arc<Inner>,
        proposal: Result<Proposal<ShardMachine>, ProposeError>,
        rest: &Rest,
    ) -> Result<Output, ProposeError> {
        let Rest::Outcome { begun: Some(txn) } = *rest else {
            return proposal?.output().await;
        };
        // From here on readers wait for it. So they must hear of it if it is in no log, also when nobody waits
        // for the answer any more: a task sees to that.
        let inner = self.clone();
        let waiting = tokio::spawn(async move {
            let output = match proposal {
                Ok(proposal) => proposal.output().await,
                Err(error) => Err(error),
            };
            if let Err(ProposeError::NotLeader { .. } | ProposeError::Overloaded) = output {
                inner.core.handle(&mut inner.core.lock(), Event::NotProposed { txn });
            }
            output
        });
        waiting.await.unwrap_or_else(|error| Err(ProposeError::Stopped(error.to_string())))
    }

    async fn prepare(self: &Arc<Inner>, prepare: Prepare) -> Result<Response, Reject> {
        let txn = prepare.txn;
        self.core.note(txn, "prepare received");
        self.learn_the_time(prepare.floor);
        fault::pass(FaultPoint::PrepareReceived).await;
        let answer = self.answer(Request::Prepare(prepare)).await;
        if let Ok(Response::Vote(Vote::No { .. })) = answer {
            self.core.note(txn, "voted no");
        }
        answer
    }

    async fn finish(
        self: &Arc<Inner>,
        epoch: Epoch,
        decisions: Vec<(TxnId, Decision)>,
    ) -> Result<Response, Reject> {
        fault::pass(FaultPoint::FinishReceived).await;
        let answer = self.answer(Request::Finish { epoch, decisions }).await?;
        fault::pass(FaultPoint::Finished).await;
        Ok(answer)
    }

    // --- leading ----------------------------------------------------------------------------

    /// Takes the lead when the group is led from here, and gives it up when it is not.
    async fn follow_leadership(self: Arc<Inner>) {
        // Whoever waits is told that this is not the leader any more.
        let depose = || self.core.lock().depose();
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
        core.leader = Some(Leader::new(lead, fresh, monotonic(), &core.state));
        self.metrics.led();
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
                        leader.handle_timeout(monotonic());
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
                tracing::debug!(shard = %self.shard, count = decisions.len(), "finishing transactions in doubt");
                let txns = decisions.iter().map(|(txn, _)| *txn).collect();
                let finished = tokio::select! {
                    () = self.stop.cancelled() => return,
                    finished = self.finish(epoch, decisions) => finished,
                };
                if let Err(error) = finished {
                    tracing::debug!(shard = %self.shard, %error, "cannot finish now");
                }
                self.core.handle(&mut self.core.lock(), Event::NotResolved { txns });
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
        let deadline = Instant::now() + ASK_TIMEOUT;
        match self.router.coordinator(request, Resend::Idempotent, deadline).await {
            Ok(coordinator::Response::Resolved { epoch, .. }) if self.hearing.obey(epoch).is_err() => {
                tracing::warn!(shard = %self.shard, %epoch, "a coordinator that knows too little is not obeyed");
                Event::NotResolved { txns }
            }
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
