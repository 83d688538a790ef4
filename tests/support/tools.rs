//! Programs that we did not write, and scratch space for them.

use std::io::{Error, Read};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

/// How long a program may take before it counts as hung.
const PATIENCE: Duration = Duration::from_secs(60);
/// The status of one that did.
const HUNG: i32 = 124;

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
    let ended = || -> std::io::Result<Outcome> {
        let (mut out, into) = std::io::pipe()?;
        let child = Command::new(program)
            .args(arguments)
            .current_dir(dir)
            .stdin(Stdio::null())
            .stdout(into.try_clone()?)
            .stderr(into)
            .spawn()?;
        let child = &Mutex::new(child);
        let (done, waits) = mpsc::channel::<()>();
        thread::scope(move |scope| {
            let watch = scope.spawn(move || {
                let hangs = waits.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout);
                hangs && child.lock().is_ok_and(|mut child| child.kill().is_ok())
            });
            let mut text = Vec::new();
            out.read_to_end(&mut text)?;
            drop(done);
            let killed = watch.join().unwrap_or(false);
            let status = child.lock().map_err(|_| Error::other("poisoned"))?.wait()?;
            Ok(Outcome {
                code: match killed {
                    true => HUNG,
                    false => status.code().unwrap_or(-1),
                },
                text: String::from_utf8_lossy(&text).into_owned(),
            })
        })
    };
    ended().map_err(|error| format!("{program}: {error}"))
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
