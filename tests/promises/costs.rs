//! What operations cost: exits from the sandbox, barriers and writes, against
//! the numbers that `doc/COSTS.md` promises. The test reads that table, so the
//! document cannot say anything else than what happens.

use crate::tools::{must, scratch};
use instar::image::{Access, Counters, Image, OpenOptions, ResizeOptions};
use instar::sandbox::Pool;
use instar_guest::Format;
use instar_guest::proto::Preallocation;
use std::path::Path;
use std::sync::Arc;

type Outcome = Result<(), instar::image::Error>;

/// An operation with a row in the document.
struct Operation {
    /// The row's name.
    name: &'static str,
    /// Makes the image `image` in a directory.
    image: fn(&Path) -> Result<(), String>,
    /// The format that the image is opened as.
    format: Format,
    /// What is done before the operation is measured.
    before: fn(&Image) -> Outcome,
    /// The operation.
    run: fn(&Image) -> Outcome,
}

const MIB: u64 = 1 << 20;
const TIB: u64 = 1 << 40;

const OPERATIONS: &[Operation] = &[
    qcow2("qcow2: read, first access to a region", |_| Ok(()), read),
    qcow2("qcow2: read again", read, read),
    qcow2("qcow2: flush, nothing written", |_| Ok(()), Image::flush),
    qcow2("qcow2: overwrite 4 KiB and flush", read, overwrite),
    qcow2(
        "qcow2: write 64 KiB into a new cluster and flush",
        read,
        |image| {
            image.write_at(&[7; 65536], 32 * MIB)?;
            image.flush()
        },
    ),
    qcow2(
        "qcow2: write 1 MiB more into new space",
        first_mib,
        second_mib,
    ),
    qcow2("qcow2: write 16 MiB into new space and flush", read, run),
    qcow2(
        "qcow2: resize to the same size",
        |_| Ok(()),
        |image| grow(image, 64 * MIB, Preallocation::Off),
    ),
    qcow2(
        "qcow2: grow, the L1 table has room",
        |_| Ok(()),
        |image| grow(image, 128 * MIB, Preallocation::Off),
    ),
    Operation {
        image: |dir| create(dir, "cluster_size=512", "1M"),
        ..qcow2(
            "qcow2: grow, the L1 table moves",
            |_| Ok(()),
            |image| grow(image, 64 * MIB, Preallocation::Off),
        )
    },
    qcow2(
        "qcow2: grow with falloc",
        |_| Ok(()),
        |image| grow(image, 80 * MIB, Preallocation::Falloc),
    ),
    qcow2(
        "qcow2: grow with metadata",
        |_| Ok(()),
        |image| grow(image, 80 * MIB, Preallocation::Metadata),
    ),
    qcow2(
        "qcow2: grow with full",
        |_| Ok(()),
        |image| grow(image, 80 * MIB, Preallocation::Full),
    ),
    qcow2("qcow2: shrink", |_| Ok(()), |image| shrink(image, 32 * MIB)),
    qcow2(
        "qcow2: shrink, data is dropped",
        |_| Ok(()),
        |image| shrink(image, MIB / 8),
    ),
    raw("raw: read", |_| Ok(()), read),
    raw("raw: read again", read, read),
    raw("raw: overwrite 4 KiB and flush", |_| Ok(()), overwrite),
    raw(
        "raw: grow",
        |_| Ok(()),
        |image| grow(image, 128 * MIB, Preallocation::Off),
    ),
    raw(
        "raw: grow with falloc",
        |_| Ok(()),
        |image| grow(image, 65 * MIB, Preallocation::Falloc),
    ),
    raw("raw: shrink", |_| Ok(()), |image| shrink(image, 32 * MIB)),
    other("vmdk: read again", Format::Vmdk, read).after(read),
    other("vmdk: overwrite 4 KiB and flush", Format::Vmdk, overwrite).after(overwrite),
    other(
        "vmdk: overwrite 4 KiB more of what was read before",
        Format::Vmdk,
        write_second,
    )
    .after(read_and_write_first),
    other(
        "vmdk: write 1 MiB more into new space",
        Format::Vmdk,
        second_mib,
    )
    .after(first_mib),
    other(
        "vmdk: write 16 MiB into new space and flush",
        Format::Vmdk,
        run,
    )
    .after(read),
    other("vmdk: grow", Format::Vmdk, |image| {
        grow(image, 128 * MIB, Preallocation::Off)
    }),
    other("vmdk: shrink", Format::Vmdk, |image| {
        shrink(image, 32 * MIB)
    }),
    other("vhd: read again", Format::Vhd, read).after(read),
    other("vhd: overwrite 4 KiB and flush", Format::Vhd, overwrite).after(overwrite),
    other(
        "vhd: overwrite 4 KiB more of what was read before",
        Format::Vhd,
        write_second,
    )
    .after(read_and_write_first),
    other(
        "vhd: write 1 MiB more into new space",
        Format::Vhd,
        second_mib,
    )
    .after(first_mib),
    other(
        "vhd: write 16 MiB into new space and flush",
        Format::Vhd,
        run,
    )
    .after(read),
    other("vhd: grow", Format::Vhd, |image| {
        grow(image, 128 * MIB, Preallocation::Off)
    }),
    other("vhd: shrink", Format::Vhd, |image| shrink(image, 32 * MIB)),
    other("vhdx: read again", Format::Vhdx, read).after(read),
    other("vhdx: overwrite 4 KiB and flush", Format::Vhdx, overwrite).after(overwrite),
    other(
        "vhdx: overwrite 4 KiB more of what was read before",
        Format::Vhdx,
        write_second,
    )
    .after(read_and_write_first),
    other(
        "vhdx: write 1 MiB more into new space",
        Format::Vhdx,
        second_mib,
    )
    .after(first_mib),
    other(
        "vhdx: write 16 MiB into new space and flush",
        Format::Vhdx,
        run,
    )
    .after(read),
    other("vhdx: grow", Format::Vhdx, |image| {
        grow(image, 128 * MIB, Preallocation::Off)
    }),
    other("vhdx: grow, the BAT moves", Format::Vhdx, |image| {
        grow(image, 4 * TIB, Preallocation::Off)
    }),
    other("vhdx: shrink", Format::Vhdx, |image| {
        shrink(image, 32 * MIB)
    }),
];

/// Rows whose operation is the opening itself.
const OPENINGS: [(&str, Format); 5] = [
    ("qcow2: open (`info`)", Format::Qcow2),
    ("raw: open (`info`)", Format::Raw),
    ("vmdk: open (`info`)", Format::Vmdk),
    ("vhd: open (`info`)", Format::Vhd),
    ("vhdx: open (`info`)", Format::Vhdx),
];

const fn qcow2(
    name: &'static str,
    before: fn(&Image) -> Outcome,
    run: fn(&Image) -> Outcome,
) -> Operation {
    Operation {
        name,
        image: |dir| create(dir, "cluster_size=65536", "64M"),
        format: Format::Qcow2,
        before,
        run,
    }
}

const fn raw(
    name: &'static str,
    before: fn(&Image) -> Outcome,
    run: fn(&Image) -> Outcome,
) -> Operation {
    Operation {
        name,
        image: |dir| {
            let arguments = ["create", "-q", "-f", "raw", "image", "64M"];
            must(dir, "qemu-img", &arguments).map(drop)
        },
        format: Format::Raw,
        before,
        run,
    }
}

const fn other(name: &'static str, format: Format, run: fn(&Image) -> Outcome) -> Operation {
    Operation {
        name,
        image: match format {
            Format::Vmdk => |dir| plain(dir, "vmdk"),
            Format::Vhd => |dir| plain(dir, "vpc"),
            _ => |dir| plain(dir, "vhdx"),
        },
        format,
        before: |_| Ok(()),
        run,
    }
}

impl Operation {
    /// The same after something else was done.
    const fn after(self, before: fn(&Image) -> Outcome) -> Self {
        Self { before, ..self }
    }
}

/// An image as qemu-img makes it, with some data.
fn plain(dir: &Path, format: &str) -> Result<(), String> {
    let arguments = ["create", "-q", "-f", format, "image", "64M"];
    must(dir, "qemu-img", &arguments)?;
    fill(dir, format)
}

fn fill(dir: &Path, format: &str) -> Result<(), String> {
    let fill = ["-f", format, "-c", "write -P 1 0 256k", "image"];
    must(dir, "qemu-io", &fill).map(drop)
}

fn create(dir: &Path, options: &str, size: &str) -> Result<(), String> {
    let arguments = ["create", "-q", "-f", "qcow2", "-o", options, "image", size];
    must(dir, "qemu-img", &arguments)?;
    fill(dir, "qcow2")
}

fn read(image: &Image) -> Outcome {
    image.read_at(&mut [0; 4096], 64 << 10)
}

fn overwrite(image: &Image) -> Outcome {
    image.write_at(&[7; 4096], 0)?;
    image.flush()
}

/// Reads all data before the first write.
fn read_and_write_first(image: &Image) -> Outcome {
    image.read_at(&mut [0; 256 << 10], 0)?;
    image.write_at(&[7; 4096], 0)
}

fn write_second(image: &Image) -> Outcome {
    image.write_at(&[7; 4096], 128 << 10)
}

/// What a sequential writer does first and then, where nothing was.
fn first_mib(image: &Image) -> Outcome {
    image.write_at(&[7; MIB as usize], 32 * MIB)
}

fn second_mib(image: &Image) -> Outcome {
    image.write_at(&[7; MIB as usize], 33 * MIB)
}

fn run(image: &Image) -> Outcome {
    for mib in 32..48 {
        image.write_at(&[7; MIB as usize], mib * MIB)?;
    }
    image.flush()
}

fn grow(image: &Image, size: u64, preallocation: Preallocation) -> Outcome {
    let how = ResizeOptions {
        preallocation,
        ..ResizeOptions::default()
    };
    image.resize(size, &how).map(drop)
}

fn shrink(image: &Image, size: u64) -> Outcome {
    let how = ResizeOptions {
        shrink: true,
        ..ResizeOptions::default()
    };
    image.resize(size, &how).map(drop)
}

/// Exits, barriers, writes.
type Cost = [u64; 3];

/// Measures every operation.
pub fn measured(pool: &Arc<Pool>) -> Result<Vec<(String, Cost)>, String> {
    let mut rows = Vec::new();
    for (name, format) in OPENINGS {
        let operation = OPERATIONS
            .iter()
            .find(|operation| operation.format == format);
        let operation = operation.ok_or("no operation on the format")?;
        let dir = scratch()?;
        (operation.image)(dir.path())?;
        let image = open(pool, dir.path(), format, Access::Info)?;
        rows.push((
            name.to_owned(),
            difference(Counters::default(), image.counters()),
        ));
    }
    for operation in OPERATIONS {
        let dir = scratch()?;
        (operation.image)(dir.path())?;
        let image = open(pool, dir.path(), operation.format, Access::Write)?;
        let told = |error: instar::image::Error| format!("{}: {error}", operation.name);
        (operation.before)(&image).map_err(told)?;
        let before = image.counters();
        (operation.run)(&image).map_err(told)?;
        rows.push((
            operation.name.to_owned(),
            difference(before, image.counters()),
        ));
    }
    Ok(rows)
}

fn open(pool: &Arc<Pool>, dir: &Path, format: Format, access: Access) -> Result<Image, String> {
    let mut options = OpenOptions::new(access);
    options.format = Some(format);
    options
        .open(pool, &dir.join("image"))
        .map_err(|error| error.to_string())
}

fn difference(before: Counters, after: Counters) -> Cost {
    [
        after.exits - before.exits,
        after.fdatasyncs - before.fdatasyncs,
        after.writes - before.writes,
    ]
}

/// The rows of the document's table.
pub fn documented() -> Result<Vec<(String, Cost)>, String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("doc/COSTS.md");
    let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
    let rows = text.lines().filter_map(|line| {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let numbers: Option<Vec<u64>> = cells[1..].iter().map(|cell| cell.parse().ok()).collect();
        let cost: Cost = numbers?.try_into().ok()?;
        Some((cells[0].to_owned(), cost))
    });
    Ok(rows.collect())
}

/// Every operation costs what the document says, and the document lists every
/// operation.
pub fn documented_costs_are_real(pool: &Arc<Pool>) -> Result<(), String> {
    let (measured, documented) = (measured(pool)?, documented()?);
    if measured == documented {
        return Ok(());
    }
    let rows: Vec<String> = measured
        .iter()
        .map(|(name, [exits, syncs, writes])| format!("| {name} | {exits} | {syncs} | {writes} |"))
        .collect();
    Err(format!(
        "doc/COSTS.md has {documented:?}; measured was\n{}",
        rows.join("\n")
    ))
}

/// No limit of its own.
const ANY: u64 = u64::MAX;

/// The promises that do not move with the document: at most so many exits,
/// barriers and writes.
const LIMITS: &[(&str, Cost)] = &[
    ("qcow2: open (`info`)", [1, 0, 0]),
    ("raw: open (`info`)", [1, 0, 0]),
    ("qcow2: read again", [0, 0, 0]),
    ("raw: read again", [0, 0, 0]),
    ("qcow2: flush, nothing written", [0, 0, 0]),
    ("qcow2: overwrite 4 KiB and flush", [0, 1, 1]),
    ("raw: overwrite 4 KiB and flush", [1, 1, 1]),
    ("qcow2: write 1 MiB more into new space", [1, 0, 1]),
    ("qcow2: resize to the same size", [ANY, 0, 0]),
    ("qcow2: grow, the L1 table has room", [ANY, 2, 2]),
    ("qcow2: grow, the L1 table moves", [ANY, 4, 6]),
    ("raw: grow", [ANY, 1, 1]),
    ("raw: shrink", [ANY, 1, 1]),
    ("vmdk: open (`info`)", [1, 0, 0]),
    ("vhd: open (`info`)", [1, 0, 0]),
    ("vhdx: open (`info`)", [3, 0, 0]),
    ("vmdk: read again", [0, 0, 0]),
    ("vmdk: overwrite 4 KiB and flush", [0, 1, 1]),
    ("vmdk: write 1 MiB more into new space", [1, 0, 1]),
    ("vhd: read again", [0, 0, 0]),
    ("vhd: overwrite 4 KiB and flush", [0, 1, 1]),
    ("vhd: write 1 MiB more into new space", [1, 0, 1]),
    ("vhdx: read again", [0, 0, 0]),
    ("vhdx: overwrite 4 KiB and flush", [0, 1, 1]),
    ("vhdx: write 1 MiB more into new space", [1, 0, 1]),
    ("vhdx: grow", [ANY, 8, ANY]),
    ("vhdx: grow, the BAT moves", [ANY, 8, ANY]),
];

/// The document keeps to [`LIMITS`], and measuring keeps the document true.
pub fn limits_are_kept() -> Result<(), String> {
    let documented = documented()?;
    for (name, limits) in LIMITS {
        let row = documented.iter().find(|(row, _)| row == name);
        let (_, cost) = row.ok_or_else(|| format!("no row {name:?}"))?;
        if cost.iter().zip(limits).any(|(cost, limit)| cost > limit) {
            return Err(format!("{name}: {cost:?} of at most {limits:?}"));
        }
    }
    Ok(())
}
