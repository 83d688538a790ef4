//! Node ids: how the kernel names files to us.
//!
//! An id is a keyed hash of path and identity, so that a listing and a lookup
//! agree on it without remembering every name that was ever listed, and so
//! that a file that was replaced gets a new id - unless a change of ours replaced
//! it: then it is the same image to everybody who has it open. Only what the
//! kernel holds is in the table.

use super::error::{Error, Result};
use super::source::{FileId, Kind};
use super::sync::{lock, read, write};
use nix::errno::Errno;
use std::collections::HashMap;
use std::collections::hash_map::{Entry, RandomState};
use std::hash::BuildHasher;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, RwLock};

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
    /// Path below SOURCE; empty for the root.
    pub path: PathBuf,
    /// Directory or regular file.
    pub kind: Kind,
    file: Mutex<FileId>,
    size_is_whole: AtomicBool,
}

impl Node {
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

    fn is(&self, path: &Path, file: FileId, kind: Kind) -> bool {
        self.path == path && self.file() == file && self.kind == kind
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
    /// The ids of files that took the place of others, by what theirs would be.
    followed: HashMap<NodeId, NodeId>,
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
            root: Arc::new(Node {
                id: NodeId::ROOT,
                path: PathBuf::new(),
                kind: Kind::Directory,
                file: Mutex::new(root),
                size_is_whole: AtomicBool::new(false),
            }),
        }
    }

    /// The id of a file by that path.
    pub fn id_of(&self, path: &Path, file: FileId) -> NodeId {
        if path.as_os_str().is_empty() {
            return NodeId::ROOT;
        }
        let id = self.natural_id(path, file);
        read(&self.held).followed.get(&id).copied().unwrap_or(id)
    }

    fn natural_id(&self, path: &Path, file: FileId) -> NodeId {
        // 0 and 1 have meanings of their own.
        NodeId((self.keys.hash_one((path, file)) >> 1) + 2)
    }

    /// Another file has the node's name now, by a change of ours: it is the
    /// same node all the same.
    pub fn follow(&self, node: &Node, file: FileId) {
        let mut table = write(&self.held);
        if !table.held.contains_key(&node.id) || node.file() == file {
            return;
        }
        table.followed.retain(|_, id| *id != node.id);
        let natural = self.natural_id(&node.path, file);
        table.followed.insert(natural, node.id);
        *lock(&node.file) = file;
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

    /// Counts one more reference that the kernel gets to a file.
    pub fn hold(&self, path: PathBuf, file: FileId, kind: Kind) -> Result<Arc<Node>> {
        let id = self.id_of(&path, file);
        if id == NodeId::ROOT {
            return Ok(Arc::clone(&self.root));
        }
        match write(&self.held).held.entry(id) {
            Entry::Vacant(slot) => {
                let node = Arc::new(Node {
                    id,
                    path,
                    kind,
                    file: Mutex::new(file),
                    size_is_whole: AtomicBool::new(false),
                });
                slot.insert(Held {
                    node: Arc::clone(&node),
                    lookups: 1,
                });
                Ok(node)
            }
            Entry::Occupied(mut slot) if slot.get().node.is(&path, file, kind) => {
                slot.get_mut().lookups += 1;
                Ok(Arc::clone(&slot.get().node))
            }
            Entry::Occupied(slot) => Err(Error::new(
                Errno::EIO,
                format!(
                    "{} and {} got the same id; mount again",
                    path.display(),
                    slot.get().node.path.display()
                ),
            )),
        }
    }

    /// Takes back references that the kernel gave up; whether those were the
    /// last ones.
    pub fn forget(&self, id: NodeId, count: u64) -> bool {
        let mut table = write(&self.held);
        let Entry::Occupied(mut slot) = table.held.entry(id) else {
            return false;
        };
        let held = slot.get_mut();
        held.lookups = held.lookups.saturating_sub(count);
        let last = held.lookups == 0;
        if last {
            slot.remove();
            table.followed.retain(|_, followed| *followed != id);
        }
        last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: FileId = FileId { dev: 1, ino: 7 };

    #[test]
    fn a_node_lives_until_its_last_reference_is_forgotten() {
        let nodes = Nodes::new(FileId { dev: 1, ino: 2 });
        let path = PathBuf::from("a.raw");
        let node = nodes.hold(path.clone(), FILE, Kind::File).unwrap();
        nodes.hold(path.clone(), FILE, Kind::File).unwrap();
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
        let node = nodes.hold(path.into(), FILE, Kind::File).unwrap();
        for file in [NEXT, LAST] {
            nodes.follow(&node, file);
            assert_eq!(node.file(), file);
            assert_eq!(nodes.id_of(path, file), node.id);
            let again = nodes.hold(path.into(), file, Kind::File).unwrap();
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
        assert_eq!(nodes.get(NodeId::ROOT).unwrap().path, Path::new(""));
        assert_eq!(nodes.id_of(Path::new(""), FILE), NodeId::ROOT);
    }
}
