//! A replica of a shard: its state and its leader as in production, and what carries out what they want.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use troth_participant::shard::command::{Command, Output};
use troth_participant::shard::leader::{Effect, Event, Leader, Target};
use troth_participant::shard::requests::{self, Need, Rest, check_readable, reads_need_barrier};
use troth_participant::shard::state::{Mutation, State};
use troth_protocol::message::coordinator;
use troth_protocol::message::shard::{Request, Response};
use troth_protocol::message::{self};
use troth_protocol::routing::{Resend, RouteError};
use troth_protocol::{GroupId, Reject, ShardId, Timestamp, TxnId};

use super::calls::{Owner, Purpose};
use super::group::{Command as Logged, ProposalId};
use super::log::Log;
use super::shared::{Asker, Shared};
use super::store::ShardDisk;
use super::told::Told;
use super::{Item, Pace, Seat};

/// As in production.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);
const ASK_PAUSE: Duration = Duration::from_millis(20);

/// Who hears of the end of a request.
#[derive(Clone, PartialEq, Debug)]
pub enum Caller {
    /// Somebody outside.
    Asker(Asker),
    /// This shard itself, which finishes these.
    Own(Vec<TxnId>),
}

/// A read that waits, or is about to look.
#[derive(Clone, PartialEq, Debug)]
pub struct Reading {
    asker: Asker,
    at: Timestamp,
    target: Target,
}

/// What is done when it is proven that this replica leads.
#[derive(Clone, PartialEq, Debug)]
pub enum Then {
    /// A request is answered.
    Close(Caller, Rest),
    /// A read looks, before nobody waits any more.
    Read(Reading, Duration),
}

/// A replica in one life of its process.
#[derive(Clone, Debug)]
pub struct Shard {
    seat: Seat,
    shard: ShardId,
    log: Log<Then>,
    state: State,
    leader: Option<Leader>,
    disk: Told<ShardDisk>,
    /// What a crash leaves.
    durable: (u64, Told<ShardDisk>),
    proposals: BTreeMap<ProposalId, (Caller, Rest)>,
    /// Reads that wait for a transaction to end.
    readers: BTreeMap<u64, Reading>,
    /// Reads that may look.
    looking: BTreeMap<u64, Reading>,
    todo: VecDeque<Effect>,
    performing: bool,
    wake_at: Option<Instant>,
    /// The largest timestamp that anybody had got when it asked the time.
    asked_time: Timestamp,
}

impl Shard {
    /// A new process with what is on disk.
    pub fn start(seat: Seat, shard: ShardId, durable: (u64, Told<ShardDisk>)) -> Shard {
        let (applied, disk) = durable.clone();
        Shard {
            seat,
            shard,
            log: Log::new(seat, applied),
            state: disk.restore(),
            leader: None,
            disk,
            durable,
            proposals: BTreeMap::new(),
            readers: BTreeMap::new(),
            looking: BTreeMap::new(),
            todo: VecDeque::new(),
            performing: false,
            wake_at: None,
            asked_time: Timestamp::ZERO,
        }
    }

    /// Which replica it is.
    pub fn seat(&self) -> Seat {
        self.seat
    }

    /// What a crash leaves.
    pub fn durable(&self) -> (u64, Told<ShardDisk>) {
        self.durable.clone()
    }

    /// What a snapshot of it holds, and how far the log is applied.
    pub fn snapshot(&self) -> (u64, Told<ShardDisk>) {
        (self.log.applied(), Told::new(self.disk.snapshot(self.shard)))
    }

    /// What is on disk becomes durable.
    pub fn flush(&mut self) {
        self.durable = (self.log.applied(), self.disk.clone());
    }

    /// How far the log is applied.
    pub fn applied(&self) -> u64 {
        self.log.applied()
    }

    /// The log as it sees it.
    pub fn log(&self) -> &Log<Then> {
        &self.log
    }

    /// When it wants to be woken.
    pub fn wake_at(&self) -> Option<Instant> {
        self.wake_at
    }

    /// Whether a read waits for a transaction to end.
    pub fn awaits(&self, read: u64) -> bool {
        self.readers.contains_key(&read)
    }

    /// Its leader's memory, while it leads and serves.
    pub fn leader(&self) -> Option<&Leader> {
        self.leader.as_ref()
    }

    /// Whether nothing is left to do.
    pub fn is_settled(&self) -> bool {
        self.state.prepared().is_empty() && self.readers.is_empty() && self.todo.is_empty()
    }

    fn answer(&mut self, shared: &mut Shared, caller: Caller, answer: Result<Response, Reject>) {
        match caller {
            Caller::Asker(asker) => {
                shared.answer(self.seat.at, asker, answer.map(message::Response::Shard));
            }
            Caller::Own(txns) => self.handle(shared, Event::NotResolved { txns }),
        }
    }

    // --- requests -------------------------------------------------------------------------------

    /// Somebody asks.
    pub fn asked(&mut self, shared: &mut Shared, asker: Asker, request: &Request, deadline: Duration) {
        match request.clone() {
            Request::Read { at, keys } => {
                self.read(shared, Reading { asker, at, target: Target::Keys(keys) }, deadline);
            }
            Request::Scan { at, range, .. } => {
                self.read(shared, Reading { asker, at, target: Target::Range(range) }, deadline);
            }
            request => self.request(shared, Caller::Asker(asker), request),
        }
    }

    fn request(&mut self, shared: &mut Shared, caller: Caller, request: Request) {
        let Some(leader) = &mut self.leader else {
            let reject = self.log.not_leader(shared);
            return self.answer(shared, caller, Err(reject));
        };
        match leader.open(&self.state, &*self.disk, request) {
            Ok(Need::Nothing(response)) => self.answer(shared, caller, Ok(response)),
            Ok(Need::Barrier(rest)) => {
                let then = Then::Close(caller, rest);
                if let Err(then) = self.log.ask_barrier(shared, then) {
                    self.refuse(shared, then);
                }
            }
            Ok(Need::Entry(command, rest)) => {
                let proposal = self.log.propose(shared, Logged::Shard(command));
                let proposal = proposal.expect("who serves believes to lead");
                self.proposals.insert(proposal, (caller, rest));
            }
            Ok(Need::Read(_)) => unreachable!("reads have their own way"),
            Err(reject) => self.answer(shared, caller, Err(reject)),
        }
        self.perform(shared);
    }

    fn read(&mut self, shared: &mut Shared, reading: Reading, deadline: Duration) {
        if !reads_need_barrier() {
            return self.proven(shared, Then::Read(reading, deadline));
        }
        if let Err(then) = self.log.ask_barrier(shared, Then::Read(reading, deadline)) {
            self.refuse(shared, then);
        }
    }

    /// A majority has answered.
    pub fn barrier(&mut self, shared: &mut Shared, barrier: u64, majority: bool) {
        match self.log.barrier(shared, barrier, majority) {
            Some(Ok(then)) => self.proven(shared, then),
            Some(Err(then)) => self.refuse(shared, then),
            None => {}
        }
    }

    fn refuse(&mut self, shared: &mut Shared, then: Then) {
        let reject = self.log.not_leader(shared);
        match then {
            Then::Close(caller, _) => self.answer(shared, caller, Err(reject)),
            Then::Read(reading, _) => self.answer(shared, Caller::Asker(reading.asker), Err(reject)),
        }
    }

    fn proven(&mut self, shared: &mut Shared, then: Then) {
        match then {
            Then::Close(caller, rest) => {
                let answer = requests::close(rest, None, &self.state, self.leader.as_ref());
                self.answer(shared, caller, answer);
            }
            Then::Read(reading, deadline) => {
                if self.leader.is_none() {
                    return self.refuse(shared, Then::Read(reading, deadline));
                }
                if let Err(reject) = check_readable(&self.state, reading.at) {
                    return self.answer(shared, Caller::Asker(reading.asker), Err(reject));
                }
                let read = shared.fresh(self.seat.at, &reading.asker);
                let (at, target) = (reading.at, reading.target.clone());
                self.readers.insert(read, reading);
                let wait = deadline.saturating_sub(shared.time);
                shared.emit(Pace::After(wait), Item::ReadOver { seat: self.seat, read });
                self.handle(shared, Event::Read { id: read, at, target });
            }
        }
    }

    /// A read that may look does so.
    pub fn look(&mut self, shared: &mut Shared, read: u64) {
        let Some(Reading { asker, at, target }) = self.looking.remove(&read) else { return };
        let response = match &target {
            Target::Keys(keys) => {
                Response::Values(keys.iter().map(|key| self.disk.version(key, at)).collect())
            }
            Target::Range(range) => Response::Page { rows: self.disk.rows(range, at), more: false },
        };
        let answer = check_readable(&self.state, at).map(|()| response);
        self.answer(shared, Caller::Asker(asker), answer);
    }

    /// Nobody waits any longer for a read.
    pub fn read_over(&mut self, shared: &mut Shared, read: u64) {
        let Some(reading) = self.readers.remove(&read) else { return };
        let blocker = self.leader.as_ref().and_then(|leader| leader.blocker(read)).cloned();
        let blocked = |conflict: troth_participant::locks::Conflict| Reject::Blocked {
            key: conflict.key,
            by: conflict.by,
        };
        let reject = blocker.map_or(Reject::DeadlineExceeded, blocked);
        self.handle(shared, Event::GaveUp { id: read });
        self.answer(shared, Caller::Asker(reading.asker), Err(reject));
    }

    // --- the leader -----------------------------------------------------------------------------

    fn handle(&mut self, shared: &mut Shared, event: Event) {
        let now = shared.instant(shared.time);
        if let Some(leader) = &mut self.leader {
            leader.handle_event(now, event, &self.state);
            self.perform(shared);
        }
    }

    /// What is due.
    pub fn wake(&mut self, shared: &mut Shared) {
        let now = shared.instant(shared.time);
        // Another leader may have been woken by it.
        if self.wake_at.is_none_or(|at| at > now) {
            return;
        }
        self.wake_at = None;
        if let Some(leader) = &mut self.leader {
            if leader.poll_timeout().is_some_and(|due| due <= now) {
                leader.handle_timeout(now);
            }
            self.perform(shared);
        }
    }

    fn perform(&mut self, shared: &mut Shared) {
        let Some(leader) = &mut self.leader else { return };
        while let Some(effect) = leader.poll_effect() {
            match effect {
                Effect::Serve { id } => {
                    if let Some(reading) = self.readers.remove(&id) {
                        self.looking.insert(id, reading);
                        shared.emit(Pace::Local, Item::Look { seat: self.seat, read: id });
                    }
                }
                Effect::Refuse { id } => {
                    if let Some(reading) = self.readers.remove(&id) {
                        let busy = Reject::overloaded(Duration::from_millis(50));
                        shared.answer(self.seat.at, reading.asker, Err(busy));
                    }
                }
                other @ (Effect::Ask { .. } | Effect::Finish { .. }) => self.todo.push_back(other),
            }
        }
        if let Some(due) = leader.poll_timeout()
            && self.wake_at.is_none_or(|at| due < at)
        {
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

    /// Does the next thing.
    pub fn perform_next(&mut self, shared: &mut Shared) {
        self.performing = false;
        match self.todo.pop_front() {
            None => return,
            Some(Effect::Serve { .. } | Effect::Refuse { .. }) => unreachable!("performed where it arises"),
            Some(Effect::Finish { epoch, decisions }) => {
                let txns = decisions.iter().map(|(txn, _)| *txn).collect();
                self.request(shared, Caller::Own(txns), Request::Finish { epoch, decisions });
            }
            Some(Effect::Ask { txns }) => {
                let request = coordinator::Request::Resolve { txns: txns.clone() };
                self.call(shared, request, Purpose::Resolve(txns));
            }
        }
        self.schedule(shared);
    }

    fn call(&self, shared: &mut Shared, request: coordinator::Request, purpose: Purpose) {
        let (owner, request) = (Owner::Seat(self.seat), message::Request::Coordinator(request));
        let deadline = shared.time + ASK_TIMEOUT;
        shared.call(owner, GroupId::Coordinator, request, Resend::Idempotent, deadline, purpose);
    }

    /// A call has ended.
    pub fn called(
        &mut self,
        shared: &mut Shared,
        purpose: Purpose,
        result: Result<message::Response, RouteError>,
    ) {
        let response = match result {
            Ok(message::Response::Coordinator(response)) => Some(response),
            Ok(_) | Err(_) => None,
        };
        match (purpose, response) {
            (Purpose::Resolve(txns), Some(coordinator::Response::Resolved { epoch, resolutions })) => {
                let resolutions = txns.into_iter().zip(resolutions).collect();
                self.handle(shared, Event::Resolved { epoch, resolutions });
            }
            (Purpose::Resolve(txns), _) => self.handle(shared, Event::NotResolved { txns }),
            (Purpose::FreshTime(lead), Some(coordinator::Response::Timestamps { first, .. })) => {
                if self.log.believes_to_lead() && self.state.marks().lead == lead && self.leader.is_none() {
                    let now = shared.instant(shared.time);
                    self.leader = Some(Leader::new(lead, first, now, &self.state));
                    self.wake_at = None;
                    shared.ghost.got_timestamp(first, self.asked_time);
                    self.perform(shared);
                }
            }
            (Purpose::FreshTime(lead), _) => {
                shared.emit(Pace::After(ASK_PAUSE), Item::AskTime { seat: self.seat, lead });
            }
            (purpose, _) => unreachable!("a shard does not call for {purpose:?}"),
        }
    }

    /// Asks the time, as a new leader.
    pub fn ask_time(&mut self, shared: &mut Shared, lead: u64) {
        if self.log.believes_to_lead() && self.state.marks().lead == lead && self.leader.is_none() {
            let request = coordinator::Request::Timestamps { count: 1, begins: None };
            self.asked_time = shared.ghost.newest();
            self.call(shared, request, Purpose::FreshTime(lead));
        }
    }

    /// Gives up old versions and outcomes, if it leads.
    pub fn retire(&mut self, shared: &mut Shared, safe_point: Timestamp, outcomes_before: Timestamp) {
        if self.leader.is_some() {
            let command = Command::Retire { safe_point, outcomes_before };
            self.log.propose(shared, Logged::Shard(command));
        }
    }

    // --- the log --------------------------------------------------------------------------------

    /// Hears that it leads, or not any more.
    pub fn role(&mut self, shared: &mut Shared, term: u64, leads: bool) {
        if !self.log.role(term, leads) {
            return;
        }
        self.leader = None;
        self.todo.clear();
        for (caller, _) in std::mem::take(&mut self.proposals).into_values() {
            self.answer(shared, caller, Err(Reject::Deposed));
        }
        self.refuse_readers(shared);
        for then in self.log.give_up() {
            self.refuse(shared, then);
        }
        if leads {
            self.log.take_lead(shared, Logged::Shard(Command::Lead));
        }
    }

    fn refuse_readers(&mut self, shared: &mut Shared) {
        for reading in std::mem::take(&mut self.readers).into_values() {
            let reject = self.log.not_leader(shared);
            self.answer(shared, Caller::Asker(reading.asker), Err(reject));
        }
    }

    /// Hears how far the log is committed.
    pub fn learn(&mut self, shared: &mut Shared, upto: u64) {
        self.log.learn(shared, upto);
    }

    /// Applies the next entry.
    pub fn apply(&mut self, shared: &mut Shared) {
        let Some((index, entry)) = self.log.next(shared) else { return };
        let Logged::Shard(command) = &*entry.command else {
            unreachable!("a shard's log holds a shard's commands");
        };
        let (mut prepared, mut ended) = (Vec::new(), Vec::new());
        match command {
            Command::CommitOnePhase { txn, .. } | Command::Fence { txn, .. } => ended.push(*txn),
            Command::Lead => {
                // Whoever led before in this process does not any more.
                self.leader = None;
                self.todo.clear();
                self.refuse_readers(shared);
            }
            Command::Prepare(_)
            | Command::Finish { .. }
            | Command::Follow { .. }
            | Command::Retire { .. } => {}
        }
        let mut mutations = Vec::new();
        let output = self
            .state
            .apply(index, command.clone(), &*self.disk, &mut mutations)
            .expect("a modelled disk is readable");
        shared.ghost.shard_applied(self.shard, index, command, &output, &mutations);
        if !mutations.is_empty() || *command == Command::Lead {
            shared.ghost.locked(self.seat, &self.state);
        }
        if let Command::Retire { .. } = command {
            let before = self.state.marks().outcomes_before;
            let kept = shared.ghost.newest().minus(shared.limits.outcome_retention);
            shared.ghost.gives_up_outcomes(before, kept);
        }
        for mutation in &mutations {
            match mutation {
                Mutation::Prepared(record) => prepared.push(record.txn),
                Mutation::Unprepared(txn) => ended.push(*txn),
                Mutation::Version { .. } | Mutation::Outcome(..) | Mutation::OutcomesBefore(_) => {}
            }
        }
        self.disk.write(mutations, &self.state);
        self.log.applied_next();
        self.handle(shared, Event::Applied { prepared, ended });
        if self.log.is_lead(&entry) {
            self.ask_time(shared, index);
        }
        if let Some((caller, rest)) = self.proposals.remove(&entry.proposal) {
            debug_assert_ne!(output, Output::Leads(index), "nobody asks for that");
            let answer = requests::close(rest, Some(output), &self.state, self.leader.as_ref());
            self.answer(shared, caller, answer);
        }
        for then in self.log.go_on(shared) {
            self.proven(shared, then);
        }
    }
}
