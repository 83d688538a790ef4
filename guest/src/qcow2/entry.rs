//! Table entries: numbers from the file turned into what they mean. Pure; what
//! can be judged by the entry alone is judged here, places are judged by
//! whoever knows the file.

use super::format::entry;
use super::geometry::Geometry;
use crate::units::HostOffset;
use core::fmt;

/// A decoded L1 entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L1Entry {
    /// The L2 table; none means that the whole range is unallocated.
    pub table: Option<HostOffset>,
    /// The table's refcount is exactly one: it may be changed in place.
    pub copied: bool,
}

impl L1Entry {
    /// Nothing allocated.
    pub const NONE: Self = Self {
        table: None,
        copied: false,
    };

    /// Decodes an entry.
    pub fn decode(raw: u64) -> Result<Self, Flaw> {
        let reserved = raw & !(entry::OFFSET | entry::COPIED);
        if reserved != 0 {
            return Err(Flaw::Reserved(reserved));
        }
        Ok(match raw & entry::OFFSET {
            0 => Self::NONE,
            offset => Self {
                table: Some(HostOffset(offset)),
                copied: raw & entry::COPIED != 0,
            },
        })
    }
}

/// An L2 entry as it stands in the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct L2Entry {
    /// The entry.
    pub entry: u64,
    /// With extended L2: allocation bits 0 to 31, zero bits 32 to 63. Else 0.
    pub bitmap: u64,
}

/// What an L2 entry means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cluster {
    /// Not in this image.
    Unallocated,
    /// Reads as zeroes.
    Zero {
        /// Host cluster that is kept for it.
        host: Option<HostOffset>,
        /// Its refcount is exactly one.
        copied: bool,
    },
    /// A whole cluster of data.
    Data {
        /// Where.
        host: HostOffset,
        /// Its refcount is exactly one.
        copied: bool,
    },
    /// Compressed data.
    Compressed {
        /// Where, any alignment.
        host: HostOffset,
        /// Its length in bytes, at most; the file may end before.
        len: u64,
    },
    /// A cluster whose subclusters differ (extended L2 only).
    Subclusters {
        /// Where allocated ones are.
        host: Option<HostOffset>,
        /// Its refcount is exactly one.
        copied: bool,
        /// Bit i: subcluster i holds data. None without a host cluster.
        alloc: u32,
        /// Bit i: subcluster i reads as zeroes. Disjoint from `alloc`.
        zero: u32,
    },
}

impl Cluster {
    /// The host range that the entry refers to: offset and length.
    pub fn host_range(self, geometry: Geometry) -> Option<(HostOffset, u64)> {
        match self {
            Self::Unallocated => None,
            Self::Compressed { host, len } => Some((host, len)),
            Self::Data { host, .. } => Some((host, geometry.cluster_size())),
            Self::Zero { host, .. } | Self::Subclusters { host, .. } => {
                host.map(|host| (host, geometry.cluster_size()))
            }
        }
    }
}

/// What an entry may mean in this image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Cluster and entry size.
    pub geometry: Geometry,
    /// Version 3: the zero flag exists.
    pub zero_flag: bool,
    /// Data lies in a separate file: offset 0 is a place, nothing is compressed.
    pub data_file: bool,
}

/// What is wrong with an entry by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flaw {
    /// Bits are set that must be zero.
    Reserved(u64),
    /// An offset that is not a multiple of the cluster size.
    Unaligned(HostOffset),
    /// The zero flag in version 2.
    ZeroInVersion2,
    /// Compressed data in an image with a data file.
    CompressedInDataFile,
    /// A compressed cluster that claims to be exclusively owned.
    CompressedCopied,
    /// A compressed cluster with subclusters.
    CompressedSubclusters(u64),
    /// A subcluster is both data and zeroes, or data in no cluster.
    Subclusters(u64),
}

impl fmt::Display for Flaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reserved(bits) => write!(f, "reserved bits are set ({bits:#x})"),
            Self::Unaligned(at) => {
                write!(f, "offset {at} is not a multiple of the cluster size")
            }
            Self::ZeroInVersion2 => {
                f.write_str("the zero flag is set, which version 2 does not have")
            }
            Self::CompressedInDataFile => {
                f.write_str("a compressed cluster in an image with an external data file")
            }
            Self::CompressedCopied => f.write_str("the copied flag is set on a compressed cluster"),
            Self::CompressedSubclusters(bitmap) => write!(
                f,
                "a compressed cluster has subcluster allocation bits ({bitmap:#x})"
            ),
            Self::Subclusters(bitmap) => {
                write!(f, "invalid subcluster allocation bits ({bitmap:#x})")
            }
        }
    }
}

impl L2Entry {
    /// Decodes an entry.
    pub fn decode(self, rules: Rules) -> Result<Cluster, Flaw> {
        if self.entry & entry::COMPRESSED != 0 {
            return self.decode_compressed(rules);
        }
        let extended = rules.geometry.extended_l2();
        let flags = entry::COPIED | if extended { 0 } else { entry::ZERO };
        let reserved = self.entry & !(entry::OFFSET | flags);
        if reserved != 0 {
            return Err(Flaw::Reserved(reserved));
        }
        let copied = self.entry & entry::COPIED != 0;
        let offset = self.entry & entry::OFFSET;
        if !rules.geometry.is_aligned(offset) {
            return Err(Flaw::Unaligned(HostOffset(offset)));
        }
        let is_place = offset != 0 || (rules.data_file && copied);
        let host = is_place.then_some(HostOffset(offset));
        if extended {
            return self.decode_subclusters(host, copied);
        }
        match (self.entry & entry::ZERO != 0, host) {
            (true, _) if !rules.zero_flag => Err(Flaw::ZeroInVersion2),
            (true, host) => Ok(Cluster::Zero { host, copied }),
            (false, Some(host)) => Ok(Cluster::Data { host, copied }),
            (false, None) => Ok(Cluster::Unallocated),
        }
    }

    fn decode_subclusters(self, host: Option<HostOffset>, copied: bool) -> Result<Cluster, Flaw> {
        let alloc = self.bitmap as u32;
        let zero = (self.bitmap >> 32) as u32;
        if alloc & zero != 0 || (host.is_none() && alloc != 0) {
            return Err(Flaw::Subclusters(self.bitmap));
        }
        Ok(match (host, alloc, zero) {
            (None, _, 0) => Cluster::Unallocated,
            (host, _, u32::MAX) => Cluster::Zero { host, copied },
            (Some(host), u32::MAX, _) => Cluster::Data { host, copied },
            (host, alloc, zero) => Cluster::Subclusters {
                host,
                copied,
                alloc,
                zero,
            },
        })
    }

    /// "Compressed Clusters Descriptor": the offset takes 62 - (cluster_bits -
    /// 8) bits, the rest counts the 512-byte sectors after the first.
    fn decode_compressed(self, rules: Rules) -> Result<Cluster, Flaw> {
        if rules.data_file {
            return Err(Flaw::CompressedInDataFile);
        }
        if self.entry & entry::COPIED != 0 {
            return Err(Flaw::CompressedCopied);
        }
        if self.bitmap != 0 {
            return Err(Flaw::CompressedSubclusters(self.bitmap));
        }
        let offset_bits = 62 - (rules.geometry.cluster_bits() - 8);
        let offset = self.entry & ((1 << offset_bits) - 1);
        let sectors = ((self.entry & !entry::COMPRESSED) >> offset_bits) + 1;
        Ok(Cluster::Compressed {
            host: HostOffset(offset),
            len: sectors * entry::COMPRESSED_SECTOR - offset % entry::COMPRESSED_SECTOR,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v3() -> Rules {
        Rules {
            geometry: Geometry::new(16, false, 4),
            zero_flag: true,
            data_file: false,
        }
    }

    fn l2(entry: u64) -> L2Entry {
        L2Entry { entry, bitmap: 0 }
    }

    fn extended(entry: u64, bitmap: u64) -> Result<Cluster, Flaw> {
        let rules = Rules {
            geometry: Geometry::new(16, true, 4),
            ..v3()
        };
        L2Entry { entry, bitmap }.decode(rules)
    }

    #[test]
    fn an_l1_entry_is_offset_and_copied_flag() {
        assert_eq!(L1Entry::decode(0), Ok(L1Entry::NONE));
        assert_eq!(
            L1Entry::decode(entry::COPIED | 0x30000),
            Ok(L1Entry {
                table: Some(HostOffset(0x30000)),
                copied: true
            })
        );
        assert_eq!(L1Entry::decode(0x30001), Err(Flaw::Reserved(1)));
        assert_eq!(
            L1Entry::decode(1 << 56 | 0x30000),
            Err(Flaw::Reserved(1 << 56))
        );
    }

    #[test]
    fn standard_entries_are_data_zero_or_unallocated() {
        let host = HostOffset(0x50000);
        assert_eq!(l2(0).decode(v3()), Ok(Cluster::Unallocated));
        assert_eq!(
            l2(0x50000).decode(v3()),
            Ok(Cluster::Data {
                host,
                copied: false
            })
        );
        assert_eq!(
            l2(entry::COPIED | 0x50001).decode(v3()),
            Ok(Cluster::Zero {
                host: Some(host),
                copied: true
            })
        );
        assert_eq!(
            l2(1).decode(v3()),
            Ok(Cluster::Zero {
                host: None,
                copied: false
            })
        );
    }

    #[test]
    fn flawed_standard_entries_are_told_apart() {
        assert_eq!(l2(2).decode(v3()), Err(Flaw::Reserved(2)));
        assert_eq!(
            l2(0x50200).decode(v3()),
            Err(Flaw::Unaligned(HostOffset(0x50200)))
        );
        let v2 = Rules {
            zero_flag: false,
            ..v3()
        };
        assert_eq!(l2(1).decode(v2), Err(Flaw::ZeroInVersion2));
    }

    #[test]
    fn offset_zero_is_a_place_only_in_a_data_file() {
        let data_file = Rules {
            data_file: true,
            ..v3()
        };
        assert_eq!(
            l2(entry::COPIED).decode(data_file),
            Ok(Cluster::Data {
                host: HostOffset(0),
                copied: true
            })
        );
        assert_eq!(l2(entry::COPIED).decode(v3()), Ok(Cluster::Unallocated));
        assert_eq!(
            l2(entry::COMPRESSED | 0x50000).decode(data_file),
            Err(Flaw::CompressedInDataFile)
        );
    }

    #[test]
    fn a_compressed_descriptor_counts_sectors_after_the_first() {
        let raw = entry::COMPRESSED | 3 << 54 | 0x50123;
        assert_eq!(
            l2(raw).decode(v3()),
            Ok(Cluster::Compressed {
                host: HostOffset(0x50123),
                len: 4 * 512 - 0x123
            })
        );
        assert_eq!(
            l2(raw | entry::COPIED).decode(v3()),
            Err(Flaw::CompressedCopied)
        );
    }

    #[test]
    fn subclusters_are_data_or_zeroes_but_not_both() {
        let host = Some(HostOffset(0x50000));
        assert_eq!(
            extended(0x50000, 0x2_0000_0001),
            Ok(Cluster::Subclusters {
                host,
                copied: false,
                alloc: 1,
                zero: 2
            })
        );
        assert_eq!(
            extended(0x50000, 0x1_0000_0001),
            Err(Flaw::Subclusters(0x1_0000_0001))
        );
        assert_eq!(extended(0, 1), Err(Flaw::Subclusters(1)));
        assert_eq!(extended(1, 0), Err(Flaw::Reserved(1)));
        assert_eq!(extended(0, 0), Ok(Cluster::Unallocated));
        assert_eq!(
            extended(0, !0 << 32),
            Ok(Cluster::Zero {
                host: None,
                copied: false
            })
        );
        assert_eq!(
            extended(0x50000, 0xffff_ffff),
            Ok(Cluster::Data {
                host: HostOffset(0x50000),
                copied: false
            })
        );
    }
}
