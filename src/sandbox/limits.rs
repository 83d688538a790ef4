//! What a guest may use up.

use instar_guest::layout::{MAX_MEMORY, MIN_MEMORY, PAGE};
use instar_guest::proto::MAX_MESSAGE;
use std::time::Duration;

/// Budgets of a session. All but memory are per request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Memory of the guest in bytes, program included: a multiple of 2 MiB from
    /// 16 MiB to 1 GiB.
    pub memory: u64,
    /// CPU time between two exits.
    pub cpu: Duration,
    /// Number of exits.
    pub exits: Allowance,
    /// Bytes read from the image's files.
    pub bytes_read: Allowance,
    /// Length of one message in bytes, at most
    /// [`MAX_MESSAGE`](instar_guest::proto::MAX_MESSAGE).
    pub message: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            memory: 64 << 20,
            cpu: Duration::from_secs(2),
            exits: Allowance {
                base: 4 << 10,
                per_mib: 1,
            },
            // Twice the file, for the rare table that a request reads again.
            bytes_read: Allowance {
                base: 64 << 20,
                per_mib: 2 << 20,
            },
            message: MAX_MESSAGE,
        }
    }
}

impl Limits {
    /// The nearest limits that can be had: memory in range and in whole pages,
    /// messages not longer than the protocol allows.
    pub(super) fn clamped(self) -> Self {
        Self {
            memory: self
                .memory
                .clamp(MIN_MEMORY, MAX_MEMORY)
                .next_multiple_of(PAGE),
            message: self.message.min(MAX_MESSAGE),
            ..self
        }
    }
}

/// A budget that grows with the length of the image's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allowance {
    /// What any file is worth.
    pub base: u64,
    /// What each started MiB adds.
    pub per_mib: u64,
}

impl Allowance {
    /// The budget for files of `len` bytes together.
    pub fn for_length(self, len: u64) -> u64 {
        let mib = len.div_ceil(1 << 20);
        self.base.saturating_add(self.per_mib.saturating_mul(mib))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_allowance_is_linear_in_the_length() {
        let allowance = Allowance {
            base: 10,
            per_mib: 3,
        };
        assert_eq!(allowance.for_length(0), 10);
        assert_eq!(allowance.for_length(1), 13);
        assert_eq!(allowance.for_length(4 << 20), 22);
        assert_eq!(allowance.for_length(u64::MAX), 10 + 3 * (1 << 44));
    }

    #[test]
    fn memory_is_clamped_to_whole_pages_in_range() {
        let memory = |memory| {
            let limits = Limits {
                memory,
                ..Limits::default()
            };
            limits.clamped().memory
        };
        assert_eq!(memory(0), 16 << 20);
        assert_eq!(memory((32 << 20) + 1), 34 << 20);
        assert_eq!(memory(u64::MAX), 1 << 30);
    }
}
