//! The arithmetic that follows from cluster size, entry size and refcount
//! width. Pure; every value is validated before a [`Geometry`] exists.

use super::format::entry;
use crate::units::GuestOffset;

/// Longest piece of a table that is read and cached at once, in bytes: large
/// enough that a sequential reader rarely asks, small enough that a random one
/// does not pay for a 2 MiB table.
pub const MAX_SLICE_LEN: u64 = 64 << 10;

/// Sizes derived from the header. All in bytes unless named otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    cluster_bits: u32,
    extended_l2: bool,
    refcount_order: u32,
}

impl Geometry {
    /// For a cluster of 2^`cluster_bits` bytes (9 to 21) and refcounts of
    /// 2^`refcount_order` bits (0 to 6). Values past those are brought into
    /// range, so that no arithmetic here can overflow; a header with such
    /// values is refused before.
    pub fn new(cluster_bits: u32, extended_l2: bool, refcount_order: u32) -> Self {
        use super::format::{limit, refcount};
        Self {
            cluster_bits: cluster_bits.clamp(limit::MIN_CLUSTER_BITS, limit::MAX_CLUSTER_BITS),
            extended_l2,
            refcount_order: refcount_order.min(refcount::MAX_ORDER),
        }
    }

    /// log2 of the cluster size.
    pub fn cluster_bits(self) -> u32 {
        self.cluster_bits
    }

    /// The allocation unit.
    pub fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    /// Whether L2 entries have subclusters.
    pub fn extended_l2(self) -> bool {
        self.extended_l2
    }

    /// The unit in which a cluster can be partly allocated: a cluster without
    /// extended L2, a 32nd of it with.
    pub fn subcluster_size(self) -> u64 {
        if self.extended_l2 {
            self.cluster_size() / entry::SUBCLUSTERS
        } else {
            self.cluster_size()
        }
    }

    /// Size of an L2 entry.
    pub fn l2_entry_len(self) -> u64 {
        if self.extended_l2 {
            entry::EXTENDED_LEN
        } else {
            entry::LEN
        }
    }

    /// Entries of an L2 table, which is one cluster long.
    pub fn l2_entries(self) -> u64 {
        self.cluster_size() / self.l2_entry_len()
    }

    /// Guest bytes that one L2 table maps.
    pub fn l2_coverage(self) -> u64 {
        self.l2_entries() << self.cluster_bits
    }

    /// L1 entries that a disk of `size` bytes needs.
    pub fn l1_entries_for(self, size: u64) -> u64 {
        size.div_ceil(self.l2_coverage())
    }

    /// log2 of the refcount's width in bits.
    pub fn refcount_order(self) -> u32 {
        self.refcount_order
    }

    /// Width of a refcount in bits, 1 to 64.
    pub fn refcount_bits(self) -> u64 {
        1 << self.refcount_order
    }

    /// Refcounts in one refcount block, which is one cluster long.
    pub fn refcounts_per_block(self) -> u64 {
        (self.cluster_size() * 8) >> self.refcount_order
    }

    /// Unit in which tables are read and cached; divides the cluster size.
    pub fn slice_len(self) -> u64 {
        self.cluster_size().min(MAX_SLICE_LEN)
    }

    /// Which entries map a guest offset.
    pub fn locate(self, at: GuestOffset) -> Location {
        let cluster = at.0 >> self.cluster_bits;
        Location {
            l1_index: cluster / self.l2_entries(),
            l2_index: cluster % self.l2_entries(),
            in_cluster: at.0 & (self.cluster_size() - 1),
        }
    }

    /// The offset rounded down to a cluster.
    pub fn cluster_start(self, offset: u64) -> u64 {
        offset & !(self.cluster_size() - 1)
    }

    /// The offset rounded up to a cluster, or `None` past 2^64.
    pub fn cluster_end(self, offset: u64) -> Option<u64> {
        offset.checked_next_multiple_of(self.cluster_size())
    }

    /// Whether the offset is a multiple of the cluster size.
    pub fn is_aligned(self, offset: u64) -> bool {
        offset & (self.cluster_size() - 1) == 0
    }
}

/// Where a guest offset is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Location {
    /// Index into the active L1 table.
    pub l1_index: u64,
    /// Index into the L2 table.
    pub l2_index: u64,
    /// Bytes from the cluster's start.
    pub in_cluster: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_geometry_has_the_sizes_of_the_specification() {
        let geometry = Geometry::new(16, false, 4);
        assert_eq!(geometry.cluster_size(), 65536);
        assert_eq!(geometry.l2_entries(), 8192);
        assert_eq!(geometry.l2_coverage(), 512 << 20);
        assert_eq!(geometry.refcounts_per_block(), 32768);
        assert_eq!(geometry.subcluster_size(), 65536);
        assert_eq!(geometry.l1_entries_for((1 << 40) + 1), 2049);
    }

    #[test]
    fn extended_l2_halves_the_coverage_of_a_table() {
        let geometry = Geometry::new(16, true, 4);
        assert_eq!(geometry.l2_entries(), 4096);
        assert_eq!(geometry.l2_coverage(), 256 << 20);
        assert_eq!(geometry.subcluster_size(), 2048);
    }

    #[test]
    fn a_guest_offset_is_located_by_table_entry_and_rest() {
        let geometry = Geometry::new(9, false, 4);
        assert_eq!(
            geometry.locate(GuestOffset(64 * 512 * 3 + 512 * 5 + 7)),
            Location {
                l1_index: 3,
                l2_index: 5,
                in_cluster: 7
            }
        );
    }
}
