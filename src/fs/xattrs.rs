//! What the mount says about an image besides its content: the extended
//! attributes, and why something failed.

use super::catalog::Face;
use super::disk::At;
use super::error::{Error, Result};
use super::filesystem::Filesystem;
use super::nodes::{Node, NodeId};
use super::source::{FileId, Stat};
use super::sync::lock;
use nix::errno::Errno;
use std::ffi::OsStr;

/// Reasons of failures that are remembered for `user.instar.error`.
const TROUBLES: usize = 4096;

impl Filesystem {
    /// The names of a node's extended attributes.
    pub fn listxattr(&self, id: NodeId) -> Result<Vec<&'static str>> {
        let node = self.nodes.get(id)?;
        let stat = self.stat(&node)?;
        let mut names = Vec::new();
        match self.face(&node, &stat) {
            Some(Face::Image(_)) => names.extend(["user.instar.format", "user.instar.info"]),
            Some(Face::Blank(_)) => names.push("user.instar.format"),
            _ => {}
        }
        if self.trouble(&node, &stat).is_some() {
            names.push("user.instar.error");
        }
        Ok(names)
    }

    /// The value of an extended attribute.
    pub fn getxattr(&self, id: NodeId, name: &OsStr) -> Result<Vec<u8>> {
        if !name.as_encoded_bytes().starts_with(b"user.instar.") {
            return Err(Errno::ENODATA.into());
        }
        let node = self.nodes.get(id)?;
        if id == NodeId::ROOT && name == "user.instar.pid" {
            return Ok(std::process::id().to_string().into_bytes());
        }
        let stat = self.stat(&node)?;
        let value = match (name.to_str(), self.face(&node, &stat)) {
            (Some("user.instar.format"), Some(Face::Image(portrait))) => {
                portrait.format.name().to_string()
            }
            (Some("user.instar.format"), Some(Face::Blank(format))) => format.name().to_string(),
            (Some("user.instar.info"), Some(Face::Image(_))) => self.info(&node)?,
            (Some("user.instar.error"), _) => {
                let trouble = self.trouble(&node, &stat).ok_or(Errno::ENODATA)?;
                trouble.to_string()
            }
            _ => return Err(Errno::ENODATA.into()),
        };
        Ok(value.into_bytes())
    }

    fn info(&self, node: &Node) -> Result<String> {
        let (file, _) = self.source.open_file(&node.path(), false)?;
        let at = At {
            source: &self.source,
            path: &node.path(),
            format: self.catalog.format_for(&node.path()),
        };
        self.catalog.library().info(at, file)
    }

    /// Why an image cannot be used, or why the last call on it that failed did.
    fn trouble(&self, node: &Node, stat: &Stat) -> Option<Error> {
        match self.face(node, stat) {
            Some(Face::Unusable(error)) => Some(error),
            _ => lock(&self.troubles).get(&stat.id).cloned(),
        }
    }

    /// Writes a failure to the log, with the name of the image unless its text
    /// has it already, and keeps its text for `user.instar.error`.
    pub fn report(&self, node: &Node, error: &Error) {
        if error.message.is_some() {
            self.remember_trouble(node.file(), Some(error));
        }
        let path = self.source.display(&node.path()).display().to_string();
        let text = error.to_string();
        if text.contains(&path) {
            log::log!(error.level(), "{text}");
        } else {
            log::log!(error.level(), "{path}: {text}");
        }
    }

    /// The same for a node by id.
    pub fn report_for(&self, id: NodeId, error: &Error) {
        match self.nodes.get(id) {
            Ok(node) => self.report(&node, error),
            Err(_) => log::log!(error.level(), "{error}"),
        }
    }

    pub(super) fn remember_trouble(&self, file: FileId, error: Option<&Error>) {
        let mut troubles = lock(&self.troubles);
        match error {
            None => {
                troubles.remove(&file);
            }
            Some(error) => {
                if troubles.len() >= TROUBLES {
                    troubles.clear();
                }
                troubles.insert(file, error.clone());
            }
        }
    }
}
