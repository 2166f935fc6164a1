//! What a request needs before it is answered, and what the answer is then.
//!
//! ```text
//! request ─► open ─┬─────────────────────────────────────────────► answer
//!                  ├─► proof that this replica leads ────► close ─► answer
//!                  └─► a command through the log ─ applied ─► close ─► answer
//! ```
//!
//! Pure: the driver does what is said here, and so do the simulator and the model checker.

use std::io;
use std::ops::Bound;

use troth_protocol::message::shard::{
    CommitOnePhase, Decision, Prepare, PreparedTxn, Request, Response, Vote,
};
use troth_protocol::message::txn::{Cause, Work};
use troth_protocol::mutation::{self, Bug};
use troth_protocol::{Epoch, Reject, Timestamp, TxnId};

use super::command::{Command, Output};
use super::leader::{Leader, Target};
use super::state::{Prepared, State, View};

/// Prepared transactions that one page names.
const PREPARED_MAX: usize = 4096;

/// What a request needs.
#[derive(Clone, PartialEq, Debug)]
pub enum Need {
    /// Nothing: this is the answer.
    Nothing(Response),
    /// A read barrier, and then [`close`].
    Barrier(Rest),
    /// This command, committed and applied, and then [`close`] with its output. It is to be proposed
    /// before the leader hears of anything else.
    Entry(Command, Rest),
    /// A read barrier if [`reads_need_barrier`], and then [`Event::Read`](super::leader::Event::Read).
    Read(Target),
}

/// What is left to do of a request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Rest {
    /// Tell the vote.
    Vote,
    /// Tell the outcome of a one-shard transaction.
    Outcome {
        /// Whose readers must be told if the command is not proposed after all.
        begun: Option<TxnId>,
    },
    /// Tell that decisions are applied.
    Finish,
    /// Name the transactions that are prepared.
    Page {
        /// Those after this one.
        after: Option<TxnId>,
        /// So many at most.
        count_max: usize,
    },
    /// Tell that this replica leads.
    Lead,
}

/// Whether a read may look only after a read barrier.
pub fn reads_need_barrier() -> bool {
    !mutation::on(Bug::StaleShardLeaderReads)
}

/// Whether a snapshot can be read: to be asked before a read, and again after it, since what was read is
/// what it should be only if it was not given up meanwhile.
///
/// # Errors
/// [`Reject::SnapshotTooOld`].
pub fn check_readable(state: &State, at: Timestamp) -> Result<(), Reject> {
    if at < state.marks().safe_point && !mutation::on(Bug::CollectUnderSnapshot) {
        return Err(Reject::SnapshotTooOld);
    }
    Ok(())
}

impl Leader {
    /// Says what a request needs.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub fn open(&mut self, state: &State, view: &impl View, request: Request) -> Result<Need, Reject> {
        Ok(match request {
            Request::Read { keys, .. } => Need::Read(Target::Keys(keys)),
            Request::Scan { range, .. } => Need::Read(Target::Range(range)),
            Request::WhoLeads => Need::Barrier(Rest::Lead),
            Request::Prepare(prepare) => self.open_prepare(state, view, prepare)?,
            Request::CommitOnePhase(commit) => self.open_one_phase(state, commit),
            Request::Finish { epoch, decisions } => self.open_finish(state, epoch, decisions),
            Request::Prepared { epoch, after, count_max } => {
                let rest = Rest::Page { after, count_max: count_max as usize };
                if state.marks().epoch >= epoch {
                    Need::Barrier(rest)
                } else {
                    Need::Entry(Command::Follow { epoch }, rest)
                }
            }
            Request::Outcome { txn } => {
                Need::Entry(Command::Fence { txn, cause: Cause::Settled }, Rest::Outcome { begun: None })
            }
        })
    }

    fn open_prepare(&self, state: &State, view: &impl View, prepare: Prepare) -> Result<Need, Reject> {
        if prepare.epoch < state.marks().epoch {
            return Ok(Need::Nothing(Response::Vote(Vote::No { cause: Cause::Superseded })));
        }
        match state.prepared().get(&prepare.txn) {
            // Asked again by the same leader: the promise stands in the log.
            Some(record) if record.epoch == prepare.epoch => {
                return Ok(Need::Nothing(Response::Vote(Vote::Yes { above: self.vote_above(state) })));
            }
            Some(_) => {}
            None if self.is_aborted_early(prepare.txn, prepare.epoch) => {
                return Ok(Need::Nothing(Response::Vote(Vote::No { cause: Cause::Settled })));
            }
            None => {
                if let Some(cause) = hopeless(state, view, prepare.txn, &prepare.work)? {
                    return Ok(Need::Nothing(Response::Vote(Vote::No { cause })));
                }
            }
        }
        Ok(Need::Entry(Command::Prepare(prepare), Rest::Vote))
    }

    fn open_one_phase(&mut self, state: &State, commit: CommitOnePhase) -> Need {
        let CommitOnePhase { txn, floor, work } = commit;
        match self.begin_one_phase(state, txn, floor, &work) {
            Ok(commit_ts) => {
                let lead = self.lead();
                let command = Command::CommitOnePhase { lead, txn, commit_ts, work };
                Need::Entry(command, Rest::Outcome { begun: Some(txn) })
            }
            // Durable like any answer here, so that a copy of this request that was delayed cannot
            // commit later.
            Err(cause) => Need::Entry(Command::Fence { txn, cause }, Rest::Outcome { begun: None }),
        }
    }

    fn open_finish(&mut self, state: &State, epoch: Epoch, decisions: Vec<(TxnId, Decision)>) -> Need {
        self.note_early_aborts(state, epoch, &decisions);
        let known = |(txn, _): &(TxnId, Decision)| state.prepared().contains_key(txn);
        let decisions: Vec<_> = decisions.into_iter().filter(known).collect();
        if decisions.is_empty() && epoch <= state.marks().epoch {
            // All of it was applied before. That it is durable too, a barrier makes sure of.
            return Need::Barrier(Rest::Finish);
        }
        self.begin_finish(&decisions);
        Need::Entry(Command::Finish { epoch, decisions }, Rest::Finish)
    }
}

/// Why it is certain already that a transaction cannot commit here. A No that needs no log.
fn hopeless(state: &State, view: &impl View, txn: TxnId, work: &Work) -> Result<Option<Cause>, Reject> {
    match state.objection(txn, work, view) {
        Ok(cause) => Ok(cause),
        // Not to be seen without waiting for the disk: the log will tell.
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(Reject::Internal { reason: error.to_string() }),
    }
}

/// The answer to a request that has got what it needed.
///
/// # Errors
/// If nobody leads here any more, and the answer needs somebody who does.
///
/// # Panics
/// If the output is not one of the command that was asked for.
pub fn close(
    rest: Rest,
    output: Option<Output>,
    state: &State,
    leader: Option<&Leader>,
) -> Result<Response, Reject> {
    match (rest, output) {
        // Without a leader here the promise still stands; the next one will say so.
        (Rest::Vote, Some(Output::Vote(Ok(())))) => {
            let above = leader.ok_or(Reject::Deposed)?.vote_above(state);
            Ok(Response::Vote(Vote::Yes { above }))
        }
        (Rest::Vote, Some(Output::Vote(Err(cause)))) => Ok(Response::Vote(Vote::No { cause })),
        (Rest::Outcome { .. }, Some(Output::Outcome(outcome))) => Ok(Response::Outcome(outcome)),
        (Rest::Outcome { .. }, Some(Output::Expired)) => Ok(Response::Expired),
        (Rest::Finish, None | Some(Output::Done)) => Ok(Response::Finished),
        (Rest::Page { after, count_max }, None | Some(Output::Done)) => Ok(page(state, after, count_max)),
        (Rest::Lead, None) => leader.map(|_| Response::Leading).ok_or(Reject::NotLeader { leader: None }),
        (rest, output) => unreachable!("{rest:?} does not lead to {output:?}"),
    }
}

fn page(state: &State, after: Option<TxnId>, count_max: usize) -> Response {
    let from = after.map_or(Bound::Unbounded, Bound::Excluded);
    let mut records = state.prepared().range((from, Bound::Unbounded));
    let record = |(txn, record): (&TxnId, &Prepared)| PreparedTxn {
        txn: *txn,
        participants: record.participants.clone(),
    };
    let txns = records.by_ref().take(count_max.clamp(1, PREPARED_MAX)).map(record).collect();
    Response::Prepared { txns, more: records.next().is_some() }
}
