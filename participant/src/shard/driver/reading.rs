//! Reading: at a moment, from the leader, past those who are about to commit.

use std::io;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::task::spawn_blocking;
use tokio::time::timeout_at;
use troth_protocol::limits::{READ_AHEAD_MAX, READ_BYTES_MAX, SCAN_BYTES_MAX, SCAN_ROWS_MAX};
use troth_protocol::message::admin::FaultPoint;
use troth_protocol::message::coordinator;
use troth_protocol::message::shard::Version;
use troth_protocol::routing::{Resend, RouteError};
use troth_protocol::{Key, KeyRange, Reject, Timestamp, fault};
use troth_replication::Reach;

use super::{ASK_TIMEOUT, Inner};
use crate::mvcc::{Mvcc, Page};
use crate::shard::leader::{Event, Leader, Target};
use crate::shard::machine::{Core, Wake};
use crate::shard::requests::{check_readable, reads_need_barrier};

/// Reads of at most this many keys may be answered without leaving the task.
const KEYS_INLINE_MAX: usize = 64;

/// Reads of one node that may wait for the disk at once: half of the threads that may block.
pub const DISK_READS_MAX: usize = 256;

/// When a read is told to come back that finds no place among them.
const DISK_READ_AGAIN: Duration = Duration::from_millis(50);

/// A read that waits is told who blocks it this long before its caller gives up.
const ANSWER_MARGIN: Duration = Duration::from_millis(10);

impl Inner {
    pub(super) async fn read(
        &self,
        at: Timestamp,
        keys: Vec<Key>,
        deadline: tokio::time::Instant,
    ) -> Result<Vec<Version>, Reject> {
        let shards = self.router.map().shards;
        for key in &keys {
            key.check(self.shard, shards).map_err(Reject::malformed)?;
        }
        let lead = self.admit(at, Target::Keys(keys.clone()), deadline).await?;
        // An answer ends like a page of a scan: the caller asks again for the rest.
        let read = move |mvcc: &Mvcc, keys: &[Key], reach: Reach| -> io::Result<Vec<Version>> {
            let mut versions = Vec::with_capacity(keys.len());
            let mut bytes = 0;
            for key in keys {
                let version = mvcc.read(key, at, reach)?;
                bytes += version.value.as_ref().map_or(0, |value| value.len());
                versions.push(version);
                if bytes >= READ_BYTES_MAX {
                    break;
                }
            }
            Ok(versions)
        };
        let inline =
            if keys.len() <= KEYS_INLINE_MAX { read(&self.mvcc, &keys, Reach::Memory).ok() } else { None };
        let versions = match inline {
            Some(versions) => versions,
            None => {
                let mvcc = self.mvcc.clone();
                self.blocking(move || read(&mvcc, &keys, Reach::Disk)).await?
            }
        };
        self.still_readable(lead, at)?;
        Ok(versions)
    }

    pub(super) async fn scan(
        &self,
        at: Timestamp,
        range: KeyRange,
        rows_max: usize,
        deadline: tokio::time::Instant,
    ) -> Result<Page, Reject> {
        let lead = self.admit(at, Target::Range(range.clone()), deadline).await?;
        let mvcc = self.mvcc.clone();
        let rows_max = rows_max.clamp(1, SCAN_ROWS_MAX);
        let page = self.blocking(move || mvcc.scan(&range, at, rows_max, SCAN_BYTES_MAX)).await?;
        self.still_readable(lead, at)?;
        Ok(page)
    }

    pub(super) async fn blocking<T: Send + 'static>(
        &self,
        read: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> Result<T, Reject> {
        // The place is kept until the read is done, also if nobody waits for it any more.
        let place = self.disk_reads.clone().try_acquire_owned();
        let place = place.map_err(|_| Reject::overloaded(DISK_READ_AGAIN))?;
        let read = move || {
            let _place = place;
            Handle::current().block_on(fault::pass(FaultPoint::DiskRead));
            read()
        };
        let result = spawn_blocking(read).await.map_err(io::Error::other).flatten();
        result.map_err(|error| {
            tracing::error!(shard = %self.shard, %error, "cannot read");
            Reject::Internal { reason: format!("shard {} cannot be read", self.shard) }
        })
    }

    /// Waits until a read may look: this replica leads, and nothing that may have been written
    /// before the moment is still undecided. Returns which leadership this is.
    pub(super) async fn admit(
        &self,
        at: Timestamp,
        target: Target,
        deadline: tokio::time::Instant,
    ) -> Result<u64, Reject> {
        if !self.is_credible(at) {
            // The oracle may be ahead of this machine's clock: ask it before calling anybody a liar.
            self.ask_the_time().await.map_err(|error| {
                tracing::debug!(shard = %self.shard, %error, "cannot ask the time");
                Reject::DeadlineExceeded
            })?;
            if at.0 > self.newest_known.load(Ordering::Relaxed) {
                return Err(Reject::malformed(format!("read timestamp {at} lies in the future")));
            }
        }
        if reads_need_barrier() {
            self.group.read_barrier().await?;
        }
        let id = self.next_read.fetch_add(1, Ordering::Relaxed);
        let (sender, wake) = oneshot::channel();
        let (lead, mut wait) = {
            let mut core = self.core.lock();
            let Some(lead) = core.leader.as_ref().map(Leader::lead) else {
                return Err(self.not_leader());
            };
            check_readable(&core.state, at)?;
            core.readers.insert(id, sender);
            self.core.handle(&mut core, Event::Read { id, at, target });
            (lead, Wait { core: &self.core, id, wake })
        };
        match wait.wake.try_recv() {
            Ok(Wake::Serve) => return Ok(lead),
            Ok(Wake::Refuse) => return Err(Reject::overloaded(Duration::from_millis(50))),
            Err(oneshot::error::TryRecvError::Closed) => return Err(self.not_leader()),
            Err(oneshot::error::TryRecvError::Empty) => {}
        }
        match timeout_at(deadline - ANSWER_MARGIN, &mut wait.wake).await {
            Ok(Ok(Wake::Serve)) => Ok(lead),
            Ok(Ok(Wake::Refuse)) => Err(Reject::overloaded(Duration::from_millis(50))),
            Ok(Err(_)) => Err(self.not_leader()),
            Err(_) => {
                let core = self.core.lock();
                let blocker = core.leader.as_ref().and_then(|leader| leader.blocker(id)).cloned();
                Err(blocker.map_or(Reject::DeadlineExceeded, |conflict| Reject::Blocked {
                    key: conflict.key,
                    by: conflict.by,
                }))
            }
        }
    }

    /// Whether the oracle can have given out a timestamp, as far as this replica can tell. One from
    /// a client is not trusted further, so that nobody can push time to its end.
    pub(super) fn is_credible(&self, at: Timestamp) -> bool {
        at.0 <= self.newest_known.load(Ordering::Relaxed)
            || at <= Timestamp::from_millis(self.clock.millis()).plus(READ_AHEAD_MAX)
    }

    /// A coordinator has shown that time has come this far.
    pub(super) fn learn_the_time(&self, seen: Timestamp) {
        self.newest_known.fetch_max(seen.0, Ordering::Relaxed);
    }

    pub(super) async fn ask_the_time(&self) -> Result<Timestamp, RouteError> {
        let request = coordinator::Request::Timestamps { count: 1, begins: None };
        let deadline = tokio::time::Instant::now() + ASK_TIMEOUT;
        match self.router.coordinator(request, Resend::Idempotent, deadline).await? {
            coordinator::Response::Timestamps { first, .. } => {
                self.learn_the_time(first);
                Ok(first)
            }
            _ => Err(RouteError::WrongAnswer),
        }
    }

    /// What was read is what it should be only if it was not given up meanwhile, and if the replica is still
    /// the same leader: one that has left the node was erased, and the state of one that follows may have been
    /// replaced.
    pub(super) fn still_readable(&self, lead: u64, at: Timestamp) -> Result<(), Reject> {
        let core = self.core.lock();
        if core.leader.as_ref().map(Leader::lead) != Some(lead) {
            return Err(self.not_leader());
        }
        check_readable(&core.state, at)
    }
}

/// A read's place among those that wait; given up when dropped.
struct Wait<'a> {
    core: &'a Core,
    id: u64,
    wake: oneshot::Receiver<Wake>,
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        let mut core = self.core.lock();
        if core.readers.remove(&self.id).is_some() {
            self.core.handle(&mut core, Event::GaveUp { id: self.id });
        }
    }
}
