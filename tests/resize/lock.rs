//! Images that another process holds.

use crate::machine::Outcome;
use crate::tools::{equal, fetch, folder, instar, refuses, success};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// Name and body; the body gets the sandbox.
type Body = fn(&'static str) -> Outcome;

pub const CASES: &[(&str, Body)] = &[
    ("an image that QEMU writes cannot be resized", writer),
    ("an image that QEMU reads cannot be resized", reader),
    ("an image that QEMU writes can be shown with -U only", shown),
    ("a raw image that QEMU writes cannot be resized", raw),
];

/// A qemu-io that has an image open until it is dropped.
struct Holder(Child);

impl Holder {
    fn start(folder: &Path, args: &[&str]) -> Result<Self, String> {
        let mut child = Command::new("qemu-io")
            .args(args)
            .current_dir(folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("qemu-io: {error}"))?;
        // The prompt comes once the image is open.
        let stdout = child.stdout.take().ok_or("qemu-io has no output")?;
        let mut prompt = Vec::new();
        BufReader::new(stdout)
            .read_until(b'>', &mut prompt)
            .map_err(|error| format!("qemu-io: {error}"))?;
        let holder = Self(child);
        match prompt.ends_with(b">") {
            true => Ok(holder),
            false => Err("qemu-io did not open the image".to_owned()),
        }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

const WRITE_LOCK: &str = "instar: Could not open 'base.qcow2': Failed to get \"write\" lock\n\
    Is another process using the image [base.qcow2]?\n";

fn writer(sandbox: &'static str) -> Outcome {
    let folder = folder()?;
    fetch(folder.path(), "base.qcow2")?;
    let holder = Holder::start(folder.path(), &["base.qcow2"])?;
    refuses(
        folder.path(),
        sandbox,
        "resize base.qcow2 2M",
        "base.qcow2",
        WRITE_LOCK,
    )?;
    drop(holder);
    let resized = instar(folder.path(), sandbox, "resize base.qcow2 2M")?;
    equal("afterwards", "Image resized.\n", &success(resized)?)
}

fn reader(sandbox: &'static str) -> Outcome {
    let folder = folder()?;
    fetch(folder.path(), "base.qcow2")?;
    let _holder = Holder::start(folder.path(), &["-r", "base.qcow2"])?;
    refuses(
        folder.path(),
        sandbox,
        "resize base.qcow2 2M",
        "base.qcow2",
        WRITE_LOCK,
    )
}

fn shown(sandbox: &'static str) -> Outcome {
    let folder = folder()?;
    fetch(folder.path(), "base.qcow2")?;
    let _holder = Holder::start(folder.path(), &["base.qcow2"])?;
    for command in ["info", "map"] {
        refuses(
            folder.path(),
            sandbox,
            &format!("{command} base.qcow2"),
            "base.qcow2",
            "instar: Could not open 'base.qcow2': Failed to get shared \"write\" lock\n\
             Is another process using the image [base.qcow2]?\n",
        )?;
        let line = format!("{command} -U base.qcow2");
        success(instar(folder.path(), sandbox, &line)?)?;
    }
    Ok(())
}

fn raw(sandbox: &'static str) -> Outcome {
    let folder = folder()?;
    fetch(folder.path(), "tail.raw")?;
    let _holder = Holder::start(folder.path(), &["-f", "raw", "tail.raw"])?;
    refuses(
        folder.path(),
        sandbox,
        "resize -f raw tail.raw 1M",
        "tail.raw",
        "instar: Could not open 'tail.raw': Failed to get shared \"write\" lock\n\
         Is another process using the image [tail.raw]?\n",
    )
}
