//! The mount as programs see it. `doc/SEMANTICS.md` says what every call does;
//! the bodies here are written once and run on the real mount for every variant
//! of image, and for the usual ones in both sandboxes; `INSTAR_ISOLATION` names
//! one that has them all. Judges are programs that are not ours: cmp, e2fsck,
//! qemu-img, the kernel's loop device.

mod content;
mod daemon;
mod demo;
mod failures;
mod faults;
mod filesystems;
mod formats;
mod fsx;
mod grow;
mod idle;
mod images;
mod injected;
mod kill;
mod lock_table;
mod locks;
mod model;
mod names;
mod namespace;
mod powerloss;
mod programs;
mod record;
mod rig;
mod shrink;
mod space;
mod tools;
mod traffic;
mod user;
mod ways;
mod zero;

#[expect(dead_code, reason = "the crash explorer's own program uses all of it")]
#[path = "../../guest/tests/crash/explorer.rs"]
mod explorer;
#[allow(dead_code)] // Shared: not every test binary needs all of it.
#[path = "../support/machine.rs"]
mod machine;
#[path = "../support/xattr.rs"]
mod xattr;

use explorer::random;
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

/// Proofs that run at a time: most of their time they wait for the daemon's
/// clock, the kernel's or each other's disks.
const AT_A_TIME: usize = 4;

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(AT_A_TIME);
    let originals = Arc::new(Originals::new());
    let mut trials = Vec::new();
    let as_user = std::env::var_os(FAMILIES_ONLY).is_some();
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
        for (variant, claim) in proofs(as_user) {
            let usual = variant.plain || variant.is_usual();
            if whole || (usual && !claim.one_sandbox) {
                trials.push(make(sandbox, variant, claim, &missing, &originals));
            }
        }
    }
    if !as_user {
        trials.extend(user::trials());
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// Images, and what is proven of them: all there is, or what an ordinary user has
/// to be shown.
fn proofs(as_user: bool) -> Vec<(&'static Variant, &'static Claim)> {
    let mut proofs = Vec::new();
    let mut add = |variant, claims: &[&'static [Claim]]| {
        proofs.extend(
            claims
                .iter()
                .copied()
                .flatten()
                .map(|claim| (variant, claim)),
        );
    };
    let others = images::OTHERS;
    if as_user {
        let plain = |variant: &&Variant| variant.plain || variant.is_usual();
        VARIANTS
            .iter()
            .filter(plain)
            .for_each(|variant| add(variant, &[content::CLAIMS, content::WRITTEN, grow::CLAIMS]));
        let all = VARIANTS.iter().chain(others);
        all.filter(plain).for_each(|variant| add(variant, FAMILIES));
        return proofs;
    }
    VARIANTS.iter().for_each(|variant| add(variant, EVERY));
    others.iter().for_each(|variant| add(variant, RESIZED));
    // The plainest image of each format.
    for variant in VARIANTS.iter().filter(|variant| variant.plain) {
        add(variant, PLAIN);
        add(variant, USUAL);
    }
    for variant in others.iter().filter(|variant| variant.is_usual()) {
        add(variant, USUAL);
    }
    images::WAYS.iter().for_each(|variant| add(variant, WAYS));
    add(&VARIANTS[1], &[ways::PASSED]);
    add(&images::WAYS[2], &[ways::GATHERED, filesystems::CLAIMS]);
    add(&images::STREAM, &[formats::READ_ONLY]);
    add(&VARIANTS[0], ONCE);
    proofs
}

/// Set where only the call families are to be proven, for one image of each
/// format.
pub const FAMILIES_ONLY: &str = "INSTAR_POSIX_FAMILIES";

/// What an ordinary user does with his images.
const FAMILIES: &[&[Claim]] = &[
    content::TIMES,
    grow::SIZES,
    grow::SPACE,
    namespace::CLAIMS,
    namespace::WRITTEN,
];

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
    content::WRITTEN,
    content::TIMES,
    zero::CLAIMS,
    model::CLAIMS,
    kill::CLAIMS,
    grow::SIZES,
    grow::SPACE,
    grow::CLAIMS,
    grow::BOUNDS,
    namespace::CLAIMS,
    shrink::CLAIMS,
    shrink::EMPTIED,
    traffic::CLAIMS,
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
    traffic::CLAIMS,
];

/// What the ways between the kernel and instar have to do with.
const WAYS: &[&[Claim]] = &[
    content::WRITTEN,
    content::TIMES,
    model::CLAIMS,
    kill::CLAIMS,
    grow::SIZES,
    grow::CLAIMS,
    shrink::CLAIMS,
];

/// What concerns the mount more than the image.
const PLAIN: &[&[Claim]] = &[
    filesystems::CLAIMS,
    locks::CLAIMS,
    failures::CLAIMS,
    programs::CLAIMS,
];

/// For one image of each format.
const USUAL: &[&[Claim]] = &[
    failures::USUAL,
    filesystems::USUAL,
    fsx::CLAIMS,
    injected::CLAIMS,
    namespace::WRITTEN,
    powerloss::CLAIMS,
    programs::USUAL,
    space::CLAIMS,
    traffic::USUAL,
];

/// One run kills the daemon at least fifty times.
const _: () = assert!(kill::KILLS * (VARIANTS.len() + images::OTHERS.len()) >= 50);

/// Needed where the answer of qemu-img itself is the expectation.
pub const QEMU_IMG_10: &str = "qemu-img 10";
/// Needed where the kernel has to use raw images by itself.
pub const PASSTHROUGH: &str = "passthrough";
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
        PASSTHROUGH => ways::missing_passthrough(),
        ROOT => (!nix::unistd::geteuid().is_root()).then(|| "needs root".to_owned()),
        device if device.starts_with('/') => missing_device(device),
        program => missing_program(&[program]),
    })
}
