//! The file system exerciser `fsx`, which keeps the file in its memory and
//! compares whatever it reads.
//!
//! `INSTAR_FSX_SEED` repeats the calls of an earlier run.

use crate::random::Random;
use crate::rig::Rig;
use crate::tools::run_for;
use crate::{Claim, claim};
use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;

/// What is proven here, for one image of each format.
pub const CLAIMS: &[Claim] = &[
    claim("fsx_finds_an_ordinary_file", &["fsx"], an_ordinary_file).in_one_sandbox(),
    claim("fsx_finds_an_ordinary_device", &["fsx"], an_ordinary_device).in_one_sandbox(),
];

/// Calls on a file that `fsx` makes itself, and on a disk that keeps its size.
const CALLS: u64 = 20_000;
const CALLS_ON_DISK: u64 = 3_000;
/// The most bytes of the file.
const SIZE: u64 = 1 << 20;
/// Far more than `fsx` needs.
const PATIENCE: Duration = Duration::from_secs(300);

/// What it does and how often. The sizes that it truncates to and the offsets
/// at which it allocates are not aligned, whatever it is told.
fn config(head: &str, align: u64, close: u32, any_size: u32) -> String {
    format!(
        "{head}
        [opsize]
        align = {align}
        [weights]
        close_open = {close}
        invalidate = 1
        truncate = {any_size}
        posix_fallocate = {any_size}
        fsync = 1
        fdatasync = 1
        read = 10
        write = 10
        mapread = 5
        mapwrite = 5
        punch_hole = 3
        sendfile = 2
        posix_fadvise = 1
        copy_file_range = 2
        "
    )
}

/// From an empty file, which becomes an image by the first write and grows by
/// others, or any size and offset where the format has no sectors.
fn an_ordinary_file(rig: &Rig) {
    let unit = rig.variant.size_unit;
    let config = config(&format!("flen = {SIZE}"), unit, 1, u32::from(unit == 1) * 2);
    exercise(rig, &config, CALLS, |_| ());
}

/// A disk of a fixed size, at any offset.
fn an_ordinary_device(rig: &Rig) {
    exercise(
        rig,
        &config("blockmode = true", 1, 0, 0),
        CALLS_ON_DISK,
        |path| {
            File::create(path).unwrap().set_len(SIZE).unwrap();
        },
    );
}

fn exercise(rig: &Rig, config: &str, calls: u64, make: impl FnOnce(&Path)) {
    let seed = std::env::var("INSTAR_FSX_SEED").ok();
    let seed = seed.map_or_else(
        || Random(u64::from(std::process::id())).next(),
        |text| text.parse().expect("INSTAR_FSX_SEED is a number"),
    );
    println!("{}: INSTAR_FSX_SEED={seed}", rig.variant.name);
    // In memory: there are thousands of flushes, and durability is not the claim.
    let source = crate::explorer::tools::scratch().unwrap();
    let mount = rig.mount_source(source.path(), "shrink");
    make(&mount.disk);
    let file = rig.path("fsx.toml");
    fs::write(&file, config).unwrap();
    let (file, artifacts) = (file.to_str().unwrap(), rig.path(""));
    let (seed, calls) = (seed.to_string(), calls.to_string());
    let how = ["-f", file, "-S", &seed, "-N", &calls, "-P"];
    let paths = [artifacts.to_str().unwrap(), mount.disk.to_str().unwrap()];
    let said = run_for(PATIENCE, "fsx", &[&how[..], &paths].concat());
    assert!(said.contains("All operations completed"), "{said}");
    mount.unmount();
    rig.with_image(source.path().join(rig.variant.file)).check();
}
