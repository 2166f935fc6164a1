//! The answering side: who may connect, and how requests reach the service.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use rustls_pki_types::CertificateDer;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::task::TaskTracker;

use super::frames::{Frame, ReadError, Reader, write_frames};
use super::{CONNECTIONS_MAX, Close, LANE_FRAMES_MAX, Quic, REQUESTS_MAX, seal_response};
use crate::ClusterId;
use crate::limits::SHARED_FRAME_BYTES_MAX;
use crate::message::{Request, Response};
use crate::net::{Identity, Service, forbidden, tls};
use crate::reject::Reject;
use crate::wire::{self, HELLO_BYTES, Hello, Kind};

/// How long a caller may take for its handshake and hello.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

pub(super) struct Server {
    endpoint: quinn::Endpoint,
    cluster: ClusterId,
    service: Arc<dyn Service>,
    connections: Arc<Semaphore>,
    large: Arc<Semaphore>,
    tasks: TaskTracker,
}

impl Server {
    pub(super) fn new(quic: &Quic, service: Arc<dyn Service>) -> Arc<Server> {
        Arc::new(Server {
            endpoint: quic.endpoint.clone(),
            cluster: quic.identity.cluster,
            service,
            connections: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
            large: quic.large.clone(),
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
        match timeout(HANDSHAKE_TIMEOUT, self.greet(incoming)).await {
            Ok(Ok(session)) => session.run().await,
            Ok(Err(reason)) => tracing::info!(%from, reason, "refused a connection"),
            Err(_) => tracing::info!(%from, "refused a connection: its handshake took too long"),
        }
    }

    /// Handshake, identity and hello.
    async fn greet(self: &Arc<Server>, incoming: quinn::Incoming) -> Result<Session, String> {
        let quinn = incoming.await.map_err(|error| error.to_string())?;
        let refuse = |close: Close, reason: String| {
            quinn.close(close.code(), reason.as_bytes());
            reason
        };
        let identity = peer_identity(&quinn).ok_or_else(|| {
            refuse(
                Close::Identity,
                "your certificate carries no Troth identity".to_owned(),
            )
        })?;
        if identity.cluster != self.cluster {
            let reason = format!(
                "your certificate is of cluster {}, this is {}",
                identity.cluster, self.cluster
            );
            return Err(refuse(Close::Identity, reason));
        }
        let (mut send, mut receive) = quinn.accept_bi().await.map_err(|error| error.to_string())?;
        let mut hello = [0; HELLO_BYTES];
        receive
            .read_exact(&mut hello)
            .await
            .map_err(|error| error.to_string())?;
        let version = Hello::agree(&hello).map_err(|error| {
            let close = match error {
                wire::WireError::Version { .. } => Close::Version,
                _ => Close::Malformed,
            };
            refuse(close, error.to_string())
        })?;
        let answer = Hello {
            version_min: version,
            version_max: version,
        };
        send.write_all(&answer.to_bytes())
            .await
            .map_err(|error| error.to_string())?;
        Ok(Session {
            server: self.clone(),
            identity: Arc::new(identity),
            requests: Arc::new(Semaphore::new(REQUESTS_MAX)),
            quinn: quinn.clone(),
            first: (send, receive),
        })
    }
}

fn peer_identity(quinn: &quinn::Connection) -> Option<Identity> {
    let certificates = quinn
        .peer_identity()?
        .downcast::<Vec<CertificateDer<'static>>>()
        .ok()?;
    tls::identity_of(certificates.first()?)
}

/// One caller's connection.
struct Session {
    server: Arc<Server>,
    identity: Arc<Identity>,
    requests: Arc<Semaphore>,
    quinn: quinn::Connection,
    first: (quinn::SendStream, quinn::RecvStream),
}

impl Session {
    /// Serves all streams of the connection until it ends. The caller's place is kept until then.
    async fn run(self) {
        let Session {
            server,
            identity,
            requests,
            quinn,
            first,
        } = self;
        let serve = |(send, receive): (quinn::SendStream, quinn::RecvStream)| {
            let (answers, frames) = mpsc::channel(LANE_FRAMES_MAX);
            server.tasks.spawn(write_frames(send, frames));
            let stream = Stream {
                server: server.clone(),
                identity: identity.clone(),
                requests: requests.clone(),
                quinn: quinn.clone(),
                answers,
            };
            server
                .tasks
                .spawn(stream.run(Reader::new(receive, server.large.clone())));
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
            match reader.next().await {
                Ok(Some(frame)) => stream.request(frame).await,
                Ok(None) => return,
                Err(ReadError::Wire(error)) => {
                    // After this the bytes cannot be trusted to be at the beginning of a frame.
                    tracing::info!(caller = %stream.identity, %error, "closed a connection");
                    return stream
                        .quinn
                        .close(Close::Malformed.code(), error.to_string().as_bytes());
                }
                Err(ReadError::Io(_) | ReadError::Truncated) => return,
            }
        }
    }

    /// Hands a request to the service. What can be answered at once is answered here, without a
    /// task of its own; and requests of one stream reach the service in order.
    async fn request(self: &Arc<Stream>, frame: Frame) {
        let correlation = frame.header.correlation;
        let deadline = Instant::now() + Duration::from_millis(frame.header.timeout_millis.into());
        let request = match (frame.header.kind, wire::decode::<Request>(&frame.payload)) {
            (Kind::Request, Ok(request)) => request,
            (Kind::Response, _) => {
                return self
                    .refuse(correlation, "a server was sent a response", deadline)
                    .await;
            }
            (Kind::Request, Err(error)) => {
                return self.refuse(correlation, &error.to_string(), deadline).await;
            }
        };
        if !request.permits(self.identity.role) {
            tracing::info!(caller = %self.identity, request = request.name(), "forbidden");
            return self
                .answer(correlation, forbidden(&self.identity, &request), deadline)
                .await;
        }
        let place = self.requests.clone().acquire_owned().await.expect("never closed");
        let mut work = self.server.service.handle(&self.identity, request, deadline);
        match (&mut work).now_or_never() {
            Some(response) => self.answer(correlation, response, deadline).await,
            None => {
                let stream = self.clone();
                self.server.tasks.spawn(async move {
                    let response = timeout_at(deadline, work)
                        .await
                        .unwrap_or(Response::Rejected(Reject::DeadlineExceeded));
                    stream.answer(correlation, response, deadline).await;
                    drop((place, frame.budget));
                });
            }
        }
    }

    async fn refuse(&self, correlation: u64, reason: &str, deadline: Instant) {
        tracing::info!(caller = %self.identity, reason, "malformed request");
        self.answer(
            correlation,
            Response::Rejected(Reject::malformed(reason)),
            deadline,
        )
        .await;
    }

    /// Sends an answer. One that cannot be sent by a second after the deadline is dropped: its
    /// caller has long given up.
    async fn answer(&self, correlation: u64, response: Response, deadline: Instant) {
        let frame = seal_response(correlation, &response);
        let sending = async {
            if frame.len() <= SHARED_FRAME_BYTES_MAX {
                // An error means that the connection is gone.
                let _ = self.answers.send(frame).await;
            } else if let Ok(mut stream) = self.quinn.open_uni().await
                && stream.write_chunk(frame).await.is_ok()
            {
                let _ = stream.finish();
            }
        };
        let _ = timeout_at(deadline + Duration::from_secs(1), sending).await;
    }
}
