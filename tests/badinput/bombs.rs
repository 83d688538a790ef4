//! Compressed clusters that are garbage, or that unpack to far more than a
//! cluster.

use crate::bytes::{get64, l2};

/// Where the first compressed cluster of an image begins, and how many bytes
/// its entry gives it. Clusters are of 64 KiB.
pub fn compressed(image: &[u8]) -> std::ops::Range<usize> {
    let entry = get64(image, l2(image));
    let start = (entry & ((1 << 54) - 1)) as usize;
    let sectors = (entry >> 54 & 0xff) as usize;
    start..(start - start % 512 + (sectors + 1) * 512).min(image.len())
}

/// Replaces the first compressed cluster by `stream` at the end of the file,
/// with an entry that spans as many sectors as an entry can.
pub fn plant(image: &mut Vec<u8>, stream: &[u8]) {
    const MOST: usize = 256 * 512;
    image.resize(image.len().next_multiple_of(512), 0);
    let (at, place) = (l2(image), image.len() as u64);
    image.extend(&stream[..stream.len().min(MOST)]);
    let entry = 1 << 62 | 0xff << 54 | place;
    crate::bytes::put64(image, at, entry);
}

/// A deflate stream that unpacks to 2.5 MiB for each 16 KiB: one zero byte,
/// then repetitions of it, 258 bytes for each 13 bits (RFC 1951, fixed codes).
pub fn deflate_bomb() -> Vec<u8> {
    let mut bits = Vec::new();
    // Not the last block, fixed Huffman codes; literal 0 is 0b0011_0000.
    bits.extend([0, 1, 0]);
    bits.extend([0, 0, 1, 1, 0, 0, 0, 0]);
    for _ in 0..80_000 {
        // Length 258 is code 285, 0b1100_0101; distance 1 is code 0.
        bits.extend([1, 1, 0, 0, 0, 1, 0, 1]);
        bits.extend([0, 0, 0, 0, 0]);
    }
    let byte = |bits: &[u8]| (0..bits.len()).map(|bit| bits[bit] << bit).sum();
    bits.chunks(8).map(byte).collect()
}

/// A zstd frame that unpacks to 128 KiB for each 4 bytes, 4 GiB in all: blocks
/// that repeat one byte (RFC 8878, section 3.1.1.2).
pub fn zstd_bomb() -> Vec<u8> {
    // No checksum, no content size; a window of 128 MiB.
    let mut stream = vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, 17 << 3];
    let block: u32 = (128 << 10) << 3 | 1 << 1;
    for _ in 0..32_000 {
        stream.extend(&block.to_le_bytes()[..3]);
        stream.push(0);
    }
    stream
}
