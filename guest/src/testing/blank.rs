//! The smallest qcow2 images, put together byte by byte, so that tests need no
//! other program and know every byte.

use alloc::vec;
use alloc::vec::Vec;

/// What a small image is to be.
#[derive(Clone, Copy, Debug)]
pub struct Blank {
    /// 2 or 3.
    pub version: u32,
    /// log2 of the cluster size.
    pub cluster_bits: u32,
    /// Virtual size in bytes.
    pub size: u64,
    /// Incompatible feature bits.
    pub incompatible: u64,
}

impl Default for Blank {
    fn default() -> Self {
        Self {
            version: 3,
            cluster_bits: 9,
            size: 1 << 20,
            incompatible: 0,
        }
    }
}

impl Blank {
    /// The cluster size.
    pub fn cluster(self) -> usize {
        1 << self.cluster_bits
    }

    /// Host offset of the refcount table, which is one cluster long.
    pub fn refcount_table(self) -> usize {
        self.cluster()
    }

    /// Host offset of the only refcount block.
    pub fn refcount_block(self) -> usize {
        2 * self.cluster()
    }

    /// Host offset of the L1 table.
    pub fn l1(self) -> usize {
        3 * self.cluster()
    }

    /// Entries of the L1 table.
    pub fn l1_entries(self) -> usize {
        let entry = if self.incompatible & 16 != 0 { 16 } else { 8 };
        let coverage = (self.cluster() / entry * self.cluster()) as u64;
        self.size.div_ceil(coverage) as usize
    }

    /// Host offset of the first cluster that is not in use.
    pub fn free(self) -> usize {
        (self.l1() + 8 * self.l1_entries()).next_multiple_of(self.cluster())
    }

    /// The image: header, refcounts as far as one block counts, L1 table, nothing
    /// allocated.
    pub fn build(self) -> Vec<u8> {
        let mut image = vec![0; self.free()];
        let mut put = |at: usize, bytes: &[u8]| {
            image[at..at + bytes.len()].copy_from_slice(bytes);
        };
        put(0, b"QFI\xfb");
        put(4, &self.version.to_be_bytes());
        put(20, &self.cluster_bits.to_be_bytes());
        put(24, &self.size.to_be_bytes());
        put(36, &(self.l1_entries() as u32).to_be_bytes());
        put(40, &(self.l1() as u64).to_be_bytes());
        put(48, &(self.refcount_table() as u64).to_be_bytes());
        put(56, &1u32.to_be_bytes());
        if self.version >= 3 {
            put(72, &self.incompatible.to_be_bytes());
            put(96, &4u32.to_be_bytes());
            put(100, &112u32.to_be_bytes());
        }
        put(
            self.refcount_table(),
            &(self.refcount_block() as u64).to_be_bytes(),
        );
        let counted = (self.free() / self.cluster()).min(self.cluster() / 2);
        for cluster in 0..counted {
            put(self.refcount_block() + 2 * cluster, &1u16.to_be_bytes());
        }
        image
    }
}
