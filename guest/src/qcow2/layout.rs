//! Where clusters go: runs of clusters, and how many tables it takes to count
//! them. Arithmetic only.

use super::format::{entry, limit, refcount};
use super::geometry::Geometry;
use super::width::Width;
use alloc::vec::Vec;
use core::ops::Range;

/// Clusters of the host file that lie side by side, by number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Run {
    /// The first.
    pub first: u64,
    /// How many.
    pub count: u64,
}

impl Run {
    /// The cluster behind the last.
    pub fn end(self) -> u64 {
        self.first.saturating_add(self.count)
    }

    /// Whether there are none.
    pub fn is_empty(self) -> bool {
        self.count == 0
    }
}

/// Hands out clusters one behind the other.
#[derive(Clone, Copy, Debug)]
pub struct Cursor(pub u64);

impl Cursor {
    /// The next `count` clusters.
    pub fn take(&mut self, count: u64) -> Run {
        let first = self.0;
        self.0 = first.saturating_add(count);
        Run { first, count }
    }
}

impl Geometry {
    /// The width of the reference counts.
    pub fn width(self) -> Width {
        Width::from_order(self.refcount_order()).unwrap_or(Width::DEFAULT)
    }

    /// Clusters that `bytes` occupy.
    pub fn clusters(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_size())
    }

    /// Clusters that an L1 table of that many entries occupies.
    pub fn l1_clusters(self, entries: u64) -> u64 {
        self.clusters(entries.saturating_mul(entry::LEN))
    }

    /// Clusters that a refcount table with entries for that many blocks
    /// occupies.
    pub fn table_clusters(self, blocks: u64) -> u64 {
        self.clusters(blocks.saturating_mul(refcount::ENTRY_LEN))
    }

    /// Host offset of a cluster. Saturates, so that what is out of range fails
    /// every later check instead of wrapping around.
    pub fn host_offset(self, cluster: u64) -> u64 {
        cluster.saturating_mul(self.cluster_size())
    }
}

/// What it takes to count a run of clusters that is not counted yet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counting {
    /// Numbers of the refcount blocks to add, ascending.
    pub blocks: Vec<u64>,
    /// Clusters of the new refcount table; 0 if the present one stays.
    pub table: u64,
}

/// Finds how many refcount blocks and table clusters must be added so that the
/// clusters from `first` on are counted: `base` of them, the added blocks and
/// the added table themselves. `present` holds the numbers of the blocks at or
/// behind `first`'s that exist, ascending; `table` is the length of the present
/// refcount table in clusters. As a new block is found through a table that the
/// commit switches to, any new block brings a new table. `None` if that would be
/// larger than a refcount table may be.
pub fn counting(
    geometry: Geometry,
    first: u64,
    base: u64,
    present: &[u64],
    table: u64,
) -> Option<Counting> {
    let per_block = geometry.refcounts_per_block();
    let largest = limit::MAX_REFCOUNT_TABLE_LEN.max(geometry.cluster_size());
    let (mut blocks, mut new_table) = (0, 0);
    loop {
        let end = first
            .saturating_add(base)
            .saturating_add(blocks)
            .saturating_add(new_table);
        let range = first / per_block..end.div_ceil(per_block);
        let there = present
            .iter()
            .filter(|number| range.contains(number))
            .count() as u64;
        let needed = if base == 0 {
            0
        } else {
            (range.end - range.start).saturating_sub(there)
        };
        let needed_table = if needed == 0 {
            0
        } else {
            table.max(geometry.table_clusters(range.end))
        };
        if needed <= blocks && needed_table <= new_table {
            let range = if needed == 0 { 0..0 } else { range };
            return Some(Counting {
                blocks: absent(range, present),
                table: new_table,
            });
        }
        blocks = blocks.max(needed);
        new_table = new_table.max(needed_table);
        if geometry.host_offset(new_table) > largest {
            return None;
        }
    }
}

/// The numbers of `range` that are not `present`.
fn absent(range: Range<u64>, present: &[u64]) -> Vec<u64> {
    let mut present = present.iter().copied().peekable();
    range
        .filter(|number| {
            while present.next_if(|there| there < number).is_some() {}
            present.peek() != Some(number)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn clusters_in_counted_ranges_need_nothing() {
        let geometry = Geometry::new(16, false, 4);
        assert_eq!(
            counting(geometry, 4, 100, &[0], 1),
            Some(Counting::default())
        );
        assert_eq!(counting(geometry, 4, 0, &[], 1), Some(Counting::default()));
    }

    #[test]
    fn a_new_block_brings_a_new_table_and_both_are_counted() {
        // 256 counts a block: 10 clusters from 250 on, a block and a table.
        let geometry = Geometry::new(9, false, 4);
        let needs = counting(geometry, 250, 10, &[0], 1).unwrap();
        assert_eq!((needs.blocks, needs.table), (vec![1], 1));
        // The block itself is what does not fit into the present range.
        let needs = counting(geometry, 250, 6, &[0], 1).unwrap();
        assert_eq!((needs.blocks, needs.table), (vec![], 0));
    }

    #[test]
    fn counts_beyond_the_largest_table_are_refused() {
        let geometry = Geometry::new(9, false, 6);
        // 8 MiB of table: 1 Mi blocks of 64 counts.
        let most = (1 << 20) * 64;
        assert_eq!(counting(geometry, 0, most, &[], 0), None);
        assert!(counting(geometry, 0, most - (2 << 20), &[], 0).is_some());
    }

    proptest! {
        #[test]
        fn every_new_cluster_is_counted_by_one_block(
            cluster_bits in 9u32..=12,
            order in 0u32..=6,
            first in 0u64..5000,
            base in 1u64..20000,
            present in prop::collection::btree_set(0u64..200, 0..20),
            table in 1u64..4,
        ) {
            let geometry = Geometry::new(cluster_bits, false, order);
            let per_block = geometry.refcounts_per_block();
            let from = first / per_block;
            let present: Vec<u64> = present.into_iter().filter(|&n| n >= from).collect();
            let needs = counting(geometry, first, base, &present, table).unwrap();
            let end = first + base + needs.blocks.len() as u64 + needs.table;
            for number in from..end.div_ceil(per_block) {
                prop_assert!(present.contains(&number) != needs.blocks.contains(&number));
            }
            prop_assert_eq!(needs.blocks.is_empty(), needs.table == 0);
            if let Some(last) = needs.blocks.last() {
                prop_assert!(needs.table >= table);
                prop_assert!(last * 8 < geometry.host_offset(needs.table));
                prop_assert!(*last < end.div_ceil(per_block));
            }
        }
    }
}
