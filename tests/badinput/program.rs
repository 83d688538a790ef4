//! Runs the program on damaged input: bounded in time and memory, and watched
//! for ends that no input may bring about.

use crate::tools::{Outcome, run};
use std::path::Path;

/// Seconds after which the program counts as hung.
const PATIENCE: &str = "30";
/// Address space that the program may take, in bytes: a multiple of the
/// sandbox's memory, and far less than what hostile tables ask for.
const MEMORY: &str = "--as=1073741824";
/// Text that one command may print, in bytes.
const MAX_TEXT: usize = 64 << 10;

/// Runs `instar` in a directory. An end by a signal, a hang, a panic, an exit
/// status that is not documented or endless text is an error.
pub fn instar(dir: &Path, isolation: &str, arguments: &[&str]) -> Result<Outcome, String> {
    let program = env!("CARGO_BIN_EXE_instar");
    let isolation = format!("INSTAR_ISOLATION={isolation}");
    let mut all = vec![
        MEMORY, "timeout", "-s", "KILL", PATIENCE, "env", &isolation, program,
    ];
    all.extend(arguments);
    let outcome = run(dir, "prlimit", &all)?;
    let defect = if outcome.text.contains("panicked") {
        "panicked"
    } else if !(0..=3).contains(&outcome.code) {
        "ended in a way that is not documented"
    } else if outcome.text.len() > MAX_TEXT {
        "printed without end"
    } else {
        return Ok(outcome);
    };
    Err(format!(
        "instar {arguments:?} {defect}: {}",
        outcome.brief()
    ))
}
