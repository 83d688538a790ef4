//! Offsets that must not be mixed up.

use core::fmt;

/// A byte offset on the disk that a guest sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestOffset(pub u64);

/// A byte offset in a file on the host: the image or its data file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostOffset(pub u64);

impl fmt::Display for GuestOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for HostOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl HostOffset {
    /// The offset `len` bytes further on, at most the largest number (which
    /// every bounds check refuses).
    pub fn plus(self, len: u64) -> Self {
        Self(self.0.saturating_add(len))
    }
}
