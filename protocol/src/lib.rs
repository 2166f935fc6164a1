//! The words that every part of Troth shares.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`id`], [`timestamp`], [`key`], [`limits`] | the nouns: who, when, what, and how much of it |
//! | [`ring`], [`cluster_map`] | where a shard stands, and how that is told to others |
//! | [`message`], [`reject`] | everything that is said between processes, and every way to say no |
//! | [`wire`] | how a message becomes bytes: header, bounds, checksum, validated once at the door |
//! | [`net`] | carrying frames: the [`net::Transport`] trait, QUIC with mutual TLS, and in memory |
//! | [`routing`] | calling the leader of a group: redirects, deadlines, jittered backoff |
//! | `process` | what the servers share: configuration files, logging, signals (feature `process`) |
//! | `fault` | named instants at which a test can hold, stop or kill a server (feature `process`) |
//! | [`mutation`] | deliberate bugs that tests must find (feature `mutations`) |
//! | [`timeline`] | what happened to transactions lately |
//! | [`clock`] | the only place that reads the wall clock |
//!
//! Nothing here touches a disk. The pure modules (all but [`net`], [`routing`] and [`clock`])
//! neither read a clock nor spawn a task.

pub mod clock;
pub mod cluster_map;
#[cfg(feature = "process")]
pub mod fault;
pub mod id;
pub mod key;
pub mod limits;
pub mod message;
pub mod mutation;
pub mod net;
#[cfg(feature = "process")]
pub mod process;
pub mod reject;
pub mod ring;
pub mod routing;
pub mod timeline;
pub mod timestamp;
pub mod trace;
pub mod wire;

pub use cluster_map::{ClusterMap, CoordinatorMember, MemberState, Move, Node, NodeState};
pub use id::{
    ClientId, ClusterId, ClusterIdError, Epoch, FolderId, FoundingId, FoundingIdError, GroupId, Incarnation,
    Lineage, MapEpoch, NodeId, ParticipantId, ShardId, TxnId, TxnIdError,
};
pub use key::{Key, KeyRange, Value};
pub use reject::Reject;
pub use timestamp::Timestamp;
