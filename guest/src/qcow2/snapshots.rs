//! The snapshot table.

use super::format::{entry, limit, snapshot};
use super::geometry::Geometry;
use super::header::TableRef;
use super::refuse;
use crate::bytes::{be16, be32, be64, slice};
use crate::engine::{Host, Read};
use crate::error::{Failure, FailureKind};
use crate::proto::FileNo;
use crate::units::HostOffset;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

/// An internal snapshot, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Its L1 table; the offset has no meaning if it has no entries.
    pub l1: TableRef,
    /// Virtual size when it was taken, where recorded.
    pub disk_size: Option<u64>,
    /// What `info` shows.
    pub facts: crate::facts::Snapshot,
}

/// Length in bytes of a directory whose entries follow each other, read from
/// the file piece by piece.
pub struct Directory {
    start: HostOffset,
    end: u64,
    bytes: Vec<u8>,
}

/// Bytes that are read at once.
const PIECE: u64 = 64 << 10;

impl Directory {
    /// A directory at `start`, at most `most` bytes long, in a file of
    /// `file_len` bytes.
    pub fn new(start: HostOffset, most: u64, file_len: u64) -> Self {
        Self {
            start,
            end: file_len.min(start.plus(most).0),
            bytes: Vec::new(),
        }
    }

    /// The `len` bytes at `at` from its start, or `None` past its end.
    pub fn get(
        &mut self,
        host: &mut dyn Host,
        at: usize,
        len: usize,
    ) -> Result<Option<&[u8]>, Failure> {
        let Some(end) = at.checked_add(len) else {
            return Ok(None);
        };
        if self.start.plus(end as u64).0 > self.end {
            return Ok(None);
        }
        while self.bytes.len() < end {
            let have = self.bytes.len();
            let from = self.start.plus(have as u64).0;
            let more = (self.end - from).min(PIECE) as usize;
            self.bytes.resize(have + more, 0);
            let buf = self.bytes.get_mut(have..).unwrap_or_default();
            host.read(&mut [Read {
                file: FileNo::IMAGE,
                offset: from,
                buf,
            }])?;
        }
        Ok(Some(slice(&self.bytes, at, len)?))
    }
}

/// Reads and checks the snapshot table. Returns it with its length in bytes.
pub fn read(
    host: &mut dyn Host,
    table: TableRef,
    geometry: Geometry,
    file_len: u64,
) -> Result<(Vec<Snapshot>, u64), Failure> {
    let mut directory = Directory::new(table.offset, limit::MAX_DIRECTORY_LEN, file_len);
    let mut list = Vec::new();
    let mut at = 0;
    let mut names_len = 0;
    for index in 0..table.count {
        let (snapshot, len) = read_one(host, &mut directory, at, index)?;
        check_l1(&snapshot, geometry, file_len, index)?;
        names_len += snapshot.facts.id.len() + snapshot.facts.name.len();
        check_names_len("Snapshot table", names_len)?;
        list.push(snapshot);
        at = (at + len).next_multiple_of(8);
    }
    Ok((list, at as u64))
}

/// Refuses names that together are too long for a reply.
pub fn check_names_len(what: &str, len: usize) -> Result<(), Failure> {
    if len <= limit::MAX_NAMES_LEN {
        return Ok(());
    }
    Err(Failure::new(
        FailureKind::Unsupported,
        format!(
            "{what}: the names are more than {} bytes long, which is not supported; use qemu-img \
             to remove some",
            limit::MAX_NAMES_LEN
        ),
    ))
}

fn read_one(
    host: &mut dyn Host,
    directory: &mut Directory,
    at: usize,
    index: u32,
) -> Result<(Snapshot, usize), Failure> {
    let cut_short = || {
        refuse::table(format!(
            "Snapshot table: entry {index} reaches past the end of the file or past {} bytes of \
             table",
            limit::MAX_DIRECTORY_LEN
        ))
    };
    let fixed = directory
        .get(host, at, snapshot::LEN)?
        .ok_or_else(cut_short)?;
    let extra_len = be32(fixed, snapshot::EXTRA_LEN)? as usize;
    if extra_len as u64 > limit::MAX_SNAPSHOT_EXTRA {
        return Err(refuse::table(format!(
            "Snapshot table entry {index}: too much extra metadata ({extra_len} bytes, at most \
             {})",
            limit::MAX_SNAPSHOT_EXTRA
        )));
    }
    let id_len = usize::from(be16(fixed, snapshot::ID_LEN)?);
    let name_len = usize::from(be16(fixed, snapshot::NAME_LEN)?);
    let len = snapshot::LEN + extra_len + id_len + name_len;
    let bytes = directory.get(host, at, len)?.ok_or_else(cut_short)?;
    let extra = slice(bytes, snapshot::LEN, extra_len)?;
    let id = slice(bytes, snapshot::LEN + extra_len, id_len)?;
    let name = slice(bytes, snapshot::LEN + extra_len + id_len, name_len)?;
    let snapshot = Snapshot {
        l1: TableRef {
            offset: HostOffset(be64(bytes, snapshot::L1_OFFSET)?),
            count: be32(bytes, snapshot::L1_SIZE)?,
        },
        disk_size: be64(extra, snapshot::EXTRA_DISK_SIZE).ok(),
        facts: crate::facts::Snapshot {
            id: String::from_utf8_lossy(id).into_owned(),
            name: String::from_utf8_lossy(name).into_owned(),
            vm_state_size: be64(extra, snapshot::EXTRA_VM_STATE_SIZE).or(be32(
                bytes,
                snapshot::VM_STATE_SIZE,
            )
            .map(u64::from))?,
            date_sec: be32(bytes, snapshot::DATE_SEC)?,
            date_nsec: be32(bytes, snapshot::DATE_NSEC)?,
            vm_clock_nsec: be64(bytes, snapshot::VM_CLOCK)?,
            icount: be64(extra, snapshot::EXTRA_ICOUNT)
                .ok()
                .filter(|&icount| icount != u64::MAX),
        },
    };
    Ok((snapshot, len))
}

fn check_l1(
    snapshot: &Snapshot,
    geometry: Geometry,
    file_len: u64,
    index: u32,
) -> Result<(), Failure> {
    let count = u64::from(snapshot.l1.count);
    if count > limit::MAX_L1_ENTRIES {
        return Err(refuse::table(format!(
            "Snapshot table entry {index}: Snapshot L1 table too large ({count} entries, at most \
             {})",
            limit::MAX_L1_ENTRIES
        )));
    }
    if count == 0 {
        return Ok(());
    }
    let offset = snapshot.l1.offset;
    refuse::misplaced(geometry, file_len, offset.0, count * entry::LEN).map_or(Ok(()), |why| {
        Err(refuse::table(format!(
            "Snapshot table entry {index}: Snapshot L1 table offset invalid ({offset}, {count} \
             entries: {why})"
        )))
    })
}
