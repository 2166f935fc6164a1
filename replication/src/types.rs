//! The Raft library's types, as Troth uses them, and their plain forms on the wire and on disk.

use std::any::Any;
use std::collections::BTreeSet;
use std::fmt;

use bytes::Bytes;
use openraft::impls::leader_id_std;
use troth_protocol::NodeId;
use troth_protocol::message::raft as wire;

openraft::declare_raft_types!(
    /// Commands are opaque bytes; every term has one leader.
    pub(crate) Types:
        D = Command,
        R = Reply,
        NodeId = u64,
        Node = (),
        LeaderId = leader_id_std::LeaderId<u64, u64>,
);

pub(crate) type LogId = openraft::type_config::alias::LogIdOf<Types>;
pub(crate) type Entry = openraft::type_config::alias::EntryOf<Types>;
pub(crate) type Vote = openraft::type_config::alias::VoteOf<Types>;
pub(crate) type Membership = openraft::Membership<u64, ()>;
pub(crate) type StoredMembership = openraft::type_config::alias::StoredMembershipOf<Types>;

/// A command in its own encoding.
#[derive(Clone, PartialEq)]
pub(crate) struct Command(pub Bytes);

impl fmt::Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// What the machine answered to a command; nothing for entries that carry none.
pub(crate) struct Reply(pub Option<Box<dyn Any + Send + Sync>>);

pub(crate) fn log_id(id: wire::LogId) -> LogId {
    LogId::new_term_index(id.term, id.index)
}

pub(crate) fn log_id_to_wire(id: &LogId) -> wire::LogId {
    wire::LogId { term: id.committed_leader_id().term, index: id.index }
}

pub(crate) fn vote(vote: wire::Vote) -> Vote {
    if vote.committed {
        Vote::new_committed(vote.term, vote.node.0)
    } else {
        Vote::new(vote.term, vote.node.0)
    }
}

pub(crate) fn vote_to_wire(vote: &Vote) -> wire::Vote {
    wire::Vote {
        term: vote.leader_id.term,
        node: NodeId(vote.leader_id.voted_for),
        committed: vote.committed,
    }
}

pub(crate) fn membership(membership: wire::Membership) -> Membership {
    let voters: Vec<BTreeSet<u64>> =
        membership.voters.iter().map(|set| set.iter().map(|node| node.0).collect()).collect();
    Membership::new_with_defaults(
        voters,
        membership.members.iter().map(|node| node.0).collect::<BTreeSet<_>>(),
    )
}

pub(crate) fn membership_to_wire(membership: &Membership) -> wire::Membership {
    let nodes = |ids: &BTreeSet<u64>| ids.iter().copied().map(NodeId).collect();
    wire::Membership {
        voters: membership.get_joint_config().iter().map(nodes).collect(),
        members: membership.nodes().map(|(&id, ())| NodeId(id)).collect(),
    }
}

pub(crate) fn stored_membership(stored: wire::StoredMembership) -> StoredMembership {
    StoredMembership::new(stored.set_by.map(log_id), membership(stored.membership))
}

pub(crate) fn stored_membership_to_wire(stored: &StoredMembership) -> wire::StoredMembership {
    wire::StoredMembership {
        set_by: stored.log_id().as_ref().map(log_id_to_wire),
        membership: membership_to_wire(stored.membership()),
    }
}

pub(crate) fn entry(entry: wire::Entry) -> Entry {
    let payload = match entry.payload {
        wire::Payload::Blank => openraft::EntryPayload::Blank,
        wire::Payload::Command(bytes) => openraft::EntryPayload::Normal(Command(bytes)),
        wire::Payload::Membership(members) => openraft::EntryPayload::Membership(membership(members)),
    };
    Entry { log_id: log_id(entry.id), payload }
}

pub(crate) fn entry_to_wire(entry: &Entry) -> wire::Entry {
    let payload = match &entry.payload {
        openraft::EntryPayload::Blank => wire::Payload::Blank,
        openraft::EntryPayload::Normal(command) => wire::Payload::Command(command.0.clone()),
        openraft::EntryPayload::Membership(members) => wire::Payload::Membership(membership_to_wire(members)),
    };
    wire::Entry { id: log_id_to_wire(&entry.log_id), payload }
}
