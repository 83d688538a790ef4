//! Whole L2 tables: read many at once, and what their entries hold.

use super::Qcow2;
use super::entry::L2Entry;
use super::format::entry;
use super::layout::Run;
use super::refcount::Refcounts;
use crate::bytes;
use crate::engine::{Host, Read};
use crate::error::Failure;
use crate::proto::FileNo;
use crate::units::{GuestOffset, HostOffset};
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

/// What is done with a run of clusters.
pub type Visit<'v> = dyn FnMut(&mut dyn Host, Run) -> Result<(), Failure> + 'v;

impl Qcow2 {
    /// Reads whole L2 tables with one exit from the sandbox.
    pub fn whole_tables(
        &self,
        host: &mut dyn Host,
        tables: &[HostOffset],
    ) -> Result<Vec<Vec<u8>>, Failure> {
        let len = self.header.geometry.cluster_size() as usize;
        let mut contents = vec![vec![0; len]; tables.len()];
        let mut reads: Vec<Read<'_>> = tables
            .iter()
            .zip(&mut contents)
            .map(|(table, buf)| Read {
                file: FileNo::IMAGE,
                offset: table.0,
                buf,
            })
            .collect();
        if !reads.is_empty() {
            host.read(&mut reads)?;
        }
        Ok(contents)
    }

    /// The clusters of the image file that entries of an L2 table hold, in the
    /// order of the entries; neighbours come together. `index` is the table's
    /// L1 entry. What compressed clusters share comes once for each.
    pub fn held_runs(
        &self,
        host: &mut dyn Host,
        content: &[u8],
        index: u64,
        entries: Range<u64>,
        visit: &mut Visit<'_>,
    ) -> Result<(), Failure> {
        if self.header.has_data_file() {
            return Ok(());
        }
        let geometry = self.header.geometry;
        let mut last = Run::default();
        for place in entries {
            let raw = self.raw_entry(content, place)?;
            if raw == L2Entry::default() {
                continue;
            }
            let guest = (index * geometry.l2_entries() + place) * geometry.cluster_size();
            let cluster = self.check_cluster(HostOffset(0), place, GuestOffset(guest), raw)?;
            let Some((at, len)) = cluster.host_range(geometry) else {
                continue;
            };
            let first = at.0 / geometry.cluster_size();
            let count = geometry.clusters(at.0.saturating_add(len)) - first;
            if !last.is_empty() && last.end() == first {
                last.count += count;
                continue;
            }
            if !last.is_empty() {
                visit(host, last)?;
            }
            last = Run { first, count };
        }
        match last.is_empty() {
            true => Ok(()),
            false => visit(host, last),
        }
    }

    /// Entry `place` of a table that was read.
    pub fn raw_entry(&self, content: &[u8], place: u64) -> Result<L2Entry, Failure> {
        let geometry = self.header.geometry;
        let at = (place * geometry.l2_entry_len()) as usize;
        Ok(L2Entry {
            entry: bytes::be64(content, at)?,
            bitmap: match geometry.extended_l2() {
                true => bytes::be64(content, at + entry::LEN as usize)?,
                false => 0,
            },
        })
    }

    /// Takes the copied flag off the first `entries` entries whose cluster is
    /// not counted exactly once: in the copy of a table that a snapshot has, a
    /// stale flag would let a writer change the snapshot.
    pub fn clear_stale_copied(
        &self,
        host: &mut dyn Host,
        refcounts: &mut Refcounts<'_>,
        content: &mut [u8],
        entries: u64,
    ) -> Result<(), Failure> {
        if self.header.has_data_file() {
            return Ok(());
        }
        let geometry = self.header.geometry;
        for place in 0..entries {
            let word = self.raw_entry(content, place)?.entry;
            let flagged = word & entry::COPIED != 0 && word & entry::COMPRESSED == 0;
            let cluster = (word & entry::OFFSET) / geometry.cluster_size();
            if flagged && cluster != 0 && refcounts.count(host, cluster)? != 1 {
                let at = (place * geometry.l2_entry_len()) as usize;
                bytes::put_be64(content, at, word & !entry::COPIED)?;
            }
        }
        Ok(())
    }
}
