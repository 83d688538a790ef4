//! The images of the matrix: every format and variant that can be written.

/// A kind of image, and the sizes of its disk. Bytes.
pub struct Kind {
    /// What it is called in the tests' names.
    pub name: &'static str,
    /// qemu-img's name of the format.
    pub format: &'static str,
    /// The image's file.
    pub file: &'static str,
    /// Arguments of `qemu-img create` before the file.
    pub create: &'static str,
    /// The disk's size at first.
    pub size: u64,
    /// A size that the tables which are there can address.
    pub inside: u64,
    /// A size for which tables, or data in the way of tables, must move (where
    /// the format has such a thing).
    pub relocating: u64,
}

const M: u64 = 1 << 20;
const G: u64 = 1 << 30;
const T: u64 = 1 << 40;

/// What the disks hold lies below this. A shrink to it cuts empty space only.
pub const DATA_END: u64 = 3 * M;
/// A shrink to this size, which ends inside every allocation unit, cuts data.
pub const CUT: u64 = M + 37 * 512;

const fn qcow2(name: &'static str, create: &'static str, sizes: [u64; 3]) -> Kind {
    Kind {
        name,
        format: "qcow2",
        file: "disk.qcow2",
        create,
        size: sizes[0],
        inside: sizes[1],
        relocating: sizes[2],
    }
}

const fn other(
    name: &'static str,
    format: &'static str,
    file: &'static str,
    create: &'static str,
    sizes: [u64; 3],
) -> Kind {
    Kind {
        format,
        file,
        ..qcow2(name, create, sizes)
    }
}

/// All of them.
pub const KINDS: &[Kind] = &[
    other("raw", "raw", "disk.raw", "", [5 * M, 7 * M, 12 * M]),
    // One cluster of L1 table addresses 4 TiB, 2 MiB, 16 MiB, 16 MiB, 128 MiB
    // and 32 GiB of these.
    qcow2("qcow2", "", [4 * T - 4 * M, 4 * T - 2 * M, 4 * T + 4 * M]),
    qcow2(
        "qcow2 512-byte clusters",
        "-o cluster_size=512",
        [5 * M, 5 * M + 512, 9 * M],
    ),
    qcow2(
        "qcow2 version 2",
        "-o compat=0.10,cluster_size=1k",
        [14 * M, 15 * M, 18 * M],
    ),
    qcow2(
        "qcow2 1 refcount bit",
        "-o refcount_bits=1,cluster_size=1k",
        [14 * M, 15 * M, 18 * M],
    ),
    qcow2(
        "qcow2 64 refcount bits, lazy",
        "-o refcount_bits=64,lazy_refcounts=on,cluster_size=2k",
        [124 * M, 126 * M, 132 * M],
    ),
    qcow2(
        "qcow2 extended L2",
        "-o extended_l2=on,cluster_size=16k",
        [32 * G - 4 * M, 32 * G - 2 * M, 32 * G + 4 * M],
    ),
    // The tables of 416 MiB fit before the first grain.
    other(
        "vmdk monolithicSparse",
        "vmdk",
        "disk.vmdk",
        "-o subformat=monolithicSparse",
        [412 * M, 414 * M, 424 * M],
    ),
    other(
        "vmdk monolithicFlat",
        "vmdk",
        "disk.vmdk",
        "-o subformat=monolithicFlat",
        [5 * M, 7 * M, 12 * M],
    ),
    // An extent ends at 2 GiB.
    other(
        "vmdk twoGbMaxExtentSparse",
        "vmdk",
        "disk.vmdk",
        "-o subformat=twoGbMaxExtentSparse",
        [2 * G - 4 * M, 2 * G - 2 * M, 2 * G + 4 * M],
    ),
    other(
        "vmdk twoGbMaxExtentFlat",
        "vmdk",
        "disk.vmdk",
        "-o subformat=twoGbMaxExtentFlat",
        [2 * G - 4 * M, 2 * G - 2 * M, 2 * G + 4 * M],
    ),
    // One sector of BAT addresses 256 MiB.
    other(
        "vhd dynamic",
        "vpc",
        "disk.vhd",
        "-o subformat=dynamic,force_size=on",
        [250 * M, 254 * M, 264 * M],
    ),
    other(
        "vhd fixed",
        "vpc",
        "disk.vhd",
        "-o subformat=fixed,force_size=on",
        [5 * M, 7 * M, 12 * M],
    ),
    // 1 MiB of BAT has 131,072 entries, one of them for a sector bitmap after
    // every 4,096 blocks.
    other(
        "vhdx dynamic",
        "vhdx",
        "disk.vhdx",
        "-o subformat=dynamic,block_size=1M",
        [131_030 * M, 131_036 * M, 131_050 * M],
    ),
    other(
        "vhdx fixed",
        "vhdx",
        "disk.vhdx",
        "-o subformat=fixed,block_size=1M",
        [5 * M, 7 * M, 12 * M],
    ),
];

impl Kind {
    /// Whether the disk is too large to be compared whole: qemu reads every
    /// byte of a VHDX, holes or not.
    pub fn is_sampled(&self) -> bool {
        self.format == "vhdx" && self.size > G
    }

    /// Whether `qemu-img check` knows the format.
    pub fn is_checked_by_qemu(&self) -> bool {
        !matches!(self.format, "raw" | "vpc")
    }
}
