//! What every call on the mount does: which files there are and how they are
//! opened here, their content in [`super::content`], changes of names in
//! [`super::namespace`], attributes in [`super::attributes`].

use super::attributes::Attributes;
use super::catalog::{Catalog, Face};
use super::crew::together;
use super::disk::{Disk, Library};
use super::error::{Error, Result};
use super::memory::{Invalidate, Memory};
use super::names::FormatRules;
use super::nodes::{Node, NodeId, Nodes};
use super::open::{Context, Handle, OpenFile};
use super::passage::{OpenWay, Passage, no_way};
use super::reached::Reached;
use super::source::{FileId, Kind, Name, Source, Stat};
use super::sync::{lock, read, write};
use crate::image::NameRule;
use instar_guest::proto::Preallocation;
use nix::errno::Errno;
use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::thread;
use std::time::{Duration, Instant};

/// After a close the kernel gives the handle back by itself, in general at once.
const RELEASED_WITHIN: Duration = Duration::from_millis(100);

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
    /// How long nothing may be asked of an open image's sandbox before it is
    /// given back.
    pub idle: Duration,
    /// Whether the kernel may read and write raw images by itself.
    pub passthrough: bool,
    /// Whether the kernel may gather what is written in its cache; it then keeps
    /// sizes and times of its own.
    pub writeback: bool,
}

impl Options {
    /// The usual [`idle`](Self::idle). To start a sandbox again costs a
    /// millisecond, the memory of one that waits is up to 64 MiB: long enough
    /// that a program at work does not notice, short enough that thousands of
    /// disks that are merely open cost little.
    pub const IDLE: Duration = Duration::from_secs(10);
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
#[derive(Clone, Debug)]
pub struct OpenedHandle {
    /// Number of the handle.
    pub handle: u64,
    /// Whether what the kernel has cached of the content is still right.
    pub keep_cache: bool,
    /// The kernel's own way to the content.
    pub passage: Option<Arc<Passage>>,
}

/// The mounted filesystem, without FUSE. All methods may be called from many
/// threads at once.
pub struct Filesystem {
    pub(super) source: Source,
    pub(super) catalog: Catalog,
    pub(super) options: Options,
    pub(super) nodes: Nodes,
    /// Held by whoever changes names.
    pub(super) naming: Mutex<()>,
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
            naming: Mutex::default(),
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

    /// How it behaves.
    pub fn options(&self) -> &Options {
        &self.options
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
        let path = parent.path();
        match self.hold(path.join(name)) {
            Err(error) if error.errno == Errno::ENOENT => {
                // The directory may be changing its name.
                let _settled = parent.settled();
                match parent.path() == path {
                    true => Err(error),
                    false => self.hold(parent.path().join(name)),
                }
            }
            found => found,
        }
    }

    /// Finds a path below SOURCE and counts one reference to it.
    pub fn hold(&self, path: PathBuf) -> Result<Attributes> {
        let stat = self.source.stat(&path)?;
        let face = self.face_if_file(&path, &stat);
        if face == Some(Face::Hidden) {
            return Err(Errno::ENOENT.into());
        }
        self.follow_open(&path, stat.id);
        if self.options.writeback
            && let Some(node) = self.nodes.held(&path, stat.id)
        {
            self.is_still_the_same(&node, &stat);
        }
        let id = self.nodes.id_of(&path, stat.id);
        let attributes = self.attributes(id, &path, stat, face.as_ref())?;
        let node = self.nodes.hold(path, &stat);
        Ok(Attributes {
            id: node.id,
            ..attributes
        })
    }

    /// With its writeback cache the kernel never takes a new size or time of a
    /// file that it knows. So one that somebody else has changed while it was not
    /// open here, or that is not what the kernel thinks, becomes another file.
    fn is_still_the_same(&self, node: &Node, stat: &Stat) -> bool {
        let may_differ = self.options.writeback && stat.kind == Kind::File;
        if !may_differ || self.file_known(node.id).is_some() || node.is_as_noted(stat) {
            return true;
        }
        self.nodes.retire(node);
        false
    }

    /// Takes back references.
    pub fn forget(&self, id: NodeId, count: u64) {
        if self.nodes.forget(id, count) {
            self.memory.forget(id);
        }
    }

    /// Lists a directory: what is in it now.
    pub fn opendir(&self, id: NodeId) -> Result<u64> {
        let node = self.nodes.get(id)?;
        let directory = node.path();
        let entries = match node.orphan() {
            Some(_) => Vec::new(),
            None => self.source.list(&directory)?,
        };
        let stats = match entries.is_empty() {
            true => Vec::new(),
            false => self.source.stat_in(&directory, &entries)?,
        };
        let entries: Vec<(Name, Option<Stat>)> = entries.into_iter().zip(stats).collect();
        let listed = together(&entries, |(entry, stat)| {
            let (stat, path) = ((*stat)?, directory.join(&entry.name));
            let hidden = self.face_if_file(&path, &stat) == Some(Face::Hidden);
            (!hidden).then(|| Listed {
                id: self.nodes.id_of(&path, stat.id),
                kind: stat.kind,
                name: entry.name.clone(),
                path,
            })
        });
        let listing: Vec<Listed> = listed.into_iter().flatten().collect();
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
        let path = node.path();
        let parent = path.parent().unwrap_or(Path::new(""));
        let stat = self.source.stat(parent)?;
        Ok(self.nodes.id_of(parent, stat.id))
    }

    /// Forgets a listing.
    pub fn releasedir(&self, handle: u64) {
        write(&self.listings).remove(&handle);
    }

    /// Opens an image. Locks are taken for what the handle may do.
    pub fn open(&self, id: NodeId, writable: bool) -> Result<OpenedHandle> {
        self.open_passing(id, writable, &no_way)
    }

    /// The same for a kernel that may use the content by itself.
    pub fn open_passing(
        &self,
        id: NodeId,
        writable: bool,
        way: OpenWay<'_>,
    ) -> Result<OpenedHandle> {
        let node = self.nodes.get(id)?;
        let _settled = node.settled();
        let stat = self.stat_now(&node)?;
        let opened = self.open_node(&node, &stat, writable);
        self.remember_trouble(stat.id, opened.as_ref().err());
        let mut handle = opened?;
        let passage = handle.file.passage_or(|| self.passage(&node, way));
        handle.found = passage.as_ref().and_then(|passage| passage.version());
        match passage {
            // What the kernel has in its cache from before is not kept right.
            Some(_) => self.memory.forget(node.id),
            None => node.note_cached(),
        }
        let keep_cache = handle.cache_is_right && passage.is_none();
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        write(&self.handles).insert(number, Arc::new(handle));
        Ok(OpenedHandle {
            handle: number,
            keep_cache,
            passage,
        })
    }

    /// Opens the kernel's own way to an image that its name says is raw. Where
    /// there is none, everything goes through here.
    fn passage(&self, node: &Node, way: OpenWay<'_>) -> Option<Passage> {
        let path = node.path();
        let is_raw = self.catalog.rule_for(&path) == NameRule::Raw && node.orphan().is_none();
        if !self.options.passthrough || !is_raw {
            return None;
        }
        let (file, stat) = self.source.open_file(&path, false).ok()?;
        if stat.id != node.file() {
            return None;
        }
        let opened = Passage::open(file, way);
        let shown = self.source.display(&path);
        opened
            .inspect_err(|error| log::debug!("{}: no passthrough: {error}", shown.display()))
            .ok()
    }

    fn open_node(&self, node: &Arc<Node>, stat: &Stat, writable: bool) -> Result<Handle> {
        if writable {
            self.writable()?;
            self.no_backing_image(&node.path(), stat)?;
        }
        self.usable(node, stat)?;
        if !self.is_still_the_same(node, stat) {
            // The kernel looks it up again, and finds another node.
            return Err(Errno::ESTALE.into());
        }
        let file = self.file(node);
        let opened = self.open_file(&file, writable);
        if opened.is_err() {
            self.leave(&file);
        }
        opened
    }

    /// Opens a handle. What the kernel has cached and is not right would be
    /// dropped when it gets the answer, and with it what others who have opened the
    /// file by then are writing: old content could come back. So the file becomes
    /// another one, of which nothing is cached, unless somebody has it open.
    fn open_file(&self, file: &Arc<OpenFile>, writable: bool) -> Result<Handle> {
        let _alone = file.opening();
        if file.node.is_retired() {
            return Err(Errno::ESTALE.into());
        }
        let handle = file.handle(self.context(), writable)?;
        if handle.cache_is_right || self.outlives_a_close(file) {
            return Ok(handle);
        }
        self.nodes.retire(&file.node);
        handle.rest();
        file.settle(self.context())?;
        Err(Errno::ESTALE.into())
    }

    /// Whether the kernel has handles of a file and does not give them back soon:
    /// it says so a while after a close.
    fn outlives_a_close(&self, file: &Arc<OpenFile>) -> bool {
        let end = Instant::now() + RELEASED_WITHIN;
        while !self.handles_of(file).is_empty() {
            if Instant::now() >= end {
                return true;
            }
            thread::sleep(Duration::from_millis(1));
        }
        false
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

    /// The same, if there is one, for whoever does not use it.
    pub(super) fn file_known(&self, id: NodeId) -> Option<Arc<OpenFile>> {
        lock(&self.files).get(&id).cloned()
    }

    /// All handles of an open file.
    pub(super) fn handles_of(&self, file: &Arc<OpenFile>) -> Vec<Arc<Handle>> {
        let handles = read(&self.handles);
        let own = handles.values();
        own.filter(|handle| Arc::ptr_eq(&handle.file, file))
            .cloned()
            .collect()
    }

    /// The open file behind a node, if there is one; to be left like one that
    /// was made.
    pub(super) fn file_if_open(&self, id: NodeId) -> Option<Arc<OpenFile>> {
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
    /// was looked up, or the one that a change of ours has put in its place.
    pub(super) fn stat(&self, node: &Node) -> Result<Stat> {
        self.stat_now(node).or_else(|_| {
            // It may be changing its name.
            let _settled = node.settled();
            self.stat_now(node)
        })
    }

    /// The same for whoever keeps it from changing its name.
    pub(super) fn stat_now(&self, node: &Node) -> Result<Stat> {
        match node.orphan() {
            Some(orphan) => orphan.stat(),
            None => Ok(self.reach_now(node)?.1),
        }
    }

    /// The source file of a node that has a name.
    pub(super) fn reach_now(&self, node: &Node) -> Result<(Reached, Stat)> {
        let reached = self.source.reach(&node.path())?;
        let stat = reached.stat()?;
        if stat.id == node.file() {
            return Ok((reached, stat));
        }
        let open = self.file_known(node.id);
        if open.and_then(|open| open.file()) != Some(stat.id) {
            return Err(Errno::ESTALE.into());
        }
        self.nodes.follow(node, stat.id);
        Ok((reached, stat))
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
            .filter(|open| open.node.orphan().is_none())
            .find(|open| *open.node.path() == *path && open.node.file() != file)
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
        if node.orphan().is_some() {
            return match self.file_known(node.id) {
                Some(_) => Ok(()),
                None => Err(Errno::ESTALE.into()),
            };
        }
        match self.catalog.face(&self.source, &node.path(), stat) {
            Face::Image(_) | Face::Blank(_) => Ok(()),
            Face::Unusable(error) => Err(error),
            Face::Hidden => Err(Errno::ENOENT.into()),
        }
    }

    /// Refuses to change what other images of the tree build on.
    pub(super) fn no_backing_image(&self, path: &Path, stat: &Stat) -> Result<()> {
        if self.options.rw_backing || !self.catalog.is_backing(&self.source, stat.id) {
            return Ok(());
        }
        Err(Error::new(
            Errno::EROFS,
            format!(
                "{}: another image uses this one as its backing file, which a change would damage; \
                 mount with -o rw_backing to change it all the same",
                self.source.display(path).display()
            ),
        ))
    }

    /// What a node's file is; of one without a name nothing is known but what
    /// those know who have it open.
    pub(super) fn face(&self, node: &Node, stat: &Stat) -> Option<Face> {
        match (node.orphan(), stat.kind) {
            (Some(_), Kind::File) => Some(Face::Hidden),
            _ => self.face_if_file(&node.path(), stat),
        }
    }

    pub(super) fn face_if_file(&self, path: &Path, stat: &Stat) -> Option<Face> {
        match stat.kind {
            Kind::Directory => None,
            Kind::File => Some(self.catalog.face(&self.source, path, stat)),
        }
    }
}
