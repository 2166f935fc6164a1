//! Timestamps for many `begin`s with few requests.
//!
//! Whoever waits when a request goes out shares it; whoever comes later waits for the next one: a
//! timestamp is never older than the call that gets it.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::{Instant, timeout_at};
use troth_protocol::message::coordinator::{Request, Response};
use troth_protocol::routing::{Resend, Router};
use troth_protocol::{Epoch, Timestamp};

use crate::error::Error;

/// Requests that may be under way at once.
const REQUESTS_MAX: usize = 4;

/// `begin`s that one request serves.
const SHARED_MAX: usize = 1024;

/// `begin`s that may wait.
const WAITING_MAX: usize = 64 << 10;

/// How long one request may take.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

type Waiter = oneshot::Sender<Result<(Timestamp, Epoch), Error>>;

/// Hands out timestamps of the cluster's oracle.
pub(crate) struct Timestamps {
    waiters: mpsc::Sender<Waiter>,
}

impl Timestamps {
    pub(crate) fn start(router: &Arc<Router>) -> Timestamps {
        let (waiters, receiver) = mpsc::channel(WAITING_MAX);
        tokio::spawn(run(router.clone(), receiver));
        Timestamps { waiters }
    }

    /// A timestamp that is larger than all that were handed out before this call, and the epoch of
    /// the leader that gave it.
    pub(crate) async fn next(&self, deadline: Instant) -> Result<(Timestamp, Epoch), Error> {
        let (sender, receiver) = oneshot::channel();
        let late = |_| Error::unavailable("no timestamp before the deadline");
        let gone = || Error::unavailable("the client is shutting down");
        timeout_at(deadline, self.waiters.send(sender)).await.map_err(late)?.map_err(|_| gone())?;
        timeout_at(deadline, receiver).await.map_err(late)?.map_err(|_| gone())?
    }
}

async fn run(router: Arc<Router>, mut receiver: mpsc::Receiver<Waiter>) {
    let requests = Arc::new(Semaphore::new(REQUESTS_MAX));
    loop {
        let permit = requests.clone().acquire_owned().await.expect("never closed");
        let mut waiters = Vec::new();
        if receiver.recv_many(&mut waiters, SHARED_MAX).await == 0 {
            return;
        }
        let router = router.clone();
        tokio::spawn(async move {
            waiters.retain(|waiter| !waiter.is_closed());
            serve(&router, waiters).await;
            drop(permit);
        });
    }
}

async fn serve(router: &Router, waiters: Vec<Waiter>) {
    if waiters.is_empty() {
        return;
    }
    let request = Request::Timestamps { count: waiters.len() as u32 };
    let deadline = Instant::now() + REQUEST_TIMEOUT;
    let answer = match router.coordinator(request, Resend::Idempotent, deadline).await {
        Ok(Response::Timestamps { first, epoch }) => Ok((first, epoch)),
        Ok(_) => Err(Error::unavailable("the coordinator answered something else")),
        Err(error) => Err(error.into()),
    };
    for (number, waiter) in waiters.into_iter().enumerate() {
        let answer = answer.clone().map(|(first, epoch)| (first.advance(number as u64), epoch));
        // Whoever waited may have given up just now.
        let _ = waiter.send(answer);
    }
}
