//! What every call on the mount does, by the table in the design: names and
//! attributes here, content in [`super::content`].

use super::catalog::{Catalog, Face};
use super::disk::{Disk, Library};
use super::error::{Error, Result};
use super::memory::{Invalidate, Memory};
use super::names::FormatRules;
use super::nodes::{Node, NodeId, Nodes};
use super::open::{Context, Handle, OpenFile};
use super::source::{FileId, Kind, NewTime, Source, Stat};
use super::sync::{lock, read, write};
use crate::image::Access;
use instar_guest::proto::Preallocation;
use nix::errno::Errno;
use nix::sys::statvfs::Statvfs;
use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};

/// `st_blksize` of images without an allocation unit, in bytes.
const BLOCK: u64 = 64 << 10;

/// How the mounted filesystem behaves.
#[derive(Clone, Debug)]
pub struct Options {
    /// Nothing may be changed.
    pub read_only: bool,
    /// Whether a write past the end makes a disk larger.
    pub grow: bool,
    /// Whether a truncate may make a disk smaller.
    pub shrink: bool,
    /// Whether images that others use as backing images may be written.
    pub rw_backing: bool,
    /// How much of the range that a truncate adds is allocated.
    pub preallocation: Preallocation,
    /// `format=GLOB:FMT`.
    pub formats: FormatRules,
}

/// The attributes of a file or directory on the mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// Its id.
    pub id: NodeId,
    /// Size in bytes: the disk's for an image.
    pub size: u64,
    /// `st_blksize` in bytes, a power of two.
    pub block: u32,
    /// Everything else, from the source file.
    pub stat: Stat,
}

/// Changes to attributes; `None` leaves one as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Size in bytes.
    pub size: Option<u64>,
    /// Permission bits.
    pub perm: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Time of last access.
    pub atime: Option<NewTime>,
    /// Time of last modification.
    pub mtime: Option<NewTime>,
}

/// One line of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// The name.
    pub name: OsString,
    /// Path below SOURCE.
    pub path: PathBuf,
    /// The id that a lookup answers.
    pub id: NodeId,
    /// Directory or regular file.
    pub kind: Kind,
}

/// An image that was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenedHandle {
    /// Number of the handle.
    pub handle: u64,
    /// Whether what the kernel has cached of the content is still right.
    pub keep_cache: bool,
}

/// The mounted filesystem, without FUSE. All methods may be called from many
/// threads at once.
pub struct Filesystem {
    pub(super) source: Source,
    pub(super) catalog: Catalog,
    pub(super) options: Options,
    pub(super) nodes: Nodes,
    files: Mutex<HashMap<NodeId, Arc<OpenFile>>>,
    handles: RwLock<HashMap<u64, Arc<Handle>>>,
    listings: RwLock<HashMap<u64, Arc<Vec<Listed>>>>,
    next: AtomicU64,
    pub(super) troubles: Mutex<HashMap<FileId, Error>>,
    pub(super) memory: Memory,
}

impl Filesystem {
    /// The filesystem over a tree.
    pub fn new(source: Source, library: Box<dyn Library>, options: Options) -> Result<Self> {
        let root = source.stat(Path::new(""))?;
        Ok(Self {
            catalog: Catalog::new(library, options.formats.clone()),
            source,
            options,
            nodes: Nodes::new(root.id),
            files: Mutex::default(),
            handles: RwLock::default(),
            listings: RwLock::default(),
            next: AtomicU64::new(1),
            troubles: Mutex::default(),
            memory: Memory::default(),
        })
    }

    /// Path of the directory whose images are shown.
    pub fn source(&self) -> &Path {
        self.source.path()
    }

    /// Says how to reach the kernel, once the mount is there.
    pub fn set_invalidate(&self, invalidate: Invalidate) {
        self.memory.set_invalidate(invalidate);
    }

    pub(super) fn context(&self) -> Context<'_> {
        Context {
            source: &self.source,
            catalog: &self.catalog,
            memory: &self.memory,
        }
    }

    /// Finds a name and counts one reference to it.
    pub fn lookup(&self, parent: NodeId, name: &OsStr) -> Result<Attributes> {
        let parent = self.nodes.get(parent)?;
        self.hold(parent.path.join(name))
    }

    /// Finds a path below SOURCE and counts one reference to it.
    pub fn hold(&self, path: PathBuf) -> Result<Attributes> {
        let stat = self.source.stat(&path)?;
        let face = self.face_if_file(&path, &stat);
        if face == Some(Face::Hidden) {
            return Err(Errno::ENOENT.into());
        }
        self.follow_open(&path, stat.id);
        let id = self.nodes.id_of(&path, stat.id);
        let attributes = self.attributes(id, &path, stat, face.as_ref())?;
        self.nodes.hold(path, stat.id, stat.kind)?;
        Ok(attributes)
    }

    /// Takes back references.
    pub fn forget(&self, id: NodeId, count: u64) {
        if self.nodes.forget(id, count) {
            self.memory.forget(id);
        }
    }

    /// The attributes of a node.
    pub fn getattr(&self, id: NodeId) -> Result<Attributes> {
        let node = self.nodes.get(id)?;
        let stat = self.stat(&node)?;
        let face = self.face_if_file(&node.path, &stat);
        self.attributes(node.id, &node.path, stat, face.as_ref())
    }

    /// Changes attributes. A new size comes first: if it is refused, nothing
    /// changes.
    pub fn setattr(
        &self,
        id: NodeId,
        handle: Option<u64>,
        changes: &Changes,
    ) -> Result<Attributes> {
        self.writable()?;
        let node = self.nodes.get(id)?;
        self.stat(&node)?;
        if let Some(size) = changes.size {
            self.truncate(&node, handle, size)?;
        }
        if changes.uid.is_some() || changes.gid.is_some() {
            self.source.chown(&node.path, changes.uid, changes.gid)?;
        }
        if let Some(perm) = changes.perm {
            self.source.chmod(&node.path, perm)?;
        }
        if changes.atime.is_some() || changes.mtime.is_some() {
            self.set_times(&node, changes)?;
        }
        self.getattr(id)
    }

    /// Sets times. Where the image is open but not locked, its next user takes
    /// a new time of modification for somebody else's change: so it is locked
    /// meanwhile, if it can be.
    fn set_times(&self, node: &Node, changes: &Changes) -> Result<()> {
        let set = || {
            self.source
                .utimens(&node.path, changes.atime, changes.mtime)
        };
        let Some(file) = self.file_if_open(node.id) else {
            return set();
        };
        let done = file.with(self.context(), Access::Read, |_| Ok(set()));
        let settled = file.settle(self.context());
        self.leave(&file);
        match done {
            Ok(done) => done.and(settled),
            Err(_) => set(),
        }
    }

    /// Lists a directory: what is in it now.
    pub fn opendir(&self, id: NodeId) -> Result<u64> {
        let node = self.nodes.get(id)?;
        let mut listing = Vec::new();
        for entry in self.source.list(&node.path)? {
            let path = node.path.join(&entry.name);
            let Ok(stat) = self.source.stat(&path) else {
                continue;
            };
            if self.face_if_file(&path, &stat) == Some(Face::Hidden) {
                continue;
            }
            listing.push(Listed {
                id: self.nodes.id_of(&path, stat.id),
                kind: stat.kind,
                name: entry.name,
                path,
            });
        }
        let handle = self.next.fetch_add(1, Ordering::Relaxed);
        write(&self.listings).insert(handle, Arc::new(listing));
        Ok(handle)
    }

    /// The listing that [`opendir`](Self::opendir) made.
    pub fn listing(&self, handle: u64) -> Result<Arc<Vec<Listed>>> {
        let listings = read(&self.listings);
        let listing = listings.get(&handle).ok_or(Errno::EBADF)?;
        Ok(Arc::clone(listing))
    }

    /// The directory above a node; the root's is the root.
    pub fn parent(&self, id: NodeId) -> Result<NodeId> {
        let node = self.nodes.get(id)?;
        let parent = node.path.parent().unwrap_or(Path::new(""));
        let stat = self.source.stat(parent)?;
        Ok(self.nodes.id_of(parent, stat.id))
    }

    /// Forgets a listing.
    pub fn releasedir(&self, handle: u64) {
        write(&self.listings).remove(&handle);
    }

    /// Opens an image. Locks are taken for what the handle may do.
    pub fn open(&self, id: NodeId, writable: bool) -> Result<OpenedHandle> {
        let node = self.nodes.get(id)?;
        let stat = self.stat(&node)?;
        let opened = self.open_node(&node, &stat, writable);
        self.remember_trouble(stat.id, opened.as_ref().err());
        let (handle, keep_cache) = opened?;
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        write(&self.handles).insert(number, Arc::new(handle));
        Ok(OpenedHandle {
            handle: number,
            keep_cache,
        })
    }

    fn open_node(&self, node: &Arc<Node>, stat: &Stat, writable: bool) -> Result<(Handle, bool)> {
        if writable {
            self.writable()?;
            self.no_backing_image(node, stat)?;
        }
        self.usable(node, stat)?;
        let file = self.file(node);
        let in_use = file.is_locked();
        let handle = file.handle(self.context(), writable);
        if handle.is_err() {
            self.leave(&file);
        }
        let handle = handle?;
        let keep_cache = in_use || file.is_current(self.context());
        Ok((handle, keep_cache))
    }

    /// Closes a handle.
    pub fn release(&self, handle: u64) {
        let Some(handle) = write(&self.handles).remove(&handle) else {
            return;
        };
        let file = &handle.file;
        handle.rest();
        if let Err(error) = file.settle(self.context()) {
            self.report(&file.node, &error);
        }
        self.leave(file);
    }

    /// A handle by its number.
    pub(super) fn handle(&self, handle: u64) -> Result<Arc<Handle>> {
        let handles = read(&self.handles);
        let handle = handles.get(&handle).ok_or(Errno::EBADF)?;
        Ok(Arc::clone(handle))
    }

    /// The open file behind a node, made if there is none. There is one per
    /// image at a time, so it must be left when it is done with.
    pub(super) fn file(&self, node: &Arc<Node>) -> Arc<OpenFile> {
        let mut files = lock(&self.files);
        let file = files
            .entry(node.id)
            .or_insert_with(|| OpenFile::new(Arc::clone(node)));
        file.join();
        Arc::clone(file)
    }

    /// The same, if there is one.
    fn file_if_open(&self, id: NodeId) -> Option<Arc<OpenFile>> {
        let files = lock(&self.files);
        let file = files.get(&id)?;
        file.join();
        Some(Arc::clone(file))
    }

    /// Says that an open file is done with. After its last user its image is
    /// closed, also where it could not be flushed; only then it is forgotten,
    /// so that nobody opens the image while we still lock it.
    pub(super) fn leave(&self, file: &Arc<OpenFile>) {
        if !file.leave() {
            return;
        }
        file.close_unused(self.context());
        let mut files = lock(&self.files);
        let id = file.node.id;
        if file.is_unused() && files.get(&id).is_some_and(|known| Arc::ptr_eq(known, file)) {
            files.remove(&id);
        }
    }

    /// Every image that is open.
    pub(super) fn open_files(&self) -> Vec<Arc<OpenFile>> {
        lock(&self.files).values().cloned().collect()
    }

    /// The attributes of a node's source file, as long as it is the file that
    /// was looked up, or the one that a resize has put in its place.
    pub(super) fn stat(&self, node: &Node) -> Result<Stat> {
        let stat = self.source.stat(&node.path)?;
        if stat.id == node.file() {
            return Ok(stat);
        }
        let open = lock(&self.files).get(&node.id).cloned();
        if open.and_then(|open| open.file()) != Some(stat.id) {
            return Err(Errno::ESTALE.into());
        }
        self.nodes.follow(node, stat.id);
        Ok(stat)
    }

    /// A resize may have put another file in the place of the image's.
    pub(super) fn follow(&self, file: &OpenFile, disk: &dyn Disk) {
        if let Some(now) = disk.file() {
            self.nodes.follow(&file.node, now);
        }
    }

    /// The same while the resize is still going on, for whoever comes by name.
    fn follow_open(&self, path: &Path, file: FileId) {
        let known = lock(&self.files)
            .values()
            .find(|open| open.node.path == path && open.node.file() != file)
            .cloned();
        if let Some(open) = known.filter(|open| open.file() == Some(file)) {
            self.nodes.follow(&open.node, file);
        }
    }

    pub(super) fn writable(&self) -> Result<()> {
        if self.options.read_only {
            return Err(Errno::EROFS.into());
        }
        Ok(())
    }

    /// Refuses what is no image, or one that cannot be used.
    pub(super) fn usable(&self, node: &Node, stat: &Stat) -> Result<()> {
        match self.catalog.face(&self.source, &node.path, stat) {
            Face::Image(_) => Ok(()),
            Face::Unusable(error) => Err(error),
            Face::Hidden => Err(Errno::ENOENT.into()),
        }
    }

    /// Refuses to change what other images of the tree build on.
    pub(super) fn no_backing_image(&self, node: &Node, stat: &Stat) -> Result<()> {
        if self.options.rw_backing || !self.catalog.is_backing(&self.source, stat.id) {
            return Ok(());
        }
        Err(Error::new(
            Errno::EROFS,
            format!(
                "{}: another image uses this one as its backing file, which a change would damage; \
                 mount with -o rw_backing to change it all the same",
                self.source.display(&node.path).display()
            ),
        ))
    }

    pub(super) fn face_if_file(&self, path: &Path, stat: &Stat) -> Option<Face> {
        match stat.kind {
            Kind::Directory => None,
            Kind::File => Some(self.catalog.face(&self.source, path, stat)),
        }
    }

    /// An open image answers for itself, whatever a look at its file says. A
    /// look that failed for want of something says nothing about the size.
    fn attributes(
        &self,
        id: NodeId,
        path: &Path,
        mut stat: Stat,
        face: Option<&Face>,
    ) -> Result<Attributes> {
        let own_size = || {
            let open = lock(&self.files).get(&id).cloned()?;
            open.virtual_size()
        };
        let (size, block) = match face {
            None => (stat.size, u64::from(stat.blksize)),
            Some(Face::Image(portrait)) => (
                own_size().unwrap_or(portrait.virtual_size),
                portrait.cluster_size.unwrap_or(BLOCK),
            ),
            Some(Face::Unusable(error)) => match own_size() {
                Some(size) => (size, BLOCK),
                None if error.is_passing() => return Err(error.clone()),
                None => (0, BLOCK),
            },
            Some(Face::Hidden) => (own_size().unwrap_or(0), BLOCK),
        };
        if let Some(Face::Image(portrait)) = face {
            let parts = self
                .catalog
                .blocks_of_parts(&self.source, path, stat.id, portrait);
            stat.blocks = stat.blocks.saturating_add(parts);
        }
        let block = block.clamp(4096, 2 << 20).next_power_of_two();
        Ok(Attributes {
            id,
            size,
            block: u32::try_from(block).unwrap_or(4096),
            stat,
        })
    }

    /// Space and files of the file system that holds the images.
    pub fn statfs(&self) -> Result<Statvfs> {
        self.source.statvfs()
    }
}
