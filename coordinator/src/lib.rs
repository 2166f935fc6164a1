//! The coordinator: it tells the time, runs two-phase commit, and remembers what was decided.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`command`] | everything that may enter the coordinators' log |
//! | [`state`] | what the log leads to: ceiling, decisions, nodes, cluster map |
//! | [`leader`] | what only the leader knows: transactions in flight, who waits for what |
//! | [`oracle`], [`commit`], [`finish`], [`recovery`] | the leader's parts: time, votes, second phase, what earlier leaders left |
//! | [`admission`] | who may begin, and who is told to come back later |
//! | [`steward`] | where the shards should be, and which moves next |
//! | [`machine`] | the state in RocksDB |
//! | [`door`] | whether this start of this folder may take part, and what is remembered of the others |
//! | [`driver`] | performs: proposes, calls shards, answers |
//! | [`eyes`], [`notices`], [`metrics`], [`console`] | what it sees and counts, for operators; the page that shows it |
//! | [`config`], [`server`], [`program`] | one process |
//!
//! All but the last five rows are pure: they never read a clock, a socket or a disk.

pub mod admission;
pub mod command;
pub mod commit;
pub mod config;
pub mod console;
pub mod door;
pub mod driver;
pub mod eyes;
pub mod finish;
pub mod leader;
pub mod machine;
pub mod metrics;
pub mod notices;
pub mod oracle;
pub mod program;
pub mod recovery;
pub mod server;
pub mod state;
pub mod steward;

#[cfg(test)]
mod script;

pub use config::Config;
pub use server::Server;
