//! The one RocksDB of a process.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Once, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamily, ColumnFamilyDescriptor, DB, DBPinnableSlice, DBRawIterator,
    DBRecoveryMode, Options, ReadOptions, ReadTier, WriteBatch, WriteOptions,
};
use tokio::sync::watch;
use troth_protocol::process::Memory;

use crate::durable::{self, COUNT_KEY, Mark, Refusal, counted};
use crate::machine::{Batch, Span};
use crate::manifest::Torn;
use crate::metrics::{Registry, Sampler};

/// A column family, by name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Family(pub &'static str);

/// The column families of replication itself. Keys begin with the group's number, `u32` big-endian.
pub mod families {
    use super::Family;

    /// Votes, marks and whatever else is small: `[group u32 | tag u8]`.
    pub const META: Family = Family("meta");
    /// Log entries: `[group u32 | index u64] → [xxh3 u64 | entry]`.
    pub const LOG: Family = Family("log");
    /// Pieces of a snapshot on their way in: `[group u32 | sequence u64] → piece`.
    pub const STAGING: Family = Family("staging");

    pub(crate) const ALL: [Family; 3] = [META, LOG, STAGING];
}

/// How far a read may go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reach {
    /// Only what is in memory, so that a task that must not wait for a disk may read. Where that is
    /// not enough the read fails with [`StoreError::is_out_of_reach`].
    Memory,
    /// Wherever it is.
    Disk,
}

/// RocksDB failed. Whoever sees one must not go on as if the write had happened.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{}", told(.0))]
pub struct StoreError(#[from] pub rocksdb::Error);

/// In words for an operator.
fn told(error: &rocksdb::Error) -> String {
    if is_full(error) {
        return "the disk of the data folder is full: make room on it, and start the server again; nothing that was \
                acknowledged is lost"
            .into();
    }
    format!("storage: {error}")
}

/// How systems say that a disk is full, or all of it that this user may have.
fn is_full(error: &rocksdb::Error) -> bool {
    let text: &str = error.as_ref();
    text.contains("No space left on device") || text.contains("Disk quota exceeded")
}

impl StoreError {
    /// Whether the read would have succeeded with [`Reach::Disk`].
    pub fn is_out_of_reach(&self) -> bool {
        self.0.kind() == rocksdb::ErrorKind::Incomplete
    }
}

impl From<StoreError> for io::Error {
    /// [`io::ErrorKind::WouldBlock`] for a read that is out of reach.
    fn from(error: StoreError) -> io::Error {
        if error.is_out_of_reach() {
            io::Error::new(io::ErrorKind::WouldBlock, error)
        } else {
            io::Error::other(error)
        }
    }
}

/// The data folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The folder cannot be made or written.
    #[error("data folder {path}: {source}{}", hint(source))]
    Folder {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another process has it open.
    #[error("data folder {path} is in use by another process; stop that one first")]
    InUse {
        /// The folder.
        path: PathBuf,
    },
    /// What is in it cannot be read.
    #[error("data folder {path} cannot be opened: {source}")]
    Damaged {
        /// The folder.
        path: PathBuf,
        /// What RocksDB says.
        source: rocksdb::Error,
    },
    /// Something is missing that was synced.
    #[error(
        "data folder {path} has lost what was synced: {found} of {synced} batches are there, and its write-ahead \
         log is damaged after them; put the log back as it was, or let a new server take the place of this one"
    )]
    Lost {
        /// The folder.
        path: PathBuf,
        /// Synced batches that are there.
        found: u64,
        /// Synced batches that were there.
        synced: u64,
    },
    /// Nothing says how much must be there.
    #[error(
        "data folder {path} has been used, and its file `{}` is gone or damaged, which says how much of it must be \
         there; put the file back as it was, or let a new server take the place of this one",
        durable::MARK
    )]
    Unmarked {
        /// The folder.
        path: PathBuf,
    },
    /// It holds the data of somebody else.
    #[error(
        "data folder {path} belongs to {found}, this is {expected}; choose another folder or configuration"
    )]
    NotOurs {
        /// The folder.
        path: PathBuf,
        /// Whose data it is.
        found: String,
        /// Who opens it.
        expected: String,
    },
}

/// The system's number for a disk that fails.
const EIO: i32 = 5;

fn hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "; make room on its disk",
        _ if source.raw_os_error() == Some(EIO) => "; its disk may be damaged",
        _ => "; choose a folder that this user may write to",
    }
}

/// A RocksDB with its column families. Cheap to clone; closed when the last clone is gone.
#[derive(Clone)]
pub struct Store {
    shared: Arc<Shared>,
}

struct Shared {
    db: DB,
    families: Vec<Family>,
    mark: Mutex<Mark>,
    /// What the mark says, for whoever must not wait while it is being moved.
    progress: AtomicU64,
    /// The first write that failed, in words.
    failure: OnceLock<String>,
    // Dropped after the database, in the order of declaration: who waits for them finds the folder free.
    closed: watch::Sender<()>,
    _open: Open,
}

/// How many databases this process has open.
static OPEN: Mutex<usize> = Mutex::new(0);
static CLOSED: Condvar = Condvar::new();

/// One of them.
struct Open;

impl Open {
    fn new() -> Open {
        *OPEN.lock() += 1;
        Open
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        *OPEN.lock() -= 1;
        CLOSED.notify_all();
    }
}

/// Waits until this process has no database open any more, and tells whether that came true in time.
pub fn all_closed(within: Duration) -> bool {
    let mut open = OPEN.lock();
    !CLOSED.wait_while_until(&mut open, |open| *open > 0, Instant::now() + within).timed_out()
}

/// How long a process that ends waits for its databases.
const LEAVING_PATIENCE: Duration = Duration::from_secs(2);

/// Makes this process wait for its databases when it ends, however it comes to that but by a signal. The last
/// clone of a [`Store`] may be with a thread that nobody joins, and RocksDB aborts the process when it closes a
/// database after the objects are gone that all databases share.
fn close_before_the_end() {
    extern "C" fn wait() {
        if !all_closed(LEAVING_PATIENCE) {
            eprintln!("a database is still in use; the process ends all the same");
        }
    }
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: what it calls lives as long as the process, and neither panics nor needs a thread's own data.
        #[expect(unsafe_code, reason = "there is no other way to be called then")]
        let refused = unsafe { libc::atexit(wait) };
        debug_assert_eq!(refused, 0, "a process has room for at least 32 of these");
    });
}

/// Opens it, if all is there that was synced.
fn open_database(
    path: &Path,
    families: &[Family],
    memory: Memory,
    synced: Option<u64>,
) -> Result<DB, OpenError> {
    let mut options = database_options(memory);
    if let Some(synced) = synced {
        let mode = durable::inspect(path, synced).map_err(|refusal| match refusal {
            Refusal::Unreadable(source) => OpenError::Damaged { path: path.to_owned(), source },
            Refusal::Lost(found) => OpenError::Lost { path: path.to_owned(), found, synced },
        })?;
        options.set_wal_recovery_mode(mode);
    }
    let cache = Cache::new_lru_cache(memory.cache);
    let descriptor =
        |family: &Family| ColumnFamilyDescriptor::new(family.0, family_options(*family, memory, &cache));
    DB::open_cf_descriptors(&options, path, families.iter().map(descriptor)).map_err(|source| {
        let message = source.to_string();
        if message.contains("lock") && message.contains("LOCK") {
            OpenError::InUse { path: path.to_owned() }
        } else if is_full(&source) {
            OpenError::Folder { path: path.to_owned(), source: io::ErrorKind::StorageFull.into() }
        } else {
            OpenError::Damaged { path: path.to_owned(), source }
        }
    })
}

impl Store {
    /// Opens the database in a folder, or makes one. `owner` says whose data this is; a folder that
    /// says otherwise is refused.
    ///
    /// # Errors
    /// See [`OpenError`]; each says what to do.
    pub fn open(
        path: &Path,
        owner: &str,
        machine_families: &[Family],
        memory: Memory,
    ) -> Result<Store, OpenError> {
        let folder = |source| OpenError::Folder { path: path.to_owned(), source };
        fs::create_dir_all(path).map_err(folder)?;
        let probe = path.join(".writable");
        fs::write(&probe, []).and_then(|()| fs::remove_file(&probe)).map_err(folder)?;

        let in_use = || OpenError::InUse { path: path.to_owned() };
        let unmarked = || OpenError::Unmarked { path: path.to_owned() };
        if durable::is_unmarked(path) {
            return Err(unmarked());
        }
        let mut mark = Mark::lock(path).map_err(folder)?.ok_or_else(in_use)?;
        let synced = mark.read().map_err(folder)?;
        if synced.is_none() && durable::has_counted(path) {
            return Err(unmarked());
        }
        let families: Vec<Family> = families::ALL.iter().chain(machine_families).copied().collect();
        let open = Open::new();
        let db = open_database(path, &families, memory, synced).or_else(|error| {
            let OpenError::Damaged { .. } = error else { return Err(error) };
            let Some(torn) = Torn::cut_off(path).map_err(folder)? else { return Err(error) };
            match open_database(path, &families, memory, synced) {
                Ok(db) => {
                    tracing::warn!("the manifest ends in what was not synced; that is left out");
                    Ok(db)
                }
                Err(error) => torn.put_back().map_err(folder).and(Err(error)),
            }
        })?;
        // Not before: what is asked for last is called first, before RocksDB's own.
        close_before_the_end();
        let (closed, _) = watch::channel(());
        let count = db.cf_handle(families::META.0).map(|handle| db.get_cf(handle, COUNT_KEY)).transpose();
        let count = count.map_err(|source| OpenError::Damaged { path: path.to_owned(), source })?.flatten();
        let count = counted(count.as_deref());
        mark.set(path, count).map_err(folder)?;
        let (mark, progress) = (Mutex::new(mark), AtomicU64::new(count));
        let store = Store {
            shared: Arc::new(Shared {
                db,
                families,
                mark,
                progress,
                failure: OnceLock::new(),
                closed,
                _open: open,
            }),
        };
        store.claim(path, owner)?;
        Ok(store)
    }

    /// Writes the owner's name into a new database, and compares it in an old one.
    fn claim(&self, path: &Path, owner: &str) -> Result<(), OpenError> {
        let damaged = |source| OpenError::Damaged { path: path.to_owned(), source };
        let key = [&u32::MAX.to_be_bytes()[..], b"owner"].concat();
        match self.shared.db.get_cf(self.handle(families::META), &key).map_err(damaged)? {
            Some(found) if found == owner.as_bytes() => Ok(()),
            Some(found) => Err(OpenError::NotOurs {
                path: path.to_owned(),
                found: String::from_utf8_lossy(&found).into_owned(),
                expected: owner.to_owned(),
            }),
            None => {
                let mut durable = WriteOptions::default();
                durable.set_sync(true);
                self.shared.db.put_cf_opt(self.handle(families::META), &key, owner, &durable).map_err(damaged)
            }
        }
    }

    fn handle(&self, family: Family) -> &ColumnFamily {
        self.shared.db.cf_handle(family.0).expect("every family was named when the database was opened")
    }

    /// Reads a value.
    ///
    /// # Errors
    /// If the database cannot be read, or what it holds is damaged.
    pub fn get(&self, family: Family, key: &[u8]) -> Result<Option<DBPinnableSlice<'_>>, StoreError> {
        Ok(self.shared.db.get_pinned_cf(self.handle(family), key)?)
    }

    /// An iterator over the keys from `start` up to but not including `end`; not positioned yet.
    pub fn iterate(&self, family: Family, start: &[u8], end: &[u8], reach: Reach) -> DBRawIterator<'_> {
        let mut options = ReadOptions::default();
        if reach == Reach::Memory {
            options.set_read_tier(ReadTier::BlockCache);
        }
        options.set_iterate_lower_bound(start);
        options.set_iterate_upper_bound(end);
        self.shared.db.raw_iterator_cf_opt(self.handle(family), options)
    }

    /// Calls `visit` with every key and value from `start` up to but not including `end`, as of one
    /// moment, until it returns false.
    ///
    /// # Errors
    /// If the database cannot be read, or what it holds is damaged.
    pub fn scan(
        &self,
        family: Family,
        start: &[u8],
        end: &[u8],
        mut visit: impl FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), StoreError> {
        let mut rows = self.iterate(family, start, end, Reach::Disk);
        rows.seek(start);
        while let Some((key, value)) = rows.item() {
            if !visit(key, value) {
                break;
            }
            rows.next();
        }
        Ok(rows.status()?)
    }

    /// Adds what the database says of itself to a registry. It ends with the database.
    pub fn register(&self, registry: &mut Registry) {
        let shared = Arc::downgrade(&self.shared);
        Sampler::register(registry, move |samples| {
            let Some(shared) = shared.upgrade() else { return Ok(()) };
            let of_family = |family: &Family, name: &str| {
                let handle = shared.db.cf_handle(family.0)?;
                shared.db.property_int_value_cf(handle, name).ok().flatten()
            };
            let sum = |name: &str| {
                shared.families.iter().filter_map(|family| of_family(family, name)).sum::<u64>() as f64
            };
            let once = |name: &str| {
                shared.families.first().and_then(|family| of_family(family, name)).unwrap_or(0) as f64
            };
            let files = sum("rocksdb.live-sst-files-size");
            samples.gauge("rocksdb_files_bytes", "Bytes of table files", files)?;
            let memory = sum("rocksdb.cur-size-all-mem-tables");
            samples.gauge("rocksdb_memtables_bytes", "Bytes of write buffers", memory)?;
            let pending = sum("rocksdb.estimate-pending-compaction-bytes");
            samples.gauge(
                "rocksdb_compaction_pending_bytes",
                "About how much is to be rewritten",
                pending,
            )?;
            let running = once("rocksdb.num-running-compactions") + once("rocksdb.num-running-flushes");
            samples.gauge("rocksdb_jobs_running", "Flushes and compactions under way", running)?;
            let cache = once("rocksdb.block-cache-usage");
            samples.gauge("rocksdb_block_cache_bytes", "Bytes of the block cache that are used", cache)?;
            let stopped = once("rocksdb.is-write-stopped");
            samples.gauge("rocksdb_writes_stopped", "1 while the database takes no writes", stopped)?;
            let delayed = once("rocksdb.actual-delayed-write-rate");
            samples.gauge(
                "rocksdb_delayed_write_bytes",
                "Bytes a second that it takes; 0: as many as come",
                delayed,
            )
        });
    }

    /// About how many bytes spans have on disk. What is only in memory yet does not count.
    pub fn size(&self, spans: &[Span]) -> u64 {
        let size = |span: &Span| {
            let range = rocksdb::Range::new(&span.start, &span.end);
            self.shared.db.get_approximate_sizes_cf(self.handle(span.family), &[range])
        };
        spans.iter().flat_map(size).sum()
    }

    /// Gives the space of spans back whose keys are all deleted: at once that of files that hold nothing
    /// else, and that of the others as they are rewritten.
    ///
    /// # Errors
    /// If the database cannot be written.
    pub async fn reclaim(&self, spans: Vec<Span>) -> io::Result<()> {
        let store = self.clone();
        let work = move || {
            for span in &spans {
                // A file whose last key is the end that is named goes too.
                let last = just_below(&span.end);
                store.shared.db.delete_file_in_range_cf(store.handle(span.family), &span.start, &last)?;
            }
            Ok::<_, rocksdb::Error>(())
        };
        let done = tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?;
        done.map_err(|error| StoreError(error).into())
    }

    /// A new batch, for what is not replicated.
    pub fn batch(&self) -> Batch<'_> {
        Batch::new(self)
    }

    /// Adds a write to a batch.
    pub(crate) fn put(&self, batch: &mut WriteBatch, family: Family, key: &[u8], value: &[u8]) {
        batch.put_cf(self.handle(family), key, value);
    }

    /// Adds a deletion to a batch.
    pub(crate) fn delete(&self, batch: &mut WriteBatch, family: Family, key: &[u8]) {
        batch.delete_cf(self.handle(family), key);
    }

    /// Adds the deletion of a range to a batch.
    pub(crate) fn delete_range(&self, batch: &mut WriteBatch, family: Family, start: &[u8], end: &[u8]) {
        batch.delete_range_cf(self.handle(family), start, end);
    }

    /// Writes a batch, all or nothing. It survives the end of the process, but not a power cut
    /// before the next [`Store::sync`].
    ///
    /// # Errors
    /// If the database cannot be written.
    pub(crate) fn write(&self, batch: WriteBatch) -> Result<(), StoreError> {
        self.noting(self.shared.db.write(batch))
    }

    /// Remembers the first failure: what comes after it follows from it.
    fn noting<T>(&self, outcome: Result<T, rocksdb::Error>) -> Result<T, StoreError> {
        outcome.map_err(|error| {
            let error = StoreError(error);
            self.shared.failure.get_or_init(|| error.to_string());
            error
        })
    }

    /// The first write that failed, in words; `None`: none has.
    pub(crate) fn failure(&self) -> Option<String> {
        self.shared.failure.get().cloned()
    }

    /// Writes a batch, all or nothing, and makes it durable, with everything that was written before.
    /// Other writers go on meanwhile, which they could not if the sync were part of the write.
    ///
    /// # Errors
    /// If the disk refuses.
    pub(crate) fn write_durably(&self, mut batch: WriteBatch) -> Result<(), StoreError> {
        let mut mark = self.shared.mark.lock();
        let count = (mark.count() + 1).to_be_bytes();
        self.put(&mut batch, families::META, COUNT_KEY, &count);
        self.write(batch)?;
        self.noting(self.shared.db.flush_wal(true))?;
        if let Err(error) = mark.advance() {
            // An old mark says too little, and never too much.
            tracing::warn!(%error, "what was synced cannot be marked");
        }
        self.shared.progress.store(mark.count(), Ordering::Release);
        Ok(())
    }

    /// How many batches were synced in this folder since it was made. All of them are there after a power cut, so a
    /// folder that has fewer than it had is not the same.
    pub fn progress(&self) -> u64 {
        self.shared.progress.load(Ordering::Acquire)
    }

    /// The database itself.
    pub(crate) fn database(&self) -> &DB {
        &self.shared.db
    }

    /// Gives this clone up, and returns when the last one is gone and the folder can be opened again.
    pub async fn closed(self) {
        let mut closed = self.shared.closed.subscribe();
        drop(self);
        // Nobody ever sends: an error means that the sender was dropped.
        while closed.changed().await.is_ok() {}
    }
}

/// A key below a bound, above all keys below it that anybody uses.
fn just_below(bound: &[u8]) -> Vec<u8> {
    match bound.split_last() {
        None => Vec::new(),
        Some((0, before)) => before.to_vec(),
        Some((last, before)) => [before, &[last - 1], &[0xff; 32]].concat(),
    }
}

/// The range of all keys that begin with a group's number.
pub(crate) fn group_range(group: u32) -> ([u8; 4], [u8; 4]) {
    (group.to_be_bytes(), (group + 1).to_be_bytes())
}

fn database_options(memory: Memory) -> Options {
    let mut options = Options::default();
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    // A record torn at the very end was never acknowledged; anything else that is damaged in the
    // log must be seen, not skipped. See `durable` for what a power cut leaves.
    options.set_wal_recovery_mode(DBRecoveryMode::TolerateCorruptedTailRecords);
    options.set_track_and_verify_wals_in_manifest(true);
    options.set_max_total_wal_size(2 * memory.write_buffers as u64);
    options.set_db_write_buffer_size(memory.write_buffers);
    options.set_wal_bytes_per_sync(0);
    options.set_bytes_per_sync(1 << 20);
    options.set_max_background_jobs(2);
    options.set_max_open_files(512);
    options.set_keep_log_file_num(4);
    options.set_max_log_file_size(16 << 20);
    options
}

fn family_options(family: Family, memory: Memory, cache: &Cache) -> Options {
    let mut table = BlockBasedOptions::default();
    table.set_block_cache(cache);
    table.set_bloom_filter(10.0, false);
    table.set_block_size(16 << 10);
    let mut options = Options::default();
    options.set_block_based_table_factory(&table);
    options.set_compression_type(rocksdb::DBCompressionType::Lz4);
    options.set_level_compaction_dynamic_level_bytes(true);
    let (share, most) = if family == families::META { (32, 8 << 20) } else { (4, 64 << 20) };
    options.set_write_buffer_size((memory.write_buffers / share).min(most));
    options.set_max_write_buffer_number(4);
    options
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATA: Family = Family("data");

    #[test]
    fn a_bound_has_a_key_below_it_that_is_above_all_others() {
        let end = [0, 6];
        let last = just_below(&end);
        assert!(last[..] < end[..] && last[..] > [0, 5, 0xff, 0xff][..] && last[..] > [0, 5][..]);
        assert_eq!(just_below(&[1, 0]), [1]);
        assert_eq!(just_below(&[]), Vec::<u8>::new());
    }

    #[tokio::test]
    async fn what_follows_a_span_stays_when_its_space_is_given_back() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(folder.path(), "a test", &[DATA], Memory::default()).expect("a new folder");
        let (own, next) = ([0, 5], [0, 6]);
        let mut batch = store.batch();
        batch.put(DATA, &own, b"mine");
        batch.put(DATA, &next, b"theirs");
        batch.commit().expect("written");
        // Both in one file, whose last key is the end of the span.
        store.database().compact_range_cf(store.handle(DATA), None::<&[u8]>, None::<&[u8]>);
        let span = Span { family: DATA, start: own.to_vec(), end: next.to_vec() };
        store.reclaim(vec![span]).await.expect("readable");
        let theirs = store.get(DATA, &next).expect("readable");
        assert_eq!(theirs.as_deref(), Some(&b"theirs"[..]));
    }
}
