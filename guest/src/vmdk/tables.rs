//! Cached pieces of grain directories and grain tables.
//!
//! Pages are read as they are needed, many at once, and dropped all together
//! when they become too many.

use super::format::entry;
use super::sparse::Sparse;
use crate::bytes::{self, slice};
use crate::engine::{Host, Read};
use crate::error::Failure;
use crate::plan::SECTOR;
use crate::proto::FileNo;
use alloc::collections::BTreeMap;
use alloc::vec;
use alloc::vec::Vec;

/// Bytes of a page: eight grain tables.
pub const PAGE: u64 = 16 << 10;
/// Most pages that are read at once.
pub const BATCH: usize = 64;
/// Most pages that are kept.
const MAX_PAGES: usize = 256;

/// Pages of tables, by file and number.
#[derive(Debug, Default)]
pub struct Tables {
    pages: BTreeMap<(FileNo, u64), Vec<u8>>,
}

impl Tables {
    /// Forgets everything.
    pub fn clear(&mut self) {
        self.pages.clear();
    }

    /// Reads the pages that hold these bytes of a file, unless they are at hand.
    pub fn prefetch(
        &mut self,
        host: &mut dyn Host,
        file: FileNo,
        places: impl IntoIterator<Item = (u64, u64)>,
    ) -> Result<(), Failure> {
        let mut wanted: Vec<u64> = Vec::new();
        for (at, len) in places {
            for page in at / PAGE..(at + len).div_ceil(PAGE) {
                if wanted.last() != Some(&page) && !self.pages.contains_key(&(file, page)) {
                    wanted.push(page);
                }
            }
        }
        wanted.sort_unstable();
        wanted.dedup();
        if self.pages.len() + wanted.len() > MAX_PAGES {
            self.pages.clear();
        }
        for batch in wanted.chunks(BATCH) {
            let mut pages = vec![vec![0; PAGE as usize]; batch.len()];
            let mut reads: Vec<Read<'_>> = batch
                .iter()
                .zip(&mut pages)
                .map(|(page, buf)| Read {
                    file,
                    offset: page * PAGE,
                    buf,
                })
                .collect();
            host.read(&mut reads)?;
            let keys = batch.iter().map(|&page| (file, page));
            self.pages.extend(keys.zip(pages));
        }
        Ok(())
    }

    /// Copies bytes of a file, from the pages at hand if they are.
    pub fn copy(
        &mut self,
        host: &mut dyn Host,
        file: FileNo,
        at: u64,
        buf: &mut [u8],
    ) -> Result<(), Failure> {
        let mut done = 0;
        while done < buf.len() {
            let from = at + done as u64;
            let key = (file, from / PAGE);
            if !self.pages.contains_key(&key) {
                self.prefetch(host, file, [(from, 1)])?;
            }
            let page = self.pages.get(&key).map_or(&[][..], Vec::as_slice);
            let inside = (from % PAGE) as usize;
            let len = (buf.len() - done).min(PAGE as usize - inside);
            bytes::put(buf, done, slice(page, inside, len)?)?;
            done += len;
        }
        Ok(())
    }

    /// The entry at a byte offset of a file.
    pub fn entry(&mut self, host: &mut dyn Host, file: FileNo, at: u64) -> Result<u32, Failure> {
        let mut raw = [0; entry::LEN as usize];
        self.copy(host, file, at, &mut raw)?;
        Ok(u32::from_le_bytes(raw))
    }

    /// The sector of grain table `index` of an extent, checked.
    pub fn table(
        &mut self,
        host: &mut dyn Host,
        sparse: &Sparse,
        index: u64,
    ) -> Result<Option<u64>, Failure> {
        let at = sparse.header.directory * SECTOR + index * entry::LEN;
        let raw = self.entry(host, sparse.file, at)?;
        sparse.table(index, raw)
    }
}
