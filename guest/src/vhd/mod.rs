//! VHD: Microsoft's virtual hard disk, version 1.

use crate::disk::{Creating, Opened, Opening};
use crate::engine::Host;
use crate::error::{Failure, FailureKind};
use crate::proto::PlanReply;

/// Opens an image.
pub fn open(_host: &mut dyn Host, _opening: Opening<'_>) -> Result<Opened, Failure> {
    Err(refusal())
}

/// The plan that writes a new image.
pub fn create(_host: &mut dyn Host, _creating: Creating<'_>) -> Result<PlanReply, Failure> {
    Err(refusal())
}

fn refusal() -> Failure {
    Failure::new(
        FailureKind::Unsupported,
        "the image is in VHD format, which is not supported; convert it with `qemu-img convert -O \
         qcow2`, or name its real format with -f",
    )
}
