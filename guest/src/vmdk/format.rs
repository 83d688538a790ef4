//! VMDK as it lies on disk: the header of a hosted sparse extent, its grain
//! tables, the markers of a stream, the limits.
//!
//! Sources: VMware "Virtual Disk Format 5.0", section "Hosted Sparse Extents";
//! where that leaves things open, what QEMU, VirtualBox and VMware write. All
//! numbers are little-endian, offsets and sizes are in 512-byte sectors.

/// Sector 0 of a sparse extent.
pub mod header {
    /// `KDMV` as a number.
    pub const MAGIC_VALUE: u32 = 0x564d_444b;

    /// Version: 1, 2 (zeroed grains), 3 (change tracking, or a stream).
    pub const VERSION: usize = 4;
    /// Flags, see [`flag`](super::flag).
    pub const FLAGS: usize = 8;
    /// Capacity of the extent in sectors, 64 bits.
    pub const CAPACITY: usize = 12;
    /// Sectors of a grain, 64 bits: a power of two.
    pub const GRAIN_SIZE: usize = 20;
    /// Sector of the embedded descriptor, 64 bits; 0 for none.
    pub const DESCRIPTOR_OFFSET: usize = 28;
    /// Sectors that the descriptor may take, 64 bits.
    pub const DESCRIPTOR_SIZE: usize = 36;
    /// Entries of a grain table, 32 bits.
    pub const TABLE_ENTRIES: usize = 44;
    /// Sector of the redundant grain directory, 64 bits.
    pub const REDUNDANT_DIRECTORY: usize = 48;
    /// Sector of the grain directory, 64 bits, or [`AT_END`].
    pub const DIRECTORY: usize = 56;
    /// Sectors before the first grain, 64 bits.
    pub const OVERHEAD: usize = 64;
    /// Whether a writer has the extent open, 8 bits.
    pub const UNCLEAN: usize = 72;
    /// Four bytes that a transfer as text would change.
    pub const NEWLINES: usize = 73;
    /// What [`NEWLINES`] holds.
    pub const NEWLINES_VALUE: [u8; 4] = *b"\n \r\n";
    /// How grains are compressed, 16 bits, see [`COMPRESSION_DEFLATE`].
    pub const COMPRESSION: usize = 77;
    /// End of the last field; zeroes follow to the sector's end.
    pub const LEN: usize = 79;

    /// Value of [`DIRECTORY`] where a footer at the end of the file has the
    /// real one.
    pub const AT_END: u64 = u64::MAX;
    /// Value of [`COMPRESSION`]: RFC 1950 streams.
    pub const COMPRESSION_DEFLATE: u16 = 1;
    /// The highest version that is known.
    pub const MAX_VERSION: u32 = 3;
}

/// Bits of the header's flags.
pub mod flag {
    /// The newline bytes are there.
    pub const NEWLINES: u32 = 1 << 0;
    /// The redundant grain directory is there.
    pub const REDUNDANT: u32 = 1 << 1;
    /// A grain table entry of 1 stands for zeroes.
    pub const ZEROED_GRAINS: u32 = 1 << 2;
    /// Grains are compressed.
    pub const COMPRESSED: u32 = 1 << 16;
    /// Markers precede grains and metadata.
    pub const MARKERS: u32 = 1 << 17;
}

/// Entries of grain directories and grain tables: sector numbers, 32 bits.
pub mod entry {
    /// Length of an entry in bytes.
    pub const LEN: u64 = 4;
    /// The grain is not in this extent.
    pub const NONE: u32 = 0;
    /// The grain reads as zeroes, where the flag says so.
    pub const ZEROED: u32 = 1;
}

/// What precedes grains and metadata of a stream.
pub mod marker {
    /// Of a grain: its first sector on the disk, 64 bits.
    pub const LBA: usize = 0;
    /// Of a grain: bytes of compressed data that follow, 32 bits. Of metadata: 0.
    pub const SIZE: usize = 8;
    /// Bytes of a grain's marker.
    pub const GRAIN_LEN: usize = 12;
    /// Of metadata, which begins with the next sector: its type, 32 bits.
    pub const TYPE: usize = 12;
    /// The last sector of a stream.
    pub const END_OF_STREAM: u32 = 0;
    /// The footer, a copy of the header with the real directory.
    pub const FOOTER: u32 = 3;
    /// Sectors at a stream's end: the footer's marker, the footer, the end.
    pub const FOOTER_SECTORS: u64 = 3;
}

/// Bounds.
pub mod limit {
    /// Sectors that grain table entries, of 32 bits, can reach.
    pub const MAX_SECTORS: u64 = 1 << 32;
    /// Entries of a grain table; VMware programs know no other number.
    pub const TABLE_ENTRIES: u32 = 512;
    /// Sectors of the largest grain that QEMU opens.
    pub const MAX_GRAIN: u64 = 0x20_0000;
    /// Entries of the largest grain directory that QEMU opens.
    pub const MAX_DIRECTORY: u64 = 32 << 20;
    /// Bytes of the longest descriptor.
    pub const MAX_DESCRIPTOR: u64 = 1 << 20;
    /// Sectors of an extent in a split image, as QEMU makes them.
    pub const SPLIT_SECTORS: u64 = 0x8000_0000 / 512;
    /// The most extents of an image.
    pub const MAX_EXTENTS: usize = 4096;
}

/// What new images have.
pub mod fresh {
    /// Sectors of a grain.
    pub const GRAIN: u64 = 128;
    /// Sector of an embedded descriptor. QEMU looks nowhere else.
    pub const DESCRIPTOR: u64 = 1;
    /// Sectors of an embedded descriptor.
    pub const DESCRIPTOR_SECTORS: u64 = 20;
    /// CID of a parent where there is none.
    pub const NO_PARENT: u32 = u32::MAX;
}

const _: () = {
    assert!(header::LEN == header::COMPRESSION + 2);
    assert!(header::NEWLINES == header::UNCLEAN + 1);
    assert!(marker::GRAIN_LEN == marker::SIZE + 4);
};
