//! The HTTP port of a server: metrics, health, and whatever else it shows.
//!
//! | path | answer |
//! | --- | --- |
//! | `/metrics` | everything that is counted and measured, in the text format of Prometheus |
//! | `/healthz` | 200 while the process can go on, else 503; the reason as text |
//! | `/readyz` | 200 while it does what it is there for, else 503; its role and what is missing as JSON |
//!
//! HTTP without TLS, for the machine itself or a network that is trusted: nothing can be changed here. Whoever can
//! reach the port needs no certificate, so there is a bound for connections, and for how long one may take to ask: a
//! new connection takes the place of the oldest one that has asked nothing yet.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use parking_lot::Mutex;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::metrics::Shown;

/// How long connections may take to end when the server stops.
const FAREWELL: Duration = Duration::from_millis(200);

/// Connections that are open at the same time.
pub const CONNECTIONS_MAX: usize = 64;

/// How long one may take to ask, the first time and each time after that.
const ASK_PATIENCE: Duration = Duration::from_secs(5);

/// The most bytes of a request's head.
const HEAD_BYTES_MAX: usize = 16 << 10;

/// The pause after a connection could not be accepted, as when the process has no descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What a server says of itself.
pub trait Vitals: Send + Sync + 'static {
    /// Whether the process can go on.
    ///
    /// # Errors
    /// Why it cannot.
    fn health(&self) -> Result<(), String>;

    /// Whether it does what it is there for, and the details for people and programs.
    fn readiness(&self) -> (bool, serde_json::Value);
}

/// The port cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[error("http.listen: cannot listen on {address}: {source}; stop who listens there, or choose another port")]
pub struct HttpError {
    address: SocketAddr,
    source: io::Error,
}

/// An HTTP server that runs.
pub struct Http {
    address: SocketAddr,
    stop: CancellationToken,
    tasks: TaskTracker,
}

#[derive(Clone)]
struct Shared {
    shown: Shown,
    vitals: Arc<dyn Vitals>,
}

impl Http {
    /// Listens, and answers from now on. `more`: other pages; an answer that goes on for ever must end when
    /// the token that they are given is cancelled.
    ///
    /// # Errors
    /// If the address cannot be listened on.
    pub async fn serve(
        address: SocketAddr,
        shown: Shown,
        vitals: Arc<dyn Vitals>,
        more: impl FnOnce(&CancellationToken) -> axum::Router,
    ) -> Result<Http, HttpError> {
        let failed = |source| HttpError { address, source };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
        let router = axum::Router::new()
            .route("/metrics", get(metrics))
            .route("/healthz", get(health))
            .route("/readyz", get(readiness))
            .with_state(Shared { shown, vitals })
            .merge(more(&stop));
        let front = Front { router, stop: stop.clone(), tasks: tasks.clone(), open: Arc::default() };
        tasks.spawn(front.accept(listener));
        tracing::info!(%address, "http");
        Ok(Http { address, stop, tasks })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Stops.
    pub async fn close(self) {
        self.stop.cancel();
        self.tasks.close();
        // Whoever is slow to fetch an answer is not waited for.
        let _ = tokio::time::timeout(FAREWELL, self.tasks.wait()).await;
    }
}

/// Accepts connections.
struct Front {
    router: axum::Router,
    stop: CancellationToken,
    tasks: TaskTracker,
    open: Arc<Mutex<BTreeMap<u64, Open>>>,
}

/// A connection.
struct Open {
    /// It has asked something.
    asked: Arc<AtomicBool>,
    close: CancellationToken,
}

impl Front {
    async fn accept(self, listener: TcpListener) {
        for id in 0.. {
            let accepted = tokio::select! {
                () = self.stop.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, _)) => self.take(id, stream),
                Err(error) => {
                    tracing::warn!(%error, "a connection to the HTTP port is not accepted");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// Serves a connection, if there is a place, or one that has asked nothing to take the place of.
    fn take(&self, id: u64, stream: TcpStream) {
        let mut open = self.open.lock();
        if open.len() >= CONNECTIONS_MAX {
            let idle = open.iter().find(|(_, open)| !open.asked.load(Ordering::Relaxed)).map(|(id, _)| *id);
            match idle.and_then(|id| open.remove(&id)) {
                Some(oldest) => oldest.close.cancel(),
                None => {
                    return tracing::warn!("too many connections to the HTTP port: another one is closed");
                }
            }
        }
        let (asked, close) = (Arc::<AtomicBool>::default(), self.stop.child_token());
        open.insert(id, Open { asked: asked.clone(), close: close.clone() });
        drop(open);
        let (router, connections) = (self.router.clone(), self.open.clone());
        self.tasks.spawn(async move {
            serve(stream, router, asked, close).await;
            connections.lock().remove(&id);
        });
    }
}

async fn serve(stream: TcpStream, router: axum::Router, asked: Arc<AtomicBool>, close: CancellationToken) {
    let noted =
        axum::middleware::from_fn(move |request: axum::extract::Request, next: axum::middleware::Next| {
            asked.store(true, Ordering::Relaxed);
            next.run(request)
        });
    let mut server = http1::Builder::new();
    server.timer(TokioTimer::new()).header_read_timeout(ASK_PATIENCE).max_buf_size(HEAD_BYTES_MAX);
    let service = TowerToHyperService::new(router.layer(noted));
    let connection = server.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = &mut connection => ended,
        () = close.cancelled() => {
            connection.as_mut().graceful_shutdown();
            // What is being answered may end.
            timeout(FAREWELL, connection).await.unwrap_or(Ok(()))
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection to the HTTP port has ended");
    }
}

async fn metrics(State(shared): State<Shared>) -> Response {
    let kind = [(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")];
    (kind, shared.shown.render()).into_response()
}

async fn health(State(shared): State<Shared>) -> Response {
    match shared.vitals.health() {
        Ok(()) => "ok\n".into_response(),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, reason + "\n").into_response(),
    }
}

async fn readiness(State(shared): State<Shared>) -> Response {
    let (ready, details) = shared.vitals.readiness();
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(details)).into_response()
}
