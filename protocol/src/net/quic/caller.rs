//! The calling side: connections made when needed, and calls matched with their answers.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::task::TaskTracker;

use super::frames::{Frame, ReadError, Reader, needs_own_stream, write_frames};
use super::{Close, LANE_FRAMES_MAX, LANES, Quic};
use crate::message::{Request, Response};
use crate::net::tls::server_name;
use crate::net::{CallError, Peer};
use crate::wire::{self, HELLO_BYTES, Hello, Kind};

/// The shortest and longest pause after a connection could not be made.
const REDIAL_MIN: Duration = Duration::from_millis(20);
const REDIAL_MAX: Duration = Duration::from_millis(500);

/// The way to one peer, with a connection or without. It is a circuit breaker: a peer that cannot be
/// reached costs a call nothing until the pause is over, and then one attempt for all.
pub(super) struct Link {
    quic: Weak<Quic>,
    peer: Peer,
    state: Mutex<State>,
    /// Whoever waits for a connection waits here, and gets it in the order in which they came: calls on
    /// one lane must not overtake each other.
    turn: tokio::sync::Mutex<()>,
    /// Which of the addresses of a name is tried: the next one after each failure. Not all begin with
    /// the same one.
    address_turn: AtomicUsize,
}

enum State {
    /// No connection. After a failure none is tried before `retry_at`.
    Down { retry_at: Instant, failures: u32, trouble: Trouble },
    /// One is being made; the receiver's channel closes when that is over.
    Dialing { failures: u32, over: watch::Receiver<()> },
    /// There is one.
    Up(Arc<Connection>),
}

impl Link {
    pub(super) fn new(quic: &Arc<Quic>, peer: &Peer) -> Link {
        let state = State::Down { retry_at: Instant::now(), failures: 0, trouble: Trouble::default() };
        Link {
            quic: Arc::downgrade(quic),
            peer: peer.clone(),
            state: Mutex::new(state),
            turn: Default::default(),
            address_turn: AtomicUsize::new(rand::random::<u16>().into()),
        }
    }

    /// A living connection, made now if there is none.
    pub(super) async fn connection(
        self: &Arc<Link>,
        deadline: Instant,
    ) -> Result<Arc<Connection>, CallError> {
        let unreachable = |reason: String| CallError::Unreachable { peer: self.peer.clone(), reason };
        let _turn = match self.turn.try_lock() {
            Ok(turn) => turn,
            Err(_) => timeout_at(deadline, self.turn.lock())
                .await
                .map_err(|_| unreachable("no answer before the deadline".into()))?,
        };
        let mut waited = false;
        loop {
            let mut over = {
                let mut state = self.state.lock();
                if let State::Up(connection) = &*state {
                    match connection.quinn.close_reason() {
                        None => return Ok(connection.clone()),
                        Some(_) => {
                            *state = State::Down {
                                retry_at: Instant::now(),
                                failures: 0,
                                trouble: connection.why_closed().into(),
                            };
                        }
                    }
                }
                match &*state {
                    State::Up(_) => unreachable!("a living connection was returned, a dead one replaced"),
                    State::Dialing { over, .. } if over.has_changed().is_ok() => over.clone(),
                    // Whoever was to make it is gone without a word.
                    State::Dialing { .. } if waited => return Err(unreachable("connecting failed".into())),
                    // Whoever waited for an attempt learns how it ended, and does not start another.
                    State::Down { retry_at, trouble, .. } if waited || *retry_at > Instant::now() => {
                        return Err(trouble.error(&self.peer));
                    }
                    State::Down { failures, .. } | State::Dialing { failures, .. } => {
                        let quic = self.quic.upgrade().ok_or_else(|| unreachable("shutting down".into()))?;
                        let (alive, over) = watch::channel(());
                        let failures = *failures;
                        *state = State::Dialing { failures, over: over.clone() };
                        let link = self.clone();
                        quic.clone().tasks.spawn(async move {
                            link.dial(quic).await;
                            drop(alive);
                        });
                        over
                    }
                }
            };
            // An error means that the channel was closed: the attempt is over.
            let over = timeout_at(deadline, over.changed()).await;
            over.map_err(|_| unreachable("no answer before the deadline".into())).map(drop)?;
            waited = true;
        }
    }

    /// The connection, if there is one.
    pub(super) fn living(&self) -> Option<quinn::Connection> {
        match &*self.state.lock() {
            State::Up(connection) => Some(connection.quinn.clone()),
            State::Down { .. } | State::Dialing { .. } => None,
        }
    }

    async fn dial(&self, quic: Arc<Quic>) {
        let limit = quic.config.connect_timeout;
        let turn = self.address_turn.load(Ordering::Relaxed);
        let result = match timeout(limit, Connection::make(&quic, &self.peer, turn)).await {
            Ok(result) => result,
            Err(_) => Err(format!("no answer within {} ms", limit.as_millis()).into()),
        };
        let mut state = self.state.lock();
        let failures = match &*state {
            State::Dialing { failures, .. } => *failures,
            State::Down { .. } | State::Up(_) => 0,
        };
        *state = match result {
            Ok(connection) => State::Up(connection),
            Err(trouble) => {
                tracing::debug!(peer = %self.peer, reason = trouble.reason, "cannot connect");
                self.address_turn.store(turn.wrapping_add(1), Ordering::Relaxed);
                let pause = REDIAL_MIN.saturating_mul(1 << failures.min(10)).min(REDIAL_MAX);
                State::Down {
                    retry_at: Instant::now() + pause.mul_f64(0.5 + 0.5 * rand::random::<f64>()),
                    failures: failures + 1,
                    trouble,
                }
            }
        };
    }
}

/// A connection on which calls can be made.
pub(super) struct Connection {
    quinn: quinn::Connection,
    peer: Peer,
    lanes: Vec<mpsc::Sender<Bytes>>,
    pending: Arc<Pending>,
    next_call: AtomicU64,
    large: Arc<Semaphore>,
    tasks: TaskTracker,
}

impl Connection {
    async fn make(quic: &Arc<Quic>, peer: &Peer, turn: usize) -> Result<Arc<Connection>, Trouble> {
        let address = resolve(&peer.address, quic.local_addr(), turn).await?;
        let connecting = quic
            .endpoint
            .connect_with(quic.client_config(), address, &server_name(peer.role))
            .map_err(|error| error.to_string())?;
        let quinn = connecting.await.map_err(|error| explain(&error))?;

        let (mut send, mut receive) = quinn.open_bi().await.map_err(|error| explain(&error))?;
        let mut answer = [0; HELLO_BYTES];
        let greeting = async {
            send.write_all(&Hello::OURS.to_bytes()).await.map_err(|error| error.to_string())?;
            receive.read_exact(&mut answer).await.map_err(|error| error.to_string())
        };
        if let Err(error) = greeting.await {
            return Err(quinn.close_reason().map_or(error.into(), |reason| explain(&reason)));
        }
        if let Err(error) = Hello::agree(&answer) {
            quinn.close(Close::Version.code(), error.to_string().as_bytes());
            let lasting = matches!(error, wire::WireError::Version { .. });
            return Err(Trouble { reason: error.to_string(), lasting });
        }

        let pending = Arc::new(Pending::default());
        let mut lanes = Vec::with_capacity(LANES);
        let mut streams = Some((send, receive));
        for _ in 0..LANES {
            let (send, receive) = match streams.take() {
                Some(first) => first,
                None => quinn.open_bi().await.map_err(|error| explain(&error))?,
            };
            let (sender, frames) = mpsc::channel(LANE_FRAMES_MAX);
            quic.tasks.spawn(write_frames(send, frames));
            quic.tasks.spawn(read_answers(
                Reader::new(receive, quic.large.clone()),
                pending.clone(),
                quinn.clone(),
            ));
            lanes.push(sender);
        }
        quic.tasks.spawn(accept_large_answers(
            quinn.clone(),
            pending.clone(),
            quic.large.clone(),
            quic.tasks.clone(),
        ));
        Ok(Arc::new(Connection {
            quinn,
            peer: peer.clone(),
            lanes,
            pending,
            next_call: AtomicU64::new(1),
            large: quic.large.clone(),
            tasks: quic.tasks.clone(),
        }))
    }

    pub(super) async fn call(&self, request: &Request, deadline: Instant) -> Result<Response, CallError> {
        let correlation = self.next_call.fetch_add(1, Ordering::Relaxed);
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout_millis = left.as_millis().clamp(1, u128::from(u32::MAX)) as u32;
        let frame = wire::seal(Kind::Request, correlation, timeout_millis, request)?;
        let Some(answer) = self.pending.register(correlation) else {
            return Err(CallError::Unreachable { peer: self.peer.clone(), reason: self.why_closed() });
        };

        if !needs_own_stream(&frame) {
            let lane = match request {
                Request::Raft(_) => 0,
                Request::Coordinator(_) | Request::Shard { .. } | Request::Admin(_) => {
                    1 + correlation as usize % (LANES - 1)
                }
            };
            let unsent = |reason: String| CallError::Unreachable { peer: self.peer.clone(), reason };
            timeout_at(deadline, self.lanes[lane].send(frame))
                .await
                .map_err(|_| unsent("too many requests wait to be sent".into()))?
                .map_err(|_| unsent(self.why_closed()))?;
        } else {
            self.tasks.spawn(call_on_own_stream(
                self.quinn.clone(),
                frame,
                self.pending.clone(),
                self.large.clone(),
                deadline,
            ));
        }

        match timeout_at(deadline, answer.receiver).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(_)) => Err(CallError::Lost { peer: self.peer.clone(), reason: self.why_closed() }),
            Err(_) => Err(CallError::DeadlineExceeded { peer: self.peer.clone() }),
        }
    }

    /// In the words of whoever noticed first.
    fn why_closed(&self) -> String {
        let noticed = self.pending.calls.lock().closed.clone();
        noticed
            .or_else(|| self.quinn.close_reason().map(|reason| explain(&reason).reason))
            .unwrap_or_else(|| "a stream was closed".into())
    }
}

/// Calls that wait for their answer.
#[derive(Default)]
struct Pending {
    calls: Mutex<Calls>,
}

#[derive(Default)]
struct Calls {
    waiting: HashMap<u64, oneshot::Sender<Response>>,
    /// Why there will be no more answers.
    closed: Option<String>,
}

/// A call's place among those that wait; given up when dropped.
struct Answer<'a> {
    receiver: oneshot::Receiver<Response>,
    _place: Place<'a>,
}

struct Place<'a> {
    pending: &'a Pending,
    correlation: u64,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.pending.calls.lock().waiting.remove(&self.correlation);
    }
}

impl Pending {
    /// `None` if the connection is gone.
    fn register(&self, correlation: u64) -> Option<Answer<'_>> {
        let (sender, receiver) = oneshot::channel();
        let mut calls = self.calls.lock();
        if calls.closed.is_some() {
            return None;
        }
        calls.waiting.insert(correlation, sender);
        Some(Answer { receiver, _place: Place { pending: self, correlation } })
    }

    /// Hands an answer to its caller. A malformed one condemns the stream.
    fn complete(&self, frame: &Frame) -> Result<(), wire::WireError> {
        let response = wire::decode::<Response>(&frame.payload)?;
        let waiting = self.calls.lock().waiting.remove(&frame.header.correlation);
        if let Some(caller) = waiting {
            // The caller may have given up just now.
            let _ = caller.send(response);
        }
        Ok(())
    }

    /// Nobody will be answered any more.
    fn close(&self, reason: String) {
        let mut calls = self.calls.lock();
        calls.closed.get_or_insert(reason);
        calls.waiting.clear();
    }

    fn fail(&self, correlation: u64) {
        self.calls.lock().waiting.remove(&correlation);
    }
}

async fn read_answers(mut reader: Reader, pending: Arc<Pending>, quinn: quinn::Connection) {
    let error = loop {
        match reader.next().await {
            Ok(Some(frame)) => {
                if let Err(error) = pending.complete(&frame) {
                    break error.to_string();
                }
            }
            Ok(None) => break "the server ended a stream".to_owned(),
            Err(error) => break error.to_string(),
        }
    };
    // Without one of its lanes a connection is of no use.
    pending.close(quinn.close_reason().map_or(error.clone(), |reason| explain(&reason).reason));
    quinn.close(Close::Malformed.code(), error.as_bytes());
}

async fn accept_large_answers(
    quinn: quinn::Connection,
    pending: Arc<Pending>,
    large: Arc<Semaphore>,
    tasks: TaskTracker,
) {
    // An error means that the connection is gone, which the lanes notice too.
    while let Ok(stream) = quinn.accept_uni().await {
        let (pending, large, quinn) = (pending.clone(), large.clone(), quinn.clone());
        tasks.spawn(async move {
            let completed = match Reader::new(stream, large).next().await {
                Ok(Some(frame)) => pending.complete(&frame),
                Err(ReadError::Wire(error)) => Err(error),
                // The server has given up on this answer, or the connection is gone.
                Ok(None) | Err(ReadError::Io(_) | ReadError::Truncated | ReadError::TooSlow) => Ok(()),
            };
            if let Err(error) = completed {
                pending.close(error.to_string());
                quinn.close(Close::Malformed.code(), error.to_string().as_bytes());
            }
        });
    }
}

async fn call_on_own_stream(
    quinn: quinn::Connection,
    frame: Bytes,
    pending: Arc<Pending>,
    large: Arc<Semaphore>,
    deadline: Instant,
) {
    let correlation = u64::from_be_bytes(frame[16..24].try_into().expect("a frame has a header"));
    let exchange = async {
        let (mut send, receive) = quinn.open_bi().await.ok()?;
        send.write_chunk(frame).await.ok()?;
        send.finish().ok()?;
        let answer = Reader::new(receive, large).next().await.ok()??;
        pending.complete(&answer).ok()
    };
    // By its deadline the call ends by itself.
    if timeout_at(deadline, exchange).await == Ok(None) {
        pending.fail(correlation);
    }
}

/// Where to connect to. A name is looked up every time; one with several addresses stands for whoever
/// answers at any of them, so after a failure it is the next one's turn.
async fn resolve(address: &str, local: SocketAddr, turn: usize) -> Result<SocketAddr, Trouble> {
    if let Ok(address) = address.parse() {
        return Ok(address);
    }
    let has_port =
        address.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
    if !has_port {
        return Err(Trouble::lasting(format!("{address:?} is no address; write host:port")));
    }
    let found = tokio::net::lookup_host(address).await.map_err(|error| format!("{address}: {error}"))?;
    let mut candidates: Vec<_> = found.filter(|candidate| candidate.is_ipv4() == local.is_ipv4()).collect();
    // The order of the answers changes from one to the next.
    candidates.sort();
    let turn = turn % candidates.len().max(1);
    let none = || format!("{address} has no address of this machine's family").into();
    candidates.get(turn).copied().ok_or_else(none)
}

/// What is in the way of a connection.
#[derive(Clone, Debug, Default)]
struct Trouble {
    reason: String,
    /// Waiting does not mend it.
    lasting: bool,
}

impl From<String> for Trouble {
    fn from(reason: String) -> Trouble {
        Trouble { reason, lasting: false }
    }
}

impl Trouble {
    fn lasting(reason: impl Into<String>) -> Trouble {
        Trouble { reason: reason.into(), lasting: true }
    }

    fn error(&self, peer: &Peer) -> CallError {
        let (peer, reason) = (peer.clone(), self.reason.clone());
        if self.lasting {
            CallError::Refused { peer, reason }
        } else {
            CallError::Unreachable { peer, reason }
        }
    }
}

/// The reason of a close in the other side's own words, where it gave any; and the commonest mistake
/// of operators in words that say what to look at.
fn explain(error: &quinn::ConnectionError) -> Trouble {
    match error {
        quinn::ConnectionError::ApplicationClosed(close) if !close.reason.is_empty() => {
            let reason = String::from_utf8_lossy(&close.reason).into_owned();
            Trouble { reason, lasting: close.error_code == Close::Identity.code() }
        }
        quinn::ConnectionError::TransportError(error) => match alert(error.code) {
            Some(UNKNOWN_CA | DECRYPT_ERROR) => {
                Trouble::lasting("its certificate is of another cluster: our authority did not sign it")
            }
            Some(CERTIFICATE_EXPIRED) => {
                Trouble::lasting("its certificate has expired: renew that with `troth cert`")
            }
            Some(_) if error.reason.contains("not valid for name") => Trouble::lasting(
                "its certificate is of another role: this is the address of another kind of server",
            ),
            _ => error.to_string().into(),
        },
        quinn::ConnectionError::ConnectionClosed(close) => match alert(close.error_code) {
            Some(UNKNOWN_CA | DECRYPT_ERROR) => {
                Trouble::lasting("our certificate is of another cluster: its authority did not sign it")
            }
            Some(CERTIFICATE_EXPIRED) => {
                Trouble::lasting("our certificate has expired: renew it with `troth cert`")
            }
            Some(CERTIFICATE_REVOKED) => Trouble::lasting("our certificate was revoked: get another one"),
            _ => close.to_string().into(),
        },
        other => other.to_string().into(),
    }
}

/// TLS alerts (RFC 8446, section 6.2).
const CERTIFICATE_REVOKED: u8 = 44;
const CERTIFICATE_EXPIRED: u8 = 45;
const UNKNOWN_CA: u8 = 48;
/// What an authority with our authority's name and another key makes of it.
const DECRYPT_ERROR: u8 = 51;

/// The TLS alert that a code of QUIC carries, if it carries one (RFC 9001, section 4.8).
fn alert(code: quinn::TransportErrorCode) -> Option<u8> {
    let code = u64::from(code);
    (0x100..0x200).contains(&code).then_some((code & 0xff) as u8)
}
