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

use super::calls::{Owner, Purpose, node_id};
use super::group::{Command as Logged, ProposalId};
use super::shared::{Asker, Shared};
use super::store::ShardDisk;
use super::{Item, Pace, Seat};

/// As in production.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);
const ASK_PAUSE: Duration = Duration::from_millis(20);

/// Who hears of the end of a request.
#[derive(Clone, PartialEq, Debug)]
enum Caller {
    /// Somebody outside.
    Asker(Asker),
    /// This shard itself, which finishes these.
    Own(Vec<TxnId>),
}

/// A read that waits, or is about to look.
#[derive(Clone, PartialEq, Debug)]
struct Reading {
    asker: Asker,
    at: Timestamp,
    target: Target,
}

/// What is done when it is proven that this replica leads.
#[derive(Clone, PartialEq, Debug)]
enum Then {
    Close(Caller, Rest),
    Read(Reading, Duration),
}

/// A replica in one life of its process.
#[derive(Clone, Debug)]
pub struct Shard {
    seat: Seat,
    shard: ShardId,
    term: Option<u64>,
    /// The newest term that it has heard of.
    heard: u64,
    commit: u64,
    applied: u64,
    applying: bool,
    state: State,
    leader: Option<Leader>,
    disk: ShardDisk,
    /// What a crash leaves.
    durable: (u64, ShardDisk),
    /// Its own first entry, on its way.
    lead: Option<ProposalId>,
    proposals: BTreeMap<ProposalId, (Caller, Rest)>,
    barriers: BTreeMap<u64, Then>,
    /// Barriers that are passed as soon as this much is applied.
    passing: Vec<(u64, Then)>,
    /// Reads that wait for a transaction to end.
    readers: BTreeMap<u64, Reading>,
    /// Reads that may look.
    looking: BTreeMap<u64, Reading>,
    todo: VecDeque<Effect>,
    performing: bool,
    wake_at: Option<Instant>,
}

impl Shard {
    /// A new process with what is on disk.
    pub fn start(seat: Seat, shard: ShardId, durable: (u64, ShardDisk)) -> Shard {
        let (applied, disk) = durable.clone();
        Shard {
            seat,
            shard,
            term: None,
            heard: 0,
            commit: applied,
            applied,
            applying: false,
            state: disk.restore(),
            leader: None,
            disk,
            durable,
            lead: None,
            proposals: BTreeMap::new(),
            barriers: BTreeMap::new(),
            passing: Vec::new(),
            readers: BTreeMap::new(),
            looking: BTreeMap::new(),
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
    pub fn durable(&self) -> (u64, ShardDisk) {
        self.durable.clone()
    }

    /// What a snapshot of it holds, and how far the log is applied.
    pub fn snapshot(&self) -> (u64, ShardDisk) {
        (self.applied, self.disk.snapshot(self.shard))
    }

    /// What is on disk becomes durable.
    pub fn flush(&mut self) {
        self.durable = (self.applied, self.disk.clone());
    }

    /// How far the log is applied.
    pub fn applied(&self) -> u64 {
        self.applied
    }

    /// Its state.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Its leader's memory, while it leads and serves.
    pub fn leader(&self) -> Option<&Leader> {
        self.leader.as_ref()
    }

    /// Whether nothing is left to do.
    pub fn is_settled(&self) -> bool {
        self.state.prepared().is_empty() && self.readers.is_empty() && self.todo.is_empty()
    }

    fn not_leader(&self, shared: &Shared) -> Reject {
        let leader = shared.groups[&self.seat.group].leader.filter(|leader| *leader != self.seat.at);
        Reject::NotLeader { leader: leader.map(node_id) }
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
            let reject = self.not_leader(shared);
            return self.answer(shared, caller, Err(reject));
        };
        match leader.open(&self.state, &self.disk, request) {
            Ok(Need::Nothing(response)) => self.answer(shared, caller, Ok(response)),
            Ok(Need::Barrier(rest)) => {
                let then = Then::Close(caller, rest);
                let barrier = shared.barrier(self.seat, &then);
                self.barriers.insert(barrier, then);
            }
            Ok(Need::Entry(command, rest)) => {
                let term = self.term.expect("who serves leads");
                let proposal = shared.propose(self.seat, term, Logged::Shard(command));
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
        if self.term.is_none() {
            let reject = self.not_leader(shared);
            return self.answer(shared, Caller::Asker(reading.asker), Err(reject));
        }
        let then = Then::Read(reading, deadline);
        let barrier = shared.barrier(self.seat, &then);
        self.barriers.insert(barrier, then);
    }

    /// A majority has answered.
    pub fn barrier(&mut self, shared: &mut Shared, barrier: u64, leads: bool) {
        let Some(then) = self.barriers.remove(&barrier) else { return };
        let led = self.term.is_some_and(|term| shared.groups[&self.seat.group].is_led(self.seat.at, term));
        if !leads || !led {
            return self.refuse(shared, then);
        }
        let committed = shared.groups[&self.seat.group].committed();
        if self.applied >= committed {
            self.proven(shared, then);
        } else {
            self.passing.push((committed, then));
        }
    }

    fn refuse(&mut self, shared: &mut Shared, then: Then) {
        let reject = self.not_leader(shared);
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
        self.wake_at = None;
        let now = shared.instant(shared.time);
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
                if self.term.is_some() && self.state.marks().lead == lead && self.leader.is_none() {
                    let now = shared.instant(shared.time);
                    self.leader = Some(Leader::new(lead, first, now, &self.state));
                    self.wake_at = None;
                    shared.ghost.leads(self.shard, &self.state);
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
        if self.term.is_some() && self.state.marks().lead == lead && self.leader.is_none() {
            let request = coordinator::Request::Timestamps { count: 1, begins: None };
            self.call(shared, request, Purpose::FreshTime(lead));
        }
    }

    /// Gives up old versions and outcomes, if it leads.
    pub fn retire(&mut self, shared: &mut Shared, safe_point: Timestamp, outcomes_before: Timestamp) {
        if let (Some(term), Some(_)) = (self.term, &self.leader) {
            let command = Command::Retire { safe_point, outcomes_before };
            shared.propose(self.seat, term, Logged::Shard(command));
        }
    }

    // --- the log --------------------------------------------------------------------------------

    /// Hears that it leads, or not any more.
    pub fn role(&mut self, shared: &mut Shared, term: u64, leads: bool) {
        if term <= self.heard {
            return;
        }
        self.heard = term;
        self.depose(shared);
        if leads {
            self.term = Some(term);
            self.lead = Some(shared.propose(self.seat, term, Logged::Shard(Command::Lead)));
        }
    }

    fn depose(&mut self, shared: &mut Shared) {
        self.term = None;
        self.lead = None;
        self.leader = None;
        self.todo.clear();
        for (caller, _) in std::mem::take(&mut self.proposals).into_values() {
            self.answer(shared, caller, Err(Reject::Deposed));
        }
        self.refuse_readers(shared);
        let waiting = std::mem::take(&mut self.barriers).into_values();
        for then in waiting.chain(std::mem::take(&mut self.passing).into_iter().map(|(_, then)| then)) {
            self.refuse(shared, then);
        }
    }

    fn refuse_readers(&mut self, shared: &mut Shared) {
        for reading in std::mem::take(&mut self.readers).into_values() {
            let reject = self.not_leader(shared);
            self.answer(shared, Caller::Asker(reading.asker), Err(reject));
        }
    }

    /// Hears how far the log is committed.
    pub fn learn(&mut self, shared: &mut Shared, upto: u64) {
        self.commit = self.commit.max(upto);
        self.apply_on(shared);
    }

    fn apply_on(&mut self, shared: &mut Shared) {
        if self.applied < self.commit && !self.applying {
            self.applying = true;
            shared.emit(Pace::Local, Item::Apply { seat: self.seat });
        }
    }

    /// Applies the next entry.
    pub fn apply(&mut self, shared: &mut Shared) {
        self.applying = false;
        let index = self.applied + 1;
        let Some(entry) = shared.groups[&self.seat.group].entry(index).cloned() else { return };
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
            .apply(index, command.clone(), &self.disk, &mut mutations)
            .expect("a modelled disk is readable");
        shared.ghost.shard_applied(self.shard, index, command, &output, &mutations);
        for mutation in &mutations {
            match mutation {
                Mutation::Prepared(record) => prepared.push(record.txn),
                Mutation::Unprepared(txn) => ended.push(*txn),
                Mutation::Version { .. } | Mutation::Outcome(..) | Mutation::OutcomesBefore(_) => {}
            }
        }
        self.disk.write(mutations, &self.state);
        self.applied = index;
        self.handle(shared, Event::Applied { prepared, ended });
        if self.lead == Some(entry.proposal) {
            self.lead = None;
            self.ask_time(shared, index);
        }
        if let Some((caller, rest)) = self.proposals.remove(&entry.proposal) {
            debug_assert_ne!(output, Output::Leads(index), "nobody asks for that");
            let answer = requests::close(rest, Some(output), &self.state, self.leader.as_ref());
            self.answer(shared, caller, answer);
        }
        let passing = std::mem::take(&mut self.passing);
        let (passed, passing): (Vec<_>, Vec<_>) =
            passing.into_iter().partition(|(at, _)| *at <= self.applied);
        self.passing = passing;
        for (_, then) in passed {
            self.proven(shared, then);
        }
        self.apply_on(shared);
    }
}
