//! The end of RocksDB's manifest after a power cut.
//!
//! The manifest is the log of which tables and write-ahead logs belong to a database. RocksDB does nothing
//! that relies on a record in it before that is synced, so the last one may be lost. It takes a manifest that
//! ends too early for what it is. But a file system may make a file as long as it was to become and write only
//! some sectors of what was appended, and the others are zeros then:
//!
//! ```text
//!   sectors     |                |                |                |
//!   manifest    | edit 40 | edit 41 | edit 42 ─────── zeros ──┤
//!                                             ▲
//!                                 cut off here: edit 42 has not ended
//! ```
//!
//! That has a wrong checksum, and RocksDB does not open it, however the write-ahead log is to be read. A
//! record that was synced whole does not end in zeros from the start of a sector on, unless the disk lost just
//! these sectors later; then RocksDB may go on without a table, and nobody can tell.
//!
//! A record that goes over from one block of 32 KiB into the next may be torn so that only its second part is
//! there. That is refused still.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// How many bytes a disk writes all or nothing of, at the least.
const SECTOR: u64 = 512;

/// How much is read at once.
const PIECE: u64 = 64 << 10;

/// Sectors of zeros that were cut off.
pub struct Torn {
    file: File,
    length: u64,
}

impl Torn {
    /// Cuts off the sectors of zeros that the manifest of a database ends in. `None` if there are none. Nobody
    /// may have the database open.
    ///
    /// # Errors
    /// If the files cannot be read or written.
    pub fn cut_off(folder: &Path) -> io::Result<Option<Torn>> {
        let Some(current) = if_there(fs::read(folder.join("CURRENT")))? else { return Ok(None) };
        let name = str::from_utf8(&current).ok().map(str::trim_end);
        let Some(name) = name.filter(|name| is_manifest(name)) else { return Ok(None) };
        let file = OpenOptions::new().read(true).write(true).open(folder.join(name));
        let Some(file) = if_there(file)? else { return Ok(None) };
        let length = file.metadata()?.len();
        let end = zeros_from(&file, length)?.next_multiple_of(SECTOR);
        if end >= length {
            return Ok(None);
        }
        file.set_len(end)?;
        file.sync_all()?;
        Ok(Some(Torn { file, length }))
    }

    /// Puts them back.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn put_back(self) -> io::Result<()> {
        self.file.set_len(self.length)?;
        self.file.sync_all()
    }
}

fn if_there<T>(outcome: io::Result<T>) -> io::Result<Option<T>> {
    match outcome {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        outcome => outcome.map(Some),
    }
}

/// Whether RocksDB would give a manifest this name.
fn is_manifest(name: &str) -> bool {
    name.strip_prefix("MANIFEST-").is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()))
}

/// From where on there is nothing but zeros.
fn zeros_from(file: &File, length: u64) -> io::Result<u64> {
    let mut bytes = vec![0; PIECE as usize];
    let mut end = length;
    while end > 0 {
        let start = (end - 1) / PIECE * PIECE;
        let piece = &mut bytes[..(end - start) as usize];
        file.read_exact_at(piece, start)?;
        if let Some(last) = piece.iter().rposition(|byte| *byte != 0) {
            return Ok(start + last as u64 + 1);
        }
        end = start;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use rocksdb::{DB, ErrorKind, Options, WriteOptions};
    use tempfile::TempDir;
    use troth_protocol::process::Memory;

    use super::*;
    use crate::rocks::{OpenError, Store, families};

    const OWNER: &str = "somebody";

    fn open(folder: &Path) -> Result<Store, OpenError> {
        Store::open(folder, OWNER, &[], Memory::default())
    }

    fn raw(folder: &Path) -> Result<DB, rocksdb::Error> {
        let families = families::ALL.iter().map(|family| family.0).chain(["default"]);
        DB::open_cf(&Options::default(), folder, families)
    }

    fn manifest(folder: &Path) -> PathBuf {
        let current = fs::read_to_string(folder.join("CURRENT")).expect("it says which");
        folder.join(current.trim_end())
    }

    /// Copies the files that are not there yet.
    fn copy(from: &Path, to: &Path) {
        for entry in fs::read_dir(from).expect("a folder") {
            let path = entry.expect("an entry").path();
            let copied = to.join(path.file_name().expect("a name"));
            if !copied.exists() {
                fs::copy(&path, copied).expect("copied");
            }
        }
    }

    fn key(number: u32) -> [u8; 8] {
        (u64::from(number)).to_be_bytes()
    }

    /// A database as a power cut leaves it while a record of the manifest is being synced that reaches into
    /// another sector, and how many keys were acknowledged.
    struct Scene {
        folder: TempDir,
        /// The manifest as it was to be, and how much of that was there before.
        whole: Vec<u8>,
        before: usize,
        keys: u32,
    }

    /// As many of these as there are, while a database writes `keys` keys, each with a flush of its own.
    fn scenes(keys: u32) -> Vec<Scene> {
        let folder = tempfile::tempdir().expect("a folder");
        drop(open(folder.path()).expect("a new folder"));
        let db = raw(folder.path()).expect("it opens");
        let family = db.cf_handle(families::META.0).expect("it was opened with it");
        let mut synced = WriteOptions::default();
        synced.set_sync(true);
        let path = manifest(folder.path());
        let mut scenes = Vec::new();
        for number in 1..=keys {
            db.put_cf_opt(family, key(number), [7; 100], &synced).expect("written");
            let before = fs::read(&path).expect("it is there");
            let copied = tempfile::tempdir().expect("a folder");
            copy(folder.path(), copied.path());
            db.flush_cf(family).expect("flushed");
            // Tables are synced before the manifest speaks of them.
            copy(folder.path(), copied.path());
            let whole = fs::read(&path).expect("it is there");
            assert!(whole.starts_with(&before) && manifest(folder.path()) == path, "it was appended to");
            let before = before.len();
            if (before as u64).next_multiple_of(SECTOR) < whole.len() as u64 {
                scenes.push(Scene { folder: copied, whole, before, keys: number });
            }
        }
        scenes
    }

    impl Scene {
        /// Where the sectors begin that have not been written.
        fn torn_at(&self) -> usize {
            (self.before as u64).next_multiple_of(SECTOR) as usize
        }

        fn torn(&self) -> Vec<u8> {
            let mut bytes = self.whole.clone();
            bytes[self.torn_at()..].fill(0);
            bytes
        }
    }

    #[test]
    fn a_record_that_is_torn_is_left_out_and_nothing_else() {
        let scenes = scenes(60);
        let mut refused = 0;
        for scene in &scenes {
            let folder = scene.folder.path();
            fs::write(manifest(folder), scene.torn()).expect("written");
            // This is what RocksDB alone makes of it.
            let copied = tempfile::tempdir().expect("a folder");
            copy(folder, copied.path());
            let alone = raw(copied.path()).err().map(|error| error.kind());
            assert!(matches!(alone, None | Some(ErrorKind::Corruption)), "{alone:?}");
            refused += u32::from(alone.is_some());
            let store = open(folder).expect("all is there that was synced");
            for number in 1..=scene.keys {
                let found = store.get(families::META, &key(number)).expect("readable");
                assert_eq!(found.as_deref(), Some(&[7; 100][..]), "{number} of {}", scene.keys);
            }
        }
        assert!(refused > 5, "{refused} of {}: this shows nothing", scenes.len());
    }

    #[test]
    fn what_is_damaged_elsewhere_is_refused_and_left_as_it_is() {
        let scene = scenes(30).pop().expect("there is one");
        let path = manifest(scene.folder.path());
        let cases = [("with an end that is torn", scene.torn()), ("with a whole one", scene.whole.clone())];
        for (case, mut bytes) in cases {
            bytes[scene.before / 2] ^= 1;
            fs::write(&path, &bytes).expect("written");
            for _ in 0..2 {
                let refusal = open(scene.folder.path()).err().expect("refused").to_string();
                assert!(refusal.contains("MANIFEST"), "{case}: {refusal}");
                assert!(fs::read(&path).expect("it is there") == bytes, "{case}: it was changed");
            }
        }
    }

    #[test]
    fn only_whole_sectors_of_zeros_are_cut_off_and_can_be_put_back() {
        let folder = tempfile::tempdir().expect("a folder");
        let sectors = |count: u64| (count * SECTOR) as usize;
        let cut = || Torn::cut_off(folder.path()).expect("readable");
        assert!(cut().is_none(), "there is no database");
        for current in ["", "\0\0\0\n", "../secret\n", "\u{fffd}", "MANIFEST-000007\n"] {
            fs::write(folder.path().join("CURRENT"), current).expect("written");
            assert!(cut().is_none(), "there is no manifest");
        }
        let path = folder.path().join("MANIFEST-000007");
        let length = || fs::metadata(&path).expect("it is there").len() as usize;
        for (bytes, zeros, left) in [
            (0, 0, 0),
            (sectors(1), 0, sectors(1)),
            (10, 20, 30),
            (10, sectors(1) - 10, sectors(1)),
            (10, sectors(1), sectors(1)),
            (sectors(1), 1, sectors(1)),
            (sectors(3) + 1, sectors(500), sectors(4)),
            (0, sectors(2), 0),
        ] {
            let whole = [vec![1; bytes], vec![0; zeros]].concat();
            fs::write(&path, &whole).expect("written");
            let torn = cut();
            assert_eq!((length(), torn.is_some()), (left, left < whole.len()), "{bytes} and {zeros}");
            if let Some(torn) = torn {
                torn.put_back().expect("written");
            }
            assert!(fs::read(&path).expect("it is there") == whole, "{bytes} and {zeros}");
        }
    }
}
