//! The repairs of qcow2 images that are explored, and what puts one in order
//! that was not closed in order.

use super::case::{Ask, BASIC, Case, Harmless, Judges, K, M};
use super::disk::Files;
use instar_guest::Format;
use instar_guest::findings::Repair;

/// qemu-img reads the format, damaged counts or not.
const JUDGES: Judges = Judges {
    check: true,
    convert: true,
    ..Judges::NONE
};

/// What the cases of this page have in common.
const QCOW2: Case = Case {
    format: Format::Qcow2,
    options: "cluster_size=512",
    size: M,
    prepare: &["io write -P 1 0 64k", "io write -P 2 900k 60k"],
    judges: &JUDGES,
    ask: Ask::Repair(Repair::All),
    ..BASIC
};

/// An image as a shrink leaves it that is cut off before it has cut the data file.
const DATA_FILE_TO_CUT: Case = Case {
    options: "cluster_size=4096,data_file=data.raw",
    size: CUT_AT,
    prepare: &["io write -P 5 0 501k"],
    tamper: Some(keep_cut_data),
    judges: &super::qcow2_shrink::FLAGGED,
    ..QCOW2
};
const CUT_AT: u64 = 501 * K;

/// Why counts go up first.
const RAISED: &str = "a repair can be repeated; in between, whoever writes to a cluster that is \
                      marked as shared lowers its count";

/// Leaks, counts and flags in place; new counts; dirty images.
pub const CASES: &[Case] = &[
    Case {
        name: "repair/leaks",
        prepare: &["io write -P 1 0 64k"],
        tamper: Some(leak),
        ask: Ask::Repair(Repair::Leaks),
        ..QCOW2
    },
    Case {
        name: "repair/leaks, 1-bit counts",
        options: "cluster_size=512,refcount_bits=1",
        prepare: &["io write -P 1 0 64k"],
        tamper: Some(leak),
        ask: Ask::Repair(Repair::Leaks),
        ..QCOW2
    },
    Case {
        name: "repair/flags",
        tamper: Some(flip_flags),
        ..QCOW2
    },
    Case {
        name: "repair/counts too low and too high",
        options: "cluster_size=1024",
        prepare: &[
            "io write -P 1 0 64k",
            "img snapshot -c s1 @",
            "io write -P 2 900k 6k",
        ],
        snapshots: &["s1"],
        harmless: &[Harmless::barrier(0, RAISED)],
        tamper: Some(lower_shared),
        ..QCOW2
    },
    Case {
        name: "repair/new counts",
        tamper: Some(forget_data),
        ..QCOW2
    },
    Case {
        name: "repair/new counts, 64-bit, many blocks",
        options: "cluster_size=512,refcount_bits=64",
        prepare: &["io write -P 1 0 300k"],
        tamper: Some(forget_data),
        ..QCOW2
    },
    Case {
        name: "repair/new counts, 1-bit, no block",
        options: "cluster_size=512,refcount_bits=1",
        tamper: Some(lose_block),
        ..QCOW2
    },
    Case {
        name: "repair/new counts and flags, version 2",
        harmless: &[Harmless::barrier(1, RAISED)],
        options: "cluster_size=4096,compat=0.10",
        tamper: Some(forget_data_and_flags),
        ..QCOW2
    },
    Case {
        name: "settle/sound",
        options: "cluster_size=512,lazy_refcounts=on",
        tamper: Some(dirty),
        ask: Ask::Settle,
        ..QCOW2
    },
    Case {
        name: "settle/new counts",
        options: "cluster_size=512,lazy_refcounts=on",
        tamper: Some(forget_data_and_dirty),
        ask: Ask::Settle,
        ..QCOW2
    },
    Case {
        name: "settle/new counts, snapshot",
        options: "cluster_size=4096,lazy_refcounts=on",
        prepare: &[
            "io write -P 1 0 300k",
            "img snapshot -c s1 @",
            "io write -P 2 100k 100k",
        ],
        snapshots: &["s1"],
        tamper: Some(forget_data_and_dirty),
        ask: Ask::Settle,
        ..QCOW2
    },
    Case {
        name: "settle/left by a grow",
        options: "cluster_size=512,refcount_bits=2",
        size: 2 * M,
        prepare: &[
            "io write -P 1 0 64k",
            "io write -P 5 1020k 300k",
            "size 1048576",
        ],
        tamper: Some(leak),
        judges: &super::qcow2::JUDGES,
        ask: Ask::Settle,
        ..QCOW2
    },
    Case {
        name: "settle/room that is not counted",
        tamper: Some(add_room),
        judges: &super::qcow2::JUDGES,
        ask: Ask::Settle,
        ..QCOW2
    },
    Case {
        name: "settle/data file that is not cut yet",
        ask: Ask::Settle,
        ..DATA_FILE_TO_CUT
    },
    Case {
        name: "repair/data file that is not cut yet",
        ask: Ask::Repair(Repair::Leaks),
        ..DATA_FILE_TO_CUT
    },
    Case {
        name: "settle/leaks",
        options: "cluster_size=512,lazy_refcounts=on",
        prepare: &["io write -P 1 0 64k"],
        tamper: Some(leak_inside_and_dirty),
        ask: Ask::Settle,
        ..QCOW2
    },
];

const COPIED: u64 = 1 << 63;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// The image as what is damaged in it.
struct Image<'a> {
    files: &'a mut Files,
}

impl<'a> Image<'a> {
    fn new(files: &'a mut Files) -> Self {
        Self { files }
    }

    fn inode(&self) -> Result<usize, String> {
        self.files.find("image.qcow2").ok_or("no image".to_owned())
    }

    fn number(&self, at: u64) -> Result<u64, String> {
        Ok(self.files.bytes(self.inode()?).big::<8>(at))
    }

    fn put(&mut self, at: u64, value: u64) -> Result<(), String> {
        let inode = self.inode()?;
        self.files.bytes_mut(inode).write(at, &value.to_be_bytes());
        Ok(())
    }

    fn flip(&mut self, at: u64, bits: u64) -> Result<(), String> {
        self.put(at, self.number(at)? ^ bits)
    }

    fn cluster(&self) -> Result<u64, String> {
        Ok(1 << (self.number(20)? >> 32))
    }

    /// Places of the L2 entries that have a cluster.
    fn data(&self) -> Result<Vec<u64>, String> {
        let (l1, entries) = (self.number(40)?, self.number(36)? >> 32);
        let mut found = Vec::new();
        for index in 0..entries {
            let table = self.number(l1 + index * 8)? & OFFSET;
            if table == 0 {
                continue;
            }
            for at in (table..table + self.cluster()?).step_by(8) {
                if self.number(at)? & OFFSET != 0 {
                    found.push(at);
                }
            }
        }
        Ok(found)
    }

    fn set_count(&mut self, cluster: u64, count: u64) -> Result<(), String> {
        let order = match self.number(4)? >> 32 {
            2 => 4,
            _ => self.number(96)? >> 32,
        };
        let bits = 1 << order;
        let per_block = self.cluster()? * 8 / bits;
        let block = self.number(self.number(48)? + cluster / per_block * 8)?;
        let bit = cluster % per_block * bits;
        // The number that ends with the count's last byte has it lowest.
        let end = block + (bit + bits).div_ceil(8);
        let shift = if bits < 8 { bit % 8 } else { 0 };
        let mask = (u64::MAX >> (64 - bits)) << shift;
        let old = self.number(end - 8)?;
        self.put(end - 8, old & !mask | count << shift & mask)
    }

    fn cluster_of(&self, entry: u64) -> Result<u64, String> {
        Ok((self.number(entry)? & OFFSET) / self.cluster()?)
    }
}

/// Some clusters behind the last are counted.
fn leak(files: &mut Files) -> Result<(), String> {
    let mut image = Image::new(files);
    let (inode, cluster) = (image.inode()?, image.cluster()?);
    let bytes = image.files.bytes_mut(inode);
    let end = bytes.len().div_ceil(cluster);
    bytes.set_len((end + 9) * cluster);
    [0, 1, 2, 8]
        .into_iter()
        .try_for_each(|at| image.set_count(end + at, 1))
}

/// The file goes on behind the last cluster, with garbage, into the middle of one.
fn add_room(files: &mut Files) -> Result<(), String> {
    let inode = Image::new(files).inode()?;
    let bytes = files.bytes_mut(inode);
    bytes.write(bytes.len().next_multiple_of(512), &[0xa5; 5000]);
    Ok(())
}

/// The data file goes on behind the end of the disk, and the corrupt bit is set.
fn keep_cut_data(files: &mut Files) -> Result<(), String> {
    let data = files.find("data.raw").ok_or("no data file")?;
    files.bytes_mut(data).write(CUT_AT, &[0xa5; 20 << 10]);
    Image::new(files).flip(72, 2)
}

/// Every other data cluster may seemingly be shared.
fn flip_flags(files: &mut Files) -> Result<(), String> {
    let mut image = Image::new(files);
    let data = image.data()?;
    let mut every_other = data.into_iter().step_by(2);
    every_other.try_for_each(|at| image.flip(at, COPIED))
}

/// Clusters that a snapshot shares are counted once, and others too often.
fn lower_shared(files: &mut Files) -> Result<(), String> {
    leak(files)?;
    let mut image = Image::new(files);
    for at in image.data()? {
        if image.number(at)? & COPIED == 0 {
            image.set_count(image.cluster_of(at)?, 1)?;
            image.flip(at, COPIED)?;
        }
    }
    Ok(())
}

/// Data clusters are not counted.
fn forget_data(files: &mut Files) -> Result<(), String> {
    let mut image = Image::new(files);
    let data = image.data()?;
    let mut some = data.into_iter().skip(3).step_by(5);
    some.try_for_each(|at| image.set_count(image.cluster_of(at)?, 0))
}

fn forget_data_and_flags(files: &mut Files) -> Result<(), String> {
    forget_data(files)?;
    flip_flags(files)
}

/// There is no refcount block.
fn lose_block(files: &mut Files) -> Result<(), String> {
    let mut image = Image::new(files);
    let table = image.number(48)?;
    image.put(table, 0)
}

/// A writer did not close the image.
fn dirty(files: &mut Files) -> Result<(), String> {
    Image::new(files).flip(72, 1)
}

fn forget_data_and_dirty(files: &mut Files) -> Result<(), String> {
    forget_data(files)?;
    dirty(files)
}

/// Nothing refers to some data clusters between others.
fn leak_inside_and_dirty(files: &mut Files) -> Result<(), String> {
    let mut image = Image::new(files);
    let data = image.data()?;
    let mut some = data.into_iter().skip(3).step_by(5);
    some.try_for_each(|at| image.put(at, 0))?;
    dirty(files)
}
