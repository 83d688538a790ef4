//! One look at every grain table before a change: what is in the way, where the
//! data ends, which places are taken.

use super::scan::{self, Table};
use super::sparse::{Grain, Header, Sparse};
use super::{refuse, slots::Slots};
use crate::engine::Host;
use crate::error::{Failure, FailureKind};
use crate::plan::SECTOR;
use alloc::format;
use alloc::vec::Vec;
use core::ops::ControlFlow;

/// Most grains that one change moves out of the way.
const MAX_MOVED: usize = 32 << 10;

/// What is to stay.
#[derive(Clone, Copy, Debug)]
pub struct Keep {
    /// How many grains.
    pub grains: u64,
    /// The sector before which none of them may lie afterwards.
    pub front: u64,
}

/// What was found. Places are sectors.
#[derive(Debug)]
pub struct Survey {
    /// The end of the last grain that stays.
    pub data_end: u64,
    /// The end of the last directory, table or descriptor.
    pub tables_end: u64,
    /// Grains that stay, but not where they lie: number and sector, in order.
    pub moved: Vec<(u64, u64)>,
    /// Where the last of the grains that stay lies.
    pub last: Option<u64>,
    /// The places that are taken from the front on.
    pub slots: Slots,
}

impl Survey {
    /// Looks at all tables of an extent.
    pub fn take(host: &mut dyn Host, sparse: &Sparse, keep: Keep) -> Result<Self, Failure> {
        let header = &sparse.header;
        let directory = header.directory_entries() * super::format::entry::LEN;
        let directory = directory.div_ceil(SECTOR);
        let ends = [
            header.overhead,
            header.directory + directory,
            header.redundant.unwrap_or(0) + directory,
            header.descriptor + header.descriptor_size,
        ];
        let mut survey = Self {
            data_end: 0,
            tables_end: ends.into_iter().max().unwrap_or(0),
            moved: Vec::new(),
            last: None,
            slots: Slots::new(keep.front, header.grain, sparse.file_len.div_ceil(SECTOR)),
        };
        scan::tables(host, sparse, |table| {
            let table_end = table.sector + header.table_len().div_ceil(SECTOR);
            survey.tables_end = survey.tables_end.max(table_end);
            if table.bytes.iter().any(|&byte| byte != 0) {
                survey.table(sparse, keep, &table)?;
            }
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(survey)
    }

    fn table(&mut self, sparse: &Sparse, keep: Keep, table: &Table<'_>) -> Result<(), Failure> {
        for (grain, raw) in scan::grains(table.bytes, table.number) {
            if grain >= keep.grains {
                break;
            }
            let Grain::At(sector) = sparse.grain(grain, raw)? else {
                continue;
            };
            check_place(&sparse.header, grain, sector)?;
            if grain + 1 == keep.grains {
                self.last = Some(sector);
            }
            self.data_end = self.data_end.max(sector + sparse.header.grain);
            if sector >= keep.front {
                self.slots.take(sector);
            } else if self.moved.len() < MAX_MOVED {
                self.moved.push((grain, sector));
            } else {
                return Err(Failure::new(
                    FailureKind::TooLarge,
                    format!(
                        "more than {MAX_MOVED} grains lie where the larger grain tables go; \
                         convert the image into a new one of the size wanted with `qemu-img \
                         convert`"
                    ),
                ));
            }
        }
        Ok(())
    }
}

/// Refuses a grain where the metadata is.
pub fn check_place(header: &Header, grain: u64, sector: u64) -> Result<(), Failure> {
    if sector >= header.overhead {
        return Ok(());
    }
    Err(refuse::table(format!(
        "grain table entry of grain {grain}: sector {sector} lies in the metadata, which ends with \
         sector {}",
        header.overhead
    )))
}
