//! The sender's side: reading a frozen state out in parts, and how far that has come.

use std::collections::BTreeMap;
use std::io;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use governor::{DefaultDirectRateLimiter, Quota};
use parking_lot::Mutex;
use rocksdb::{Range, ReadOptions, SnapshotWithThreadMode};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::spawn_blocking;
use troth_protocol::NodeId;
use troth_protocol::message::raft::{Bounds, Pair, Part};
use troth_protocol::wire::decode;

use super::{Mark, PartHash, Transfer, malformed, owned};
use crate::log::{meta_key, tag};
use crate::machine::Span;
use crate::rocks::{Family, Store, families};

/// A part ends with the pair that brings it to this many bytes: so much travels again if a byte of it
/// has changed.
const PART_BYTES: usize = 16 << 10;

/// Parts that travel together end with the one that brings them to this many bytes.
const PIECE_BYTES: usize = 512 << 10;

/// Pieces that are read ahead.
const PIECES_AHEAD: usize = 2;

/// Snapshots that leave a process at the same time. Each has a thread that may block, and that waits most of the
/// time: for the receiver, and for what bounds all of them.
const READERS_MAX: usize = 32;

static READERS: Semaphore = Semaphore::const_new(READERS_MAX);

/// Parts that travel together.
pub(crate) struct Piece {
    pub parts: Vec<(Part, [u8; 16])>,
    pub bytes: usize,
    /// About how much of all data lies before its end, from 0 to 1; `None`: nobody can say.
    pub share: Option<f64>,
}

/// A frozen state, piece by piece.
pub(crate) struct Pieces {
    begin: Option<oneshot::Sender<()>>,
    pieces: mpsc::Receiver<io::Result<Piece>>,
}

impl Pieces {
    /// The next piece; `None` after the last. Nothing is read before this is called.
    pub(crate) async fn next(&mut self) -> Option<io::Result<Piece>> {
        if let Some(begin) = self.begin.take() {
            // The reader waits for that, or has ended, which shows right away.
            let _ = begin.send(());
        }
        self.pieces.recv().await
    }
}

/// Freezes the state of a group, and begins to read it out. `None`: too many are being read out already.
pub(crate) async fn open(
    store: &Store,
    group: u32,
    spans: Vec<Span>,
) -> io::Result<Option<(Mark, Transfer)>> {
    let Ok(place) = READERS.try_acquire() else { return Ok(None) };
    let (mark_sender, mark) = oneshot::channel();
    let (begin, begins) = oneshot::channel();
    let (pieces, receiver) = mpsc::channel(PIECES_AHEAD);
    let store = store.clone();
    // Ends when all is read, or when the receiver is dropped.
    spawn_blocking(move || {
        let _place = place;
        let database = store.database();
        let frozen = database.snapshot();
        let family = |family: Family| database.cf_handle(family.0).expect("opened with all families");
        let read_mark = || match frozen.get_cf(family(families::META), meta_key(group, tag::APPLIED)) {
            Ok(Some(record)) => decode(&record).map_err(|error| malformed(group, error)),
            Ok(None) => Ok(Mark::default()),
            Err(error) => Err(io::Error::other(error)),
        };
        if mark_sender.send(read_mark()).is_err() {
            return;
        }
        // Nobody may want more than the mark.
        if begins.blocking_recv().is_err() {
            return;
        }
        let mut reading = Reading { store: &store, spans: &spans, total: 0, before: 0, pieces: &pieces };
        reading.total = spans.iter().map(|span| reading.size(span, &span.end)).sum();
        if let Err(Some(error)) = reading.run(&frozen) {
            let _ = pieces.blocking_send(Err(error));
        }
    });
    let mark = mark.await.map_err(|_| io::Error::other("the snapshot reader has ended"))??;
    Ok(Some((mark, Transfer::Outgoing(Pieces { begin: Some(begin), pieces: receiver }))))
}

struct Reading<'a> {
    store: &'a Store,
    spans: &'a [Span],
    /// About how many bytes there are on disk, and how many of them lie in spans that are done.
    total: u64,
    before: u64,
    pieces: &'a mpsc::Sender<io::Result<Piece>>,
}

impl Reading<'_> {
    /// About how many bytes on disk a span has before a key.
    fn size(&self, span: &Span, end: &[u8]) -> u64 {
        let database = self.store.database();
        let family = database.cf_handle(span.family.0).expect("opened with all families");
        let range = Range::new(&span.start, end);
        database.get_approximate_sizes_cf(family, &[range]).first().copied().unwrap_or(0)
    }

    /// Reads everything. An error of `None` means that nobody listens any more.
    fn run(&mut self, frozen: &SnapshotWithThreadMode<'_, rocksdb::DB>) -> Result<(), Option<io::Error>> {
        let mut piece = Piece { parts: Vec::new(), bytes: 0, share: None };
        for (number, span) in self.spans.iter().enumerate() {
            let family = self.store.database().cf_handle(span.family.0).expect("opened with all families");
            let mut options = ReadOptions::default();
            options.set_iterate_lower_bound(&span.start[..]);
            options.set_iterate_upper_bound(&span.end[..]);
            options.fill_cache(false);
            options.set_readahead_size(1 << 20);
            let mut rows = frozen.raw_iterator_cf_opt(family, options);
            rows.seek(&span.start);
            let (mut from, mut bytes) = (owned(&span.start), 0);
            let (mut pairs, mut hash) = (Vec::new(), PartHash::default());
            while let Some((key, value)) = rows.item() {
                if bytes >= PART_BYTES {
                    let bounds = Bounds { span: number as u16, from, to: owned(key) };
                    from = bounds.to.clone();
                    piece.parts.push((Part { bounds, pairs: std::mem::take(&mut pairs) }, hash.finish()));
                    piece.bytes += std::mem::take(&mut bytes);
                    hash = PartHash::default();
                    if piece.bytes >= PIECE_BYTES {
                        let done = self.before + self.size(span, key);
                        piece = self.send(piece, done)?;
                    }
                }
                bytes += key.len() + value.len();
                hash.add(key, value);
                pairs.push(Pair { key: owned(key), value: owned(value) });
                rows.next();
            }
            rows.status().map_err(|error| Some(io::Error::other(error)))?;
            // Also where there is nothing: what the receiver has there must go.
            let bounds = Bounds { span: number as u16, from, to: owned(&span.end) };
            piece.parts.push((Part { bounds, pairs }, hash.finish()));
            piece.bytes += bytes;
            self.before += self.size(span, &span.end);
        }
        self.send(piece, self.total).map(drop)
    }

    fn send(&self, mut piece: Piece, done: u64) -> Result<Piece, Option<io::Error>> {
        piece.share = (self.total > 0).then(|| (done as f64 / self.total as f64).clamp(0.0, 1.0));
        self.pieces.blocking_send(Ok(piece)).map_err(|_| None)?;
        Ok(Piece { parts: Vec::new(), bytes: 0, share: None })
    }
}

/// Bounds how fast the snapshots of all groups of a process leave it together. Cheap to clone.
#[derive(Clone)]
pub struct Throttle(Arc<DefaultDirectRateLimiter>);

/// The unit of the throttle, in bytes.
const THROTTLE_UNIT: usize = 1024;

/// More than one piece, with the largest value at its end, must pass at once.
const THROTTLE_BURST: u32 = 2048;

impl Throttle {
    /// At most this many bytes a second.
    pub fn new(bytes_per_second: u64) -> Throttle {
        let units = (bytes_per_second / THROTTLE_UNIT as u64).clamp(1, u32::MAX.into()) as u32;
        let nonzero = |number: u32| NonZeroU32::new(number).expect("it is at least one");
        let quota = Quota::per_second(nonzero(units)).allow_burst(nonzero(units.max(THROTTLE_BURST)));
        Throttle(Arc::new(DefaultDirectRateLimiter::direct(quota)))
    }

    /// Waits until so many bytes may leave.
    pub(crate) async fn pass(&self, bytes: usize) {
        let units = bytes.div_ceil(THROTTLE_UNIT).min(THROTTLE_BURST as usize) as u32;
        if let Some(units) = NonZeroU32::new(units) {
            self.0.until_n_ready(units).await.expect("a burst is at least that large");
        }
    }
}

/// How far a snapshot on its way has come.
#[derive(Clone, PartialEq, Debug)]
pub struct TransferProgress {
    /// To whom.
    pub to: NodeId,
    /// Bytes of keys and values that were sent.
    pub sent: u64,
    /// Bytes that needed not be sent, since the other one has them from before.
    pub known: u64,
    /// About how much is done, from 0 to 1; `None`: nobody can say.
    pub share: Option<f64>,
    /// How long it has taken.
    pub taken: Duration,
}

/// Bytes of keys and values in snapshots.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SnapshotBytes {
    /// Those that were sent.
    pub sent: u64,
    /// Those that the receiver had from before.
    pub known: u64,
}

/// The snapshots of a group that are on their way out, and all that have been.
#[derive(Default)]
pub(crate) struct Outgoing {
    next: AtomicU64,
    sent_total: AtomicU64,
    known_total: AtomicU64,
    transfers: Mutex<BTreeMap<u64, Underway>>,
}

struct Underway {
    index: u64,
    began: Instant,
    progress: TransferProgress,
}

impl Outgoing {
    /// Notes that a snapshot up to an index is on its way, until the note is dropped.
    pub(crate) fn begin(self: &Arc<Outgoing>, to: NodeId, index: u64) -> OnItsWay {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let progress = TransferProgress { to, sent: 0, known: 0, share: None, taken: Duration::ZERO };
        self.transfers.lock().insert(id, Underway { index, began: Instant::now(), progress });
        OnItsWay { id, outgoing: self.clone() }
    }

    /// The oldest entry that some receiver will need, but for the one before it.
    pub(crate) fn oldest(&self) -> Option<u64> {
        self.transfers.lock().values().map(|underway| underway.index).min()
    }

    pub(crate) fn progress(&self) -> Vec<TransferProgress> {
        let transfers = self.transfers.lock();
        let told = |underway: &Underway| TransferProgress {
            taken: underway.began.elapsed(),
            ..underway.progress.clone()
        };
        transfers.values().map(told).collect()
    }

    /// Bytes that all transfers since the start of the process have sent, and those that they needed not
    /// send.
    pub(crate) fn totals(&self) -> SnapshotBytes {
        let of = |total: &AtomicU64| total.load(Ordering::Relaxed);
        SnapshotBytes { sent: of(&self.sent_total), known: of(&self.known_total) }
    }
}

/// A snapshot that is on its way out.
pub(crate) struct OnItsWay {
    id: u64,
    outgoing: Arc<Outgoing>,
}

impl OnItsWay {
    /// Notes that a piece is done: how much of it was sent, and how much the receiver knew.
    pub(crate) fn advance(&self, sent: usize, known: usize, share: Option<f64>) {
        self.outgoing.sent_total.fetch_add(sent as u64, Ordering::Relaxed);
        self.outgoing.known_total.fetch_add(known as u64, Ordering::Relaxed);
        if let Some(underway) = self.outgoing.transfers.lock().get_mut(&self.id) {
            underway.progress.sent += sent as u64;
            underway.progress.known += known as u64;
            underway.progress.share = share;
        }
    }
}

impl Drop for OnItsWay {
    fn drop(&mut self) {
        self.outgoing.transfers.lock().remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use troth_protocol::process::Memory;

    use super::*;

    #[tokio::test]
    async fn no_more_snapshots_are_read_out_at_a_time_than_may() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(folder.path(), "a test", &[], Memory::default()).expect("a new folder");
        let mut open = Vec::new();
        for group in 0..READERS_MAX as u32 {
            open.push(super::open(&store, group, Vec::new()).await.expect("readable").expect("a place"));
        }
        assert!(super::open(&store, 0, Vec::new()).await.expect("readable").is_none());
        // One that is given up makes room.
        open.pop();
        let place = READERS.acquire().await.expect("never closed");
        drop(place);
        assert!(super::open(&store, 0, Vec::new()).await.expect("readable").is_some());
    }
}
