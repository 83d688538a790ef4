//! What the kernel may go on believing about an image: which content its page
//! cache holds, and when to drop it.
//!
//! The cache is never invalidated behind the kernel's back while the image is
//! locked: a read that overtakes a write in flight would then bring old content
//! back into it. Content changes only through us as long as we hold the lock;
//! so what counts is whether the file is what it was when we last let go.

use super::nodes::NodeId;
use super::source::{Stat, Time};
use super::sync::lock;
use std::collections::HashMap;
use std::sync::{Mutex, OnceLock};

/// What the kernel must ask for anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stale {
    /// The attributes.
    Attributes,
    /// Content and attributes.
    Content,
}

/// Tells the kernel. Called while requests are being served: it must not wait
/// for one.
pub type Invalidate = Box<dyn Fn(NodeId, Stale) + Send + Sync>;

/// The version of an image's content.
type Version = (u64, Time);

/// See the module.
#[derive(Default)]
pub struct Memory {
    left: Mutex<HashMap<NodeId, Version>>,
    invalidate: OnceLock<Invalidate>,
}

impl Memory {
    /// Says how to reach the kernel, once the mount is there.
    pub fn set_invalidate(&self, invalidate: Invalidate) {
        self.invalidate.get_or_init(|| invalidate);
    }

    /// The lock is about to be given up, and the file is like this.
    pub fn leave(&self, node: NodeId, stat: &Stat) {
        lock(&self.left).insert(node, version(stat));
    }

    /// Whether the file is as it was when the lock was last given up.
    pub fn is_current(&self, node: NodeId, stat: &Stat) -> bool {
        lock(&self.left).get(&node) == Some(&version(stat))
    }

    /// We have given the file another time, and changed nothing else.
    pub fn retime(&self, node: NodeId, before: &Stat, after: &Stat) {
        if let Some((_, time)) = lock(&self.left).get_mut(&node)
            && *time == before.mtime
        {
            *time = after.mtime;
        }
    }

    /// The kernel has no cache for the node any more.
    pub fn forget(&self, node: NodeId) {
        lock(&self.left).remove(&node);
    }

    /// Something is not what the kernel believes.
    pub fn invalidate(&self, node: NodeId, what: Stale) {
        if let Some(invalidate) = self.invalidate.get() {
            invalidate(node, what);
        }
    }
}

fn version(stat: &Stat) -> Version {
    (stat.size, stat.mtime)
}
