//! What a resize request means before any format looks at it.

use crate::error::{Failure, FailureKind};
use crate::plan::SECTOR;
use crate::proto::Preallocation;
use alloc::format;

/// A request to change the virtual size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wish {
    /// The size asked for, in bytes.
    pub size: u64,
    /// How much of the added range is allocated.
    pub preallocation: Preallocation,
    /// Whether the size may become smaller.
    pub shrink: bool,
    /// Virtual size of the backing image, where there is one.
    pub backing_size: Option<u64>,
}

/// Which way the size goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Nothing changes.
    Same,
    /// The disk gets larger.
    Grow,
    /// The disk gets smaller, and the request allows that.
    Shrink,
}

impl Wish {
    /// Which way the size goes from `old`, in the order of QEMU's checks.
    pub fn direction(&self, old: u64) -> Result<Direction, Failure> {
        if self.size <= old && self.preallocation != Preallocation::Off {
            return Err(Failure::new(
                FailureKind::InvalidRequest,
                "Preallocation can only be used for growing images",
            ));
        }
        match self.size.cmp(&old) {
            core::cmp::Ordering::Equal => Ok(Direction::Same),
            core::cmp::Ordering::Greater => Ok(Direction::Grow),
            core::cmp::Ordering::Less if self.shrink => Ok(Direction::Shrink),
            core::cmp::Ordering::Less => Err(Failure::new(
                FailureKind::NotPermitted,
                "Use the --shrink option to perform a shrink operation.",
            )),
        }
    }

    /// Refuses a size that is not a whole number of sectors.
    pub fn check_sectors(&self) -> Result<(), Failure> {
        let below = self.size - self.size % SECTOR;
        if self.size == below {
            return Ok(());
        }
        Err(Failure::new(
            FailureKind::InvalidRequest,
            format!(
                "The new size must be a multiple of {SECTOR}: {} is not, the nearest that are, are \
                 {below} and {}",
                self.size,
                below.saturating_add(SECTOR)
            ),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(size: u64, preallocation: Preallocation, shrink: bool) -> Wish {
        Wish {
            size,
            preallocation,
            shrink,
            backing_size: None,
        }
    }

    #[test]
    fn smaller_needs_the_option() {
        let refused = wish(512, Preallocation::Off, false).direction(1024);
        assert_eq!(refused.unwrap_err().kind, FailureKind::NotPermitted);
        let allowed = wish(512, Preallocation::Off, true).direction(1024);
        assert_eq!(allowed, Ok(Direction::Shrink));
    }

    #[test]
    fn preallocation_is_for_growing_only() {
        for size in [512, 1024] {
            let refused = wish(size, Preallocation::Falloc, true).direction(1024);
            assert_eq!(
                refused.unwrap_err().message,
                "Preallocation can only be used for growing images"
            );
        }
        let grow = wish(2048, Preallocation::Falloc, false).direction(1024);
        assert_eq!(grow, Ok(Direction::Grow));
    }

    #[test]
    fn a_size_between_sectors_is_refused_with_its_neighbours() {
        let refused = wish(1000, Preallocation::Off, false).check_sectors();
        assert_eq!(
            refused.unwrap_err().message,
            "The new size must be a multiple of 512: 1000 is not, the nearest that are, are 512 \
             and 1024"
        );
        assert_eq!(
            wish(1024, Preallocation::Off, false).check_sectors(),
            Ok(())
        );
    }
}
