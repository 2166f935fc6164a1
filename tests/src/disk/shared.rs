//! What processes ask for, and the faults that come between.

use std::io;
use std::path::Path;
use std::time::SystemTime;

use fuser::RenameFlags;
use parking_lot::Mutex;
use rustix::fs::FallocateFlags;
use rustix::io::{Errno, Result};

use super::Options;
use super::faults::Faults;
use super::state::State;
use super::store::PERMISSIONS;
use super::tree::{Attributes, Content, NodeId, Op, Place};

/// What the threads of a disk share.
pub struct Shared {
    /// What it holds.
    pub state: Mutex<State>,
    /// Its faults.
    pub faults: Faults,
    /// Whether syncs do nothing and say that they have done it.
    pub ignore_syncs: bool,
}

impl Shared {
    /// What a folder holds, without faults.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub fn load(backing: &Path, seed: u64, options: Options) -> io::Result<Shared> {
        let state = Mutex::new(State::load(backing, seed, options.dirty_bytes_max)?);
        Ok(Shared { state, faults: Faults::new(seed), ignore_syncs: options.ignore_syncs })
    }

    fn full(&self) -> Result<()> {
        if self.faults.strike_full() { Err(Errno::NOSPC) } else { Ok(()) }
    }

    /// Makes something new and empty, owned by a user and a group.
    ///
    /// # Errors
    /// Those of the system call, and those of faults.
    pub fn create(&self, place: Place, content: Content, mode: u32, owner: (u32, u32)) -> Result<NodeId> {
        let now = SystemTime::now();
        let (mode, (uid, gid)) = (mode & PERMISSIONS, owner);
        let attributes = Attributes { mode, uid, gid, accessed: now, modified: now };
        // A name that is taken is told first, as by any system.
        let mut state = self.state.lock();
        match state.tree().lookup(&place) {
            Err(Errno::NOENT) => self.full()?,
            Err(errno) => return Err(errno),
            Ok(_) => return Err(Errno::EXIST),
        }
        state.create(place, content, attributes)
    }

    /// Deletes a name: that of an empty folder, or that of something else.
    ///
    /// # Errors
    /// Those of the system call, and those of faults.
    pub fn remove(&self, place: Place, folder: bool) -> Result<()> {
        let mut state = self.state.lock();
        let content = &state.tree().node(state.tree().lookup(&place)?)?.content;
        match (folder, matches!(content, Content::Folder(_))) {
            (true, false) => Err(Errno::NOTDIR),
            (false, true) => Err(Errno::ISDIR),
            (true, true) | (false, false) => state.change(Op::Remove { place }),
        }
    }

    /// Renames something, and replaces what has the new name if the flags allow it.
    ///
    /// # Errors
    /// Those of the system call, and those of faults.
    pub fn rename(&self, from: Place, to: Place, flags: RenameFlags) -> Result<()> {
        let mut state = self.state.lock();
        if !(flags - RenameFlags::RENAME_NOREPLACE).is_empty() {
            return Err(Errno::INVAL);
        }
        if flags.contains(RenameFlags::RENAME_NOREPLACE) && state.tree().lookup(&to).is_ok() {
            return Err(Errno::EXIST);
        }
        state.change(Op::Rename { from, to })
    }

    /// Gives a file one more name.
    ///
    /// # Errors
    /// Those of the system call, and those of faults.
    pub fn link(&self, node: NodeId, place: Place) -> Result<()> {
        let mut state = self.state.lock();
        // One that has lost its names stays without: its file in the folder may be gone.
        if state.tree().node(node)?.names.is_empty() {
            return Err(Errno::NOENT);
        }
        if state.tree().lookup(&place) == Err(Errno::NOENT) {
            self.full()?;
        }
        state.change(Op::Link { node, place })
    }

    /// Reads from an open file as much as there is.
    ///
    /// # Errors
    /// Those of the system call, and those of faults.
    pub fn read(&self, handle: u64, offset: u64, length: usize) -> Result<Vec<u8>> {
        let mut state = self.state.lock();
        let node = state.opened(handle)?;
        if self.faults.strike_read(|suffix| state.tree().is_called(node, suffix)) {
            return Err(Errno::IO);
        }
        state.read(node, offset, length)
    }

    /// Writes to an open file.
    ///
    /// # Errors
    /// Those of the system call, and those of faults.
    pub fn write(&self, handle: u64, offset: u64, data: &[u8]) -> Result<()> {
        let mut state = self.state.lock();
        let node = state.opened(handle)?;
        if state.allocates(node, offset.saturating_add(data.len() as u64)) {
            self.full()?;
        }
        state.write(node, offset, data)
    }

    /// Makes an open file or folder durable.
    ///
    /// # Errors
    /// Those of the system call, and those of faults.
    pub fn sync(&self, handle: u64) -> Result<()> {
        let mut state = self.state.lock();
        let node = state.opened(handle)?;
        if self.faults.strike_sync() {
            state.forget_dirty(node);
            return Err(Errno::IO);
        }
        if self.ignore_syncs { Ok(()) } else { state.sync(node) }
    }

    /// Reserves space in an open file, or makes a range of it zeros.
    ///
    /// # Errors
    /// Those of the system call, and those of faults.
    pub fn allocate(&self, handle: u64, offset: u64, length: u64, mode: FallocateFlags) -> Result<()> {
        let mut state = self.state.lock();
        let node = state.opened(handle)?;
        let end = offset.saturating_add(length);
        let keep_size = mode.contains(FallocateFlags::KEEP_SIZE);
        match mode - FallocateFlags::KEEP_SIZE {
            FallocateFlags::PUNCH_HOLE if keep_size => state.punch(node, offset, length),
            plain if plain.is_empty() => {
                if state.allocates(node, end) {
                    self.full()?;
                }
                if !keep_size && end > state.size(node) { state.resize(node, end) } else { Ok(()) }
            }
            _ => Err(Errno::OPNOTSUPP),
        }
    }
}
