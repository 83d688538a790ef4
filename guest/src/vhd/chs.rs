//! Cylinders, heads and sectors: the geometry that a footer gives a disk.

use crate::plan::SECTOR;

/// A geometry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Chs {
    /// Cylinders.
    pub cylinders: u16,
    /// Heads.
    pub heads: u8,
    /// Sectors per track.
    pub sectors: u8,
}

impl Chs {
    /// The largest geometry that the specification's algorithm gives. A disk
    /// that has it may be larger.
    pub const MAX: Self = Self {
        cylinders: u16::MAX,
        heads: 16,
        sectors: 255,
    };

    /// How many sectors it has.
    pub fn total(self) -> u64 {
        u64::from(self.cylinders) * u64::from(self.heads) * u64::from(self.sectors)
    }

    /// How many bytes it has.
    pub fn size(self) -> u64 {
        self.total() * SECTOR
    }

    /// The geometry of a disk of so many sectors (specification, appendix "CHS
    /// Calculation"). It has at most as many sectors.
    pub fn of(sectors: u64) -> Self {
        let total = sectors.min(Self::MAX.total());
        let (heads, per_track) = if total >= 65535 * 16 * 63 {
            (16, 255)
        } else {
            small_geometry(total)
        };
        Self {
            cylinders: (total / per_track / heads) as u16,
            heads: heads as u8,
            sectors: per_track as u8,
        }
    }

    /// The smallest geometry of the algorithm that has so many sectors, or the
    /// largest of all where none has: what QEMU rounds the size of a new image
    /// up to.
    pub fn at_least(sectors: u64) -> Self {
        let wanted = sectors.min(Self::MAX.total());
        let mut geometry = Self::default();
        let mut next = wanted;
        // A geometry loses less than one cylinder, at most 16 * 255 sectors.
        while geometry.total() < wanted {
            geometry = Self::of(next);
            next += 1;
        }
        geometry
    }
}

/// Heads and sectors per track of a disk below 32 GiB, as a BIOS knows them.
fn small_geometry(total: u64) -> (u64, u64) {
    let tracks = total / 17;
    let heads = tracks.div_ceil(1024).max(4);
    if heads <= 16 && tracks < heads * 1024 {
        return (heads, 17);
    }
    match total / 31 < 16 * 1024 {
        true => (16, 31),
        false => (16, 63),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_rounded_up_as_qemu_does() {
        for (size, rounded) in [
            (0, 0),
            (512, 34816),
            (1 << 20, 1_079_296),
            (1 << 30, 1_073_995_776),
            (10 << 30, 10_737_893_376),
            (127 << 30, 136_365_219_840),
            (1 << 40, Chs::MAX.size()),
        ] {
            assert_eq!(Chs::at_least(size / 512).size(), rounded, "{size}");
        }
    }

    #[test]
    fn a_geometry_never_has_more_sectors_than_the_disk() {
        let mut total = 1;
        while total < 1 << 33 {
            for sectors in [total - 1, total, total + 1] {
                let geometry = Chs::of(sectors);
                assert!(geometry.total() <= sectors, "{sectors}");
                let rounded = Chs::at_least(sectors).total();
                assert!(rounded >= sectors.min(Chs::MAX.total()), "{sectors}");
            }
            total = total * 3 / 2 + 1;
        }
    }
}
