//! One replica of a shard.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`command`] | everything that may enter the shard's log |
//! | [`state`] | what the log leads to: the same on every replica |
//! | [`leader`] | what only the leader knows: who waits, until when, what was read |
//! | [`requests`] | what a request needs: a barrier, a command, or nothing |
//! | [`machine`] | the state in RocksDB |
//! | [`driver`] | performs: proposes, reads, answers, asks the coordinator |
//!
//! `state`, `leader` and `requests` are pure: they never read a clock, a socket or a disk.

pub mod command;
pub mod driver;
pub mod leader;
pub mod machine;
pub mod requests;
pub mod state;

#[cfg(test)]
mod script;

pub use driver::Shard;
