//! How a transaction ends, and who is told.

use troth_protocol::message::shard::Decision as Word;
use troth_protocol::message::txn::{Cause, Outcome};
use troth_protocol::{Reject, TxnId};

use super::{Answer, Effect, Flight, Leader, Phase, RequestId};
use crate::command::Record;

impl Leader {
    /// Presumed abort: nothing is logged, whoever may have prepared is told, and this leader never
    /// starts it again.
    pub(super) fn abort(&mut self, txn: TxnId, cause: Cause) {
        if let Some(flight) = self.flights.get(&txn) {
            let participants = match &flight.phase {
                Phase::Voting { ballot, .. } => ballot.participants().to_vec(),
                Phase::Deciding(decision) => decision.participants.clone(),
                Phase::AwaitingTime { .. }
                | Phase::OnePhase(_)
                | Phase::Covering { .. }
                | Phase::Refusing { .. }
                | Phase::Asking { .. } => Vec::new(),
            };
            self.courier.dispatch(txn, Word::Abort, &participants);
        }
        self.end(txn, Answer::Ended(Outcome::Aborted { cause }));
    }

    pub(super) fn drop_flight(&mut self, txn: TxnId) -> Option<Flight> {
        let flight = self.flights.remove(&txn)?;
        self.bytes -= flight.bytes;
        self.admission.decided(self.moment, txn, false);
        Some(flight)
    }

    pub(super) fn end(&mut self, txn: TxnId, answer: Answer) {
        let committed = matches!(answer, Answer::Ended(Outcome::Committed { .. }));
        self.admission.decided(self.moment, txn, committed);
        let Some(flight) = self.drop_flight(txn) else {
            return;
        };
        match &answer {
            Answer::Ended(Outcome::Committed { .. }) => self.committed += 1,
            Answer::Ended(Outcome::Aborted { .. }) => {
                self.aborted += 1;
                self.refused.insert(txn);
            }
            Answer::Expired | Answer::Rejected(_) => self.refused.insert(txn),
        }
        for id in flight.waiters {
            self.effects.push_back(Effect::Answer { id, answer: answer.clone() });
        }
    }

    pub(super) fn reject(&mut self, id: RequestId, reject: Reject) {
        self.effects.push_back(Effect::Answer { id, answer: Answer::Rejected(reject) });
    }

    pub(super) fn answer_record(&mut self, id: RequestId, record: Record) {
        match record {
            Record::Committed { commit_ts } => {
                let outcome = Outcome::Committed { commit_ts };
                self.effects.push_back(Effect::Answer { id, answer: Answer::Ended(outcome) });
            }
            Record::Refused => self.answer_aborted(id, Cause::Settled),
        }
    }

    pub(super) fn answer_aborted(&mut self, id: RequestId, cause: Cause) {
        self.effects.push_back(Effect::Answer { id, answer: Answer::Ended(Outcome::Aborted { cause }) });
    }
}
