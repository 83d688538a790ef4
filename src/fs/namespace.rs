//! The calls that change names: files and directories made, removed, renamed.
//!
//! They change SOURCE, one at a time. Who has an image open goes on with it: one
//! that is renamed is closed meanwhile and opened again under its new name, one
//! that is removed stays open and locked until its last handle is closed. What
//! would change how an image is read, or leave one without the files that it
//! names, is refused.

mod removal;
mod renaming;

use super::attributes::Attributes;
use super::catalog::Face;
use super::entries::{Birth, Spot};
use super::error::{Error, Result};
use super::filesystem::{Filesystem, OpenedHandle};
use super::names::is_replacement;
use super::nodes::{Node, NodeId};
use super::source::{Kind, Stat};
use super::sync::lock;
use crate::image::NameRule;
use nix::errno::Errno;
use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;

/// Permission of the owner to read and write.
const OWNER: u32 = 0o600;

/// How `open` is to make a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Creation {
    /// Whose it is to be.
    pub birth: Birth,
    /// Whether a file that is there already is a failure.
    pub exclusive: bool,
    /// Whether the handle may write.
    pub writable: bool,
}

impl Filesystem {
    /// Makes an empty file that is to become an image, and opens it. Counts one
    /// reference to it. For one that is there already it is ESTALE: the kernel,
    /// which did not know of it, looks again, and opens it as its permissions
    /// allow.
    pub fn create(
        &self,
        parent: NodeId,
        name: &OsStr,
        how: Creation,
    ) -> Result<(Attributes, OpenedHandle)> {
        self.calm(parent, name);
        let (spot, made, attributes) = {
            let _naming = lock(&self.naming);
            let spot = self.new_name(parent, name)?;
            let made = self.make_file(&spot, how)?;
            let held = self.hold(spot.path.clone());
            let attributes = held.inspect_err(|_| self.unmake(&spot, &made))?;
            (spot, made, attributes)
        };
        self.open_new(attributes, &made, how).inspect_err(|_| {
            self.forget(attributes.id, 1);
            let _naming = lock(&self.naming);
            self.unmake(&spot, &made);
        })
    }

    fn make_file(&self, spot: &Spot, how: Creation) -> Result<Stat> {
        self.names_an_image(&spot.path)?;
        // Whoever makes a file that he may not write has it open to write all
        // the same; here it is opened once more.
        let birth = Birth {
            perm: how.birth.perm | OWNER,
            ..how.birth
        };
        match self.source.create_file(spot, birth) {
            Err(error) if error.errno == Errno::EEXIST => {
                self.is_shown(spot)?;
                Err(match how.exclusive {
                    true => error,
                    false => Errno::ESTALE.into(),
                })
            }
            made => made,
        }
    }

    /// Removes a file that is of no use.
    fn unmake(&self, spot: &Spot, made: &Stat) {
        // The failure at hand is the one to tell.
        let _ = self.source.remove(spot, made);
    }

    /// Opens a file that was made just now, and gives it its permissions.
    fn open_new(
        &self,
        attributes: Attributes,
        made: &Stat,
        how: Creation,
    ) -> Result<(Attributes, OpenedHandle)> {
        if attributes.stat.id != made.id {
            return Err(Errno::ESTALE.into());
        }
        let id = attributes.id;
        let opened = self.open(id, how.writable)?;
        if how.birth.perm & OWNER == OWNER {
            return Ok((attributes, opened));
        }
        let permitted = self.chmod(id, how.birth.perm);
        match permitted.and_then(|()| self.getattr(id)) {
            Ok(attributes) => Ok((attributes, opened)),
            Err(error) => {
                self.release(opened.handle);
                Err(error)
            }
        }
    }

    /// Makes a directory. Counts one reference to it.
    pub fn mkdir(&self, parent: NodeId, name: &OsStr, birth: Birth) -> Result<Attributes> {
        let _naming = lock(&self.naming);
        let spot = self.new_name(parent, name)?;
        if let Err(error) = self.source.create_directory(&spot, birth) {
            if error.errno == Errno::EEXIST {
                self.is_shown(&spot)?;
            }
            return Err(error);
        }
        self.hold(spot.path)
    }

    /// Makes the names in a directory durable.
    pub fn fsyncdir(&self, id: NodeId) -> Result<()> {
        let node = self.nodes.get(id)?;
        match node.orphan() {
            Some(_) => Ok(()),
            None => self.source.sync_directory(&node.path()),
        }
    }

    /// Does what may take long before names are kept from changing, so that
    /// nobody who changes another name waits for it: what has this name, and
    /// lies below it, is left by those who work with it, and the images beside
    /// it are looked at. All of that may have changed by the time of the change,
    /// which finds it out itself.
    fn calm(&self, parent: NodeId, name: &OsStr) {
        if let Some(spot) = self.calm_names(parent, name) {
            self.catalog.survey_siblings(&self.source, &spot.path);
        }
    }

    fn calm_names(&self, parent: NodeId, name: &OsStr) -> Option<Spot> {
        let spot = self.named(parent, name).ok()?;
        for node in self.nodes.below(&spot.path) {
            drop(node.moving());
            if let Some(file) = self.file_if_open(node.id) {
                file.calm();
                self.leave(&file);
            }
        }
        Some(spot)
    }

    /// The same for a name that something else may lose or follow: every image of
    /// the tree is looked at.
    fn calm_tree(&self, parent: NodeId, name: &OsStr) {
        if self.calm_names(parent, name).is_some() {
            self.catalog.survey_all(&self.source);
        }
    }

    /// A name in a directory in which names may be changed. To be
    /// asked for by the holder of `naming`, before whose time the directory may
    /// have had another name.
    fn named(&self, parent: NodeId, name: &OsStr) -> Result<Spot> {
        self.writable()?;
        if !self.source.is_directory() {
            return Err(Error::new(
                Errno::EROFS,
                "SOURCE is one image: mount its directory to change names",
            ));
        }
        let parent = self.nodes.get(parent)?;
        match (parent.orphan(), parent.kind) {
            (None, Kind::Directory) => Ok(Spot {
                path: parent.path().join(name),
                directory: parent.file(),
            }),
            (Some(_), Kind::Directory) => Err(Errno::ENOENT.into()),
            (_, Kind::File) => Err(Errno::ENOTDIR.into()),
        }
    }

    /// The same for a name that something is to get.
    fn new_name(&self, parent: NodeId, name: &OsStr) -> Result<Spot> {
        let spot = self.named(parent, name)?;
        if is_replacement(&spot.path) {
            return Err(self.refused(
                Errno::EINVAL,
                &spot.path,
                "names like this are those of unfinished changes; choose another",
            ));
        }
        Ok(spot)
    }

    /// Refuses a name for an image that does not say its format, or that is
    /// that of a missing part of another image.
    fn names_an_image(&self, path: &Path) -> Result<()> {
        if self.catalog.rule_for(path) == NameRule::Probe {
            return Err(self.refused(
                Errno::EINVAL,
                path,
                "the name does not say what format a new image is to have; end it in .qcow2, \
                 .vmdk, .vhd, .vhdx or .raw, or mount with -o format=GLOB:FMT",
            ));
        }
        self.is_no_part(path)
    }

    fn is_no_part(&self, path: &Path) -> Result<()> {
        match self.catalog.expects(&self.source, path) {
            None => Ok(()),
            Some(image) => {
                let image = self.source.display(&image);
                let text = format!("{} names it for a part of itself", image.display());
                Err(self.refused(Errno::EINVAL, path, &text))
            }
        }
    }

    /// Says of a name that is taken in SOURCE by something that the mount does
    /// not show, that it is.
    fn is_shown(&self, spot: &Spot) -> Result<()> {
        let path = &spot.path;
        let shown = self
            .source
            .stat(path)
            .is_ok_and(|stat| self.face_if_file(path, &stat) != Some(Face::Hidden));
        match shown || !self.source.is_taken(spot)? {
            true => Ok(()),
            false => Err(self.refused(
                Errno::EEXIST,
                path,
                "SOURCE has something of this name that is not shown, as it is no image of its own",
            )),
        }
    }

    /// What has that name, if the mount shows it.
    fn shown(&self, path: &Path) -> Result<(Stat, Option<Face>)> {
        let stat = self.source.stat(path)?;
        match self.face_if_file(path, &stat) {
            Some(Face::Hidden) => Err(Errno::ENOENT.into()),
            face => Ok((stat, face)),
        }
    }

    fn refused(&self, errno: Errno, path: &Path, why: &str) -> Error {
        let path = self.source.display(path);
        Error::new(errno, format!("{}: {why}", path.display()))
    }

    /// The node of a file, if the kernel has one.
    fn known(&self, path: &Path, stat: &Stat) -> Option<Arc<Node>> {
        self.nodes.held(path, stat.id)
    }
}
