//! Node ids: how the kernel names files to us.
//!
//! An id is a keyed hash of path and identity, so that a listing and a lookup
//! agree on it without remembering every name that was ever listed, and so
//! that a file that was replaced gets a new id - unless a change of ours replaced
//! it: then it is the same image to everybody who has it open. A node that was
//! renamed keeps its id, and one whose last name was removed keeps it for as
//! long as the kernel holds it. Only what the kernel holds is in the table.

use super::error::Result;
use super::reached::Reached;
use super::source::{FileId, Kind, Stat, Time};
use super::sync::{lock, read, write};
use nix::errno::Errno;
use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// A node's id, as the kernel and `st_ino` know it. 1 is the root.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NodeId(pub u64);

impl NodeId {
    /// The root of the mount.
    pub const ROOT: Self = Self(1);
}

/// A file or directory that the kernel knows.
#[derive(Debug)]
pub struct Node {
    /// Its id.
    pub id: NodeId,
    /// Directory or regular file.
    pub kind: Kind,
    path: RwLock<Arc<Path>>,
    /// What it is reached by once it has no name any more.
    orphan: OnceLock<Reached>,
    file: Mutex<FileId>,
    /// Held alone while its name changes.
    moving: RwLock<()>,
    size_is_whole: AtomicBool,
    /// What the file was like when we last had to do with it.
    noted: Mutex<Option<Version>>,
    /// Whether what the kernel takes for its size is not its size.
    is_misjudged: AtomicBool,
    /// Whether the file has another node by now.
    is_retired: AtomicBool,
    /// Whether the kernel has ever been able to cache its content.
    may_be_cached: AtomicBool,
}

/// Size and time of modification of a source file.
type Version = (u64, Time);

impl Node {
    fn new(id: NodeId, path: PathBuf, file: FileId, kind: Kind) -> Arc<Self> {
        Arc::new(Self {
            id,
            kind,
            path: RwLock::new(path.into()),
            orphan: OnceLock::new(),
            file: Mutex::new(file),
            moving: RwLock::default(),
            size_is_whole: AtomicBool::new(false),
            noted: Mutex::default(),
            is_misjudged: AtomicBool::new(false),
            is_retired: AtomicBool::new(false),
            may_be_cached: AtomicBool::new(false),
        })
    }

    /// Takes note of what the source file is like.
    pub fn note(&self, stat: &Stat) {
        *lock(&self.noted) = Some((stat.size, stat.mtime));
    }

    /// Takes note that the kernel has another idea of the size, which it keeps
    /// for as long as it knows the node.
    pub fn note_misjudged(&self) {
        self.is_misjudged.store(true, Ordering::Release);
    }

    /// Whether the source file is what it was, and what the kernel thinks.
    pub fn is_as_noted(&self, stat: &Stat) -> bool {
        let misjudged = self.is_misjudged.load(Ordering::Acquire);
        !misjudged && *lock(&self.noted) == Some((stat.size, stat.mtime))
    }

    /// Takes note that from now on the kernel may cache its content.
    pub fn note_cached(&self) {
        self.may_be_cached.store(true, Ordering::Release);
    }

    /// Whether the kernel may have cached its content.
    pub fn may_be_cached(&self) -> bool {
        self.may_be_cached.load(Ordering::Acquire)
    }

    /// Whether its file has another node by now.
    pub fn is_retired(&self) -> bool {
        self.is_retired.load(Ordering::Acquire)
    }

    /// Path below SOURCE; empty for the root. Of a node without a name, the
    /// last one that it had.
    pub fn path(&self) -> Arc<Path> {
        Arc::clone(&read(&self.path))
    }

    /// What reaches the file if it has no name any more.
    pub fn orphan(&self) -> Option<&Reached> {
        self.orphan.get()
    }

    /// Keeps its name from being changed.
    pub fn settled(&self) -> RwLockReadGuard<'_, ()> {
        read(&self.moving)
    }

    /// Held while its name changes.
    pub fn moving(&self) -> RwLockWriteGuard<'_, ()> {
        write(&self.moving)
    }

    /// Takes note of how the last change of its size went.
    pub fn note_resize(&self, done: bool) {
        self.size_is_whole.store(done, Ordering::Release);
    }

    /// Whether its size was changed, or asked for, with success: nothing of that
    /// is left to do.
    pub fn is_size_whole(&self) -> bool {
        self.size_is_whole.load(Ordering::Acquire)
    }

    /// Which file it was when it was looked up, or has become by a change of
    /// ours since.
    pub fn file(&self) -> FileId {
        *lock(&self.file)
    }

    fn is(&self, path: &Path, file: FileId) -> bool {
        self.can_be_found() && **read(&self.path) == *path && self.file() == file
    }

    /// Whether its path leads to it.
    fn can_be_found(&self) -> bool {
        self.orphan.get().is_none() && !self.is_retired()
    }
}

/// All nodes that the kernel holds.
pub struct Nodes {
    keys: RandomState,
    held: RwLock<Table>,
    root: Arc<Node>,
}

#[derive(Default)]
struct Table {
    held: HashMap<NodeId, Held>,
    /// The ids of nodes that are not those of their path and file, by these.
    aliases: HashMap<NodeId, NodeId>,
}

struct Held {
    node: Arc<Node>,
    lookups: u64,
}

impl Nodes {
    /// A table that holds the root alone.
    pub fn new(root: FileId) -> Self {
        Self {
            keys: RandomState::new(),
            held: RwLock::default(),
            root: Node::new(NodeId::ROOT, PathBuf::new(), root, Kind::Directory),
        }
    }

    /// The id of a file by that path.
    pub fn id_of(&self, path: &Path, file: FileId) -> NodeId {
        if path.as_os_str().is_empty() {
            return NodeId::ROOT;
        }
        self.id_in(&read(&self.held), path, file)
    }

    /// The alias, or else the first id in an endless row that is free or that
    /// of this very file: another has the first one only if it had this name.
    fn id_in(&self, table: &Table, path: &Path, file: FileId) -> NodeId {
        if let Some(id) = table.aliases.get(&self.hashed(path, file, 0)) {
            return *id;
        }
        let is_free = |id: &NodeId| {
            table
                .held
                .get(id)
                .is_none_or(|held| held.node.is(path, file))
        };
        (0..)
            .map(|salt| self.hashed(path, file, salt))
            .find(is_free)
            .unwrap_or(NodeId::ROOT)
    }

    fn hashed(&self, path: &Path, file: FileId, salt: u64) -> NodeId {
        // 0 and 1 have meanings of their own.
        NodeId((self.keys.hash_one((path, file, salt)) >> 1) + 2)
    }

    /// Another file has the node's name now, by a change of ours: it is the
    /// same node all the same.
    pub fn follow(&self, node: &Node, file: FileId) {
        let mut table = write(&self.held);
        if !table.held.contains_key(&node.id) || node.file() == file {
            return;
        }
        *lock(&node.file) = file;
        self.alias(&mut table, node);
    }

    /// A file has another name now, by a change of ours, and what lies below a
    /// directory with it.
    pub fn rename(&self, from: &Path, to: &Path) {
        let mut table = write(&self.held);
        let moved: Vec<(Arc<Node>, PathBuf)> = table
            .held
            .values()
            .filter(|held| held.node.orphan.get().is_none())
            .filter_map(|held| {
                let path = held.node.path();
                let rest = path.strip_prefix(from).ok()?;
                Some((Arc::clone(&held.node), joined(to, rest)))
            })
            .collect();
        for (node, path) in moved {
            *write(&node.path) = path.into();
            self.alias(&mut table, &node);
        }
    }

    /// The file has lost its name, by a change of ours; it is reached by this
    /// from now on.
    pub fn orphan(&self, node: &Node, by: Reached) {
        let mut table = write(&self.held);
        // The first who says so is right, and there is no other: names change
        // one at a time.
        let _ = node.orphan.set(by);
        table.aliases.retain(|_, id| *id != node.id);
    }

    /// From now on its path leads to another node of the same file.
    pub fn retire(&self, node: &Node) {
        let mut table = write(&self.held);
        node.is_retired.store(true, Ordering::Release);
        table.aliases.retain(|_, id| *id != node.id);
    }

    /// Makes a node be found by its path and file.
    fn alias(&self, table: &mut Table, node: &Node) {
        table.aliases.retain(|_, id| *id != node.id);
        if !node.can_be_found() {
            return;
        }
        let natural = self.hashed(&node.path(), node.file(), 0);
        if natural != node.id {
            table.aliases.insert(natural, node.id);
        }
    }

    /// The node behind an id.
    pub fn get(&self, id: NodeId) -> Result<Arc<Node>> {
        if id == NodeId::ROOT {
            return Ok(Arc::clone(&self.root));
        }
        read(&self.held)
            .held
            .get(&id)
            .map(|held| Arc::clone(&held.node))
            .ok_or_else(|| Errno::ESTALE.into())
    }

    /// The node that a file has by that path, if the kernel holds it.
    pub fn held(&self, path: &Path, file: FileId) -> Option<Arc<Node>> {
        let table = read(&self.held);
        let held = table.held.get(&self.id_in(&table, path, file))?;
        Some(Arc::clone(&held.node))
    }

    /// Every node that has this path or lies below it.
    pub fn below(&self, path: &Path) -> Vec<Arc<Node>> {
        let table = read(&self.held);
        let nodes = table.held.values().map(|held| &held.node);
        nodes
            .filter(|node| node.orphan.get().is_none() && node.path().starts_with(path))
            .map(Arc::clone)
            .collect()
    }

    /// Counts one more reference that the kernel gets to a file.
    pub fn hold(&self, path: PathBuf, stat: &Stat) -> Arc<Node> {
        let (file, kind) = (stat.id, stat.kind);
        if path.as_os_str().is_empty() {
            return Arc::clone(&self.root);
        }
        let mut table = write(&self.held);
        let id = self.id_in(&table, &path, file);
        if let Some(held) = table.held.get_mut(&id) {
            held.lookups += 1;
            return Arc::clone(&held.node);
        }
        let node = Node::new(id, path, file, kind);
        node.note(stat);
        let held = Held {
            node: Arc::clone(&node),
            lookups: 1,
        };
        table.held.insert(id, held);
        let natural = self.hashed(&node.path(), file, 0);
        if natural != id {
            table.aliases.insert(natural, id);
        }
        node
    }

    /// Takes back references that the kernel gave up; whether those were the
    /// last ones.
    pub fn forget(&self, id: NodeId, count: u64) -> bool {
        let mut table = write(&self.held);
        let Some(held) = table.held.get_mut(&id) else {
            return false;
        };
        held.lookups = held.lookups.saturating_sub(count);
        let last = held.lookups == 0;
        if last {
            table.held.remove(&id);
            table.aliases.retain(|_, alias| *alias != id);
        }
        last
    }
}

/// A path below another; the other itself for an empty one.
fn joined(to: &Path, rest: &Path) -> PathBuf {
    match rest.as_os_str().is_empty() {
        true => to.to_path_buf(),
        false => to.join(rest),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: FileId = FileId { dev: 1, ino: 7 };

    /// An empty file.
    fn stat(id: FileId) -> Stat {
        let dir = tempfile::tempdir().unwrap();
        let source = crate::fs::Source::open(dir.path()).unwrap();
        Stat {
            id,
            kind: Kind::File,
            ..source.stat(Path::new("")).unwrap()
        }
    }

    #[test]
    fn a_node_lives_until_its_last_reference_is_forgotten() {
        let nodes = Nodes::new(FileId { dev: 1, ino: 2 });
        let path = PathBuf::from("a.raw");
        let node = nodes.hold(path.clone(), &stat(FILE));
        nodes.hold(path.clone(), &stat(FILE));
        nodes.forget(node.id, 1);
        assert!(Arc::ptr_eq(&nodes.get(node.id).unwrap(), &node));
        nodes.forget(node.id, 1);
        assert_eq!(nodes.get(node.id).unwrap_err().errno, Errno::ESTALE);
        assert_eq!(nodes.id_of(&path, FILE), node.id);
    }

    #[test]
    fn a_replaced_file_gets_a_new_id() {
        let nodes = Nodes::new(FileId { dev: 1, ino: 2 });
        let path = Path::new("a.raw");
        assert_ne!(
            nodes.id_of(path, FILE),
            nodes.id_of(path, FileId { dev: 1, ino: 8 })
        );
    }

    #[test]
    fn a_file_that_a_change_of_ours_replaced_keeps_its_id() {
        const NEXT: FileId = FileId { dev: 1, ino: 8 };
        const LAST: FileId = FileId { dev: 1, ino: 9 };
        let nodes = Nodes::new(FileId { dev: 1, ino: 2 });
        let path = Path::new("a.vmdk");
        let node = nodes.hold(path.into(), &stat(FILE));
        for file in [NEXT, LAST] {
            nodes.follow(&node, file);
            assert_eq!(node.file(), file);
            assert_eq!(nodes.id_of(path, file), node.id);
            let again = nodes.hold(path.into(), &stat(file));
            assert!(Arc::ptr_eq(&again, &node));
        }
        assert_ne!(nodes.id_of(path, NEXT), node.id);
        assert!(nodes.forget(node.id, 3));
        assert_ne!(nodes.id_of(path, LAST), node.id);
    }

    #[test]
    fn the_root_is_always_there() {
        let nodes = Nodes::new(FILE);
        nodes.forget(NodeId::ROOT, 100);
        assert_eq!(*nodes.get(NodeId::ROOT).unwrap().path(), *Path::new(""));
        assert_eq!(nodes.id_of(Path::new(""), FILE), NodeId::ROOT);
    }

    #[test]
    fn a_renamed_node_keeps_its_id_and_frees_the_old_name() {
        let nodes = Nodes::new(FileId { dev: 1, ino: 2 });
        let (old, new) = (Path::new("d/a.raw"), Path::new("e/a.raw"));
        let node = nodes.hold(old.into(), &stat(FILE));
        nodes.rename(Path::new("d"), Path::new("e"));
        assert_eq!(*node.path(), *new);
        assert_eq!(nodes.id_of(new, FILE), node.id);
        // A second name of the same file, where the first one was.
        let again = nodes.hold(old.into(), &stat(FILE));
        assert_ne!(again.id, node.id);
        assert_eq!(nodes.id_of(old, FILE), again.id);
        assert!(nodes.forget(node.id, 1));
        assert_eq!(nodes.id_of(old, FILE), again.id);
    }

    #[test]
    fn the_next_file_with_the_name_and_number_of_an_orphan_is_another_node() {
        let nodes = Nodes::new(FileId { dev: 1, ino: 2 });
        let path = Path::new("a.raw");
        let node = nodes.hold(path.into(), &stat(FILE));
        let dir = tempfile::tempdir().unwrap();
        let source = crate::fs::Source::open(dir.path()).unwrap();
        nodes.orphan(&node, source.reach(Path::new("")).unwrap());
        assert!(nodes.held(path, FILE).is_none());
        let next = nodes.hold(path.into(), &stat(FILE));
        assert_ne!(next.id, node.id);
        assert!(nodes.get(node.id).unwrap().orphan().is_some());
    }
}
