#![doc = include_str!("../../README.md")]
//!
//! # This crate
//!
//! | item | what it is |
//! | --- | --- |
//! | [`Client`] | a connection to a cluster: [`Client::transact`], [`Client::begin`], [`Client::snapshot`], [`Client::outcome`] |
//! | [`Transaction`] | reads at one moment, writes that happen together or not at all |
//! | [`Snapshot`] | reads at one moment, nothing else |
//! | [`Commit`], [`Handle`] | how a commit ended, also when nobody can say yet |
//! | [`Error`] | what went wrong, and whether to try again |
//! | [`operator`] | how the servers are, and what only a human may decide |
//! | [`core`] | what a client decides by itself, apart from any network |
//! | [`layout`] | the files of a cluster: certificates and configurations |
//! | `embedded` | a whole cluster in this process (feature `embedded`) |
//! | `harness` | a cluster of real processes on this machine (feature `harness`) |

mod client;
mod config;
pub mod core;
mod error;
mod reader;
mod scan;
mod snapshot;
mod timestamps;
mod transaction;

#[cfg(feature = "embedded")]
pub mod embedded;
#[cfg(feature = "harness")]
pub mod harness;
pub mod layout;
pub mod operator;

pub use bytes::Bytes;
pub use client::Client;
pub use config::{ClientConfig, credentials_from_pem};
pub use error::{Error, Kind};
pub use snapshot::Snapshot;
pub use transaction::{Commit, Handle, Outcome, Transaction};
pub use troth_protocol::message::txn::Cause;
pub use troth_protocol::net::quic::Sockets;
pub use troth_protocol::net::tls::{CredentialFiles, Credentials, TlsError};
pub use troth_protocol::net::{Role, Transport};
pub use troth_protocol::{
    ClientId, ClusterMap, Key, KeyRange, Node, NodeId, NodeState, Reject, ShardId, Timestamp, TxnId,
    TxnIdError, limits,
};
