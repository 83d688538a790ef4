//! The explorer: cases, the states that a crash can leave of them, and those
//! who judge the states. It knows the engine and files in memory; it never
//! opens a device, and it is not told what the engine means to do.

pub mod bytes;
pub mod case;
pub mod disk;
pub mod engine;
pub mod explore;
pub mod judge;
#[path = "../../../tests/support/random.rs"]
pub mod random;
pub mod readers;
pub mod report;
pub mod setup;
#[allow(dead_code, reason = "other test programs use the rest")]
#[path = "../../../tests/support/tools.rs"]
pub mod tools;

pub mod qcow2;
pub mod qcow2_repair;
pub mod qcow2_shrink;
pub mod qcow2_size;
pub mod raw;
pub mod vhd;
pub mod vhdx;
pub mod vmdk;

use case::Case;
use instar_guest::Format;

/// The seed where the environment names none: runs are alike by default.
const SEED: u64 = 0x1257_a12c;

/// Every case of every format.
pub fn cases() -> impl Iterator<Item = &'static Case> {
    let qcow2 = [
        qcow2::GROWS,
        qcow2::ENDS,
        qcow2::WRITES,
        qcow2_shrink::SHRINKS,
        qcow2_shrink::REPAIRS,
        qcow2_size::COUNTED,
        qcow2_size::ALLOCATES,
    ];
    let others = [raw::CASES, vhd::CASES, vhdx::CASES, vmdk::CASES];
    let repairs = [qcow2_repair::CASES];
    qcow2.into_iter().chain(repairs).chain(others).flatten()
}

/// Whether qemu-img is shown each state, and not only the telling ones and one of
/// a few: `INSTAR_CRASH_ALL` asks for that, which takes some minutes.
pub fn shows_all() -> bool {
    std::env::var_os("INSTAR_CRASH_ALL").is_some()
}

/// What the random subsets are drawn from; `INSTAR_CRASH_SEED` repeats those of
/// an earlier run.
pub fn seed() -> u64 {
    let given = std::env::var("INSTAR_CRASH_SEED").ok();
    given.and_then(|text| text.parse().ok()).unwrap_or(SEED)
}

/// A case's name among all.
pub fn full_name(case: &Case) -> String {
    let format = match case.format {
        Format::Vhd => "vhd",
        other => other.name(),
    };
    format!("{format}/{}", case.name)
}
