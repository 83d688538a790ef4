//! VHDX as it lies on disk: offsets, lengths, signatures, identifiers and
//! limits. Numbers are little-endian. Sections are those of [MS-VHDX].

use super::guid::Guid;

/// The unit in which blocks, regions and the log are placed.
pub const MIB: u64 = 1 << 20;
/// The unit of the log, and of what it changes.
pub const PAGE: u64 = 4096;

/// File type identifier (2.2.1), at offset 0.
pub mod file_id {
    /// What a file begins with.
    pub const SIGNATURE: &[u8; 8] = b"vhdxfile";
    /// The program that made the file, in UTF-16.
    pub const CREATOR: usize = 8;
}

/// Headers (2.2.2). The one that is valid and has the greatest sequence number
/// is current.
pub mod header {
    /// Where the two copies are.
    pub const SLOTS: [u64; 2] = [64 << 10, 128 << 10];
    /// Bytes that the checksum covers.
    pub const LEN: usize = 4096;
    /// What a header begins with.
    pub const SIGNATURE: &[u8; 4] = b"head";
    /// CRC-32C of the header, computed with this field zero.
    pub const CHECKSUM: usize = 4;
    /// 64 bits, rises with each write.
    pub const SEQUENCE: usize = 8;
    /// Changes before the file is changed.
    pub const FILE_WRITE: usize = 16;
    /// Changes before what a guest sees is changed.
    pub const DATA_WRITE: usize = 32;
    /// What log entries must carry to count; zero where the log is empty.
    pub const LOG: usize = 48;
    /// 16 bits, must be 0 where there is a log.
    pub const LOG_VERSION: usize = 64;
    /// 16 bits, must be 1.
    pub const VERSION: usize = 66;
    /// 32 bits, a multiple of 1 MiB.
    pub const LOG_LEN: usize = 68;
    /// 64 bits, a multiple of 1 MiB.
    pub const LOG_OFFSET: usize = 72;
}

/// Region tables (2.2.3): where the BAT and the metadata are.
pub mod region {
    use super::Guid;

    /// Where the two copies are.
    pub const TABLES: [u64; 2] = [192 << 10, 256 << 10];
    /// Bytes that the checksum covers.
    pub const LEN: usize = 64 << 10;
    /// What a table begins with.
    pub const SIGNATURE: &[u8; 4] = b"regi";
    /// CRC-32C of the table, computed with this field zero.
    pub const CHECKSUM: usize = 4;
    /// 32 bits.
    pub const COUNT: usize = 8;
    /// The most entries.
    pub const MAX_COUNT: u32 = 2047;
    /// Offset of the first entry.
    pub const ENTRIES: usize = 16;
    /// Length of an entry: identifier, 64-bit offset, 32-bit length, flags.
    pub const ENTRY_LEN: usize = 32;
    /// In an entry: 64 bits, a multiple of 1 MiB, at least 1 MiB.
    pub const ENTRY_OFFSET: usize = 16;
    /// In an entry: 32 bits, a multiple of 1 MiB.
    pub const ENTRY_LENGTH: usize = 24;
    /// In an entry: 32 bits; bit 0: who does not know the region must not open
    /// the file.
    pub const ENTRY_FLAGS: usize = 28;
    /// The block allocation table.
    pub const BAT: Guid = Guid::new(0x2dc2_7766_f623_4200_9d64_115e_9bfd_4a08);
    /// The metadata.
    pub const METADATA: Guid = Guid::new(0x8b7c_a206_4790_4b9a_b8fe_575f_050f_886e);
}

/// Metadata (2.6): a table, and items behind it.
pub mod metadata {
    use super::Guid;

    /// Length of the table; items lie behind it.
    pub const LEN: usize = 64 << 10;
    /// What the table begins with.
    pub const SIGNATURE: &[u8; 8] = b"metadata";
    /// 16 bits.
    pub const COUNT: usize = 10;
    /// The most entries.
    pub const MAX_COUNT: u16 = 2047;
    /// Offset of the first entry.
    pub const ENTRIES: usize = 32;
    /// Length of an entry: identifier, 32-bit offset, 32-bit length, flags.
    pub const ENTRY_LEN: usize = 32;
    /// In an entry: 32 bits, from the start of the region.
    pub const ENTRY_OFFSET: usize = 16;
    /// In an entry: 32 bits.
    pub const ENTRY_LENGTH: usize = 20;
    /// In an entry: 32 bits.
    pub const ENTRY_FLAGS: usize = 24;
    /// The item is a user's, not the format's.
    pub const IS_USER: u32 = 1;
    /// The item is about the disk, not about the file.
    pub const IS_DISK: u32 = 2;
    /// Who does not know the item must not open the file.
    pub const IS_REQUIRED: u32 = 4;
    /// The longest item that is looked at.
    pub const MAX_ITEM: u32 = 1 << 20;

    /// Block size (32 bits) and flags (32 bits).
    pub const FILE_PARAMETERS: Guid = Guid::new(0xcaa1_6737_fa36_4d43_b3b6_33f0_aa44_e76b);
    /// 64 bits.
    pub const DISK_SIZE: Guid = Guid::new(0x2fa5_4224_cd1b_4876_b211_5dbe_d83b_f4b8);
    /// An identifier of the disk.
    pub const DISK_ID: Guid = Guid::new(0xbeca_12ab_b2e6_4523_93ef_c309_e000_c746);
    /// 32 bits, 512 or 4096.
    pub const LOGICAL_SECTOR: Guid = Guid::new(0x8141_bf1d_a96f_4709_ba47_f233_a8fa_ab5f);
    /// 32 bits, 512 or 4096.
    pub const PHYSICAL_SECTOR: Guid = Guid::new(0xcda3_48c7_445d_4471_9cc9_e988_5251_c556);
    /// Names of the parent.
    pub const PARENT_LOCATOR: Guid = Guid::new(0xa8d3_5f2d_b30b_454d_abf7_d3d8_4834_ab0c);

    /// Flag of the file parameters: blocks stay allocated (a fixed image).
    pub const LEAVE_ALLOCATED: u32 = 1;
    /// Flag of the file parameters: the image is differencing.
    pub const HAS_PARENT: u32 = 2;
}

/// Parent locator (2.6.2.6): pairs of UTF-16 strings.
pub mod locator {
    use super::Guid;

    /// The only kind there is.
    pub const KIND: Guid = Guid::new(0xb04a_efb7_d19e_4a81_b789_25b8_e944_5913);
    /// 16 bits.
    pub const COUNT: usize = 18;
    /// Offset of the first entry.
    pub const ENTRIES: usize = 20;
    /// Length of an entry: two 32-bit offsets, two 16-bit lengths.
    pub const ENTRY_LEN: usize = 12;
}

/// BAT entries (2.5): a state and where the block is, in MiB.
pub mod bat {
    /// Length of an entry.
    pub const LEN: u64 = 8;
    /// The state.
    pub const STATE: u64 = 7;
    /// Host offset of the block in bytes.
    pub const OFFSET: u64 = !0xf_ffff;
    /// Must be zero.
    pub const RESERVED: u64 = 0xf_fff8;

    /// Never written; for a differencing image: the parent has it. The state
    /// of a sector bitmap that is not there.
    pub const NOT_PRESENT: u64 = 0;
    /// Content does not matter.
    pub const UNDEFINED: u64 = 1;
    /// Reads as zeroes.
    pub const ZERO: u64 = 2;
    /// Discarded.
    pub const UNMAPPED: u64 = 3;
    /// Discarded, as drafts of the specification had it.
    pub const UNMAPPED_DRAFT: u64 = 5;
    /// All of the block is in the file; the state of a sector bitmap that is.
    pub const FULLY_PRESENT: u64 = 6;
    /// A bitmap says which sectors are in the file, the parent has the others.
    pub const PARTIALLY_PRESENT: u64 = 7;
}

/// Log (2.3): a ring of entries that change pages of metadata.
pub mod log {
    /// What an entry begins with.
    pub const ENTRY: &[u8; 4] = b"loge";
    /// CRC-32C of the entry, computed with this field zero.
    pub const CHECKSUM: usize = 4;
    /// 32 bits, a multiple of 4 KiB.
    pub const LEN: usize = 8;
    /// 32 bits: offset in the log of the oldest entry still needed.
    pub const TAIL: usize = 12;
    /// 64 bits, not 0.
    pub const SEQUENCE: usize = 16;
    /// 32 bits: number of descriptors.
    pub const COUNT: usize = 24;
    /// The header's log identifier.
    pub const GUID: usize = 32;
    /// 64 bits: the file had at least this length when the entry was written.
    pub const FLUSHED_LEN: usize = 48;
    /// 64 bits: the file has at least this length afterwards.
    pub const LAST_LEN: usize = 56;
    /// Length of an entry's header, and offset of its first descriptor.
    pub const HEADER_LEN: usize = 64;

    /// A descriptor of a page.
    pub const DATA_DESCRIPTOR: &[u8; 4] = b"desc";
    /// A descriptor of zeroes.
    pub const ZERO_DESCRIPTOR: &[u8; 4] = b"zero";
    /// Length of a descriptor.
    pub const DESCRIPTOR_LEN: usize = 32;
    /// Of a page: its last 4 bytes.
    pub const TRAILING: usize = 4;
    /// Of a page: its first 8 bytes. Of zeroes: their length.
    pub const LEADING: usize = 8;
    /// 64 bits: host offset that is changed.
    pub const OFFSET: usize = 16;
    /// 64 bits: sequence number of the entry.
    pub const DESCRIPTOR_SEQUENCE: usize = 24;

    /// What a page of data begins with.
    pub const DATA: &[u8; 4] = b"data";
    /// Upper half of the sequence number.
    pub const DATA_HIGH: usize = 4;
    /// Where a page's own bytes are, but for the first 8 and the last 4.
    pub const DATA_BODY: core::ops::Range<usize> = 8..4092;
    /// Lower half of the sequence number.
    pub const DATA_LOW: usize = 4092;

    /// The longest log that is replayed: all of it has to be read.
    pub const MAX_LEN: u64 = 64 << 20;
    /// The longest entry: all of it has to be in memory at once.
    pub const MAX_ENTRY: u64 = 4 << 20;
    /// The most bytes that a replay may write: they have to fit into a plan.
    pub const MAX_CHANGE: usize = 6 << 20;
    /// The most ranges that a replay may change.
    pub const MAX_RANGES: usize = 64 << 10;
}

/// Limits.
pub mod limit {
    use super::MIB;

    /// The smallest block.
    pub const MIN_BLOCK: u64 = MIB;
    /// The largest block.
    pub const MAX_BLOCK: u64 = 256 * MIB;
    /// The largest disk.
    pub const MAX_SIZE: u64 = 64 << 40;
    /// Sectors that one bitmap block describes (2.5): a bit for each.
    pub const SECTORS_PER_BITMAP: u64 = 1 << 23;
    /// The longest file whose use of space can be followed in memory: a bit for
    /// each MiB.
    pub const MAX_TRACKED: u64 = 128 << 40;
}
