//! Images that QEMU makes on the spot, and what qemu-img and instar say about
//! them. For repairs each has a copy of its own.

use crate::machine::{Outcome, qemu_img, qemu_img_version};
use crate::transcript::{self, words};
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

/// Images, and commands whose output has to be qemu-img's.
pub struct Live {
    pub name: &'static str,
    /// Programs and arguments that make the images.
    make: &'static [(&'static str, &'static str)],
    /// Damage: a file, an offset, and the bytes that are written there.
    patch: &'static [(&'static str, u64, &'static [u8])],
    commands: &'static [&'static str],
}

const fn live(
    name: &'static str,
    make: &'static [(&'static str, &'static str)],
    commands: &'static [&'static str],
) -> Live {
    Live {
        name,
        make,
        patch: &[],
        commands,
    }
}

pub const IMG: &str = "qemu-img";
pub const IO: &str = "qemu-io";

/// Everything that only looks.
const LOOKS: &[&str] = &[
    "info disk",
    "info --output=json disk",
    "map disk",
    "map --output=json disk",
    "check disk",
    "check --output=json disk",
];

pub const CASES: &[Live] = &[
    live(
        "vmdk",
        &[
            (IMG, "create -q -f vmdk disk 200M"),
            (
                IO,
                "-f vmdk -c write~-P~1~0~200k -c write~130M~64k -c write~129M~1 disk",
            ),
        ],
        LOOKS,
    ),
    live(
        "vmdk with zeroed grains",
        &[
            (IMG, "create -q -f vmdk -o zeroed_grain=on disk 1000k"),
            (
                IO,
                "-f vmdk -c write~-P~1~0~1000k -c write~-z~128k~128k disk",
            ),
        ],
        LOOKS,
    ),
    live(
        "vmdk, split",
        &[
            (
                IMG,
                "create -q -f vmdk -o subformat=twoGbMaxExtentSparse disk 5G",
            ),
            (
                IO,
                "-f vmdk -c write~-P~1~2047M~2M -c write~-P~2~4500M~1M disk",
            ),
        ],
        LOOKS,
    ),
    live(
        "vmdk, flat",
        &[
            (IMG, "create -q -f vmdk -o subformat=monolithicFlat disk 3M"),
            (IO, "-f vmdk -c write~-P~1~1M~64k disk"),
        ],
        LOOKS,
    ),
    live(
        "vmdk, flat and split",
        &[
            (
                IMG,
                "create -q -f vmdk -o subformat=twoGbMaxExtentFlat disk 5G",
            ),
            (IO, "-f vmdk -c write~-P~1~2047M~2M disk"),
        ],
        LOOKS,
    ),
    live(
        "vmdk, compressed",
        &[
            (IMG, "create -q -f raw plain 1M"),
            (IO, "-f raw -c write~-P~1~0~100k plain"),
            (
                IMG,
                "convert -f raw -O vmdk -o subformat=streamOptimized plain disk",
            ),
        ],
        LOOKS,
    ),
    live(
        "vmdk over another",
        &[
            (IMG, "create -q -f vmdk base 1M"),
            (IO, "-f vmdk -c write~-P~1~0~100k base"),
            (IMG, "create -q -f vmdk -b base -F vmdk disk"),
            (IO, "-f vmdk -c write~-P~2~512k~64k disk"),
        ],
        &[
            "info disk",
            "info --backing-chain disk",
            "info --backing-chain --output=json disk",
            "map disk",
            "map --output=json disk",
            "check disk",
        ],
    ),
    live(
        "vmdk in a folder",
        &[
            ("mkdir", "sub"),
            (
                IMG,
                "create -q -f vmdk -o subformat=monolithicFlat sub/disk 1M",
            ),
            (IMG, "create -q -f vmdk sub/base 1M"),
            (IMG, "create -q -f vmdk -b base -F vmdk sub/top"),
        ],
        &[
            "info sub/disk",
            "info --output=json ./sub/disk",
            "map sub/disk",
            "info sub/top",
            "info --backing-chain --output=json sub/top",
        ],
    ),
    live(
        "vmdk without an extent",
        &[
            (
                IMG,
                "create -q -f vmdk -o subformat=twoGbMaxExtentSparse disk 5G",
            ),
            ("rm", "disk-s002"),
        ],
        &["info disk", "map disk", "check disk"],
    ),
    live(
        "vhd",
        &[
            (IMG, "create -q -f vpc disk 64M"),
            (
                IO,
                "-f vpc -c write~-P~1~0~200k -c write~30M~64k -c write~6M~5M disk",
            ),
        ],
        &LOOKS_UNCHECKED,
    ),
    live(
        "vhd of a forced size",
        &[(IMG, "create -q -f vpc -o force_size=on disk 64M")],
        &LOOKS_UNCHECKED,
    ),
    live(
        "vhd, fixed",
        &[
            (IMG, "create -q -f vpc -o subformat=fixed disk 3M"),
            (IO, "-f vpc -c write~-P~1~1M~64k disk"),
        ],
        &[
            "info -f vpc disk",
            "info -f vpc --output=json disk",
            "map -f vpc disk",
            "map -f vpc --output=json disk",
        ],
    ),
    live(
        "vhdx",
        &[
            (IMG, "create -q -f vhdx disk 64M"),
            (IO, "-f vhdx -c write~-P~1~0~200k -c write~30M~64k disk"),
        ],
        LOOKS_UNMAPPED,
    ),
    live(
        "vhdx, fixed",
        &[(IMG, "create -q -f vhdx -o subformat=fixed disk 20M")],
        LOOKS_UNMAPPED,
    ),
    live(
        "qcow2 of subclusters",
        &[
            (IMG, "create -q -f qcow2 -o extended_l2=on disk 1M"),
            (
                IO,
                "-c write~-P~1~0~2k -c write~-P~1~8k~2k -c write~-z~20k~4k -c write~64k~64k -c \
                 discard~64k~4k -c write~-z~128k~64k disk",
            ),
        ],
        LOOKS,
    ),
    live(
        "qcow2 that is preallocated",
        &[
            (
                IMG,
                "create -q -f qcow2 -o preallocation=metadata,extended_l2=on disk 1M",
            ),
            (IO, "-c write~100k~64k disk"),
        ],
        LOOKS,
    ),
    live(
        "qcow2 over a shorter one, preallocated",
        &[
            (IMG, "create -q -f raw base 1000k"),
            (
                IMG,
                "create -q -f qcow2 -o extended_l2=on -b base -F raw disk 3M",
            ),
            (IMG, "resize -q --preallocation=metadata disk 7M"),
        ],
        LOOKS_CHAIN,
    ),
    live(
        "qcow2 with snapshots and bitmaps",
        &[
            (IMG, "create -q -f qcow2 disk 1M"),
            (IMG, "bitmap --add disk b0"),
            (IMG, "bitmap --add --disable -g 1M disk b1"),
            (IO, "-c write~0~200k disk"),
            (IMG, "snapshot -c a~name~of~many~letters disk"),
            (IO, "-c write~64k~200k -c discard~0~64k disk"),
        ],
        &LOOKS_CHECKED,
    ),
    live(
        "qcow2 with compressed clusters",
        &[
            (IMG, "create -q -f qcow2 -o cluster_size=4k disk 1M"),
            (
                IO,
                "-c write~-c~-P~1~0~4k -c write~-c~4k~4k -c write~8k~4k -c write~-c~512k~4k disk",
            ),
        ],
        LOOKS,
    ),
    live(
        "qcow2 compressed by another method",
        &[
            (IMG, "create -q -f qcow2 -o compression_type=zstd disk 1M"),
            (IO, "-c write~-c~-P~1~0~64k disk"),
        ],
        LOOKS,
    ),
    live(
        "qcow2 encrypted with LUKS",
        &[(
            IMG,
            "create -q -f qcow2 --object secret,id=s,data=abc -o \
             encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 disk 1M",
        )],
        &LOOKS_UNCHECKED,
    ),
    live(
        "qcow2 over two others",
        &[
            (IMG, "create -q -f raw base 700k"),
            (IO, "-f raw -c write~-P~1~0~300k base"),
            (IMG, "create -q -f qcow2 -b base -F raw mid 1M"),
            (IO, "-c write~200k~100k -c write~-z~300k~64k mid"),
            (IMG, "create -q -f qcow2 -b mid -F qcow2 disk 2M"),
            (IO, "-c write~900k~100k -c write~1900k~10k disk"),
        ],
        LOOKS_CHAIN,
    ),
    live(
        "qcow2 over a VHD",
        &[
            (IMG, "create -q -f vpc base 1M"),
            (IMG, "create -q -f qcow2 -b base -F vpc disk"),
        ],
        LOOKS_CHAIN,
    ),
    live(
        "qcow2 over what is none",
        &[
            (IMG, "create -q -f raw base 1M"),
            (IMG, "create -q -f qcow2 -u -b base -F qcow2 disk 1M"),
        ],
        LOOKS,
    ),
    live(
        "raw with holes",
        &[
            ("truncate", "-s 1000001 disk"),
            (IO, "-f raw -c write~64k~64k -c write~300k~4k disk"),
        ],
        &[
            "info -f raw disk",
            "info -f raw --output=json disk",
            "map -f raw disk",
            "map -f raw --output=json disk",
            "map -f raw --output=json -s 100 -l 400k disk",
        ],
    ),
    live(
        "qcow2 that is sound",
        &[
            (IMG, "create -q -f qcow2 disk 1M"),
            (IO, "-f qcow2 -c write~0~100k -c write~512k~64k disk"),
        ],
        &[
            "check disk",
            "check --output=json disk",
            "check -q disk",
            "check -r leaks disk",
            "check -r all --output=json disk",
        ],
    ),
    Live {
        patch: LEAK,
        ..live("qcow2 with a leak", FILLED, REPAIRS)
    },
    Live {
        patch: CORRUPTION,
        ..live("qcow2 with wrong counts", FILLED, CHECKS)
    },
    Live {
        patch: &[DIRTY, LEAK[0]],
        ..live("qcow2 that was not closed, with a leak", FILLED, REPAIRS)
    },
    Live {
        patch: &[DIRTY, CORRUPTION[0]],
        ..live(
            "qcow2 that was not closed, with wrong counts",
            FILLED,
            CHECKS,
        )
    },
    Live {
        patch: &[("disk", 0x3_0000, &[0x80, 4, 0, 0, 0, 0, 0, 0])],
        ..live("qcow2 with a table past the end", FILLED, REPAIRS)
    },
];

/// What is left where qemu-img does not check the format; and qemu-img maps
/// VHDX as a whole, to nowhere.
const LOOKS_UNCHECKED: [&str; 4] = [LOOKS[0], LOOKS[1], LOOKS[2], LOOKS[3]];
const LOOKS_UNMAPPED: &[&str] = &[LOOKS[0], LOOKS[1], LOOKS[4], LOOKS[5]];

/// The date of a snapshot is that of the test.
const LOOKS_CHECKED: [&str; 4] = [LOOKS[2], LOOKS[3], LOOKS[4], LOOKS[5]];
const LOOKS_CHAIN: &[&str] = &[
    LOOKS[0],
    LOOKS[1],
    LOOKS[2],
    LOOKS[3],
    LOOKS[4],
    "info --backing-chain disk",
    "info --backing-chain --output=json disk",
];

/// A qcow2 image with four clusters of data: the refcount table in cluster 1, a
/// block in 2, the L1 table in 3, an L2 table in 4, data from 5 on.
pub const FILLED: &[(&str, &str)] = &[
    (IMG, "create -q -f qcow2 disk 1M"),
    (IO, "-f qcow2 -c write~0~200k disk"),
];
/// The dirty bit of the header.
const DIRTY: (&str, u64, &[u8]) = ("disk", 79, &[1]);
/// Two references to cluster 6, of which there is one.
const LEAK: &[(&str, u64, &[u8])] = &[("disk", 0x2_0000 + 2 * 6, &[0, 2])];
/// The same, and none to cluster 5.
const CORRUPTION: &[(&str, u64, &[u8])] = &[("disk", 0x2_0000 + 2 * 5, &[0, 0, 0, 2])];

/// Where all counts are rebuilt, each program puts them where it likes.
const CHECKS: &[&str] = &[
    "check disk",
    "check --output=json disk",
    "check -q disk",
    "check -r leaks disk",
];

const REPAIRS: &[&str] = &[
    CHECKS[0],
    CHECKS[1],
    CHECKS[2],
    CHECKS[3],
    "check disk",
    "check -r all --output=json disk",
    "check --output=json disk",
];

/// Runs the commands of a case by both programs.
pub fn as_qemu_img(case: &Live, sandbox: &str) -> Outcome {
    let version = qemu_img_version()?;
    let theirs = folder()?;
    for (program, line) in case.make {
        must(theirs.path(), program, line)?;
    }
    for (file, offset, bytes) in case.patch {
        patched(theirs.path(), file, *offset, bytes)?;
    }
    let repairs = case.commands.iter().any(|line| line.contains(" -r "));
    let copy = repairs.then(|| copy(theirs.path())).transpose()?;
    let ours = copy.as_ref().unwrap_or(&theirs);
    for line in case.commands {
        let expected = transcript::run(theirs.path(), qemu_img(), &words(line), &[])?;
        let got = crate::instar_now(ours.path(), sandbox, &words(line))?;
        if !crate::changed::is_known(&version, case.name, line) {
            transcript::same(&expected, &got)?;
        }
    }
    Ok(())
}

/// Writes bytes over those of a file.
pub fn patched(folder: &Path, file: &str, offset: u64, bytes: &[u8]) -> Outcome {
    File::options()
        .write(true)
        .open(folder.join(file))
        .and_then(|file| file.write_all_at(bytes, offset))
        .map_err(|error| format!("{file}: {error}"))
}

pub fn folder() -> Result<tempfile::TempDir, String> {
    tempfile::tempdir().map_err(|error| format!("temporary folder: {error}"))
}

pub fn must(folder: &Path, program: &str, line: &str) -> Outcome {
    let step = transcript::run(folder, program, &words(line), &[])?;
    match step.code {
        0 => Ok(()),
        _ => Err(format!("{program} {line}: {}", step.stderr)),
    }
}

/// A folder with a copy of every file.
pub fn copy(from: &Path) -> Result<tempfile::TempDir, String> {
    let to = folder()?;
    let files = fs::read_dir(from).map_err(|error| error.to_string())?;
    for file in files.flatten() {
        fs::copy(file.path(), to.path().join(file.file_name()))
            .map_err(|error| format!("{}: {error}", file.path().display()))?;
    }
    Ok(to)
}
