//! What the members of a Raft group say to each other. Plain forms of the Raft library's types;
//! only `troth-replication` turns them into those.

#![expect(missing_docs, reason = "what rkyv derives for enums has none; all that is written here does")]

use bytes::Bytes;

use crate::id::{GroupId, Incarnation, NodeId};

/// A message to a member of a group.
#[derive(Clone, PartialEq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct Request {
    /// The group.
    pub group: GroupId,
    /// Who speaks.
    pub from: NodeId,
    /// Which start of it: a process whose place another one has taken is not listened to.
    pub incarnation: Incarnation,
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
    /// Parts of a snapshot that the receiver may have already; compares, and changes nothing.
    SnapshotOffer {
        /// The leader's vote.
        vote: Vote,
        /// Tells this transfer from others.
        transfer: u64,
        /// The transfer begins; what is offered is its first.
        begin: bool,
        /// In order, from where the last offer or parts ended; may be empty.
        offers: Vec<Offer>,
    },
    /// Parts of a snapshot: those of the last offer that were wanted, in order; or, where the receiver
    /// has nothing, those that follow.
    SnapshotParts {
        /// The leader's vote.
        vote: Vote,
        /// Tells this transfer from others.
        transfer: u64,
        /// In order.
        parts: Vec<Part>,
    },
    /// All of a snapshot was sent: it becomes the state.
    SnapshotEnd {
        /// The leader's vote.
        vote: Vote,
        /// The last entry that the snapshot contains.
        last: Option<LogId>,
        /// The membership as of the snapshot.
        membership: StoredMembership,
        /// Tells this transfer from others.
        transfer: u64,
    },
}

/// A range of the keys of a state machine.
#[derive(Clone, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct Bounds {
    /// Which of the machine's spans, by its place.
    pub span: u16,
    /// The first key.
    pub from: Bytes,
    /// The first key after the last.
    pub to: Bytes,
}

/// A part of a snapshot, without what is in it.
#[derive(Clone, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct Offer {
    /// Which keys.
    pub bounds: Bounds,
    /// xxh3 (128 bits, big-endian) over the keys and values.
    pub hash: [u8; 16],
}

/// A part of a snapshot.
#[derive(Clone, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct Part {
    /// Which keys; the receiver has nothing else within them afterwards.
    pub bounds: Bounds,
    /// In order of keys.
    pub pairs: Vec<Pair>,
}

/// A key and its value, as the state machine wrote them.
#[derive(Clone, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct Pair {
    /// The key.
    pub key: Bytes,
    /// The value.
    pub value: Bytes,
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
    /// To `SnapshotOffer`.
    SnapshotWanted {
        /// Which of the offers differ from what is there, by their places.
        wanted: Vec<u32>,
        /// There is nothing at all behind them: what follows need not be offered.
        rest_is_empty: bool,
    },
    /// To `SnapshotParts`: go on.
    SnapshotStored,
    /// To `SnapshotEnd`: installed; and to any of them: the receiver follows a newer vote.
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
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize,
)]
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
