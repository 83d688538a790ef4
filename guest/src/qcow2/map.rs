//! From guest ranges to extents.

use super::Qcow2;
use super::entry::{Cluster, L1Entry, L2Entry};
use super::facts::encrypted;
use super::format::entry;
use super::tables::Kind;
use crate::bytes::be64;
use crate::engine::Host;
use crate::error::{Failure, FailureKind};
use crate::extents::Extents;
use crate::proto::{Extent, ExtentKind, FileNo};
use crate::units::{GuestOffset, HostOffset};
use alloc::vec::Vec;

/// Most bytes of L2 tables that are read at once.
const BATCH: u64 = 1 << 20;
/// Most bytes of L2 tables that are looked at for one request.
const MAX_WALK: u64 = 16 << 20;
/// Most bytes of the L1 table that are read at once.
const L1_BATCH: u64 = 64 << 10;
/// Most extents that one cluster adds: its subclusters, one of them cut in two
/// where the file ends.
const MAX_PER_CLUSTER: usize = entry::SUBCLUSTERS as usize + 1;

impl Qcow2 {
    /// The extents of a guest range inside the disk, from its start on, without
    /// gaps. They may end before the range does: the caller asks again.
    pub fn extents(
        &mut self,
        host: &mut dyn Host,
        offset: u64,
        len: u64,
    ) -> Result<Vec<Extent>, Failure> {
        if self.header.encryption.is_some() {
            return Err(encrypted("read"));
        }
        if self.header.has_data_file() && self.data_len.is_none() {
            return Err(Failure::new(
                FailureKind::InvalidRequest,
                "the external data file is not open",
            ));
        }
        let end = offset.saturating_add(len);
        let mut extents = Extents::default();
        let mut at = offset;
        let mut walked = 0;
        while at < end && walked < MAX_WALK && !extents.is_full(MAX_PER_CLUSTER) {
            let batch_end = self.prefetch_l2(host, at, end)?;
            while at < batch_end && !extents.is_full(MAX_PER_CLUSTER) {
                at = self.map_slice(host, at, batch_end, &mut extents)?;
                walked += self.tables.slice_len();
            }
        }
        Ok(extents.list)
    }

    /// Reads the L2 slices that map `at` and what follows, at most [`BATCH`].
    /// Returns the guest offset up to which tables are at hand.
    pub(super) fn prefetch_l2(
        &mut self,
        host: &mut dyn Host,
        at: u64,
        end: u64,
    ) -> Result<u64, Failure> {
        let mut wanted = Vec::new();
        let mut cursor = at;
        while cursor < end && (wanted.len() as u64) * self.tables.slice_len() < BATCH {
            let location = self.header.geometry.locate(GuestOffset(cursor));
            self.prefetch_l1(host, location.l1_index, end)?;
            let empty_end = self.empty_l1_end(host, cursor, end)?;
            if empty_end > cursor {
                cursor = empty_end;
                continue;
            }
            match self.l1_entry(host, location.l1_index)?.table {
                Some(table) => {
                    wanted.push(self.l2_entry_place(table, location.l2_index));
                    cursor = self.slice_end(cursor, end);
                }
                None => cursor = self.table_end(cursor, end),
            }
        }
        self.tables.prefetch(host, Kind::L2, &wanted)?;
        Ok(cursor)
    }

    /// Reads the piece of the L1 table from `index` on, unless it is at hand.
    fn prefetch_l1(&mut self, host: &mut dyn Host, index: u64, end: u64) -> Result<(), Failure> {
        let last = self
            .header
            .geometry
            .l1_entries_for(end)
            .min(u64::from(self.header.l1.count));
        let start = self.header.l1.offset.plus(index * entry::LEN);
        if index >= last || self.tables.holds(start) {
            return Ok(());
        }
        let stop = (start.0 + L1_BATCH).min(self.header.l1.offset.plus(last * entry::LEN).0);
        let step = self.tables.slice_len();
        let wanted: Vec<HostOffset> = (self.tables.slice_start(start)..stop)
            .step_by(step as usize)
            .map(HostOffset)
            .collect();
        self.tables.prefetch(host, Kind::L1, &wanted)
    }

    /// Where the run of L1 entries that are zero ends, in guest bytes: `at` if
    /// its own entry is not zero. Looks no further than one slice.
    fn empty_l1_end(&mut self, host: &mut dyn Host, at: u64, end: u64) -> Result<u64, Failure> {
        let geometry = self.header.geometry;
        let first = geometry.locate(GuestOffset(at)).l1_index;
        if first >= u64::from(self.header.l1.count) {
            return Ok(end);
        }
        let place = self.header.l1.offset.plus(first * entry::LEN);
        let in_slice = (place.0 - self.tables.slice_start(place)) as usize;
        let slice = self.tables.slice(host, Kind::L1, place)?;
        let entries = slice.get(in_slice..).unwrap_or_default();
        let empty = entries
            .chunks_exact(entry::LEN as usize)
            .take_while(|raw| raw.iter().all(|&byte| byte == 0))
            .count() as u64;
        if empty == 0 {
            return Ok(at);
        }
        let stop = (first + empty).saturating_mul(geometry.l2_coverage());
        Ok(stop.min(end))
    }

    /// Where the guest range of one L2 slice ends.
    fn slice_end(&self, at: u64, end: u64) -> u64 {
        let entries = self.tables.slice_len() / self.header.geometry.l2_entry_len();
        next_multiple(at, entries << self.header.geometry.cluster_bits()).min(end)
    }

    /// Where the guest range of one L2 table ends.
    fn table_end(&self, at: u64, end: u64) -> u64 {
        next_multiple(at, self.header.geometry.l2_coverage()).min(end)
    }

    /// Maps what one L2 slice, or a run of L1 entries without a table, says
    /// about `at..end`. Returns how far it got.
    fn map_slice(
        &mut self,
        host: &mut dyn Host,
        at: u64,
        end: u64,
        extents: &mut Extents,
    ) -> Result<u64, Failure> {
        let empty_end = self.empty_l1_end(host, at, end)?;
        if empty_end > at {
            extents.push(at, empty_end - at, ExtentKind::Unallocated { at: None });
            return Ok(empty_end);
        }
        let location = self.header.geometry.locate(GuestOffset(at));
        let l1 = self.l1_entry(host, location.l1_index)?;
        let Some(table) = l1.table else {
            let stop = self.table_end(at, end);
            extents.push(at, stop - at, ExtentKind::Unallocated { at: None });
            return Ok(stop);
        };
        let stop = self.slice_end(at, end);
        let entries = self.l2_run(host, table, location.l2_index, at, stop)?;
        let mut cursor = at;
        for (index, raw) in (location.l2_index..).zip(entries) {
            if extents.is_full(MAX_PER_CLUSTER) {
                break;
            }
            let cluster = self.check_cluster(table, index, GuestOffset(cursor), raw)?;
            let next = next_multiple(cursor, self.header.geometry.cluster_size()).min(stop);
            self.push_cluster(extents, l1, cluster, cursor, next);
            cursor = next;
        }
        Ok(cursor)
    }

    /// The entries of one slice that map `at..stop`.
    fn l2_run(
        &mut self,
        host: &mut dyn Host,
        table: HostOffset,
        index: u64,
        at: u64,
        stop: u64,
    ) -> Result<Vec<L2Entry>, Failure> {
        let geometry = self.header.geometry;
        let place = self.l2_entry_place(table, index);
        let in_slice = place.0 - self.tables.slice_start(place);
        let bytes = self.tables.slice(host, Kind::L2, place)?;
        let count = (stop.div_ceil(geometry.cluster_size())) - at / geometry.cluster_size();
        let len = geometry.l2_entry_len();
        (0..count)
            .map(|nth| {
                let at = (in_slice + nth * len) as usize;
                let bitmap = if geometry.extended_l2() {
                    be64(bytes, at + entry::LEN as usize)?
                } else {
                    0
                };
                let entry = be64(bytes, at)?;
                Ok(L2Entry { entry, bitmap })
            })
            .collect()
    }

    /// Adds what a cluster holds of `from..to`, which lies inside it.
    fn push_cluster(
        &self,
        extents: &mut Extents,
        l1: L1Entry,
        cluster: Cluster,
        from: u64,
        to: u64,
    ) {
        let in_cluster = from & (self.header.geometry.cluster_size() - 1);
        let len = to - from;
        // Whoever keeps what an unknown feature holds has to be told of a write
        // first: a flush does that.
        let known = !self.has_unknown_features();
        let in_place = |copied| known && (self.header.has_data_file() || (l1.copied && copied));
        match cluster {
            Cluster::Unallocated => extents.push(from, len, ExtentKind::Unallocated { at: None }),
            Cluster::Compressed { .. } => extents.push(from, len, ExtentKind::Compressed),
            Cluster::Zero { host, .. } => {
                let at = host.map(|host| host.plus(in_cluster).0);
                extents.push(from, len, ExtentKind::Zero { at });
            }
            Cluster::Data { host, copied } => {
                self.push_data(extents, from, len, host.plus(in_cluster), in_place(copied));
            }
            Cluster::Subclusters {
                host,
                copied,
                alloc,
                zero,
            } => {
                let unit = self.header.geometry.subcluster_size();
                let mut at = from;
                while at < to {
                    let in_cluster = at & (self.header.geometry.cluster_size() - 1);
                    let next = next_multiple(at, unit).min(to);
                    let bit = 1u32 << ((in_cluster / unit) & 31);
                    let place = host.map(|host| host.plus(in_cluster));
                    match place {
                        Some(place) if alloc & bit != 0 => {
                            self.push_data(extents, at, next - at, place, in_place(copied));
                        }
                        _ if zero & bit != 0 => {
                            let at_host = place.map(|place| place.0);
                            extents.push(at, next - at, ExtentKind::Zero { at: at_host });
                        }
                        _ => {
                            let at_host = place.map(|place| place.0);
                            extents.push(at, next - at, ExtentKind::Unallocated { at: at_host });
                        }
                    }
                    at = next;
                }
            }
        }
    }

    /// Adds data. What lies past the end of its file reads as zeroes.
    fn push_data(
        &self,
        extents: &mut Extents,
        offset: u64,
        len: u64,
        at: HostOffset,
        in_place: bool,
    ) {
        let (file, file_len) = match self.data_len {
            Some(data_len) => (FileNo::DATA, data_len),
            None => (FileNo::IMAGE, self.file_len),
        };
        let inside = file_len.saturating_sub(at.0).min(len);
        extents.push(
            offset,
            inside,
            ExtentKind::Data {
                file,
                at: at.0,
                in_place,
            },
        );
        extents.push(
            offset + inside,
            len - inside,
            ExtentKind::Zero {
                at: Some(at.0 + inside),
            },
        );
    }
}

/// The smallest multiple of `unit`, a power of two, above `at`.
fn next_multiple(at: u64, unit: u64) -> u64 {
    (at | (unit - 1)).saturating_add(1)
}
