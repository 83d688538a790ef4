//! Round trips: QEMU makes and fills an image, instar grows it, QEMU judges it.

use crate::info;
use crate::live::instar_now;
use crate::machine::{Outcome, qemu_img_version};
use crate::tools::{equal, folder, instar, json, must, space, success};
use crate::transcript::QEMU_IMG;
use std::path::Path;

/// A kind of image. Disks have 3 MiB.
pub struct Variant {
    pub name: &'static str,
    format: &'static str,
    /// Arguments of `create` before the file.
    create: &'static str,
    /// Programs and arguments that come before and after `create`.
    before: &'static [(&'static str, &'static str)],
    after: &'static [(&'static str, &'static str)],
}

const fn qcow2(name: &'static str, create: &'static str) -> Variant {
    Variant {
        name,
        format: "qcow2",
        create,
        before: &[],
        after: &[],
    }
}

pub const VARIANTS: &[Variant] = &[
    qcow2("plain", ""),
    qcow2("512-byte clusters", "-o cluster_size=512"),
    qcow2("4 KiB clusters", "-o cluster_size=4k"),
    qcow2("2 MiB clusters", "-o cluster_size=2M"),
    qcow2("version 2", "-o compat=0.10"),
    qcow2("extended L2", "-o extended_l2=on,cluster_size=16k"),
    qcow2("1 refcount bit", "-o refcount_bits=1,cluster_size=1k"),
    qcow2("64 refcount bits", "-o refcount_bits=64,cluster_size=512"),
    qcow2("lazy refcounts", "-o lazy_refcounts=on"),
    qcow2("data file", "-o data_file=disk.data"),
    Variant {
        before: LONGER_BACKING,
        ..qcow2("longer backing file", "-b base -F raw -o cluster_size=4k")
    },
    Variant {
        before: LONGER_BACKING,
        ..qcow2(
            "backing file, extended L2",
            "-b base -F raw -o extended_l2=on",
        )
    },
    Variant {
        after: &[("qemu-img", "snapshot -c first disk")],
        ..qcow2("snapshot", "-o cluster_size=4k")
    },
    Variant {
        after: &[
            ("qemu-img", "bitmap --add disk b0"),
            ("qemu-img", "bitmap --add -g 512 disk b1"),
        ],
        ..qcow2("bitmaps", "-o cluster_size=512")
    },
    Variant {
        name: "raw",
        format: "raw",
        create: "",
        before: &[],
        after: &[],
    },
];

const LONGER_BACKING: &[(&str, &str)] = &[
    ("qemu-img", "create -q -f raw base 8M"),
    ("qemu-io", "-f raw -c write~-P~9~0~8M base"),
];

/// A new size.
pub struct Growth {
    pub name: &'static str,
    /// What `resize` gets.
    size: &'static str,
    /// The size in bytes.
    bytes: u64,
    falloc: bool,
}

/// All of them, or those that the second sandbox repeats with the same engine.
pub fn growths(sandbox: &str) -> &'static [Growth] {
    match sandbox {
        "process" => &GROWTHS[2..],
        _ => GROWTHS,
    }
}

const GROWTHS: &[Growth] = &[
    Growth {
        name: "a sector more",
        size: "+512",
        bytes: (3 << 20) + 512,
        falloc: false,
    },
    Growth {
        name: "4 MiB more",
        size: "+4M",
        bytes: 7 << 20,
        falloc: false,
    },
    Growth {
        name: "to 20 GiB",
        size: "20G",
        bytes: 20 << 30,
        falloc: false,
    },
    Growth {
        name: "4 MiB more, falloc",
        size: "+4M",
        bytes: 7 << 20,
        falloc: true,
    },
];

/// Content at the start, in the middle, and in the last sectors of the disk.
const FILL: &str = "-c write~-P~1~0~100k -c write~-P~2~1M~5k -c write~-P~3~3145216~512";

/// Grows an image; what it held is followed by zeroes, QEMU finds no fault and
/// sees what instar sees.
pub fn round_trip(variant: &Variant, growth: &Growth, sandbox: &str) -> Outcome {
    let folder = folder()?;
    let folder = folder.path();
    make(folder, variant)?;
    let format = variant.format;
    must(
        folder,
        "qemu-img",
        &format!("convert -f {format} -O raw disk expected"),
    )?;
    std::fs::File::options()
        .write(true)
        .open(folder.join("expected"))
        .and_then(|file| file.set_len(growth.bytes))
        .map_err(|error| format!("expected: {error}"))?;
    let falloc = if growth.falloc {
        "--preallocation=falloc"
    } else {
        "--preallocation=off"
    };
    let line = format!("resize -f {format} {falloc} disk {}", growth.size);
    let theirs = copy(folder)?;
    let resized = instar(folder, sandbox, &line)?;
    equal("resize", "Image resized.\n", &success(resized)?)?;
    if growth.bytes < 1 << 30 {
        // qemu-img may take minutes for the larger ones.
        must(theirs.path(), QEMU_IMG, &line)?;
        no_longer(theirs.path(), folder, variant, growth)?;
    }
    judge(folder, variant, sandbox)?;
    if growth.falloc {
        allocated(folder, variant)?;
    }
    Ok(())
}

/// A folder with a copy of every file.
fn copy(from: &Path) -> Result<tempfile::TempDir, String> {
    let to = folder()?;
    must(from, "cp", &format!("-r . {}", to.path().display()))?;
    Ok(to)
}

/// The image is at most one cluster longer than by qemu-img, and three or four
/// where tables, of one cluster each here, are made anew for one commit that
/// qemu-img changes in place: the L1 table, the refcount table, the last L2 table
/// and the bitmap directory. Their old places are free.
fn no_longer(theirs: &Path, ours: &Path, variant: &Variant, growth: &Growth) -> Outcome {
    let most = space(theirs, "disk")?.0;
    let length = space(ours, "disk")?.0;
    let info = json(&must(ours, QEMU_IMG, "info --output=json disk")?)?;
    let cluster = info["cluster-size"].as_u64().unwrap_or(0);
    let clusters = match (growth.falloc, variant.name) {
        (true, "bitmaps") => 4,
        (true, _) => 3,
        (false, _) => 1,
    };
    match length <= most + clusters * cluster {
        true => Ok(()),
        false => Err(format!("{length} bytes long, by qemu-img {most}")),
    }
}

fn make(folder: &Path, variant: &Variant) -> Outcome {
    for (program, line) in variant.before {
        must(folder, program, line)?;
    }
    let Variant { format, create, .. } = variant;
    must(
        folder,
        "qemu-img",
        &format!("create -q -f {format} {create} disk 3M"),
    )?;
    must(folder, "qemu-io", &format!("-f {format} {FILL} disk"))?;
    for (program, line) in variant.after {
        must(folder, program, line)?;
    }
    Ok(())
}

fn judge(folder: &Path, variant: &Variant, sandbox: &str) -> Outcome {
    let format = variant.format;
    if format != "raw" {
        must(folder, "qemu-img", &format!("check -f {format} disk"))?;
    }
    let same = must(
        folder,
        "qemu-img",
        &format!("compare -f {format} -F raw disk expected"),
    )?;
    equal("content", "Images are identical.\n", &same)?;
    let asked = |command: &str| {
        let line = format!("{command} -f {format} --output=json disk");
        let theirs = json(&must(folder, QEMU_IMG, &line)?)?;
        let ours = json(&success(instar_now(folder, sandbox, &line)?)?)?;
        Ok::<_, String>((theirs, ours))
    };
    let (theirs, ours) = asked("info")?;
    info::same(&qemu_img_version()?, &theirs, &ours)?;
    if variant.name == "extended L2" {
        // In a cluster of which a part is allocated QEMU shows the place of the
        // rest as well.
        return Ok(());
    }
    let (theirs, ours) = asked("map")?;
    equal("map", theirs.to_string(), ours.to_string())
}

/// Everything that was added has disk space.
fn allocated(folder: &Path, variant: &Variant) -> Outcome {
    let line = format!(
        "map -f {} --output=json --start-offset=3M disk",
        variant.format
    );
    let map = must(folder, "qemu-img", &line)?;
    let ranges: serde_json::Value =
        serde_json::from_str(&map).map_err(|error| format!("{error}: {map}"))?;
    let all = ranges.as_array().cloned().unwrap_or_default();
    let placed = all
        .iter()
        .filter(|range| range["offset"].is_u64())
        .filter_map(|range| range["length"].as_u64())
        .sum::<u64>();
    equal("bytes with a place in a file", 4 << 20, placed)
}
