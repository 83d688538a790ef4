//! What the header leads to besides the guest's data: counted like everything
//! else.

use super::super::format::entry;
use super::super::regions::Owner;
use super::Check;
use crate::bytes;
use crate::engine::Read;
use crate::error::{Failure, FailureKind};
use crate::proto::FileNo;
use crate::units::HostOffset;
use alloc::format;
use alloc::vec;

/// Bytes of a bitmap table that are read at once.
const PIECE: u64 = 256 << 10;

impl Check<'_> {
    /// Entries of the snapshot table that lack what version 3 wants.
    pub(super) fn check_snapshot_table(&mut self) -> Result<(), Failure> {
        if self.image.header.version < 3 {
            return Ok(());
        }
        for (at, snapshot) in self.image.snapshots.iter().enumerate() {
            if snapshot.disk_size.is_none() {
                self.corrupt(1, || {
                    format!("ERROR snapshot table entry {at} is incomplete")
                })?;
            }
        }
        Ok(())
    }

    /// The snapshot table, the refcount table, the encryption header, bitmaps.
    pub(super) fn count_places(&mut self) -> Result<(), Failure> {
        let image = self.image;
        for owner in [Owner::Snapshots, Owner::RefcountTable] {
            let counted = owner != Owner::RefcountTable || !self.without_blocks;
            if let Some((at, len)) = image.regions.of(owner).filter(|_| counted) {
                self.refer(at, len, 1)?;
            }
        }
        if let Some(place) = image.header.extensions.crypto()? {
            self.refer(place.offset.0, place.len, 1)?;
        }
        if let Some((at, len)) = image.regions.of(Owner::Bitmaps) {
            self.refer(at, len, 1)?;
        }
        for bitmap in &image.bitmaps {
            let len = u64::from(bitmap.table.count) * entry::LEN;
            self.refer(bitmap.table.offset.0, len, 1)?;
            self.count_bitmap(bitmap.table.offset, len, &bitmap.name)?;
        }
        Ok(())
    }

    /// The clusters that hold a bitmap.
    fn count_bitmap(&mut self, table: HostOffset, len: u64, name: &str) -> Result<(), Failure> {
        let mut done = 0;
        while done < len {
            let mut piece = vec![0; (len - done).min(PIECE) as usize];
            self.host.read(&mut [Read {
                file: FileNo::IMAGE,
                offset: table.plus(done).0,
                buf: &mut piece,
            }])?;
            done += piece.len() as u64;
            for raw in piece.chunks_exact(entry::LEN as usize) {
                let raw = bytes::be64(raw, 0)?;
                let offset = raw & entry::OFFSET;
                let flags = raw & !entry::OFFSET;
                let sound = match offset {
                    0 => flags <= 1,
                    _ => flags == 0 && offset & (self.shape.cluster - 1) == 0,
                };
                if !sound {
                    return Err(Self::broken_bitmap(name, raw));
                }
                if offset != 0 {
                    self.refer(offset, self.shape.cluster, 1)?;
                }
            }
        }
        Ok(())
    }

    /// A table that cannot be read as one ends the check, as it does in QEMU:
    /// what its clusters are is not known.
    fn broken_bitmap(name: &str, raw: u64) -> Failure {
        Failure::new(
            FailureKind::Damaged,
            format!(
                "Check failed: the table of bitmap '{name}' has an invalid entry ({raw:#x}); \
                 remove the bitmap with `qemu-img bitmap --remove`"
            ),
        )
    }
}
