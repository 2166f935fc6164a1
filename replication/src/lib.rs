//! Raft once, for the coordinators and for the replicas of every shard.
//!
//! A [`Group`] keeps a [`Machine`] in step with the other members of the group: what is proposed is
//! agreed upon, made durable and applied, in the same order everywhere. All groups of a process
//! share one [`Store`], a RocksDB, and one [`LogWriter`], a thread that makes everything that waits
//! durable with a single synced write.
//!
//! ```text
//! propose ─► openraft ─► log ──► LogWriter: one batch, one sync, for all groups ──┐
//!    ▲           │ replicate                                                      │ durable
//!    │           ▼                                                                ▼
//!    └── output ─ Machine::apply ◄───────────── committed: a majority has it ◄────┘
//! ```
//!
//! Nobody outside of this crate names the Raft library.
//!
//! What survives a crash at any instant: votes and log entries that were acknowledged, because they
//! are synced first; the machine's state together with the index of the last entry in it, because
//! both go into one batch. State is not synced by itself: what a power cut takes of it is applied
//! again from the log. A record whose checksum does not match stops the group, for good, with the
//! reason in [`Leadership::Failed`].

mod adapter;
mod durable;
mod group;
pub mod http;
mod incarnation;
mod log;
mod machine;
#[doc(hidden)]
pub mod manifest;
pub mod metrics;
mod network;
#[doc(hidden)]
pub mod records;
mod rocks;
pub mod server;
mod snapshot;
mod types;

pub use group::{
    Follower, Group, GroupConfig, Leadership, Members, Proposal, ProposeError, StartError, Timing,
};
pub use incarnation::Incarnations;
pub use log::LogWriter;
pub use machine::{Batch, Committed, Machine, Span};
pub use network::Directory;
pub use rocks::{Family, OpenError, Reach, Store, StoreError, all_closed, families};
pub use snapshot::outgoing::{SnapshotBytes, Throttle, TransferProgress};
pub use snapshot::{applied, erase, is_known, last_stored, stored_voters};
