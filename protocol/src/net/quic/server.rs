//! The answering side: who may connect, and how requests reach the service.

use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use rustls_pki_types::CertificateDer;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::coop::{consume_budget, unconstrained};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::frames::{Frame, ReadError, Reader, needs_own_stream, write_frames};
use super::{CONNECTIONS_MAX, Close, LANE_FRAMES_MAX, Quic, REQUESTS_MAX, large_budget, seal_response};
use crate::ClusterId;
use crate::message::{Request, Response};
use crate::net::{Identity, Service, forbidden, tls};
use crate::reject::Reject;
use crate::wire::{self, HELLO_BYTES, Hello, Kind};

/// How long a caller may take for its handshake and hello.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

pub(super) struct Server {
    quic: Weak<Quic>,
    endpoint: quinn::Endpoint,
    cluster: ClusterId,
    service: Arc<dyn Service>,
    connections: Arc<Semaphore>,
    /// What requests of applications and operators, and of other servers, may fill.
    large: [Arc<Semaphore>; 2],
    closing: CancellationToken,
    tasks: TaskTracker,
}

impl Server {
    pub(super) fn new(quic: &Arc<Quic>, service: Arc<dyn Service>) -> Arc<Server> {
        Arc::new(Server {
            quic: Arc::downgrade(quic),
            endpoint: quic.endpoint.clone(),
            cluster: quic.identity.cluster,
            service,
            connections: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
            large: [large_budget(), large_budget()],
            closing: quic.closing.clone(),
            tasks: quic.tasks.clone(),
        })
    }

    /// Accepts connections until the endpoint is closed.
    pub(super) async fn accept(self: Arc<Server>) {
        while let Some(incoming) = self.endpoint.accept().await {
            match self.connections.clone().try_acquire_owned() {
                Ok(place) => drop(self.tasks.spawn(self.clone().admit(incoming, place))),
                Err(_) => incoming.refuse(),
            }
        }
    }

    async fn admit(self: Arc<Server>, incoming: quinn::Incoming, _place: OwnedSemaphorePermit) {
        let from = incoming.remote_address();
        let deadline = Instant::now() + HANDSHAKE_TIMEOUT;
        let quinn = match timeout_at(deadline, incoming).await {
            Ok(Ok(quinn)) => quinn,
            Ok(Err(error)) => return tracing::info!(%from, %error, "refused a connection"),
            Err(_) => return tracing::info!(%from, "refused a connection: its handshake took too long"),
        };
        let greeted = timeout_at(deadline, self.greet(&quinn)).await;
        let late = format!("no hello came within {} ms", HANDSHAKE_TIMEOUT.as_millis());
        match greeted.unwrap_or(Err((Close::Malformed, late))) {
            Ok(session) => {
                let (id, quic) = (quinn.stable_id(), self.quic.clone());
                if let Some(quic) = quic.upgrade() {
                    quic.callers.lock().insert(id, quinn.clone());
                }
                drop(quinn);
                session.run().await;
                if let Some(quic) = quic.upgrade() {
                    quic.callers.lock().remove(&id);
                }
            }
            Err((close, reason)) => {
                tracing::info!(%from, reason, "refused a connection");
                quinn.close(close.code(), reason.as_bytes());
            }
        }
    }

    /// Identity and hello, or why not.
    async fn greet(self: &Arc<Server>, quinn: &quinn::Connection) -> Result<Session, (Close, String)> {
        let identity = peer_identity(quinn).ok_or_else(|| {
            let reason = "your certificate carries no Troth identity";
            (Close::Identity, reason.to_owned())
        })?;
        if identity.cluster != self.cluster {
            let reason =
                format!("your certificate is of cluster {}, this is {}", identity.cluster, self.cluster);
            return Err((Close::Identity, reason));
        }
        let broken = |error: &dyn std::error::Error| (Close::Malformed, error.to_string());
        let (mut send, mut receive) = quinn.accept_bi().await.map_err(|error| broken(&error))?;
        let mut hello = [0; HELLO_BYTES];
        receive.read_exact(&mut hello).await.map_err(|error| broken(&error))?;
        let version = Hello::agree(&hello).map_err(|error| match error {
            wire::WireError::Version { .. } => (Close::Version, error.to_string()),
            _ => broken(&error),
        })?;
        let answer = Hello { version_min: version, version_max: version };
        send.write_all(&answer.to_bytes()).await.map_err(|error| broken(&error))?;
        Ok(Session {
            server: self.clone(),
            identity: Arc::new(identity),
            quinn: quinn.clone(),
            first: (send, receive),
        })
    }
}

fn peer_identity(quinn: &quinn::Connection) -> Option<Identity> {
    let certificates = quinn.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    tls::identity_of(certificates.first()?)
}

/// One caller's connection.
struct Session {
    server: Arc<Server>,
    identity: Arc<Identity>,
    quinn: quinn::Connection,
    first: (quinn::SendStream, quinn::RecvStream),
}

impl Session {
    /// Serves all streams of the connection until it ends. The caller's place is kept until then.
    async fn run(self) {
        let Session { server, identity, quinn, first } = self;
        let large = &server.large[usize::from(identity.role.is_server())];
        let serve = |(send, receive): (quinn::SendStream, quinn::RecvStream)| {
            let (answers, frames) = mpsc::channel(LANE_FRAMES_MAX);
            server.tasks.spawn(write_frames(send, frames));
            let stream = Stream {
                server: server.clone(),
                identity: identity.clone(),
                requests: Arc::new(Semaphore::new(REQUESTS_MAX)),
                quinn: quinn.clone(),
                answers,
            };
            server.tasks.spawn(stream.run(Reader::new(receive, large.clone())));
        };
        serve(first);
        // An error means that the connection has ended; its streams see it too.
        while let Ok(streams) = quinn.accept_bi().await {
            serve(streams);
        }
    }
}

/// One stream of requests, and the way back.
struct Stream {
    server: Arc<Server>,
    identity: Arc<Identity>,
    requests: Arc<Semaphore>,
    quinn: quinn::Connection,
    answers: mpsc::Sender<Bytes>,
}

impl Stream {
    async fn run(self, mut reader: Reader) {
        let stream = Arc::new(self);
        loop {
            consume_budget().await;
            match reader.next().await {
                Ok(Some(frame)) => stream.request(frame).await,
                Ok(None) => return,
                // After this the bytes cannot be trusted to be at the beginning of a frame.
                Err(error @ (ReadError::Wire(_) | ReadError::TooSlow)) => {
                    tracing::info!(caller = %stream.identity, %error, "closed a connection");
                    return stream.quinn.close(Close::Malformed.code(), error.to_string().as_bytes());
                }
                Err(ReadError::Io(_) | ReadError::Truncated) => return,
            }
        }
    }

    /// Hands a request to the service. What can be answered at once is answered here, without a
    /// task of its own; and requests of one stream reach the service in order.
    async fn request(self: &Arc<Stream>, frame: Frame) {
        let deadline = Instant::now() + Duration::from_millis(frame.header.timeout_millis.into());
        let place = self.requests.clone().acquire_owned().await.expect("never closed");
        let call = Call {
            correlation: frame.header.correlation,
            deadline,
            own_stream: frame.has_own_stream(),
            _place: place,
            _budget: frame.budget,
        };
        let request = match (frame.header.kind, wire::decode::<Request>(&frame.payload)) {
            (Kind::Request, Ok(request)) => request,
            (Kind::Response, _) => return self.refuse(call, "a server was sent a response").await,
            (Kind::Request, Err(error)) => return self.refuse(call, &error.to_string()).await,
        };
        if !request.permits(self.identity.role) {
            tracing::info!(caller = %self.identity, request = request.name(), "forbidden");
            return self.answer(call, forbidden(&self.identity, &request)).await;
        }
        let mut work = self.server.service.handle(&self.identity, request, deadline);
        // However much this task has done already: a first poll that is put off lets the next request
        // overtake this one.
        match unconstrained(&mut work).now_or_never() {
            Some(response) => self.answer(call, response).await,
            None => {
                let stream = self.clone();
                self.server.tasks.spawn(async move {
                    let closing = &stream.server.closing;
                    // Nobody hears an answer when the process stops.
                    if let Some(done) = closing.run_until_cancelled(timeout_at(deadline, work)).await {
                        let response = done.unwrap_or(Response::Rejected(Reject::DeadlineExceeded));
                        stream.answer(call, response).await;
                    }
                });
            }
        }
    }

    async fn refuse(&self, call: Call, reason: &str) {
        tracing::info!(caller = %self.identity, reason, "malformed request");
        let refusal = Response::Rejected(Reject::malformed(reason));
        self.answer(call, refusal).await;
    }

    /// Sends an answer, or sees to it that it is sent: a large one to a request on a lane has a task
    /// of its own, so that the lane is read on.
    async fn answer(&self, call: Call, response: Response) {
        let frame = seal_response(call.correlation, &response);
        if needs_own_stream(&frame) && !call.own_stream {
            self.server.tasks.spawn(send_on_own_stream(self.quinn.clone(), call, frame));
        } else {
            // An error means that the connection is gone.
            let _ = timeout_at(call.given_up(), self.answers.send(frame)).await;
        }
    }
}

/// A request that is not answered yet, and what it holds until it is.
struct Call {
    correlation: u64,
    deadline: Instant,
    own_stream: bool,
    _place: OwnedSemaphorePermit,
    _budget: Option<OwnedSemaphorePermit>,
}

impl Call {
    /// An answer that cannot be sent by then is dropped: its caller has long given up.
    fn given_up(&self) -> Instant {
        self.deadline + Duration::from_secs(1)
    }
}

async fn send_on_own_stream(quinn: quinn::Connection, call: Call, frame: Bytes) {
    let sending = async {
        let mut stream = quinn.open_uni().await.ok()?;
        stream.write_chunk(frame).await.ok()?;
        stream.finish().ok()
    };
    // Without it the caller waits for its deadline, or has seen the connection break.
    let _ = timeout_at(call.given_up(), sending).await;
}
