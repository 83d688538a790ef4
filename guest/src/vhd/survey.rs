//! What the table of a dynamic image says, in one walk over it.

use super::format::table::FREE;
use super::header::{Header, table_end};
use super::table::{block_at, walk};
use super::{Layout, Vhd, refuse};
use crate::engine::{Host, Read};
use crate::error::{Failure, FailureKind};
use crate::plan::SECTOR;
use crate::proto::FileNo;
use alloc::format;
use alloc::vec::Vec;
use core::ops::Range;

/// Most blocks that are moved out of the way of a longer table.
pub const MAX_MOVES: usize = 4096;
/// Most entries behind the end of the disk: all that a 2040 GiB disk has with
/// blocks of 2 MiB.
const MAX_STALE: u64 = 1 << 20;
/// Hyper-V begins the data of blocks at multiples of this, in bytes.
pub const PAGE: u64 = 4096;

/// What was found.
#[derive(Debug)]
pub struct Survey {
    /// Where the metadata and the blocks of the disk end, in bytes.
    pub used_end: u64,
    /// Where the last of the blocks ends, in bytes; 0 without any.
    pub blocks_end: u64,
    /// Blocks that overlap the range asked for: index and place. One more than
    /// [`MAX_MOVES`] at most.
    pub overlapping: Vec<(u64, u64)>,
    /// The block that the end of the disk cuts, where it is there.
    pub cut: Option<u64>,
    /// Entries for blocks behind the end of the disk, from the first to the
    /// last that is not free.
    pub stale: Range<u64>,
    /// Whether the data of all blocks begins at multiples of [`PAGE`].
    pub aligned: bool,
}

/// Where header and table end, the latter with so many entries.
pub fn metadata_end(header: &Header, entries: u64) -> u64 {
    let end = header.end().max(SECTOR);
    match entries {
        0 => end,
        entries => end.max(table_end(header.table, entries)),
    }
}

impl Survey {
    fn new(vhd: &Vhd, header: &Header) -> Self {
        Self {
            used_end: metadata_end(header, header.entries),
            blocks_end: 0,
            overlapping: Vec::new(),
            cut: None,
            stale: 0..0,
            aligned: vhd.file_len.is_multiple_of(PAGE),
        }
    }

    /// Refuses more than one plan can clear.
    fn check_stale(&self, header: &Header) -> Result<(), Failure> {
        if self.stale.end - self.stale.start <= MAX_STALE {
            return Ok(());
        }
        let step = MAX_STALE * header.block_size;
        Err(Failure::new(
            FailureKind::TooLarge,
            format!(
                "the table has too many entries behind the end of the disk to clear them at once; \
                 change the size in steps of at most {step} bytes"
            ),
        ))
    }
}

impl Vhd {
    /// Walks over the table. `wanted` is where it is to end.
    pub(super) fn survey(&self, host: &mut dyn Host, wanted: u64) -> Result<Survey, Failure> {
        self.survey_with(host, self.footer.reach(), wanted, |_, _| {})
    }

    /// The same for a disk of `size` bytes; `keep` gets the index and the sector
    /// of every block of the disk.
    pub(super) fn survey_with(
        &self,
        host: &mut dyn Host,
        size: u64,
        wanted: u64,
        mut keep: impl FnMut(u64, u32),
    ) -> Result<Survey, Failure> {
        let Layout::Dynamic(dynamic) = &self.layout else {
            return Err(crate::disk::Disk::refuse(self, "has no blocks"));
        };
        let header = &dynamic.header;
        let count = header.entries_for(size);
        let mut survey = Survey::new(self, header);
        let in_the_way = header.table_end()..wanted;
        let mut any = false;
        let footer = self.footer_at();
        walk(host, header, 0..header.entries, |_, index, entry| {
            if entry == FREE {
                return Ok(());
            }
            if index >= count {
                let start = match survey.stale.is_empty() {
                    true => index,
                    false => survey.stale.start,
                };
                survey.stale = start..index + 1;
                return Ok(());
            }
            let at = block_at(header, self.file_len, index, entry)?;
            let end = at + header.stride();
            if end > footer {
                return Err(refuse::table(format!(
                    "block {index} at {at:#x} overlaps the footer at the end of the file"
                )));
            }
            survey.blocks_end = survey.blocks_end.max(end);
            survey.used_end = survey.used_end.max(end);
            let data = at + header.bitmap_len();
            survey.aligned = (survey.aligned || !any) && data.is_multiple_of(PAGE);
            any = true;
            let overlaps = at < in_the_way.end && in_the_way.start < end;
            if overlaps && survey.overlapping.len() <= MAX_MOVES {
                survey.overlapping.push((index, at));
            }
            if index + 1 == count && !size.is_multiple_of(header.block_size) {
                survey.cut = Some(at);
            }
            keep(index, entry);
            Ok(())
        })?;
        survey.check_stale(header)?;
        Ok(survey)
    }

    /// Looks for XenServer's bitmap, which no other program keeps up to date.
    pub(super) fn look_for_batmap(&mut self, host: &mut dyn Host) -> Result<(), Failure> {
        let Layout::Dynamic(dynamic) = &mut self.layout else {
            return Ok(());
        };
        let mut cookie = [0; super::format::table::BATMAP.len()];
        host.read(&mut [Read {
            file: FileNo::IMAGE,
            offset: dynamic.header.table_end(),
            buf: &mut cookie,
        }])?;
        dynamic.has_batmap = cookie == *super::format::table::BATMAP;
        Ok(())
    }
}
