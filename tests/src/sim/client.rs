//! An application: one transaction after another, with the memory and the submission of the SDK.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use troth_protocol::message::coordinator;
use troth_protocol::message::shard::{self, Row};
use troth_protocol::message::txn::Outcome;
use troth_protocol::message::{Request, Response};
use troth_protocol::routing::{Resend, RouteError};
use troth_protocol::{ClientId, Epoch, GroupId, Key, KeyRange, ParticipantId, ShardId, Timestamp, TxnId};
use troth_sdk::core::{Buffer, Step, Submission};

use super::calls::{Owner, Purpose};
use super::shared::Shared;
use super::{Item, Pace};

/// As in production.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(5);

/// The pause after something that did not go well.
const PAUSE: Duration = Duration::from_millis(20);

/// One action of a transaction.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Action {
    /// Reads a key.
    Get(Key),
    /// Reads keys of several shards at once.
    GetMany(Vec<Key>),
    /// Reads a key and adds a number to the list in it.
    Append(Key, u64),
    /// Writes a key that was not read.
    Put(Key, u64),
    /// Deletes a key that was not read.
    Delete(Key),
    /// Reads a range.
    Scan(KeyRange),
}

/// What a client does, and how patient it is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Plan {
    /// The steps, one after another; then it commits.
    pub steps: Vec<Action>,
    /// How long it waits for a commit before it gives up.
    pub patience: Duration,
    /// Whether it leaves after it has sent the commit, without waiting for the answer.
    pub leaves: bool,
    /// Whether it asks about the outcome without saying who took part.
    pub forgetful: bool,
}

/// How a client's operations ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    /// It happened.
    pub ok: u64,
    /// It did not happen.
    pub failed: u64,
    /// Nobody could say before the deadline.
    pub unknown: u64,
}

#[derive(Clone, Debug)]
enum Phase {
    Idle,
    Beginning {
        newest_before: Timestamp,
    },
    Reading(Reading),
    Committing(Submission),
    /// The outcome was unknown; it asks until it knows.
    Asking {
        txn: TxnId,
        participants: Vec<ParticipantId>,
    },
}

#[derive(Clone, Debug)]
struct Reading {
    step: Action,
    missing: usize,
    rows: BTreeMap<Key, Row>,
}

/// An application with one transaction at a time.
#[derive(Clone, Debug)]
pub struct Client {
    number: u8,
    id: ClientId,
    plans: VecDeque<Plan>,
    plan: Option<Plan>,
    steps: VecDeque<Action>,
    begun: Duration,
    deadline: Duration,
    txn: TxnId,
    epoch: Epoch,
    buffer: Buffer,
    phase: Phase,
    /// How its operations ended.
    pub counts: Counts,
}

impl Client {
    /// A client with these plans.
    pub fn new(number: u8, plans: VecDeque<Plan>) -> Client {
        let id = ClientId(u64::from(number) + 1);
        Client {
            number,
            id,
            plans,
            plan: None,
            steps: VecDeque::new(),
            begun: Duration::ZERO,
            deadline: Duration::ZERO,
            txn: TxnId { start: Timestamp::ZERO, client: id },
            epoch: Epoch::default(),
            buffer: Buffer::default(),
            phase: Phase::Idle,
            counts: Counts::default(),
        }
    }

    /// Whether it has nothing left to do.
    pub fn is_done(&self) -> bool {
        self.plans.is_empty() && matches!(self.phase, Phase::Idle)
    }

    /// More to do.
    pub fn extend(&mut self, plans: impl IntoIterator<Item = Plan>) {
        self.plans.extend(plans);
    }

    fn owner(&self) -> Owner {
        Owner::Client(self.number)
    }

    /// Begins the next transaction, or goes on with what it waited with.
    pub fn go(&mut self, shared: &mut Shared) {
        match &self.phase {
            Phase::Idle => self.begin(shared),
            Phase::Committing(_) => self.submit(shared),
            Phase::Asking { .. } => self.ask(shared),
            Phase::Beginning { .. } | Phase::Reading(_) => {}
        }
    }

    fn begin(&mut self, shared: &mut Shared) {
        let Some(plan) = self.plans.pop_front() else { return };
        self.steps = plan.steps.iter().cloned().collect();
        self.begun = shared.time;
        self.deadline = shared.time + plan.patience;
        self.plan = Some(plan);
        self.buffer = Buffer::default();
        self.phase = Phase::Beginning { newest_before: shared.ghost.newest() };
        let request = coordinator::Request::Timestamps { count: 1, begins: Some(self.id) };
        let request = Request::Coordinator(request);
        let (group, deadline) = (GroupId::Coordinator, self.deadline);
        shared.call(self.owner(), group, request, Resend::Idempotent, deadline, Purpose::Begin);
    }

    /// A call has ended.
    pub fn called(&mut self, shared: &mut Shared, purpose: Purpose, result: Result<Response, RouteError>) {
        match (purpose, &mut self.phase) {
            (Purpose::Begin, Phase::Beginning { newest_before }) => match result {
                Ok(Response::Coordinator(coordinator::Response::Timestamps {
                    first,
                    count: 1,
                    epoch,
                    ..
                })) => {
                    shared.ghost.got_timestamp(first, *newest_before);
                    self.txn = TxnId { start: first, client: self.id };
                    self.epoch = epoch;
                    self.next(shared);
                }
                _ => self.fail(shared),
            },
            (Purpose::Read(shard), Phase::Reading(_)) => self.has_read(shared, shard, result),
            (Purpose::Commit, Phase::Committing(submission)) => {
                let answer = result.map(|response| match response {
                    Response::Coordinator(response) => response,
                    other => unreachable!("coordinators do not answer {other:?}"),
                });
                match submission.answered(answer) {
                    Step::Ended(outcome) => self.ended(shared, &outcome),
                    Step::Failed(_) => {
                        shared.ghost.failed(self.txn);
                        self.fail(shared);
                    }
                    Step::Send | Step::Pause if shared.time >= self.deadline && !submission.is_unsent() => {
                        self.unknown(shared);
                    }
                    Step::Send => self.submit(shared),
                    Step::Pause => self.pause(shared),
                }
            }
            (Purpose::Outcome, Phase::Asking { txn, .. }) => match result {
                Ok(Response::Coordinator(coordinator::Response::Outcome(outcome))) => {
                    match outcome {
                        // It is known too late to say when it was over.
                        Outcome::Committed { commit_ts } => {
                            let (begun, txn) = (self.begun, *txn);
                            shared.ghost.committed(begun, Duration::MAX, txn, commit_ts);
                        }
                        Outcome::Aborted { .. } => shared.ghost.failed(*txn),
                    }
                    self.rest(shared);
                }
                Ok(Response::Coordinator(coordinator::Response::Expired)) => {
                    shared.ghost.expired(*txn);
                    self.rest(shared);
                }
                _ => self.pause(shared),
            },
            // What was asked before it gave up.
            _ => {}
        }
    }

    // --- reading --------------------------------------------------------------------------------

    fn next(&mut self, shared: &mut Shared) {
        while let Some(step) = self.steps.pop_front() {
            let asks: BTreeMap<ShardId, shard::Request> = match &step {
                Action::Get(key) | Action::Append(key, _) => self.asks(shared, std::slice::from_ref(key)),
                Action::GetMany(keys) => self.asks(shared, keys),
                Action::Put(..) | Action::Delete(_) => BTreeMap::new(),
                Action::Scan(range) => {
                    let shards = match range.shard(shared.shards) {
                        Some(shard) => vec![shard],
                        None => (0..shared.shards).map(ShardId).collect(),
                    };
                    let at = self.txn.start;
                    let ask =
                        |shard| (shard, shard::Request::Scan { at, range: range.clone(), rows_max: 1000 });
                    shards.into_iter().map(ask).collect()
                }
            };
            if asks.is_empty() {
                self.act(&step);
                continue;
            }
            self.phase = Phase::Reading(Reading { step, missing: asks.len(), rows: BTreeMap::new() });
            for (shard, request) in asks {
                let request = Request::Shard { shard, request };
                let (group, deadline) = (GroupId::Shard(shard), self.deadline);
                shared.call(self.owner(), group, request, Resend::Idempotent, deadline, Purpose::Read(shard));
            }
            return;
        }
        self.commit(shared);
    }

    fn asks(&self, shared: &Shared, keys: &[Key]) -> BTreeMap<ShardId, shard::Request> {
        let mut asks: BTreeMap<ShardId, Vec<Key>> = BTreeMap::new();
        for key in keys.iter().filter(|key| !self.buffer.knows(key)) {
            asks.entry(key.shard(shared.shards)).or_default().push(key.clone());
        }
        let at = self.txn.start;
        asks.into_iter().map(|(shard, keys)| (shard, shard::Request::Read { at, keys })).collect()
    }

    fn has_read(&mut self, shared: &mut Shared, shard: ShardId, result: Result<Response, RouteError>) {
        let Phase::Reading(reading) = &mut self.phase else { return };
        let Ok(Response::Shard(response)) = result else { return self.fail(shared) };
        match (response, &reading.step) {
            (shard::Response::Values(versions), step) => {
                let keys: Vec<Key> = match step {
                    Action::Get(key) | Action::Append(key, _) => vec![key.clone()],
                    Action::GetMany(keys) => keys.clone(),
                    Action::Put(..) | Action::Delete(_) | Action::Scan(_) => Vec::new(),
                };
                let here = |key: &Key| !self.buffer.knows(key) && key.shard(shared.shards) == shard;
                let keys: Vec<Key> = keys.into_iter().filter(here).collect();
                assert_eq!(keys.len(), versions.len(), "small answers are whole");
                for (key, version) in keys.into_iter().zip(versions) {
                    shared.ghost.read(self.txn, key.clone(), version.clone());
                    self.buffer.note_read(key, version);
                }
            }
            (shard::Response::Page { rows, .. }, Action::Scan(_)) => {
                reading.rows.extend(rows.into_iter().map(|row| (row.key.clone(), row)));
            }
            (other, step) => unreachable!("{step:?} is not answered by {other:?}"),
        }
        let Phase::Reading(reading) = &mut self.phase else { return };
        reading.missing -= 1;
        if reading.missing == 0 {
            let Reading { step, rows, .. } = reading.clone();
            if let Action::Scan(range) = &step {
                shared.ghost.scanned(self.txn, range.clone(), rows.into_values().collect());
            }
            self.act(&step);
            self.next(shared);
        }
    }

    fn act(&mut self, step: &Action) {
        match step {
            Action::Get(_) | Action::GetMany(_) => {}
            Action::Append(key, number) => {
                let list = match self.buffer.value(key) {
                    Some(value) => [&value[..], b",", number.to_string().as_bytes()].concat(),
                    None => number.to_string().into_bytes(),
                };
                self.buffer.write(key.clone(), Some(list.into()));
            }
            Action::Put(key, number) => {
                self.buffer.write(key.clone(), Some(number.to_string().into_bytes().into()));
            }
            Action::Delete(key) => self.buffer.write(key.clone(), None),
            Action::Scan(range) => self.buffer.note_range(range.clone()),
        }
    }

    // --- committing -----------------------------------------------------------------------------

    fn commit(&mut self, shared: &mut Shared) {
        if self.buffer.is_read_only() {
            let txn = self.txn;
            shared.ghost.committed(self.begun, shared.time, txn, txn.start);
            self.counts.ok += 1;
            return self.rest(shared);
        }
        let parts = self.buffer.parts(self.txn.start, shared.shards);
        shared.ghost.submitted(self.txn, parts.clone());
        self.phase = Phase::Committing(Submission::new(self.txn, self.epoch, parts));
        self.submit(shared);
        if self.plan.as_ref().is_some_and(|plan| plan.leaves) {
            self.counts.unknown += 1;
            self.rest(shared);
        }
    }

    fn submit(&mut self, shared: &mut Shared) {
        let Phase::Committing(submission) = &self.phase else { return };
        let (request, resend) = submission.request();
        let deadline = match resend {
            Resend::OnlyUnsent => self.deadline.min(shared.time + ATTEMPT_TIMEOUT),
            Resend::Idempotent => self.deadline,
        };
        let request = Request::Coordinator(request);
        shared.call(self.owner(), GroupId::Coordinator, request, resend, deadline, Purpose::Commit);
    }

    fn ended(&mut self, shared: &mut Shared, outcome: &Outcome) {
        match outcome {
            Outcome::Committed { commit_ts } => {
                shared.ghost.committed(self.begun, shared.time, self.txn, *commit_ts);
                self.counts.ok += 1;
                self.rest(shared);
            }
            Outcome::Aborted { .. } => {
                shared.ghost.failed(self.txn);
                self.fail(shared);
            }
        }
    }

    fn unknown(&mut self, shared: &mut Shared) {
        let Phase::Committing(submission) = &self.phase else { return };
        self.counts.unknown += 1;
        let forgetful = self.plan.as_ref().is_some_and(|plan| plan.forgetful);
        let participants = if forgetful { Vec::new() } else { submission.participants().to_vec() };
        self.phase = Phase::Asking { txn: submission.txn(), participants };
        self.ask(shared);
    }

    fn ask(&mut self, shared: &mut Shared) {
        let Phase::Asking { txn, participants } = &self.phase else { return };
        let request = coordinator::Request::Outcome { txn: *txn, participants: participants.clone() };
        let (request, deadline) = (Request::Coordinator(request), shared.time + ATTEMPT_TIMEOUT);
        let (owner, group) = (self.owner(), GroupId::Coordinator);
        shared.call(owner, group, request, Resend::Idempotent, deadline, Purpose::Outcome);
    }

    fn fail(&mut self, shared: &mut Shared) {
        self.counts.failed += 1;
        self.rest(shared);
    }

    /// Whatever it was at is over.
    fn rest(&mut self, shared: &mut Shared) {
        self.phase = Phase::Idle;
        shared.calls.retain(|_, call| call.owner != Owner::Client(self.number));
        self.pause(shared);
    }

    fn pause(&mut self, shared: &mut Shared) {
        let again = Item::Go { client: self.number };
        shared.emit(Pace::After(PAUSE), again);
    }
}
