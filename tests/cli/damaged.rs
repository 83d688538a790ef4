//! Checks and repairs of damaged images, by both programs on a copy each.
//!
//! What instar says beyond qemu-img are warnings, which are left out here.

use crate::live::{FILLED, IMG, IO, copy, folder, must, patched};
use crate::machine::{Outcome, qemu_img, qemu_img_version};
use crate::transcript::{self, Step, words};
use serde_json::Value;
use tempfile::TempDir;

/// Damage, and the checks that have to find and repair the same.
pub struct Damage {
    pub name: &'static str,
    make: &'static [(&'static str, &'static str)],
    /// Offsets, and the bytes that are written there.
    patch: &'static [(u64, &'static [u8])],
    /// Lists of commands, each for a copy of its own.
    pub asked: &'static [&'static [&'static str]],
}

const LOOK: &[&str] = &["check disk", "check --output=json disk"];
const LEAKS: &[&str] = &["check -r leaks disk", "check disk"];
const ALL: &[&str] = &["check -r all disk", "check disk"];
const ALL_JSON: &[&str] = &["check -r all --output=json disk"];

const REPAIRED: &[&[&str]] = &[LOOK, LEAKS, ALL, ALL_JSON];
/// Where qemu-img gives up while it rebuilds the reference counts, or puts them
/// at another place.
const NOT_REBUILT: &[&[&str]] = &[LOOK, LEAKS];
/// Where only instar repairs the format.
const LOOKED_AT: &[&[&str]] = &[LOOK];

const fn damage(
    name: &'static str,
    make: &'static [(&'static str, &'static str)],
    patch: &'static [(u64, &'static [u8])],
    asked: &'static [&'static [&'static str]],
) -> Damage {
    Damage {
        name,
        make,
        patch,
        asked,
    }
}

/// [`FILLED`] with a snapshot: its L1 table is cluster 9.
const SNAPSHOT: &[(&str, &str)] = &[FILLED[0], FILLED[1], (IMG, "snapshot -c one disk")];
/// Grains of 64 KiB from 0x1_0000 on.
const VMDK: &[(&str, &str)] = &[
    (IMG, "create -q -f vmdk disk 1M"),
    (IO, "-f vmdk -c write~0~200k disk"),
];
const VMDK_CUT: &[(&str, &str)] = &[VMDK[0], VMDK[1], ("truncate", "-s 200k disk")];
/// Blocks of 8 MiB from 8 MiB on.
const VHDX: &[(&str, &str)] = &[
    (IMG, "create -q -f vhdx disk 20M"),
    (IO, "-f vhdx -c write~0~200k -c write~10M~64k disk"),
];

// Of `FILLED`, as its comment says.
const TABLE: u64 = 0x1_0000;
const COUNTS: u64 = 0x2_0000;
const L1: u64 = 0x3_0000;
const L2: u64 = 0x4_0000;
// The grain directory and the grain table that are used.
const GRAIN_DIRECTORY: u64 = 0x3400;
const GRAINS: u64 = 0x3600;
const BAT: u64 = 0x20_0000;

#[rustfmt::skip] // A table.
pub const DAMAGES: &[Damage] = &[
    damage("qcow2, leak", FILLED, &[(COUNTS + 12, &[0, 2])], REPAIRED),
    damage("qcow2, count 0", FILLED, &[(COUNTS + 10, &[0, 0])], REPAIRED),
    damage("qcow2, count 0 and a leak", FILLED, &[(COUNTS + 10, &[0, 0, 0, 2])], REPAIRED),
    damage("qcow2, data without COPIED", FILLED, &[(L2, &[0])], REPAIRED),
    damage("qcow2, table without COPIED", FILLED, &[(L1, &[0])], REPAIRED),
    damage("qcow2, both without COPIED", FILLED, &[(L2, &[0]), (L1, &[0])], REPAIRED),
    damage("qcow2, two entries for one cluster, counted", FILLED, &[(COUNTS + 10, &[0, 2]), (L2 + 13, &[5])], REPAIRED),
    damage("qcow2, two entries for one cluster", FILLED, &[(L2 + 13, &[5])], REPAIRED),
    damage("qcow2, data at no cluster", FILLED, &[(L2 + 6, &[2])], REPAIRED),
    damage("qcow2, table at no cluster", FILLED, &[(L1 + 6, &[2])], REPAIRED),
    damage("qcow2, counts at no cluster", FILLED, &[(TABLE + 6, &[2])], NOT_REBUILT),
    damage("qcow2, data over the header", FILLED, &[(L2 + 5, &[0])], REPAIRED),
    damage("qcow2, data over the L1 table", FILLED, &[(L2 + 5, &[3])], REPAIRED),
    damage("qcow2, data over the counts", FILLED, &[(L2 + 5, &[2])], NOT_REBUILT),
    damage("qcow2, table past the end", FILLED, &[(L1 + 1, &[4])], REPAIRED),
    damage("qcow2, table just past the end", FILLED, &[(L1 + 5, &[0x10])], REPAIRED),
    damage("qcow2, data past the end", FILLED, &[(L2 + 5, &[0x20])], REPAIRED),
    damage("qcow2, compressed data past the end", FILLED, &[(L2, &[0x40, 0, 0, 0, 0, 0x90])], REPAIRED),
    damage("qcow2, counts past the end", FILLED, &[(TABLE + 13, &[0x40])], NOT_REBUILT),
    damage("qcow2, reserved bits of data", FILLED, &[(L2 + 7, &[2])], REPAIRED),
    damage("qcow2, reserved bits of a table", FILLED, &[(L1 + 7, &[1])], REPAIRED),
    damage("qcow2, reserved bits of counts", FILLED, &[(TABLE + 7, &[1])], NOT_REBUILT),
    damage("qcow2, snapshot's table not counted", SNAPSHOT, &[(COUNTS + 18, &[0, 0])], REPAIRED),
    damage("vmdk, grain past the end", VMDK, &[(GRAINS + 8, &[0, 0, 0x10])], LOOKED_AT),
    damage("vmdk, two entries for one grain", VMDK, &[(GRAINS + 4, &[0x80, 0])], LOOKED_AT),
    damage("vmdk, table past the end", VMDK, &[(GRAIN_DIRECTORY, &[0, 0, 0x10])], LOOKED_AT),
    damage("vmdk, cut", VMDK_CUT, &[], LOOKED_AT),
    damage("vhdx, block past the end", VHDX, &[(BAT + 2, &[0x30, 6])], REPAIRED),
    damage("vhdx, unknown state", VHDX, &[(BAT, &[5])], REPAIRED),
    damage("vhdx, header", VHDX, &[(0x1_0010, &[9])], NOT_REBUILT),
];

impl Damage {
    /// A folder with the damaged image, always by the qemu-img of the machine.
    pub fn made(&self) -> Result<TempDir, String> {
        let damaged = folder()?;
        for (program, line) in self.make {
            must(damaged.path(), program, line)?;
        }
        for (offset, bytes) in self.patch {
            patched(damaged.path(), "disk", *offset, bytes)?;
        }
        Ok(damaged)
    }

    /// Whether a version is known to say something else than instar.
    pub fn is_known(&self, version: &str, line: &str) -> bool {
        crate::changed::is_known(version, self.name, line)
    }
}

/// Both say the same of the damage, and of what they leave of it.
pub fn as_qemu_img(damage: &Damage, sandbox: &str) -> Outcome {
    let version = qemu_img_version()?;
    let damaged = damage.made()?;
    for commands in damage.asked {
        let (theirs, ours) = (copy(damaged.path())?, copy(damaged.path())?);
        for line in *commands {
            let expected = transcript::run(theirs.path(), qemu_img(), &words(line), &[])?;
            let got = crate::instar_now(ours.path(), sandbox, &words(line))?;
            if !damage.is_known(&version, line) {
                same(expected, got)?;
            }
        }
    }
    Ok(())
}

/// Compares without warnings, and without what comes behind a rebuild.
pub fn same(expected: Step, got: Step) -> Outcome {
    transcript::same(&comparable(expected)?, &comparable(got)?)
}

/// Without warnings, and without what comes behind a rebuild: each program puts
/// the counts where it likes, and qemu-img then repairs what it has left.
fn comparable(mut step: Step) -> Result<Step, String> {
    let mut rebuilt = false;
    let mut stderr = String::new();
    for line in step.stderr.lines() {
        rebuilt |= line == "Rebuilding refcount structure";
        let known = ["instar: warning: ", "qcow2: "]
            .iter()
            .any(|beginning| line.starts_with(beginning));
        if !(known || rebuilt && line.starts_with("Repairing cluster ")) {
            stderr.push_str(line);
            stderr.push('\n');
        }
    }
    step.stderr = stderr;
    if step.stdout.starts_with('{') {
        let mut json: Value =
            serde_json::from_str(&step.stdout).map_err(|error| error.to_string())?;
        if let Some(all) = json.as_object_mut() {
            all.shift_remove("warnings");
        }
        step.stdout = format!("{json:#}\n");
    }
    Ok(step)
}
