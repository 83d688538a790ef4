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
    pub fn inflate(
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
    }
    Ok(())
}
