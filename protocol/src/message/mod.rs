//! Everything that is said between processes.
//!
//! A [`Request`] names whom it is for; each kind has its own module, which also says who sets its
//! fields. All of it is plain structs, enums and `Vec`s, validated once when it arrives (see
//! [`wire`](crate::wire)). Within one protocol version a type never changes: a change is a new
//! version of the protocol.

#![expect(missing_docs, reason = "what rkyv derives for enums has none; all that is written here does")]

pub mod admin;
pub mod coordinator;
pub mod greeting;
pub mod overview;
pub mod raft;
#[cfg(any(test, feature = "samples"))]
pub mod samples;
pub mod shard;
pub mod txn;

use crate::id::ShardId;
use crate::net::Role;
use crate::reject::Reject;

/// What one process asks of another.
#[derive(Clone, PartialEq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub enum Request {
    /// For the coordinators' leader.
    Coordinator(coordinator::Request),
    /// For the leader of a shard.
    Shard {
        /// The shard that is meant.
        shard: ShardId,
        /// What it should do.
        request: shard::Request,
    },
    /// For a member of a Raft group.
    Raft(raft::Request),
    /// For the process itself.
    Admin(admin::Request),
}

/// The answer to a [`Request`]: of the same kind, or a refusal.
#[derive(Clone, PartialEq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub enum Response {
    /// From the coordinators' leader.
    Coordinator(coordinator::Response),
    /// From the leader of a shard.
    Shard(shard::Response),
    /// From a member of a Raft group.
    Raft(raft::Response),
    /// From the process itself.
    Admin(admin::Response),
    /// The request was not carried out; see there for what is certain.
    Rejected(Reject),
}

impl Request {
    /// Whether a caller with this role may ask this. What only peers say to each other is closed to
    /// clients, so that no client can prepare, decide or vote.
    pub fn permits(&self, role: Role) -> bool {
        match self {
            Request::Coordinator(request) => match request {
                coordinator::Request::Timestamps { .. }
                | coordinator::Request::WhoLeads
                | coordinator::Request::Map { .. } => true,
                coordinator::Request::Commit(_) | coordinator::Request::Outcome { .. } => !role.is_server(),
                coordinator::Request::Register { .. }
                | coordinator::Request::Moved { .. }
                | coordinator::Request::Carried { .. }
                | coordinator::Request::Resolve { .. } => role == Role::Participant,
                coordinator::Request::Greet(_) => role == Role::Coordinator,
                coordinator::Request::Ends { .. } => role.is_server(),
            },
            Request::Shard { request, .. } => match request {
                shard::Request::Read { .. } | shard::Request::Scan { .. } | shard::Request::WhoLeads => true,
                shard::Request::Prepare(_)
                | shard::Request::CommitOnePhase(_)
                | shard::Request::Finish { .. }
                | shard::Request::Prepared { .. }
                | shard::Request::Outcome { .. } => role == Role::Coordinator,
            },
            Request::Raft(request) => match request.group {
                crate::GroupId::Coordinator => role == Role::Coordinator,
                crate::GroupId::Shard(_) => role == Role::Participant,
            },
            Request::Admin(request) => match request {
                admin::Request::Status | admin::Request::Overview => true,
                admin::Request::Node { .. }
                | admin::Request::Coordinators(_)
                | admin::Request::InDoubt
                | admin::Request::Txn { .. }
                | admin::Request::Resolve { .. }
                | admin::Request::Switchover { .. }
                | admin::Request::Fault(_) => role == Role::Admin,
            },
        }
    }

    /// What the request is called in logs and errors.
    pub fn name(&self) -> &'static str {
        match self {
            Request::Coordinator(request) => match request {
                coordinator::Request::Timestamps { .. } => "Timestamps",
                coordinator::Request::Commit(_) => "Commit",
                coordinator::Request::WhoLeads => "WhoLeads",
                coordinator::Request::Outcome { .. } => "Outcome",
                coordinator::Request::Map { .. } => "Map",
                coordinator::Request::Register { .. } => "Register",
                coordinator::Request::Moved { .. } => "Moved",
                coordinator::Request::Carried { .. } => "Carried",
                coordinator::Request::Resolve { .. } => "Resolve",
                coordinator::Request::Greet(_) => "Greet",
                coordinator::Request::Ends { .. } => "Ends",
            },
            Request::Shard { request, .. } => match request {
                shard::Request::Read { .. } => "Read",
                shard::Request::Scan { .. } => "Scan",
                shard::Request::WhoLeads => "ShardWhoLeads",
                shard::Request::Prepare(_) => "Prepare",
                shard::Request::CommitOnePhase(_) => "CommitOnePhase",
                shard::Request::Finish { .. } => "Finish",
                shard::Request::Prepared { .. } => "Prepared",
                shard::Request::Outcome { .. } => "ShardOutcome",
            },
            Request::Raft(_) => "Raft",
            Request::Admin(request) => match request {
                admin::Request::Status => "Status",
                admin::Request::Overview => "Overview",
                admin::Request::Node { .. } => "Node",
                admin::Request::Coordinators(_) => "Coordinators",
                admin::Request::InDoubt => "InDoubt",
                admin::Request::Txn { .. } => "Txn",
                admin::Request::Resolve { .. } => "ResolveByHand",
                admin::Request::Switchover { .. } => "Switchover",
                admin::Request::Fault(_) => "Fault",
            },
        }
    }
}
