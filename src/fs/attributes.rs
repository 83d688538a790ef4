//! The attributes of files and directories.

use super::catalog::Face;
use super::error::Result;
use super::filesystem::Filesystem;
use super::nodes::{Node, NodeId};
use super::reached::Reached;
use super::source::{NewTime, Stat};
use crate::image::Access;
use nix::sys::statvfs::Statvfs;
use std::path::Path;

/// `st_blksize` of images in bytes, whatever their allocation unit. Programs that
/// dig holes (`fallocate -d`) rely on it: no hole that `lseek` tells of begins or
/// ends inside such a block.
pub(super) const BLOCK: u32 = 4096;

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

impl Filesystem {
    /// The attributes of a node.
    pub fn getattr(&self, id: NodeId) -> Result<Attributes> {
        let node = self.nodes.get(id)?;
        let has_size = || {
            let open = self.file_known(node.id);
            open.is_some_and(|open| open.virtual_size().is_some())
        };
        // Where the image is closed meanwhile, with its last change made, the look
        // at its file may be older than that.
        let was_open = has_size();
        let looked = self.look_at(&node)?;
        match was_open && !has_size() {
            true => self.look_at(&node),
            false => Ok(looked),
        }
    }

    fn look_at(&self, node: &Node) -> Result<Attributes> {
        let stat = self.stat(node)?;
        let face = self.face(node, &stat);
        self.attributes(node.id, &node.path(), stat, face.as_ref())
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
            self.on_file(&node, |file| file.chown(changes.uid, changes.gid))?;
        }
        if let Some(perm) = changes.perm {
            self.on_file(&node, |file| file.chmod(perm))?;
        }
        if changes.atime.is_some() || changes.mtime.is_some() {
            self.set_times(&node, changes)?;
        }
        self.getattr(id)
    }

    /// Sets the permission bits.
    pub(super) fn chmod(&self, id: NodeId, perm: u32) -> Result<()> {
        let node = self.nodes.get(id)?;
        self.on_file(&node, |file| file.chmod(perm))
    }

    /// Sets times. Where the image is open but not locked, its next user takes
    /// a new time of modification for somebody else's change: so it is locked
    /// meanwhile, if it can be. What waits for a flush would give it a new time
    /// later: so it is flushed first.
    fn set_times(&self, node: &Node, changes: &Changes) -> Result<()> {
        let set = || {
            self.on_file(node, |file| {
                let before = file.stat()?;
                let is_ours = node.is_as_noted(&before);
                file.utimens(changes.atime, changes.mtime)?;
                let after = file.stat()?;
                if is_ours {
                    node.note(&after);
                }
                self.memory.retime(node.id, &before, &after);
                Ok(())
            })
        };
        let Some(file) = self.file_if_open(node.id) else {
            return set();
        };
        let flushed = file.flush();
        let done = file.with(self.context(), Access::Read, |_| Ok(set()));
        let settled = file.settle(self.context());
        self.leave(&file);
        match done {
            Ok(done) => done.and(flushed).and(settled),
            Err(_) => set(),
        }
    }

    /// Works with the source file itself, whatever its name, or that it has
    /// none any more; not with another that has got its name.
    fn on_file(&self, node: &Node, work: impl FnOnce(&Reached) -> Result<()>) -> Result<()> {
        match node.orphan() {
            Some(orphan) => work(orphan),
            None => work(&self.reach_now(node)?.0),
        }
    }

    /// An open image answers for itself, whatever a look at its file says. A
    /// look that failed for want of something says nothing about the size.
    pub(super) fn attributes(
        &self,
        id: NodeId,
        path: &Path,
        mut stat: Stat,
        face: Option<&Face>,
    ) -> Result<Attributes> {
        let own_size = || {
            let open = self.file_known(id)?;
            match open.passage() {
                Some(_) => Some(stat.size),
                None => open.virtual_size(),
            }
        };
        let size = match face {
            None => stat.size,
            Some(Face::Image(portrait)) => own_size().unwrap_or(portrait.virtual_size),
            Some(Face::Unusable(error)) => match own_size() {
                Some(size) => size,
                None if error.is_passing() => return Err(error.clone()),
                None => 0,
            },
            Some(Face::Blank(_) | Face::Hidden) => own_size().unwrap_or(0),
        };
        let block = face.map_or(stat.blksize, |_| BLOCK);
        if let Some(Face::Image(portrait)) = face {
            let parts = self
                .catalog
                .blocks_of_parts(&self.source, path, stat.id, portrait);
            stat.blocks = stat.blocks.saturating_add(parts);
        }
        Ok(Attributes {
            id,
            size,
            block,
            stat,
        })
    }

    /// Space and files of the file system that holds the images.
    pub fn statfs(&self) -> Result<Statvfs> {
        self.source.statvfs()
    }
}
