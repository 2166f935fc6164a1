//! What an operator asks of a process.

#![expect(missing_docs, reason = "what rkyv derives for enums has none; all that is written here does")]

use std::fmt;
use std::str::FromStr;

use crate::cluster_map::CoordinatorMember;
use crate::id::{ClusterId, Epoch, MapEpoch, NodeId, ParticipantId, ShardId, TxnId};
use crate::key::Key;
use crate::message::overview::Overview;
use crate::message::shard::Decision;
use crate::timestamp::Timestamp;

/// A request of an operator.
#[derive(Clone, PartialEq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub enum Request {
    /// What are you, and how are you?
    Status,
    /// To the coordinators' leader: how is the cluster?
    Overview,
    /// To the coordinators' leader: change where a participant stands.
    Node {
        /// Which.
        node: NodeId,
        /// How.
        change: NodeChange,
    },
    /// To the coordinators' leader: change who belongs to them.
    Coordinators(CoordinatorChange),
    /// To a participant: which transactions are prepared at the shards that it leads?
    InDoubt,
    /// What do you know of this transaction?
    Txn {
        /// The transaction.
        txn: TxnId,
    },
    /// To a participant that leads a shard: end a transaction that is prepared there, because the
    /// coordinators are lost for good.
    Resolve {
        /// The shard.
        shard: ShardId,
        /// The transaction.
        txn: TxnId,
        /// How it shall end.
        decision: Decision,
        /// Who says so, and why, for the audit record.
        note: String,
    },
    /// To the coordinators' leader: hand leadership over, so that no transaction fails by it.
    Switchover {
        /// To this coordinator; `None`: to the one that is fit best.
        to: Option<NodeId>,
    },
    /// Something about fault points. For tests; never for a client's certificate.
    Fault(Fault),
}

/// A change of where a participant stands.
#[derive(Clone, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub enum NodeChange {
    /// It is on the ring from now on, or again, or otherwise than before.
    Admit {
        /// Its share of the shards, relative to others; `None`: as it says itself.
        weight: Option<u32>,
        /// What fails together with it; `None`: as it says itself.
        zone: Option<String>,
    },
    /// It hands over all that it holds.
    Drain,
    /// It belongs to the cluster no more. Only for one that holds nothing.
    Remove,
}

/// A change of who belongs to the coordinators.
#[derive(Clone, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub enum CoordinatorChange {
    /// These join, each with an empty folder, and vote when all of them have what the others have.
    Add {
        /// Their numbers, and where they listen: `host:port`.
        members: Vec<(NodeId, String)>,
    },
    /// These belong to it no more.
    Remove {
        /// Their numbers.
        ids: Vec<NodeId>,
    },
    /// This one has lost its folder: it loses its vote, and joins again with an empty one.
    Replace {
        /// Its number.
        id: NodeId,
        /// Where it listens from now on; `None`: where it did.
        address: Option<String>,
    },
}

/// What is asked about fault points.
#[derive(Clone, Copy, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub enum Fault {
    /// Arm one: it fires once.
    Arm {
        /// Which.
        point: FaultPoint,
        /// What happens there.
        action: FaultAction,
        /// How often it is passed before it fires.
        skip: u32,
    },
    /// Disarm all, and let go on whoever is held.
    Disarm,
    /// Which are armed, and which have fired?
    List,
}

/// What happens to a process at a fault point.
#[derive(Clone, Copy, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub enum FaultAction {
    /// The process kills itself: SIGKILL.
    Kill,
    /// The process stops itself: SIGSTOP. Somebody else must send SIGCONT.
    Stop,
    /// Whoever has come to the point waits there; the rest of the process goes on.
    Hold {
        /// For so long, at most a minute.
        millis: u32,
    },
    /// The same, and so does everybody who comes later.
    HoldAll {
        /// Each for so long, at most a minute.
        millis: u32,
    },
}

/// An armed fault point.
#[derive(Clone, Copy, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct FaultStatus {
    /// Which.
    pub point: FaultPoint,
    /// Whether it has fired.
    pub fired: bool,
}

macro_rules! fault_points {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// A named instant in a server.
        #[derive(
            Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug,
            rkyv::Archive, rkyv::Serialize, rkyv::Deserialize,
        )]
        pub enum FaultPoint {
            $($(#[$doc])* $name,)*
        }

        impl FaultPoint {
            /// All of them.
            pub const ALL: &[FaultPoint] = &[$(FaultPoint::$name),*];

            /// Its name on the command line and in logs.
            pub fn name(self) -> &'static str {
                match self {
                    $(FaultPoint::$name => $text,)*
                }
            }
        }
    };
}

fault_points! {
    /// Coordinator: a commit has arrived, and nothing was done about it.
    CommitReceived = "commit-received",
    /// Coordinator: no `Prepare` of these transactions is sent yet.
    BeforePrepare = "before-prepare",
    /// Coordinator: a vote has arrived, and is not counted yet.
    VoteReceived = "vote-received",
    /// Coordinator: all votes are counted, and `Decide` is not proposed yet.
    BeforeDecide = "before-decide",
    /// Coordinator: the outcome is known, and the client is not answered yet.
    BeforeReply = "before-reply",
    /// Coordinator: a decision is durable, and its `Finish` to this shard is not sent yet.
    BeforeFinish = "before-finish",
    /// Coordinator: a shard has acknowledged a `Finish`, which is not noted yet.
    FinishAcknowledged = "finish-acknowledged",
    /// Participant: a `Prepare` has arrived, and is not proposed yet.
    PrepareReceived = "prepare-received",
    /// Participant: a promise is durable, and the vote is not sent yet.
    Prepared = "prepared",
    /// Participant: a `Finish` has arrived, and is not proposed yet.
    FinishReceived = "finish-received",
    /// Participant: a `Finish` is applied, and not acknowledged yet.
    Finished = "finished",
    /// Participant: a read has a thread to wait for the disk with, and does not read yet.
    DiskRead = "disk-read",
    /// Participant: some parts of a snapshot are about to be sent.
    SnapshotParts = "snapshot-parts",
    /// Participant: a shard's newcomers have all that it has, and its voters are not changed yet.
    BeforeChange = "before-change",
    /// Participant: a shard's voters are changed, and the coordinators do not know yet.
    BeforeMoved = "before-moved",
    /// Any server: the log is about to be written and synced. To hold it is to stall the disk.
    LogSync = "log-sync",
}

impl fmt::Display for FaultPoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The text is not a fault point.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{text:?} is not a fault point; they are {}", names())]
pub struct FaultPointError {
    text: String,
}

fn names() -> String {
    FaultPoint::ALL.iter().map(|point| point.name()).collect::<Vec<_>>().join(", ")
}

impl FromStr for FaultPoint {
    type Err = FaultPointError;

    fn from_str(text: &str) -> Result<FaultPoint, FaultPointError> {
        let point = FaultPoint::ALL.iter().find(|point| point.name() == text);
        point.copied().ok_or_else(|| FaultPointError { text: text.to_owned() })
    }
}

/// The answer to an operator.
#[derive(Clone, PartialEq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub enum Response {
    /// Of a coordinator.
    Coordinator(CoordinatorStatus),
    /// Of a participant.
    Participant(ParticipantStatus),
    /// To `Overview`.
    Overview(Overview),
    /// To `Node`: it is in the map.
    NodeChanged,
    /// To `Coordinators`: it is on its way; the status tells when it is done.
    CoordinatorsChanged,
    /// To `InDoubt`: by age.
    InDoubt(Vec<InDoubt>),
    /// To `Txn`.
    Txn(TxnKnowledge),
    /// To `Resolve`: it has ended there.
    Resolved,
    /// Leadership was handed to this coordinator.
    Switched {
        /// Who leads now.
        to: NodeId,
    },
    /// What is armed now.
    Faults(Vec<FaultStatus>),
}

/// A transaction that is prepared at a shard.
#[derive(Clone, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct InDoubt {
    /// The transaction.
    pub txn: TxnId,
    /// The shard.
    pub shard: ShardId,
    /// Milliseconds since it began, by the participant's clock.
    pub age_ms: u64,
    /// The coordinator leader that it was promised to.
    pub epoch: Epoch,
    /// Everybody who votes.
    pub participants: Vec<ParticipantId>,
    /// Keys that it writes here.
    pub writes: u64,
    /// Keys and ranges that it holds locked here.
    pub locks: u64,
    /// Reads that wait for it here.
    pub waiting: u64,
    /// Some of those reads, oldest first.
    pub blocked: Vec<Blocked>,
}

/// A read that waits for a transaction in doubt.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct Blocked {
    /// The moment that it wants to see: when its transaction or snapshot began.
    pub at: Timestamp,
    /// The key that stands in its way.
    pub key: Key,
}

/// Something that happened to a transaction.
#[derive(Clone, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct Moment {
    /// When, by the server's clock: milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// At which shard, or with which, if it is about one.
    pub shard: Option<ShardId>,
    /// What.
    pub what: String,
}

/// What a server knows of a transaction.
#[derive(Clone, PartialEq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct TxnKnowledge {
    /// What a coordinator has on record; `None` for a participant, or if there is no record.
    pub decision: Option<Decision>,
    /// Where a participant has it, by shard; those that it does not lead too.
    pub shards: Vec<TxnAtShard>,
    /// What it remembers, oldest first.
    pub moments: Vec<Moment>,
    /// What operators did to it.
    pub audit: Vec<String>,
}

/// What a replica of a shard knows of a transaction.
#[derive(Clone, PartialEq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct TxnAtShard {
    /// The shard.
    pub shard: ShardId,
    /// Whether this replica leads its group.
    pub leads: bool,
    /// Everybody who votes, if it is prepared here.
    pub prepared: Option<Vec<ParticipantId>>,
    /// How it ended here, if that is on record.
    pub ended: Option<Decision>,
    /// If it commits, then later than this.
    pub above: Timestamp,
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
    /// Who belongs to the coordinators, as far as it knows.
    pub members: Vec<CoordinatorMember>,
    /// What it has refused or waits for, the latest last.
    pub notices: Vec<Notice>,
}

/// Something that an operator should know.
#[derive(Clone, PartialEq, Eq, Debug, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct Notice {
    /// When, by the server's clock: milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// What, and what to do.
    pub what: String,
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
    /// Which leadership it is in: the index of the entry that began it.
    pub lead: u64,
    /// The last entry it has applied.
    pub applied: u64,
    /// Transactions that are prepared and not finished.
    pub prepared: u64,
    /// Keys and ranges that they hold locked.
    pub locks: u64,
    /// Reads that wait for one of them.
    pub waiting: u64,
}
