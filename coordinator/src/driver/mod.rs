//! Performs what the coordinators' leader wants done: proposes to the group, calls shards, answers.

mod errand;
mod members;
mod placement;
mod switchover;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;
use troth_protocol::fault;
use troth_protocol::message::admin::{CoordinatorStatus, FaultPoint, TxnKnowledge};
use troth_protocol::message::coordinator::{Request, Response};
use troth_protocol::message::overview::Election;
use troth_protocol::message::shard::{self};
use troth_protocol::routing::Router;
use troth_protocol::wire::encode;
use troth_protocol::{ClientId, MapEpoch, Node, NodeId, Reject, TxnId, txn_span};
use troth_replication::{
    Group, GroupConfig, Leadership, LogWriter, Proposal, ProposeError, StartError, Store,
};

use crate::admission::Admitted;
use crate::command::{Command, Founding, Output, Record};
use crate::door::Door;
use crate::door::peers::Peers;
use crate::eyes::Eyes;
use crate::leader::{Answer, Claim, Event, Leader, Limits};
use crate::machine::{CoordinatorMachine, Core, Inner as CoreInner};
use crate::metrics::Metrics;
use crate::notices::Notices;
use crate::state::View;
use crate::steward::Rules;
use errand::Errand;
use placement::{Said, Signs};

/// Timestamps that one request may ask for.
const TIMESTAMPS_MAX: u32 = 4096;

/// How long handing leadership over to another coordinator may take.
const HAND_OVER_PATIENCE: Duration = Duration::from_secs(5);

/// The pause after an attempt that is repeated until it succeeds.
const ATTEMPT_PAUSE: Duration = Duration::from_millis(100);

/// A coordinator, as its process sees it. Cheap to clone.
#[derive(Clone)]
pub struct Coordinator {
    inner: Arc<Inner>,
}

struct Inner {
    id: NodeId,
    founding: Founding,
    door: Door,
    peers: Arc<Peers>,
    notices: Arc<Notices>,
    /// The participants that have confirmed that this one has all that they have heard of.
    confirmed: watch::Sender<BTreeSet<NodeId>>,
    /// That time is ahead of the clock was said.
    said_ahead: AtomicBool,
    /// What participants have said of themselves to this leader.
    signs: Mutex<Signs>,
    /// Why this coordinator must not go on, once it must not.
    failure: watch::Sender<Option<String>>,
    limits: Limits,
    rules: Rules,
    core: Arc<Core>,
    group: Group<CoordinatorMachine>,
    router: Arc<Router>,
    next_request: AtomicU64,
    /// Nothing new is admitted: leadership is about to be handed over.
    handing_over: watch::Sender<bool>,
    /// What this leader sees, for operators.
    eyes: Mutex<Eyes>,
    metrics: Metrics,
    /// A commit that takes longer is logged with all that happened to it.
    slow: Duration,
    stop: CancellationToken,
    tasks: TaskTracker,
}

/// What a coordinator is started with.
pub struct CoordinatorConfig {
    /// Which one it is.
    pub id: NodeId,
    /// What a new cluster shall be like.
    pub founding: Founding,
    /// What lets it take part.
    pub door: Door,
    /// The other ones.
    pub peers: Arc<Peers>,
    /// What operators should know.
    pub notices: Arc<Notices>,
    /// What bounds the leader.
    pub limits: Limits,
    /// How placement follows the ring.
    pub rules: Rules,
    /// A commit that takes longer is logged with all that happened to it.
    pub slow: Duration,
}

impl Coordinator {
    /// Starts a coordinator with what is in the store.
    ///
    /// # Errors
    /// If what is stored is damaged, or the store cannot be read. Nothing was served then.
    pub async fn start(
        config: CoordinatorConfig,
        group: GroupConfig,
        store: &Store,
        writer: &LogWriter,
        core: Arc<Core>,
        router: Arc<Router>,
    ) -> Result<Coordinator, StartError> {
        let machine = CoordinatorMachine::new(store, &core);
        let group = Group::start(group, store, writer, machine).await?;
        let CoordinatorConfig { id, founding, door, peers, notices, limits, rules, slow } = config;
        let inner = Arc::new(Inner {
            id,
            founding,
            door,
            peers,
            notices,
            confirmed: watch::channel(BTreeSet::new()).0,
            said_ahead: AtomicBool::new(false),
            signs: Mutex::default(),
            failure: watch::channel(None).0,
            limits,
            rules,
            core,
            group,
            router,
            next_request: AtomicU64::new(0),
            handing_over: watch::channel(false).0,
            eyes: Mutex::default(),
            metrics: Metrics::default(),
            slow,
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
        });
        inner.tasks.spawn(inner.clone().follow_leadership());
        inner.tasks.spawn(inner.clone().drive());
        inner.tasks.spawn(inner.clone().follow_map());
        inner.tasks.spawn(inner.clone().watch_the_disk());
        inner.tasks.spawn(inner.clone().stay_known());
        inner.tasks.spawn(inner.clone().keep_members());
        Ok(Coordinator { inner })
    }

    /// The group of this coordinator, for its other members.
    pub fn group(&self) -> &Group<CoordinatorMachine> {
        &self.inner.group
    }

    /// What it counts and measures.
    pub fn metrics(&self) -> &Metrics {
        &self.inner.metrics
    }

    /// What operators should know.
    pub(crate) fn notices(&self) -> &Notices {
        &self.inner.notices
    }

    pub(crate) fn core(&self) -> &Core {
        &self.inner.core
    }

    /// The same, without keeping it alive.
    pub fn downgrade(&self) -> WeakCoordinator {
        WeakCoordinator(Arc::downgrade(&self.inner))
    }

    /// Answers a request.
    ///
    /// # Errors
    /// See [`Reject`].
    pub async fn handle(&self, request: Request, deadline: Instant) -> Result<Response, Reject> {
        let inner = &self.inner;
        match request {
            Request::Timestamps { count, begins } => inner.timestamps(count, begins, deadline).await,
            Request::Commit(commit) => {
                fault::pass(FaultPoint::CommitReceived).await;
                let (txn, began) = (commit.txn, Instant::now());
                let deadline_std = deadline.into_std();
                let event = |id| Event::Commit { id, commit, deadline: deadline_std };
                let asking = inner.ask_leader(txn, event, deadline);
                let answer = asking.instrument(txn_span!("commit", txn)).await;
                inner.note_end(txn, &answer, began.elapsed());
                answer
            }
            Request::Outcome { txn, participants } => {
                let event = |id| Event::Outcome { id, txn, participants };
                inner.ask_leader(txn, event, deadline).await
            }
            Request::WhoLeads => inner.who_leads().await,
            Request::Map { known } => Ok(inner.map(known)),
            Request::Register { node, folder, previous, progress, heard, known, report } => {
                let said = Said { node, folder, previous, progress, heard };
                inner.register(said, known, report).await
            }
            Request::Ends { server, reason } => {
                inner.notices.refused(&server, &reason);
                Ok(Response::Noted)
            }
            Request::Greet(greeting) => inner.peers.welcome(greeting).await.map(Response::Welcome),
            Request::Moved { shard, voters, formed } => inner.moved(shard, voters, formed).await,
            Request::Carried { bytes } => inner.carried(bytes).await,
            Request::Resolve { txns } => inner.resolve(&txns).await,
        }
    }

    /// Hands leadership to another coordinator, and returns which one has it. What is under way is
    /// finished first, and whatever else arrives waits; so no transaction fails by it.
    ///
    /// # Errors
    /// If this one does not lead, the other one is not fit to, or what is under way does not end
    /// within a few seconds; this one leads on then. If the other one is fit and all the same does not
    /// take over, somebody else is elected, about as soon as after this one's death.
    pub async fn switchover(&self, to: Option<NodeId>, deadline: Instant) -> Result<NodeId, Reject> {
        self.inner.switchover(to, deadline, false).await
    }

    /// The same before a stop: also if not all that is under way ends in time, since waiting longer for
    /// it would only be followed by an election.
    ///
    /// # Errors
    /// If this one does not lead, or no other one is fit to.
    pub async fn resign(&self, deadline: Instant) -> Result<NodeId, Reject> {
        match timeout_at(deadline, self.inner.switchover(None, deadline, true)).await {
            Ok(result) => result,
            Err(_) => Err(Reject::DeadlineExceeded),
        }
    }

    /// What it knows of a transaction.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub fn knowledge(&self, txn: TxnId) -> Result<TxnKnowledge, Reject> {
        let core = &self.inner.core;
        let record =
            core.view().record(txn).map_err(|error| Reject::Internal { reason: error.to_string() })?;
        let decision = record.map(|record| match record {
            Record::Committed { commit_ts } => shard::Decision::Commit { commit_ts },
            Record::Refused => shard::Decision::Abort,
        });
        Ok(TxnKnowledge { decision, shards: Vec::new(), moments: core.timeline.of(txn), audit: Vec::new() })
    }

    /// How it is.
    pub fn status(&self) -> CoordinatorStatus {
        let inner = &self.inner;
        let core = inner.core.lock();
        let leader = match &*inner.group.leadership().borrow() {
            Leadership::Follower { leader } => *leader,
            Leadership::Leader { .. } => Some(inner.id),
            Leadership::Failed { .. } => None,
        };
        let (committed, aborted) = core.leader.as_ref().map_or((0, 0), Leader::counts);
        let eyes = inner.eyes.lock();
        let since = |node: &Node| (node.id, eyes.since(node.id));
        let map = core.state.catalog().map(|catalog| &catalog.map);
        CoordinatorStatus {
            cluster: inner.founding.settings.cluster,
            id: inner.id,
            version: env!("CARGO_PKG_VERSION").into(),
            leader,
            epoch: core.leader.as_ref().filter(|_| inner.leads_indeed()).map(Leader::epoch),
            map_epoch: map.map_or(MapEpoch(0), |map| map.epoch),
            in_flight: core.leader.as_ref().map_or(0, Leader::in_flight) as u64,
            unfinished: core.state.unfinished().len() as u64,
            committed,
            aborted,
            nodes_seen: map.map_or(Vec::new(), |map| map.nodes.iter().map(since).collect()),
            members: core.state.catalog().map_or(Vec::new(), |catalog| catalog.coordinators.clone()),
            notices: inner.notices.latest(),
        }
    }

    /// Why it must not go on, once it must not.
    pub fn failure(&self) -> watch::Receiver<Option<String>> {
        self.inner.failure.subscribe()
    }

    /// Stops. What was acknowledged stays.
    pub async fn shutdown(&self) {
        self.inner.stop.cancel();
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
        self.inner.group.shutdown().await;
        if self.inner.failure.borrow().is_none() {
            self.inner.door.tell_the_end().await;
        }
    }
}

/// A coordinator that may have ended.
#[derive(Clone)]
pub struct WeakCoordinator(Weak<Inner>);

impl WeakCoordinator {
    /// The coordinator, unless it has ended.
    pub fn upgrade(&self) -> Option<Coordinator> {
        Some(Coordinator { inner: self.0.upgrade()? })
    }
}

impl Inner {
    /// Whether what this leader takes for its leadership is so, as far as it can know: its disk works, and a majority
    /// was heard of in the last seconds.
    fn leads_indeed(&self) -> bool {
        !self.group.is_stalled() && self.group.is_led()
    }

    fn not_leader(&self) -> Reject {
        let leader = match &*self.group.leadership().borrow() {
            Leadership::Follower { leader } => *leader,
            Leadership::Leader { .. } | Leadership::Failed { .. } => None,
        };
        Reject::NotLeader { leader }
    }

    // --- requests -------------------------------------------------------------------------------

    /// Makes sure that what is claimed by a leader may be: at some moment after this call began it led.
    async fn prove(&self, claim: Claim) -> Result<(), Reject> {
        if claim.needs_barrier() {
            self.group.read_barrier().await?;
        }
        Ok(())
    }

    async fn who_leads(&self) -> Result<Response, Reject> {
        self.prove(Claim::Leadership).await?;
        if self.core.lock().leader.is_none() { Err(self.not_leader()) } else { Ok(Response::Leading) }
    }

    /// Waits while leadership is being handed over.
    async fn until_admitted(&self, deadline: Instant) -> Result<(), Reject> {
        let mut handing_over = self.handing_over.subscribe();
        match timeout_at(deadline, handing_over.wait_for(|handing_over| !handing_over)).await {
            Ok(_) => Ok(()),
            Err(_) => Err(Reject::overloaded(ATTEMPT_PAUSE)),
        }
    }

    async fn timestamps(
        &self,
        count: u32,
        begins: Option<ClientId>,
        deadline: Instant,
    ) -> Result<Response, Reject> {
        if count > TIMESTAMPS_MAX {
            return Err(Reject::malformed(format!("at most {TIMESTAMPS_MAX} timestamps at once")));
        }
        // Also while leadership is handed over: a shard that has just got a leader needs one before it
        // can take part in ending what is under way.
        loop {
            self.prove(Claim::Time).await?;
            let now = self.core.now();
            let handed_out = {
                let mut core = self.core.lock();
                let Some(leader) = &mut core.leader else {
                    return Err(self.not_leader());
                };
                let handed_out = leader.timestamps(now, count, begins);
                let epoch = leader.epoch();
                let map = core.state.catalog().map_or(MapEpoch(0), |catalog| catalog.map.epoch);
                self.core.perform(&mut core);
                handed_out.map(|(first, Admitted { count: granted, retry_after })| {
                    self.metrics.timestamps(granted, count.max(1) - granted);
                    let retry_after_millis = retry_after.as_millis() as u32;
                    Response::Timestamps { first, count: granted, retry_after_millis, epoch, map }
                })
            };
            if let Some(response) = handed_out {
                return Ok(response);
            }
            // A ceiling is on its way: a round of the log.
            let soon = Instant::now() + Duration::from_millis(2);
            if soon > deadline {
                return Err(Reject::DeadlineExceeded);
            }
            sleep_until(soon).await;
        }
    }

    /// Hands a question about a transaction to the leader, and waits for its answer.
    async fn ask_leader(
        &self,
        txn: TxnId,
        event: impl FnOnce(u64) -> Event,
        deadline: Instant,
    ) -> Result<Response, Reject> {
        let id = self.next_request.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = oneshot::channel();
        let request = loop {
            self.until_admitted(deadline).await?;
            // An answer may be *aborted*, which only a leader may say.
            self.prove(Claim::Ending).await?;
            let mut core = self.core.lock();
            if core.leader.is_none() {
                return Err(self.not_leader());
            }
            // Looked at under the lock under which the handing over counts what is under way.
            if *self.handing_over.borrow() {
                continue;
            }
            core.requests.insert(id, sender);
            self.core.handle(&mut core, event(id));
            break Waiting { core: &self.core, id, txn };
        };
        let answer = timeout_at(deadline, answer).await;
        fault::pass(FaultPoint::BeforeReply).await;
        drop(request);
        match answer {
            Ok(Ok(Answer::Ended(outcome))) => Ok(Response::Outcome(outcome)),
            Ok(Ok(Answer::Expired)) => Ok(Response::Expired),
            Ok(Ok(Answer::Rejected(reject))) => Err(reject),
            Ok(Err(_)) => Err(Reject::Deposed),
            Err(_) => Err(Reject::DeadlineExceeded),
        }
    }

    async fn resolve(&self, txns: &[TxnId]) -> Result<Response, Reject> {
        self.prove(Claim::Ending).await?;
        let mut core = self.core.lock();
        let CoreInner { state, leader, .. } = &mut *core;
        let Some(leader) = leader else {
            return Err(self.not_leader());
        };
        let resolutions = leader
            .resolve(txns, state, &self.core.view())
            .map_err(|error| Reject::Internal { reason: error.to_string() })?;
        Ok(Response::Resolved { epoch: leader.epoch(), resolutions })
    }

    fn map(&self, known: MapEpoch) -> Response {
        let core = self.core.lock();
        match core.state.catalog() {
            Some(catalog) if catalog.map.epoch > known => Response::Map(catalog.map.clone()),
            Some(_) | None => Response::MapUnchanged,
        }
    }

    // --- leading --------------------------------------------------------------------------------

    fn submit(&self, command: &Command) -> Result<Proposal<CoordinatorMachine>, ProposeError> {
        self.group.submit(encode(command).into())
    }

    async fn propose(&self, command: &Command) -> Result<Output, ProposeError> {
        self.submit(command)?.output().await
    }

    /// Takes the lead when the group is led from here, and gives it up when it is not.
    async fn follow_leadership(self: Arc<Inner>) {
        let depose = || {
            // Whoever waits is told that the next leader knows.
            self.core.lock().depose();
            *self.eyes.lock() = Eyes::default();
            *self.signs.lock() = Signs::default();
        };
        let follow = self.group.follow_leadership(depose, || self.take_lead());
        self.stop.run_until_cancelled(follow).await;
    }

    /// Begins a new epoch, as soon as the group lets it: this future is dropped when the group is
    /// not led from here any more.
    async fn take_lead(&self) {
        self.be_confirmed().await;
        let lead = Command::Lead { leader: self.door.incarnation(), founding: self.founding.clone() };
        let epoch = loop {
            match self.propose(&lead).await {
                Ok(Output::Leads(epoch)) => break epoch,
                Ok(other) => unreachable!("a lead leads to an epoch, not to {other:?}"),
                Err(error) => {
                    tracing::debug!(%error, "cannot take the lead yet");
                    sleep(ATTEMPT_PAUSE).await;
                }
            }
        };
        let mut core = self.core.lock();
        if core.state.marks().epoch != epoch {
            return;
        }
        let (stored, configured) =
            (core.state.catalog().map(|catalog| catalog.settings), self.founding.settings);
        if let Some(stored) = stored.filter(|stored| *stored != configured) {
            tracing::warn!(?stored, ?configured, "the cluster keeps what it was made with");
        }
        let now = self.core.now();
        let leader = Leader::new(epoch, self.limits, self.rules, now, &core.state);
        self.metrics.led();
        self.eyes.lock().elected(Election { at_ms: now.millis, shard: None, node: self.id });
        tracing::info!(%epoch, unfinished = core.state.unfinished().len(), "leading");
        core.leader = Some(leader);
        self.core.perform(&mut core);
    }

    async fn watch_the_disk(self: Arc<Inner>) {
        self.stop.run_until_cancelled(self.group.step_down_on_stalls()).await;
    }

    /// Keeps the router's map as new as the state's.
    async fn follow_map(self: Arc<Inner>) {
        let mut epoch = self.core.map_epoch.subscribe();
        loop {
            let known = {
                let core = self.core.lock();
                core.state.catalog().map(|catalog| (catalog.map.clone(), catalog.coordinators.clone()))
            };
            if let Some((map, coordinators)) = known {
                self.router.learn(map);
                self.peers.learn(&coordinators);
            }
            tokio::select! {
                () = self.stop.cancelled() => return,
                changed = epoch.changed() => if changed.is_err() { return },
            }
        }
    }

    /// Performs what the leader leaves to a task of its own.
    async fn drive(self: Arc<Inner>) {
        loop {
            let (todo, leader) = {
                let mut core = self.core.lock();
                let leader = core.leader.as_ref().map(|leader| (leader.epoch(), leader.poll_timeout()));
                (std::mem::take(&mut core.todo), leader)
            };
            if let Some((epoch, _)) = leader {
                Errand { inner: self.clone(), epoch }.perform(todo).await;
            }
            let timeout = leader.map(|(_, timeout)| timeout);
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
                    let now = self.core.now();
                    let mut core = self.core.lock();
                    let CoreInner { state, leader, .. } = &mut *core;
                    if let Some(leader) = leader {
                        leader.handle_timeout(now, state);
                    }
                    self.core.perform(&mut core);
                }
            }
        }
    }
}

/// A request's place among those that wait; given up when dropped.
struct Waiting<'a> {
    core: &'a Core,
    id: u64,
    txn: TxnId,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut core = self.core.lock();
        if core.requests.remove(&self.id).is_some() {
            self.core.handle(&mut core, Event::GaveUp { id: self.id, txn: self.txn });
        }
    }
}
