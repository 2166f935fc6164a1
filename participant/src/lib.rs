//! The data node: it holds replicas of shards, and votes.
//!
//! | module | what it does |
//! | --- | --- |
//! | [`config`] | what an operator sets |
//! | [`server`], [`program`] | one process: store, network, identity, start and stop |
//! | [`node`] | the shards of this process, and its place in the cluster |
//! | [`shard`] | one replica of a shard: command, state, leader, driver |
//! | [`hearing`], `records` | how far the coordinators were, and which of them may be obeyed; what a node keeps |
//! | [`metrics`] | what is counted and measured |
//! | [`locks`], [`mvcc`] | what a shard is made of |
//!
//! A request walks `server → node → shard driver → leader (may it be answered now?) → store`; a
//! change walks on through `replication → shard state → locks, versions`, and its answer comes back
//! the same way.

pub mod config;
pub mod hearing;
pub mod locks;
pub mod metrics;
pub mod mvcc;
pub mod node;
pub mod program;
mod records;
pub mod server;
pub mod shard;

pub use config::Config;
pub use server::Server;

/// The column families of a participant. Keys begin with the shard's number, `u16` big-endian.
pub mod families {
    use troth_replication::Family;

    /// Versions: see [`mvcc`](crate::mvcc).
    pub const DATA: Family = Family("data");
    /// Transactions that are prepared: `[shard u16 | txn] → record`.
    pub const PREPARED: Family = Family("prepared");
    /// Outcomes of one-shard transactions: `[shard u16 | txn] → record`.
    pub const OUTCOME: Family = Family("outcome");
    /// The rest of a shard's state: `[shard u16] → record`.
    pub const SHARD: Family = Family("shard");

    /// All of them.
    pub const ALL: [Family; 4] = [DATA, PREPARED, OUTCOME, SHARD];
}
