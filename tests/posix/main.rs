//! The mount as programs see it. `doc/SEMANTICS.md` says what every call does;
//! the bodies here are written once and run on the real mount for every variant
//! of image and in both sandboxes. Judges are programs that are not ours: cmp,
//! e2fsck, qemu-img, the kernel's loop device.

mod content;
mod daemon;
mod failures;
mod grow;
mod images;
mod locks;
mod names;
mod rig;
mod tools;

#[path = "../support/machine.rs"]
#[allow(dead_code)]
mod machine;

use images::{Originals, VARIANTS, Variant};
use libtest_mimic::{Arguments, Trial};
use machine::{missing_program, sandboxes, trial};
use rig::Rig;
use std::fs::File;
use std::process::ExitCode;
use std::sync::Arc;

/// A claim, what it needs besides the mount, and the proof.
pub struct Claim {
    name: &'static str,
    needs: &'static [&'static str],
    body: fn(&Rig),
}

/// Shorthand for tables of claims.
pub const fn claim(name: &'static str, needs: &'static [&'static str], body: fn(&Rig)) -> Claim {
    Claim { name, needs, body }
}

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let originals = Arc::new(Originals::new());
    let mut trials = Vec::new();
    for (sandbox, missing) in sandboxes() {
        let missing = missing.or_else(missing_for_mounts);
        for variant in VARIANTS {
            for claim in [content::CLAIMS, grow::CLAIMS].into_iter().flatten() {
                trials.push(make(sandbox, variant, claim, &missing, &originals));
            }
        }
        // What concerns the mount more than the image: the plainest image of
        // each format.
        for variant in VARIANTS.iter().filter(|variant| variant.plain) {
            for claim in [locks::CLAIMS, failures::CLAIMS].into_iter().flatten() {
                trials.push(make(sandbox, variant, claim, &missing, &originals));
            }
        }
        for claim in [names::CLAIMS, daemon::CLAIMS].into_iter().flatten() {
            trials.push(make(sandbox, &VARIANTS[0], claim, &missing, &originals));
        }
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// What every proof needs.
const PROGRAMS: &[&str] = &["qemu-img", "mkfs.ext4", "timeout", "cmp"];

/// Why nothing can be mounted here, if that is so.
fn missing_for_mounts() -> Option<String> {
    if let Some(reason) = missing_device("/dev/fuse") {
        return Some(reason);
    }
    if !nix::unistd::geteuid().is_root()
        && let Some(reason) = missing_program(&["fusermount3"])
    {
        return Some(reason);
    }
    missing_program(PROGRAMS)
}

fn make(
    sandbox: &'static str,
    variant: &'static Variant,
    claim: &'static Claim,
    missing: &Option<String>,
    originals: &Arc<Originals>,
) -> Trial {
    let originals = Arc::clone(originals);
    let missing = missing.clone().or_else(|| missing_tool(claim.needs));
    trial(
        format!("{sandbox}::{}::{}", variant.name, claim.name),
        missing,
        move || {
            (claim.body)(&Rig::new(sandbox, variant, originals));
            Ok(())
        },
    )
}

fn missing_tool(needs: &[&str]) -> Option<String> {
    let (devices, programs): (Vec<&str>, Vec<&str>) =
        needs.iter().partition(|need| need.starts_with('/'));
    devices
        .into_iter()
        .find_map(missing_device)
        .or_else(|| missing_program(&programs))
}

fn missing_device(path: &str) -> Option<String> {
    let opened = File::options().read(true).write(true).open(path);
    opened.err().map(|error| format!("{path}: {error}"))
}
