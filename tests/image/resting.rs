//! Images whose sandboxes have gone back while nothing was asked of them.

use crate::lab::{Case, Lab, Variant, VariantCase, content, equal, open, run, same, text};
use crate::machine::Outcome;
use instar::image::{Access, Image, ResizeOptions};
use instar::sandbox::Pool;
use instar_guest::{Extent, ExtentKind};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

pub const PER_VARIANT: &[VariantCase] = &[("works on after a rest", works_on)];

pub const CASES: &[Case] = &[
    (
        "an image of any format works on after a rest",
        every_format_works_on,
    ),
    (
        "an image that another program changed is stale",
        changed_is_stale,
    ),
];

const MIB: u64 = 1 << 20;

/// Has the image give its sandboxes back, those of its backing chain, too.
fn rest(image: &Image) -> Outcome {
    image.rest(Duration::ZERO);
    let mut layer = Some(image);
    while let Some(image) = layer {
        equal(image.is_resting(), true, "at rest")?;
        layer = image.backing();
    }
    Ok(())
}

fn works_on(pool: &Arc<Pool>, variant: &'static Variant) -> Outcome {
    let lab = Lab::new(variant)?;
    let image = lab.open(pool, Access::Write)?;
    rest(&image)?;
    let mut expected = content(&image)?;
    same(&expected, &lab.content, "read")?;
    rest(&image)?;
    same(&content(&image)?, &expected, "read again")?;
    rest(&image)?;
    let (at, len) = (1_500_000, 70_000);
    let mapped = image.map(at, len as u64).map_err(text)?;
    let in_place = |extent: &Extent| {
        let ExtentKind::Data { in_place, .. } = extent.kind else {
            return false;
        };
        in_place
    };
    write(&image, &mut expected, at, len)?;
    image.rest(Duration::ZERO);
    // A mapping that waits for a flush keeps the sandbox.
    let waits = !mapped.iter().all(in_place);
    equal(image.is_resting(), !waits, "at rest")?;
    image.flush().map_err(text)?;
    rest(&image)?;
    write(&image, &mut expected, 2_100_000, 3000)?;
    image.flush().map_err(text)?;
    rest(&image)?;
    grow(&image, &mut expected)?;
    rest(&image)?;
    write(&image, &mut expected, lab.content.len() as u64 - 100, 5000)?;
    image.flush().map_err(text)?;
    same(&content(&image)?, &expected, "read at last")?;
    drop(image);
    lab.judge(&expected)
}

fn write(image: &Image, expected: &mut [u8], offset: u64, len: usize) -> Outcome {
    let data = vec![offset as u8 | 1; len];
    image.write_at(&data, offset).map_err(text)?;
    expected[offset as usize..][..len].copy_from_slice(&data);
    Ok(())
}

fn grow(image: &Image, expected: &mut Vec<u8>) -> Outcome {
    let size = (image.virtual_size() + MIB) / 512 * 512;
    let how = ResizeOptions::default();
    image.resize(size, &how).map_err(text)?;
    expected.resize(size as usize, 0);
    Ok(())
}

/// Formats, and options of qemu-img for them.
const FORMATS: &[(&str, &str, &str)] = &[
    ("disk.vmdk", "vmdk", "subformat=monolithicSparse"),
    ("flat.vmdk", "vmdk", "subformat=monolithicFlat"),
    ("several.vmdk", "vmdk", "subformat=twoGbMaxExtentSparse"),
    ("disk.vhd", "vpc", "force_size=on"),
    ("fixed.vhd", "vpc", "subformat=fixed,force_size=on"),
    ("disk.vhdx", "vhdx", "block_size=1M"),
    ("fixed.vhdx", "vhdx", "subformat=fixed"),
];

fn every_format_works_on(pool: &Arc<Pool>) -> Outcome {
    for (name, format, options) in FORMATS {
        let dir = tempfile::tempdir().map_err(text)?;
        let path = dir.path().join(name);
        let create = ["create", "-q", "-f", format, "-o", options];
        let at = path.to_string_lossy();
        run("qemu-img", &[&create[..], &[&*at, "8M"]].concat())?;
        format_works_on(pool, dir.path(), &path, format)
            .map_err(|said| format!("{name}: {said}"))?;
    }
    Ok(())
}

fn format_works_on(pool: &Arc<Pool>, dir: &Path, path: &Path, format: &str) -> Outcome {
    let image = open(pool, path, format, Access::Write)?;
    let mut expected = vec![0; 8 << 20];
    for offset in [0, 5 * MIB - 700] {
        rest(&image)?;
        write(&image, &mut expected, offset, 3000)?;
        image.flush().map_err(text)?;
    }
    rest(&image)?;
    same(&content(&image)?, &expected, "read")?;
    rest(&image)?;
    grow(&image, &mut expected)?;
    rest(&image)?;
    write(&image, &mut expected, 8 * MIB, 100_000)?;
    image.flush().map_err(text)?;
    rest(&image)?;
    same(&content(&image)?, &expected, "read at last")?;
    drop(image);
    let raw = dir.join("raw");
    std::fs::write(&raw, &expected).map_err(text)?;
    let (raw, path) = (raw.to_string_lossy(), path.to_string_lossy());
    run(
        "qemu-img",
        &["compare", "-f", "raw", "-F", format, &raw, &path],
    )
    .map(drop)
}

/// Somebody who ignores the lock, and does not change what files' attributes
/// tell.
fn changed_is_stale(pool: &Arc<Pool>) -> Outcome {
    let dir = tempfile::tempdir().map_err(text)?;
    let path = dir.path().join("disk.qcow2");
    let create = ["create", "-q", "-f", "qcow2"];
    let other = dir.path().join("other.qcow2");
    for (path, size) in [(&path, "8M"), (&other, "9M")] {
        let at = path.to_string_lossy();
        run("qemu-img", &[&create[..], &[&*at, size]].concat())?;
    }
    let before = std::fs::read(&path).map_err(text)?;
    let image = open(pool, &path, "qcow2", Access::Write)?;
    image.rest(Duration::ZERO);
    let changed = std::fs::read(&other).map_err(text)?;
    equal(changed.len(), before.len(), "length")?;
    std::fs::write(&path, &changed).map_err(text)?;
    let error = image.write_at(&[1; 512], 0).err().ok_or("was written")?;
    equal(error.errno(), libc::ESTALE, "errno")?;
    drop(image);
    same(&std::fs::read(&path).map_err(text)?, &changed, "the file")
}
