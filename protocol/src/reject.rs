//! Every way to refuse a request, and what the caller may conclude from it.

#![expect(missing_docs, reason = "what rkyv derives for enums has none; all that is written here does")]

use std::time::Duration;

use crate::id::{Epoch, Incarnation, MapEpoch, NodeId};

/// A request was not carried out. Everybody who sees one asks three questions, answered here: may
/// it have happened all the same ([`Reject::is_ambiguous`]), does it help to try again
/// ([`Reject::is_retriable`]), and where to go instead ([`Reject::NotLeader`]).
#[derive(Clone, PartialEq, Debug, thiserror::Error, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub enum Reject {
    /// This member does not lead the group. Nothing happened.
    #[error("not the leader{}", leader.map(|node| format!("; node {node} is")).unwrap_or_default())]
    NotLeader {
        /// Who does, as far as it knows.
        leader: Option<NodeId>,
    },
    /// This member stopped leading while it carried out the request; the next leader knows what
    /// became of it.
    #[error("leadership was lost on the way")]
    Deposed,
    /// The first submission of a commit names another leader than this one. Nothing happened.
    #[error("the coordinator leader is in epoch {current}")]
    StaleEpoch {
        /// The epoch of this leader.
        current: Epoch,
    },
    /// This node does not hold the shard. Nothing happened.
    #[error("the shard is not on this node; its map has epoch {epoch}")]
    StaleMap {
        /// The version of the map that this node has.
        epoch: MapEpoch,
    },
    /// Too much is under way. Nothing happened.
    #[error("overloaded; try again in {retry_after_millis} ms")]
    Overloaded {
        /// When to try again.
        retry_after_millis: u32,
    },
    /// A node wants to register with an id that belongs to another data folder. Nothing happened.
    #[error("node {node} is known with another data folder, last at {address}")]
    NodeTaken {
        /// The id.
        node: NodeId,
        /// Where that one is.
        address: String,
    },
    /// A node wants to register that an operator has removed. Nothing happened.
    #[error("node {node} was removed from this cluster")]
    NodeRemoved {
        /// The id.
        node: NodeId,
    },
    /// Another start of this node is remembered, that this one has not said it comes after. Nothing happened.
    #[error(
        "node {node} is known by incarnation {incarnation} with {progress} synced batches, last at {address}"
    )]
    NodePassed {
        /// The id.
        node: NodeId,
        /// What is remembered.
        incarnation: Incarnation,
        /// How many batches that one had synced.
        progress: u64,
        /// Where it was.
        address: String,
    },
    /// Another start of this node was heard of just now, at another place. Nothing happened.
    #[error("node {node} was heard of at {address} just now")]
    NodeElsewhere {
        /// The id.
        node: NodeId,
        /// Where.
        address: String,
    },
    /// The server has not been admitted yet, or another start of it was. Nothing happened.
    #[error("node {node} is not admitted with this incarnation")]
    NotAdmitted {
        /// Which server.
        node: NodeId,
    },
    /// A leader is younger than what this node has heard from coordinators: it runs on an older copy of their state,
    /// or was founded anew. Nothing happened.
    #[error("epoch {epoch} is older than entry {index} of the coordinators' log, which was heard of")]
    CoordinatorPassed {
        /// The leader that asked.
        epoch: Epoch,
        /// What was heard of.
        index: u64,
    },
    /// The deadline passed while the request was carried out.
    #[error("the deadline passed")]
    DeadlineExceeded,
    /// The deadline passed while a prepared transaction was in the way. Nothing happened.
    #[error("the deadline passed while key {key} was locked by prepared transaction {by}")]
    Blocked {
        /// The key.
        key: crate::Key,
        /// Who holds the lock.
        by: crate::TxnId,
    },
    /// The process is stopping. Nothing happened.
    #[error("shutting down")]
    ShuttingDown,
    /// The caller's certificate does not allow this. Nothing happened.
    #[error("a certificate with role {role} may not send {request}")]
    Forbidden {
        /// The role in the caller's certificate.
        role: String,
        /// What was asked.
        request: String,
    },
    /// The request makes no sense. Nothing happened.
    #[error("malformed request: {reason}")]
    Malformed {
        /// What is wrong with it.
        reason: String,
    },
    /// A bound was exceeded. Nothing happened.
    #[error("too large: {reason}")]
    TooLarge {
        /// Which bound, and by how much.
        reason: String,
    },
    /// A snapshot is older than versions are kept. Nothing happened.
    #[error("the snapshot is too old to be read")]
    SnapshotTooOld,
    /// The message was meant for another node. Nothing happened.
    #[error("this is node {actual}")]
    WrongNode {
        /// Who this is.
        actual: NodeId,
    },
    /// The server failed on the way; its log says why.
    #[error("internal error: {reason}")]
    Internal {
        /// What failed.
        reason: String,
    },
}

impl Reject {
    /// The server asks to come back later.
    pub fn overloaded(retry_after: Duration) -> Reject {
        Reject::Overloaded { retry_after_millis: retry_after.as_millis().min(u128::from(u32::MAX)) as u32 }
    }

    /// The request makes no sense, because of this.
    pub fn malformed(reason: impl Into<String>) -> Reject {
        Reject::Malformed { reason: reason.into() }
    }

    /// Its kind, for metrics.
    pub fn name(&self) -> &'static str {
        match self {
            Reject::NotLeader { .. } => "not_leader",
            Reject::Deposed => "deposed",
            Reject::StaleEpoch { .. } => "stale_epoch",
            Reject::StaleMap { .. } => "stale_map",
            Reject::Overloaded { .. } => "overloaded",
            Reject::NodeTaken { .. } => "node_taken",
            Reject::NodeRemoved { .. } => "node_removed",
            Reject::NodePassed { .. } => "node_passed",
            Reject::NodeElsewhere { .. } => "node_elsewhere",
            Reject::NotAdmitted { .. } => "not_admitted",
            Reject::CoordinatorPassed { .. } => "coordinator_passed",
            Reject::DeadlineExceeded => "deadline_exceeded",
            Reject::Blocked { .. } => "blocked",
            Reject::ShuttingDown => "shutting_down",
            Reject::Forbidden { .. } => "forbidden",
            Reject::Malformed { .. } => "malformed",
            Reject::TooLarge { .. } => "too_large",
            Reject::SnapshotTooOld => "snapshot_too_old",
            Reject::WrongNode { .. } => "wrong_node",
            Reject::Internal { .. } => "internal",
        }
    }

    /// Whether the request may have taken effect all the same.
    pub fn is_ambiguous(&self) -> bool {
        match self {
            Reject::Deposed | Reject::DeadlineExceeded | Reject::Internal { .. } => true,
            Reject::NotLeader { .. }
            | Reject::StaleEpoch { .. }
            | Reject::StaleMap { .. }
            | Reject::Overloaded { .. }
            | Reject::NodeTaken { .. }
            | Reject::NodeRemoved { .. }
            | Reject::NodePassed { .. }
            | Reject::NodeElsewhere { .. }
            | Reject::NotAdmitted { .. }
            | Reject::CoordinatorPassed { .. }
            | Reject::Blocked { .. }
            | Reject::ShuttingDown
            | Reject::Forbidden { .. }
            | Reject::Malformed { .. }
            | Reject::TooLarge { .. }
            | Reject::SnapshotTooOld
            | Reject::WrongNode { .. } => false,
        }
    }

    /// Whether the same request may succeed later or elsewhere.
    pub fn is_retriable(&self) -> bool {
        match self {
            Reject::NotLeader { .. }
            | Reject::Deposed
            | Reject::StaleMap { .. }
            | Reject::Overloaded { .. }
            | Reject::NotAdmitted { .. }
            | Reject::ShuttingDown
            | Reject::WrongNode { .. } => true,
            // The same words will never be right again.
            Reject::StaleEpoch { .. }
            | Reject::NodeTaken { .. }
            | Reject::NodeRemoved { .. }
            | Reject::NodePassed { .. }
            | Reject::NodeElsewhere { .. }
            | Reject::CoordinatorPassed { .. }
            | Reject::DeadlineExceeded
            | Reject::Blocked { .. }
            | Reject::Forbidden { .. }
            | Reject::Malformed { .. }
            | Reject::TooLarge { .. }
            | Reject::SnapshotTooOld
            | Reject::Internal { .. } => false,
        }
    }
}
