//! Making a new image.

use super::error::Error;
use crate::sandbox::Pool;
use instar_guest::proto::Create;
use std::path::Path;
use std::sync::Arc;

/// What [`create`] has done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Created {
    /// Every effective option, in the order in which qemu-img prints them.
    pub options: Vec<(String, String)>,
    /// Warnings for the user.
    pub warnings: Vec<String>,
}

/// Makes a new image at `path`.
///
/// A path without a file gets the complete image or nothing. A file that is
/// there already is locked, emptied and written in place; a refused request
/// leaves it as it was.
pub fn create(pool: &Arc<Pool>, path: &Path, create: &Create) -> Result<Created, Error> {
    let _ = (pool, path, create);
    Err(super::unfinished())
}
