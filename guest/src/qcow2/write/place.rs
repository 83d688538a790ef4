//! Places for a guest range.

use super::super::Qcow2;
use super::super::entry::{Cluster, L2Entry};
use super::super::format::{entry, refcount};
use super::super::layout::Run;
use super::super::tables::Kind;
use super::{MAX_CHANGED, MAX_DIRTY, RELEASE_WEIGHT, flush_first};
use crate::engine::Host;
use crate::error::{Failure, FailureKind};
use crate::proto::{Content, FileNo, Place, Reply};
use crate::units::{GuestOffset, HostOffset};
use alloc::format;
use alloc::vec::Vec;
use core::ops::Range;

/// All subclusters of a cluster; without extended L2, the cluster itself.
const ALL: u32 = u32::MAX;
/// Most clusters of one request, unless one L2 table has more entries.
const MAX_CLUSTERS: u64 = 32 << 10;

/// What a cluster needs so that a part of it can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Need {
    /// Nothing: the part may be overwritten where it is.
    Nothing { host: HostOffset },
    /// Its host cluster stays and its entry changes.
    Entry {
        host: HostOffset,
        alloc: u32,
        zero: u32,
        /// Subclusters that held data before.
        before: u32,
    },
    /// A new host cluster.
    Cluster {
        alloc: u32,
        zero: u32,
        released: Option<Run>,
    },
    /// That the whole cluster is written.
    Whole,
}

/// A cluster of the range.
#[derive(Clone, Copy, Debug)]
struct Item {
    /// Guest offset of the cluster.
    start: u64,
    /// The part that is asked for.
    from: u64,
    to: u64,
    need: Need,
}

impl Qcow2 {
    /// Places for a guest range inside the disk. The mapping changes in the
    /// session at once.
    pub fn place_range(
        &mut self,
        host: &mut dyn Host,
        offset: u64,
        len: u64,
    ) -> Result<Reply, Failure> {
        self.tables.keep();
        self.pending.undo = None;
        self.check_allocation(offset, len)?;
        let items = self.survey(host, offset..offset + len)?;
        if let Some(wider) = self.wider(&items) {
            return Ok(wider);
        }
        self.begin();
        self.place(host, &items)
            .map(Reply::Placed)
            .inspect_err(|_| self.roll_back())
    }

    fn check_allocation(&self, offset: u64, len: u64) -> Result<(), Failure> {
        if let Some(failure) = self.no_write() {
            return Err(failure);
        }
        let geometry = self.header.geometry;
        let unit = geometry.subcluster_size();
        let end = offset + len;
        if !offset.is_multiple_of(unit) || !(end.is_multiple_of(unit) || end == self.header.size) {
            return Err(Failure::new(
                FailureKind::InvalidRequest,
                format!("{len} bytes at {offset:#x} are not whole units of {unit} bytes"),
            ));
        }
        let most = MAX_CLUSTERS.max(geometry.l2_entries()) * geometry.cluster_size();
        if len > most {
            return Err(Failure::new(
                FailureKind::InvalidRequest,
                format!("{len} bytes are too many to place at once, at most {most}"),
            ));
        }
        let changed = self.tables.changed_len() + self.pending.released_weight;
        if changed > MAX_CHANGED || self.tables.dirty_len() > MAX_DIRTY {
            return Err(flush_first());
        }
        Ok(())
    }

    /// What each cluster of a range needs.
    fn survey(&mut self, host: &mut dyn Host, range: Range<u64>) -> Result<Vec<Item>, Failure> {
        let geometry = self.header.geometry;
        let mut items = Vec::new();
        let mut at = range.start;
        let mut at_hand = at;
        while at < range.end {
            if at >= at_hand {
                at_hand = self.prefetch_l2(host, at, range.end)?;
            }
            let start = geometry.cluster_start(at);
            let to = range.end.min(start + geometry.cluster_size());
            let cluster = self.cluster(host, GuestOffset(start))?;
            let index = geometry.locate(GuestOffset(start)).l1_index;
            let own_table = self.l1_entry(host, index)?.copied;
            items.push(Item {
                start,
                from: at,
                to,
                need: self.need(cluster, own_table, start, at..to),
            });
            at = to;
        }
        Ok(items)
    }

    /// What a cluster at guest offset `start` needs so that `range` can be
    /// written. Where its table is shared, so is its host cluster, whatever the
    /// entry says.
    fn need(&self, cluster: Cluster, own_table: bool, start: u64, range: Range<u64>) -> Need {
        let geometry = self.header.geometry;
        let want = self.subclusters(start, range.start, range.end);
        let inside = self.subclusters(start, start, self.header.size);
        let run = |at: HostOffset, len: u64| {
            let first = at.0 / geometry.cluster_size();
            Run {
                first,
                count: geometry.clusters(at.0 + len) - first,
            }
        };
        let (host, copied, alloc, zero) = match cluster {
            Cluster::Unallocated => (None, false, 0, 0),
            Cluster::Zero { host, copied } => (host, copied, 0, ALL),
            Cluster::Data { host, copied } => (Some(host), copied, ALL, 0),
            Cluster::Subclusters {
                host,
                copied,
                alloc,
                zero,
            } => (host, copied, alloc, zero),
            Cluster::Compressed { .. } if want & inside != inside => return Need::Whole,
            Cluster::Compressed { host, len } => {
                return Need::Cluster {
                    alloc: want,
                    zero: 0,
                    released: Some(run(host, len)),
                };
            }
        };
        let own = match host {
            _ if self.header.has_data_file() => Some(HostOffset(start)),
            Some(host) if copied && own_table => Some(host),
            _ => None,
        };
        match own {
            Some(host) if alloc & want == want => Need::Nothing { host },
            Some(host) => Need::Entry {
                host,
                alloc: alloc | want,
                zero: zero & !want,
                before: alloc,
            },
            None if alloc & inside & !want != 0 => Need::Whole,
            None => Need::Cluster {
                alloc: want,
                zero: zero & !want,
                released: host.map(|host| run(host, geometry.cluster_size())),
            },
        }
    }

    /// The subclusters of the cluster at `start` that a range touches.
    fn subclusters(&self, start: u64, from: u64, to: u64) -> u32 {
        let geometry = self.header.geometry;
        if !geometry.extended_l2() {
            return ALL;
        }
        let size = geometry.subcluster_size();
        let first = (from - start) / size;
        let end = (to - start).div_ceil(size).min(entry::SUBCLUSTERS);
        let below = |count: u64| ((1u64 << count) - 1) as u32;
        below(end) & !below(first)
    }

    /// The range to ask for instead, if a cluster has to be written as a whole.
    fn wider(&self, items: &[Item]) -> Option<Reply> {
        items.iter().find(|item| item.need == Need::Whole)?;
        let (first, last) = (items.first()?, items.last()?);
        let end = last.start + self.header.geometry.cluster_size();
        Some(Reply::Wider {
            offset: first.start,
            len: end.min(self.header.size) - first.start,
        })
    }

    fn place(&mut self, host: &mut dyn Host, items: &[Item]) -> Result<Vec<Place>, Failure> {
        self.pending.wanted = self.most_clusters(items);
        self.make_tables_writable(host, items)?;
        let needs_cluster = |item: &&Item| matches!(item.need, Need::Cluster { .. });
        let count = items.iter().filter(needs_cluster).count() as u64;
        let runs = self.take_clusters(host, count)?;
        let mut clusters = runs.iter().flat_map(|run| run.first..run.end());
        let mut places = Places::default();
        for item in items {
            match item.need {
                Need::Nothing { host: at } => {
                    places.add(item, self.data_no(), at, Content::Current)
                }
                Need::Entry {
                    host: at,
                    alloc,
                    zero,
                    before,
                } => {
                    self.set_entry(host, item.start, at, alloc, zero)?;
                    self.place_entry(&mut places, item, at, before);
                }
                Need::Cluster {
                    alloc,
                    zero,
                    released,
                } => {
                    let cluster = clusters.next().ok_or_else(out_of_step)?;
                    let at = HostOffset(self.header.geometry.host_offset(cluster));
                    self.set_entry(host, item.start, at, alloc, zero)?;
                    if let Some(run) = released {
                        self.release_later(host, run)?;
                    }
                    let content = match self.space(host)?.reads_zero(cluster) {
                        true => Content::Zero,
                        false => Content::Stale,
                    };
                    places.add(item, FileNo::IMAGE, at, content);
                }
                Need::Whole => return Err(out_of_step()),
            }
        }
        self.extend_files(&places.list);
        Ok(places.list)
    }

    /// The most clusters that places for the items take: one for each, and one
    /// for each table that maps them.
    fn most_clusters(&self, items: &[Item]) -> u64 {
        let index = |item: &Item| {
            let start = GuestOffset(item.start);
            self.header.geometry.locate(start).l1_index
        };
        let tables = match (items.first(), items.last()) {
            (Some(first), Some(last)) => index(last) - index(first) + 1,
            _ => 0,
        };
        items.len() as u64 + tables
    }

    fn data_no(&self) -> FileNo {
        match self.header.has_data_file() {
            true => FileNo::DATA,
            false => FileNo::IMAGE,
        }
    }

    /// Places in a host cluster that stays: what held data is current, the rest
    /// has no meaning.
    fn place_entry(&self, places: &mut Places, item: &Item, at: HostOffset, before: u32) {
        let file = self.data_no();
        let data_len = self.data_len.unwrap_or(u64::MAX);
        let size = self.header.geometry.subcluster_size();
        let mut from = item.from;
        while from < item.to {
            let to = item.to.min(from + size);
            let part = Item { from, to, ..*item };
            let bit = ((from - item.start) / size) as u32;
            let content = match before & 1u32.checked_shl(bit).unwrap_or(0) {
                0 if from >= data_len => Content::Zero,
                0 => Content::Stale,
                _ => Content::Current,
            };
            places.add(&part, file, at, content);
            from = to;
        }
    }

    /// From now on the files reach to the end of every place.
    fn extend_files(&mut self, places: &[Place]) {
        for place in places {
            let end = place.at + place.len;
            match place.file {
                FileNo::DATA => self.data_len = self.data_len.map(|len| len.max(end)),
                _ => self.set_file_len(self.file_len.max(end)),
            }
        }
    }

    fn set_entry(
        &mut self,
        host: &mut dyn Host,
        start: u64,
        at: HostOffset,
        alloc: u32,
        zero: u32,
    ) -> Result<(), Failure> {
        let geometry = self.header.geometry;
        let location = geometry.locate(GuestOffset(start));
        let table = self.l1_entry(host, location.l1_index)?.table;
        let bitmap = match geometry.extended_l2() {
            true => u64::from(zero) << 32 | u64::from(alloc),
            false => 0,
        };
        let raw = L2Entry {
            entry: at.0 | entry::COPIED,
            bitmap,
        };
        let table = table.ok_or_else(out_of_step)?;
        self.set_l2_entry(host, table, location.l2_index, raw)
    }

    /// Sees to it that every L2 table in which an entry changes is there and
    /// belongs to the active disk alone.
    fn make_tables_writable(&mut self, host: &mut dyn Host, items: &[Item]) -> Result<(), Failure> {
        let geometry = self.header.geometry;
        let mut done = None;
        for item in items {
            let index = geometry.locate(GuestOffset(item.start)).l1_index;
            if done != Some(index) && !matches!(item.need, Need::Nothing { .. }) {
                self.make_table_writable(host, index)?;
                done = Some(index);
            }
        }
        Ok(())
    }

    /// Notes clusters that will be counted down. Damaged counts are found here,
    /// while the allocation can still be refused.
    pub(super) fn release_later(&mut self, host: &mut dyn Host, run: Run) -> Result<(), Failure> {
        for cluster in run.first..run.end() {
            self.refcounts().check_counted(host, cluster)?;
        }
        let pending = &mut self.pending;
        let older = pending.undo.as_ref().map_or(0, |undo| undo.released);
        let own = pending.released.get_mut(older..).unwrap_or_default();
        pending.released_weight += run.count * refcount::ENTRY_LEN;
        match own.last_mut().filter(|last| last.end() == run.first) {
            Some(last) => last.count += run.count,
            None => {
                pending.released.push(run);
                pending.released_weight += RELEASE_WEIGHT;
            }
        }
        Ok(())
    }

    fn make_table_writable(&mut self, host: &mut dyn Host, index: u64) -> Result<(), Failure> {
        let geometry = self.header.geometry;
        let present = self.l1_entry(host, index)?;
        if present.table.is_some() && present.copied {
            return Ok(());
        }
        let runs = self.take_clusters(host, 1)?;
        let run = runs.first().ok_or_else(out_of_step)?;
        let table = HostOffset(geometry.host_offset(run.first));
        let len = geometry.cluster_size();
        self.tables.insert_zeroed(Kind::L2, table, len);
        if let Some(old) = present.table {
            self.copy_table(host, Kind::L2, old, table, len)?;
            let run = Run {
                first: old.0 / len,
                count: 1,
            };
            self.release_later(host, run)?;
            self.owners.remove(&old);
        }
        self.owners.remove(&table);
        self.pending.fresh_tables.push(table);
        self.set_l1_entry(host, index, table.0 | entry::COPIED)
    }
}

/// Places under construction: neighbours become one.
#[derive(Default)]
struct Places {
    list: Vec<Place>,
}

impl Places {
    /// Adds the part of a cluster that is asked for, whose cluster is at `host`.
    fn add(&mut self, item: &Item, file: FileNo, host: HostOffset, content: Content) {
        let place = Place {
            offset: item.from,
            len: item.to - item.from,
            file,
            at: host.0 + (item.from - item.start),
            content,
        };
        let touches = |last: &&mut Place| {
            last.offset + last.len == place.offset
                && last.at + last.len == place.at
                && (last.file, last.content) == (place.file, place.content)
        };
        match self.list.last_mut().filter(touches) {
            Some(last) => last.len += place.len,
            None => self.list.push(place),
        }
    }
}

fn out_of_step() -> Failure {
    Failure::new(
        FailureKind::Internal,
        "an allocation does not find what it has prepared",
    )
}
