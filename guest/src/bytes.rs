//! Typed access to the bytes of an image.
//!
//! Every accessor checks its bounds: a short buffer is an error, never a panic.
//! Callers that read what an image says check lengths themselves first and give
//! a better error; the one here means that a caller did not.

use crate::error::{Failure, FailureKind};

/// An access past the end of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfBounds {
    /// Offset in the buffer of the first byte wanted.
    pub at: usize,
}

impl From<OutOfBounds> for Failure {
    fn from(error: OutOfBounds) -> Self {
        Failure::new(
            FailureKind::Internal,
            alloc::format!("access past the end of a buffer, at byte {}", error.at),
        )
    }
}

fn array<const N: usize>(buf: &[u8], at: usize) -> Result<[u8; N], OutOfBounds> {
    buf.get(at..)
        .and_then(|rest| rest.first_chunk::<N>())
        .copied()
        .ok_or(OutOfBounds { at })
}

/// The `len` bytes at `at`.
pub fn slice(buf: &[u8], at: usize, len: usize) -> Result<&[u8], OutOfBounds> {
    buf.get(at..)
        .and_then(|rest| rest.get(..len))
        .ok_or(OutOfBounds { at })
}

/// The byte at `at`.
pub fn byte(buf: &[u8], at: usize) -> Result<u8, OutOfBounds> {
    buf.get(at).copied().ok_or(OutOfBounds { at })
}

/// The big-endian 16-bit number at `at`.
pub fn be16(buf: &[u8], at: usize) -> Result<u16, OutOfBounds> {
    array(buf, at).map(u16::from_be_bytes)
}

/// The big-endian 32-bit number at `at`.
pub fn be32(buf: &[u8], at: usize) -> Result<u32, OutOfBounds> {
    array(buf, at).map(u32::from_be_bytes)
}

/// The big-endian 64-bit number at `at`.
pub fn be64(buf: &[u8], at: usize) -> Result<u64, OutOfBounds> {
    array(buf, at).map(u64::from_be_bytes)
}

/// The little-endian 16-bit number at `at`.
pub fn le16(buf: &[u8], at: usize) -> Result<u16, OutOfBounds> {
    array(buf, at).map(u16::from_le_bytes)
}

/// The little-endian 32-bit number at `at`.
pub fn le32(buf: &[u8], at: usize) -> Result<u32, OutOfBounds> {
    array(buf, at).map(u32::from_le_bytes)
}

/// The little-endian 64-bit number at `at`.
pub fn le64(buf: &[u8], at: usize) -> Result<u64, OutOfBounds> {
    array(buf, at).map(u64::from_le_bytes)
}

/// Overwrites the bytes at `at`.
pub fn put(buf: &mut [u8], at: usize, data: &[u8]) -> Result<(), OutOfBounds> {
    buf.get_mut(at..)
        .and_then(|rest| rest.get_mut(..data.len()))
        .map(|target| target.copy_from_slice(data))
        .ok_or(OutOfBounds { at })
}

/// Writes a big-endian 32-bit number at `at`.
pub fn put_be32(buf: &mut [u8], at: usize, value: u32) -> Result<(), OutOfBounds> {
    put(buf, at, &value.to_be_bytes())
}

/// Writes a big-endian 64-bit number at `at`.
pub fn put_be64(buf: &mut [u8], at: usize, value: u64) -> Result<(), OutOfBounds> {
    put(buf, at, &value.to_be_bytes())
}

/// Writes a little-endian 16-bit number at `at`.
pub fn put_le16(buf: &mut [u8], at: usize, value: u16) -> Result<(), OutOfBounds> {
    put(buf, at, &value.to_le_bytes())
}

/// Writes a little-endian 32-bit number at `at`.
pub fn put_le32(buf: &mut [u8], at: usize, value: u32) -> Result<(), OutOfBounds> {
    put(buf, at, &value.to_le_bytes())
}

/// Writes a little-endian 64-bit number at `at`.
pub fn put_le64(buf: &mut [u8], at: usize, value: u64) -> Result<(), OutOfBounds> {
    put(buf, at, &value.to_le_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_in_the_named_byte_order() {
        let buf = [0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x08];
        assert_eq!(be16(&buf, 1), Ok(0x0203));
        assert_eq!(be32(&buf, 0), Ok(0x0102_0304));
        assert_eq!(be64(&buf, 0), Ok(0x0102_0304_0506_0708));
        assert_eq!(le16(&buf, 1), Ok(0x0302));
        assert_eq!(le32(&buf, 0), Ok(0x0403_0201));
        assert_eq!(le64(&buf, 0), Ok(0x0807_0605_0403_0201));
    }

    #[test]
    fn an_access_past_the_end_is_an_error() {
        let mut buf = [0u8; 8];
        assert_eq!(be64(&buf, 1), Err(OutOfBounds { at: 1 }));
        assert_eq!(be32(&buf, usize::MAX), Err(OutOfBounds { at: usize::MAX }));
        assert_eq!(slice(&buf, 4, usize::MAX), Err(OutOfBounds { at: 4 }));
        assert_eq!(put_be32(&mut buf, 5, 1), Err(OutOfBounds { at: 5 }));
        assert_eq!(buf, [0u8; 8]);
    }
}
