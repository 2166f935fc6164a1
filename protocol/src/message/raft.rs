//! What the members of a Raft group say to each other. Plain forms of the Raft library's types;
//! only `troth-replication` turns them into those.

#![expect(missing_docs, reason = "what rkyv derives for enums has none; all that is written here does")]

use bytes::Bytes;

use crate::id::{GroupId, NodeId};

/// A message to a member of a group.
#[derive(Clone, PartialEq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct Request {
    /// The group.
    pub group: GroupId,
    /// Who speaks.
    pub from: NodeId,
    /// Who is meant; another node at the same address refuses.
    pub to: NodeId,
    /// What is said.
    pub body: Body,
}

/// What is said.
#[derive(Clone, PartialEq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub enum Body {
    /// Log entries, or none as a heartbeat.
    Append {
        /// The leader's vote.
        vote: Vote,
        /// The entry before the first one; `None`: there is none before.
        previous: Option<LogId>,
        /// Entries in order.
        entries: Vec<Entry>,
        /// Up to where the leader knows the log to be committed.
        committed: Option<LogId>,
    },
    /// Vote for me.
    Vote {
        /// The candidate's vote.
        vote: Vote,
        /// The candidate's last entry.
        last: Option<LogId>,
        /// The leader asked for this election.
        leadership_transfer: bool,
    },
    /// Would you vote for me? Changes nothing.
    PreVote {
        /// The vote that the candidate would ask for.
        vote: Vote,
        /// The candidate's last entry.
        last: Option<LogId>,
    },
    /// A leader goes: whoever is its successor takes over, and the others let it.
    TransferLeader {
        /// The vote of the leader that goes.
        vote: Vote,
        /// Its successor.
        to: NodeId,
        /// What the successor must have in its log.
        last: Option<LogId>,
    },
    /// A piece of a snapshot.
    Snapshot {
        /// The leader's vote.
        vote: Vote,
        /// The last entry that the snapshot contains.
        last: Option<LogId>,
        /// The membership as of the snapshot.
        membership: StoredMembership,
        /// Tells this transfer from others.
        transfer: u64,
        /// Position of this piece, from 0 without a gap.
        sequence: u64,
        /// Keys and values, as the state machine wrote them.
        chunk: Bytes,
        /// This is the last piece; the answer says whether the snapshot was installed.
        done: bool,
    },
}

/// The answer of a member.
#[derive(Clone, PartialEq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub enum Response {
    /// To `Append`.
    Append(Appended),
    /// To `Vote` and `PreVote`.
    Vote {
        /// The newest vote that the voter has seen.
        vote: Vote,
        /// Whether it was granted.
        granted: bool,
        /// The voter's last entry.
        last: Option<LogId>,
    },
    /// To `TransferLeader`: whether the successor will try.
    TransferLeader {
        /// It will.
        accepted: bool,
    },
    /// To `Snapshot`, before the last piece: go on.
    SnapshotContinue,
    /// To the last piece of a `Snapshot`: installed, or the receiver follows a newer vote.
    SnapshotDone {
        /// The newest vote that the receiver has seen.
        vote: Vote,
    },
}

/// What became of log entries.
#[derive(Clone, PartialEq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub enum Appended {
    /// All are durable.
    Success,
    /// Those up to this one are durable.
    Partial(Option<LogId>),
    /// The entry before the first one is not in the log.
    Conflict,
    /// The receiver follows a newer vote.
    HigherVote(Vote),
}

/// A vote: term, candidate, and whether a majority granted it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct Vote {
    /// The term.
    pub term: u64,
    /// The candidate.
    pub node: NodeId,
    /// A majority granted it.
    pub committed: bool,
}

/// The place of an entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct LogId {
    /// The term of the leader that proposed it.
    pub term: u64,
    /// Its index, from 0.
    pub index: u64,
}

/// An entry of the log.
#[derive(Clone, PartialEq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct Entry {
    /// Its place.
    pub id: LogId,
    /// What it says.
    pub payload: Payload,
}

/// What an entry says.
#[derive(Clone, PartialEq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub enum Payload {
    /// Nothing: a new leader's first entry.
    Blank,
    /// A command for the state machine, in its own encoding.
    Command(Bytes),
    /// A change of members.
    Membership(Membership),
}

/// Who belongs to a group.
#[derive(Clone, PartialEq, Eq, Debug, Default, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct Membership {
    /// The voters; two sets while a change is under way, and then both must agree.
    pub voters: Vec<Vec<NodeId>>,
    /// Everybody, learners too.
    pub members: Vec<NodeId>,
}

/// A membership and the entry that set it.
#[derive(Clone, PartialEq, Eq, Debug, Default, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct StoredMembership {
    /// The entry; `None`: the group has none yet.
    pub set_by: Option<LogId>,
    /// The membership.
    pub membership: Membership,
}
