//! What an operator asks of a process.

use crate::id::{ClusterId, Epoch, MapEpoch, NodeId, ShardId};

/// A request of an operator.
#[derive(Clone, PartialEq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub enum Request {
    /// What are you, and how are you?
    Status,
}

/// The answer to an operator.
#[derive(Clone, PartialEq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub enum Response {
    /// Of a coordinator.
    Coordinator(CoordinatorStatus),
    /// Of a participant.
    Participant(ParticipantStatus),
}

/// How a coordinator is.
#[derive(Clone, PartialEq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct CoordinatorStatus {
    /// The installation.
    pub cluster: ClusterId,
    /// Which coordinator.
    pub id: NodeId,
    /// The version of its program.
    pub version: String,
    /// Who leads, as far as it knows.
    pub leader: Option<NodeId>,
    /// Its epoch if it leads.
    pub epoch: Option<Epoch>,
    /// The version of its cluster map.
    pub map_epoch: MapEpoch,
    /// Transactions being voted on or finished.
    pub in_flight: u64,
    /// Decisions that not all participants have acknowledged.
    pub unfinished: u64,
    /// Transactions committed since it started to lead.
    pub committed: u64,
    /// Transactions aborted since it started to lead.
    pub aborted: u64,
    /// Participants, and milliseconds since their last sign of life; `None`: none since it leads.
    pub nodes_seen: Vec<(NodeId, Option<u64>)>,
}

/// How a participant is.
#[derive(Clone, PartialEq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct ParticipantStatus {
    /// The installation.
    pub cluster: ClusterId,
    /// Which participant.
    pub id: NodeId,
    /// The version of its program.
    pub version: String,
    /// The version of its cluster map.
    pub map_epoch: MapEpoch,
    /// The replicas that it holds.
    pub shards: Vec<ShardStatus>,
}

/// How a replica is.
#[derive(Clone, PartialEq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct ShardStatus {
    /// The shard.
    pub shard: ShardId,
    /// Who leads its group, as far as this replica knows.
    pub leader: Option<NodeId>,
    /// It leads, and answers requests.
    pub serving: bool,
    /// The last entry it has applied.
    pub applied: u64,
    /// Transactions that are prepared and not finished.
    pub prepared: u64,
    /// Keys and ranges that they hold locked.
    pub locks: u64,
    /// Reads that wait for one of them.
    pub waiting: u64,
}
