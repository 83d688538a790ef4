//! Opening: which file, under which lock, in which format, over which backing
//! chain.

use super::error::Error;
use super::gate::Tree;
use super::{Access, Image};
use crate::sandbox::Pool;
use instar_guest::Format;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What happens with the backing file that an image names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BackingPolicy {
    /// It is opened, and so is the chain below it.
    #[default]
    Open,
    /// It is left alone: facts and resizes work, ranges that are not in this
    /// image cannot be read.
    Skip,
    /// An image that names one is refused.
    Refuse,
}

/// How to open an image.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// The format to read the file as; `None` probes.
    pub format: Option<Format>,
    /// What the image is opened for.
    pub access: Access,
    /// Reads although another process may be writing: no locks are taken.
    pub force_share: bool,
    /// What happens with the backing file.
    pub backing: BackingPolicy,
    /// Directories besides the tree whose files an image may name.
    pub allow_paths: Vec<PathBuf>,
}

/// Where an image lies, for one that is opened by descriptor.
#[derive(Clone, Debug)]
pub struct Location {
    /// The path that texts name.
    pub path: PathBuf,
    /// The tree whose files the image may name.
    pub tree: Arc<Tree>,
    /// The image's path below the tree's root.
    pub inside: PathBuf,
}

impl OpenOptions {
    /// Options for an access, everything else as usual.
    pub fn new(access: Access) -> Self {
        Self {
            format: None,
            access,
            force_share: false,
            backing: BackingPolicy::Open,
            allow_paths: Vec::new(),
        }
    }

    /// Opens the image at a path. Files that it names must lie in its own
    /// directory, below it, or below one of the allowed paths.
    pub fn open(&self, pool: &Arc<Pool>, path: &Path) -> Result<Image, Error> {
        let _ = (pool, path);
        Err(super::unfinished())
    }

    /// Opens the image that a descriptor stands for. The descriptor must allow
    /// writing if `access` does; the image keeps it, and with it the lock.
    pub fn open_file(&self, pool: &Arc<Pool>, file: File, at: Location) -> Result<Image, Error> {
        let _ = (pool, file, at);
        Err(super::unfinished())
    }
}
