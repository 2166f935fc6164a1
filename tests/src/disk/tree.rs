//! Names and attributes: all that a disk holds apart from the bytes of its files.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::time::SystemTime;

use fuser::FileType;
use rustix::io::{Errno, Result};

/// A file, a folder or a symbolic link, whatever its names are. Never used again for another.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct NodeId(pub u64);

/// The folder that everything is in.
pub const ROOT: NodeId = NodeId(1);

/// Where a name is.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Place {
    /// In which folder.
    pub folder: NodeId,
    /// The name in it.
    pub name: OsString,
}

impl Place {
    /// A name in a folder.
    pub fn new(folder: NodeId, name: &OsStr) -> Place {
        Place { folder, name: name.to_owned() }
    }
}

/// Permissions, owner and times.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Attributes {
    /// The permission bits, without those that say what it is.
    pub mode: u32,
    /// Who owns it.
    pub uid: u32,
    /// Which group owns it.
    pub gid: u32,
    /// When it was last read, as far as somebody has set it: reading does not change it.
    pub accessed: SystemTime,
    /// When its bytes last changed.
    pub modified: SystemTime,
}

/// What a node is.
#[derive(Clone, Debug)]
pub enum Content {
    /// A folder, with what is in it.
    Folder(BTreeMap<OsString, NodeId>),
    /// A file. Its bytes are elsewhere.
    File,
    /// A symbolic link, with what it says.
    Symlink(PathBuf),
}

impl Content {
    /// What it is, as the kernel says it.
    pub fn kind(&self) -> FileType {
        match self {
            Content::Folder(_) => FileType::Directory,
            Content::File => FileType::RegularFile,
            Content::Symlink(_) => FileType::Symlink,
        }
    }
}

/// What there is to know about a node.
#[derive(Clone, Debug)]
pub struct Node {
    /// What it is.
    pub content: Content,
    /// Permissions, owner and times.
    pub attributes: Attributes,
    /// All its names. The root has none, nor has what was deleted while it was open.
    pub names: BTreeSet<Place>,
}

/// A change of names or attributes. These are what the journal consists of.
#[derive(Clone, Debug)]
pub enum Op {
    /// Something new and empty.
    Create {
        /// Its first name.
        place: Place,
        /// Who it will be.
        node: NodeId,
        /// What it is.
        content: Content,
        /// Permissions, owner and times.
        attributes: Attributes,
    },
    /// One more name for a file.
    Link {
        /// The file.
        node: NodeId,
        /// The name.
        place: Place,
    },
    /// A name goes: that of a file, or that of an empty folder.
    Remove {
        /// The name.
        place: Place,
    },
    /// A name goes, another comes, and whoever had that one loses it, all at once.
    Rename {
        /// The old name.
        from: Place,
        /// The new name.
        to: Place,
    },
    /// Other permissions, owner or times.
    Change {
        /// Of whom.
        node: NodeId,
        /// All of them, as they will be.
        attributes: Attributes,
    },
    /// A file is cut off or extended by zeros. The tree does not know sizes; the journal does.
    Resize {
        /// The file.
        node: NodeId,
        /// In bytes.
        size: u64,
    },
}

/// Every node, and which names they have.
#[derive(Clone, Debug)]
pub struct Tree {
    nodes: HashMap<NodeId, Node>,
}

impl Tree {
    /// Only the root, with its attributes.
    pub fn new(attributes: Attributes) -> Tree {
        let root = Node { content: Content::Folder(BTreeMap::new()), attributes, names: BTreeSet::new() };
        Tree { nodes: HashMap::from([(ROOT, root)]) }
    }

    /// A node.
    ///
    /// # Errors
    /// `ESTALE` if there is none: then the kernel looks names up again.
    pub fn node(&self, id: NodeId) -> Result<&Node> {
        self.nodes.get(&id).ok_or(Errno::STALE)
    }

    /// A node, to change its attributes without a journal.
    pub fn node_mut(&mut self, id: NodeId) -> Option<&mut Node> {
        self.nodes.get_mut(&id)
    }

    /// What is in a folder.
    ///
    /// # Errors
    /// If it is none.
    pub fn entries(&self, folder: NodeId) -> Result<&BTreeMap<OsString, NodeId>> {
        match &self.node(folder)?.content {
            Content::Folder(entries) => Ok(entries),
            Content::File | Content::Symlink(_) => Err(Errno::NOTDIR),
        }
    }

    /// Who has this name.
    ///
    /// # Errors
    /// `ENOENT` if nobody has.
    pub fn lookup(&self, place: &Place) -> Result<NodeId> {
        self.entries(place.folder)?.get(&place.name).copied().ok_or(Errno::NOENT)
    }

    /// All files that have a name.
    pub fn files(&self) -> impl Iterator<Item = NodeId> {
        let named = |node: &Node| matches!(node.content, Content::File) && !node.names.is_empty();
        self.nodes.iter().filter(move |(_, node)| named(node)).map(|(id, _)| *id)
    }

    /// One of the paths of a node from the root, or `None` if it has lost its names.
    pub fn path(&self, id: NodeId) -> Option<PathBuf> {
        if id == ROOT {
            return Some(PathBuf::new());
        }
        let place = self.nodes.get(&id)?.names.first()?;
        Some(self.path(place.folder)?.join(&place.name))
    }

    /// Whether one of the names ends like this.
    pub fn is_called(&self, id: NodeId, suffix: &str) -> bool {
        let ends = |place: &Place| place.name.as_encoded_bytes().ends_with(suffix.as_bytes());
        self.nodes.get(&id).is_some_and(|node| node.names.iter().any(ends))
    }

    /// Whether a change is possible.
    ///
    /// # Errors
    /// Those that the system call is documented to fail with.
    pub fn check(&self, op: &Op) -> Result<()> {
        match op {
            Op::Create { place, .. } | Op::Link { place, .. } => self.check_free(place),
            Op::Remove { place } => match &self.node(self.lookup(place)?)?.content {
                Content::Folder(entries) if !entries.is_empty() => Err(Errno::NOTEMPTY),
                Content::Folder(_) | Content::File | Content::Symlink(_) => Ok(()),
            },
            Op::Rename { from, to } => {
                let moved = &self.node(self.lookup(from)?)?.content;
                match self.lookup(to) {
                    Err(Errno::NOENT) => self.check_free(to),
                    Err(errno) => Err(errno),
                    Ok(replaced) => match (moved, &self.node(replaced)?.content) {
                        (Content::Folder(_), Content::Folder(entries)) if entries.is_empty() => Ok(()),
                        (Content::Folder(_), Content::Folder(_)) => Err(Errno::NOTEMPTY),
                        (Content::Folder(_), Content::File | Content::Symlink(_)) => Err(Errno::NOTDIR),
                        (Content::File | Content::Symlink(_), Content::Folder(_)) => Err(Errno::ISDIR),
                        (Content::File | Content::Symlink(_), Content::File | Content::Symlink(_)) => Ok(()),
                    },
                }
            }
            Op::Change { node, .. } | Op::Resize { node, .. } => self.node(*node).map(|_| ()),
        }
    }

    /// A name is free, in a folder that has not been deleted.
    fn check_free(&self, place: &Place) -> Result<()> {
        if place.folder != ROOT && self.node(place.folder)?.names.is_empty() {
            return Err(Errno::NOENT);
        }
        match self.lookup(place) {
            Ok(_) => Err(Errno::EXIST),
            Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(errno),
        }
    }

    /// Makes a change that has been checked. Hands back who has lost its last name by it: it stays here until
    /// it is forgotten.
    pub fn apply(&mut self, op: &Op) -> Option<NodeId> {
        match op {
            Op::Create { place, node, content, attributes } => {
                let fresh =
                    Node { content: content.clone(), attributes: *attributes, names: BTreeSet::new() };
                self.nodes.insert(*node, fresh);
                self.insert(place, *node);
                None
            }
            Op::Link { node, place } => {
                self.insert(place, *node);
                None
            }
            Op::Remove { place } => self.remove(place),
            Op::Rename { from, to } => {
                let moved = self.lookup(from).expect("it was checked");
                // Two names of one file: POSIX wants both to stay.
                if self.lookup(to) == Ok(moved) {
                    return None;
                }
                let replaced = self.remove(to);
                self.remove(from);
                self.insert(to, moved);
                replaced
            }
            Op::Change { node, attributes } => {
                if let Some(node) = self.nodes.get_mut(node) {
                    node.attributes = *attributes;
                }
                None
            }
            Op::Resize { .. } => None,
        }
    }

    /// Forgets one without a name.
    pub fn forget(&mut self, id: NodeId) {
        let node = self.nodes.remove(&id);
        assert!(node.is_none_or(|node| node.names.is_empty()), "{id:?} has names");
    }

    fn insert(&mut self, place: &Place, id: NodeId) {
        self.entries_mut(place.folder).insert(place.name.clone(), id);
        self.nodes.get_mut(&id).expect("who gets a name exists").names.insert(place.clone());
    }

    fn remove(&mut self, place: &Place) -> Option<NodeId> {
        let id = self.entries_mut(place.folder).remove(&place.name)?;
        let node = self.nodes.get_mut(&id).expect("who has a name exists");
        node.names.remove(place);
        node.names.is_empty().then_some(id)
    }

    fn entries_mut(&mut self, folder: NodeId) -> &mut BTreeMap<OsString, NodeId> {
        match self.nodes.get_mut(&folder).map(|node| &mut node.content) {
            Some(Content::Folder(entries)) => entries,
            Some(Content::File | Content::Symlink(_)) | None => panic!("{folder:?} is no folder"),
        }
    }
}
