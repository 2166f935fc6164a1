//! What is asked of a shard's leader.

#![expect(missing_docs, reason = "what rkyv derives for enums has none; all that is written here does")]

use crate::id::{Epoch, ParticipantId, TxnId};
use crate::key::{Key, KeyRange, Value};
use crate::message::txn::{Cause, Outcome, Work};
use crate::timestamp::Timestamp;

/// A request to a shard's leader.
#[derive(Clone, PartialEq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub enum Request {
    /// The newest versions of keys at a moment. Waits for prepared transactions that may have
    /// committed before it.
    Read {
        /// The snapshot.
        at: Timestamp,
        /// The keys, all of this shard. The answer has the versions of the first of them, one at
        /// least; for those that are missing, ask again.
        keys: Vec<Key>,
    },
    /// The keys of a range at a moment, in order, a page at a time.
    Scan {
        /// The snapshot.
        at: Timestamp,
        /// The range; for the next page, from just after the last key of this one.
        range: KeyRange,
        /// The most rows to return, at least 1. The server has its own maximum too.
        rows_max: u32,
    },
    /// Does this replica lead, and serve?
    WhoLeads,
    /// First phase: check, lock, promise.
    Prepare(Prepare),
    /// Check and apply a transaction that only this shard takes part in.
    CommitOnePhase(CommitOnePhase),
    /// Second phase, for many transactions at once.
    Finish {
        /// The coordinator leader that sends it.
        epoch: Epoch,
        /// Decisions, durable at the coordinator if they say committed.
        decisions: Vec<(TxnId, Decision)>,
    },
    /// Which transactions are prepared here? Asked by a new coordinator leader, and after this the
    /// shard takes no more prepares from older ones.
    Prepared {
        /// The coordinator leader that asks.
        epoch: Epoch,
        /// Only those after this one, in the order of ids; `None`: from the first.
        after: Option<TxnId>,
        /// The most to return.
        count_max: u32,
    },
    /// How did this one-shard transaction end? Where the shard finds nothing, it makes sure that
    /// the transaction can never commit, and answers *aborted*.
    Outcome {
        /// The transaction.
        txn: TxnId,
    },
}

impl Request {
    /// The coordinator leader that speaks, if it says which it is.
    pub fn epoch(&self) -> Option<Epoch> {
        match self {
            Request::Prepare(Prepare { epoch, .. })
            | Request::Finish { epoch, .. }
            | Request::Prepared { epoch, .. } => Some(*epoch),
            Request::Read { .. }
            | Request::Scan { .. }
            | Request::WhoLeads
            | Request::CommitOnePhase(_)
            | Request::Outcome { .. } => None,
        }
    }
}

/// First phase of two-phase commit.
#[derive(Clone, PartialEq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct Prepare {
    /// The transaction.
    pub txn: TxnId,
    /// The coordinator leader that runs it.
    pub epoch: Epoch,
    /// The oracle's value when this was sent: if it commits, then later than this. Readers at
    /// earlier moments need not wait.
    pub floor: Timestamp,
    /// Everybody who votes, this shard included.
    pub participants: Vec<ParticipantId>,
    /// What it did here.
    pub work: Work,
}

/// A one-shard transaction, checked and applied in one step.
#[derive(Clone, PartialEq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct CommitOnePhase {
    /// The transaction.
    pub txn: TxnId,
    /// The oracle's value when this was sent: if it commits, then later than this.
    pub floor: Timestamp,
    /// What it did.
    pub work: Work,
}

/// What was decided about a prepared transaction.
#[derive(Clone, Copy, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub enum Decision {
    /// It happened, at this moment.
    Commit {
        /// The place in the serial order.
        commit_ts: Timestamp,
    },
    /// It did not happen.
    Abort,
}

/// A version of a key.
#[derive(Clone, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct Version {
    /// When it was written; [`Timestamp::ZERO`]: there is none.
    pub version: Timestamp,
    /// `None`: the key has no value at this moment.
    pub value: Option<Value>,
}

/// A row of a scan.
#[derive(Clone, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct Row {
    /// The key.
    pub key: Key,
    /// When it was written.
    pub version: Timestamp,
    /// The value.
    pub value: Value,
}

/// A transaction that is prepared at a shard.
#[derive(Clone, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct PreparedTxn {
    /// The transaction.
    pub txn: TxnId,
    /// Everybody who votes.
    pub participants: Vec<ParticipantId>,
}

/// An answer of a shard's leader.
#[derive(Clone, PartialEq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub enum Response {
    /// To `WhoLeads`: it does.
    Leading,
    /// To `Read`: one for each key, in order.
    Values(Vec<Version>),
    /// To `Scan`.
    Page {
        /// In order of keys.
        rows: Vec<Row>,
        /// There may be more after the last row.
        more: bool,
    },
    /// To `Prepare`.
    Vote(Vote),
    /// To `CommitOnePhase` and `Outcome`.
    Outcome(Outcome),
    /// To `Outcome`: it began longer ago than outcomes are kept.
    Expired,
    /// To `Finish`: all are applied and durable.
    Finished,
    /// To `Prepared`.
    Prepared {
        /// In the order of ids.
        txns: Vec<PreparedTxn>,
        /// There may be more after the last one.
        more: bool,
    },
}

/// A participant's word.
#[derive(Clone, PartialEq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub enum Vote {
    /// A promise: it can commit, whatever happens here.
    Yes {
        /// The commit timestamp must be larger than this: the newest moment at which this shard
        /// has committed or been read.
        above: Timestamp,
    },
    /// It cannot commit.
    No {
        /// Why.
        cause: Cause,
    },
}
