//! Header extensions: all are kept, so that a writer can put them back; those
//! that instar uses are checked.

use super::format::{extension, header, limit};
use super::geometry::Geometry;
use super::header::RawHeader;
use super::refuse;
use crate::bytes::{be32, be64, byte, slice};
use crate::error::Failure;
use crate::units::HostOffset;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

/// One extension as it stands in the header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extension {
    /// Its type.
    pub kind: u32,
    /// Offset in the file of its type field.
    pub at: usize,
    /// Its data, without the padding.
    pub data: Vec<u8>,
}

/// What the bitmaps extension says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapsRef {
    /// Bitmaps in the directory, at least one.
    pub count: u32,
    /// Length of the directory in bytes.
    pub directory_len: u64,
    /// Place of the directory.
    pub directory: HostOffset,
}

/// What the encryption extension says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CryptoRef {
    /// Place of the encryption header.
    pub offset: HostOffset,
    /// Its length in bytes.
    pub len: u64,
}

/// The extensions in file order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extensions {
    list: Vec<Extension>,
}

impl Extensions {
    /// How many of the file's first bytes must be at hand to parse the header,
    /// its extensions and the name of the backing file. At most a cluster.
    pub fn area_len(head: &[u8], raw: &RawHeader, geometry: Geometry) -> u64 {
        let name_end = match raw.backing_offset {
            0 => 0,
            offset => offset.saturating_add(u64::from(raw.backing_len)),
        };
        let mut at = raw.header_length as usize;
        let mut extensions_end = area_end(raw, geometry);
        while let (Ok(kind), Ok(len)) = (be32(head, at), be32(head, at.saturating_add(4))) {
            if kind == extension::END {
                extensions_end = at as u64 + extension::HEADER_LEN as u64;
                break;
            }
            at = next(at, len);
        }
        extensions_end.max(name_end).min(geometry.cluster_size())
    }

    /// Reads the extensions from the first bytes of the file. What lies past
    /// the end of `cluster` counts as zero, that is, as the end marker.
    pub fn parse(cluster: &[u8], raw: &RawHeader, geometry: Geometry) -> Result<Self, Failure> {
        let end = area_end(raw, geometry);
        let area = cluster.get(..end as usize).unwrap_or(cluster);
        let mut list = Vec::new();
        let mut at = raw.header_length as usize;
        while let (Ok(kind), Ok(len)) = (be32(area, at), be32(area, at.saturating_add(4))) {
            if kind == extension::END {
                break;
            }
            let data = slice(area, at + extension::HEADER_LEN, len as usize).map_err(|_| {
                refuse::header(format!(
                    "Header extension too large (extension {kind:#010x} at byte {at} is {len} \
                     bytes long, the header's extensions end at byte {})",
                    area.len()
                ))
            })?;
            list.push(Extension {
                kind,
                at,
                data: data.to_vec(),
            });
            at = next(at, len);
        }
        let extensions = Self { list };
        extensions.check_duplicates()?;
        extensions.check_texts()?;
        Ok(extensions)
    }

    fn check_duplicates(&self) -> Result<(), Failure> {
        for kind in [
            extension::BACKING_FORMAT,
            extension::BITMAPS,
            extension::CRYPTO,
            extension::DATA_FILE,
        ] {
            if self.list.iter().filter(|ext| ext.kind == kind).count() > 1 {
                return Err(refuse::header(format!(
                    "header extension {kind:#010x} occurs twice"
                )));
            }
        }
        Ok(())
    }

    fn check_texts(&self) -> Result<(), Failure> {
        for (kind, what, most) in [
            (
                extension::BACKING_FORMAT,
                "ext_backing_format",
                limit::MAX_BACKING_FORMAT,
            ),
            (
                extension::DATA_FILE,
                "data file name",
                limit::MAX_DATA_FILE_NAME,
            ),
        ] {
            let len = self.find(kind).map_or(0, |ext| ext.data.len());
            if len > most {
                return Err(refuse::header(format!(
                    "{what} too large (extension {kind:#010x} is {len} bytes long, at most {most})"
                )));
            }
        }
        Ok(())
    }

    /// All extensions, unknown ones included.
    pub fn iter(&self) -> impl Iterator<Item = &Extension> {
        self.list.iter()
    }

    /// The extension of a type.
    pub fn find(&self, kind: u32) -> Option<&Extension> {
        self.list.iter().find(|ext| ext.kind == kind)
    }

    /// Name of the backing file's format.
    pub fn backing_format(&self) -> Option<String> {
        self.text(extension::BACKING_FORMAT)
    }

    /// Name of the data file.
    pub fn data_file(&self) -> Option<String> {
        self.text(extension::DATA_FILE)
    }

    fn text(&self, kind: u32) -> Option<String> {
        self.find(kind)
            .map(|ext| String::from_utf8_lossy(&ext.data).into_owned())
    }

    /// Bit and name of the incompatible features that the image names.
    pub fn incompatible_feature_names(&self) -> Vec<(u8, String)> {
        let Some(table) = self.find(extension::FEATURE_NAMES) else {
            return Vec::new();
        };
        table
            .data
            .chunks_exact(extension::FEATURE_NAME_LEN)
            .filter(|record| byte(record, 0) == Ok(0))
            .filter_map(|record| {
                let name = record.get(2..)?.split(|&byte| byte == 0).next()?;
                Some((
                    byte(record, 1).ok()?,
                    String::from_utf8_lossy(name).into_owned(),
                ))
            })
            .collect()
    }

    /// The bitmap directory's place, its fields unchecked but for the
    /// extension's own length and reserved field.
    pub fn bitmaps(&self) -> Result<Option<BitmapsRef>, Failure> {
        let Some(ext) = self.find(extension::BITMAPS) else {
            return Ok(None);
        };
        if ext.data.len() != extension::BITMAPS_LEN {
            return Err(refuse::header(format!(
                "bitmaps_ext: Invalid extension length (the bitmaps extension is {} bytes long \
                 instead of {})",
                ext.data.len(),
                extension::BITMAPS_LEN
            )));
        }
        if be32(&ext.data, 4)? != 0 {
            return Err(refuse::header(
                "bitmaps_ext: Reserved field is not zero (in the bitmaps header extension)",
            ));
        }
        Ok(Some(BitmapsRef {
            count: be32(&ext.data, 0)?,
            directory_len: be64(&ext.data, 8)?,
            directory: HostOffset(be64(&ext.data, 16)?),
        }))
    }

    /// The encryption header's place, its fields unchecked.
    pub fn crypto(&self) -> Result<Option<CryptoRef>, Failure> {
        let Some(ext) = self.find(extension::CRYPTO) else {
            return Ok(None);
        };
        if ext.data.len() != extension::CRYPTO_LEN {
            return Err(refuse::header(format!(
                "CRYPTO header extension size {} but expected size {}",
                ext.data.len(),
                extension::CRYPTO_LEN
            )));
        }
        Ok(Some(CryptoRef {
            offset: HostOffset(be64(&ext.data, 0)?),
            len: be64(&ext.data, 8)?,
        }))
    }
}

/// Offset of the extension that follows one of `len` bytes at `at`.
fn next(at: usize, len: u32) -> usize {
    (len as usize)
        .next_multiple_of(8)
        .saturating_add(extension::HEADER_LEN)
        .saturating_add(at)
}

/// Where extensions end at the latest: at the name of the backing file, or with
/// the cluster.
fn area_end(raw: &RawHeader, geometry: Geometry) -> u64 {
    match raw.backing_offset {
        offset if offset >= header::V2_LEN as u64 && offset < geometry.cluster_size() => offset,
        _ => geometry.cluster_size(),
    }
}
