//! Compressed clusters.

use super::Qcow2;
use super::entry::Cluster;
use super::facts::encrypted;
use super::header::Compression;
use super::refuse;
use crate::engine::{Host, Read};
use crate::error::{Failure, FailureKind};
use crate::proto::FileNo;
use crate::units::{GuestOffset, HostOffset};
use alloc::boxed::Box;
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
use miniz_oxide::inflate::core::{DecompressorOxide, decompress};
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};
use ruzstd::io::Read as _;

/// Largest zstd window that is accepted. Clusters have at most 2 MiB, so no
/// encoder has a use for more; a decoder has to keep that much in memory.
const MAX_ZSTD_WINDOW: u64 = 8 << 20;

/// A compressed cluster as it lies in the file.
struct Packed {
    guest: GuestOffset,
    host: HostOffset,
    bytes: Vec<u8>,
}

impl Qcow2 {
    /// The content of the compressed clusters of a guest range, which begins
    /// with a cluster and ends with one or with the disk.
    pub fn inflated(
        &mut self,
        host: &mut dyn Host,
        offset: u64,
        len: u64,
    ) -> Result<Vec<u8>, Failure> {
        let geometry = self.header.geometry;
        let end = offset.saturating_add(len);
        if !geometry.is_aligned(offset) || !(geometry.is_aligned(end) || end == self.header.size) {
            return Err(Failure::new(
                FailureKind::InvalidRequest,
                format!("{len} bytes at {offset:#x} are not whole clusters"),
            ));
        }
        if self.header.encryption.is_some() {
            return Err(encrypted("read"));
        }
        let packed = self.read_packed(host, offset, end)?;
        let cluster_size = geometry.cluster_size() as usize;
        let mut content = vec![0; packed.len() * cluster_size];
        let mut unpacker = Unpacker::new(self.header.compression);
        for (cluster, target) in packed.iter().zip(content.chunks_exact_mut(cluster_size)) {
            unpacker.unpack(&cluster.bytes, target).map_err(|why| {
                refuse::table(format!(
                    "the compressed cluster at guest offset {} (host offset {}, {} bytes): {why}",
                    cluster.guest,
                    cluster.host,
                    cluster.bytes.len()
                ))
            })?;
        }
        content.truncate(len as usize);
        Ok(content)
    }

    /// Reads the compressed clusters of a guest range, all at once.
    fn read_packed(
        &mut self,
        host: &mut dyn Host,
        offset: u64,
        end: u64,
    ) -> Result<Vec<Packed>, Failure> {
        let mut packed = Vec::new();
        for at in (offset..end).step_by(self.header.geometry.cluster_size() as usize) {
            let guest = GuestOffset(at);
            let Cluster::Compressed { host: place, len } = self.cluster(host, guest)? else {
                return Err(Failure::new(
                    FailureKind::InvalidRequest,
                    format!("the cluster at guest offset {guest} is not compressed"),
                ));
            };
            let len = len.min(self.file_len.saturating_sub(place.0));
            packed.push(Packed {
                guest,
                host: place,
                bytes: vec![0; len as usize],
            });
        }
        let mut reads: Vec<Read<'_>> = packed
            .iter_mut()
            .map(|cluster| Read {
                file: FileNo::IMAGE,
                offset: cluster.host.0,
                buf: &mut cluster.bytes,
            })
            .collect();
        if !reads.is_empty() {
            host.read(&mut reads)?;
        }
        Ok(packed)
    }
}

/// A decompressor that is used for one cluster after the other.
enum Unpacker {
    Deflate(Box<DecompressorOxide>),
    Zstd(Box<FrameDecoder>),
}

impl Unpacker {
    fn new(compression: Compression) -> Self {
        match compression {
            Compression::Deflate => Self::Deflate(Box::default()),
            Compression::Zstd => {
                let mut decoder = Box::new(FrameDecoder::new());
                decoder.set_max_window_size(MAX_ZSTD_WINDOW);
                Self::Zstd(decoder)
            }
        }
    }

    /// Fills the cluster, or says why not. The packed bytes go on for up to a
    /// sector after the stream's end, with anything.
    fn unpack(&mut self, packed: &[u8], cluster: &mut [u8]) -> Result<(), &'static str> {
        match self {
            Self::Deflate(decoder) => inflate(decoder, packed, cluster),
            Self::Zstd(decoder) => unzstd(decoder, packed, cluster),
        }
    }
}

/// A raw deflate stream. Some encoders leave the stream's end out, so a full
/// cluster is what counts.
fn inflate(
    decoder: &mut DecompressorOxide,
    packed: &[u8],
    cluster: &mut [u8],
) -> Result<(), &'static str> {
    *decoder = DecompressorOxide::new();
    let flags = TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
    let (status, _, written) = decompress(decoder, packed, cluster, 0, flags);
    match status {
        TINFLStatus::Done | TINFLStatus::HasMoreOutput if written == cluster.len() => Ok(()),
        // Cut inside the code that ends the stream.
        TINFLStatus::FailedCannotMakeProgress | TINFLStatus::NeedsMoreInput
            if written == cluster.len() =>
        {
            Ok(())
        }
        TINFLStatus::Done => Err("the deflate stream ends before the cluster is full"),
        TINFLStatus::FailedCannotMakeProgress | TINFLStatus::NeedsMoreInput => {
            Err("the deflate stream is cut short")
        }
        _ => Err("invalid deflate data"),
    }
}

/// One or more zstd frames that fill the cluster exactly.
fn unzstd(
    decoder: &mut FrameDecoder,
    mut packed: &[u8],
    cluster: &mut [u8],
) -> Result<(), &'static str> {
    let mut rest = cluster;
    while !rest.is_empty() {
        match decoder.reset(&mut packed) {
            Ok(()) => {}
            Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                length,
                ..
            })) => {
                packed = packed
                    .get(length as usize..)
                    .ok_or("a zstd frame is cut short")?;
                continue;
            }
            Err(FrameDecoderError::WindowSizeTooBig { .. }) => {
                return Err("a zstd frame has a window of more than 8 MiB");
            }
            Err(_) => return Err("invalid zstd frame"),
        }
        while !decoder.is_finished() {
            decoder
                .decode_blocks(&mut packed, BlockDecodingStrategy::UptoBlocks(1))
                .map_err(|_| "invalid zstd data")?;
            let count = decoder.read(rest).map_err(|_| "invalid zstd data")?;
            rest = rest.get_mut(count..).unwrap_or_default();
            if decoder.can_collect() > 0 {
                return Err("the zstd data is longer than the cluster");
            }
        }
        let stored = decoder.get_checksum_from_data();
        if stored.is_some() && stored != decoder.get_calculated_checksum() {
            return Err("the checksum of the zstd data is wrong");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use miniz_oxide::deflate::compress_to_vec;

    const CLUSTER: usize = 4096;
    /// The low half of XXH64, seed 0, as zstd frames have it.
    const XXH64_OF_4096_ONES: u32 = 0x68da1f79;

    fn unpack(compression: Compression, packed: &[u8]) -> Result<Vec<u8>, &'static str> {
        let mut cluster = vec![0; CLUSTER];
        Unpacker::new(compression).unpack(packed, &mut cluster)?;
        Ok(cluster)
    }

    #[track_caller]
    fn unpacks(compression: Compression, packed: &[u8], content: &[u8]) {
        let unpacked = unpack(compression, packed).unwrap();
        let differs = unpacked.iter().zip(content).position(|(a, b)| a != b);
        assert_eq!((unpacked.len(), differs), (content.len(), None));
    }

    /// A zstd frame of run-length blocks: `len` times `byte` in each.
    fn frame(window: u8, blocks: &[(u8, u32)]) -> Vec<u8> {
        let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0, window];
        for (index, (byte, len)) in blocks.iter().enumerate() {
            let last = u32::from(index + 1 == blocks.len());
            let header = last | 1 << 1 | len << 3;
            frame.extend(&header.to_le_bytes()[..3]);
            frame.push(*byte);
        }
        frame
    }

    #[test]
    fn a_deflate_stream_fills_the_cluster_whatever_follows_it() {
        let content: Vec<u8> = (0..CLUSTER).map(|i| (i / 3) as u8).collect();
        let mut packed = compress_to_vec(&content, 6);
        packed.extend([0xff; 300]);
        unpacks(Compression::Deflate, &packed, &content);
    }

    #[test]
    fn a_deflate_stream_cut_inside_its_end_fills_the_cluster() {
        // A block of fixed codes: the end takes the last 7 bits or more.
        let mut bits = vec![1, 1, 0];
        for _ in 0..CLUSTER {
            // Literal 0 is 0b0011_0000, the most significant bit first.
            bits.extend([0, 0, 1, 1, 0, 0, 0, 0]);
        }
        bits.extend([0; 5]);
        let packed: Vec<u8> = bits
            .chunks(8)
            .map(|byte| byte.iter().rev().fold(0, |all, bit| all << 1 | bit))
            .collect();
        unpacks(Compression::Deflate, &packed, &[0; CLUSTER]);
    }

    #[test]
    fn a_deflate_stream_of_another_length_is_refused() {
        let packed = compress_to_vec(&[7; CLUSTER - 1], 6);
        assert_eq!(
            unpack(Compression::Deflate, &packed),
            Err("the deflate stream ends before the cluster is full")
        );
        let content: Vec<u8> = (0..CLUSTER as u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
            .collect();
        let packed = compress_to_vec(&content, 6);
        assert_eq!(
            unpack(Compression::Deflate, &packed[..packed.len() / 2]),
            Err("the deflate stream is cut short")
        );
    }

    #[test]
    fn a_deflate_bomb_fills_the_cluster_and_no_more() {
        let packed = compress_to_vec(&vec![7; 1 << 20], 9);
        unpacks(Compression::Deflate, &packed, &[7; CLUSTER]);
    }

    #[test]
    fn invalid_deflate_data_is_refused() {
        assert_eq!(
            unpack(Compression::Deflate, &[0xff; 512]),
            Err("invalid deflate data")
        );
        assert_eq!(
            unpack(Compression::Deflate, &[]),
            Err("the deflate stream is cut short")
        );
    }

    #[test]
    fn one_or_more_zstd_frames_fill_the_cluster_whatever_follows_them() {
        let mut packed = frame(0x18, &[(1, 1000), (2, 96)]);
        packed.extend([0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 9, 9, 9]);
        packed.extend(frame(0x18, &[(3, 3000), (0, 0)]));
        packed.extend([0xff; 300]);
        let content = [vec![1; 1000], vec![2; 96], vec![3; 3000]].concat();
        unpacks(Compression::Zstd, &packed, &content);
    }

    #[test]
    fn zstd_data_of_another_length_is_refused() {
        assert_eq!(
            unpack(Compression::Zstd, &frame(0x18, &[(1, 4097)])),
            Err("the zstd data is longer than the cluster")
        );
        assert_eq!(
            unpack(Compression::Zstd, &frame(0x18, &[(1, 4095)])),
            Err("invalid zstd frame")
        );
    }

    #[test]
    fn a_zstd_frame_with_a_checksum_is_checked() {
        let mut packed = frame(0x18, &[(1, CLUSTER as u32)]);
        packed[4] |= 1 << 2;
        packed.extend(XXH64_OF_4096_ONES.to_le_bytes());
        unpacks(Compression::Zstd, &packed, &[1; CLUSTER]);
        packed[10] = 2;
        assert_eq!(
            unpack(Compression::Zstd, &packed),
            Err("the checksum of the zstd data is wrong")
        );
    }

    #[test]
    fn a_zstd_bomb_ends_with_its_window() {
        let packed = frame(0x58, &vec![(1, 128 << 10); 100_000]);
        assert_eq!(
            unpack(Compression::Zstd, &packed),
            Err("the zstd data is longer than the cluster")
        );
    }

    #[test]
    fn a_zstd_window_of_more_than_8_mib_is_refused() {
        assert_eq!(
            unpack(Compression::Zstd, &frame(0x70, &[(1, 4096)])),
            Err("a zstd frame has a window of more than 8 MiB")
        );
    }

    #[test]
    fn a_skippable_zstd_frame_that_is_cut_short_is_refused() {
        let packed = [0x50, 0x2a, 0x4d, 0x18, 0xff, 0xff, 0xff, 0xff, 0];
        assert_eq!(
            unpack(Compression::Zstd, &packed),
            Err("a zstd frame is cut short")
        );
    }
}
