//! Everything that may enter a shard's log, and what comes out.

#![expect(missing_docs, reason = "what rkyv derives for enums has none; all that is written here does")]

use troth_protocol::message::shard::{Decision, Prepare};
use troth_protocol::message::txn::{Cause, Outcome, Work};
use troth_protocol::{Epoch, Timestamp, TxnId};

/// An entry of the log.
#[derive(Clone, PartialEq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub enum Command {
    /// A leader's first entry. Its index names the leadership: what an earlier leader proposed with
    /// its own knowledge is void after it.
    Lead,
    /// Check, lock, promise.
    Prepare(Prepare),
    /// Check and apply a transaction of this shard alone.
    CommitOnePhase {
        /// The leadership that chose the timestamp.
        lead: u64,
        /// The transaction.
        txn: TxnId,
        /// Its place in the serial order if it commits.
        commit_ts: Timestamp,
        /// What it did.
        work: Work,
    },
    /// Apply decisions.
    Finish {
        /// The coordinator leader that decided.
        epoch: Epoch,
        /// Transactions and what was decided.
        decisions: Vec<(TxnId, Decision)>,
    },
    /// A coordinator leader has taken over: older ones are not obeyed any more.
    Follow {
        /// Its epoch.
        epoch: Epoch,
    },
    /// Make sure that a one-shard transaction has an outcome: *aborted* if it has none yet.
    Fence {
        /// The transaction.
        txn: TxnId,
        /// Why it was aborted, if it is now.
        cause: Cause,
    },
    /// Give up old versions and outcomes.
    Retire {
        /// No snapshot before this is read any more.
        safe_point: Timestamp,
        /// No outcome of a transaction that began before this is kept.
        outcomes_before: Timestamp,
    },
}

/// What an entry led to.
#[derive(Clone, PartialEq, Debug)]
pub enum Output {
    /// To `Lead`: the leadership.
    Leads(u64),
    /// To `Prepare`: yes, or why not.
    Vote(Result<(), Cause>),
    /// To `CommitOnePhase` and `Fence`.
    Outcome(Outcome),
    /// To `CommitOnePhase` and `Fence`: it began longer ago than outcomes are kept.
    Expired,
    /// To the others.
    Done,
}
