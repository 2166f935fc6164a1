//! What must be there after a power cut: how a log that is torn is told from one that is damaged.
//!
//! After a power cut RocksDB's write-ahead log ends in what the disk had happened to write of that which was
//! not synced. Pages may be missing there, with others behind them. That is no damage: nobody was told that it
//! was written. A page that is missing of what was synced is damage, and whoever goes on without it forgets a
//! promise. RocksDB cannot tell one from the other. So the log writer counts the batches that it syncs: in the
//! database, as a part of each, and then in a file beside it, the mark. What the database holds must never be
//! less than what the mark says.
//!
//! ```text
//!   write-ahead log   … | batch 41 | batch 42 |  lost  | something        mark: 42
//!                                  ▲
//!                          synced up to here: opened, without the rest
//!
//!   write-ahead log   … | batch 41 |  lost  | batch 43 |                  mark: 43
//!                       damaged: refused, and left as it is
//! ```
//!
//! The mark is written after each sync and synced now and then. The end of a process does not lose it, and a
//! power cut leaves an old one. So only damage that comes with a power cut, and to what was written since then,
//! stays unseen.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rocksdb::{ColumnFamilyDescriptor, DB, DBRecoveryMode, Options};
use xxhash_rust::xxh3::xxh3_64;

use crate::rocks::families;

/// The file beside the database: `[ batches u64 | xxh3 u64 ]`, big-endian.
pub(crate) const MARK: &str = "synced";

/// How old a mark may become that a power cut leaves.
const MARK_SYNC_INTERVAL: Duration = Duration::from_secs(10);

/// How long a lock is waited for. A process that is being started by this one has all its files until it has
/// become another program, those too that were closed in the meantime.
const LOCK_PATIENCE: Duration = Duration::from_millis(300);
const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// Where the database counts: in [`families::META`], after the keys of all groups.
pub(crate) const COUNT_KEY: &[u8] = b"\xff\xff\xff\xffsynced";

/// The number of batches that were synced, beside the database that they were written to. Whoever has it has the
/// folder for himself.
pub(crate) struct Mark {
    file: File,
    count: u64,
    synced_at: Instant,
}

impl Mark {
    /// Opens the mark in a folder, or makes one that says nothing. `None` if somebody else has it.
    pub(crate) fn lock(folder: &Path) -> io::Result<Option<Mark>> {
        let path = folder.join(MARK);
        let file = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path)?;
        let deadline = Instant::now() + LOCK_PATIENCE;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Some(Mark { file, count: 0, synced_at: Instant::now() })),
                Err(TryLockError::Error(error)) => return Err(error),
                Err(TryLockError::WouldBlock) if Instant::now() > deadline => return Ok(None),
                Err(TryLockError::WouldBlock) => thread::sleep(LOCK_PAUSE),
            }
        }
    }

    /// What it says; `None` if that is nothing, or cannot be understood.
    pub(crate) fn read(&self) -> io::Result<Option<u64>> {
        let mut bytes = [0; 16];
        match self.file.read_exact_at(&mut bytes, 0) {
            Ok(()) => Ok(understood(&bytes)),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// From now on it says this, and it is there after a power cut.
    pub(crate) fn set(&mut self, folder: &Path, count: u64) -> io::Result<()> {
        self.count = count;
        self.write()?;
        self.file.sync_all()?;
        File::open(folder)?.sync_all()
    }

    /// How many batches were synced.
    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    /// One more batch was synced.
    pub(crate) fn advance(&mut self) -> io::Result<()> {
        self.count += 1;
        self.write()?;
        if self.synced_at.elapsed() >= MARK_SYNC_INTERVAL {
            self.synced_at = Instant::now();
            self.file.sync_data()?;
        }
        Ok(())
    }

    fn write(&mut self) -> io::Result<()> {
        self.file.write_all_at(&sealed(self.count), 0)
    }
}

/// Whether a folder has a database and no mark. One has both, or neither, or a mark alone if it was being made.
pub(crate) fn is_unmarked(folder: &Path) -> bool {
    folder.join("CURRENT").exists() && !folder.join(MARK).exists()
}

/// A count and its checksum.
pub(crate) fn sealed(count: u64) -> [u8; 16] {
    let (mut bytes, count) = ([0; 16], count.to_be_bytes());
    bytes[..8].copy_from_slice(&count);
    bytes[8..].copy_from_slice(&xxh3_64(&count).to_be_bytes());
    bytes
}

/// The count, if the checksum is its own.
pub(crate) fn understood(bytes: &[u8; 16]) -> Option<u64> {
    let (count, sum) = bytes.split_at(8);
    (xxh3_64(count).to_be_bytes() == sum).then(|| u64::from_be_bytes(count.try_into().expect("eight bytes")))
}

/// How many batches a database has counted.
pub(crate) fn counted(stored: Option<&[u8]>) -> u64 {
    stored.and_then(|count| count.try_into().ok()).map_or(0, u64::from_be_bytes)
}

/// Why a database must not be opened.
pub(crate) enum Refusal {
    /// It cannot be read.
    Unreadable(rocksdb::Error),
    /// So many batches are there, and some that were synced are not.
    Lost(u64),
}

/// Looks into a database, without changing it, whether all is there that was synced, and tells how to open it.
pub(crate) fn inspect(folder: &Path, synced: u64) -> Result<DBRecoveryMode, Refusal> {
    // Whatever is damaged is seen, but for one record that is cut off at the very end.
    let strict = DBRecoveryMode::TolerateCorruptedTailRecords;
    // Up to what is damaged, and nothing of what comes behind.
    let torn = DBRecoveryMode::PointInTime;
    let (mode, count) = match look(folder, strict) {
        Ok(count) => (strict, count),
        Err(error) if error.kind() == rocksdb::ErrorKind::Corruption => match look(folder, torn) {
            Ok(count) => (torn, count),
            Err(_) => return Err(Refusal::Unreadable(error)),
        },
        Err(error) => return Err(Refusal::Unreadable(error)),
    };
    if count < synced {
        return Err(Refusal::Lost(count));
    }
    if mode == torn {
        tracing::warn!(count, "the write-ahead log ends in what was not synced; that is left out");
    }
    Ok(mode)
}

/// Whether the database in a folder has counted anything, as far as it can be read. Not if it was being made.
pub(crate) fn has_counted(folder: &Path) -> bool {
    let modes = [DBRecoveryMode::TolerateCorruptedTailRecords, DBRecoveryMode::PointInTime];
    modes.into_iter().any(|mode| look(folder, mode).is_ok_and(|count| count > 0))
}

fn look(folder: &Path, mode: DBRecoveryMode) -> Result<u64, rocksdb::Error> {
    let mut options = Options::default();
    options.set_wal_recovery_mode(mode);
    // Whoever opened it for writing did, and where RocksDB only reads it crashes if it is to forget that
    // (<https://github.com/facebook/rocksdb/issues/13235>).
    options.set_track_and_verify_wals_in_manifest(true);
    let meta = ColumnFamilyDescriptor::new(families::META.0, Options::default());
    let db = DB::open_cf_descriptors_read_only(&options, folder, [meta], false)?;
    let handle = db.cf_handle(families::META.0).expect("it was opened with it");
    let stored = db.get_cf(handle, COUNT_KEY)?;
    Ok(counted(stored.as_deref()))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use rocksdb::WriteBatch;
    use troth_protocol::process::Memory;

    use super::*;
    use crate::log::LogWriter;
    use crate::rocks::{Family, OpenError, Store};

    const OWNER: &str = "somebody";
    const PAGE: usize = 4096;

    fn open(folder: &Path) -> Result<Store, OpenError> {
        Store::open(folder, OWNER, &[], Memory::default())
    }

    fn mark(folder: &Path) -> Option<u64> {
        Mark::lock(folder).expect("a folder").expect("nobody has it").read().expect("readable")
    }

    fn key(number: u8) -> Vec<u8> {
        vec![0, 0, 0, 0, number]
    }

    /// The write-ahead logs, the newest last.
    fn logs(folder: &Path) -> Vec<PathBuf> {
        let paths = fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path());
        let mut logs: Vec<PathBuf> =
            paths.filter(|path| path.extension().is_some_and(|kind| kind == "log")).collect();
        logs.sort();
        logs
    }

    /// Two values of three pages each are written and synced; then one more, and that is not. Returns the
    /// write-ahead log, and how long it was when it was synced.
    async fn written(folder: &Path) -> (PathBuf, usize) {
        let store = open(folder).expect("a new folder");
        let writer = LogWriter::start(&store);
        for number in 1..=2 {
            let value = vec![number; 3 * PAGE];
            writer.put_durably(families::META, &key(number), value).await.expect("written");
        }
        let log = logs(folder).pop().expect("there is a write-ahead log");
        let synced = fs::metadata(&log).expect("it is there").len() as usize;
        let mut batch = WriteBatch::default();
        store.put(&mut batch, families::META, &key(3), &[3; 3 * PAGE]);
        store.write(batch).expect("written");
        drop(writer);
        store.closed().await;
        assert!(fs::metadata(&log).expect("it is there").len() as usize > synced + 2 * PAGE);
        (log, synced)
    }

    /// A page is missing, and what comes behind it is there.
    fn tear(log: &Path, at: usize) {
        let mut bytes = fs::read(log).expect("it is there");
        bytes[at..at + PAGE].fill(0);
        fs::write(log, bytes).expect("written");
    }

    fn values(store: &Store) -> Vec<u8> {
        let there = |number: &u8| store.get(families::META, &key(*number)).expect("readable").is_some();
        (1..=3).filter(there).collect()
    }

    #[tokio::test]
    async fn what_was_not_synced_may_be_torn() {
        let folder = tempfile::tempdir().expect("a folder");
        let (log, synced) = written(folder.path()).await;
        tear(&log, synced + 100);
        let store = open(folder.path()).expect("all is there that was synced");
        assert_eq!(values(&store), [1, 2]);
        store.closed().await;
        let again = open(folder.path()).expect("it is whole now");
        assert_eq!(values(&again), [1, 2]);
    }

    #[tokio::test]
    async fn what_was_synced_may_not_and_is_left_as_it_is() {
        let folder = tempfile::tempdir().expect("a folder");
        let (log, synced) = written(folder.path()).await;
        let whole = fs::read(&log).expect("it is there");
        for damage in [synced - PAGE - 10, synced - 2 * PAGE, PAGE] {
            tear(&log, damage);
            let damaged = fs::read(&log).expect("it is there");
            for _ in 0..2 {
                let refused = open(folder.path()).err().expect("refused").to_string();
                assert!(refused.contains("has lost what was synced"), "{refused}");
            }
            assert!(fs::read(&log).expect("it is there") == damaged, "it was changed");
        }
        // Cut off, which RocksDB alone takes for a write that did not end.
        fs::write(&log, &whole[..synced - 10]).expect("written");
        let refused = open(folder.path()).err().expect("refused").to_string();
        assert!(refused.contains("has lost what was synced"), "{refused}");
        // Put back as it was, it is as if nothing had happened.
        fs::write(&log, whole).expect("written");
        assert_eq!(values(&open(folder.path()).expect("whole")), [1, 2, 3]);
    }

    #[tokio::test]
    async fn it_opens_with_a_write_ahead_log_that_was_closed() {
        let folder = tempfile::tempdir().expect("a folder");
        open(folder.path()).expect("a new folder").closed().await;
        let mut options = Options::default();
        options.set_track_and_verify_wals_in_manifest(true);
        let names = families::ALL.map(|family| family.0);
        let db =
            DB::open_cf(&options, folder.path(), ["default"].into_iter().chain(names)).expect("it opens");
        let family = |family: Family| db.cf_handle(family.0).expect("it was opened with it");
        // One family goes into a table and begins another log; the other still needs the one before.
        db.put_cf(family(families::META), key(1), [1]).expect("written");
        db.put_cf(family(families::LOG), key(1), [1]).expect("written");
        db.flush_cf(family(families::LOG)).expect("flushed");
        db.put_cf(family(families::META), key(2), [2]).expect("written");
        drop(db);
        assert_eq!(logs(folder.path()).len(), 2);
        let store = open(folder.path()).expect("nothing is wrong");
        assert_eq!(values(&store), [1, 2]);
    }

    #[tokio::test]
    async fn a_used_folder_without_a_mark_is_refused_however_often_it_is_tried() {
        let folder = tempfile::tempdir().expect("a folder");
        let (log, _) = written(folder.path()).await;
        let kept = fs::read(folder.path().join(MARK)).expect("it is there");
        let refused = || {
            let refusal = open(folder.path()).err().expect("refused").to_string();
            assert!(refusal.contains("`synced` is gone or damaged"), "{refusal}");
        };
        for damaged in [&[1; 16][..], &[]] {
            fs::write(folder.path().join(MARK), damaged).expect("written");
            assert_eq!(mark(folder.path()), None);
            (0..2).for_each(|_| refused());
        }
        fs::remove_file(folder.path().join(MARK)).expect("it was there");
        (0..2).for_each(|_| refused());
        // Nor does the folder forget, without a word, what was in a log that is gone as well.
        let away = folder.path().with_extension("log");
        fs::rename(&log, &away).expect("moved");
        refused();
        fs::rename(&away, &log).expect("moved back");
        fs::write(folder.path().join(MARK), kept).expect("written");
        let store = open(folder.path()).expect("whole");
        assert_eq!((values(&store), store.progress()), (vec![1, 2, 3], 2));
        assert!(Mark::lock(folder.path()).expect("a folder").is_none(), "it is the store's");
        store.closed().await;
        assert_eq!(mark(folder.path()), Some(2));
    }

    #[test]
    fn a_folder_that_was_being_made_is_opened() {
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join(MARK), []).expect("written");
        drop(open(folder.path()).expect("there is nothing yet"));
        // And one whose mark was not written when the database was.
        fs::write(folder.path().join(MARK), []).expect("written");
        open(folder.path()).expect("nothing was synced yet");
    }
}
