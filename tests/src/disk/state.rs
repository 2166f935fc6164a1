//! What a disk holds at a moment: what processes see, what is durable, and the journal between the two.
//!
//! ```text
//!   live tree  =  durable tree + journal            names and attributes
//!   live bytes =  durable bytes + dirty pages       of each file
//! ```
//!
//! The journal is one for all and in order, as that of ext4: whoever syncs anything commits all of it. Pages
//! belong to a file and only its own sync makes them durable, after the journal.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ffi::OsString;
use std::io;
use std::path::Path;
use std::time::SystemTime;

use fuser::FileType;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rustix::io::{Errno, Result};

use super::body::{Body, PAGE};
use super::store::Store;
use super::tree::{Attributes, Content, NodeId, Op, Place, Tree};
use super::{Flipped, Lost};

/// Operations that the journal may hold; with one more it is committed, as it is on any system after a while.
const OPS_MAX: usize = 10_000;

/// Pages that are written back together when there are too many dirty ones.
const PAGES_BACK: usize = 4096;

/// An entry of a folder, as it was when reading the folder began.
pub struct Entry {
    /// The name.
    pub name: OsString,
    /// Who has it.
    pub node: NodeId,
    /// What that is.
    pub kind: FileType,
}

/// What a process has open.
struct Handle {
    node: NodeId,
    entries: Vec<Entry>,
}

/// Everything that a disk holds.
pub struct State {
    store: Store,
    live: Tree,
    bodies: BTreeMap<NodeId, Body>,
    journal: VecDeque<Op>,
    /// How many operations have left the journal since the beginning.
    committed: u64,
    handles: HashMap<u64, Handle>,
    next_handle: u64,
    epoch: u64,
    dirty: usize,
    dirty_max: usize,
    writes: u64,
    chance: StdRng,
}

impl State {
    /// What a folder holds.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub fn load(backing: &Path, seed: u64, dirty_bytes_max: u64) -> io::Result<State> {
        let store = Store::load(backing)?;
        let mut state = State {
            live: store.tree().clone(),
            store,
            bodies: BTreeMap::new(),
            journal: VecDeque::new(),
            committed: 0,
            handles: HashMap::new(),
            next_handle: 0,
            epoch: 0,
            dirty: 0,
            dirty_max: usize::try_from(dirty_bytes_max / PAGE).unwrap_or(usize::MAX),
            writes: 0,
            chance: StdRng::seed_from_u64(seed),
        };
        state.begin()?;
        Ok(state)
    }

    /// Begins with what is durable.
    fn begin(&mut self) -> Result<()> {
        self.live = self.store.tree().clone();
        self.bodies = BTreeMap::new();
        for node in self.live.files() {
            self.bodies.insert(node, Body::new(self.store.size(node)?));
        }
        self.journal.clear();
        self.handles.clear();
        self.dirty = 0;
        Ok(())
    }

    /// The names as processes see them.
    pub fn tree(&self) -> &Tree {
        &self.live
    }

    /// The folder behind the disk.
    pub fn root(&self) -> &Path {
        self.store.root()
    }

    /// How many power cuts there have been. Nodes of another epoch are not the same to the kernel.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// How long a file is; 0 for others.
    pub fn size(&self, node: NodeId) -> u64 {
        self.bodies.get(&node).map_or(0, Body::size)
    }

    /// How many bytes are not durable.
    pub fn dirty_bytes(&self) -> u64 {
        self.dirty as u64 * PAGE
    }

    /// Makes something new and empty.
    ///
    /// # Errors
    /// If it cannot be there.
    pub fn create(&mut self, place: Place, content: Content, attributes: Attributes) -> Result<NodeId> {
        let node = self.store.fresh();
        let file = matches!(content, Content::File);
        self.change(Op::Create { place, node, content, attributes })?;
        if file {
            self.bodies.insert(node, Body::default());
        }
        Ok(node)
    }

    /// Changes names or attributes, and writes it to the journal.
    ///
    /// # Errors
    /// If that is not possible.
    pub fn change(&mut self, op: Op) -> Result<()> {
        self.live.check(&op)?;
        let nameless = self.live.apply(&op);
        self.note(op)?;
        if let Some(node) = nameless {
            self.forget_unused(node);
        }
        Ok(())
    }

    /// Cuts a file off or extends it by zeros.
    ///
    /// # Errors
    /// If it is no file.
    pub fn resize(&mut self, node: NodeId, size: u64) -> Result<()> {
        self.body(node)?;
        let sequence = self.committed + self.journal.len() as u64 + 1;
        self.on_body(node, |body| {
            body.resize(sequence, size);
            Ok(())
        })?;
        self.touch(node);
        self.note(Op::Resize { node, size })
    }

    fn note(&mut self, op: Op) -> Result<()> {
        self.journal.push_back(op);
        if self.journal.len() > OPS_MAX { self.commit() } else { Ok(()) }
    }

    /// Opens a file or a folder.
    ///
    /// # Errors
    /// If there is none.
    pub fn open(&mut self, node: NodeId) -> Result<u64> {
        self.live.node(node)?;
        if let Some(body) = self.bodies.get_mut(&node) {
            body.handles += 1;
        }
        self.next_handle += 1;
        self.handles.insert(self.next_handle, Handle { node, entries: Vec::new() });
        Ok(self.next_handle)
    }

    /// Closes it. One from before a power cut is closed already.
    pub fn close(&mut self, handle: u64) {
        let Some(Handle { node, .. }) = self.handles.remove(&handle) else { return };
        if let Some(body) = self.bodies.get_mut(&node) {
            body.handles -= 1;
        }
        self.forget_unused(node);
    }

    /// Who is open.
    ///
    /// # Errors
    /// `EIO` if the power has been cut since it was opened.
    pub fn opened(&self, handle: u64) -> Result<NodeId> {
        self.handles.get(&handle).map(|handle| handle.node).ok_or(Errno::IO)
    }

    /// What is in an open folder. It stays as it is until it is read from the beginning again.
    ///
    /// # Errors
    /// `EIO` if the power has been cut since it was opened.
    pub fn list(&mut self, handle: u64, offset: u64) -> Result<&[Entry]> {
        let handle = self.handles.get_mut(&handle).ok_or(Errno::IO)?;
        if offset == 0 {
            let entry = |(name, node): (&OsString, &NodeId)| {
                let kind = self.live.node(*node)?.content.kind();
                Ok(Entry { name: name.clone(), node: *node, kind })
            };
            handle.entries = self.live.entries(handle.node)?.iter().map(entry).collect::<Result<_>>()?;
        }
        Ok(handle.entries.get(offset as usize..).unwrap_or_default())
    }

    /// Reads from a file.
    ///
    /// # Errors
    /// If it is none, or the folder cannot be read.
    pub fn read(&mut self, node: NodeId, offset: u64, length: usize) -> Result<Vec<u8>> {
        self.on_body(node, |body| body.read(offset, length))
    }

    /// Whether a write up to here needs space.
    pub fn allocates(&self, node: NodeId, end: u64) -> bool {
        self.bodies.get(&node).is_some_and(|body| body.allocates(end))
    }

    /// Writes to a file, in memory.
    ///
    /// # Errors
    /// If it is none, or the folder cannot be read, or it does not take what is too much for the memory.
    pub fn write(&mut self, node: NodeId, offset: u64, data: &[u8]) -> Result<()> {
        self.on_body(node, |body| body.write(offset, data))?;
        self.dirtied(node)
    }

    /// Makes a range of a file zeros.
    ///
    /// # Errors
    /// Those of writing.
    pub fn punch(&mut self, node: NodeId, offset: u64, length: u64) -> Result<()> {
        self.on_body(node, |body| body.punch(offset, length))?;
        self.dirtied(node)
    }

    fn dirtied(&mut self, node: NodeId) -> Result<()> {
        self.touch(node);
        self.writes += 1;
        let now = self.writes;
        self.body(node)?.dirty_since.get_or_insert(now);
        while self.dirty > self.dirty_max {
            let since = |body: &Body| body.dirty_since.filter(|_| body.dirty_pages() > 0);
            let oldest = self.bodies.iter().filter_map(|(node, body)| Some((since(body)?, *node))).min();
            let Some((_, oldest)) = oldest else { break };
            self.commit()?;
            let before = self.dirty;
            self.on_body(oldest, |body| body.write_back(PAGES_BACK))?;
            assert!(self.dirty < before, "{oldest:?} is in the folder once the journal is committed");
        }
        Ok(())
    }

    /// Makes a file durable: first the journal, then its pages and its size.
    ///
    /// # Errors
    /// If the folder does not take it.
    pub fn sync(&mut self, node: NodeId) -> Result<()> {
        self.commit()?;
        if self.bodies.contains_key(&node) {
            self.on_body(node, |body| body.write_back(usize::MAX))?;
        }
        if let Ok(live) = self.live.node(node) {
            self.store.set_attributes(node, live.attributes);
        }
        Ok(())
    }

    /// Makes everything durable.
    ///
    /// # Errors
    /// If the folder does not take it.
    pub fn sync_all(&mut self) -> Result<()> {
        self.commit()?;
        self.files().into_iter().try_for_each(|node| self.sync(node))
    }

    /// Loses the dirty pages of a file, as Linux does after it could not write them.
    pub fn forget_dirty(&mut self, node: NodeId) {
        if let Some(body) = self.bodies.get_mut(&node) {
            self.dirty -= body.dirty_pages();
            body.forget_dirty();
        }
    }

    /// Makes all changes of names, attributes and sizes durable, in order.
    ///
    /// # Errors
    /// If the folder does not take one. That one and those after it are still in the journal.
    pub fn commit(&mut self) -> Result<()> {
        while !self.journal.is_empty() {
            self.commit_one()?;
        }
        Ok(())
    }

    fn commit_one(&mut self) -> Result<()> {
        let Some(op) = self.journal.front().cloned() else { return Ok(()) };
        let sequence = self.committed + 1;
        match &op {
            Op::Resize { node, size } => {
                let (node, size) = (*node, *size);
                if self.bodies.contains_key(&node) {
                    self.on_body(node, |body| body.commit_resize(sequence))?;
                } else if let Some(file) = self.store.open(node)? {
                    file.set_len(size).map_err(super::store::errno)?;
                }
            }
            Op::Remove { place: lost } | Op::Rename { to: lost, .. } => {
                // Who has it open reads on after its last name is gone, so it must be open here too.
                if let Ok(node) = self.store.tree().lookup(lost)
                    && self.bodies.get(&node).is_some_and(|body| body.handles > 0)
                {
                    self.on_body(node, |_| Ok(()))?;
                }
                self.store.apply(&op)?;
            }
            Op::Create { .. } | Op::Link { .. } | Op::Change { .. } => self.store.apply(&op)?,
        }
        self.journal.pop_front();
        self.committed = sequence;
        Ok(())
    }

    /// Forgets everything that is not durable, but for what reaches the folder by chance.
    ///
    /// # Errors
    /// If the folder does not take it. Then this disk is of no more use.
    pub fn power_cut(&mut self) -> Result<Lost> {
        let kept = self.chance.random_range(0..=self.journal.len());
        for _ in 0..kept {
            self.commit_one()?;
        }
        let mut lost = Lost { metadata_ops: self.journal.len() as u64, ..Lost::default() };
        let mut bodies = std::mem::take(&mut self.bodies);
        for (node, body) in &mut bodies {
            // One that was open when its last name went is gone, whatever was written to it.
            let named = self.store.tree().node(*node).is_ok();
            body.attach(if named { self.store.open(*node)? } else { None });
            body.crash(self.committed, &mut self.chance, &mut lost)?;
        }
        self.epoch += 1;
        self.begin()?;
        Ok(lost)
    }

    /// Flips one bit of one of the durable files that are called so.
    ///
    /// # Errors
    /// If the folder cannot be read or does not take it.
    pub fn flip(&mut self, suffix: &str) -> Result<Option<(NodeId, Flipped)>> {
        let named = |node: &NodeId| self.live.is_called(*node, suffix);
        let mut nodes: Vec<NodeId> = self.store.tree().files().filter(named).collect();
        nodes.sort();
        while !nodes.is_empty() {
            let node = nodes.swap_remove(self.chance.random_range(0..nodes.len()));
            let mut chance = StdRng::seed_from_u64(self.chance.random());
            let flipped = self.on_body(node, |body| body.flip(&mut chance))?;
            if let (Some((offset, bit)), Some(path)) = (flipped, self.live.path(node)) {
                return Ok(Some((node, Flipped { path, offset, bit })));
            }
        }
        Ok(None)
    }

    /// Flips a bit again, in memory and in the folder. `None` if there is no such byte.
    ///
    /// # Errors
    /// If the folder cannot be read or does not take it.
    pub fn repair(&mut self, flipped: &Flipped) -> Result<Option<NodeId>> {
        let path = flipped.path.as_path();
        let Some(node) = self.files().into_iter().find(|node| self.live.path(*node).as_deref() == Some(path))
        else {
            return Ok(None);
        };
        let byte = self.read(node, flipped.offset, 1)?;
        let Some(byte) = byte.first() else { return Ok(None) };
        self.write(node, flipped.offset, &[byte ^ (1 << flipped.bit)])?;
        self.sync(node)?;
        Ok(Some(node))
    }

    /// All files that have a name.
    pub fn files(&self) -> Vec<NodeId> {
        self.live.files().collect()
    }

    /// The file has changed now.
    fn touch(&mut self, node: NodeId) {
        if let Some(node) = self.live.node_mut(node) {
            node.attributes.modified = SystemTime::now();
        }
    }

    fn body(&mut self, node: NodeId) -> Result<&mut Body> {
        self.bodies.get_mut(&node).ok_or(Errno::STALE)
    }

    /// Does something with the bytes of a file while the file in the folder is open, and counts its dirty
    /// pages.
    fn on_body<T>(&mut self, node: NodeId, f: impl FnOnce(&mut Body) -> Result<T>) -> Result<T> {
        let body = self.bodies.get_mut(&node).ok_or(Errno::STALE)?;
        if !body.is_attached() {
            body.attach(self.store.open(node)?);
        }
        let before = body.dirty_pages();
        let outcome = f(body);
        self.dirty = self.dirty + body.dirty_pages() - before;
        // Only what processes have open stays open: there may be more files than descriptors.
        if body.handles == 0 {
            body.attach(None);
        }
        outcome
    }

    /// Forgets one that has neither a name nor a handle.
    fn forget_unused(&mut self, node: NodeId) {
        let handles = self.bodies.get(&node).map_or(0, |body| body.handles);
        let nameless = self.live.node(node).is_ok_and(|node| node.names.is_empty());
        if let Some(body) = self.bodies.get_mut(&node)
            && handles == 0
        {
            body.attach(None);
        }
        if nameless && handles == 0 && node != super::tree::ROOT {
            self.live.forget(node);
            if let Some(body) = self.bodies.remove(&node) {
                self.dirty -= body.dirty_pages();
            }
        }
    }
}
