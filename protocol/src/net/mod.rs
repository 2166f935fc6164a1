//! Carrying messages between processes.
//!
//! A [`Transport`] calls; a [`Service`] answers. Two transports exist: [`quic`], which everything
//! runs on, and [`memory`], for tests of what lies above. Both hand a service the caller's
//! [`Identity`], and both refuse what [`Request::permits`] does not allow before the service sees
//! it.

pub mod memory;
pub mod quic;
pub mod tls;

use std::fmt;
use std::pin::Pin;
use std::str::FromStr;
use std::sync::Arc;

use tokio::time::Instant;

use crate::id::ClusterId;
use crate::message::{Request, Response};
use crate::reject::Reject;

/// A future on the heap, as object-safe traits need it.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// What a certificate entitles its holder to be.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Role {
    /// A member of the coordinator group.
    Coordinator,
    /// A node that holds shards.
    Participant,
    /// An application.
    Client,
    /// An operator: everything that a client may, and administration.
    Admin,
}

impl Role {
    /// All roles, in the order in which help texts list them.
    pub const ALL: [Role; 4] = [Role::Coordinator, Role::Participant, Role::Client, Role::Admin];

    /// The name in certificates and configuration.
    pub fn name(self) -> &'static str {
        match self {
            Role::Coordinator => "coordinator",
            Role::Participant => "participant",
            Role::Client => "client",
            Role::Admin => "admin",
        }
    }

    /// Whether its holder is a part of Troth, not one of those whom it serves.
    pub fn is_server(self) -> bool {
        match self {
            Role::Coordinator | Role::Participant => true,
            Role::Client | Role::Admin => false,
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The text is not a role.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is not a role; the roles are coordinator, participant, client, admin")]
pub struct RoleError(String);

impl FromStr for Role {
    type Err = RoleError;

    fn from_str(text: &str) -> Result<Role, RoleError> {
        let role = Role::ALL.into_iter().find(|role| role.name() == text);
        role.ok_or_else(|| RoleError(text.to_owned()))
    }
}

/// Who somebody is, as their certificate says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Identity {
    /// The installation that the certificate belongs to.
    pub cluster: ClusterId,
    /// What its holder may be.
    pub role: Role,
    /// The holder's own name, for logs.
    pub name: String,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.role, self.name)
    }
}

/// Whom to call. The certificate at that address must carry the role.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Peer {
    /// [`Role::Coordinator`] or [`Role::Participant`].
    pub role: Role,
    /// `host:port`; a name is resolved when a connection is made.
    pub address: Arc<str>,
}

impl Peer {
    /// A coordinator at an address.
    pub fn coordinator(address: &str) -> Peer {
        Peer { role: Role::Coordinator, address: address.into() }
    }

    /// A participant at an address.
    pub fn participant(address: &str) -> Peer {
        Peer { role: Role::Participant, address: address.into() }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.role, self.address)
    }
}

/// A call that brought no answer.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum CallError {
    /// The request was not sent. It certainly had no effect.
    #[error("{peer} cannot be reached: {reason}")]
    Unreachable {
        /// Who was called.
        peer: Peer,
        /// What is in the way.
        reason: String,
    },
    /// The request was not sent, and never will be: the two are not for each other. It certainly had no effect.
    #[error("{peer} cannot be used: {reason}")]
    Refused {
        /// Who was called.
        peer: Peer,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// The connection broke after the request was sent.
    #[error("the connection to {peer} broke: {reason}")]
    Lost {
        /// Who was called.
        peer: Peer,
        /// What broke it.
        reason: String,
    },
    /// No answer came before the deadline.
    #[error("{peer} did not answer before the deadline")]
    DeadlineExceeded {
        /// Who was called.
        peer: Peer,
    },
    /// The request is larger than any may be. It was not sent.
    #[error("{0}")]
    TooLarge(#[from] crate::wire::WireError),
}

impl CallError {
    /// Whether the request may have taken effect all the same.
    pub fn is_ambiguous(&self) -> bool {
        match self {
            CallError::Lost { .. } | CallError::DeadlineExceeded { .. } => true,
            CallError::Unreachable { .. } | CallError::Refused { .. } | CallError::TooLarge(_) => false,
        }
    }
}

/// A way to call others.
pub trait Transport: Send + Sync + 'static {
    /// Sends a request and waits for the answer, until the deadline at the latest. Connections are
    /// made when they are needed and kept.
    ///
    /// Requests that fit [`SHARED_FRAME_BYTES_MAX`](crate::limits::SHARED_FRAME_BYTES_MAX) and are
    /// of the Raft kind reach the service in the order in which they were sent; others in any order.
    ///
    /// Cancel-safe in that nothing leaks; a request that was sent may still take effect.
    fn call<'a>(
        &'a self,
        peer: &'a Peer,
        request: Request,
        deadline: Instant,
    ) -> BoxFuture<'a, Result<Response, CallError>>;
}

/// Somebody who answers.
pub trait Service: Send + Sync + 'static {
    /// Answers a request. Nobody listens any more after the deadline.
    ///
    /// The future is polled for the first time before the next request of the same stream is
    /// looked at, and dropped when the process stops.
    fn handle(&self, caller: &Identity, request: Request, deadline: Instant) -> BoxFuture<'static, Response>;
}

/// What a service is told to answer to somebody who may not ask.
fn forbidden(caller: &Identity, request: &Request) -> Response {
    Response::Rejected(Reject::Forbidden {
        role: caller.role.to_string(),
        request: request.name().to_owned(),
    })
}
