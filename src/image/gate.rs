//! The gate that every file name in an image passes.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// A directory below which images may name files.
#[derive(Debug)]
pub struct Tree {
    root: OwnedFd,
    /// The root's absolute paths, for absolute names.
    paths: Vec<PathBuf>,
}

impl Tree {
    /// The tree below a directory.
    pub fn open(path: &Path) -> io::Result<Self> {
        let root = File::open(path)?.into();
        Ok(Self::new(root, path))
    }

    /// The tree below a directory that is open already; `path` is the path
    /// under which absolute names may refer to it.
    pub fn new(root: OwnedFd, path: &Path) -> Self {
        let paths = [std::path::absolute(path), path.canonicalize()]
            .into_iter()
            .flatten()
            .collect();
        Self { root, paths }
    }

    pub(crate) fn root(&self) -> (&OwnedFd, &[PathBuf]) {
        (&self.root, &self.paths)
    }
}
