//! What can go wrong, and what to do about it.

use std::time::Duration;

use troth_protocol::limits::VERSION_RETENTION;
use troth_protocol::message::txn::Cause;
use troth_protocol::net::CallError;
use troth_protocol::routing::RouteError;
use troth_protocol::{Key, Reject, TxnId};

use crate::transaction::Handle;

/// What an error means for the work that met it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Nothing happened; the same work may succeed if it is done again from its beginning.
    /// [`Client::transact`](crate::Client::transact) does so by itself.
    Retriable,
    /// Nobody can say yet whether the transaction was committed: do not simply do it again.
    Ambiguous,
    /// Nothing happened, and doing it again will not help.
    Fatal,
}

/// An operation failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The transaction was aborted: none of it happened.
    #[error("the transaction was aborted: {cause}")]
    Aborted {
        /// Why; names the conflicting key and transaction.
        cause: Cause,
    },
    /// No coordinator could say before the deadline whether the transaction was committed.
    #[error("it is not known whether transaction {} was committed; ask with handle.resolve()", .0.txn())]
    Unknown(Handle),
    /// A read met a transaction that was prepared and not decided before the deadline.
    #[error("key {key} is locked by transaction {by}, which is prepared and not decided")]
    Blocked {
        /// The key.
        key: Key,
        /// The transaction in the way.
        by: TxnId,
    },
    /// The cluster could not be reached, or was not ready, before the deadline. Nothing happened.
    #[error("the cluster is not available: {reason}")]
    Unavailable {
        /// The last thing that failed.
        reason: String,
    },
    /// The cluster has too much to do, and takes nothing more at the moment. Nothing happened.
    #[error("the cluster is overloaded; try again in {} ms", retry_after.as_millis())]
    Overloaded {
        /// When to try again.
        retry_after: Duration,
    },
    /// The transaction or snapshot reads at a moment whose versions are not kept any more. Nothing happened.
    #[error("it reads at a moment of longer ago than versions are kept ({} s by default)", VERSION_RETENTION.as_secs())]
    TooOld,
    /// A limit was exceeded. Nothing happened.
    #[error("{what} has {actual} {unit}; at most {limit} may be")]
    Limit {
        /// What is too large.
        what: &'static str,
        /// How large it is.
        actual: usize,
        /// How large it may be.
        limit: usize,
        /// What is counted.
        unit: &'static str,
    },
    /// The transaction has ended already, by commit or rollback.
    #[error("the transaction has ended already")]
    Ended,
    /// The client was closed, or the runtime that it was made in is gone. Nothing happened.
    #[error("the client is closed")]
    Closed,
    /// The configuration makes no sense, or a certificate cannot be used.
    #[error("{0}")]
    Config(String),
    /// The server refused for a reason that trying again does not mend.
    #[error("{0}")]
    Refused(Reject),
}

impl Error {
    /// What this means for the work that met it.
    pub fn kind(&self) -> Kind {
        match self {
            Error::Aborted { cause } if cause.is_retriable() => Kind::Retriable,
            Error::Blocked { .. } | Error::Unavailable { .. } | Error::Overloaded { .. } | Error::TooOld => {
                Kind::Retriable
            }
            Error::Unknown(_) => Kind::Ambiguous,
            Error::Aborted { .. }
            | Error::Limit { .. }
            | Error::Ended
            | Error::Closed
            | Error::Config(_)
            | Error::Refused(_) => Kind::Fatal,
        }
    }

    /// Whether doing the work again from its beginning may succeed, and is safe.
    pub fn is_retriable(&self) -> bool {
        self.kind() == Kind::Retriable
    }

    /// Whether nobody can say yet if the transaction was committed.
    pub fn is_ambiguous(&self) -> bool {
        self.kind() == Kind::Ambiguous
    }

    /// Whether doing the work again will not help.
    pub fn is_fatal(&self) -> bool {
        self.kind() == Kind::Fatal
    }

    pub(crate) fn unavailable(reason: impl ToString) -> Error {
        Error::Unavailable { reason: reason.to_string() }
    }
}

impl Error {
    /// Of a call without effect, where it does not matter whether that happened.
    pub(crate) fn routed(error: RouteError) -> Error {
        match error {
            RouteError::Closed => Error::Closed,
            RouteError::Call(error @ CallError::Refused { .. }) => Error::Config(error.to_string()),
            RouteError::Rejected(Reject::Blocked { key, by }) => Error::Blocked { key, by },
            RouteError::Rejected(Reject::SnapshotTooOld) => Error::TooOld,
            RouteError::Rejected(Reject::Overloaded { retry_after_millis }) => {
                Error::Overloaded { retry_after: Duration::from_millis(retry_after_millis.into()) }
            }
            RouteError::Rejected(
                reject @ (Reject::Forbidden { .. } | Reject::Malformed { .. } | Reject::TooLarge { .. }),
            ) => Error::Refused(reject),
            other => Error::unavailable(other),
        }
    }
}
