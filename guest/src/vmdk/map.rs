//! From guest ranges to extents.

use super::format::entry;
use super::sparse::{Grain, Sparse};
use super::tables::{BATCH, PAGE};
use super::{Body, Vmdk};
use crate::bytes::le32;
use crate::engine::Host;
use crate::error::Failure;
use crate::extents::Extents;
use crate::plan::SECTOR;
use crate::proto::{Extent, ExtentKind, FileNo};
use alloc::vec;
use alloc::vec::Vec;

/// Most grain tables that are looked at for one request.
const MAX_TABLES: u64 = 8 << 10;
/// Most entries of the grain directory that are read at once.
const DIRECTORY_BATCH: u64 = 4 << 10;
/// Extents that a grain adds at most: it is cut in two where its file ends.
const PER_GRAIN: usize = 2;

impl Vmdk {
    /// The extents of a guest range inside the disk, from its start on, without
    /// gaps. They may end before the range does: the caller asks again.
    pub fn extents(
        &mut self,
        host: &mut dyn Host,
        offset: u64,
        len: u64,
    ) -> Result<Vec<Extent>, Failure> {
        let end = offset + len;
        let mut found = Extents::default();
        let mut at = offset;
        let mut tables = 0;
        while at < end && tables < MAX_TABLES && !found.is_full(PER_GRAIN) {
            let index = self.extent_at(at);
            let Some(extent) = self.extents.get(index) else {
                break;
            };
            let stop = end.min(extent.end());
            let start = extent.start;
            match &extent.body {
                Body::Zero => {
                    found.push(at, stop - at, ExtentKind::Zero { at: None });
                    at = stop;
                }
                &Body::Flat {
                    file,
                    at: first,
                    file_len,
                    in_place,
                } => {
                    let in_place = in_place && self.pending.is_marked();
                    let place = first + (at - start);
                    push_data(&mut found, at, stop - at, (file, place), file_len, in_place);
                    at = stop;
                }
                Body::Sparse(sparse) => {
                    let sparse = sparse.clone();
                    let batch = self.prefetch(host, &sparse, start, at, stop)?;
                    tables += batch.tables;
                    at =
                        self.map_tables(host, &sparse, (index, start), at, batch.end, &mut found)?;
                }
            }
        }
        Ok(found.list)
    }

    /// Reads the grain tables that map `at` and what follows. Answers the guest
    /// offset up to which tables are at hand, and how many were looked at.
    fn prefetch(
        &mut self,
        host: &mut dyn Host,
        sparse: &Sparse,
        start: u64,
        at: u64,
        end: u64,
    ) -> Result<Batch, Failure> {
        let header = &sparse.header;
        let coverage = header.coverage() * SECTOR;
        let first = (at - start) / coverage;
        let last = (end - start)
            .div_ceil(coverage)
            .min(first + DIRECTORY_BATCH);
        let directory = header.directory * SECTOR + first * entry::LEN;
        self.tables.prefetch(
            host,
            sparse.file,
            [(directory, (last - first) * entry::LEN)],
        )?;
        let len = header.table_len();
        let mut wanted = Vec::new();
        let (mut next, mut pages, mut last_page) = (first, 0, None);
        while next < last && pages < BATCH {
            if let Some(table) = self.tables.table(host, sparse, next)? {
                wanted.push((table * SECTOR, len));
                let page = (table * SECTOR + len) / PAGE;
                pages += usize::from(last_page != Some(page));
                last_page = Some(page);
            }
            next += 1;
        }
        self.tables.prefetch(host, sparse.file, wanted)?;
        Ok(Batch {
            end: end.min(start + next * coverage),
            tables: next - first,
        })
    }

    /// Maps what the grain tables say about `at..end`. Returns how far it got.
    fn map_tables(
        &mut self,
        host: &mut dyn Host,
        sparse: &Sparse,
        (extent, start): (usize, u64),
        mut at: u64,
        end: u64,
        found: &mut Extents,
    ) -> Result<u64, Failure> {
        let header = &sparse.header;
        let (grain, coverage) = (header.grain_len(), header.coverage() * SECTOR);
        let mut entries = vec![0; header.table_len() as usize];
        while at < end && !found.is_full(PER_GRAIN) {
            let index = (at - start) / coverage;
            let stop = end.min(start + (index + 1) * coverage);
            let Some(table) = self.tables.table(host, sparse, index)? else {
                found.push(at, stop - at, ExtentKind::Unallocated { at: None });
                at = stop;
                continue;
            };
            self.tables
                .copy(host, sparse.file, table * SECTOR, &mut entries)?;
            if self.pending.is_empty() && entries.iter().all(|&byte| byte == 0) {
                found.push(at, stop - at, ExtentKind::Unallocated { at: None });
                at = stop;
                continue;
            }
            while at < stop && !found.is_full(PER_GRAIN) {
                let number = (at - start) / grain;
                let next = stop.min(start + (number + 1) * grain);
                let place = number % u64::from(header.table_entries) * entry::LEN;
                let raw = match self.pending.sector(extent, number) {
                    Some(sector) => sector,
                    None => le32(&entries, place as usize)?,
                };
                let inside = (at - start) % grain;
                match sparse.grain(number, raw)? {
                    Grain::None => found.push(at, next - at, ExtentKind::Unallocated { at: None }),
                    Grain::Zeroed => found.push(at, next - at, ExtentKind::Zero { at: None }),
                    Grain::At(_) if header.compressed => {
                        found.push(at, next - at, ExtentKind::Compressed);
                    }
                    Grain::At(sector) => {
                        let place = (sparse.file, sector * SECTOR + inside);
                        let may = self.pending.is_marked() && !self.read_only;
                        let in_place = may && sector >= header.overhead;
                        push_data(found, at, next - at, place, sparse.file_len, in_place);
                    }
                }
                at = next;
            }
        }
        Ok(at)
    }
}

/// What is at hand.
struct Batch {
    end: u64,
    tables: u64,
}

/// Adds data. What lies past the end of its file reads as zeroes.
fn push_data(
    found: &mut Extents,
    offset: u64,
    len: u64,
    (file, at): (FileNo, u64),
    file_len: u64,
    in_place: bool,
) {
    let inside = file_len.saturating_sub(at).min(len);
    found.push(offset, inside, ExtentKind::Data { file, at, in_place });
    found.push(offset + inside, len - inside, ExtentKind::Zero { at: None });
}
