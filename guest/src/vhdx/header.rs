//! The file identifier and the two headers.

use super::checksum::{checksum, seal};
use super::format::{MIB, file_id, header as on_disk, log};
use super::guid::Guid;
use super::refuse::{damaged, unsupported};
use crate::bytes::{self, le16, le32, le64};
use crate::error::{Failure, FailureKind};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

/// Refuses a file that does not begin as a VHDX does.
pub fn check_file_id(head: &[u8]) -> Result<(), Failure> {
    match head.starts_with(file_id::SIGNATURE) {
        true => Ok(()),
        false => Err(Failure::new(
            FailureKind::NotThisFormat,
            "the image is not in VHDX format: it does not begin with 'vhdxfile'; name its real \
             format with -f",
        )),
    }
}

/// A valid header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Rises with each write.
    pub sequence: u64,
    /// Changes before what a guest sees changes.
    pub data_write: Guid,
    /// What log entries must carry; zero where the log is empty.
    pub log: Guid,
    /// Where the log is.
    pub log_offset: u64,
    /// Length of the log in bytes.
    pub log_len: u64,
    /// All 4 KiB as they are on disk.
    pub bytes: Vec<u8>,
}

/// Both headers.
#[derive(Clone, Debug)]
pub struct Headers {
    /// The current one.
    pub current: Header,
    /// Which of the two it is.
    pub slot: usize,
    /// What is in the other slot.
    pub other: Vec<u8>,
    /// Why the other is no valid header, if so.
    pub other_flaw: Option<String>,
}

impl Header {
    /// Decodes a header; what is wrong with it, otherwise.
    fn decode(bytes: &[u8]) -> Result<Self, String> {
        if !bytes.starts_with(on_disk::SIGNATURE) {
            return Err("does not begin with 'head'".into());
        }
        let short = |_| String::from("is cut short");
        let stored = le32(bytes, on_disk::CHECKSUM).map_err(short)?;
        let computed = checksum(bytes, on_disk::CHECKSUM);
        if stored != computed {
            return Err(format!(
                "has the checksum {stored:#010x} instead of {computed:#010x}"
            ));
        }
        let version = le16(bytes, on_disk::VERSION).map_err(short)?;
        if version != 1 {
            return Err(format!("has version {version} instead of 1"));
        }
        Ok(Self {
            sequence: le64(bytes, on_disk::SEQUENCE).map_err(short)?,
            data_write: guid_at(bytes, on_disk::DATA_WRITE).map_err(short)?,
            log: guid_at(bytes, on_disk::LOG).map_err(short)?,
            log_offset: le64(bytes, on_disk::LOG_OFFSET).map_err(short)?,
            log_len: u64::from(le32(bytes, on_disk::LOG_LEN).map_err(short)?),
            bytes: bytes.to_vec(),
        })
    }

    /// Whether the log has to be replayed.
    pub fn has_log(&self) -> bool {
        self.log != Guid::ZERO && self.log_len != 0
    }

    /// The same with changed fields and the next sequence number.
    pub fn next(&self, change: &Change) -> Result<Self, Failure> {
        let mut bytes = self.bytes.clone();
        let sequence = self.sequence.wrapping_add(1);
        bytes::put_le64(&mut bytes, on_disk::SEQUENCE, sequence)?;
        bytes::put(&mut bytes, on_disk::FILE_WRITE, &change.file_write.0)?;
        if let Some(guid) = change.data_write {
            bytes::put(&mut bytes, on_disk::DATA_WRITE, &guid.0)?;
        }
        if let Some(guid) = change.log {
            bytes::put(&mut bytes, on_disk::LOG, &guid.0)?;
        }
        seal(&mut bytes, on_disk::CHECKSUM);
        Ok(Self {
            sequence,
            data_write: change.data_write.unwrap_or(self.data_write),
            log: change.log.unwrap_or(self.log),
            bytes,
            ..*self
        })
    }
}

/// What a header that is written says anew.
#[derive(Clone, Copy, Debug)]
pub struct Change {
    /// The session's identifier.
    pub file_write: Guid,
    /// Set before what a guest sees changes.
    pub data_write: Option<Guid>,
    /// Set where a log entry comes into force or is done with.
    pub log: Option<Guid>,
}

fn guid_at(bytes: &[u8], at: usize) -> Result<Guid, bytes::OutOfBounds> {
    let mut guid = Guid::ZERO;
    guid.0.copy_from_slice(bytes::slice(bytes, at, 16)?);
    Ok(guid)
}

impl Headers {
    /// Finds the current header: the valid one with the greater sequence
    /// number.
    pub fn choose(first: &[u8], second: &[u8]) -> Result<Self, Failure> {
        let slot = match (Header::decode(first), Header::decode(second)) {
            (Err(flaw), Err(other)) => {
                return Err(damaged(format!(
                    "no valid header: the first {flaw}, the second {other}"
                )));
            }
            (Ok(_), Err(_)) => 0,
            (Err(_), Ok(_)) => 1,
            (Ok(a), Ok(b)) if a.sequence == b.sequence && a != b => {
                return Err(damaged(format!(
                    "both headers have the sequence number {} and differ",
                    a.sequence
                )));
            }
            (Ok(a), Ok(b)) => usize::from(b.sequence > a.sequence),
        };
        let (current, other) = match slot {
            0 => (first, second),
            _ => (second, first),
        };
        let current = Header::decode(current).map_err(damaged)?;
        check(&current)?;
        Ok(Self {
            current,
            slot,
            other: other.to_vec(),
            other_flaw: Header::decode(other).err(),
        })
    }
}

/// Refuses a current header that describes no log.
fn check(header: &Header) -> Result<(), Failure> {
    let (offset, len) = (header.log_offset, header.log_len);
    let version = le16(&header.bytes, on_disk::LOG_VERSION)?;
    if header.has_log() && version != 0 {
        return Err(unsupported(format!(
            "the log has version {version}, which is not known; open the image once with the \
             program that wrote it"
        )));
    }
    if header.has_log() && len > log::MAX_LEN {
        return Err(unsupported(format!(
            "the log is {len} bytes long and has to be replayed, which is done up to {} bytes; \
             replay it with `qemu-img check -r all`",
            log::MAX_LEN
        )));
    }
    if len % MIB != 0 {
        return Err(damaged(format!(
            "the log's length of {len} bytes is no multiple of 1 MiB"
        )));
    }
    if len != 0 && (offset < MIB || offset % MIB != 0) {
        return Err(damaged(format!(
            "the log's offset {offset:#x} is not a multiple of 1 MiB, at least 1 MiB"
        )));
    }
    Ok(())
}
