//! What the image holds around its new end, and what has to become of it.
//!
//! Two things could show again when the disk grows later: entries beyond the
//! new end in the L2 table across it, and the rest of a last cluster that the
//! new end cuts. Reads, and decides nothing about places.

use super::super::Qcow2;
use super::super::entry::Cluster;
use super::super::layout::Run;
use super::super::refcount::Refcounts;
use crate::bytes;
use crate::engine::{Host, Read};
use crate::error::Failure;
use crate::proto::FileNo;
use crate::units::{GuestOffset, HostOffset};
use alloc::vec;
use alloc::vec::Vec;

/// The L2 table across the new end, where it has to change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Boundary {
    /// Its L1 entry, the last that is kept.
    pub index: u64,
    /// Where it is.
    pub table: HostOffset,
    /// Its content.
    pub old: Vec<u8>,
    /// The entries that are kept, and zeroes.
    pub new: Vec<u8>,
    /// Whether nothing else refers to it.
    pub own: bool,
}

/// The last cluster, where the new end cuts it and its rest is not zeroes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tail {
    /// Where it is.
    pub held: Run,
    /// The bytes that are kept.
    pub kept: Kept,
    /// Place of its entry in the boundary table.
    pub place: u64,
    /// Whether nothing else refers to it, so that its rest can be zeroed where
    /// it is once nobody sees it.
    pub own: bool,
}

/// The bytes of a last cluster up to the new end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kept {
    /// In the image file, with the length of what is zeroed behind them.
    At {
        /// Host offset.
        from: u64,
        /// Length.
        len: u64,
        /// Length of the rest inside the file.
        rest: u64,
    },
    /// Unpacked from a compressed cluster.
    Bytes(Vec<u8>),
}

/// What was found.
#[derive(Clone, Debug)]
pub struct Survey {
    /// The new size in bytes.
    pub size: u64,
    /// Clusters that hold a byte of the new disk.
    pub kept: u64,
    /// L1 entries that the new disk needs.
    pub l1_kept: u64,
    /// The table across the new end.
    pub boundary: Option<Boundary>,
    /// The last cluster. Where there is one, there is a boundary.
    pub tail: Option<Tail>,
}

/// Looks at the new end of the image.
pub fn survey(
    image: &mut Qcow2,
    host: &mut dyn Host,
    refcounts: &mut Refcounts<'_>,
    size: u64,
) -> Result<Survey, Failure> {
    let geometry = image.header.geometry;
    let mut survey = Survey {
        size,
        kept: geometry.clusters(size),
        l1_kept: geometry.l1_entries_for(size),
        boundary: None,
        tail: None,
    };
    if let Some(index) = survey.l1_kept.checked_sub(1) {
        survey.read_boundary(image, host, refcounts, index)?;
    }
    Ok(survey)
}

impl Survey {
    /// Reads the table across the new end and keeps it if it has to change.
    fn read_boundary(
        &mut self,
        image: &mut Qcow2,
        host: &mut dyn Host,
        refcounts: &mut Refcounts<'_>,
        index: u64,
    ) -> Result<(), Failure> {
        let geometry = image.header.geometry;
        let kept = self.kept - index * geometry.l2_entries();
        let cuts = !geometry.is_aligned(self.size);
        if kept == geometry.l2_entries() && !cuts {
            return Ok(());
        }
        let Some(table) = image.l1_entry(host, index)?.table else {
            return Ok(());
        };
        let tables = image.whole_tables(host, &[table])?;
        let Some(old) = tables.into_iter().next() else {
            return Ok(());
        };
        let mut new = old.clone();
        let beyond = (kept * geometry.l2_entry_len()) as usize;
        if let Some(beyond) = new.get_mut(beyond..) {
            beyond.fill(0);
        }
        if cuts && !image.header.has_data_file() {
            self.tail = self.read_tail(image, host, refcounts, kept - 1)?;
        }
        if new == old && self.tail.is_none() {
            return Ok(());
        }
        let own = refcounts.count(host, table.0 / geometry.cluster_size())? == 1;
        if !own {
            image.clear_stale_copied(host, refcounts, &mut new, kept)?;
        }
        // A last cluster that goes back alone would change a table in use.
        if let Some(tail) = &mut self.tail {
            tail.own &= own;
        }
        self.boundary = Some(Boundary {
            index,
            table,
            old,
            new,
            own,
        });
        Ok(())
    }

    fn read_tail(
        &self,
        image: &mut Qcow2,
        host: &mut dyn Host,
        refcounts: &mut Refcounts<'_>,
        place: u64,
    ) -> Result<Option<Tail>, Failure> {
        let geometry = image.header.geometry;
        let start = geometry.cluster_start(self.size);
        let cluster = image.cluster(host, GuestOffset(start))?;
        let kept = match cluster {
            Cluster::Unallocated | Cluster::Zero { .. } => None,
            Cluster::Compressed { .. } => {
                let content = image.inflated(host, start, geometry.cluster_size())?;
                unpacked(content, (self.size - start) as usize)?
            }
            Cluster::Data { host: at, .. } => stored(image, host, at, self.size - start)?,
            Cluster::Subclusters { host: at, .. } => match at {
                Some(at) => stored(image, host, at, self.size - start)?,
                None => None,
            },
        };
        let (Some(kept), Some((at, len))) = (kept, cluster.host_range(geometry)) else {
            return Ok(None);
        };
        let first = at.0 / geometry.cluster_size();
        let packed = matches!(cluster, Cluster::Compressed { .. });
        Ok(Some(Tail {
            held: Run {
                first,
                count: geometry.clusters(at.0.saturating_add(len)) - first,
            },
            kept,
            place,
            own: !packed && refcounts.count(host, first)? == 1,
        }))
    }
}

/// What is kept of an unpacked cluster, where the rest is not zeroes.
fn unpacked(mut content: Vec<u8>, len: usize) -> Result<Option<Kept>, Failure> {
    let rest = bytes::slice(&content, len, content.len().saturating_sub(len))?;
    if rest.iter().all(|&byte| byte == 0) {
        return Ok(None);
    }
    content.truncate(len);
    Ok(Some(Kept::Bytes(content)))
}

/// What is kept of a cluster at `at`, where the rest is not zeroes.
fn stored(
    image: &Qcow2,
    host: &mut dyn Host,
    at: HostOffset,
    len: u64,
) -> Result<Option<Kept>, Failure> {
    let behind = image.file_len.saturating_sub(at.0 + len);
    let rest = behind.min(image.header.geometry.cluster_size() - len);
    let mut buf = vec![0; rest as usize];
    if rest > 0 {
        host.read(&mut [Read {
            file: FileNo::IMAGE,
            offset: at.0 + len,
            buf: &mut buf,
        }])?;
    }
    let stale = buf.iter().any(|&byte| byte != 0);
    Ok(stale.then_some(Kept::At {
        from: at.0,
        len,
        rest,
    }))
}
