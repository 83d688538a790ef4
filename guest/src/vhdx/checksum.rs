//! CRC-32C, the checksum of headers, region tables and log entries.

use crc::{CRC_32_ISCSI, Crc, Table};

static CRC: Crc<u32, Table<16>> = Crc::<u32, Table<16>>::new(&CRC_32_ISCSI);

/// The checksum of `bytes` with the four bytes at `at`, where it is kept, taken
/// as zero.
pub fn checksum(bytes: &[u8], at: usize) -> u32 {
    let (before, rest) = bytes.split_at_checked(at).unwrap_or((bytes, &[]));
    let mut digest = CRC.digest();
    digest.update(before);
    digest.update(&[0; 4]);
    digest.update(rest.get(4..).unwrap_or(&[]));
    digest.finalize()
}

/// Puts the checksum where it is kept.
pub fn seal(bytes: &mut [u8], at: usize) {
    let sum = checksum(bytes, at);
    if let Some(place) = bytes.get_mut(at..).and_then(|rest| rest.get_mut(..4)) {
        place.copy_from_slice(&sum.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_castagnolis_and_does_not_depend_on_its_own_place() {
        // "123456789" has 0xe3069283; four zeroes stand for the checksum here.
        let mut bytes = *b"....123456789";
        let sum = checksum(&bytes, 0);
        seal(&mut bytes, 0);
        assert_eq!(checksum(&bytes, 0), sum);
        assert_eq!(bytes[..4], sum.to_le_bytes());
        assert_eq!(CRC.checksum(b"123456789"), 0xe306_9283);
    }
}
