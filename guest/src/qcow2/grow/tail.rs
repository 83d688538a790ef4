//! The last cluster, where the old end of the disk cuts it: what lies behind
//! the end must read as zeroes before the disk reaches that far.

use super::super::Qcow2;
use super::super::entry::Cluster;
use super::super::layout::Run;
use super::survey::{Content, Survey};
use crate::bytes;
use crate::engine::{Host, Read};
use crate::error::{Failure, FailureKind};
use crate::proto::FileNo;
use crate::resize::Wish;
use crate::units::{GuestOffset, HostOffset};
use alloc::vec;
use alloc::vec::Vec;

/// What happens to the last cluster, which ends beyond the old end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tail {
    /// Its rest reads as zeroes already.
    Fine,
    /// Its rest is zeroed where it is, which nobody can see.
    Zero {
        /// The file.
        file: FileNo,
        /// Host offset of the rest.
        at: u64,
        /// Length of the rest inside the file.
        len: u64,
    },
    /// It goes to a new cluster, without its rest.
    Move {
        /// What is kept of it.
        kept: Kept,
        /// The new entry's subcluster bits; 0 without extended L2.
        bitmap: u64,
    },
}

/// The bytes of a last cluster up to the old end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kept {
    /// In the image file.
    At {
        /// Host offset.
        from: u64,
        /// Length.
        len: u64,
    },
    /// Unpacked from a compressed cluster.
    Bytes(Vec<u8>),
}

impl Survey {
    /// Judges the last cluster, where the old end cuts it.
    pub(super) fn judge_tail(
        &mut self,
        image: &mut Qcow2,
        host: &mut dyn Host,
        wish: &Wish,
    ) -> Result<(), Failure> {
        let geometry = image.header.geometry;
        let size = image.header.size;
        if geometry.is_aligned(size) {
            return Ok(());
        }
        let start = geometry.cluster_start(size);
        let shows_backing = wish.backing_size.is_some_and(|len| len > size);
        match image.cluster(host, GuestOffset(start))? {
            Cluster::Unallocated if shows_backing => self.hide_backing(image, 0, 0),
            Cluster::Unallocated | Cluster::Zero { host: None, .. } => {
                if self.content == Content::Data && wish.backing_size.is_none_or(|len| len <= start)
                {
                    self.fill.start = self.kept - 1;
                }
                Ok(())
            }
            Cluster::Zero { .. } => Ok(()),
            Cluster::Compressed { host: at, len } => {
                let content = image.inflated(host, start, geometry.cluster_size())?;
                self.tail = self.unpacked_tail(image, content)?;
                if self.tail != Tail::Fine {
                    let first = at.0 / geometry.cluster_size();
                    let end = geometry.clusters(at.0.saturating_add(len));
                    self.released.push(Run {
                        first,
                        count: end - first,
                    });
                }
                Ok(())
            }
            Cluster::Data { host: at, copied } => {
                self.judge_data_tail(image, host, at, copied, u64::from(u32::MAX))
            }
            Cluster::Subclusters {
                host: at,
                copied,
                alloc,
                zero,
            } => {
                let bitmap = u64::from(zero) << 32 | u64::from(alloc);
                if let Some(at) = at {
                    self.judge_data_tail(image, host, at, copied, bitmap)?;
                }
                if shows_backing {
                    self.hide_backing(image, alloc, zero)?;
                }
                Ok(())
            }
        }
    }

    /// A last cluster with data at `at`; `bitmap` are its subcluster bits.
    fn judge_data_tail(
        &mut self,
        image: &Qcow2,
        host: &mut dyn Host,
        at: HostOffset,
        copied: bool,
        bitmap: u64,
    ) -> Result<(), Failure> {
        let geometry = image.header.geometry;
        let kept_len = image.header.size - geometry.cluster_start(image.header.size);
        let rest = at.0 + kept_len;
        let (file, file_len) = match image.data_len {
            Some(len) => (FileNo::DATA, len),
            None => (FileNo::IMAGE, image.file_len),
        };
        let len = file_len
            .saturating_sub(rest)
            .min(geometry.cluster_size() - kept_len);
        if len == 0 {
            return Ok(());
        }
        if image.header.encryption.is_some() {
            return Err(Failure::new(
                FailureKind::Unsupported,
                "the image is encrypted and its last cluster is partly used: zeroing the rest takes \
                 the key; use `qemu-img resize`",
            ));
        }
        let own_table = self.boundary.as_ref().is_some_and(|table| table.copied);
        let in_place = (copied && own_table) || file == FileNo::DATA;
        if in_place {
            self.tail = Tail::Zero {
                file,
                at: rest,
                len,
            };
            return Ok(());
        }
        let mut buf = vec![0; len as usize];
        host.read(&mut [Read {
            file,
            offset: rest,
            buf: &mut buf,
        }])?;
        if buf.iter().all(|&byte| byte == 0) {
            return Ok(());
        }
        self.released.push(Run {
            first: at.0 / geometry.cluster_size(),
            count: 1,
        });
        self.tail = Tail::Move {
            kept: Kept::At {
                from: at.0,
                len: kept_len,
            },
            bitmap: if geometry.extended_l2() { bitmap } else { 0 },
        };
        Ok(())
    }

    fn unpacked_tail(&self, image: &Qcow2, mut content: Vec<u8>) -> Result<Tail, Failure> {
        let geometry = image.header.geometry;
        let kept_len = image.header.size - geometry.cluster_start(image.header.size);
        let rest = bytes::slice(
            &content,
            kept_len as usize,
            content.len() - kept_len as usize,
        )?;
        if rest.iter().all(|&byte| byte == 0) {
            return Ok(Tail::Fine);
        }
        content.truncate(kept_len as usize);
        Ok(Tail::Move {
            kept: Kept::Bytes(content),
            bitmap: if geometry.extended_l2() {
                u64::from(u32::MAX)
            } else {
                0
            },
        })
    }

    /// Marks the subclusters behind the old end that would show a longer
    /// backing image. One that the old end cuts must hold its own data.
    fn hide_backing(&mut self, image: &Qcow2, alloc: u32, zero: u32) -> Result<(), Failure> {
        let geometry = image.header.geometry;
        if !geometry.extended_l2() || self.boundary.is_none() {
            return Err(partial_over_backing());
        }
        let kept_len = image.header.size - geometry.cluster_start(image.header.size);
        let first = kept_len.div_ceil(geometry.subcluster_size());
        let cut = kept_len / geometry.subcluster_size();
        let own = alloc | zero;
        if cut != first && own & 1u32.checked_shl(cut as u32).unwrap_or(0) == 0 {
            return Err(partial_over_backing());
        }
        let behind = u32::MAX.checked_shl(first as u32).unwrap_or(0);
        self.tail_zero_bits = u64::from(behind & !own) << 32;
        Ok(())
    }
}

fn partial_over_backing() -> Failure {
    Failure::new(
        FailureKind::OwnUnitFirst,
        "the disk ends inside a cluster that only the backing image holds, and the backing image \
         goes on behind it: write to the disk's last sector first",
    )
}
