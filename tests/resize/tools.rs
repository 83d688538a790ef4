//! Programs, folders and bytes.

use crate::machine::{Outcome, qemu_img};
use crate::transcript::{self, QEMU_IMG, Step};
use serde_json::Value;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

const INSTAR: &str = env!("CARGO_BIN_EXE_instar");

pub fn folder() -> Result<tempfile::TempDir, String> {
    tempfile::tempdir().map_err(|error| format!("temporary folder: {error}"))
}

pub fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data")
}

/// Copies an image of `tests/data/images`, without holes.
pub fn fetch(folder: &Path, image: &str) -> Outcome {
    fs::read(data().join("images").join(image))
        .and_then(|bytes| fs::write(folder.join(image), bytes))
        .map_err(|error| format!("{image}: {error}"))
}

/// Runs instar; see `transcript::words` for the line.
pub fn instar(folder: &Path, sandbox: &str, line: &str) -> Result<Step, String> {
    let environment = [("INSTAR_ISOLATION", sandbox)];
    transcript::run(folder, INSTAR, &transcript::words(line), &environment)
}

/// Runs instar, which follows a version of qemu-img.
pub fn instar_as(version: &str, folder: &Path, sandbox: &str, line: &str) -> Result<Step, String> {
    let environment = [
        ("INSTAR_ISOLATION", sandbox),
        ("INSTAR_QEMU_VERSION", version),
    ];
    transcript::run(folder, INSTAR, &transcript::words(line), &environment)
}

/// Runs a program; qemu-img is the one that the environment names.
pub fn run(folder: &Path, program: &str, line: &str) -> Result<Step, String> {
    let program = match program {
        QEMU_IMG => qemu_img(),
        program => program,
    };
    transcript::run(folder, program, &transcript::words(line), &[])
}

/// Takes the standard output of a program that succeeded without complaint.
pub fn success(step: Step) -> Result<String, String> {
    match (step.code, step.stderr.as_str()) {
        (0, "") => Ok(step.stdout),
        _ => Err(format!("{:?}: {step:#?}", step.args)),
    }
}

/// Runs a program that has to succeed.
pub fn must(folder: &Path, program: &str, line: &str) -> Result<String, String> {
    success(run(folder, program, line)?)
}

pub fn bytes(folder: &Path, file: &str) -> Result<Vec<u8>, String> {
    fs::read(folder.join(file)).map_err(|error| format!("{file}: {error}"))
}

/// Length and allocated bytes of a file.
pub fn space(folder: &Path, file: &str) -> Result<(u64, u64), String> {
    let found = fs::metadata(folder.join(file)).map_err(|error| format!("{file}: {error}"))?;
    Ok((found.len(), found.blocks() * 512))
}

pub fn json(text: &str) -> Result<Value, String> {
    serde_json::from_str(text).map_err(|error| format!("{error}: {text}"))
}

pub fn virtual_size(info: &str) -> Result<u64, String> {
    json(info)?["virtual-size"]
        .as_u64()
        .ok_or_else(|| format!("no size: {info}"))
}

/// A refused command changes nothing.
pub fn unchanged(folder: &Path, file: &str, before: &[u8]) -> Outcome {
    match before == bytes(folder, file)? {
        true => Ok(()),
        false => Err(format!("the refused command changed {file}")),
    }
}

pub fn equal<T: PartialEq + std::fmt::Debug>(what: &str, expected: T, got: T) -> Outcome {
    match expected == got {
        true => Ok(()),
        false => Err(format!("{what}: expected {expected:#?}, got {got:#?}")),
    }
}

/// Runs instar, which has to refuse with exactly this text and exit status 1,
/// say nothing else, and leave the bytes of the file as they are.
pub fn refuses(folder: &Path, sandbox: &str, line: &str, file: &str, text: &str) -> Outcome {
    let before = bytes(folder, file)?;
    let step = instar(folder, sandbox, line)?;
    equal("standard error", text, &step.stderr)?;
    equal("exit status", 1, step.code)?;
    equal("standard output", "", &step.stdout)?;
    unchanged(folder, file, &before)
}
