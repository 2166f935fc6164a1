//! Everything that may enter the coordinators' log, and what comes out.

#![expect(missing_docs, reason = "what rkyv derives for enums has none; all that is written here does")]

use troth_protocol::message::admin::{CoordinatorChange, NodeChange};
use troth_protocol::message::raft::LogId;
use troth_protocol::{
    ClusterId, Epoch, FolderId, Incarnation, Lineage, Move, Node, NodeId, ParticipantId, ShardId, Timestamp,
    TxnId,
};

/// An entry of the log.
#[derive(Clone, PartialEq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub enum Command {
    /// A leader's first entry. Its index is the leader's epoch: what earlier leaders proposed is
    /// void after it.
    Lead {
        /// Which start of a coordinator leads.
        leader: Incarnation,
        /// What a new cluster shall be like; ignored by an old one.
        founding: Founding,
    },
    /// A participant is there.
    Register {
        /// Who and where, and which start of it.
        node: Node,
        /// Where it keeps what it promised.
        folder: FolderId,
        /// Which start it comes after.
        previous: Option<Incarnation>,
        /// How many batches its folder has synced.
        progress: u64,
    },
    /// Participants have synced so many batches, each at least.
    Progress {
        /// Which, and how many.
        nodes: Vec<(NodeId, u64)>,
    },
    /// An operator changes who belongs to the coordinators.
    Coordinators(CoordinatorChange),
    /// These coordinators vote now, and no others.
    Seated {
        /// Which.
        voters: Vec<NodeId>,
    },
    /// A coordinator listens somewhere else than before.
    Found {
        /// Which.
        id: NodeId,
        /// Where: `host:port`.
        address: String,
    },
    /// An operator changes where a participant stands.
    Node {
        /// Which.
        node: NodeId,
        /// How.
        change: NodeChange,
    },
    /// A participant was not heard of for so long that others take its place.
    Lose {
        /// The leader that says so.
        epoch: Epoch,
        /// Which.
        node: NodeId,
    },
    /// Shards shall go to these nodes.
    Move {
        /// The leader that says so.
        epoch: Epoch,
        /// Which, and where.
        moves: Vec<Move>,
    },
    /// A shard that was on its way has arrived.
    Moved {
        /// The shard.
        shard: ShardId,
        /// Its replicas now.
        voters: Vec<NodeId>,
        /// The entry of its own log that made them so.
        formed: LogId,
    },
    /// Bytes were sent to take a shard elsewhere.
    Carried {
        /// How many more.
        bytes: u64,
    },
    /// Timestamps may be handed out up to here.
    Ceiling {
        /// The leader that wants to.
        epoch: Epoch,
        /// Exclusive.
        ceiling: Timestamp,
    },
    /// All participants of these transactions have voted Yes to this leader.
    Decide {
        /// The leader.
        epoch: Epoch,
        /// The decisions.
        decisions: Vec<Decision>,
    },
    /// All participants of these transactions have applied the decision.
    Forget {
        /// The transactions.
        txns: Vec<TxnId>,
    },
    /// These transactions must never commit, if they have not.
    Refuse {
        /// The transactions.
        txns: Vec<TxnId>,
    },
    /// Give up old outcomes.
    Retire {
        /// Those of transactions that began before this.
        outcomes_before: Timestamp,
    },
}

/// What the first leader of a new cluster says.
#[derive(Clone, PartialEq, Eq, Debug, Default, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct Founding {
    /// The coordinators that found it, and where they listen.
    pub founders: Vec<(NodeId, String)>,
    /// What tells it from every other one; random.
    pub lineage: Lineage,
    /// What it shall be like.
    pub settings: Settings,
}

/// What a cluster is like from its first day on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct Settings {
    /// The installation.
    pub cluster: ClusterId,
    /// The number of shards.
    pub shards: u16,
    /// How many replicas a shard has.
    pub replicas: u16,
    /// Shards are placed when this many participants have registered.
    pub nodes: u16,
}

/// A decision to commit.
#[derive(Clone, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct Decision {
    /// The transaction.
    pub txn: TxnId,
    /// Its place in the serial order.
    pub commit_ts: Timestamp,
    /// Who must hear of it.
    pub participants: Vec<ParticipantId>,
}

/// What is on record about a transaction.
#[derive(Clone, Copy, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub enum Record {
    /// It is committed.
    Committed {
        /// Its place in the serial order.
        commit_ts: Timestamp,
    },
    /// It can never commit.
    Refused,
}

/// What became of a transaction that a command named.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// This is on record now.
    Recorded(Record),
    /// The command came from an earlier leader, and nothing was done.
    Superseded,
    /// It began longer ago than outcomes are kept, and nothing was done.
    Expired,
}

/// What an entry led to.
#[derive(Clone, PartialEq, Debug)]
pub enum Output {
    /// To `Lead`: the epoch.
    Leads(Epoch),
    /// To `Register`: the id belongs to another data folder, of the node that is there.
    Taken,
    /// To `Register`: an operator has removed the node.
    Removed,
    /// To `Register`: another start of the node is on record, which this one does not come after; or its folder
    /// had synced more.
    Passed {
        /// The start on record.
        incarnation: Incarnation,
        /// How many batches it had synced.
        progress: u64,
        /// Where it was.
        address: String,
    },
    /// To `Node` and `Coordinators`: nothing was done, because of this.
    Refused(String),
    /// To `Decide` and `Refuse`: for each transaction, in order.
    Verdicts(Vec<Verdict>),
    /// To the others.
    Done,
}
