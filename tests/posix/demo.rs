//! `instar demo`, as the README shows it.

use crate::rig::{INSTAR, Rig};
use crate::tools::run;
use crate::{Claim, claim};
use std::fs;

/// What is proven here.
pub const CLAIMS: &[Claim] = &[claim(
    "the_demo_grows_disks_and_leaves_nothing",
    &["env"],
    the_demo_grows_disks_and_leaves_nothing,
)];

/// A row of the demo's tables: the mounted file, its size in bytes, and what
/// the image says.
fn row(name: &str, bytes: u64) -> String {
    let mib = bytes >> 20;
    format!("{name} {bytes} {name} {mib} MiB")
}

fn the_demo_grows_disks_and_leaves_nothing(rig: &Rig) {
    let folder = rig.path("demo");
    fs::create_dir(&folder).unwrap();
    let temporary = format!("TMPDIR={}", folder.display());
    let words = [&temporary, INSTAR, "--isolation", rig.sandbox, "demo"];
    let said = run("env", &words);
    let said: String = said.split_inclusive('\n').map(one_space).collect();
    let (before, after) = said.split_once("\nAfter\n").expect("two tables");
    for (name, old, new) in [
        ("server.qcow2", 64 << 20, 68 << 20),
        ("backup.raw", 16 << 20, 20 << 20),
    ] {
        assert!(before.contains(&row(name, old)), "{said}");
        assert!(after.contains(&row(name, new)), "{said}");
    }
    assert!(
        after.contains("No errors were found on the image."),
        "{said}"
    );
    let left: Vec<_> = fs::read_dir(&folder).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(folder.to_str().unwrap()), "{mounts}");
}

/// A line without its alignment.
fn one_space(line: &str) -> String {
    let words: Vec<&str> = line.split_whitespace().collect();
    words.join(" ") + "\n"
}
