//! A commit on its way, until it is known how it ended.
//!
//! ```text
//! first submission ─┬─ certainly refused ─► an error: nothing happened
//!    ▲              ├─ another leader ────┐
//!    └──────────────┼─────────────────────┘
//!                   ├─ an outcome ────────► ended
//!                   └─ nobody knows ──────► asked again, until there is an outcome
//! ```
//!
//! The first submission names the leader it is meant for. As long as leaders certainly refused it, it
//! goes to the next one, as a first submission. From the moment when one may have begun it, only the
//! question remains how it ended, and the words say so.

use troth_protocol::message::coordinator::{Commit, Request, Response};
use troth_protocol::message::txn::{Outcome, Part, Work};
use troth_protocol::routing::{Resend, RouteError};
use troth_protocol::{Epoch, ParticipantId, Reject, TxnId};

/// A commit that was begun.
#[derive(Clone, PartialEq, Debug)]
pub struct Submission {
    txn: TxnId,
    epoch: Epoch,
    participants: Vec<ParticipantId>,
    /// What is to be done, as long as nobody can have begun it.
    unsent: Option<Vec<Part>>,
}

/// What comes after an answer.
#[derive(Clone, PartialEq, Debug)]
pub enum Step {
    /// Send the next request at once.
    Send,
    /// Nobody can say yet: send the next request after a pause, unless the deadline has passed. Then
    /// the outcome is unknown.
    Pause,
    /// It has ended.
    Ended(Outcome),
    /// It certainly did not happen.
    Failed(RouteError),
}

impl Submission {
    /// A commit that nobody has heard of, by a transaction that began in this epoch.
    pub fn new(txn: TxnId, epoch: Epoch, parts: Vec<Part>) -> Submission {
        let participants = parts.iter().map(|part| part.participant.clone()).collect();
        Submission { txn, epoch, participants, unsent: Some(parts) }
    }

    /// The transaction.
    pub fn txn(&self) -> TxnId {
        self.txn
    }

    /// Everybody who votes.
    pub fn participants(&self) -> &[ParticipantId] {
        &self.participants
    }

    /// Whether it is certain that nobody has begun it.
    pub fn is_unsent(&self) -> bool {
        self.unsent.is_some()
    }

    /// The next request to the coordinators' leader, and how it may be repeated.
    pub fn request(&self) -> (Request, Resend) {
        let part =
            |participant: &ParticipantId| Part { participant: participant.clone(), work: Work::default() };
        let (resubmission, parts, resend) = match &self.unsent {
            Some(parts) => (false, parts.clone(), Resend::OnlyUnsent),
            None => (true, self.participants.iter().map(part).collect(), Resend::Idempotent),
        };
        (Request::Commit(Commit { txn: self.txn, epoch: self.epoch, resubmission, parts }), resend)
    }

    /// Takes in what came of the last request.
    pub fn answered(&mut self, answer: Result<Response, RouteError>) -> Step {
        let step = match (answer, &self.unsent) {
            (Ok(Response::Outcome(outcome)), _) => return Step::Ended(outcome),
            (Err(RouteError::Rejected(Reject::StaleEpoch { current })), Some(_)) if current != self.epoch => {
                self.epoch = current;
                return Step::Send;
            }
            (Err(error), Some(_)) if !error.is_ambiguous() => return Step::Failed(error),
            (_, Some(_)) => Step::Send,
            // Whatever goes wrong here says nothing about the commit itself; and expired cannot be said
            // of a transaction that is younger than its deadline.
            (_, None) => Step::Pause,
        };
        self.unsent = None;
        step
    }
}
