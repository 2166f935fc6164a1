//! A disk that loses what was not synced when its power is cut, and that can be full, slow and broken.
//!
//! It is a FUSE file system over a folder. The folder holds what is durable and nothing else, as plain files
//! with their names, so a look into it shows what a power cut would leave at the least. Everything else is in
//! the memory of the process that mounted it.
//!
//! ```text
//!                       write, create, rename …             fsync, fdatasync, O_DSYNC
//!   processes  ─────────────────────────────▶  memory  ─────────────────────────────▶  folder
//!                                                │
//!      SIGKILL of a process: memory stays        │  power cut: memory is gone, but for what
//!                                                └─ had happened to reach the folder
//! ```
//!
//! | module | what it is |
//! | --- | --- |
//! | `tree` | names and attributes, and the operations that change them |
//! | `body` | the bytes of one file: durable ones, and dirty pages over them |
//! | `store` | the folder |
//! | `state` | all of these together, and the journal |
//! | `faults` | what fails, and how often it did |
//! | `shared` | what a process asks for, with faults |
//! | `serve` | the same in the words of the kernel |
//! | `later` | what takes longer than it would |
//! | `mount` | mounting, unmounting, and what a killed process leaves |
//!
//! # What is durable
//! * A sync of a file makes its bytes and its size durable. So does each write to a file opened with `O_SYNC`
//!   or `O_DSYNC`. Nothing else does: not closing it, not `sync_file_range`, `syncfs` or `sync`, which do not
//!   reach FUSE.
//! * Creating, linking, renaming, deleting, changing permissions, `truncate` and `fallocate` beyond the end
//!   go to a journal. A sync of any file or folder, before all else, commits the journal. A power cut loses a
//!   suffix of it. So a file that was renamed without a sync may be there under its new name and be empty.
//! * Of dirty pages, a power cut leaves some, and of the last of them in a file only the first sectors. The
//!   file has its old length, or the new one, or something in between, and what is missing is zeros.
//! * The folder itself is not synced: this is about the power of the disk, not of the machine.
//!
//! # What it is not
//! There are no extended attributes, devices or sockets; times of folders stand still; there is one clock for
//! changes of bytes and of attributes. Requests are served under one lock, so while a large file is synced
//! others wait for as long as copying it takes; a delay of a sync or a read makes nobody else wait. The process
//! that mounts it needs a descriptor for each file that some process has open.
//!
//! # Processes
//! The process that mounts it had better not use it, at least not when somebody may kill it: a thread that
//! waits for an answer cannot be killed, and the one that would give it is dead. [`cleanup`] frees such a
//! process. Others, in other network namespaces too, use the disk as any other. A namespace of mounts made
//! before the disk is mounted sees it only if mounts are propagated there.

mod body;
mod faults;
mod later;
mod mount;
mod serve;
mod shared;
mod state;
mod store;
mod tree;

use std::io;
use std::ops::AddAssign;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use fuser::{BackgroundSession, Config, INodeNo, Session, SessionACL};

pub use self::faults::{FailReads, Struck};
pub use self::mount::cleanup;

use self::later::Later;
use self::serve::Server;
use self::shared::Shared;
use self::tree::NodeId;

/// How long a connection that has been cut may take to end.
const PATIENCE: Duration = Duration::from_secs(5);

/// How a disk is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Options {
    /// Whether syncs do nothing and say that they have done it. For tests that must notice.
    pub ignore_syncs: bool,
    /// How many bytes may be dirty. Of what is more, the oldest is made durable, as any system does after a
    /// while. So much memory it takes, and a tenth more.
    pub dirty_bytes_max: u64,
    /// How many requests are served at the same time.
    pub threads: usize,
}

impl Default for Options {
    fn default() -> Options {
        Options { ignore_syncs: false, dirty_bytes_max: 1 << 30, threads: 4 }
    }
}

/// What a power cut has lost.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Lost {
    /// Pages that did not reach the folder, or not whole.
    pub pages: u64,
    /// Bytes of these that did not.
    pub bytes: u64,
    /// Pages of which some sectors reached it and some did not.
    pub torn: u64,
    /// Operations of the journal.
    pub metadata_ops: u64,
}

impl AddAssign for Lost {
    fn add_assign(&mut self, other: Lost) {
        self.pages += other.pages;
        self.bytes += other.bytes;
        self.torn += other.torn;
        self.metadata_ops += other.metadata_ops;
    }
}

/// A bit that was flipped.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Flipped {
    /// In which file, seen from the root of the disk.
    pub path: PathBuf,
    /// In which byte of it.
    pub offset: u64,
    /// Which bit of that, between 0 and 7, the lowest first.
    pub bit: u8,
}

/// A mounted disk. It is unmounted when it is dropped, even while processes have files open there: whatever
/// they do with them fails from then on. What was not synced is lost then.
pub struct Disk {
    mountpoint: PathBuf,
    shared: Arc<Shared>,
    session: Option<BackgroundSession>,
    later: Option<JoinHandle<()>>,
}

impl Disk {
    /// Mounts a disk that holds what is in the folder `backing`. The same seed and the same calls, one after
    /// the other, lose the same.
    ///
    /// # Errors
    /// If one of the folders is not there or is in the other, or this process may not mount.
    pub fn mount(backing: &Path, mountpoint: &Path, seed: u64) -> io::Result<Disk> {
        Disk::mount_with(backing, mountpoint, seed, Options::default())
    }

    /// The same, with options.
    ///
    /// # Errors
    /// The same.
    pub fn mount_with(backing: &Path, mountpoint: &Path, seed: u64, options: Options) -> io::Result<Disk> {
        let (backing, mountpoint) = (backing.canonicalize()?, mountpoint.canonicalize()?);
        if backing.starts_with(&mountpoint) || mountpoint.starts_with(&backing) {
            let message = format!("{} and {} overlap", backing.display(), mountpoint.display());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        let shared = Arc::new(Shared::load(&backing, seed, options)?);
        let (later, thread) = Later::start()?;
        let server = Server::new(shared.clone(), later);
        let device = mount::connect(&mountpoint)?;
        // From here on, dropping it unmounts.
        let mut disk = Disk { mountpoint, shared, session: None, later: Some(thread) };
        let mut config = Config::default();
        config.n_threads = Some(options.threads.max(1));
        config.clone_fd = true;
        disk.session = Some(Session::from_fd(server, device, SessionACL::All, config)?.spawn()?);
        Ok(disk)
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.mountpoint
    }

    /// Cuts the power and turns it on again: what was not durable is forgotten, but for what happened to be.
    /// Who has a file open gets `EIO` for everything; processes are to be killed before, as they would not
    /// survive.
    ///
    /// # Panics
    /// If the folder behind the disk cannot be read or written.
    pub fn power_cut(&self) -> Lost {
        let (lost, files) = {
            let mut state = self.shared.state.lock();
            let files = state.files();
            (state.power_cut().expect("the folder behind the disk works"), files)
        };
        // Somebody may have mapped one into memory.
        files.into_iter().for_each(|node| self.invalidate(node));
        lost
    }

    /// Makes everything durable, so that the folder has what a process sees.
    ///
    /// # Panics
    /// If the folder behind the disk cannot be written.
    pub fn sync_all(&self) {
        self.shared.state.lock().sync_all().expect("the folder behind the disk works");
    }

    /// How many bytes are not durable now.
    pub fn dirty_bytes(&self) -> u64 {
        self.shared.state.lock().dirty_bytes()
    }

    /// From now on the disk is full, or is not. While it is, what needs space fails with `ENOSPC`: a new
    /// name, and a write that makes a file longer by a page or more, even if `fallocate` has reserved that
    /// space.
    pub fn set_full(&self, full: bool) {
        self.shared.faults.set_full(full);
    }

    /// From now on each sync takes so much longer. A power cut before its end finds nothing synced.
    pub fn set_sync_delay(&self, delay: Option<Duration>) {
        self.shared.faults.set_sync_delay(delay);
    }

    /// From now on each read takes so much longer.
    pub fn set_read_delay(&self, delay: Option<Duration>) {
        self.shared.faults.set_read_delay(delay);
    }

    /// From now on reads of files with a name that ends like this fail with `EIO`; those of `""` are all.
    /// Each suffix has a rule of its own, and the first that fits, in alphabetical order, is asked.
    pub fn fail_reads(&self, suffix: &str, which: FailReads) {
        self.shared.faults.fail_reads(suffix, which);
    }

    /// The next syncs, so many of them, fail with `EIO`, those of folders too, and they commit nothing. As on
    /// Linux, the dirty pages of the file are given up: the next sync succeeds without having written them.
    /// Here they are gone at once, so reads see what is durable, and zeros beyond; elsewhere they may be seen
    /// until the memory is needed. The file keeps its length.
    pub fn fail_syncs(&self, count: u64) {
        self.shared.faults.fail_syncs(count);
    }

    /// Flips one bit in one of the durable files with a name that ends like this. Every later read sees it.
    /// `None` if there is no such file, or it has no byte that is durable and not overwritten in memory.
    ///
    /// # Panics
    /// If the folder behind the disk cannot be read or written.
    pub fn flip_bit(&self, suffix: &str) -> Option<Flipped> {
        let flipped = self.shared.state.lock().flip(suffix).expect("the folder behind the disk works");
        let (node, flipped) = flipped?;
        self.shared.faults.flipped();
        self.invalidate(node);
        Some(flipped)
    }

    /// Flips a bit again that was flipped, so that it is right as if it had never been, and durable. `false` if
    /// its file is gone, or is shorter now.
    ///
    /// # Panics
    /// If the folder behind the disk cannot be read or written.
    pub fn repair(&self, flipped: &Flipped) -> bool {
        let repaired = self.shared.state.lock().repair(flipped).expect("the folder behind the disk works");
        repaired.inspect(|node| self.invalidate(*node)).is_some()
    }

    /// How often the faults have struck.
    pub fn struck(&self) -> Struck {
        self.shared.faults.struck()
    }

    /// The kernel is to forget what it has of a file that somebody has mapped into memory. No lock may be
    /// held: it may have to write it first.
    fn invalidate(&self, node: NodeId) {
        if let Some(session) = &self.session {
            // It knows no such file, or the disk has been unmounted by somebody else.
            let _ = session.notifier().inval_inode(INodeNo(node.0), 0, 0);
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // It may be that somebody has done it already.
        let _ = mount::disconnect(&self.mountpoint);
        let Some(session) = self.session.take() else { return };
        let begun = Instant::now();
        while !session.guard.is_finished() && begun.elapsed() < PATIENCE {
            sleep(Duration::from_millis(1));
        }
        // Whoever has unmounted it may have left it to those who have files open. They are served to the end.
        if session.guard.is_finished() {
            let _ = session.join();
            let _ = self.later.take().map(JoinHandle::join);
        }
    }
}
