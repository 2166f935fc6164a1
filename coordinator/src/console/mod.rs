//! The console: one page that shows the cluster as it is, live.
//!
//! | path | answer |
//! | --- | --- |
//! | `/console` | the page; it says nothing of the cluster, so everybody may have it |
//! | `/console/page.css`, `/console/page.js` | what it needs |
//! | `/console/overview` | the cluster as one JSON object, made in `view.rs` |
//! | `/console/events` | the same each second, as server-sent events |
//!
//! The last two want the token: `Authorization: Bearer <token>`. The page takes it from the fragment of its
//! address (`/console#token=…`), which browsers do not send, or asks for it.
//!
//! Every coordinator has it: one that does not lead asks the one that does.

mod view;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures_util::{StreamExt, stream};
use tokio::sync::{Mutex, Semaphore};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use troth_protocol::message::overview::Overview;
use troth_protocol::message::{Request as Call, Response as Answer, admin};
use troth_protocol::net::Transport;
use troth_protocol::process::Token;
use troth_protocol::{GroupId, NodeId, Reject};
use troth_replication::Directory;

use crate::door::peers::Peers;
use crate::driver::WeakCoordinator;

/// How often the cluster is looked at, for all who follow it together.
const INTERVAL: Duration = Duration::from_secs(1);

/// How long looking at it may take.
const PATIENCE: Duration = Duration::from_secs(3);

/// Pages that follow the cluster at once.
const FOLLOWERS_MAX: usize = 32;

/// What the page may do: load its own script and style, and ask this server.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
                      img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// What the console needs.
pub struct Console {
    /// The coordinator that it belongs to. Not held: a page that is slow to fetch what it asked for must not
    /// keep a server from ending.
    pub coordinator: WeakCoordinator,
    /// Its number.
    pub id: NodeId,
    /// Where the coordinators are.
    pub peers: Arc<Peers>,
    /// How to ask them.
    pub transport: Arc<dyn Transport>,
}

/// Why the cluster cannot be shown.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error("this coordinator is shutting down")]
    ShuttingDown,
    #[error("no coordinator leads")]
    NoLeader,
    #[error("{0}")]
    Rejected(Reject),
    #[error("coordinator {0} leads, and does not answer: {1}")]
    Silent(NodeId, String),
}

/// The cluster as JSON, or why it cannot be shown.
type Look = Result<Arc<str>, Arc<str>>;

struct Shared {
    console: Console,
    token: Token,
    followers: Arc<Semaphore>,
    /// What was seen last, or why nothing was, and when.
    seen: Mutex<Option<(Instant, Look)>>,
    stop: CancellationToken,
}

/// The pages, for whoever knows the token; none is followed any more after `stop`.
pub fn router(console: Console, token: Token, stop: CancellationToken) -> Router {
    let shared = Arc::new(Shared {
        console,
        token,
        followers: Arc::new(Semaphore::new(FOLLOWERS_MAX)),
        seen: Mutex::new(None),
        stop,
    });
    let secret = Router::new()
        .route("/console/overview", get(overview))
        .route("/console/events", get(events))
        .route_layer(middleware::from_fn_with_state(shared.clone(), who_knows_the_token))
        .with_state(shared);
    let page = |kind: &'static str, text: &'static str| {
        get(move || async move { ([(header::CONTENT_TYPE, kind)], text) })
    };
    Router::new()
        .route("/console", page("text/html; charset=utf-8", include_str!("page.html")))
        .route("/console/page.css", page("text/css; charset=utf-8", include_str!("page.css")))
        .route("/console/page.js", page("text/javascript; charset=utf-8", include_str!("page.js")))
        .merge(secret)
        .route_layer(middleware::map_response(async |mut response: Response| {
            let all: [(HeaderName, &'static str); 4] = [
                (header::CONTENT_SECURITY_POLICY, POLICY),
                (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
                (header::REFERRER_POLICY, "no-referrer"),
                (header::CACHE_CONTROL, "no-store"),
            ];
            for (name, value) in all {
                response.headers_mut().insert(name, value.parse().expect("plain text"));
            }
            response
        }))
}

async fn who_knows_the_token(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    if knows(request.headers(), &shared.token) {
        return next.run(request).await;
    }
    let how = [(header::WWW_AUTHENTICATE, "Bearer")];
    let text = "say Authorization: Bearer and the token that http.console_token names\n";
    (StatusCode::UNAUTHORIZED, how, text).into_response()
}

fn knows(headers: &HeaderMap, token: &Token) -> bool {
    let told = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    told.and_then(|told| told.strip_prefix("Bearer ")).is_some_and(|told| token.is(told))
}

async fn overview(State(shared): State<Arc<Shared>>) -> Response {
    match shared.look().await {
        Ok(json) => ([(header::CONTENT_TYPE, "application/json")], json.to_string()).into_response(),
        Err(trouble) => (StatusCode::SERVICE_UNAVAILABLE, format!("{trouble}\n")).into_response(),
    }
}

async fn events(State(shared): State<Arc<Shared>>) -> Response {
    let Ok(place) = shared.followers.clone().try_acquire_owned() else {
        let text = format!("{FOLLOWERS_MAX} pages follow the cluster already; close one\n");
        return (StatusCode::SERVICE_UNAVAILABLE, text).into_response();
    };
    let stop = shared.stop.clone().cancelled_owned();
    let mut ticks = interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let looks = stream::unfold((shared, ticks), |(shared, mut ticks)| async move {
        ticks.tick().await;
        let event = match shared.look().await {
            Ok(json) => Event::default().data(json),
            Err(trouble) => Event::default().event("trouble").data(trouble),
        };
        Some((event, (shared, ticks)))
    });
    let events = looks.take_until(stop).map(move |event| {
        // Given back when the page is gone.
        let _place = &place;
        Ok::<_, Infallible>(event)
    });
    Sse::new(events).keep_alive(KeepAlive::default()).into_response()
}

impl Shared {
    /// What was seen a moment ago is good enough, also if it was nothing.
    async fn look(&self) -> Look {
        let mut seen = self.seen.lock().await;
        if let Some((at, look)) = &*seen
            && at.elapsed() < INTERVAL.mul_f64(0.9)
        {
            return look.clone();
        }
        let look = match timeout(PATIENCE, self.console.look()).await {
            Ok(Ok(overview)) => Ok(view::view(&overview, self.console.id).to_string().into()),
            Ok(Err(trouble)) => Err(trouble.to_string().into()),
            Err(_) => Err("the cluster does not say in time how it is".into()),
        };
        *seen = Some((Instant::now(), look.clone()));
        look
    }
}

impl Console {
    async fn look(&self) -> Result<Overview, Trouble> {
        let coordinator = self.coordinator.upgrade().ok_or(Trouble::ShuttingDown)?;
        let own = coordinator.overview().await;
        drop(coordinator);
        let leader = match own {
            Ok(overview) => return Ok(overview),
            Err(Reject::NotLeader { leader }) => leader.ok_or(Trouble::NoLeader)?,
            Err(reject) => return Err(Trouble::Rejected(reject)),
        };
        let peer = self.peers.peer(GroupId::Coordinator, leader).ok_or(Trouble::NoLeader)?;
        let call = Call::Admin(admin::Request::Overview);
        match self.transport.call(&peer, call, Instant::now() + PATIENCE).await {
            Ok(Answer::Admin(admin::Response::Overview(overview))) => Ok(overview),
            Ok(Answer::Rejected(reject)) => Err(Trouble::Rejected(reject)),
            Ok(_) => Err(Trouble::Silent(leader, "an answer of the wrong kind".into())),
            Err(error) => Err(Trouble::Silent(leader, error.to_string())),
        }
    }
}
