//! How a transaction ended: asked by clients and by shards, and settled by being asked.

use std::collections::BTreeSet;
use std::io;
use std::time::Duration;

use troth_protocol::message::coordinator::Resolution;
use troth_protocol::message::shard::Decision as Word;
use troth_protocol::message::txn::{Cause, Outcome};
use troth_protocol::mutation::{self, Bug};
use troth_protocol::{ParticipantId, Reject, ShardId, TxnId};

use super::{Answer, Effect, Flight, Leader, OnePhase, Phase, RequestId};
use crate::command::Record;
use crate::state::{State, View};

/// What a coordinator says that only a leader may say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Claim {
    /// What time it is.
    Time,
    /// How a transaction ended; it may be *aborted*, because nothing is known of it.
    Ending,
    /// That it leads.
    Leadership,
}

impl Claim {
    /// Whether it needs a read barrier that began after the question arrived.
    pub fn needs_barrier(self) -> bool {
        match self {
            Claim::Time => !mutation::on(Bug::TimestampsWithoutBarrier),
            Claim::Ending => !mutation::on(Bug::AbortWithoutBarrier) && !mutation::on(Bug::DeposedAborts),
            Claim::Leadership => true,
        }
    }
}

impl Leader {
    /// Tells a shard what is known of transactions that it has prepared. To be asked only after a
    /// read barrier.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub fn resolve(
        &mut self,
        txns: &[TxnId],
        state: &State,
        view: &impl View,
    ) -> io::Result<Vec<Resolution>> {
        txns.iter().map(|txn| self.resolution(*txn, state, view)).collect()
    }

    fn resolution(&mut self, txn: TxnId, state: &State, view: &impl View) -> io::Result<Resolution> {
        if self.flights.contains_key(&txn) {
            return Ok(Resolution::InFlight);
        }
        if let Some(decision) = state.unfinished().get(&txn) {
            return Ok(Resolution::Committed { commit_ts: decision.commit_ts });
        }
        if let Some(Record::Committed { commit_ts }) = view.record(txn)? {
            return Ok(Resolution::Committed { commit_ts });
        }
        self.refused.insert(txn);
        Ok(Resolution::Aborted)
    }

    /// Finds out how a transaction ended, and makes sure that it stays so.
    #[expect(clippy::too_many_arguments, reason = "a private step that two events share")]
    pub(super) fn ask(
        &mut self,
        id: RequestId,
        txn: TxnId,
        participants: &[ParticipantId],
        cause: Cause,
        shards: BTreeSet<ShardId>,
        state: &State,
        view: &impl View,
    ) {
        if let Some(flight) = self.flights.get_mut(&txn) {
            return flight.waiters.push(id);
        }
        if txn.start > self.oracle.last() {
            let reason = format!("transaction {txn} begins in the future");
            return self.reject(id, Reject::malformed(reason));
        }
        let known = state.catalog().map_or(0, |catalog| catalog.settings.shards);
        if participants.iter().any(|participant| participant.shard().is_none_or(|shard| shard.0 >= known)) {
            let reason = format!("transaction {txn} names a shard that is not");
            return self.reject(id, Reject::malformed(reason));
        }
        if self.flights.len() >= 2 * self.limits.in_flight_max {
            return self.reject(id, Reject::overloaded(Duration::from_millis(50)));
        }
        let phase = if let [ParticipantId::Shard(shard)] = participants {
            // The shard is the one to ask; a fence there keeps it from committing later.
            self.effects.push_back(Effect::AskShard { shard: *shard, txn });
            Phase::OnePhase(*shard)
        } else {
            match view.record(txn) {
                Err(error) => return self.reject(id, Reject::Internal { reason: error.to_string() }),
                Ok(Some(Record::Refused)) if !shards.is_empty() => {}
                Ok(Some(record)) => return self.answer_record(id, record),
                Ok(None) => {}
            }
            if txn.start < state.marks().outcomes_before {
                return self.effects.push_back(Effect::Answer { id, answer: Answer::Expired });
            }
            if mutation::on(Bug::AbortWithoutBarrier) {
                return self.answer_aborted(id, cause);
            }
            self.effects.push_back(Effect::Refuse(vec![txn]));
            Phase::Refusing { cause, shards }
        };
        self.flights.insert(txn, Flight { waiters: vec![id], bytes: 0, phase });
    }

    pub(super) fn page(
        &mut self,
        shard: ShardId,
        txns: &[TxnId],
        more: bool,
        state: &State,
        view: &impl View,
    ) {
        if let Some((shard, after)) = self.recovery.page(shard, txns, more) {
            self.effects.push_back(Effect::Collect { shard, after });
        }
        for txn in txns {
            // What is unfinished is on its way already; what is in flight was begun by this leader.
            if state.unfinished().contains_key(txn) {
                continue;
            }
            let word = match self.resolution(*txn, state, view) {
                Ok(Resolution::Committed { commit_ts }) => Word::Commit { commit_ts },
                Ok(Resolution::Aborted) => Word::Abort,
                // The shard will ask again.
                Ok(Resolution::InFlight) | Err(_) => continue,
            };
            self.courier.enqueue(shard, *txn, word);
        }
    }

    pub(super) fn one_phase(&mut self, txn: TxnId, shard: ShardId, answer: OnePhase) {
        let Some(flight) = self.flights.get_mut(&txn) else {
            return;
        };
        if matches!(flight.phase, Phase::OnePhase(asked) if asked != shard) {
            // It was asked when it was not known who took part, and had nothing to do with it.
            return;
        }
        self.admission.heard(txn, shard);
        match (&mut flight.phase, answer) {
            // Nobody waits, and whoever asks later asks the shard again.
            (Phase::OnePhase(_) | Phase::Asking { .. }, OnePhase::Unknown) if flight.waiters.is_empty() => {
                self.drop_flight(txn);
            }
            (Phase::OnePhase(_) | Phase::Asking { .. }, OnePhase::Unknown) => {
                self.effects.push_back(Effect::AskShard { shard, txn });
            }
            (
                Phase::OnePhase(_) | Phase::Asking { .. },
                OnePhase::Ended(Outcome::Committed { commit_ts }),
            ) => {
                if self.oracle.observe(commit_ts) {
                    self.end(txn, Answer::Ended(Outcome::Committed { commit_ts }));
                } else {
                    flight.phase = Phase::Covering { commit_ts };
                }
            }
            (Phase::OnePhase(_), OnePhase::Ended(Outcome::Aborted { cause })) => {
                self.end(txn, Answer::Ended(Outcome::Aborted { cause }));
            }
            (Phase::OnePhase(_), OnePhase::Expired) => self.end(txn, Answer::Expired),
            (Phase::Asking { cause, shards, expired }, said) => {
                *expired |= said == OnePhase::Expired;
                shards.remove(&shard);
                if shards.is_empty() && *expired {
                    self.end(txn, Answer::Expired);
                } else if shards.is_empty() {
                    let cause = cause.clone();
                    self.abort(txn, cause);
                }
            }
            _ => {}
        }
    }
}
