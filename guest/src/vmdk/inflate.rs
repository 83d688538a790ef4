//! Compressed grains: an RFC 1950 stream behind a marker that tells its length.

use super::format::{entry, flag, marker};
use super::sparse::{Grain, Sparse};
use super::{Body, Vmdk, refuse};
use crate::bytes::le32;
use crate::engine::{Host, Read};
use crate::error::{Failure, FailureKind};
use crate::plan::SECTOR;
use alloc::boxed::Box;
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::inflate_flags::{
    TINFL_FLAG_PARSE_ZLIB_HEADER, TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF,
};
use miniz_oxide::inflate::core::{DecompressorOxide, decompress};

/// Bytes of compressed data from which on they are inflated before more are
/// read.
const BATCH: usize = 1 << 20;

/// A compressed grain of the disk.
struct Packed {
    /// Its number in the extent.
    number: u64,
    /// The sector of its marker.
    sector: u64,
    /// Where its data lies in the file, and how long it is.
    data: (u64, u64),
    /// How many bytes of it the disk has.
    len: usize,
}

impl Vmdk {
    /// The content of the compressed grains of a guest range, which begins with
    /// a grain and ends with one or with the disk.
    pub fn inflated(
        &mut self,
        host: &mut dyn Host,
        offset: u64,
        len: u64,
    ) -> Result<Vec<u8>, Failure> {
        let refuse = |why: &str| {
            Failure::new(
                FailureKind::InvalidRequest,
                format!("{len} bytes at {offset:#x} {why}"),
            )
        };
        let Some(Body::Sparse(sparse)) = self.extents.first().map(|extent| &extent.body) else {
            return Err(refuse("are not compressed"));
        };
        let sparse = sparse.clone();
        let grain = sparse.header.grain_len();
        let end = offset + len;
        if !offset.is_multiple_of(grain) || !(end.is_multiple_of(grain) || end == self.size()) {
            return Err(refuse("are not whole grains"));
        }
        let mut packed = Vec::new();
        for at in (offset..end).step_by(grain as usize) {
            let Some(sector) = self.packed_sector(host, &sparse, at / grain)? else {
                return Err(refuse("are not all compressed"));
            };
            packed.push(Packed {
                number: at / grain,
                sector,
                data: (0, 0),
                len: grain.min(end - at) as usize,
            });
        }
        read_markers(host, &sparse, &mut packed)?;
        inflate_all(host, &sparse, &packed)
    }

    /// The sector at which a compressed grain lies, if it is one.
    fn packed_sector(
        &mut self,
        host: &mut dyn Host,
        sparse: &Sparse,
        number: u64,
    ) -> Result<Option<u64>, Failure> {
        let entries = u64::from(sparse.header.table_entries);
        let Some(table) = self.tables.table(host, sparse, number / entries)? else {
            return Ok(None);
        };
        let at = table * SECTOR + number % entries * entry::LEN;
        let raw = self.tables.entry(host, sparse.file, at)?;
        Ok(match sparse.grain(number, raw)? {
            Grain::At(sector) if sparse.header.compressed => Some(sector),
            _ => None,
        })
    }
}

fn damaged(grain: &Packed, why: &str) -> Failure {
    refuse::table(format!(
        "the compressed grain {} at sector {}: {why}",
        grain.number, grain.sector
    ))
}

/// Finds out where the data of each grain lies. Without markers a grain is
/// taken to be as long as an uncompressed one, as QEMU does.
fn read_markers(
    host: &mut dyn Host,
    sparse: &Sparse,
    packed: &mut [Packed],
) -> Result<(), Failure> {
    let grain = sparse.header.grain_len();
    if sparse.header.flags & flag::MARKERS == 0 {
        for found in packed {
            found.data = (found.sector * SECTOR, grain);
        }
        return Ok(());
    }
    let mut markers = vec![[0; marker::GRAIN_LEN]; packed.len()];
    let mut reads: Vec<Read<'_>> = packed
        .iter()
        .zip(&mut markers)
        .map(|(found, buf)| Read {
            file: sparse.file,
            offset: found.sector * SECTOR,
            buf,
        })
        .collect();
    host.read(&mut reads)?;
    for (found, marker) in packed.iter_mut().zip(&markers) {
        let len = u64::from(le32(marker, marker::SIZE)?);
        let at = found.sector * SECTOR + marker::GRAIN_LEN as u64;
        // QEMU reads no more than two grains, marker included.
        if len == 0 || len > 2 * grain || at + len > sparse.file_len {
            let why = format!("its marker says {len} bytes, which is impossible");
            return Err(damaged(found, &why));
        }
        found.data = (at, len);
    }
    Ok(())
}

fn inflate_all(
    host: &mut dyn Host,
    sparse: &Sparse,
    packed: &[Packed],
) -> Result<Vec<u8>, Failure> {
    let mut content = Vec::with_capacity(packed.iter().map(|grain| grain.len).sum());
    let mut cluster = vec![0; sparse.header.grain_len() as usize];
    let mut decoder = Box::<DecompressorOxide>::default();
    let mut rest = packed;
    while !rest.is_empty() {
        let mut total = 0;
        let count = rest
            .iter()
            .take_while(|grain| {
                let before = total;
                total += grain.data.1 as usize;
                before < BATCH
            })
            .count();
        let (batch, later) = rest.split_at_checked(count).unwrap_or((rest, &[]));
        let mut data: Vec<Vec<u8>> = batch
            .iter()
            .map(|grain| vec![0; grain.data.1 as usize])
            .collect();
        let mut reads: Vec<Read<'_>> = batch
            .iter()
            .zip(&mut data)
            .map(|(grain, buf)| Read {
                file: sparse.file,
                offset: grain.data.0,
                buf,
            })
            .collect();
        host.read(&mut reads)?;
        for (grain, data) in batch.iter().zip(&data) {
            let written =
                inflate(&mut decoder, data, &mut cluster).map_err(|why| damaged(grain, why))?;
            let wanted = cluster
                .get(..grain.len)
                .filter(|_| written >= grain.len)
                .ok_or_else(|| damaged(grain, "its data ends before the grain is full"))?;
            content.extend_from_slice(wanted);
        }
        rest = later;
    }
    Ok(content)
}

/// Inflates one grain; how many bytes came out.
fn inflate(
    decoder: &mut DecompressorOxide,
    data: &[u8],
    cluster: &mut [u8],
) -> Result<usize, &'static str> {
    *decoder = DecompressorOxide::new();
    let flags = TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF | TINFL_FLAG_PARSE_ZLIB_HEADER;
    let (status, _, written) = decompress(decoder, data, cluster, 0, flags);
    match status {
        TINFLStatus::Done => Ok(written),
        TINFLStatus::HasMoreOutput => Err("its data is longer than a grain"),
        TINFLStatus::Adler32Mismatch => Err("the checksum of its data is wrong"),
        TINFLStatus::FailedCannotMakeProgress | TINFLStatus::NeedsMoreInput => {
            Err("its data is cut short")
        }
        _ => Err("its data is no zlib stream"),
    }
}
