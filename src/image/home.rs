//! Where an open file's name is, so that it can be looked up again.

use super::gate::Tree;
use super::handles::id_of;
use nix::fcntl::OFlag;
use std::ffi::OsStr;
use std::fs::{File, Metadata};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Where the name of an open file can be looked up again.
#[derive(Clone, Debug)]
pub(crate) enum Home {
    /// A path that the user gave.
    Path(PathBuf),
    /// A path below a tree.
    Below(Arc<Tree>, PathBuf),
}

impl Home {
    /// Whether the name still stands for this file.
    pub fn holds(&self, file: &File) -> io::Result<bool> {
        match self.metadata()? {
            Some(named) => Ok(super::handles::id(&named) == id_of(file)?),
            None => Ok(false),
        }
    }

    /// Attributes of the file that the name stands for, if there is one.
    pub fn metadata(&self) -> io::Result<Option<Metadata>> {
        let named = match self {
            Self::Path(path) => std::fs::metadata(path),
            Self::Below(tree, path) => tree
                .open_below(path, OFlag::O_PATH)
                .and_then(|file| file.metadata()),
        };
        match named {
            Ok(named) => Ok(Some(named)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The name itself, without directories.
    pub fn name(&self) -> &OsStr {
        let (Self::Path(path) | Self::Below(_, path)) = self;
        path.file_name().unwrap_or_default()
    }

    /// The tree that the file lies in, and its path there. The directory of a
    /// path that the user gave is a tree.
    pub fn tree(&self) -> io::Result<(Arc<Tree>, PathBuf)> {
        match self {
            Self::Below(tree, path) => Ok((Arc::clone(tree), path.clone())),
            Self::Path(path) => {
                let dir = Arc::new(Tree::open(directory(path))?);
                Ok((dir, self.name().into()))
            }
        }
    }
}

/// The directory that a path's last component is looked up in.
pub(crate) fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if dir != Path::new("") => dir,
        _ => Path::new("."),
    }
}
