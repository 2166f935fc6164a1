//! Messages over QUIC, with mutual TLS.
//!
//! ```text
//! caller                                             server
//!   │ TLS 1.3, both certificates                        │
//!   ├──── first stream: Hello ─────────────────────────►│
//!   │◄─────────────────────── Hello, agreed version ────┤
//!   │ lane 0  ▐ frame ▐ frame ▐ …    Raft, in order     │
//!   │ lane 1… ▐ frame ▐ frame ▐ …    everything else    │
//!   │ a stream for one large request, its answer on it  │
//!   │◄─ one-way stream for one large answer to a lane ──┤
//! ```
//!
//! A connection has a few long-lived streams, the lanes. A lane's writer takes everything that
//! waits for it in one go, so small messages share packets and system calls when there are many,
//! and wait for nothing when there are few. Large messages have streams of their own, so nobody
//! waits behind them. Calls never wait for one another: answers come in any order and find their
//! caller by number.
//!
//! Everything here is bounded: connections, streams, requests in progress per stream, bytes of large
//! frames in memory, frames waiting for a lane.

mod caller;
mod frames;
mod server;

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::{Mutex, RwLock};
use quinn::Runtime;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls_pki_types::CertificateDer;
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::caller::Link;
use super::tls::{CredentialFiles, Credentials, TlsError};
use super::{BoxFuture, CallError, Identity, Peer, Service, Transport};
use crate::message::{Request, Response};
use crate::wire::{self, Kind};

/// Long-lived streams of a connection. The first carries Raft, so that elections do not wait behind
/// data.
const LANES: usize = 3;

/// Frames that may wait for a lane's writer.
const LANE_FRAMES_MAX: usize = 4096;

/// Requests in progress for one stream; after that it is not read on.
const REQUESTS_MAX: usize = 4096;

/// Connections that a server keeps; after that it refuses new ones.
const CONNECTIONS_MAX: usize = 4096;

/// Bytes that wait to be read on one stream; after that its sender pauses.
const STREAM_WINDOW: u32 = 1 << 20;

/// Streams that the other side may have open at once, in each direction: its lanes, and its large
/// requests or answers. After that it waits for one to end.
const STREAMS_MAX: u32 = 64;

/// Bytes that wait to be read on a connection: all that its streams may hold. Were it less, large
/// frames that wait for their share of the budget could keep everything else from arriving, even
/// those that hold a share.
const CONNECTION_WINDOW: u32 = 2 * STREAMS_MAX * STREAM_WINDOW;

const _: () = assert!(LANES < STREAMS_MAX as usize);

/// Unit of the budget for large frames.
const BUDGET_UNIT: usize = 1024;

/// Bytes of large frames of one kind (answers, requests of servers, requests of others) that a
/// process holds at once; after that it reads no more of that kind.
const LARGE_BYTES_MAX: usize = 256 << 20;

/// Where sockets come from.
pub trait Sockets: fmt::Debug + Send + Sync {
    /// A socket that is bound to an address.
    ///
    /// # Errors
    /// If the address is taken, or not one of this machine.
    fn open(&self, address: SocketAddr) -> io::Result<Arc<dyn quinn::AsyncUdpSocket>>;
}

/// The sockets of the operating system.
#[derive(Debug)]
struct SystemSockets;

impl Sockets for SystemSockets {
    fn open(&self, address: SocketAddr) -> io::Result<Arc<dyn quinn::AsyncUdpSocket>> {
        quinn::TokioRuntime.wrap_udp_socket(socket(address)?)
    }
}

/// How to talk QUIC.
#[derive(Clone, Debug)]
pub struct QuicConfig {
    /// Where sockets come from: the operating system, or a test.
    pub sockets: Arc<dyn Sockets>,
    /// Where to listen; port 0: the system chooses one.
    pub bind: SocketAddr,
    /// Let the kernel cut packets (GSO). Faster on a network, slower on loopback. `None`: off if
    /// `bind` is a loopback address.
    pub segmentation_offload: Option<bool>,
    /// How long to try to make a connection, with its handshake.
    pub connect_timeout: Duration,
    /// A sign of life is sent when this long nothing was.
    pub keep_alive: Duration,
    /// The other side is gone when this long nothing came.
    pub idle_timeout: Duration,
}

impl Default for QuicConfig {
    fn default() -> QuicConfig {
        QuicConfig {
            sockets: Arc::new(SystemSockets),
            bind: SocketAddr::from(([127, 0, 0, 1], 0)),
            segmentation_offload: None,
            connect_timeout: Duration::from_secs(2),
            keep_alive: Duration::from_millis(1000),
            idle_timeout: Duration::from_millis(5000),
        }
    }
}

/// The endpoint cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// The port is taken, or the address is not this machine's.
    #[error("cannot listen on {address}: {source}{}", hint(.source))]
    Bind {
        /// Where.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The credentials are unusable.
    #[error("{0}")]
    Tls(#[from] TlsError),
    /// The credentials are somebody else's.
    #[error("these are the certificates of {told} of cluster {}, and this is {own} of cluster {}", told.cluster, own.cluster)]
    Identity {
        /// Who this is.
        own: Identity,
        /// Whose they are.
        told: Identity,
    },
    /// The library refused the credentials.
    #[error("the certificate cannot be used for QUIC: {0}")]
    Crypto(#[from] quinn::crypto::rustls::NoInitialCipherSuite),
}

fn hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::AddrInUse => "; another process listens there: stop it or choose another port",
        io::ErrorKind::AddrNotAvailable => "; this machine does not have that address",
        io::ErrorKind::PermissionDenied => "; choose a port of 1024 or above",
        _ => "",
    }
}

/// Why a connection was closed, in the terms of QUIC's application close.
#[derive(Clone, Copy, Debug)]
enum Close {
    Bye = 0,
    Version = 1,
    Malformed = 2,
    Identity = 3,
}

impl Close {
    fn code(self) -> quinn::VarInt {
        quinn::VarInt::from_u32(self as u32)
    }
}

/// One UDP socket, over which a process calls others and answers.
pub struct Quic {
    endpoint: quinn::Endpoint,
    identity: Identity,
    config: QuicConfig,
    credentials: RwLock<Current>,
    /// Connections of callers that live, by their ids.
    callers: Mutex<HashMap<usize, quinn::Connection>>,
    links: Mutex<HashMap<Peer, Arc<Link>>>,
    /// What answers may fill.
    large: Arc<Semaphore>,
    closing: CancellationToken,
    tasks: TaskTracker,
}

fn large_budget() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(LARGE_BYTES_MAX / BUDGET_UNIT))
}

impl Quic {
    /// Opens the socket. Nothing is answered before [`Quic::serve`].
    ///
    /// # Errors
    /// If the address cannot be listened on, or the credentials are unusable.
    pub fn bind(config: QuicConfig, credentials: &Credentials) -> Result<Arc<Quic>, EndpointError> {
        let (server_config, client_config) = configs(&config, credentials)?;
        let reset_key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &credentials.reset_secret());
        let mut endpoint_config = quinn::EndpointConfig::new(Arc::new(reset_key));
        endpoint_config.cid_generator(|| Box::new(ConnectionIds));
        let endpoint = config
            .sockets
            .open(config.bind)
            .and_then(|socket| {
                quinn::Endpoint::new_with_abstract_socket(
                    endpoint_config,
                    Some(server_config),
                    socket,
                    Arc::new(quinn::TokioRuntime),
                )
            })
            .map_err(|source| EndpointError::Bind { address: config.bind, source })?;
        Ok(Arc::new(Quic {
            endpoint,
            identity: credentials.identity().clone(),
            config,
            credentials: RwLock::new(Current { client_config, expires_at: credentials.expires_at() }),
            callers: Mutex::default(),
            links: Mutex::default(),
            large: large_budget(),
            closing: CancellationToken::new(),
            tasks: TaskTracker::new(),
        }))
    }

    /// Shows and believes what these credentials say from now on. Connections stay, but for those whose other side is
    /// not believed any more.
    ///
    /// # Errors
    /// If they are unusable, or somebody else's; those from before stay in use then.
    pub fn renew(&self, credentials: &Credentials) -> Result<(), EndpointError> {
        let told = credentials.identity();
        if (told.cluster, told.role) != (self.identity.cluster, self.identity.role) {
            return Err(EndpointError::Identity { own: self.identity.clone(), told: told.clone() });
        }
        let (server_config, client_config) = configs(&self.config, credentials)?;
        self.endpoint.set_server_config(Some(server_config));
        *self.credentials.write() = Current { client_config, expires_at: credentials.expires_at() };
        let called = self.links.lock().values().filter_map(|link| link.living()).collect::<Vec<_>>();
        let callers: Vec<quinn::Connection> = self.callers.lock().values().cloned().collect();
        for connection in callers.into_iter().chain(called) {
            let shown = connection
                .peer_identity()
                .and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok());
            if let Err(reason) = credentials.check(shown.as_deref().map_or(&[], Vec::as_slice)) {
                let from = connection.remote_address();
                tracing::warn!(%from, reason, "a connection is closed: its certificate is not believed any more");
                let reason = format!("your certificate is not believed any more: {reason}");
                connection.close(Close::Identity.code(), reason.as_bytes());
            }
        }
        Ok(())
    }

    /// Renews the credentials whenever one of their files has changed.
    pub fn follow_files(self: &Arc<Quic>, files: CredentialFiles) {
        let (quic, closing) = (Arc::downgrade(self), self.closing.clone());
        self.tasks.spawn(async move {
            let (mut seen, mut times) = (stamp(&files), 0u64);
            while closing.run_until_cancelled(sleep(FILES_INTERVAL)).await.is_some() {
                let now = stamp(&files);
                let Some(quic) = quic.upgrade().filter(|_| now != seen) else { continue };
                let renewed = files.load().map_err(|error| error.to_string());
                match renewed
                    .and_then(|credentials| quic.renew(&credentials).map_err(|error| error.to_string()))
                {
                    Ok(()) => {
                        (seen, times) = (now, times + 1);
                        tracing::info!(cert = %files.cert.display(), times, "the certificates were renewed");
                    }
                    // They may have been written by half; so they are looked at again.
                    Err(error) => tracing::warn!(
                        error,
                        "the certificates cannot be renewed; those from before stay in use"
                    ),
                }
            }
        });
    }

    /// When the certificate that is shown ends: seconds since the Unix epoch.
    pub fn expires_at(&self) -> i64 {
        self.credentials.read().expires_at
    }

    fn client_config(&self) -> quinn::ClientConfig {
        self.credentials.read().client_config.clone()
    }

    /// Where the socket listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.endpoint.local_addr().expect("a bound socket has an address")
    }

    /// Who this process is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Answers from now on, until [`Quic::close`].
    pub fn serve(self: &Arc<Quic>, service: Arc<dyn Service>) {
        let server = server::Server::new(self, service);
        self.tasks.spawn(server.accept());
    }

    /// Says goodbye to everybody, and waits a moment for it to arrive.
    pub async fn close(&self) {
        self.endpoint.close(Close::Bye.code(), b"shutting down");
        self.closing.cancel();
        self.tasks.close();
        // What writes to a connection ends with the last one who could give it something to write.
        self.links.lock().clear();
        // Long enough for the goodbye to leave. Those who do not hear it will notice by their idle
        // timeout.
        let _ = timeout(Duration::from_millis(50), self.endpoint.wait_idle()).await;
        let _ = timeout(Duration::from_millis(450), self.tasks.wait()).await;
    }

    fn link(self: &Arc<Quic>, peer: &Peer) -> Arc<Link> {
        let mut links = self.links.lock();
        match links.get(peer) {
            Some(link) => link.clone(),
            None => links.entry(peer.clone()).or_insert_with(|| Arc::new(Link::new(self, peer))).clone(),
        }
    }
}

/// What is shown and believed now.
struct Current {
    client_config: quinn::ClientConfig,
    expires_at: i64,
}

/// How to accept and to make connections.
fn configs(
    config: &QuicConfig,
    credentials: &Credentials,
) -> Result<(quinn::ServerConfig, quinn::ClientConfig), EndpointError> {
    let transport = Arc::new(transport_config(config));
    let tls = QuicServerConfig::try_from(credentials.server_config()?)?;
    let mut server_config = quinn::ServerConfig::with_crypto(Arc::new(tls));
    server_config.transport_config(transport.clone()).max_incoming(1024);
    let tls = QuicClientConfig::try_from(credentials.client_config()?)?;
    let mut client_config = quinn::ClientConfig::new(Arc::new(tls));
    client_config.transport_config(transport);
    Ok((server_config, client_config))
}

/// What tells one state of files from another.
fn stamp(files: &CredentialFiles) -> Vec<Option<(SystemTime, u64)>> {
    let of = |path: &PathBuf| {
        let metadata = std::fs::metadata(path).ok()?;
        Some((metadata.modified().ok()?, metadata.len()))
    };
    [Some(&files.ca), Some(&files.cert), Some(&files.key), files.crl.as_ref()]
        .into_iter()
        .flatten()
        .map(of)
        .collect()
}

/// How often it is looked whether certificates have changed.
const FILES_INTERVAL: Duration = Duration::from_secs(2);

impl Drop for Quic {
    /// Ends all connections, and with them the tasks that serve them.
    fn drop(&mut self) {
        self.endpoint.close(Close::Bye.code(), b"gone");
    }
}

impl Transport for Arc<Quic> {
    fn call<'a>(
        &'a self,
        peer: &'a Peer,
        request: Request,
        deadline: Instant,
    ) -> BoxFuture<'a, Result<Response, CallError>> {
        Box::pin(async move {
            let link = self.link(peer);
            let connection = link.connection(deadline).await?;
            connection.call(&request, deadline).await
        })
    }
}

/// Random connection ids. Those of the library's own choice are signed with a key that dies with
/// the process, so a restarted server would not even answer "gone" to connections from before.
struct ConnectionIds;

impl quinn::ConnectionIdGenerator for ConnectionIds {
    fn generate_cid(&mut self) -> quinn::ConnectionId {
        quinn::ConnectionId::new(&rand::random::<[u8; CONNECTION_ID_BYTES]>())
    }

    fn cid_len(&self) -> usize {
        CONNECTION_ID_BYTES
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

const CONNECTION_ID_BYTES: usize = 8;

/// A UDP socket with buffers that hold a burst from many peers.
fn socket(address: SocketAddr) -> io::Result<std::net::UdpSocket> {
    let socket = socket2::Socket::new(
        socket2::Domain::for_address(address),
        socket2::Type::DGRAM,
        Some(socket2::Protocol::UDP),
    )?;
    // Best effort: the system's own maximum applies.
    let _ = socket.set_recv_buffer_size(4 << 20);
    let _ = socket.set_send_buffer_size(4 << 20);
    socket.bind(&address.into())?;
    Ok(socket.into())
}

fn transport_config(config: &QuicConfig) -> quinn::TransportConfig {
    let mut transport = quinn::TransportConfig::default();
    let idle =
        quinn::IdleTimeout::try_from(config.idle_timeout).expect("idle timeouts are validated to be short");
    transport
        .max_idle_timeout(Some(idle))
        .keep_alive_interval(Some(config.keep_alive))
        .initial_rtt(Duration::from_millis(50))
        .max_concurrent_bidi_streams(STREAMS_MAX.into())
        .max_concurrent_uni_streams(STREAMS_MAX.into())
        .stream_receive_window(STREAM_WINDOW.into())
        .receive_window(CONNECTION_WINDOW.into())
        .send_window(64 << 20)
        .enable_segmentation_offload(
            config.segmentation_offload.unwrap_or_else(|| !config.bind.ip().is_loopback()),
        );
    transport
}

/// Makes a frame of a response; one that is too large becomes a refusal.
fn seal_response(correlation: u64, response: &Response) -> bytes::Bytes {
    wire::seal(Kind::Response, correlation, 0, response).unwrap_or_else(|error| {
        let refusal = Response::Rejected(crate::Reject::TooLarge {
            reason: format!("the answer does not fit a frame: {error}"),
        });
        wire::seal(Kind::Response, correlation, 0, &refusal).expect("a refusal fits a frame")
    })
}
