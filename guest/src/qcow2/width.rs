//! Reference counts as they are packed into a refcount block.
//!
//! A count is 1 to 64 bits wide (qcow2 specification, "Refcount table and
//! blocks"; the width is 2 to the power of `refcount_order`). Counts narrower
//! than a byte fill it from the least significant bit up, wider ones are big
//! endian. Pure functions over a block's bytes; what is outside the block reads
//! as 0 and is not written.

/// The width of a reference count: 2 to the power of 0..=6 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Width {
    order: u32,
}

impl Width {
    /// The width of version 2 images and of new ones: 16 bits.
    pub const DEFAULT: Self = Self { order: 4 };

    /// The width that the header's `refcount_order` names; `None` above 6.
    pub fn from_order(order: u32) -> Option<Self> {
        (order <= 6).then_some(Self { order })
    }

    /// The width of `bits` bits; `None` unless it is a power of two up to 64.
    pub fn from_bits(bits: u64) -> Option<Self> {
        (bits.is_power_of_two() && bits <= 64).then(|| Self {
            order: bits.trailing_zeros(),
        })
    }

    /// The value for the header's `refcount_order`.
    pub fn order(self) -> u32 {
        self.order
    }

    /// Bits per count.
    pub fn bits(self) -> u64 {
        1 << self.order
    }

    /// The largest count.
    pub fn max(self) -> u64 {
        u64::MAX >> (64 - self.bits())
    }

    /// The bytes of a block that hold the counts `first..end`.
    pub fn byte_range(self, first: u64, end: u64) -> core::ops::Range<usize> {
        let start = (first << self.order) / 8;
        let end = (end << self.order).div_ceil(8);
        start as usize..end as usize
    }

    /// The counts that the byte at `at` is a part of.
    pub fn index_range(self, at: usize) -> core::ops::Range<u64> {
        let first = (at as u64 * 8) >> self.order;
        first..first + (8 >> self.order).max(1)
    }

    /// Count number `index` of `block`.
    pub fn get(self, block: &[u8], index: u64) -> u64 {
        let bytes = block.get(self.byte_range(index, index + 1)).unwrap_or(&[]);
        let value = bytes.iter().fold(0, |value, &b| value << 8 | u64::from(b));
        if self.order < 3 {
            value >> self.shift(index) & self.max()
        } else {
            value
        }
    }

    /// Sets count number `index` of `block`; bits above the width are dropped.
    pub fn set(self, block: &mut [u8], index: u64, value: u64) {
        let range = self.byte_range(index, index + 1);
        let Some(bytes) = block.get_mut(range) else {
            return;
        };
        if self.order < 3 {
            let shift = self.shift(index);
            let mask = (self.max() << shift) as u8;
            for byte in bytes {
                *byte = *byte & !mask | (value << shift) as u8 & mask;
            }
        } else {
            for (byte, place) in bytes.iter_mut().rev().zip(0..) {
                *byte = (value >> (8 * place)) as u8;
            }
        }
    }

    /// Sets the counts `first..end` of `block` to 1, a byte at a time where
    /// whole bytes are covered.
    pub fn set_ones(self, block: &mut [u8], first: u64, end: u64) {
        let whole = 8 >> self.order;
        // A byte full of ones: one bit in every `bits`.
        let ones = (0xff / self.max().min(0xff)) as u8;
        let mut index = first;
        while index < end {
            if whole > 1 && index.is_multiple_of(whole) && index + whole <= end {
                let place = self.byte_range(index, index + 1).start;
                if let Some(byte) = block.get_mut(place) {
                    *byte = ones;
                }
                index += whole;
            } else {
                self.set(block, index, 1);
                index += 1;
            }
        }
    }

    /// Position of a count narrower than a byte inside its byte.
    fn shift(self, index: u64) -> u32 {
        ((index << self.order) % 8) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn narrow_counts_fill_a_byte_from_the_least_significant_bit() {
        let mut block = [0u8; 2];
        Width::from_order(0).unwrap().set(&mut block, 9, 1);
        assert_eq!(block, [0, 0b10]);
        Width::from_order(2).unwrap().set(&mut block, 1, 0xa);
        assert_eq!(block, [0xa0, 0b10]);
    }

    #[test]
    fn wide_counts_are_big_endian() {
        let mut block = [0u8; 16];
        Width::from_order(6).unwrap().set(&mut block, 1, 0x0102);
        assert_eq!(block[8..], [0, 0, 0, 0, 0, 0, 1, 2]);
        Width::DEFAULT.set(&mut block, 0, 0x1234);
        assert_eq!(block[..2], [0x12, 0x34]);
    }

    #[test]
    fn only_powers_of_two_up_to_64_bits_are_widths() {
        let valid: Vec<_> = (0..200)
            .filter(|&b| Width::from_bits(b).is_some())
            .collect();
        assert_eq!(valid, [1, 2, 4, 8, 16, 32, 64]);
        assert_eq!(Width::from_order(7), None);
        assert_eq!(Width::from_order(6).map(Width::max), Some(u64::MAX));
        assert_eq!(Width::from_order(0).map(Width::max), Some(1));
    }

    proptest! {
        #[test]
        fn a_count_reads_back_and_leaves_its_neighbours(
            order in 0u32..=6, index in 0u64..64, value: u64, mut block: [u8; 512]
        ) {
            let width = Width::from_order(order).unwrap();
            let before: Vec<_> = (0..64).map(|i| width.get(&block, i)).collect();
            width.set(&mut block, index, value);
            for i in 0..64 {
                let expected = if i == index { value & width.max() } else { before[i as usize] };
                prop_assert_eq!(width.get(&block, i), expected);
            }
        }

        #[test]
        fn setting_a_run_to_one_equals_setting_each(
            order in 0u32..=6, first in 0u64..64, len in 0u64..64, block: [u8; 1024]
        ) {
            let width = Width::from_order(order).unwrap();
            let (mut run, mut each) = (block, block);
            width.set_ones(&mut run, first, first + len);
            (first..first + len).for_each(|i| width.set(&mut each, i, 1));
            prop_assert_eq!(run, each);
        }

        #[test]
        fn an_index_outside_the_block_reads_zero_and_writes_nothing(order in 0u32..=6) {
            let width = Width::from_order(order).unwrap();
            let mut block = [0u8; 8];
            width.set(&mut block, 64, 1);
            prop_assert_eq!(block, [0; 8]);
            prop_assert_eq!(width.get(&block, 64), 0);
        }
    }
}
