//! Arithmetic of blocks, chunks and BAT entries.
//!
//! A chunk is as many blocks as one block of sector bitmap describes; the BAT
//! has an entry for that block behind those of each chunk.

use super::format::{bat, limit};

/// What the file parameters and the sector size determine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes of a block, a power of two between 1 MiB and 256 MiB.
    pub block_size: u64,
    /// Bytes of a logical sector: 512 or 4096.
    pub sector: u64,
    /// Whether the image is differencing.
    pub has_parent: bool,
}

impl Geometry {
    /// Blocks of a chunk.
    pub fn ratio(self) -> u64 {
        limit::SECTORS_PER_BITMAP * self.sector / self.block_size
    }

    /// Blocks of a disk.
    pub fn blocks(self, size: u64) -> u64 {
        size.div_ceil(self.block_size)
    }

    /// Entries of the BAT of a disk.
    pub fn entries(self, size: u64) -> u64 {
        let blocks = self.blocks(size);
        let ratio = self.ratio();
        match self.has_parent {
            true => blocks.div_ceil(ratio) * (ratio + 1),
            false => blocks + blocks.saturating_sub(1) / ratio,
        }
    }

    /// Bytes of the BAT of a disk.
    pub fn bat_len(self, size: u64) -> u64 {
        self.entries(size) * bat::LEN
    }

    /// Index in the BAT of a block's entry.
    pub fn index(self, block: u64) -> u64 {
        block + block / self.ratio()
    }

    /// Index in the BAT of the bitmap's entry for the chunk of a block.
    pub fn bitmap_index(self, block: u64) -> u64 {
        let ratio = self.ratio();
        block / ratio * (ratio + 1) + ratio
    }

    /// The block whose entry has that index; `None` for a bitmap's.
    pub fn block_at(self, index: u64) -> Option<u64> {
        let ratio = self.ratio();
        let (chunk, place) = (index / (ratio + 1), index % (ratio + 1));
        (place != ratio).then(|| chunk * ratio + place)
    }

    /// Bytes of the sector bitmap that describe one block.
    pub fn bitmap_bytes(self) -> u64 {
        self.block_size / self.sector / 8
    }

    /// Offset of a block's bits in the bitmap block of its chunk.
    pub fn bitmap_offset(self, block: u64) -> u64 {
        block % self.ratio() * self.bitmap_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::super::format::MIB;
    use super::*;

    const SMALL: Geometry = Geometry {
        block_size: MIB,
        sector: 512,
        has_parent: false,
    };

    #[test]
    fn a_bitmap_entry_follows_each_full_chunk_but_the_last() {
        assert_eq!(SMALL.ratio(), 4096);
        assert_eq!(SMALL.entries(0), 0);
        assert_eq!(SMALL.entries(1), 1);
        assert_eq!(SMALL.entries(4096 * MIB), 4096);
        assert_eq!(SMALL.entries(4096 * MIB + 1), 4098);
        let child = Geometry {
            has_parent: true,
            ..SMALL
        };
        assert_eq!(child.entries(1), 4097);
        assert_eq!(child.entries(4097 * MIB), 2 * 4097);
    }

    #[test]
    fn blocks_and_indexes_are_inverse() {
        for block in [0, 1, 4095, 4096, 8191, 8192, 100_000] {
            assert_eq!(SMALL.block_at(SMALL.index(block)), Some(block));
            assert_eq!(SMALL.block_at(SMALL.bitmap_index(block)), None);
        }
        assert_eq!(SMALL.index(4096), 4097);
        assert_eq!(SMALL.bitmap_index(4096), 8193);
    }

    #[test]
    fn the_bits_of_a_chunk_fill_one_mebibyte() {
        for sector in [512, 4096] {
            for bits in 20..=28 {
                let geometry = Geometry {
                    block_size: 1 << bits,
                    sector,
                    has_parent: true,
                };
                assert_eq!(geometry.bitmap_bytes() * geometry.ratio(), MIB);
            }
        }
    }
}
