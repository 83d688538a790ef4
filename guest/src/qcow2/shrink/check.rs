//! What is refused before anything is read.

use super::super::Qcow2;
use crate::error::{Failure, FailureKind};
use crate::resize::Wish;
use alloc::format;

/// Refuses a shrink that cannot be planned for this image.
pub fn check(image: &Qcow2, wish: &Wish) -> Result<(), Failure> {
    let cluster = image.header.geometry.cluster_size();
    if image.header.encryption.is_some() && !wish.size.is_multiple_of(cluster) {
        return Err(Failure::new(
            FailureKind::InvalidRequest,
            format!(
                "the new size of an encrypted image must be a multiple of its cluster size, \
                 {cluster}"
            ),
        ));
    }
    if wish.size == 0 && !image.bitmaps.is_empty() {
        return Err(Failure::new(
            FailureKind::InvalidRequest,
            "a disk with persistent bitmaps cannot be empty; remove them with `qemu-img bitmap \
             --remove`",
        ));
    }
    if image.header.has_data_file() && image.data_len.is_none() {
        return Err(Failure::new(
            FailureKind::InvalidRequest,
            "the external data file is not open",
        ));
    }
    Ok(())
}
