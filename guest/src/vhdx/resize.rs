//! What a resize request may ask for.

use super::Vhdx;
use super::format::limit;
use super::refuse::unsupported;
use crate::engine::Host;
use crate::error::{Failure, FailureKind};
use crate::proto::PlanReply;
use crate::resize::{Direction, Wish};
use alloc::format;

/// The refusal to resize an image that has a parent.
pub fn is_child() -> Failure {
    unsupported(
        "a differencing image cannot be resized: its size is that of its parent; merge it into \
         the parent (Merge-VHD), and resize that",
    )
}

impl Vhdx {
    /// The plan that changes the virtual size.
    pub(super) fn plan_resize(
        &mut self,
        host: &mut dyn Host,
        wish: &Wish,
    ) -> Result<PlanReply, Failure> {
        if self.metadata.geometry.has_parent {
            return Err(is_child());
        }
        if let Some(why) = self.unsettled() {
            return Err(Failure::new(
                FailureKind::InvalidRequest,
                format!("the image has to be settled first: {why}"),
            ));
        }
        check_sectors(wish.size, self.metadata.geometry.sector)?;
        let plan = match wish.direction(self.metadata.size)? {
            Direction::Same if wish.shrink => self.plan_finish(host)?,
            Direction::Same => return Ok(PlanReply::default()),
            Direction::Shrink if wish.size == 0 => return Err(no_size()),
            Direction::Shrink => self.plan_shrink(host, wish.size)?,
            Direction::Grow if wish.size > limit::MAX_SIZE => return Err(too_large()),
            Direction::Grow => self.plan_grow(host, wish)?,
        };
        Ok(PlanReply {
            plan,
            ..PlanReply::default()
        })
    }
}

fn no_size() -> Failure {
    Failure::new(
        FailureKind::InvalidRequest,
        "a VHDX disk cannot shrink to 0 bytes: choose a larger size, or delete the image",
    )
}

fn too_large() -> Failure {
    Failure::new(
        FailureKind::TooLarge,
        "Image size too large; max of 64TB: choose a smaller size, or convert the image with \
         `qemu-img convert -O qcow2`",
    )
}

/// Refuses a size that is not a whole number of the disk's sectors.
fn check_sectors(size: u64, sector: u64) -> Result<(), Failure> {
    let below = size - size % sector;
    match size == below {
        true => Ok(()),
        false => Err(Failure::new(
            FailureKind::InvalidRequest,
            format!(
                "The new size must be a multiple of {sector}: {size} is not, the nearest that \
                 are, are {below} and {}",
                below.saturating_add(sector)
            ),
        )),
    }
}
