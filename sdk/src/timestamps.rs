//! Timestamps for many `begin`s with few requests.
//!
//! Whoever waits when a request goes out shares it; whoever comes later waits for the next one: a
//! timestamp is never older than the call that gets it.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::{Instant, sleep, timeout_at};
use troth_protocol::message::coordinator::{Request, Response};
use troth_protocol::routing::{Resend, Router};
use troth_protocol::{ClientId, Epoch, MapEpoch, Timestamp};

use crate::error::Error;

/// Requests that may be under way at once.
const REQUESTS_MAX: usize = 4;

/// `begin`s that one request serves.
const SHARED_MAX: usize = 1024;

/// `begin`s that may wait.
const WAITING_MAX: usize = 64 << 10;

/// How long one request may take.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a client waits before it fetches the next map.
const FETCH_PAUSE: Duration = Duration::from_millis(100);

type Waiter = oneshot::Sender<Result<(Timestamp, Epoch), Error>>;

/// Hands out timestamps of the cluster's oracle.
pub(crate) struct Timestamps {
    /// For transactions that may write: of these the coordinators take only so many.
    begins: mpsc::Sender<Waiter>,
    /// For reading only.
    looks: mpsc::Sender<Waiter>,
}

impl Timestamps {
    pub(crate) fn start(router: &Arc<Router>, client: ClientId) -> Timestamps {
        let fetching = Arc::new(Semaphore::new(1));
        let queue = |begins| {
            let (waiters, receiver) = mpsc::channel(WAITING_MAX);
            tokio::spawn(run(router.clone(), fetching.clone(), begins, receiver));
            waiters
        };
        Timestamps { begins: queue(Some(client)), looks: queue(None) }
    }

    /// A timestamp for a transaction to begin with, larger than all that were handed out before this
    /// call, and the epoch of the leader that gave it.
    pub(crate) async fn begin(&self, deadline: Instant) -> Result<(Timestamp, Epoch), Error> {
        next(&self.begins, deadline).await
    }

    /// The same for reading only.
    pub(crate) async fn look(&self, deadline: Instant) -> Result<(Timestamp, Epoch), Error> {
        next(&self.looks, deadline).await
    }
}

async fn next(waiters: &mpsc::Sender<Waiter>, deadline: Instant) -> Result<(Timestamp, Epoch), Error> {
    let (sender, receiver) = oneshot::channel();
    let late = |_| Error::unavailable("no timestamp before the deadline");
    let gone = || Error::Closed;
    timeout_at(deadline, waiters.send(sender)).await.map_err(late)?.map_err(|_| gone())?;
    timeout_at(deadline, receiver).await.map_err(late)?.map_err(|_| gone())?
}

async fn run(
    router: Arc<Router>,
    fetching: Arc<Semaphore>,
    begins: Option<ClientId>,
    mut receiver: mpsc::Receiver<Waiter>,
) {
    let requests = Arc::new(Semaphore::new(REQUESTS_MAX));
    loop {
        let permit = requests.clone().acquire_owned().await.expect("never closed");
        let mut waiters = Vec::new();
        if receiver.recv_many(&mut waiters, SHARED_MAX).await == 0 {
            return;
        }
        let (router, fetching) = (router.clone(), fetching.clone());
        tokio::spawn(async move {
            waiters.retain(|waiter| !waiter.is_closed());
            serve(&router, &fetching, begins, waiters).await;
            drop(permit);
        });
    }
}

/// Fetches the map if there is a newer one: coordinators come and go, and a client that notices only when the last one
/// that it knows is gone finds nobody. One fetches it for all, and not too often: whoever is asked may be behind.
fn follow_map(router: &Arc<Router>, fetching: &Arc<Semaphore>, newest: MapEpoch) {
    if router.map().epoch >= newest {
        return;
    }
    let Ok(place) = fetching.clone().try_acquire_owned() else { return };
    let router = router.clone();
    tokio::spawn(async move {
        router.refresh_map(Instant::now() + REQUEST_TIMEOUT).await;
        sleep(FETCH_PAUSE).await;
        drop(place);
    });
}

async fn serve(
    router: &Arc<Router>,
    fetching: &Arc<Semaphore>,
    begins: Option<ClientId>,
    waiters: Vec<Waiter>,
) {
    if waiters.is_empty() {
        return;
    }
    let request = Request::Timestamps { count: waiters.len() as u32, begins };
    let deadline = Instant::now() + REQUEST_TIMEOUT;
    let answer = match router.coordinator(request, Resend::Idempotent, deadline).await {
        Ok(Response::Timestamps { first, count, retry_after_millis, epoch, map }) => {
            follow_map(router, fetching, map);
            Ok((first, count, Duration::from_millis(retry_after_millis.into()), epoch))
        }
        Ok(_) => Err(Error::unavailable("the coordinator answered something else")),
        Err(error) => Err(Error::routed(error)),
    };
    for (number, waiter) in waiters.into_iter().enumerate() {
        let answer = answer.clone().and_then(|(first, count, retry_after, epoch)| {
            if number < count as usize {
                Ok((first.advance(number as u64), epoch))
            } else {
                Err(Error::Overloaded { retry_after })
            }
        });
        // Whoever waited may have given up just now.
        let _ = waiter.send(answer);
    }
}
