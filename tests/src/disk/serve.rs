//! What the kernel asks, and what it is told.
//!
//! Files are opened with direct IO: the kernel keeps no copy of them, so each read sees what the disk holds
//! and each write is known here before it returns. A file that is mapped into memory is the exception: its
//! pages are the kernel's, and a fault strikes them only when they are read anew. Names and attributes are
//! valid for no time, so they are asked for again and again. Locks of files are not asked for here; the
//! kernel keeps them.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, Errno as Code, FileAttr, FileHandle, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request,
    TimeOrNow, WriteFlags,
};
use rustix::fs::{FallocateFlags, OFlags, statvfs};
use rustix::io::{Errno, Result};

use super::body::PAGE;
use super::later::Later;
use super::shared::Shared;
use super::state::State;
use super::store::PERMISSIONS;
use super::tree::{Attributes, Content, NodeId, Op, Place};

/// How long the kernel may believe what it was told.
const VALID: Duration = Duration::ZERO;

/// How many bytes the kernel may write at once.
const WRITE_MAX: u32 = 1 << 20;

/// How many requests that nobody waits for the kernel may have under way.
const BACKGROUND_MAX: u16 = 64;

/// The part of a mode that says what a node is, and what it says of a plain file.
const KIND: u32 = 0o170_000;
const PLAIN: u32 = 0o100_000;

/// Answers the kernel.
pub struct Server {
    shared: Arc<Shared>,
    later: Later,
}

impl Server {
    /// Answers out of this.
    pub fn new(shared: Arc<Shared>, later: Later) -> Server {
        Server { shared, later }
    }

    fn sync_later(&self, handle: FileHandle, reply: impl FnOnce(Result<()>) + Send + 'static) {
        let shared = self.shared.clone();
        self.later.after(self.shared.faults.strike_sync_delay(), move || reply(shared.sync(handle.0)));
    }

    fn entry(&self, node: NodeId) -> Result<(FileAttr, Generation)> {
        let state = self.shared.state.lock();
        Ok((attributes(&state, node)?, Generation(state.epoch())))
    }

    fn reply_entry(&self, node: Result<NodeId>, reply: ReplyEntry) {
        match node.and_then(|node| self.entry(node)) {
            Ok((attributes, generation)) => reply.entry(&VALID, &attributes, generation),
            Err(errno) => reply.error(code(errno)),
        }
    }
}

impl Filesystem for Server {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Those that the kernel does not know are not missed. The writeback cache is not among them.
        let _ = config.add_capabilities(InitFlags::FUSE_PARALLEL_DIROPS);
        let _ = config.add_capabilities(InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP);
        let _ = config.set_max_write(WRITE_MAX);
        let _ = config.set_max_background(BACKGROUND_MAX);
        Ok(())
    }

    fn lookup(&self, _: &Request, folder: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let node = self.shared.state.lock().tree().lookup(&place(folder, name));
        self.reply_entry(node, reply);
    }

    fn getattr(&self, _: &Request, node: INodeNo, handle: Option<FileHandle>, reply: ReplyAttr) {
        let state = self.shared.state.lock();
        let opened = handle.map_or(Ok(NodeId(node.0)), |handle| state.opened(handle.0));
        match opened.and_then(|node| attributes(&state, node)) {
            Ok(attributes) => reply.attr(&VALID, &attributes),
            Err(errno) => reply.error(code(errno)),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        node: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        accessed: Option<TimeOrNow>,
        modified: Option<TimeOrNow>,
        _changed: Option<SystemTime>,
        handle: Option<FileHandle>,
        _created: Option<SystemTime>,
        _changed_otherwise: Option<SystemTime>,
        _backed_up: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let mut state = self.shared.state.lock();
        let mut change = || {
            let node = handle.map_or(Ok(NodeId(node.0)), |handle| state.opened(handle.0))?;
            let old = state.tree().node(node)?.attributes;
            let attributes = Attributes {
                mode: mode.map_or(old.mode, |mode| mode & PERMISSIONS),
                uid: uid.unwrap_or(old.uid),
                gid: gid.unwrap_or(old.gid),
                accessed: accessed.map_or(old.accessed, time),
                modified: modified.map_or(old.modified, time),
            };
            // A change of size comes with times, which are not worth an operation of their own.
            if let Some(size) = size {
                state.resize(node, size)?;
            }
            if attributes != old && (size.is_none() || mode.is_some() || uid.is_some() || gid.is_some()) {
                state.change(Op::Change { node, attributes })?;
            }
            self::attributes(&state, node)
        };
        match change() {
            Ok(attributes) => reply.attr(&VALID, &attributes),
            Err(errno) => reply.error(code(errno)),
        }
    }

    fn readlink(&self, _: &Request, node: INodeNo, reply: ReplyData) {
        match self.shared.state.lock().tree().node(NodeId(node.0)).map(|node| &node.content) {
            Ok(Content::Symlink(target)) => reply.data(target.as_os_str().as_encoded_bytes()),
            Ok(Content::File | Content::Folder(_)) => reply.error(Code::EINVAL),
            Err(errno) => reply.error(code(errno)),
        }
    }

    fn mknod(
        &self,
        request: &Request,
        folder: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        _device: u32,
        reply: ReplyEntry,
    ) {
        if mode & KIND != PLAIN {
            return reply.error(Code::EPERM);
        }
        let node = self.shared.create(place(folder, name), Content::File, mode, owner(request));
        self.reply_entry(node, reply);
    }

    fn mkdir(&self, request: &Request, folder: INodeNo, name: &OsStr, mode: u32, _: u32, reply: ReplyEntry) {
        let content = Content::Folder(BTreeMap::new());
        let node = self.shared.create(place(folder, name), content, mode, owner(request));
        self.reply_entry(node, reply);
    }

    fn symlink(&self, request: &Request, folder: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let content = Content::Symlink(target.to_owned());
        let node = self.shared.create(place(folder, name), content, PERMISSIONS, owner(request));
        self.reply_entry(node, reply);
    }

    fn unlink(&self, _: &Request, folder: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        answer(reply, self.shared.remove(place(folder, name), false));
    }

    fn rmdir(&self, _: &Request, folder: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        answer(reply, self.shared.remove(place(folder, name), true));
    }

    fn rename(
        &self,
        _: &Request,
        folder: INodeNo,
        name: &OsStr,
        new_folder: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        answer(reply, self.shared.rename(place(folder, name), place(new_folder, new_name), flags));
    }

    fn link(&self, _: &Request, node: INodeNo, folder: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let node = NodeId(node.0);
        let linked = self.shared.link(node, place(folder, name));
        self.reply_entry(linked.map(|()| node), reply);
    }

    fn open(&self, _: &Request, node: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        match self.shared.state.lock().open(NodeId(node.0)) {
            Ok(handle) => reply.opened(FileHandle(handle), FopenFlags::FOPEN_DIRECT_IO),
            Err(errno) => reply.error(code(errno)),
        }
    }

    fn create(
        &self,
        request: &Request,
        folder: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        let node = self.shared.create(place(folder, name), Content::File, mode, owner(request));
        let opened = node.and_then(|node| {
            let handle = self.shared.state.lock().open(node)?;
            Ok((self.entry(node)?, handle))
        });
        match opened {
            Ok(((attributes, generation), handle)) => {
                let flags = FopenFlags::FOPEN_DIRECT_IO;
                reply.created(&VALID, &attributes, generation, FileHandle(handle), flags);
            }
            Err(errno) => reply.error(code(errno)),
        }
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let shared = self.shared.clone();
        self.later.after(self.shared.faults.strike_read_delay(), move || {
            match shared.read(handle.0, offset, size as usize) {
                Ok(bytes) => reply.data(&bytes),
                Err(errno) => reply.error(code(errno)),
            }
        });
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        flags: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let written = data.len() as u32;
        let done = move |outcome: Result<()>| match outcome {
            Ok(()) => reply.written(written),
            Err(errno) => reply.error(code(errno)),
        };
        // `O_SYNC` is this bit and another.
        let synced = OFlags::from_bits_retain(flags.0.cast_unsigned()).contains(OFlags::DSYNC);
        match self.shared.write(handle.0, offset, data) {
            Ok(()) if synced => self.sync_later(handle, done),
            outcome => done(outcome),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        // Closing a file makes nothing durable. The kernel does not ask again.
        reply.error(Code::ENOSYS);
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.shared.state.lock().close(handle.0);
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, handle: FileHandle, _: bool, reply: ReplyEmpty) {
        self.sync_later(handle, |outcome| answer(reply, outcome));
    }

    fn opendir(&self, request: &Request, node: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        self.open(request, node, flags, reply);
    }

    fn readdir(&self, _: &Request, _: INodeNo, handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let mut state = self.shared.state.lock();
        let entries = match state.list(handle.0, offset) {
            Ok(entries) => entries,
            Err(errno) => return reply.error(code(errno)),
        };
        for (next, entry) in (offset + 1..).zip(entries) {
            if reply.add(INodeNo(entry.node.0), next, entry.kind, &entry.name) {
                break;
            }
        }
        reply.ok();
    }

    fn releasedir(&self, _: &Request, _: INodeNo, handle: FileHandle, _: OpenFlags, reply: ReplyEmpty) {
        self.shared.state.lock().close(handle.0);
        reply.ok();
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, handle: FileHandle, _: bool, reply: ReplyEmpty) {
        self.sync_later(handle, |outcome| answer(reply, outcome));
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let root = self.shared.state.lock().root().to_owned();
        match statvfs(root) {
            Ok(found) => {
                let free = if self.shared.faults.is_full() { 0 } else { found.f_bavail };
                let (block, fragment) = (found.f_bsize as u32, found.f_frsize as u32);
                let names = found.f_namemax as u32;
                reply.statfs(
                    found.f_blocks,
                    free,
                    free,
                    found.f_files,
                    found.f_ffree,
                    block,
                    names,
                    fragment,
                );
            }
            Err(errno) => reply.error(code(errno)),
        }
    }

    fn getxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, reply: ReplyXattr) {
        // There are no such attributes. The kernel, which would ask before each write, does not ask again.
        reply.error(Code::ENOSYS);
    }

    fn fallocate(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let mode = FallocateFlags::from_bits_retain(mode.cast_unsigned());
        answer(reply, self.shared.allocate(handle.0, offset, length, mode));
    }
}

fn answer(reply: ReplyEmpty, outcome: Result<()>) {
    match outcome {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(code(errno)),
    }
}

/// Who asks, and so owns what he makes.
fn owner(request: &Request) -> (u32, u32) {
    (request.uid(), request.gid())
}

fn place(folder: INodeNo, name: &OsStr) -> Place {
    Place::new(NodeId(folder.0), name)
}

fn code(errno: Errno) -> Code {
    Code::from_i32(errno.raw_os_error())
}

fn time(time: TimeOrNow) -> SystemTime {
    match time {
        TimeOrNow::SpecificTime(time) => time,
        TimeOrNow::Now => SystemTime::now(),
    }
}

/// What the kernel wants to know about a node.
fn attributes(state: &State, id: NodeId) -> Result<FileAttr> {
    let node = state.tree().node(id)?;
    let size = match &node.content {
        Content::File => state.size(id),
        Content::Folder(_) => PAGE,
        Content::Symlink(target) => target.as_os_str().len() as u64,
    };
    Ok(FileAttr {
        ino: INodeNo(id.0),
        size,
        blocks: size.div_ceil(PAGE) * (PAGE / 512),
        atime: node.attributes.accessed,
        mtime: node.attributes.modified,
        ctime: node.attributes.modified,
        crtime: node.attributes.modified,
        kind: node.content.kind(),
        perm: node.attributes.mode as u16,
        nlink: match &node.content {
            Content::Folder(_) => 2,
            Content::File | Content::Symlink(_) => node.names.len() as u32,
        },
        uid: node.attributes.uid,
        gid: node.attributes.gid,
        rdev: 0,
        blksize: PAGE as u32,
        flags: 0,
    })
}
