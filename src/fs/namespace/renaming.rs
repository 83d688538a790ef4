//! Giving names to what has others.

use super::removal::Leaving;
use crate::fs::catalog::Face;
use crate::fs::entries::Spot;
use crate::fs::error::Result;
use crate::fs::filesystem::Filesystem;
use crate::fs::moves::Move;
use crate::fs::nodes::{Node, NodeId};
use crate::fs::open::OpenFile;
use crate::fs::source::{Kind, Stat};
use crate::fs::sync::lock;
use crate::image::NameRule;
use nix::errno::Errno;
use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;

/// What is renamed.
struct Subject {
    stat: Stat,
    face: Option<Face>,
}

impl Filesystem {
    /// Gives an image or a directory another name. `replace` says whether it may
    /// be one that another has.
    pub fn rename(
        &self,
        parent: NodeId,
        name: &OsStr,
        new_parent: NodeId,
        new_name: &OsStr,
        replace: bool,
    ) -> Result<()> {
        self.calm_names(parent, name);
        self.calm_tree(new_parent, new_name);
        let _naming = lock(&self.naming);
        let from = self.named(parent, name)?;
        let to = self.new_name(new_parent, new_name)?;
        let (stat, face) = self.shown(&from.path)?;
        let subject = Subject { stat, face };
        let over = self.target(&subject, &to, replace)?;
        if over
            .as_ref()
            .is_some_and(|(over, _)| over.id == subject.stat.id)
        {
            // Two names of one file: rename(2) leaves them alone.
            return Ok(());
        }
        self.may_move(&subject, &from.path, &to.path)?;
        self.move_files(&subject, &from, &to, over)
    }

    /// What has the new name. The kernel knows only of what is shown.
    fn target(
        &self,
        subject: &Subject,
        to: &Spot,
        replace: bool,
    ) -> Result<Option<(Stat, Option<Face>)>> {
        match self.shown(&to.path) {
            Ok(_) if !replace => Err(Errno::EEXIST.into()),
            Ok((stat, face)) => match (subject.stat.kind, stat.kind) {
                (Kind::File, Kind::Directory) => Err(Errno::EISDIR.into()),
                (Kind::Directory, Kind::File) => Err(Errno::ENOTDIR.into()),
                _ => Ok(Some((stat, face))),
            },
            Err(error) if error.errno == Errno::ENOENT => {
                self.is_shown(to)?;
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Refuses a name under which the image would be read otherwise, or that
    /// would keep an image from finding its files.
    fn may_move(&self, subject: &Subject, from: &Path, to: &Path) -> Result<()> {
        let moved = Move {
            source: &self.source,
            from,
            to,
        };
        let lost = match (subject.stat.kind, &subject.face) {
            (Kind::Directory, _) => {
                self.names_go_by_files(from)?;
                self.catalog.disturbed_by(moved)
            }
            (Kind::File, Some(Face::Image(portrait))) => {
                self.no_backing_image(from, &subject.stat)?;
                let lost = moved.lost(from, portrait);
                lost.map(|name| (from.to_path_buf(), name.to_string()))
            }
            (Kind::File, _) => {
                self.no_backing_image(from, &subject.stat)?;
                None
            }
        };
        if subject.stat.kind == Kind::File {
            self.says_the_same(subject, from, to)?;
            self.is_no_part(to)?;
        }
        match lost {
            None => Ok(()),
            Some((image, name)) => Err(self.refused(
                Errno::EINVAL,
                from,
                &format!(
                    "{} names the file '{}' and would not find it any more",
                    self.source.display(&image).display(),
                    crate::image::printable_name(&name)
                ),
            )),
        }
    }

    /// A name decides the format, so the new one must decide it as the old one
    /// does; an image that was found by its header may get a name that says
    /// what it is.
    fn says_the_same(&self, subject: &Subject, from: &Path, to: &Path) -> Result<()> {
        let (old, new) = (self.catalog.rule_for(from), self.catalog.rule_for(to));
        let same = match (old, new, &subject.face) {
            (NameRule::Probe, NameRule::Must(format), Some(Face::Image(portrait))) => {
                portrait.format == format
            }
            _ => old == new,
        };
        match same {
            true => Ok(()),
            false => Err(self.refused(
                Errno::EINVAL,
                from,
                &format!(
                    "the name '{}' says something else about the format of the image; copy the \
                     disk to a new image to convert it",
                    self.source.display(to).display()
                ),
            )),
        }
    }

    fn names_go_by_files(&self, directory: &Path) -> Result<()> {
        match self.catalog.has_rules_for_paths() {
            false => Ok(()),
            true => Err(self.refused(
                Errno::EINVAL,
                directory,
                "-o format=GLOB:FMT has a rule for paths, by which what lies in this directory \
                 could be read otherwise under another name",
            )),
        }
    }

    /// Renames it while nobody has the images open that change their names with
    /// it.
    fn move_files(
        &self,
        subject: &Subject,
        from: &Spot,
        to: &Spot,
        over: Option<(Stat, Option<Face>)>,
    ) -> Result<()> {
        let nodes = self.nodes.below(&from.path);
        let target = over
            .as_ref()
            .and_then(|(stat, _)| self.nodes.held(&to.path, stat.id));
        let _moving: Vec<_> = nodes
            .iter()
            .chain(&target)
            .map(|node| node.moving())
            .collect();
        let files = self.open_below(&nodes);
        let done = over
            .map(|(stat, face)| self.prepare_leaving(to, stat, face.as_ref(), target.clone()))
            .transpose()
            .and_then(|leaving| self.move_closed(subject, from, to, &files, leaving));
        files.iter().for_each(|file| self.leave(file));
        done
    }

    fn open_below(&self, nodes: &[Arc<Node>]) -> Vec<Arc<OpenFile>> {
        let open = |node: &Arc<Node>| self.file_if_open(node.id);
        nodes.iter().filter_map(open).collect()
    }

    fn move_closed(
        &self,
        subject: &Subject,
        from: &Spot,
        to: &Spot,
        files: &[Arc<OpenFile>],
        leaving: Option<Leaving>,
    ) -> Result<()> {
        let renamed = files
            .iter()
            .map(|file| file.pause(self.context()))
            .collect::<Result<Vec<_>>>()
            .and_then(|paused| {
                let over = leaving.as_ref().map(Leaving::id);
                self.source.rename(from, subject.stat.id, to, over)?;
                self.nodes.rename(&from.path, &to.path);
                drop(paused);
                Ok(())
            });
        match (leaving, &renamed) {
            (Some(leaving), Ok(())) => self.has_left(leaving),
            (Some(leaving), Err(_)) => self.stays(leaving),
            (None, _) => {}
        }
        renamed
    }
}
