//! What is asked of the coordinators' leader.

#![expect(missing_docs, reason = "what rkyv derives for enums has none; all that is written here does")]

use crate::cluster_map::{ClusterMap, Node};
use crate::id::{
    ClientId, Epoch, FolderId, Incarnation, Lineage, MapEpoch, NodeId, ParticipantId, ShardId, TxnId,
};
use crate::message::greeting::{Greeting, Welcome};
use crate::message::overview::NodeReport;
use crate::message::raft::LogId;
use crate::message::txn::{Outcome, Part};
use crate::timestamp::Timestamp;

/// A request to the coordinators' leader.
#[derive(Clone, PartialEq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub enum Request {
    /// Consecutive timestamps, each larger than all that were handed out before.
    Timestamps {
        /// How many; set by the client from the number of its waiting `begin`s, at least 1.
        count: u32,
        /// Transactions that may write begin with them, of this client; `None`: they are for something
        /// else, and never refused.
        begins: Option<ClientId>,
    },
    /// Commit a transaction.
    Commit(Commit),
    /// How did it end? Settles the question for ever: an answer of *aborted* also means that it
    /// can never commit.
    Outcome {
        /// The transaction.
        txn: TxnId,
        /// Its participants, as far as the asker knows them; empty: not known, all shards are asked.
        participants: Vec<ParticipantId>,
    },
    /// Does this coordinator lead?
    WhoLeads,
    /// The cluster map. Any coordinator answers.
    Map {
        /// The version that the asker has; it is not sent again.
        known: MapEpoch,
    },
    /// A participant is there, and where. Repeated as a sign of life.
    Register {
        /// Who it is, as others shall find it, with this start of it.
        node: Node,
        /// Where it keeps what it promised.
        folder: FolderId,
        /// The start that the coordinators remember, if they have said so, and the folder has begun that too.
        previous: Option<Incarnation>,
        /// How many batches the folder has synced. It never becomes less.
        progress: u64,
        /// What it has heard from coordinators; `None`: nothing yet. Those that know less are older copies.
        heard: Option<Heard>,
        /// The version of the map that it has; it is not sent again. If there is no newer one, the answer
        /// waits for one for a while.
        known: MapEpoch,
        /// How its replicas are.
        report: NodeReport,
    },
    /// A shard that was on its way has arrived: its leader says so until the map does.
    Moved {
        /// The shard.
        shard: ShardId,
        /// Its replicas now.
        voters: Vec<NodeId>,
        /// The entry of its log that made them so; it is committed.
        formed: LogId,
    },
    /// The leader of a shard on its way has sent bytes of keys and values for that, and says so before it
    /// is not the leader any more. For operators; nothing depends on it.
    Carried {
        /// How many, since it said so last.
        bytes: u64,
    },
    /// A shard asks about transactions that it has prepared and heard nothing of.
    Resolve {
        /// The transactions.
        txns: Vec<TxnId>,
    },
    /// A server ends, since it was told that it must not take part. For operators; nothing depends on it.
    Ends {
        /// Which server.
        server: String,
        /// Why, and what to do.
        reason: String,
    },
    /// Another coordinator says who it is. Any coordinator answers, also one that does not take part yet.
    Greet(Greeting),
}

/// How far the coordinators were, as a participant has heard: it remembers that on its disk, and obeys none that
/// were not so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct Heard {
    /// Which coordinators.
    pub lineage: Lineage,
    /// Their leader.
    pub epoch: Epoch,
    /// Which start of it: two leaders with one epoch have gone on from the same past, and do not know of each other. 0: it has
    /// not said so yet.
    pub leader: Incarnation,
    /// An entry of their log that was committed. The epoch of every later leader is greater.
    pub index: u64,
}

/// A transaction to commit.
#[derive(Clone, PartialEq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct Commit {
    /// The transaction.
    pub txn: TxnId,
    /// The leader that it is meant for, as learned from the last answer. A first submission starts
    /// under exactly this leader or not at all, so a copy that was delayed cannot start later.
    pub epoch: Epoch,
    /// The client has sent it before and does not know what became of that. It is then never
    /// started, only asked about.
    pub resubmission: bool,
    /// What it did, by participant; each participant once. Set by the client from its cluster map.
    pub parts: Vec<Part>,
}

/// An answer of the coordinators' leader.
#[derive(Clone, PartialEq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub enum Response {
    /// To `Timestamps`.
    Timestamps {
        /// The first one; the others follow it without a gap.
        first: Timestamp,
        /// How many there are: fewer than were asked for, or none, if too much is under way.
        count: u32,
        /// After how many milliseconds to ask for those that are missing; 0 if none are.
        retry_after_millis: u32,
        /// The leader that answers.
        epoch: Epoch,
        /// The version of its cluster map: the asker that has an older one fetches it.
        map: MapEpoch,
    },
    /// To `WhoLeads`: it does.
    Leading,
    /// To `Commit` and `Outcome`.
    Outcome(Outcome),
    /// To `Outcome`: it began longer ago than outcomes are kept.
    Expired,
    /// To `Map`: a newer version than the asker has.
    Map(ClusterMap),
    /// To `Map`: the asker has the newest version.
    MapUnchanged,
    /// To `Register`: it is admitted.
    Registered {
        /// How far the coordinators are.
        heard: Heard,
        /// A newer version of the map than the asker has; `None`: there is none.
        map: Option<ClusterMap>,
    },
    /// To `Greet`.
    Welcome(Welcome),
    /// To `Moved`, `Carried` and `Ends`: it is noted.
    Noted,
    /// To `Resolve`: for each transaction, in order.
    Resolved {
        /// The leader that answers.
        epoch: Epoch,
        /// What is known.
        resolutions: Vec<Resolution>,
    },
}

/// What a coordinator leader tells a shard about a transaction in doubt.
#[derive(Clone, Copy, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub enum Resolution {
    /// It is committed.
    Committed {
        /// The place in the serial order.
        commit_ts: Timestamp,
    },
    /// There is no decision, and this leader will not make one.
    Aborted,
    /// It is still being voted on.
    InFlight,
}
