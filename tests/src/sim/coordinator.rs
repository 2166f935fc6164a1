//! A coordinator: its state and its leader as in production, and what carries out what they want.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use troth_coordinator::command::{Command, Founding, Output, Settings};
use troth_coordinator::leader::{Answer, Claim, Effect, Event, Leader, Now, OnePhase, RequestId};
use troth_coordinator::recovery::PAGE;
use troth_coordinator::state::State;
use troth_coordinator::steward::Rules;
use troth_protocol::message::coordinator::{Commit, Request, Response};
use troth_protocol::message::{self, shard};
use troth_protocol::routing::{Resend, RouteError};
use troth_protocol::{ClientId, Epoch, GroupId, MapEpoch, ParticipantId, Reject, ShardId, TxnId};

use super::calls::{Owner, Purpose};
use super::group::Command as Logged;
use super::log::Log;
use super::shared::{Asker, Shared};
use super::store::CoordinatorDisk;
use super::told::Told;
use super::{Item, Later, Pace, Seat};

/// As in production.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(5);
const ATTEMPT_PAUSE: Duration = Duration::from_millis(20);

/// What is done when it is proven that this coordinator leads.
#[derive(Clone, PartialEq, Debug)]
pub enum CoordinatorThen {
    /// Hand out timestamps.
    Time {
        /// Who asks.
        asker: Asker,
        /// How many.
        count: u32,
        /// For transactions of this client.
        begins: Option<ClientId>,
    },
    /// Commit.
    Commit {
        /// Who asks.
        asker: Asker,
        /// The transaction.
        commit: Commit,
        /// When nobody waits any more.
        deadline: Duration,
    },
    /// Tell how a transaction ended.
    Outcome {
        /// Who asks.
        asker: Asker,
        /// The transaction.
        txn: TxnId,
        /// Its participants, as far as the asker knows.
        participants: Vec<ParticipantId>,
        /// When nobody waits any more.
        deadline: Duration,
    },
    /// Tell a shard what became of transactions.
    Resolve {
        /// Who asks.
        asker: Asker,
        /// The transactions.
        txns: Vec<TxnId>,
    },
}

impl CoordinatorThen {
    fn asker(&self) -> Asker {
        match self {
            CoordinatorThen::Time { asker, .. }
            | CoordinatorThen::Commit { asker, .. }
            | CoordinatorThen::Outcome { asker, .. }
            | CoordinatorThen::Resolve { asker, .. } => *asker,
        }
    }

    fn claim(&self) -> Claim {
        match self {
            CoordinatorThen::Time { .. } => Claim::Time,
            CoordinatorThen::Commit { .. }
            | CoordinatorThen::Outcome { .. }
            | CoordinatorThen::Resolve { .. } => Claim::Ending,
        }
    }
}

/// A coordinator in one life of its process.
#[derive(Clone, Debug)]
pub struct Coordinator {
    seat: Seat,
    /// How far its wall clock is off.
    pub offset_millis: i64,
    settings: Settings,
    log: Log<CoordinatorThen>,
    state: State,
    leader: Option<Leader>,
    disk: Told<CoordinatorDisk>,
    /// What a crash leaves.
    durable: (u64, Told<CoordinatorDisk>),
    requests: BTreeMap<RequestId, (Asker, TxnId)>,
    todo: VecDeque<Effect>,
    performing: bool,
    wake_at: Option<Instant>,
}

impl Coordinator {
    /// A new process with what is on disk.
    pub fn start(seat: Seat, settings: Settings, durable: (u64, Told<CoordinatorDisk>)) -> Coordinator {
        let (applied, disk) = durable.clone();
        Coordinator {
            seat,
            offset_millis: 0,
            settings,
            log: Log::new(seat, applied),
            state: disk.restore(),
            leader: None,
            disk,
            durable,
            requests: BTreeMap::new(),
            todo: VecDeque::new(),
            performing: false,
            wake_at: None,
        }
    }

    /// Which replica it is.
    pub fn seat(&self) -> Seat {
        self.seat
    }

    /// What a crash leaves.
    pub fn durable(&self) -> (u64, Told<CoordinatorDisk>) {
        self.durable.clone()
    }

    /// What is on disk becomes durable.
    pub fn flush(&mut self) {
        self.durable = (self.log.applied(), self.disk.clone());
    }

    /// How far the log is applied.
    pub fn applied(&self) -> u64 {
        self.log.applied()
    }

    /// Whether nothing is left to do.
    pub fn is_settled(&self) -> bool {
        let led = self.leader.as_ref().is_none_or(|leader| leader.in_flight() == 0 && leader.has_recovered());
        led && self.state.unfinished().is_empty() && self.todo.is_empty()
    }

    fn now(&self, shared: &Shared) -> Now {
        shared.now(self.offset_millis)
    }

    /// The log as it sees it.
    pub fn log(&self) -> &Log<CoordinatorThen> {
        &self.log
    }

    /// When it wants to be woken.
    pub fn wake_at(&self) -> Option<Instant> {
        self.wake_at
    }

    /// Whether somebody waits for the answer to a request.
    pub fn awaits(&self, id: RequestId) -> bool {
        self.requests.contains_key(&id)
    }

    /// Whether its leader is that of an epoch.
    pub fn leads_in(&self, epoch: Epoch) -> bool {
        self.leader.as_ref().is_some_and(|leader| leader.epoch() == epoch)
    }

    // --- requests -------------------------------------------------------------------------------

    /// Somebody asks.
    pub fn asked(&mut self, shared: &mut Shared, asker: Asker, request: &Request, deadline: Duration) {
        let then = match request.clone() {
            Request::Timestamps { count, begins } => CoordinatorThen::Time { asker, count, begins },
            Request::Commit(commit) => CoordinatorThen::Commit { asker, commit, deadline },
            Request::Outcome { txn, participants } => {
                CoordinatorThen::Outcome { asker, txn, participants, deadline }
            }
            Request::Resolve { txns } => CoordinatorThen::Resolve { asker, txns },
            Request::WhoLeads
            | Request::Map { .. }
            | Request::Register { .. }
            | Request::Moved { .. }
            | Request::Carried { .. }
            | Request::Ends { .. }
            | Request::Greet(_) => unreachable!("nobody asks this in a simulation"),
        };
        self.resume(shared, then);
    }

    /// Takes up a question: first of all it needs proof of leadership.
    pub fn resume(&mut self, shared: &mut Shared, then: CoordinatorThen) {
        if !then.claim().needs_barrier() {
            return self.proven(shared, then);
        }
        if let Err(then) = self.log.ask_barrier(shared, then) {
            self.refuse(shared, &then);
        }
    }

    fn refuse(&self, shared: &mut Shared, then: &CoordinatorThen) {
        shared.answer(self.seat.at, then.asker(), Err(self.log.not_leader(shared)));
    }

    /// A majority has answered.
    pub fn barrier(&mut self, shared: &mut Shared, barrier: u64, majority: bool) {
        match self.log.barrier(shared, barrier, majority) {
            Some(Ok(then)) => self.proven(shared, then),
            Some(Err(then)) => self.refuse(shared, &then),
            None => {}
        }
    }

    fn proven(&mut self, shared: &mut Shared, then: CoordinatorThen) {
        let now = self.now(shared);
        let Some(leader) = &mut self.leader else {
            return self.refuse(shared, &then);
        };
        match then {
            CoordinatorThen::Time { asker, count, begins } => {
                let epoch = leader.epoch();
                match leader.timestamps(now, count, begins) {
                    Some((first, admitted)) => {
                        let retry_after_millis = admitted.retry_after.as_millis() as u32;
                        let count = admitted.count;
                        let map = self.state.catalog().map_or(MapEpoch(0), |catalog| catalog.map.epoch);
                        let response = Response::Timestamps { first, count, retry_after_millis, epoch, map };
                        shared.answer(self.seat.at, asker, Ok(message::Response::Coordinator(response)));
                    }
                    None => {
                        let then = Box::new(CoordinatorThen::Time { asker, count, begins });
                        let again = Item::Resume { seat: self.seat, then };
                        shared.emit(Pace::After(Duration::from_millis(2)), again);
                    }
                }
            }
            CoordinatorThen::Commit { asker, commit, deadline } => {
                let id = self.wait(shared, asker, commit.txn, deadline);
                let deadline = shared.instant(deadline);
                return self.handle(shared, Event::Commit { id, commit, deadline });
            }
            CoordinatorThen::Outcome { asker, txn, participants, deadline } => {
                let id = self.wait(shared, asker, txn, deadline);
                return self.handle(shared, Event::Outcome { id, txn, participants });
            }
            CoordinatorThen::Resolve { asker, txns } => {
                let epoch = leader.epoch();
                let resolutions =
                    leader.resolve(&txns, &self.state, &*self.disk).expect("a modelled disk is readable");
                shared.ghost.resolved(&txns, &resolutions);
                let response = Response::Resolved { epoch, resolutions };
                shared.answer(self.seat.at, asker, Ok(message::Response::Coordinator(response)));
            }
        }
        self.perform(shared);
    }

    fn wait(&mut self, shared: &mut Shared, asker: Asker, txn: TxnId, deadline: Duration) -> RequestId {
        let id = shared.fresh(self.seat.at, &asker);
        self.requests.insert(id, (asker, txn));
        let wait = deadline.saturating_sub(shared.time);
        shared.emit(Pace::After(wait), Item::RequestOver { seat: self.seat, id });
        id
    }

    /// Nobody waits for an answer any longer.
    pub fn request_over(&mut self, shared: &mut Shared, id: RequestId) {
        if let Some((asker, txn)) = self.requests.remove(&id) {
            self.handle(shared, Event::GaveUp { id, txn });
            shared.answer(self.seat.at, asker, Err(Reject::DeadlineExceeded));
        }
    }

    // --- the leader -----------------------------------------------------------------------------

    fn handle(&mut self, shared: &mut Shared, event: Event) {
        let now = self.now(shared);
        if let Some(leader) = &mut self.leader {
            leader.handle_event(now, event, &self.state, &*self.disk);
            self.perform(shared);
        }
    }

    /// Tells a leader something, if it is still there.
    pub fn tell(&mut self, shared: &mut Shared, epoch: Epoch, event: Event) {
        if self.leads_in(epoch) {
            self.handle(shared, event);
        }
    }

    /// Something that was put off.
    pub fn later(&mut self, shared: &mut Shared, epoch: Epoch, what: Later) {
        match what {
            Later::Tell(event) => self.tell(shared, epoch, event),
            Later::Do(effect) if self.leads_in(epoch) => {
                self.todo.push_back(effect);
                self.schedule(shared);
            }
            Later::Do(_) => {}
        }
    }

    /// What is due.
    pub fn wake(&mut self, shared: &mut Shared) {
        let now = self.now(shared);
        // Another leader may have been woken by it.
        if self.wake_at.is_none_or(|at| at > now.instant) {
            return;
        }
        self.wake_at = None;
        if let Some(leader) = &mut self.leader {
            if leader.poll_timeout() <= now.instant {
                leader.handle_timeout(now, &self.state);
            }
            self.perform(shared);
        }
    }

    fn perform(&mut self, shared: &mut Shared) {
        let Some(leader) = &mut self.leader else { return };
        while let Some(effect) = leader.poll_effect() {
            match effect {
                Effect::Answer { id, answer } => {
                    let Some((asker, txn)) = self.requests.remove(&id) else { continue };
                    let answer = match answer {
                        Answer::Ended(outcome) => {
                            shared.ghost.answered(txn, &outcome);
                            Ok(message::Response::Coordinator(Response::Outcome(outcome)))
                        }
                        Answer::Expired => Ok(message::Response::Coordinator(Response::Expired)),
                        Answer::Rejected(reject) => Err(reject),
                    };
                    shared.answer(self.seat.at, asker, answer);
                }
                other => self.todo.push_back(other),
            }
        }
        let due = leader.poll_timeout();
        if self.wake_at.is_none_or(|at| due < at) {
            self.wake_at = Some(due);
            let wait = shared.since(due).saturating_sub(shared.time);
            shared.emit(Pace::After(wait), Item::Wake { seat: self.seat });
        }
        self.schedule(shared);
    }

    fn schedule(&mut self, shared: &mut Shared) {
        if !self.todo.is_empty() && !self.performing {
            self.performing = true;
            shared.emit(Pace::Local, Item::Perform { seat: self.seat });
        }
    }

    /// Does the next thing. Decisions that wait share one entry of the log.
    pub fn perform_next(&mut self, shared: &mut Shared) {
        self.performing = false;
        let Some(epoch) = self.leader.as_ref().map(Leader::epoch) else { return };
        let Some(effect) = self.todo.pop_front() else { return };
        match effect {
            Effect::Answer { .. } => unreachable!("performed where it arises"),
            Effect::Decide(mut decisions) => {
                self.todo.retain(|other| match other {
                    Effect::Decide(more) => {
                        decisions.extend(more.iter().cloned());
                        false
                    }
                    _ => true,
                });
                self.propose(shared, Command::Decide { epoch, decisions });
            }
            Effect::Refuse(txns) => self.propose(shared, Command::Refuse { txns }),
            Effect::Forget(txns) => self.propose(shared, Command::Forget { txns }),
            Effect::Retire(outcomes_before) => self.propose(shared, Command::Retire { outcomes_before }),
            Effect::Ceiling(ceiling) => self.propose(shared, Command::Ceiling { epoch, ceiling }),
            // Shards are moved by faults here, and nodes are not given up.
            Effect::Place(_) => {}
            Effect::Prepare { shard, prepare, deadline } => {
                let purpose = Purpose::Vote(epoch, prepare.txn, shard);
                let deadline = shared.since(deadline);
                self.call(shared, shard, shard::Request::Prepare(prepare), deadline, purpose);
            }
            Effect::CommitOnePhase { shard, commit, deadline } => {
                let purpose = Purpose::OnePhase(epoch, commit.txn, shard);
                let deadline = shared.since(deadline);
                self.call(shared, shard, shard::Request::CommitOnePhase(commit), deadline, purpose);
            }
            Effect::AskShard { shard, txn } => {
                let (request, purpose) =
                    (shard::Request::Outcome { txn }, Purpose::AskShard(epoch, txn, shard));
                self.call(shared, shard, request, shared.time + ATTEMPT_TIMEOUT, purpose);
            }
            Effect::Finish { shard, decisions } => {
                let request = shard::Request::Finish { epoch, decisions: decisions.clone() };
                let purpose = Purpose::Finish(epoch, shard, decisions);
                self.call(shared, shard, request, shared.time + ATTEMPT_TIMEOUT, purpose);
            }
            Effect::Collect { shard, after } => {
                let request = shard::Request::Prepared { epoch, after, count_max: PAGE };
                let purpose = Purpose::Collect(epoch, shard, after);
                self.call(shared, shard, request, shared.time + ATTEMPT_TIMEOUT, purpose);
            }
        }
        self.schedule(shared);
    }

    fn call(
        &self,
        shared: &mut Shared,
        shard: ShardId,
        request: shard::Request,
        deadline: Duration,
        purpose: Purpose,
    ) {
        let (owner, group) = (Owner::Seat(self.seat), GroupId::Shard(shard));
        let request = message::Request::Shard { shard, request };
        shared.call(owner, group, request, Resend::Idempotent, deadline, purpose);
    }

    /// A call has ended.
    pub fn called(
        &mut self,
        shared: &mut Shared,
        purpose: Purpose,
        result: Result<message::Response, RouteError>,
    ) {
        let response = match result {
            Ok(message::Response::Shard(response)) => Some(response),
            Ok(_) | Err(_) => None,
        };
        match purpose {
            Purpose::Vote(epoch, txn, shard) => {
                let vote = match response {
                    Some(shard::Response::Vote(vote)) => Some(vote),
                    _ => None,
                };
                let participant = ParticipantId::Shard(shard);
                self.tell(shared, epoch, Event::Voted { txn, participant, vote });
            }
            Purpose::OnePhase(epoch, txn, shard) => {
                let answer = one_phase(response);
                self.tell(shared, epoch, Event::OnePhase { txn, shard, answer });
            }
            Purpose::AskShard(epoch, txn, shard) => {
                let answer = one_phase(response);
                let known = answer != OnePhase::Unknown;
                self.soon(shared, epoch, known, Later::Tell(Event::OnePhase { txn, shard, answer }));
            }
            Purpose::Finish(epoch, shard, decisions) => {
                let ok = response == Some(shard::Response::Finished);
                self.soon(shared, epoch, ok, Later::Tell(Event::Delivered { shard, decisions, ok }));
            }
            Purpose::Collect(epoch, shard, after) => {
                let later = match response {
                    Some(shard::Response::Prepared { txns, more }) => {
                        let txns = txns.into_iter().map(|prepared| prepared.txn).collect();
                        return self.tell(shared, epoch, Event::Page { shard, txns, more });
                    }
                    _ => Later::Do(Effect::Collect { shard, after }),
                };
                self.soon(shared, epoch, false, later);
            }
            Purpose::Resolve(_)
            | Purpose::FreshTime(_)
            | Purpose::Begin
            | Purpose::Read(_)
            | Purpose::Commit
            | Purpose::Outcome => unreachable!("a coordinator does not call for {purpose:?}"),
        }
    }

    /// At once, or after a pause if it did not go well.
    fn soon(&mut self, shared: &mut Shared, epoch: Epoch, at_once: bool, what: Later) {
        if at_once {
            return self.later(shared, epoch, what);
        }
        let later = Item::Later { seat: self.seat, epoch, what: Box::new(what) };
        shared.emit(Pace::After(ATTEMPT_PAUSE), later);
    }

    // --- the log --------------------------------------------------------------------------------

    fn propose(&self, shared: &mut Shared, command: Command) {
        self.log.propose(shared, Logged::Coordinator(command));
    }

    /// Hears that it leads, or not any more.
    pub fn role(&mut self, shared: &mut Shared, term: u64, leads: bool) {
        if !self.log.role(term, leads) {
            return;
        }
        self.forget_leading(shared);
        for then in self.log.give_up() {
            self.refuse(shared, &then);
        }
        if leads {
            let founding = Founding { settings: self.settings, ..Founding::default() };
            let lead = Command::Lead { leader: Default::default(), founding };
            self.log.take_lead(shared, Logged::Coordinator(lead));
        }
    }

    fn forget_leading(&mut self, shared: &mut Shared) {
        self.leader = None;
        self.todo.clear();
        for (asker, _) in std::mem::take(&mut self.requests).into_values() {
            shared.answer(self.seat.at, asker, Err(Reject::Deposed));
        }
    }

    /// Hears how far the log is committed.
    pub fn learn(&mut self, shared: &mut Shared, upto: u64) {
        self.log.learn(shared, upto);
    }

    /// Applies the next entry.
    pub fn apply(&mut self, shared: &mut Shared) {
        let Some((index, entry)) = self.log.next(shared) else { return };
        let Logged::Coordinator(command) = &*entry.command else {
            unreachable!("the coordinators' log holds their commands");
        };
        if let Command::Lead { .. } = command {
            // Whoever led before in this process does not any more.
            self.forget_leading(shared);
        }
        let mut mutations = Vec::new();
        let output = self
            .state
            .apply(index, command.clone(), &*self.disk, &mut mutations)
            .expect("a modelled disk is readable");
        shared.ghost.coordinator_applied(index, command, &output);
        if let Command::Retire { .. } = command {
            let marks = self.state.marks();
            let kept = marks.ceiling.minus(shared.limits.outcome_retention);
            shared.ghost.gives_up_outcomes(marks.outcomes_before, kept);
        }
        self.disk.write(mutations, &self.state);
        self.log.applied_next();
        match (&output, command) {
            (Output::Verdicts(verdicts), Command::Decide { decisions, .. }) => {
                let txns = decisions.iter().map(|decision| decision.txn);
                let verdicts = txns.zip(verdicts.iter().copied()).collect();
                self.handle(shared, Event::Applied { verdicts });
            }
            (Output::Verdicts(verdicts), Command::Refuse { txns }) => {
                let verdicts = txns.iter().copied().zip(verdicts.iter().copied()).collect();
                self.handle(shared, Event::Applied { verdicts });
            }
            (_, Command::Ceiling { .. }) => {
                self.handle(shared, Event::Ceiling(self.state.marks().ceiling));
            }
            (Output::Leads(epoch), Command::Lead { .. }) if self.log.is_lead(&entry) => {
                let now = self.now(shared);
                let rules = Rules { replace_after: Duration::from_secs(1 << 30), ..Rules::default() };
                self.leader = Some(Leader::new(*epoch, shared.limits, rules, now, &self.state));
                self.wake_at = None;
                self.perform(shared);
            }
            _ => {}
        }
        for then in self.log.go_on(shared) {
            self.proven(shared, then);
        }
    }
}

fn one_phase(response: Option<shard::Response>) -> OnePhase {
    match response {
        Some(shard::Response::Outcome(outcome)) => OnePhase::Ended(outcome),
        Some(shard::Response::Expired) => OnePhase::Expired,
        _ => OnePhase::Unknown,
    }
}
