//! A cluster of one authority, and a service that does as its requests say.
#![allow(dead_code, reason = "no test file needs all of it")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use troth_protocol::message::{Request, Response, raft, shard};
use troth_protocol::net::quic::{Quic, QuicConfig};
use troth_protocol::net::tls::{Authority, CERTIFICATE_VALIDITY, Credentials};
use troth_protocol::net::{BoxFuture, CallError, Identity, Peer, Role, Service, Transport};
use troth_protocol::{ClusterId, GroupId, Incarnation, Key, KeyRange, NodeId, ShardId, Timestamp};

/// Nothing here takes this long unless it hangs.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// The moment by which something that should not take long must have happened.
pub fn soon() -> Instant {
    Instant::now() + PATIENCE
}

/// Waits for something that must come.
pub async fn expect_soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    let waited = timeout(PATIENCE, future).await;
    waited.unwrap_or_else(|_| panic!("{what}: not within {PATIENCE:?}"))
}

/// Tries until it succeeds, which must be soon.
pub async fn until_ok<T, E: std::fmt::Display>(
    what: &str,
    mut attempt: impl AsyncFnMut() -> Result<T, E>,
) -> T {
    let deadline = soon();
    loop {
        match attempt().await {
            Ok(value) => return value,
            Err(error) => assert!(Instant::now() < deadline, "{what}: still {error}"),
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Those who believe one authority.
pub struct Cluster(pub Authority);

impl Cluster {
    /// One whose id is this number sixteen times.
    pub fn new(number: u8) -> Cluster {
        Cluster(Authority::create(ClusterId([number; 16])).expect("keys can be made"))
    }

    pub fn credentials(&self, role: Role, name: &str) -> Credentials {
        let issued = self.0.issue(role, name, CERTIFICATE_VALIDITY).expect("a proper name");
        Credentials::from_pem(self.0.certificate(), &issued).expect("just issued")
    }

    /// A process of this cluster on a port of the system's choice.
    pub fn open(&self, role: Role, name: &str) -> Arc<Quic> {
        open(&self.credentials(role, name))
    }

    /// A participant that answers.
    pub fn serve(&self, service: &Arc<Script>) -> (Arc<Quic>, Peer) {
        let server = self.open(Role::Participant, "server");
        server.serve(service.clone());
        let peer = at(server.local_addr());
        (server, peer)
    }
}

pub fn open(credentials: &Credentials) -> Arc<Quic> {
    Quic::bind(QuicConfig::default(), credentials).expect("a free port of loopback")
}

pub fn at(address: SocketAddr) -> Peer {
    Peer::participant(&address.to_string())
}

/// Answers what it is asked to, when it is asked to.
pub struct Script {
    gate: watch::Sender<bool>,
    /// The sequence numbers of Raft messages in the order in which they came.
    pub raft: Mutex<Vec<u64>>,
}

impl Script {
    pub fn new() -> Arc<Script> {
        Arc::new(Script { gate: watch::Sender::new(false), raft: Mutex::default() })
    }

    /// Lets all answers go that wait.
    pub fn open_gate(&self) {
        self.gate.send_replace(true);
    }

    /// Returns when that many requests wait at the gate.
    pub async fn waiting_at_gate(&self, count: usize) {
        let there = async || match self.gate.receiver_count() {
            there if there >= count => Ok(()),
            there => Err(format!("{there} of {count} are there")),
        };
        until_ok("requests at the gate", there).await;
    }
}

impl Service for Script {
    fn handle(&self, _: &Identity, request: Request, _: Instant) -> BoxFuture<'static, Response> {
        let mut gate = self.gate.subscribe();
        if let Request::Raft(request) = &request
            && let raft::Body::SnapshotOffer { transfer: number, .. } = request.body
        {
            self.raft.lock().push(number);
        }
        Box::pin(async move {
            match request {
                Request::Shard { request, .. } => answer(request, &mut gate).await,
                Request::Raft(_) => Response::Raft(raft::Response::SnapshotStored),
                other => panic!("nobody asks {} here", other.name()),
            }
        })
    }
}

/// A read is answered with its first key as the value, at the moment that its own timestamp says;
/// a scan with a row of as many bytes as it allows rows.
async fn answer(request: shard::Request, gate: &mut watch::Receiver<bool>) -> Response {
    match request {
        shard::Request::Read { at, mut keys } => {
            match at {
                NEVER => std::future::pending().await,
                GATED => drop(gate.wait_for(|open| *open).await),
                YIELDING => tokio::task::yield_now().await,
                _ => {}
            }
            let value = Some(keys.swap_remove(0).0);
            Response::Shard(shard::Response::Values(vec![shard::Version { version: at, value }]))
        }
        shard::Request::Scan { at, rows_max, .. } => {
            if at == GATED {
                drop(gate.wait_for(|open| *open).await);
            }
            let row =
                shard::Row { key: Key::default(), version: at, value: vec![7; rows_max as usize].into() };
            Response::Shard(shard::Response::Page { rows: vec![row], more: false })
        }
        _ => Response::Shard(shard::Response::Finished),
    }
}

pub const AT_ONCE: Timestamp = Timestamp(0);
pub const YIELDING: Timestamp = Timestamp(1);
pub const GATED: Timestamp = Timestamp(2);
pub const NEVER: Timestamp = Timestamp(3);

pub fn read(at: Timestamp, bytes: impl Into<Bytes>) -> Request {
    of_shard(shard::Request::Read { at, keys: vec![Key(bytes.into())] })
}

/// A read that carries more than it is answered with.
pub fn read_with_ballast(at: Timestamp, text: &'static str, ballast: Bytes) -> Request {
    of_shard(shard::Request::Read { at, keys: vec![text.into(), Key(ballast)] })
}

pub fn scan(at: Timestamp, bytes: u32) -> Request {
    of_shard(shard::Request::Scan { at, range: KeyRange::default(), rows_max: bytes })
}

pub fn of_shard(request: shard::Request) -> Request {
    Request::Shard { shard: ShardId(0), request }
}

/// A Raft message with a number.
pub fn numbered(number: u64) -> Request {
    let vote = raft::Vote { term: 1, node: NodeId(1), committed: true };
    Request::Raft(raft::Request {
        group: GroupId::Shard(ShardId(0)),
        from: NodeId(1),
        incarnation: Incarnation(1),
        to: NodeId(2),
        body: raft::Body::SnapshotOffer { vote, transfer: number, begin: false, offers: Vec::new() },
    })
}

/// The bytes in the answer to [`read`] or [`scan`].
pub fn bytes_of(response: Response) -> Bytes {
    let value = match response {
        Response::Shard(shard::Response::Values(mut values)) => {
            values.pop().and_then(|version| version.value)
        }
        Response::Shard(shard::Response::Page { mut rows, .. }) => rows.pop().map(|row| row.value),
        _ => None,
    };
    value.expect("an answer with a value")
}

/// Asks for an echo, which must come.
pub async fn check_echo(caller: &Arc<Quic>, peer: &Peer, text: &str) {
    let answer = echo(caller, peer, text).await;
    assert_eq!(answer.expect("an answer"), text.as_bytes());
}

pub async fn echo(caller: &Arc<Quic>, peer: &Peer, text: &str) -> Result<Bytes, CallError> {
    let request = read(AT_ONCE, text.as_bytes().to_vec());
    caller.call(peer, request, soon()).await.map(bytes_of)
}
