//! Removing names.

use crate::fs::catalog::Face;
use crate::fs::entries::Spot;
use crate::fs::error::Result;
use crate::fs::filesystem::Filesystem;
use crate::fs::nodes::{Node, NodeId};
use crate::fs::open::OpenFile;
use crate::fs::reached::Reached;
use crate::fs::source::{FileId, Kind, Stat};
use crate::fs::sync::lock;
use instar_guest::proto::Format;
use nix::errno::Errno;
use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;

/// A file that is about to lose its name, and what its users keep of it.
pub struct Leaving {
    spot: Spot,
    stat: Stat,
    node: Option<(Arc<Node>, Reached)>,
    file: Option<Arc<OpenFile>>,
    /// Files that go with it.
    parts: Vec<(Spot, Stat)>,
}

impl Filesystem {
    /// Removes an image, and then the extents of a VMDK of several files.
    pub fn unlink(&self, parent: NodeId, name: &OsStr) -> Result<()> {
        self.calm_tree(parent, name);
        let _naming = lock(&self.naming);
        let spot = self.named(parent, name)?;
        let (stat, face) = self.shown(&spot.path)?;
        if stat.kind == Kind::Directory {
            return Err(Errno::EISDIR.into());
        }
        let node = self.known(&spot.path, &stat);
        let _moving = node.as_ref().map(|node| node.moving());
        let leaving = self.prepare_leaving(&spot, stat, face.as_ref(), node.clone())?;
        match self.source.remove(&spot, &stat) {
            Ok(()) => {
                self.has_left(leaving);
                Ok(())
            }
            Err(error) => {
                self.stays(leaving);
                Err(error)
            }
        }
    }

    /// Removes an empty directory.
    pub fn rmdir(&self, parent: NodeId, name: &OsStr) -> Result<()> {
        let _naming = lock(&self.naming);
        let spot = self.named(parent, name)?;
        let (stat, _) = self.shown(&spot.path)?;
        if stat.kind != Kind::Directory {
            return Err(Errno::ENOTDIR.into());
        }
        let node = self.known(&spot.path, &stat);
        let _moving = node.as_ref().map(|node| node.moving());
        let leaving = self.prepare_leaving(&spot, stat, None, node.clone())?;
        match self.source.remove(&spot, &stat) {
            Ok(()) => {
                self.has_left(leaving);
                Ok(())
            }
            Err(error) if error.errno == Errno::ENOTEMPTY => Err(self.refused(
                Errno::ENOTEMPTY,
                &spot.path,
                "the directory is not empty; it may hold files that are no images and not shown",
            )),
            Err(error) => Err(error),
        }
    }

    /// Everything that may refuse, and that has to be found out while the name
    /// is there. `node` is kept from changing its name by the caller.
    pub(super) fn prepare_leaving(
        &self,
        spot: &Spot,
        stat: Stat,
        face: Option<&Face>,
        node: Option<Arc<Node>>,
    ) -> Result<Leaving> {
        if stat.kind == Kind::File {
            self.no_backing_image(&spot.path, &stat)?;
        }
        let parts = self.parts_to_remove(spot, &stat, face);
        let node = match node {
            None => None,
            Some(node) => Some((node, self.source.reach(&spot.path)?)),
        };
        let file = node
            .as_ref()
            .and_then(|(node, _)| self.file_if_open(node.id));
        let leaving = Leaving {
            spot: spot.clone(),
            stat,
            node,
            file,
            parts,
        };
        match self.pin(&leaving) {
            // An image that is damaged or gone is of no use to whoever has it
            // open, and can be removed.
            Err(error) if error.errno == Errno::EBUSY || error.is_passing() => {
                self.stays(leaving);
                Err(error)
            }
            _ => Ok(leaving),
        }
    }

    fn pin(&self, leaving: &Leaving) -> Result<()> {
        match &leaving.file {
            Some(file) => {
                let handles = self.handles_of(file);
                file.pin(self.context(), handles.iter().any(|own| own.is_writable()))
            }
            None => Ok(()),
        }
    }

    /// The name is still there.
    pub(super) fn stays(&self, leaving: Leaving) {
        if let Some(file) = leaving.file {
            file.unpin();
            self.leave(&file);
        }
    }

    /// The name is gone.
    pub(super) fn has_left(&self, leaving: Leaving) {
        self.remember_trouble(leaving.stat.id, None);
        if let Some((node, reached)) = leaving.node {
            self.nodes.orphan(&node, reached);
        }
        if let Some(file) = leaving.file {
            self.leave(&file);
        }
        for (part, stat) in leaving.parts {
            if let Err(error) = self.source.remove(&part, &stat) {
                log::warn!(
                    "{}: could not be removed with {}: {error}",
                    self.source.display(&part.path).display(),
                    self.source.display(&leaving.spot.path).display()
                );
            }
        }
    }

    /// The extents that go with a VMDK: those that lie beside it, belong to its
    /// owner, are called as its own would be and are of no use to any other
    /// image. It may name any file, so whatever else it names stays. Data files
    /// of other formats are disks of their own.
    fn parts_to_remove(&self, spot: &Spot, image: &Stat, face: Option<&Face>) -> Vec<(Spot, Stat)> {
        let Some(Face::Image(portrait)) = face.filter(|_| image.kind == Kind::File) else {
            return Vec::new();
        };
        if portrait.format != Format::Vmdk {
            return Vec::new();
        }
        let names = portrait.files.iter().map(|file| file.name.as_str());
        let beside = names.filter(|name| Path::new(name).file_name() == Some(OsStr::new(name)));
        let (own, foreign): (Vec<_>, Vec<_>) =
            beside.partition(|name| is_name_of_extent(&spot.path, name));
        if let Some(first) = foreign.first() {
            log::warn!(
                "{}: {} of the files that it names stay where it is removed, as '{}', whose \
                 names do not go on from its own",
                self.source.display(&spot.path).display(),
                foreign.len(),
                crate::image::printable_name(first)
            );
        }
        if !own.is_empty() {
            self.catalog.survey_all(&self.source);
        }
        own.into_iter()
            .filter_map(|name| {
                let part = Spot {
                    path: spot.path.with_file_name(name),
                    directory: spot.directory,
                };
                let stat = self.source.stat(&part.path).ok()?;
                let goes = stat.kind == Kind::File
                    && stat.id != image.id
                    && (image.uid == 0 || image.uid == stat.uid)
                    && !self
                        .catalog
                        .is_used_besides(&self.source, &part.path, stat.id, image.id);
                goes.then_some((part, stat))
            })
            .collect()
    }
}

/// Whether an extent of a VMDK is called as programs call those that they make
/// for it: for `disk.vmdk` `disk-flat.vmdk`, `disk-delta.vmdk`, `disk-s001.vmdk`
/// or `disk-f001.vmdk`.
fn is_name_of_extent(image: &Path, name: &str) -> bool {
    let stem = image.file_stem().and_then(OsStr::to_str);
    let own = stem.and_then(|stem| name.strip_prefix(stem)?.strip_suffix(".vmdk"));
    own.is_some_and(|own| {
        let number = own.strip_prefix("-s").or_else(|| own.strip_prefix("-f"));
        let is_numbered = number.is_some_and(|number| {
            !number.is_empty() && number.bytes().all(|digit| digit.is_ascii_digit())
        });
        is_numbered || own == "-flat" || own == "-delta"
    })
}

impl Leaving {
    /// Which file it is.
    pub(super) fn id(&self) -> FileId {
        self.stat.id
    }
}
