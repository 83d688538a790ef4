//! Looks behind the end of a qcow2 disk, where no reader does: what lies there
//! would come to light with a larger size. From the specification alone.

use super::super::bytes::Bytes;
use super::super::disk::Files;
use super::hold;

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
/// The header extension that leads to bitmaps.
const BITMAPS: u64 = 0x2385_2875;

/// Fails where anything is left behind the end: entries, bytes of the last
/// cluster, bits of bitmaps.
pub fn nothing_beyond(files: &Files, image: &str) -> Result<(), String> {
    let file = files.get(image)?;
    let incompatible = match file.big::<4>(4) {
        2 => 0,
        _ => file.big::<8>(72),
    };
    let extended = incompatible & 16 != 0;
    let disk = Disk {
        file,
        data: match incompatible & 4 {
            0 => file,
            _ => files.get("data.raw")?,
        },
        size: file.big::<8>(24),
        cluster: 1 << file.big::<4>(20),
        entry_len: if extended { 16 } else { 8 },
    };
    disk.check_tables()?;
    disk.check_bitmaps()
}

struct Disk<'a> {
    file: &'a Bytes,
    data: &'a Bytes,
    size: u64,
    cluster: u64,
    entry_len: u64,
}

impl Disk<'_> {
    fn check_tables(&self) -> Result<(), String> {
        let per_table = self.cluster / self.entry_len;
        let kept = self.size.div_ceil(self.cluster);
        for index in 0..self.file.big::<4>(36) {
            let table = self.file.big::<8>(self.file.big::<8>(40) + 8 * index) & OFFSET;
            if table == 0 {
                continue;
            }
            let first = index * per_table;
            hold(first < kept, || {
                format!("L1 entry {index} is left behind the end")
            })?;
            for place in 0..per_table {
                let at = table + place * self.entry_len;
                let entry = self.file.read(at, self.entry_len);
                if first + place >= kept {
                    hold(entry.iter().all(|&byte| byte == 0), || {
                        format!("an L2 entry at {at:#x} is left behind the end")
                    })?;
                } else if first + place + 1 == kept {
                    self.check_last(at)?;
                }
            }
        }
        Ok(())
    }

    /// The rest of the cluster that the end cuts. A compressed one is not
    /// unpacked here.
    fn check_last(&self, entry_at: u64) -> Result<(), String> {
        let (entry, inside) = (self.file.big::<8>(entry_at), self.size % self.cluster);
        let at = entry & OFFSET;
        let flat = self.entry_len == 8;
        let none = at == 0 || entry & COMPRESSED != 0 || (flat && entry & ZERO != 0);
        if inside == 0 || none {
            return Ok(());
        }
        let allocated = match flat {
            true => u64::MAX,
            false => self.file.big::<8>(entry_at + 8),
        };
        let part = self.cluster / 32;
        let shows = |byte: u64| allocated >> (byte / part) & 1 != 0;
        let rest = self.data.read(at + inside, self.cluster - inside);
        let left = (inside..)
            .zip(rest)
            .find(|&(byte, value)| value != 0 && shows(byte));
        hold(left.is_none(), || {
            format!("the last cluster, at {at:#x}, has bytes behind the end")
        })
    }

    fn check_bitmaps(&self) -> Result<(), String> {
        let Some(mut at) = self.directory() else {
            return Ok(());
        };
        let end = at + self.file.big::<8>(self.extension() + 8);
        while at < end {
            let table = self.file.big::<8>(at);
            let granularity = self.file.big::<1>(at + 17);
            let bits = self.size.div_ceil(1 << granularity);
            let entries = bits.div_ceil(8 * self.cluster);
            let last = self.file.big::<8>(table + 8 * entries.saturating_sub(1)) & OFFSET;
            let kept = bits - entries.saturating_sub(1) * 8 * self.cluster;
            if entries > 0 && last != 0 {
                let set = |bit: u64| self.file.big::<1>(last + bit / 8) >> (bit % 8) & 1 != 0;
                let left = (kept..8 * self.cluster).find(|&bit| set(bit));
                hold(left.is_none(), || {
                    format!("bits of the bitmap at {at:#x} are left behind the end")
                })?;
            }
            let len = 24 + self.file.big::<4>(at + 20) + self.file.big::<2>(at + 18);
            at += len.next_multiple_of(8);
        }
        Ok(())
    }

    /// Where the bitmap directory is, of bitmaps that are in order.
    fn directory(&self) -> Option<u64> {
        let used = self.file.big::<4>(4) > 2 && self.file.big::<8>(88) & 1 != 0;
        let at = Some(self.extension()).filter(|&at| used && at != 0)?;
        Some(self.file.big::<8>(at + 16))
    }

    /// Where the data of the extension is that leads to bitmaps; 0 for nowhere.
    fn extension(&self) -> u64 {
        let mut at = self.file.big::<4>(100);
        while at < self.cluster {
            let (kind, len) = (self.file.big::<4>(at), self.file.big::<4>(at + 4));
            match kind {
                0 => return 0,
                BITMAPS => return at + 8,
                _ => at += 8 + len.next_multiple_of(8),
            }
        }
        0
    }
}
