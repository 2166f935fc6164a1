//! What only the coordinators' leader knows, and forgets when it is deposed.
//!
//! ```text
//! Commit ─► Voting ─ all Yes ─► (time) ─► Deciding ─ committed ─► answer, then Finish to all ─► Forget
//!             │ No, or late
//!             └───────────────► answer *aborted*, then Abort to all
//! Commit of one shard ─► OnePhase ─ the shard's word ─► (time covers it) ─► answer
//! Commit again, Outcome ─► nothing known? ─► Refusing: a fence in the log, or at the shard ─► answer
//! ```
//!
//! Why *aborted* may be told for a transaction that left no trace: this leader does not start it
//! any more (`refused`), earlier leaders cannot decide it any more (their epoch is over), and later
//! ones find the fence.
//!
//! Pure: time is an argument, effects are handed out by [`Leader::poll_effect`].

mod endings;
mod events;
mod questions;
mod refused;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use troth_protocol::limits::{OUTCOME_RETENTION, TXN_AGE_MAX, TXN_BYTES_MAX, TXN_KEYS_MAX};
use troth_protocol::message::coordinator::Commit;
use troth_protocol::message::shard::{CommitOnePhase, Decision as Word, Prepare, Vote};
use troth_protocol::message::txn::{Cause, Outcome, Part};
use troth_protocol::mutation::{self, Bug};
use troth_protocol::{ClientId, Epoch, ParticipantId, Reject, ShardId, Timestamp, TxnId};

pub use self::events::{Answer, Effect, Event, Now, OnePhase, RequestId};
pub use self::questions::Claim;
use self::refused::Refused;
use crate::admission::{Admission, Admitted, Bounds};
use crate::command::{Decision, Record, Verdict};
use crate::commit::{Ballot, Step};
use crate::finish::Courier;
use crate::oracle::Oracle;
use crate::recovery::Recovery;
use crate::state::{State, View};
use crate::steward::{Rules, Steward};

/// What is due is looked at this often.
const TICK: Duration = Duration::from_millis(100);

/// Finished transactions are forgotten this many at a time, or at the next tick.
const FORGET_MAX: usize = 512;

/// Old outcomes are given up this often.
const RETIRE_EVERY: Duration = Duration::from_secs(60);

/// What bounds a leader.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Transactions in flight; after that new ones are refused as overload.
    pub in_flight_max: usize,
    /// Bytes of transactions in flight.
    pub bytes_max: usize,
    /// Decisions that not all participants have applied.
    pub unfinished_max: usize,
    /// How long votes are waited for, if the client does not give up before.
    pub vote_timeout: Duration,
    /// How old a transaction may be when it commits.
    pub age_max: Duration,
    /// How long outcomes stay answerable.
    pub outcome_retention: Duration,
    /// When half of the commits take longer than this, fewer transactions may begin.
    pub commit_target: Duration,
}

impl Limits {
    fn admission(&self) -> Bounds {
        // Those who have less than their share may begin beyond the limit, as many again at most.
        let limit_max = (self.in_flight_max / 2).max(1);
        Bounds {
            limit_min: Bounds::default().limit_min.min(limit_max),
            limit_max,
            target: self.commit_target,
        }
    }
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            in_flight_max: 8192,
            bytes_max: 512 << 20,
            unfinished_max: 1 << 16,
            vote_timeout: Duration::from_secs(10),
            age_max: TXN_AGE_MAX,
            outcome_retention: OUTCOME_RETENTION,
            commit_target: Bounds::default().target,
        }
    }
}

/// A transaction that something is being done about.
#[derive(Clone, Debug)]
struct Flight {
    waiters: Vec<RequestId>,
    bytes: usize,
    phase: Phase,
}

#[derive(Clone, Debug)]
#[expect(clippy::enum_variant_names, reason = "a one-phase commit is called that")]
enum Phase {
    /// Votes are missing.
    Voting { ballot: Ballot, deadline: Instant },
    /// All have agreed; the ceiling is too low for a timestamp.
    AwaitingTime { participants: Vec<ParticipantId>, above: Timestamp },
    /// The decision is on its way into the log.
    Deciding(Decision),
    /// This shard commits by itself, or is asked how that ended.
    OnePhase(ShardId),
    /// A shard has committed at a moment that the ceiling does not cover yet.
    Covering { commit_ts: Timestamp },
    /// A fence is on its way into the log. If it stands, these shards are asked too.
    Refusing { cause: Cause, shards: BTreeSet<ShardId> },
    /// The fence stands; these shards have not said yet that they know of no commit. One that keeps
    /// no outcomes of that age any more cannot say so.
    Asking { cause: Cause, shards: BTreeSet<ShardId>, expired: bool },
}

/// The volatile side of the coordinators' leader.
#[derive(Clone, Debug)]
pub struct Leader {
    epoch: Epoch,
    limits: Limits,
    oracle: Oracle,
    flights: BTreeMap<TxnId, Flight>,
    bytes: usize,
    deadlines: BTreeSet<(Instant, TxnId)>,
    refused: Refused,
    courier: Courier,
    forget: Vec<TxnId>,
    recovery: Recovery,
    steward: Steward,
    admission: Admission,
    /// The moment of the event that is being handled.
    moment: Instant,
    tick_at: Instant,
    retire_at: Instant,
    committed: u64,
    aborted: u64,
    effects: VecDeque<Effect>,
}

impl Leader {
    /// How far the time of the cluster is ahead of the wall clock.
    pub fn time_ahead(&self, now_millis: u64) -> Duration {
        Duration::from_millis(self.oracle.last().millis().saturating_sub(now_millis))
    }

    /// A new leader: it takes up all that is unfinished, and asks all shards what they have
    /// prepared.
    pub fn new(epoch: Epoch, limits: Limits, rules: Rules, now: Now, state: &State) -> Leader {
        let shards =
            state.catalog().filter(|catalog| catalog.map.is_placed()).map_or(0, |c| c.settings.shards);
        let mut leader = Leader {
            epoch,
            limits,
            oracle: Oracle::new(state.marks().ceiling),
            flights: BTreeMap::new(),
            bytes: 0,
            deadlines: BTreeSet::new(),
            refused: Refused::default(),
            courier: Courier::default(),
            forget: Vec::new(),
            recovery: Recovery::new(shards),
            steward: Steward::new(rules, now.instant),
            admission: Admission::new(limits.admission(), now.instant),
            moment: now.instant,
            tick_at: now.instant + TICK,
            retire_at: now.instant + RETIRE_EVERY,
            committed: 0,
            aborted: 0,
            effects: VecDeque::new(),
        };
        for decision in state.unfinished().values() {
            let mut commit_ts = decision.commit_ts;
            if mutation::on(Bug::FinishTwice) {
                commit_ts = leader.oracle.last().next();
                leader.oracle.observe(commit_ts);
            }
            let word = Word::Commit { commit_ts };
            leader.courier.dispatch(decision.txn, word, &decision.participants);
        }
        let questions: Vec<_> = leader.recovery.questions().collect();
        for (shard, after) in questions {
            leader.effects.push_back(Effect::Collect { shard, after });
        }
        leader.settle_up(now);
        leader
    }

    /// Which leadership this is.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Transactions that something is being done about.
    pub fn in_flight(&self) -> usize {
        self.flights.len()
    }

    /// Transactions committed and aborted by this leader.
    pub fn counts(&self) -> (u64, u64) {
        (self.committed, self.aborted)
    }

    /// Whether all that earlier leaders left behind is settled.
    pub fn has_recovered(&self) -> bool {
        self.recovery.is_done()
    }

    /// Since when each move of a shard is under way.
    pub fn moving(&self) -> &BTreeMap<ShardId, Instant> {
        self.steward.moving()
    }

    /// Hands out consecutive timestamps, fewer than are asked for if transactions of a client begin with
    /// them and too much is under way; `None` while the ceiling is too low.
    pub fn timestamps(
        &mut self,
        now: Now,
        count: u32,
        begins: Option<ClientId>,
    ) -> Option<(Timestamp, Admitted)> {
        let count = count.max(1);
        let first = self.oracle.next(now.millis, count.into());
        if let Some(ceiling) = self.oracle.poll_ceiling(now.millis) {
            self.effects.push_back(Effect::Ceiling(ceiling));
        }
        // Those that nobody gets are lost: there are enough.
        let admitted = match begins {
            Some(client) if first.is_some() => self.admission.begin(now.instant, client, count),
            _ => Admitted { count, retry_after: Duration::ZERO },
        };
        Some((first?, admitted))
    }

    /// Who may begin.
    pub fn admission(&self) -> &Admission {
        &self.admission
    }

    /// Takes in what happened.
    pub fn handle_event(&mut self, now: Now, event: Event, state: &State, view: &impl View) {
        self.moment = now.instant;
        match event {
            Event::Commit { id, commit, deadline } => self.submit(now, id, commit, deadline, state, view),
            Event::Outcome { id, txn, participants } => {
                let shards = match &participants[..] {
                    [] => state.catalog().map_or(0, |catalog| catalog.settings.shards),
                    _ => 0,
                };
                let everywhere = (0..shards).map(ShardId).collect();
                self.ask(id, txn, &participants, Cause::Settled, everywhere, state, view);
            }
            Event::GaveUp { id, txn } => {
                if let Some(flight) = self.flights.get_mut(&txn) {
                    flight.waiters.retain(|waiter| *waiter != id);
                }
            }
            Event::Voted { txn, participant, vote } => self.voted(now, txn, &participant, vote),
            Event::OnePhase { txn, shard, answer } => self.one_phase(txn, shard, answer),
            Event::Applied { verdicts } => {
                for (txn, verdict) in verdicts {
                    self.applied(txn, verdict);
                }
            }
            Event::NotProposed { txns } => self.propose_again(&txns),
            Event::NotForgotten { txns } => self.forget.extend(txns),
            Event::Delivered { shard, decisions, ok: true } => {
                let done = self.courier.delivered(shard, &decisions);
                self.forget.extend(done);
                if self.forget.len() >= FORGET_MAX {
                    self.flush_forget();
                }
            }
            Event::Delivered { shard, decisions, ok: false } => self.courier.failed(shard, decisions),
            Event::Ceiling(ceiling) => {
                self.oracle.raise(ceiling);
                self.time_passed(now);
            }
            Event::NoCeiling => self.oracle.ceiling_failed(),
            Event::Seen { node } => self.steward.saw(now.instant, node),
            Event::Page { shard, txns, more } => self.page(shard, &txns, more, state, view),
        }
        self.settle_up(now);
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Now, state: &State) {
        self.moment = now.instant;
        while let Some(&(deadline, txn)) = self.deadlines.first()
            && deadline <= now.instant
        {
            self.deadlines.pop_first();
            if let Some(Flight { phase: Phase::Voting { ballot, .. }, .. }) = self.flights.get(&txn) {
                let cause = ballot.expire();
                self.abort(txn, cause);
            }
        }
        if self.tick_at <= now.instant {
            self.tick_at = now.instant + TICK;
            self.flush_forget();
            self.admission.tick(now.instant);
            if let Some(plan) =
                state.catalog().and_then(|catalog| self.steward.poll(now.instant, &catalog.map))
            {
                self.effects.push_back(Effect::Place(plan));
            }
            self.refused.prune(self.oracle.last().minus(self.limits.age_max));
        }
        if self.retire_at <= now.instant {
            self.retire_at = now.instant + RETIRE_EVERY;
            let before = self.oracle.last().minus(self.limits.outcome_retention);
            self.effects.push_back(Effect::Retire(before));
        }
        self.settle_up(now);
    }

    /// When [`Leader::handle_timeout`] is due next.
    pub fn poll_timeout(&self) -> Instant {
        let deadline = self.deadlines.first().map_or(self.tick_at, |(deadline, _)| *deadline);
        deadline.min(self.tick_at)
    }

    /// The next thing to do.
    pub fn poll_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    // --- first submissions ----------------------------------------------------------------------

    fn submit(
        &mut self,
        now: Now,
        id: RequestId,
        commit: Commit,
        deadline: Instant,
        state: &State,
        view: &impl View,
    ) {
        let Commit { txn, epoch, resubmission, parts } = commit;
        let participants: Vec<ParticipantId> = parts.iter().map(|part| part.participant.clone()).collect();
        let runs_again = resubmission && mutation::on(Bug::ResubmissionRunsTwice);
        if resubmission && !runs_again {
            let cause = Cause::CoordinatorChanged;
            return self.ask(id, txn, &participants, cause, BTreeSet::new(), state, view);
        }
        if epoch != self.epoch && !runs_again {
            return self.reject(id, Reject::StaleEpoch { current: self.epoch });
        }
        if let Some(flight) = self.flights.get_mut(&txn) {
            return flight.waiters.push(id);
        }
        if let Err(reject) = self.check(txn, &parts, state) {
            return self.reject(id, reject);
        }
        match view.record(txn) {
            Ok(None) => {}
            Ok(Some(record)) => return self.answer_record(id, record),
            Err(error) => return self.reject(id, Reject::Internal { reason: error.to_string() }),
        }
        if self.refused.contains(txn) {
            return self.answer_aborted(id, Cause::Settled);
        }
        if txn.start < self.oracle.last().minus(self.limits.age_max) {
            return self.answer_aborted(id, Cause::TooOld);
        }
        let bytes = parts.iter().map(|part| part.work.bytes()).sum();
        let full = self.flights.len() >= self.limits.in_flight_max
            || self.bytes + bytes > self.limits.bytes_max
            || self.courier.unfinished() >= self.limits.unfinished_max;
        if full {
            return self.reject(id, Reject::overloaded(Duration::from_millis(20)));
        }
        let shards = participants.iter().filter_map(ParticipantId::shard);
        if let Err(retry_after) = self.admission.arrive(now.instant, txn, shards) {
            return self.reject(id, Reject::overloaded(retry_after));
        }
        self.bytes += bytes;
        let deadline = deadline.min(now.instant + self.limits.vote_timeout);
        let phase = self.begin(txn, participants, parts, deadline);
        self.flights.insert(txn, Flight { waiters: vec![id], bytes, phase });
    }

    /// Whether a transaction is one that a client can have made.
    fn check(&self, txn: TxnId, parts: &[Part], state: &State) -> Result<(), Reject> {
        let shards = state.catalog().map_or(0, |catalog| catalog.settings.shards);
        let malformed = |reason: &str| Err(Reject::malformed(format!("transaction {txn} {reason}")));
        if txn.start > self.oracle.last() {
            return malformed("begins in the future");
        }
        let mut seen = BTreeSet::new();
        for part in parts {
            match &part.participant {
                ParticipantId::Shard(shard) if shard.0 >= shards => {
                    return malformed("names a shard that is not");
                }
                ParticipantId::Shard(shard) => {
                    let work = part.work.check(*shard, shards);
                    work.map_err(|reason| Reject::malformed(format!("transaction {txn}: {reason}")))?;
                }
                ParticipantId::Resource(_) => return malformed("names a resource, and none is configured"),
            }
            if !seen.insert(&part.participant) {
                return malformed("names a participant twice");
            }
        }
        if parts.is_empty() {
            return malformed("has no participants");
        }
        let keys: usize = parts.iter().map(|part| part.work.keys()).sum();
        let bytes: usize = parts.iter().map(|part| part.work.bytes()).sum();
        if keys > TXN_KEYS_MAX || bytes > TXN_BYTES_MAX {
            let reason = format!(
                "transaction {txn} has {keys} keys and {bytes} bytes; at most {TXN_KEYS_MAX} and {TXN_BYTES_MAX} may be"
            );
            return Err(Reject::TooLarge { reason });
        }
        Ok(())
    }

    fn begin(
        &mut self,
        txn: TxnId,
        participants: Vec<ParticipantId>,
        mut parts: Vec<Part>,
        deadline: Instant,
    ) -> Phase {
        let floor = self.oracle.last();
        if let [Part { participant: ParticipantId::Shard(shard), work }] = &mut parts[..] {
            let (shard, commit) = (*shard, CommitOnePhase { txn, floor, work: std::mem::take(work) });
            self.effects.push_back(Effect::CommitOnePhase { shard, commit, deadline });
            return Phase::OnePhase(shard);
        }
        for part in parts {
            let shard = part.participant.shard().expect("checked to be a shard");
            let prepare = Prepare {
                txn,
                epoch: self.epoch,
                floor,
                participants: participants.clone(),
                work: part.work,
            };
            self.effects.push_back(Effect::Prepare { shard, prepare, deadline });
        }
        self.deadlines.insert((deadline, txn));
        Phase::Voting { ballot: Ballot::new(participants), deadline }
    }

    // --- votes and decisions --------------------------------------------------------------------

    fn voted(&mut self, now: Now, txn: TxnId, participant: &ParticipantId, vote: Option<Vote>) {
        let Some(Flight { phase: Phase::Voting { ballot, deadline }, .. }) = self.flights.get_mut(&txn)
        else {
            return;
        };
        if let Some(shard) = participant.shard() {
            self.admission.heard(txn, shard);
        }
        let deadline = (*deadline, txn);
        let step = match vote {
            Some(vote) => ballot.vote(participant, vote),
            None => Step::Failed { cause: Cause::Unreachable { participant: participant.clone() } },
        };
        match step {
            Step::Wait => {}
            Step::Failed { cause } => {
                self.deadlines.remove(&deadline);
                self.abort(txn, cause);
            }
            Step::Agreed { above } => {
                self.deadlines.remove(&deadline);
                let participants = ballot.participants().to_vec();
                self.agree(now, txn, participants, above);
            }
        }
    }

    /// All have voted Yes: only now is the commit timestamp drawn.
    fn agree(&mut self, now: Now, txn: TxnId, participants: Vec<ParticipantId>, above: Timestamp) {
        self.oracle.observe(above);
        let phase = match self.oracle.next(now.millis, 1) {
            None => Phase::AwaitingTime { participants, above },
            Some(commit_ts) => {
                let decision = Decision { txn, commit_ts, participants };
                self.effects.push_back(Effect::Decide(vec![decision.clone()]));
                Phase::Deciding(decision)
            }
        };
        if let Phase::Deciding(decision) = &phase
            && mutation::on(Bug::DecisionBeforeDurable)
        {
            let commit_ts = decision.commit_ts;
            self.courier.dispatch(txn, Word::Commit { commit_ts }, &decision.participants);
            return self.end(txn, Answer::Ended(Outcome::Committed { commit_ts }));
        }
        self.flights.get_mut(&txn).expect("it is being voted on").phase = phase;
    }

    fn applied(&mut self, txn: TxnId, verdict: Verdict) {
        let Some(flight) = self.flights.get(&txn) else {
            return;
        };
        match (&flight.phase, verdict) {
            (Phase::Deciding(decision), Verdict::Recorded(Record::Committed { commit_ts })) => {
                let participants = decision.participants.clone();
                self.courier.dispatch(txn, Word::Commit { commit_ts }, &participants);
                self.end(txn, Answer::Ended(Outcome::Committed { commit_ts }));
            }
            (Phase::Deciding(_), Verdict::Recorded(Record::Refused)) => self.abort(txn, Cause::Settled),
            (Phase::Refusing { .. }, Verdict::Recorded(Record::Committed { commit_ts })) => {
                self.end(txn, Answer::Ended(Outcome::Committed { commit_ts }));
            }
            (Phase::Refusing { cause, shards }, Verdict::Recorded(Record::Refused)) => {
                let (cause, shards) = (cause.clone(), shards.clone());
                if shards.is_empty() {
                    return self.abort(txn, cause);
                }
                for shard in &shards {
                    self.effects.push_back(Effect::AskShard { shard: *shard, txn });
                }
                self.flights.get_mut(&txn).expect("it is in flight").phase =
                    Phase::Asking { cause, shards, expired: false };
            }
            (Phase::Deciding(_), Verdict::Expired) => self.abort(txn, Cause::TooOld),
            (Phase::Refusing { .. }, Verdict::Expired) => self.end(txn, Answer::Expired),
            // A later leader is at work; it knows, or will.
            (Phase::Deciding(_), Verdict::Superseded) => self.end(txn, Answer::Rejected(Reject::Deposed)),
            // What an earlier leader proposed about it.
            (_, Verdict::Superseded | Verdict::Recorded(_) | Verdict::Expired) => {}
        }
    }

    fn propose_again(&mut self, txns: &[TxnId]) {
        for txn in txns {
            match self.flights.get(txn).map(|flight| &flight.phase) {
                Some(Phase::Deciding(decision)) => {
                    self.effects.push_back(Effect::Decide(vec![decision.clone()]));
                }
                Some(Phase::Refusing { .. }) => self.effects.push_back(Effect::Refuse(vec![*txn])),
                _ => {}
            }
        }
    }

    /// The ceiling is higher: whoever waited for it goes on.
    fn time_passed(&mut self, now: Now) {
        let waiting: Vec<TxnId> = self
            .flights
            .iter()
            .filter(|(_, flight)| matches!(flight.phase, Phase::AwaitingTime { .. } | Phase::Covering { .. }))
            .map(|(txn, _)| *txn)
            .collect();
        for txn in waiting {
            match &self.flights[&txn].phase {
                Phase::AwaitingTime { participants, above } => {
                    let (participants, above) = (participants.clone(), *above);
                    self.agree(now, txn, participants, above);
                }
                Phase::Covering { commit_ts } => {
                    let commit_ts = *commit_ts;
                    if self.oracle.covers(commit_ts) {
                        self.end(txn, Answer::Ended(Outcome::Committed { commit_ts }));
                    }
                }
                _ => {}
            }
        }
    }

    fn flush_forget(&mut self) {
        if !self.forget.is_empty() {
            self.effects.push_back(Effect::Forget(std::mem::take(&mut self.forget)));
        }
    }

    /// After every step: messages that may go out, and the ceiling.
    fn settle_up(&mut self, now: Now) {
        while let Some((shard, decisions)) = self.courier.poll_message() {
            self.effects.push_back(Effect::Finish { shard, decisions });
        }
        if let Some(ceiling) = self.oracle.poll_ceiling(now.millis) {
            self.effects.push_back(Effect::Ceiling(ceiling));
        }
    }
}
