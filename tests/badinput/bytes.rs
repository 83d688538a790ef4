//! Where the fields of a qcow2 file stand, for those who damage them.
//!
//! Written from the format's specification (docs/interop/qcow2.rst in QEMU's
//! tree) and independent of the engine's own table of them.

/// Offsets of header fields.
pub mod field {
    pub const VERSION: usize = 4;
    pub const BACKING_OFFSET: usize = 8;
    pub const BACKING_SIZE: usize = 16;
    pub const CLUSTER_BITS: usize = 20;
    pub const SIZE: usize = 24;
    pub const CRYPT_METHOD: usize = 32;
    pub const L1_SIZE: usize = 36;
    pub const L1_OFFSET: usize = 40;
    pub const REFTABLE_OFFSET: usize = 48;
    pub const REFTABLE_CLUSTERS: usize = 56;
    pub const SNAPSHOTS: usize = 60;
    pub const SNAPSHOTS_OFFSET: usize = 64;
    pub const INCOMPATIBLE: usize = 72;
    pub const REFCOUNT_ORDER: usize = 96;
    pub const HEADER_LENGTH: usize = 100;
    pub const COMPRESSION_TYPE: usize = 104;
    pub const EXTENSIONS: usize = 112;
}

/// Type of the bitmaps extension.
pub const BITMAPS: u32 = 0x2385_2875;
/// The bits of a table entry that are a host offset.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

pub fn get32(image: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(std::array::from_fn(|byte| image[at + byte]))
}

pub fn get64(image: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(std::array::from_fn(|byte| image[at + byte]))
}

pub fn put32(image: &mut [u8], at: usize, value: u32) {
    image[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

pub fn put64(image: &mut [u8], at: usize, value: u64) {
    image[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

/// Offset of the active L1 table.
pub fn l1(image: &[u8]) -> usize {
    get64(image, field::L1_OFFSET) as usize
}

/// Offset of the first L2 table.
pub fn l2(image: &[u8]) -> usize {
    (get64(image, l1(image)) & OFFSET_MASK) as usize
}

/// Offset of the refcount table.
pub fn reftable(image: &[u8]) -> usize {
    get64(image, field::REFTABLE_OFFSET) as usize
}

/// Offset of the snapshot table.
pub fn snapshots(image: &[u8]) -> usize {
    get64(image, field::SNAPSHOTS_OFFSET) as usize
}

/// Offset of the bitmaps extension's data.
pub fn bitmaps(image: &[u8]) -> usize {
    let mut at = field::EXTENSIONS;
    while get32(image, at) != BITMAPS {
        at += 8 + (get32(image, at + 4) as usize).next_multiple_of(8);
    }
    at + 8
}

/// Offset of the bitmap directory.
pub fn directory(image: &[u8]) -> usize {
    get64(image, bitmaps(image) + 16) as usize
}
