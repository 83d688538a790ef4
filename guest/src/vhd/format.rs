//! The format as it lies on disk (Virtual Hard Disk Image Format Specification,
//! version 1.0, 2006). Everything is big-endian; sectors are 512 bytes.
//!
//! ```text
//! fixed      data                                                      footer
//! dynamic    footer copy   header   table   block   block   ...        footer
//! ```
//!
//! The footer at the end of the file is the authoritative one; QEMU goes by the
//! copy at the start, where there is one.

/// The footer: the file's last sector, and a copy in its first where the disk
/// is not of fixed size.
pub mod footer {
    /// Length in bytes.
    pub const LEN: usize = 512;
    /// Length of the footers that Virtual PC wrote before 2004.
    pub const OLD_LEN: u64 = 511;
    /// Offset 0: [`COOKIE_VALUE`].
    pub const COOKIE: usize = 0;
    /// Marks a footer.
    pub const COOKIE_VALUE: &[u8; 8] = b"conectix";
    /// Feature bits; [`FEATURES_VALUE`] in new images.
    pub const FEATURES: usize = 8;
    /// The bit that is always set.
    pub const FEATURES_VALUE: u32 = 2;
    /// Version: major in the upper half, minor in the lower.
    pub const VERSION: usize = 12;
    /// The only version that the specification has.
    pub const VERSION_VALUE: u32 = 1 << 16;
    /// Where the dynamic header is, in bytes; [`NO_OFFSET`](super::NO_OFFSET)
    /// in a disk of fixed size.
    pub const DATA_OFFSET: usize = 16;
    /// Time of creation, in seconds since [`EPOCH`].
    pub const TIMESTAMP: usize = 24;
    /// 2000-01-01 00:00 UTC in seconds since 1970.
    pub const EPOCH: u64 = 946_684_800;
    /// Four characters that name the program which made the image.
    pub const CREATOR: usize = 28;
    /// Version of that program.
    pub const CREATOR_VERSION: usize = 32;
    /// Four characters that name the system it ran on.
    pub const CREATOR_SYSTEM: usize = 36;
    /// Size of the disk when it was made, in bytes.
    pub const ORIGINAL_SIZE: usize = 40;
    /// Size of the disk, in bytes.
    pub const CURRENT_SIZE: usize = 48;
    /// Cylinders (2 bytes), heads (1), sectors per track (1).
    pub const GEOMETRY: usize = 56;
    /// Kind of disk: [`FIXED`], [`DYNAMIC`] or [`DIFFERENCING`].
    pub const KIND: usize = 60;
    /// All of the disk is in the file.
    pub const FIXED: u32 = 2;
    /// Blocks are added as they are written.
    pub const DYNAMIC: u32 = 3;
    /// The same, over a parent.
    pub const DIFFERENCING: u32 = 4;
    /// One's complement of the sum of all bytes but these four.
    pub const CHECKSUM: usize = 64;
    /// Identifies the image to its children.
    pub const UUID: usize = 68;
    /// 1 while a virtual machine is suspended on the disk.
    pub const SAVED_STATE: usize = 84;
}

/// The dynamic header, which leads to the block allocation table.
pub mod header {
    /// Length in bytes.
    pub const LEN: usize = 1024;
    /// Offset 0: [`COOKIE_VALUE`].
    pub const COOKIE: usize = 0;
    /// Marks a dynamic header.
    pub const COOKIE_VALUE: &[u8; 8] = b"cxsparse";
    /// Not used: [`NO_OFFSET`](super::NO_OFFSET).
    pub const DATA_OFFSET: usize = 8;
    /// Where the block allocation table is, in bytes.
    pub const TABLE_OFFSET: usize = 16;
    /// Version: major in the upper half, minor in the lower.
    pub const VERSION: usize = 24;
    /// The only version that the specification has.
    pub const VERSION_VALUE: u32 = 1 << 16;
    /// How many entries the table has.
    pub const MAX_ENTRIES: usize = 28;
    /// Size of a block, in bytes: a power of two.
    pub const BLOCK_SIZE: usize = 32;
    /// Block size of new images: 2 MiB.
    pub const DEFAULT_BLOCK_SIZE: u32 = 2 << 20;
    /// One's complement of the sum of all bytes but these four.
    pub const CHECKSUM: usize = 36;
    /// The parent's [`UUID`](super::footer::UUID).
    pub const PARENT_UUID: usize = 40;
    /// The parent's name: UTF-16, big-endian, zero-terminated.
    pub const PARENT_NAME: usize = 64;
    /// Length of that field in bytes.
    pub const PARENT_NAME_LEN: usize = 512;
    /// The first of eight parent locators.
    pub const LOCATORS: usize = 576;
    /// How many there are.
    pub const LOCATOR_COUNT: usize = 8;
    /// Length of one, in bytes.
    pub const LOCATOR_LEN: usize = 24;
    /// In a locator: how the name is written.
    pub const LOCATOR_PLATFORM: usize = 0;
    /// A path relative to the image: UTF-16, little-endian.
    pub const RELATIVE: &[u8; 4] = b"W2ru";
    /// An absolute path: UTF-16, little-endian.
    pub const ABSOLUTE: &[u8; 4] = b"W2ku";
    /// In a locator: length of the name in bytes.
    pub const LOCATOR_DATA_LEN: usize = 8;
    /// In a locator: where the name is in the file, in bytes.
    pub const LOCATOR_OFFSET: usize = 16;
}

/// The block allocation table.
pub mod table {
    /// Length of an entry: the sector where a block starts.
    pub const ENTRY_LEN: u64 = 4;
    /// The entry of a block that is not there.
    pub const FREE: u32 = u32::MAX;
    /// What XenServer puts behind the table: which blocks are full.
    pub const BATMAP: &[u8; 8] = b"tdbatmap";
}

/// An offset that leads nowhere.
pub const NO_OFFSET: u64 = u64::MAX;
/// The largest disk, in sectors (2040 GiB): entries of the table are 32 bits,
/// of which the last 1/256 is kept free for bitmaps.
pub const MAX_SECTORS: u64 = 0xff00_0000;
/// The longest name of a parent that is read, in bytes.
pub const MAX_NAME: u32 = 4096;

const _: () = {
    assert!(footer::SAVED_STATE < footer::LEN);
    assert!(header::PARENT_NAME + header::PARENT_NAME_LEN == header::LOCATORS);
    assert!(header::LOCATORS + header::LOCATOR_COUNT * header::LOCATOR_LEN <= header::LEN);
    // Whatever changes in a header lies in one sector: it changes atomically.
    assert!(header::CHECKSUM + 4 <= 512);
};
