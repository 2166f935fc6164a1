//! The HTTP port of a server: metrics, health, and whatever else it shows.
//!
//! | path | answer |
//! | --- | --- |
//! | `/metrics` | everything that is counted and measured, in the text format of Prometheus |
//! | `/healthz` | 200 while the process can go on, else 503; the reason as text |
//! | `/readyz` | 200 while it does what it is there for, else 503; its role and what is missing as JSON |
//!
//! HTTP without TLS, for the machine itself or a network that is trusted: nothing can be changed here.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::metrics::Shown;

/// How long connections may take to end when the server stops.
const FAREWELL: Duration = Duration::from_millis(200);

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
        let stopped = stop.clone().cancelled_owned();
        tasks.spawn(async move {
            if let Err(error) = axum::serve(listener, router).with_graceful_shutdown(stopped).await {
                tracing::error!(%error, "nothing is shown over HTTP any more");
            }
        });
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
