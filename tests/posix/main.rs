//! The mount as programs see it. `doc/SEMANTICS.md` says what every call does;
//! the bodies here are written once and run on the real mount for every variant
//! of image, and for the usual ones in both sandboxes; `INSTAR_ISOLATION` names
//! one that has them all. Judges are programs that are not ours: cmp, e2fsck,
//! qemu-img, the kernel's loop device.

mod content;
mod daemon;
mod demo;
mod failures;
mod filesystems;
mod formats;
mod grow;
mod idle;
mod images;
mod kill;
mod lock_table;
mod locks;
mod model;
mod names;
mod namespace;
mod programs;
mod rig;
mod shrink;
mod space;
mod tools;
mod zero;

#[allow(dead_code)] // Shared: not every test binary needs all of it.
#[path = "../support/machine.rs"]
mod machine;
#[path = "../support/random.rs"]
mod random;
#[path = "../support/xattr.rs"]
mod xattr;

use images::{Originals, VARIANTS, Variant};
use libtest_mimic::{Arguments, Trial};
use machine::{
    missing_device, missing_for_mounts, missing_program, missing_qemu_img_10, sandboxes, trial,
};
use rig::Rig;
use std::process::ExitCode;
use std::sync::Arc;

/// A claim, what it needs besides the mount, and the proof.
pub struct Claim {
    name: &'static str,
    needs: &'static [&'static str],
    one_sandbox: bool,
    body: fn(&Rig),
}

/// Shorthand for tables of claims.
pub const fn claim(name: &'static str, needs: &'static [&'static str], body: fn(&Rig)) -> Claim {
    Claim {
        name,
        needs,
        one_sandbox: false,
        body,
    }
}

impl Claim {
    /// The same, proven in one sandbox: it takes long, and is about what is done
    /// to the image's files rather than where its metadata is read.
    pub const fn in_one_sandbox(self) -> Self {
        Self {
            one_sandbox: true,
            ..self
        }
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let originals = Arc::new(Originals::new());
    let mut trials = Vec::new();
    // The first that there is has all trials, others those of usual images.
    let one = sandboxes()
        .into_iter()
        .find(|(_, missing)| missing.is_none());
    let one = one.map(|(sandbox, _)| sandbox);
    for (sandbox, missing) in sandboxes() {
        let missing = missing
            .or_else(missing_for_mounts)
            .or_else(|| missing_program(PROGRAMS));
        let whole = one.is_none_or(|one| one == sandbox);
        let mut add = |variant: &'static Variant, claim: &'static Claim| {
            let usual = variant.plain || variant.is_usual();
            if whole || (usual && !claim.one_sandbox) {
                trials.push(make(sandbox, variant, claim, &missing, &originals));
            }
        };
        for variant in VARIANTS {
            for claim in EVERY.iter().copied().flatten() {
                add(variant, claim);
            }
        }
        // The plainest image of each format.
        for variant in VARIANTS.iter().filter(|variant| variant.plain) {
            for claim in PLAIN.iter().copied().flatten() {
                add(variant, claim);
            }
        }
        for variant in images::OTHERS {
            for claim in RESIZED.iter().copied().flatten() {
                add(variant, claim);
            }
        }
        for variant in images::OTHERS.iter().filter(|variant| variant.is_usual()) {
            for claim in [namespace::WRITTEN, filesystems::USUAL]
                .into_iter()
                .flatten()
            {
                add(variant, claim);
            }
        }
        for claim in formats::READ_ONLY {
            add(&images::STREAM, claim);
        }
        for claim in ONCE.iter().copied().flatten() {
            add(&VARIANTS[0], claim);
        }
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// What concerns the mount as a whole.
const ONCE: &[&[Claim]] = &[
    names::CLAIMS,
    namespace::ONCE,
    daemon::CLAIMS,
    demo::CLAIMS,
    idle::CLAIMS,
    lock_table::CLAIMS,
];

/// For every variant of qcow2 and raw.
const EVERY: &[&[Claim]] = &[
    content::CLAIMS,
    content::TIMES,
    zero::CLAIMS,
    model::CLAIMS,
    kill::CLAIMS,
    grow::SIZES,
    grow::SPACE,
    grow::CLAIMS,
    namespace::CLAIMS,
    shrink::CLAIMS,
    shrink::EMPTIED,
];

/// For the other formats, whose disks are read and resized.
const RESIZED: &[&[Claim]] = &[
    formats::CLAIMS,
    content::TIMES,
    formats::SPACE,
    zero::CLAIMS,
    model::CLAIMS,
    kill::CLAIMS,
    filesystems::CLAIMS,
    grow::SIZES,
    grow::SPACE,
    namespace::CLAIMS,
    shrink::CLAIMS,
];

/// What concerns the mount more than the image.
const PLAIN: &[&[Claim]] = &[
    filesystems::CLAIMS,
    filesystems::USUAL,
    locks::CLAIMS,
    failures::CLAIMS,
    namespace::WRITTEN,
    programs::CLAIMS,
    space::CLAIMS,
];

/// Needed where the answer of qemu-img itself is the expectation.
pub const QEMU_IMG_10: &str = "qemu-img 10";
/// Needed where a filesystem of the kernel is mounted.
pub const ROOT: &str = "root";

/// What every proof needs.
const PROGRAMS: &[&str] = &["qemu-img", "mkfs.ext4", "timeout", "cmp"];

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

/// Devices by their path, programs by their name.
fn missing_tool(needs: &[&str]) -> Option<String> {
    needs.iter().find_map(|&need| match need {
        QEMU_IMG_10 => missing_qemu_img_10(),
        ROOT => (!nix::unistd::geteuid().is_root()).then(|| "needs root".to_owned()),
        device if device.starts_with('/') => missing_device(device),
        program => missing_program(&[program]),
    })
}
