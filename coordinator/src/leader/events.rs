//! What the leader hears, and what it wants done.

use std::time::Instant;

use troth_protocol::message::coordinator::Commit;
use troth_protocol::message::shard::{CommitOnePhase, Decision as Word, Prepare, Vote};
use troth_protocol::message::txn::Outcome;
use troth_protocol::{NodeId, ParticipantId, Reject, ShardId, Timestamp, TxnId};

use crate::command::{Decision, Verdict};
use crate::steward::Plan;

/// Names a request that waits for an answer.
pub type RequestId = u64;

/// A moment, by both clocks.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    /// For deadlines.
    pub instant: Instant,
    /// For timestamps: milliseconds since the Unix epoch.
    pub millis: u64,
}

/// What happened.
#[derive(Clone, PartialEq, Debug)]
pub enum Event {
    /// Somebody wants to commit.
    Commit {
        /// Names the request.
        id: RequestId,
        /// The transaction.
        commit: Commit,
        /// When nobody waits for the answer any more.
        deadline: Instant,
    },
    /// Somebody asks how a transaction ended.
    Outcome {
        /// Names the request.
        id: RequestId,
        /// The transaction.
        txn: TxnId,
        /// Its participants; empty: not known.
        participants: Vec<ParticipantId>,
    },
    /// Nobody waits for this answer any more.
    GaveUp {
        /// The request.
        id: RequestId,
        /// What it was about.
        txn: TxnId,
    },
    /// A participant has voted.
    Voted {
        /// The transaction.
        txn: TxnId,
        /// Who.
        participant: ParticipantId,
        /// How; `None`: it could not be asked in time.
        vote: Option<Vote>,
    },
    /// A shard has told the outcome of a one-shard transaction.
    OnePhase {
        /// The transaction.
        txn: TxnId,
        /// The shard.
        shard: ShardId,
        /// What it said.
        answer: OnePhase,
    },
    /// Decisions or fences were applied.
    Applied {
        /// What became of each transaction.
        verdicts: Vec<(TxnId, Verdict)>,
    },
    /// These decisions or fences were not proposed: the group was too busy.
    NotProposed {
        /// The transactions.
        txns: Vec<TxnId>,
    },
    /// That these can be forgotten was not proposed: the group was too busy.
    NotForgotten {
        /// The transactions.
        txns: Vec<TxnId>,
    },
    /// A shard has applied decisions, or not.
    Delivered {
        /// The shard.
        shard: ShardId,
        /// The decisions.
        decisions: Vec<(TxnId, Word)>,
        /// Whether it answered.
        ok: bool,
    },
    /// A ceiling is committed.
    Ceiling(Timestamp),
    /// A ceiling was not proposed.
    NoCeiling,
    /// A participant has given a sign of life.
    Seen {
        /// Which.
        node: NodeId,
    },
    /// A shard has named prepared transactions.
    Page {
        /// The shard.
        shard: ShardId,
        /// The transactions, in the order of ids.
        txns: Vec<TxnId>,
        /// There may be more.
        more: bool,
    },
}

/// What a shard says about a one-shard transaction.
#[derive(Clone, PartialEq, Debug)]
pub enum OnePhase {
    /// This is how it ended.
    Ended(Outcome),
    /// It began longer ago than outcomes are kept.
    Expired,
    /// The shard could not be asked.
    Unknown,
}

/// What is to be done.
#[derive(Clone, PartialEq, Debug)]
pub enum Effect {
    /// Ask a shard for its vote.
    Prepare {
        /// The shard.
        shard: ShardId,
        /// The question.
        prepare: Prepare,
        /// When the vote comes too late.
        deadline: Instant,
    },
    /// Let a shard commit by itself.
    CommitOnePhase {
        /// The shard.
        shard: ShardId,
        /// The transaction.
        commit: CommitOnePhase,
        /// When to ask for the outcome instead.
        deadline: Instant,
    },
    /// Ask a shard for the outcome of a one-shard transaction, for ever.
    AskShard {
        /// The shard.
        shard: ShardId,
        /// The transaction.
        txn: TxnId,
    },
    /// Propose these decisions.
    Decide(Vec<Decision>),
    /// Propose that these can never commit.
    Refuse(Vec<TxnId>),
    /// Propose that these are finished.
    Forget(Vec<TxnId>),
    /// Propose this ceiling.
    Ceiling(Timestamp),
    /// Propose to give up outcomes of transactions that began before this.
    Retire(Timestamp),
    /// Propose to place shards otherwise.
    Place(Plan),
    /// Tell a shard what was decided.
    Finish {
        /// The shard.
        shard: ShardId,
        /// The decisions.
        decisions: Vec<(TxnId, Word)>,
    },
    /// Ask a shard for prepared transactions, until it answers.
    Collect {
        /// The shard.
        shard: ShardId,
        /// After this one.
        after: Option<TxnId>,
    },
    /// Answer a request.
    Answer {
        /// The request.
        id: RequestId,
        /// The answer.
        answer: Answer,
    },
}

/// How a request about a transaction is answered.
#[derive(Clone, PartialEq, Debug)]
pub enum Answer {
    /// This is how it ended.
    Ended(Outcome),
    /// It began longer ago than outcomes are kept.
    Expired,
    /// The request is refused.
    Rejected(Reject),
}
