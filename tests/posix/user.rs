//! The call families as an ordinary user: this program runs itself again as
//! somebody who owns nothing, in a mount namespace of its own in which everybody
//! may open /dev/fuse. /dev/kvm stays closed to him.

use crate::machine::{missing_program, trial};
use crate::{FAMILIES_ONLY, ROOT, missing_tool};
use libtest_mimic::Trial;
use std::path::Path;
use std::process::Command;

/// Who owns nothing.
const NOBODY: &str = "65534";
/// What the namespace needs, as its root; then the program as the user.
const SCRIPT: &str = "set -e
mount -t tmpfs tmpfs \"$1\"
mknod -m 666 \"$1/fuse\" c 10 229
mount --bind \"$1/fuse\" /dev/fuse
shift
exec setpriv --reuid=$NOBODY --regid=$NOBODY --clear-groups \"$@\"";

/// The trial, and why it cannot be made here, if that is so.
pub fn trials() -> Vec<Trial> {
    vec![trial(
        "user::the_call_families_work_for_him",
        missing(),
        as_nobody,
    )]
}

fn missing() -> Option<String> {
    missing_tool(&[ROOT])
        .or_else(|| missing_program(&["unshare", "setpriv", "mknod", "fusermount3"]))
        .or_else(|| {
            let found = [std::env::current_exe().ok()?, crate::rig::INSTAR.into()];
            found.iter().find_map(|path| hidden_from_others(path))
        })
}

/// Why others cannot run a program, if that is so.
fn hidden_from_others(path: &Path) -> Option<String> {
    let run = Command::new("setpriv")
        .args([&format!("--reuid={NOBODY}"), "--clear-groups", "test", "-x"])
        .arg(path)
        .status();
    let found = run.is_ok_and(|status| status.success());
    (!found).then(|| format!("{} is hidden from other users", path.display()))
}

fn as_nobody() -> Result<(), String> {
    let dir = tempfile::tempdir().map_err(|error| error.to_string())?;
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let output = Command::new("unshare")
        .args(["--mount", "--propagation=private", "sh", "-c", SCRIPT, "sh"])
        .arg(dir.path())
        .arg(program)
        .env("NOBODY", NOBODY)
        .env(FAMILIES_ONLY, "1")
        .env("HOME", "/")
        .env_remove("INSTAR_ISOLATION")
        .output()
        .map_err(|error| error.to_string())?;
    let said = String::from_utf8_lossy(&output.stdout);
    let passed = said
        .split_once("test result: ok. ")
        .and_then(|(_, rest)| rest.split(' ').next()?.parse::<usize>().ok());
    match passed {
        Some(passed) if output.status.success() && passed >= LEAST => {
            println!("an ordinary user: {passed} proofs");
            Ok(())
        }
        _ => {
            let errors = String::from_utf8_lossy(&output.stderr);
            Err(format!("{}: {said}\n{errors}", output.status))
        }
    }
}

/// Proofs that do not need root, of all formats together.
const LEAST: usize = 90;
