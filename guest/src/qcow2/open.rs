//! Opening: from the first bytes of the file to a checked [`Qcow2`].

use super::extensions::Extensions;
use super::format::{autoclear, entry};
use super::header::{self, Header, RawHeader};
use super::regions::{Owner, Regions};
use super::tables::Tables;
use super::write::Pending;
use super::{Qcow2, bitmaps, snapshots};
use crate::engine::{Host, Read};
use crate::error::Failure;
use crate::plan::SECTOR;
use crate::proto::FileNo;
use alloc::collections::BTreeMap;
use alloc::vec;
use alloc::vec::Vec;

impl Qcow2 {
    /// Opens an image from its first bytes (64 KiB, or the whole of a shorter
    /// file). More is read only where the header reaches further, or where
    /// there are snapshots or bitmaps.
    pub fn open(host: &mut dyn Host, head: &[u8], file_len: u64) -> Result<Self, Failure> {
        let raw = RawHeader::read(head)?;
        let header = read_header(host, &raw, head, file_len)?;
        let geometry = header.geometry;
        let (snapshots, snapshots_len) =
            snapshots::read(host, header.snapshots, geometry, file_len)?;
        let mut regions = Regions::default();
        regions.add(Owner::Header, 0, geometry.cluster_size())?;
        let mut add = |owner, start, len: u64| {
            let len = geometry.cluster_end(len).unwrap_or(len);
            regions.add(owner, start, len)
        };
        let l1_len = u64::from(header.l1.count) * entry::LEN;
        add(Owner::L1, header.l1.offset.0, l1_len)?;
        let refcount_table_len = u64::from(header.refcount_table.count) * geometry.cluster_size();
        let refcount_table = header.refcount_table.offset.0;
        add(Owner::RefcountTable, refcount_table, refcount_table_len)?;
        add(Owner::Snapshots, header.snapshots.offset.0, snapshots_len)?;
        let bitmaps = match header.extensions.bitmaps()? {
            Some(place) if header.autoclear & autoclear::BITMAPS != 0 => {
                let len = bitmaps::check_place(place, geometry, file_len)?;
                add(Owner::Bitmaps, place.directory.0, len)?;
                bitmaps::read(host, place, geometry, file_len, header.size)?
            }
            _ => Vec::new(),
        };
        if let Some(place) = header.extensions.crypto()? {
            add(Owner::Crypto, place.offset.0, place.len)?;
        }
        let mut first_sector: Vec<u8> = head.iter().take(SECTOR as usize).copied().collect();
        first_sector.resize(SECTOR as usize, 0);
        Ok(Self {
            tables: Tables::new(geometry.slice_len(), file_len),
            header,
            file_len,
            data_len: None,
            regions,
            snapshots,
            bitmaps,
            owners: BTreeMap::new(),
            first_sector,
            pending: Pending::default(),
        })
    }
}

fn read_header(
    host: &mut dyn Host,
    raw: &RawHeader,
    head: &[u8],
    file_len: u64,
) -> Result<Header, Failure> {
    header::check_version(raw)?;
    let geometry = header::check_geometry(raw)?;
    let needed = Extensions::area_len(head, raw, geometry).min(file_len) as usize;
    if needed <= head.len() {
        return Header::validate(raw, head, file_len);
    }
    let mut cluster = vec![0; needed];
    host.read(&mut [Read {
        file: FileNo::IMAGE,
        offset: 0,
        buf: &mut cluster,
    }])?;
    Header::validate(raw, &cluster, file_len)
}
