//! The Raft log of all groups of a process, and the one thread that makes it durable.
//!
//! Whatever waits when the writer looks is one batch and one sync: while one sync runs, the next
//! batch gathers. This is what makes a hundred transactions as cheap to sync as one.
//!
//! Entries are readable from the moment they are appended: the tail of each log stays in memory
//! until it is durable, and a while longer, since it is applied and replicated right after.
//!
//! After a write or sync has failed nothing is known about the disk any more: every later write
//! fails too, and the groups stop.

use std::collections::VecDeque;
use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use openraft::storage::{IOFlushed, LogState, RaftLogStorage};
use openraft::{OptionalSend, RaftLogReader};
use parking_lot::Mutex;
use prometheus_client::metrics::histogram::Histogram;
use rocksdb::WriteBatch;
use tokio::sync::{mpsc, oneshot};
use troth_protocol::fault;
use troth_protocol::message::admin::FaultPoint;
use troth_protocol::message::raft as wire;
use troth_protocol::wire::{decode, encode};
use xxhash_rust::xxh3::xxh3_64;

use crate::metrics::{Registry, Sampler, durations, sizes};
use crate::rocks::{Family, Store, StoreError, families, group_range};
use crate::types::{self, Entry, LogId, Types, Vote};

/// Writes that may wait for the writer, of all groups together.
const WRITES_MAX: usize = 64 << 10;

/// Writes that one batch takes.
const BATCH_WRITES_MAX: usize = 1024;

/// Bytes of durable entries that a log keeps in memory.
const TAIL_BYTES_MAX: usize = 4 << 20;

/// Entries and bytes of them that one message to a member carries, unless one entry alone is larger.
const MESSAGE_ENTRIES_MAX: u64 = 1024;
const MESSAGE_BYTES_MAX: usize = 4 << 20;

/// Kinds of small records of a group, the last byte of their key.
pub(crate) mod tag {
    pub const VOTE: u8 = 1;
    pub const PURGED: u8 = 2;
    /// The machine's mark: last applied entry and membership.
    pub const APPLIED: u8 = 4;
    /// A snapshot has arrived whole and is being put in place.
    pub const INSTALLING: u8 = 5;
    /// A snapshot is being put together where the state belongs, and is not complete.
    pub const BUILDING: u8 = 6;

    /// All but the vote, which is kept for ever.
    pub const FORGETTABLE: [u8; 4] = [PURGED, APPLIED, INSTALLING, BUILDING];
}

pub(crate) fn meta_key(group: u32, tag: u8) -> [u8; 5] {
    let [a, b, c, d] = group.to_be_bytes();
    [a, b, c, d, tag]
}

/// The key of a log entry or of a staged piece: `[group u32 | number u64]`.
pub(crate) fn numbered_key(group: u32, number: u64) -> [u8; 12] {
    let mut key = [0; 12];
    key[..4].copy_from_slice(&group.to_be_bytes());
    key[4..].copy_from_slice(&number.to_be_bytes());
    key
}

pub(crate) enum Change {
    Put(Family, Bytes, Bytes),
    Delete(Family, Bytes),
    DeleteRange(Family, Bytes, Bytes),
}

impl Change {
    pub(crate) fn put(family: Family, key: &[u8], value: impl Into<Bytes>) -> Change {
        Change::Put(family, Bytes::copy_from_slice(key), value.into())
    }

    pub(crate) fn delete(family: Family, key: &[u8]) -> Change {
        Change::Delete(family, Bytes::copy_from_slice(key))
    }

    pub(crate) fn delete_range(family: Family, start: &[u8], end: &[u8]) -> Change {
        Change::DeleteRange(family, Bytes::copy_from_slice(start), Bytes::copy_from_slice(end))
    }
}

type Done = Box<dyn FnOnce(Result<(), StoreError>) + Send>;

struct Write {
    changes: Vec<Change>,
    /// Whether `done` waits until the changes survive a power cut.
    durable: bool,
    done: Done,
}

/// The writer thread of a process. Cheap to clone; the thread ends with the last clone.
#[derive(Clone)]
pub struct LogWriter {
    writes: mpsc::Sender<Write>,
    store: Store,
    /// Since when the thread is writing, if it is.
    busy_since: Arc<Mutex<Option<Instant>>>,
    metrics: LogMetrics,
}

/// What the writer measures. Cheap to clone.
#[derive(Clone)]
struct LogMetrics {
    /// How long a batch took, with its sync.
    took: Histogram,
    /// How many writes shared one.
    writes: Histogram,
}

impl LogWriter {
    /// Starts the thread.
    ///
    /// # Panics
    /// If the system cannot make a thread.
    pub fn start(store: &Store) -> LogWriter {
        let (writes, receiver) = mpsc::channel(WRITES_MAX);
        let target = store.clone();
        let busy_since = Arc::new(Mutex::new(None));
        let busy = busy_since.clone();
        let metrics = LogMetrics { took: durations(), writes: sizes() };
        let measures = metrics.clone();
        thread::Builder::new()
            .name("log-writer".into())
            .spawn(move || run(&target, receiver, &busy, &measures))
            .expect("a process can have one more thread");
        LogWriter { writes, store: store.clone(), busy_since, metrics }
    }

    /// How long the write has taken that is under way; zero if none is. A disk that stalls shows here.
    pub fn busy_for(&self) -> Duration {
        self.busy_since.lock().map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// Adds what the writer measures to a registry.
    pub fn register(&self, registry: &mut Registry) {
        let LogMetrics { took, writes } = self.metrics.clone();
        registry.register("log_sync_seconds", "How long it took to write and sync what waited", took);
        registry.register("log_batch_writes", "Writes that shared one sync", writes);
        let (waiting, busy) = (self.writes.downgrade(), self.busy_since.clone());
        Sampler::register(registry, move |samples| {
            let waits = waiting.upgrade().map_or(0, |writes| writes.max_capacity() - writes.capacity());
            samples.gauge("log_writes_waiting", "Writes that wait for the log writer", waits as f64)?;
            let since = busy.lock().map_or(Duration::ZERO, |since| since.elapsed());
            let help = "How long the write under way has taken; a disk that stalls shows here";
            samples.gauge("log_busy_seconds", help, since.as_secs_f64())
        });
    }

    async fn submit(&self, changes: Vec<Change>, durable: bool, done: Done) -> io::Result<()> {
        let write = Write { changes, durable, done };
        self.writes.send(write).await.map_err(|_| io::Error::other("the log writer has ended"))
    }

    /// Sets a key, and waits until that is durable.
    ///
    /// # Errors
    /// If the database cannot be written.
    pub async fn put_durably(&self, family: Family, key: &[u8], value: Vec<u8>) -> io::Result<()> {
        self.write_durably(vec![Change::put(family, key, value)]).await
    }

    /// Sets a key some time soon, in order with everything else: it survives the end of the process, and a power cut
    /// after the next write that is durable.
    ///
    /// # Errors
    /// If the writer has ended.
    pub async fn put_lazily(&self, family: Family, key: &[u8], value: Vec<u8>) -> io::Result<()> {
        self.write_lazily(vec![Change::put(family, key, value)]).await
    }

    /// Writes, and waits until it is durable.
    pub(crate) async fn write_durably(&self, changes: Vec<Change>) -> io::Result<()> {
        let (sender, receiver) = oneshot::channel();
        let done = move |result| drop(sender.send(result));
        self.submit(changes, true, Box::new(done)).await?;
        Ok(receiver.await.map_err(|_| io::Error::other("the log writer has ended"))??)
    }

    /// Writes some time soon, in order with everything else.
    pub(crate) async fn write_lazily(&self, changes: Vec<Change>) -> io::Result<()> {
        // A failure shows in the next write that somebody waits for.
        self.submit(changes, false, Box::new(drop)).await
    }
}

fn run(
    store: &Store,
    mut receiver: mpsc::Receiver<Write>,
    busy_since: &Mutex<Option<Instant>>,
    metrics: &LogMetrics,
) {
    let mut failed: Option<StoreError> = None;
    let mut writes = Vec::with_capacity(BATCH_WRITES_MAX);
    while receiver.blocking_recv_many(&mut writes, BATCH_WRITES_MAX) > 0 {
        let mut batch = WriteBatch::default();
        for change in writes.iter().flat_map(|write| &write.changes) {
            match change {
                Change::Put(family, key, value) => store.put(&mut batch, *family, key, value),
                Change::Delete(family, key) => store.delete(&mut batch, *family, key),
                Change::DeleteRange(family, start, end) => {
                    store.delete_range(&mut batch, *family, start, end)
                }
            }
        }
        let durable = writes.iter().any(|write| write.durable);
        let began = Instant::now();
        *busy_since.lock() = Some(began);
        fault::pass_blocking(FaultPoint::LogSync);
        let result = match &failed {
            Some(error) => Err(error.clone()),
            None if durable => store.write_durably(batch),
            None => store.write(batch),
        };
        *busy_since.lock() = None;
        metrics.took.observe(began.elapsed().as_secs_f64());
        metrics.writes.observe(writes.len() as f64);
        if let (Err(error), None) = (&result, &failed) {
            tracing::error!(%error, "the log cannot be written any more");
            failed = Some(error.clone());
        }
        for write in writes.drain(..) {
            (write.done)(result.clone());
        }
    }
}

/// The log of one group.
#[derive(Clone)]
pub(crate) struct Log {
    shared: Arc<Shared>,
}

struct Shared {
    group: u32,
    store: Store,
    writer: LogWriter,
    state: Mutex<State>,
}

struct State {
    vote: Option<Vote>,
    purged: Option<LogId>,
    last: Option<LogId>,
    /// The newest entries without a gap; all that are not durable are among them.
    tail: VecDeque<Entry>,
    tail_bytes: usize,
    /// Entries up to this index are durable.
    durable: Option<u64>,
    /// How often entries were cut off: what an append before a cut says of durability is void.
    cuts: u64,
}

impl State {
    fn trim(&mut self) {
        while self.tail_bytes > TAIL_BYTES_MAX
            && let Some(first) = self.tail.front()
            && Some(first.log_id.index) <= self.durable
        {
            self.tail_bytes -= size(first);
            self.tail.pop_front();
        }
    }

    fn tail_start(&self) -> Option<u64> {
        self.tail.front().map(|entry| entry.log_id.index)
    }
}

fn size(entry: &Entry) -> usize {
    let payload = match &entry.payload {
        openraft::EntryPayload::Normal(command) => command.0.len(),
        openraft::EntryPayload::Blank | openraft::EntryPayload::Membership(_) => 0,
    };
    payload + 64
}

fn corrupt(group: u32, what: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the log of group {group} is damaged: {what}"))
}

impl Log {
    /// Reads a group's log from disk, and checks every entry.
    ///
    /// # Errors
    /// If a record is damaged or missing.
    pub(crate) fn open(group: u32, writer: &LogWriter) -> io::Result<Log> {
        let store = writer.store.clone();
        let record = |tag| -> io::Result<Option<Vec<u8>>> {
            Ok(store.get(families::META, &meta_key(group, tag))?.map(|record| record.to_vec()))
        };
        let damaged = |what: &str| corrupt(group, what);
        let vote = match record(tag::VOTE)? {
            Some(record) => Some(types::vote(decode(&record).map_err(|_| damaged("its vote is malformed"))?)),
            None => None,
        };
        let purged: Option<LogId> = match record(tag::PURGED)? {
            Some(record) => {
                Some(types::log_id(decode(&record).map_err(|_| damaged("its purge mark is malformed"))?))
            }
            None => None,
        };

        let mut next = purged.map_or(0, |purged| purged.index + 1);
        let mut state = State {
            vote,
            purged,
            last: purged,
            tail: VecDeque::new(),
            tail_bytes: 0,
            durable: None,
            cuts: 0,
        };
        let (start, end) = (numbered_key(group, next), group_range(group).1);
        let mut problem = None;
        store.scan(families::LOG, &start, &end, |key, value| match read_entry(group, key, value) {
            Ok(entry) if entry.log_id.index == next => {
                next += 1;
                state.last = Some(entry.log_id);
                state.durable = Some(entry.log_id.index);
                state.tail_bytes += size(&entry);
                state.tail.push_back(entry);
                state.trim();
                true
            }
            Ok(entry) => {
                problem =
                    Some(corrupt(group, format!("entry {next} is missing before {}", entry.log_id.index)));
                false
            }
            Err(error) => {
                problem = Some(error);
                false
            }
        })?;
        if let Some(problem) = problem {
            return Err(problem);
        }
        let shared = Shared { group, store, writer: writer.clone(), state: Mutex::new(state) };
        Ok(Log { shared: Arc::new(shared) })
    }

    /// Whether this member has taken part in anything before.
    pub(crate) fn had_a_life(&self) -> bool {
        let state = self.shared.state.lock();
        state.vote.is_some() || state.last.is_some()
    }

    fn meta(&self, tag: u8, value: Vec<u8>) -> Change {
        Change::put(families::META, &meta_key(self.shared.group, tag), value)
    }

    fn read_stored(&self, start: u64, end: u64) -> io::Result<Vec<Entry>> {
        let group = self.shared.group;
        let (from, to) = (numbered_key(group, start), numbered_key(group, end));
        let mut entries = Vec::new();
        let mut problem = None;
        self.shared.store.scan(families::LOG, &from, &to, |key, value| {
            match read_entry(group, key, value) {
                Ok(entry) => {
                    entries.push(entry);
                    true
                }
                Err(error) => {
                    problem = Some(error);
                    false
                }
            }
        })?;
        match problem {
            Some(problem) => Err(problem),
            None => Ok(entries),
        }
    }

    fn read(&self, start: u64, end: u64) -> io::Result<Vec<Entry>> {
        let (from_tail, stored_end) = {
            let state = self.shared.state.lock();
            let first = state.purged.map_or(0, |purged| purged.index + 1);
            let after_last = state.last.map_or(0, |last| last.index + 1);
            let (start, end) = (start.max(first), end.min(after_last));
            if start >= end {
                return Ok(Vec::new());
            }
            let tail_start = state.tail_start().unwrap_or(after_last);
            let skip = start.saturating_sub(tail_start) as usize;
            let take = end.saturating_sub(start.max(tail_start)) as usize;
            let from_tail: Vec<Entry> = state.tail.iter().skip(skip).take(take).cloned().collect();
            (from_tail, tail_start.min(end))
        };
        let mut entries = if start < stored_end { self.read_stored(start, stored_end)? } else { Vec::new() };
        entries.extend(from_tail);
        let gap = entries.windows(2).find(|pair| pair[0].log_id.index + 1 != pair[1].log_id.index);
        match gap {
            Some(pair) => Err(corrupt(self.shared.group, format!("no entry after {}", pair[0].log_id.index))),
            None => Ok(entries),
        }
    }
}

pub(crate) fn read_entry(group: u32, key: &[u8], value: &[u8]) -> io::Result<Entry> {
    let index = key.get(4..12).and_then(|index| index.try_into().ok()).map(u64::from_be_bytes);
    let index = index.ok_or_else(|| corrupt(group, "a key has the wrong length"))?;
    let broken = || corrupt(group, format!("the checksum of entry {index} does not match"));
    let (checksum, bytes) = value.split_at_checked(8).ok_or_else(broken)?;
    if checksum != xxh3_64(bytes).to_be_bytes() {
        return Err(broken());
    }
    let entry: wire::Entry = decode(bytes).map_err(|error| corrupt(group, error))?;
    if entry.id.index != index {
        return Err(corrupt(group, format!("entry {index} says that it is entry {}", entry.id.index)));
    }
    Ok(types::entry(entry))
}

pub(crate) fn write_entry(group: u32, entry: &Entry) -> Change {
    let bytes = encode(&types::entry_to_wire(entry));
    let mut value = Vec::with_capacity(bytes.len() + 8);
    value.extend_from_slice(&xxh3_64(&bytes).to_be_bytes());
    value.extend_from_slice(&bytes);
    Change::put(families::LOG, &numbered_key(group, entry.log_id.index), value)
}

impl RaftLogReader<Types> for Log {
    async fn try_get_log_entries<R: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: R,
    ) -> io::Result<Vec<Entry>> {
        let start = match range.start_bound() {
            Bound::Included(start) => *start,
            Bound::Excluded(before) => before + 1,
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(last) => last + 1,
            Bound::Excluded(end) => *end,
            Bound::Unbounded => u64::MAX,
        };
        self.read(start, end)
    }

    /// Entries for one message: as many as fit, and always one.
    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> io::Result<Vec<Entry>> {
        let mut entries = self.read(start, end.min(start.saturating_add(MESSAGE_ENTRIES_MAX)))?;
        let mut bytes = 0;
        let fits = entries.iter().take_while(|entry| {
            bytes += size(entry);
            bytes <= MESSAGE_BYTES_MAX
        });
        let count = fits.count().max(1);
        entries.truncate(count);
        Ok(entries)
    }

    async fn read_vote(&mut self) -> io::Result<Option<Vote>> {
        Ok(self.shared.state.lock().vote)
    }
}

impl RaftLogStorage<Types> for Log {
    type LogReader = Log;

    async fn get_log_state(&mut self) -> io::Result<LogState<Types>> {
        let state = self.shared.state.lock();
        Ok(LogState { last_purged_log_id: state.purged, last_log_id: state.last })
    }

    async fn get_log_reader(&mut self) -> Log {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> io::Result<()> {
        let record = self.meta(tag::VOTE, encode(&types::vote_to_wire(vote)));
        self.shared.writer.write_durably(vec![record]).await?;
        self.shared.state.lock().vote = Some(*vote);
        Ok(())
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<Types>) -> io::Result<()>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let group = self.shared.group;
        let mut changes = Vec::new();
        let (last, cuts) = {
            let mut state = self.shared.state.lock();
            for entry in entries {
                changes.push(write_entry(group, &entry));
                state.last = Some(entry.log_id);
                state.tail_bytes += size(&entry);
                state.tail.push_back(entry);
            }
            (state.last.map(|last| last.index), state.cuts)
        };
        let shared = self.shared.clone();
        let done = move |result: Result<(), StoreError>| {
            if result.is_ok() {
                let mut state = shared.state.lock();
                if state.cuts == cuts {
                    state.durable = state.durable.max(last);
                    state.trim();
                }
            }
            callback.io_completed(result.map_err(io::Error::from));
        };
        self.shared.writer.submit(changes, true, Box::new(done)).await
    }

    async fn truncate_after(&mut self, last_kept: Option<LogId>) -> io::Result<()> {
        let first_gone = last_kept.map_or(0, |id| id.index + 1);
        {
            let mut state = self.shared.state.lock();
            while state.tail.back().is_some_and(|entry| entry.log_id.index >= first_gone) {
                let gone = state.tail.pop_back().expect("looked at just now");
                state.tail_bytes -= size(&gone);
            }
            state.cuts += 1;
            state.last = last_kept.max(state.purged);
            state.durable = state.durable.min(state.last.map(|last| last.index));
        }
        let (start, end) = (numbered_key(self.shared.group, first_gone), group_range(self.shared.group).1);
        self.shared.writer.write_durably(vec![Change::delete_range(families::LOG, &start, &end)]).await
    }

    async fn purge(&mut self, upto: LogId) -> io::Result<()> {
        {
            let mut state = self.shared.state.lock();
            while state.tail.front().is_some_and(|entry| entry.log_id.index <= upto.index) {
                let gone = state.tail.pop_front().expect("looked at just now");
                state.tail_bytes -= size(&gone);
            }
            state.purged = state.purged.max(Some(upto));
            state.last = state.last.max(Some(upto));
        }
        let group = self.shared.group;
        let (start, end) = (numbered_key(group, 0), numbered_key(group, upto.index + 1));
        // In the same order as the state that these entries led to: no power cut can take that
        // state and leave the purge.
        let mark = self.meta(tag::PURGED, encode(&types::log_id_to_wire(&upto)));
        self.shared.writer.write_lazily(vec![Change::delete_range(families::LOG, &start, &end), mark]).await
    }
}
