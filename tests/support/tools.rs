//! Programs that we did not write, and scratch space for them.

use std::path::Path;
use std::process::Command;

/// Seconds after which a program counts as hung.
const PATIENCE: &str = "60";

/// How a program ended.
pub struct Outcome {
    /// Its exit status; 124 when it hung, -1 when a signal ended it.
    pub code: i32,
    /// Both its streams.
    pub text: String,
}

impl Outcome {
    /// Exit status and the first lines of what it said.
    pub fn brief(&self) -> String {
        let lines: Vec<&str> = self.text.lines().take(3).collect();
        format!("exit {}: {}", self.code, lines.join(" | "))
    }
}

/// Runs a program to its end.
pub fn run(dir: &Path, program: &str, arguments: &[&str]) -> Result<Outcome, String> {
    let output = Command::new("timeout")
        .arg(PATIENCE)
        .arg(program)
        .args(arguments)
        .current_dir(dir)
        .output()
        .map_err(|error| format!("timeout {program}: {error}"))?;
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    Ok(Outcome {
        code: output.status.code().unwrap_or(-1),
        text,
    })
}

/// Runs `qemu-img`.
pub fn qemu_img(dir: &Path, arguments: &[&str]) -> Result<Outcome, String> {
    run(dir, "qemu-img", arguments)
}

/// Runs a program that has to succeed.
pub fn must(dir: &Path, program: &str, arguments: &[&str]) -> Result<Outcome, String> {
    let outcome = run(dir, program, arguments)?;
    match outcome.code {
        0 => Ok(outcome),
        _ => Err(format!("{program} {arguments:?}: {}", outcome.brief())),
    }
}

/// Why the oracles cannot be asked on this machine, if they cannot.
pub fn missing_oracle() -> Option<String> {
    ["qemu-img", "qemu-io"].iter().find_map(|program| {
        let found = Command::new(program).arg("--version").output().is_ok();
        (!found).then(|| format!("{program} is not installed"))
    })
}

/// A directory that vanishes with its owner; in memory where the machine has
/// a filesystem for that, since thousands of states are written there.
pub fn scratch() -> Result<tempfile::TempDir, String> {
    let memory = Path::new("/dev/shm");
    let made = if memory.is_dir() {
        tempfile::tempdir_in(memory)
    } else {
        tempfile::tempdir()
    };
    made.map_err(|error| format!("scratch directory: {error}"))
}

/// Reads a whole file.
pub fn read(path: &Path) -> Result<Vec<u8>, String> {
    std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))
}

/// Writes a whole file.
pub fn write(path: &Path, bytes: &[u8]) -> Result<(), String> {
    std::fs::write(path, bytes).map_err(|error| format!("{}: {error}", path.display()))
}
