//! A disk in a temporary folder.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use troth_tests::disk::{Disk, Options};

/// A disk, and the folder that it is over.
pub struct Scene {
    pub disk: Disk,
    pub backing: PathBuf,
    _folder: TempDir,
}

impl Scene {
    pub fn new(seed: u64) -> Scene {
        Scene::with(seed, Options::default())
    }

    pub fn with(seed: u64, options: Options) -> Scene {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (backing, mountpoint) = folders(folder.path());
        let disk = Disk::mount_with(&backing, &mountpoint, seed, options).expect("it mounts");
        Scene { disk, backing, _folder: folder }
    }

    /// A path on the disk.
    pub fn at(&self, name: &str) -> PathBuf {
        self.disk.path().join(name)
    }

    /// What a file on the disk holds.
    pub fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        fs::read(self.at(name))
    }

    /// The names in a folder of the disk.
    pub fn names(&self, folder: &str) -> Vec<String> {
        names(&self.at(folder))
    }

    /// Creates a file, writes to it, and leaves it unsynced.
    pub fn write(&self, name: &str, bytes: &[u8]) -> File {
        let file = create(&self.at(name));
        file.write_all_at(bytes, 0).expect("it is written");
        file
    }

    /// The same, and syncs it.
    pub fn write_synced(&self, name: &str, bytes: &[u8]) -> File {
        let file = self.write(name, bytes);
        file.sync_all().expect("it is synced");
        file
    }

    /// Syncs the root.
    pub fn sync_folder(&self) {
        File::open(self.disk.path()).and_then(|folder| folder.sync_all()).expect("it is synced");
    }
}

/// What is behind a disk and where it is mounted, in a folder.
pub fn folders(folder: &Path) -> (PathBuf, PathBuf) {
    let (backing, mountpoint) = (folder.join("backing"), folder.join("disk"));
    fs::create_dir_all(&backing).expect("a folder");
    fs::create_dir_all(&mountpoint).expect("a folder");
    (backing, mountpoint)
}

pub fn create(path: &Path) -> File {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(true).open(path).expect("it is created")
}

pub fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).expect("a folder");
    let name = |entry: io::Result<fs::DirEntry>| entry.expect("an entry").file_name().into_string();
    let mut names: Vec<String> = entries.map(name).map(|name| name.expect("UTF-8")).collect();
    names.sort();
    names
}

/// The number of an error.
pub fn errno<T>(outcome: io::Result<T>) -> Option<i32> {
    outcome.err().and_then(|error| error.raw_os_error())
}

pub const EIO: Option<i32> = Some(5);
pub const ENOSPC: Option<i32> = Some(28);
pub const ENOTCONN: Option<i32> = Some(107);
pub const ECONNABORTED: Option<i32> = Some(103);
