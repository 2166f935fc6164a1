//! The folder behind a disk: what is durable, and nothing else.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, utimensat};
use rustix::io::{Errno, Result};

use super::tree::{Attributes, Content, NodeId, Op, Place, ROOT, Tree};

/// The bits of a mode that are permissions.
pub const PERMISSIONS: u32 = 0o7777;

/// A folder, and the names that are in it.
pub struct Store {
    root: PathBuf,
    tree: Tree,
    next: u64,
}

impl Store {
    /// Reads which names a folder has. What is neither file, folder nor symbolic link is not seen.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub fn load(root: &Path) -> io::Result<Store> {
        let root = root.canonicalize()?;
        let tree = Tree::new(attributes(&fs::metadata(&root)?));
        let mut store = Store { root, tree, next: ROOT.0 + 1 };
        store.load_folder(ROOT, &mut HashMap::new())?;
        Ok(store)
    }

    fn load_folder(&mut self, folder: NodeId, linked: &mut HashMap<u64, NodeId>) -> io::Result<()> {
        let path = self.path(folder).expect("it was found by its path");
        for entry in fs::read_dir(&path)? {
            let entry = entry?;
            let place = Place::new(folder, &entry.file_name());
            let metadata = entry.metadata()?;
            if let Some(node) = linked.get(&metadata.ino()) {
                self.tree.apply(&Op::Link { node: *node, place });
                continue;
            }
            let content = match metadata.file_type() {
                kind if kind.is_dir() => Content::Folder(BTreeMap::new()),
                kind if kind.is_file() => Content::File,
                kind if kind.is_symlink() => Content::Symlink(fs::read_link(entry.path())?),
                _ => continue,
            };
            let node = self.fresh();
            self.tree.apply(&Op::Create { place, node, content, attributes: attributes(&metadata) });
            if metadata.is_dir() {
                self.load_folder(node, linked)?;
            } else if metadata.nlink() > 1 {
                linked.insert(metadata.ino(), node);
            }
        }
        Ok(())
    }

    /// An identity that nobody has had.
    pub fn fresh(&mut self) -> NodeId {
        self.next += 1;
        NodeId(self.next)
    }

    /// The names that are durable.
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// Where the folder is.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// How long a file is here.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub fn size(&self, node: NodeId) -> Result<u64> {
        let Some(path) = self.path(node) else { return Ok(0) };
        Ok(fs::metadata(path).map_err(errno)?.len())
    }

    /// Opens a file, or nothing if it is not here.
    ///
    /// # Errors
    /// If the system cannot open it.
    pub fn open(&self, node: NodeId) -> Result<Option<File>> {
        let Some(path) = self.path(node) else { return Ok(None) };
        OpenOptions::new().read(true).write(true).open(path).map(Some).map_err(errno)
    }

    /// Makes a change of names or attributes durable; sizes are not its business.
    ///
    /// # Errors
    /// If the system cannot, for example because the disk that the folder is on is full. Nothing has changed.
    pub fn apply(&mut self, op: &Op) -> Result<()> {
        self.carry_out(op).map_err(errno)?;
        if let Some(nameless) = self.tree.apply(op) {
            self.tree.forget(nameless);
        }
        Ok(())
    }

    /// The times of a file that has been synced. The folder has its own.
    pub fn set_attributes(&mut self, node: NodeId, attributes: Attributes) {
        if let Some(node) = self.tree.node_mut(node) {
            node.attributes = attributes;
        }
    }

    fn carry_out(&self, op: &Op) -> io::Result<()> {
        match op {
            Op::Create { place, content, attributes, .. } => {
                let path = self.path_of(place);
                match content {
                    Content::Folder(_) => fs::create_dir(&path)?,
                    Content::File => drop(OpenOptions::new().write(true).create_new(true).open(&path)?),
                    Content::Symlink(target) => symlink(target, &path)?,
                }
                // The times are left as they are: now.
                own(&path, attributes, content)
            }
            Op::Link { node, place } => fs::hard_link(self.known(*node), self.path_of(place)),
            Op::Remove { place } => {
                let node = self.tree.lookup(place)?;
                match self.tree.node(node)?.content {
                    Content::Folder(_) => fs::remove_dir(self.path_of(place)),
                    Content::File | Content::Symlink(_) => fs::remove_file(self.path_of(place)),
                }
            }
            Op::Rename { from, to } => fs::rename(self.path_of(from), self.path_of(to)),
            Op::Change { node, attributes } => {
                let Some(path) = self.path(*node) else { return Ok(()) };
                own(&path, attributes, &self.tree.node(*node)?.content)?;
                let times = Timestamps {
                    last_access: timespec(attributes.accessed),
                    last_modification: timespec(attributes.modified),
                };
                Ok(utimensat(CWD, &path, &times, AtFlags::SYMLINK_NOFOLLOW)?)
            }
            Op::Resize { .. } => Ok(()),
        }
    }

    fn path(&self, node: NodeId) -> Option<PathBuf> {
        Some(self.root.join(self.tree.path(node)?))
    }

    fn known(&self, node: NodeId) -> PathBuf {
        self.path(node).expect("the journal is in order: what an operation needs is there")
    }

    fn path_of(&self, place: &Place) -> PathBuf {
        self.known(place.folder).join(&place.name)
    }
}

/// The error that a system call has had.
pub fn errno(error: io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

fn own(path: &Path, attributes: &Attributes, content: &Content) -> io::Result<()> {
    lchown(path, Some(attributes.uid), Some(attributes.gid))?;
    match content {
        Content::Symlink(_) => Ok(()),
        Content::Folder(_) | Content::File => {
            fs::set_permissions(path, fs::Permissions::from_mode(attributes.mode))
        }
    }
}

fn attributes(metadata: &fs::Metadata) -> Attributes {
    let time = |seconds: i64, nanoseconds: i64| {
        let seconds = Duration::from_secs(seconds.try_into().unwrap_or(0));
        SystemTime::UNIX_EPOCH + seconds + Duration::from_nanos(nanoseconds.try_into().unwrap_or(0))
    };
    Attributes {
        mode: metadata.mode() & PERMISSIONS,
        uid: metadata.uid(),
        gid: metadata.gid(),
        accessed: time(metadata.atime(), metadata.atime_nsec()),
        modified: time(metadata.mtime(), metadata.mtime_nsec()),
    }
}

/// Times before 1970 become 1970.
fn timespec(time: SystemTime) -> Timespec {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Timespec { tv_sec: since.as_secs().cast_signed(), tv_nsec: since.subsec_nanos().into() }
}
