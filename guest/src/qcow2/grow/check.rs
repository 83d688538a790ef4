//! What is refused before anything is read.

use super::super::Qcow2;
use super::super::format::limit;
use crate::error::{Failure, FailureKind};
use crate::proto::Preallocation;
use crate::resize::Wish;
use alloc::format;

/// Refuses a grow that cannot be planned for this image.
pub fn check(image: &Qcow2, wish: &Wish) -> Result<(), Failure> {
    check_limits(image, wish)?;
    check_preallocation(image, wish)?;
    check_encryption(image, wish)?;
    check_backing(image, wish)?;
    if image.header.has_data_file() && image.data_len.is_none() {
        return Err(Failure::new(
            FailureKind::InvalidRequest,
            "the external data file is not open",
        ));
    }
    Ok(())
}

fn check_limits(image: &Qcow2, wish: &Wish) -> Result<(), Failure> {
    let entries = image.header.geometry.l1_entries_for(wish.size);
    if entries > limit::MAX_L1_ENTRIES || i64::try_from(wish.size).is_err() {
        return Err(Failure::new(
            FailureKind::TooLarge,
            "Failed to grow the L1 table: File too large",
        ));
    }
    Ok(())
}

fn check_preallocation(image: &Qcow2, wish: &Wish) -> Result<(), Failure> {
    if wish.preallocation == Preallocation::Off || image.header.encryption.is_none() {
        return Ok(());
    }
    Err(Failure::new(
        FailureKind::Unsupported,
        "the added range of an encrypted image cannot be preallocated: it would not read as \
         zeroes; use --preallocation=off",
    ))
}

fn check_encryption(image: &Qcow2, wish: &Wish) -> Result<(), Failure> {
    let cluster = image.header.geometry.cluster_size();
    if image.header.encryption.is_none() || wish.size.is_multiple_of(cluster) {
        return Ok(());
    }
    Err(Failure::new(
        FailureKind::InvalidRequest,
        format!(
            "the new size of an encrypted image must be a multiple of its cluster size, {cluster}"
        ),
    ))
}

/// Where the backing image is longer than this disk, what is added would show
/// its content; hiding it takes the zero flag.
fn check_backing(image: &Qcow2, wish: &Wish) -> Result<(), Failure> {
    let longer = wish.backing_size.is_some_and(|len| len > image.header.size);
    if image.header.version >= 3 || !longer {
        return Ok(());
    }
    Err(Failure::new(
        FailureKind::Unsupported,
        "Failed to zero out new clusters: the backing image is larger than this one and version 2 \
         has no way to hide it; use `qemu-img amend -o compat=1.1`",
    ))
}
