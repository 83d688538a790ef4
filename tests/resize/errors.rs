//! Refusals: the exact text, exit status 1, no byte changed.

use crate::machine::{Outcome, missing_program};
use crate::tools::{bytes, equal, fetch, folder, instar, must, refuses, success};
use std::path::Path;
use std::process::Command;

/// An image of `tests/data/images` and a resize of it that is refused.
pub struct Refusal {
    pub name: &'static str,
    image: &'static str,
    /// Arguments of `resize`.
    line: &'static str,
    /// The standard error.
    text: &'static str,
}

const fn refusal(
    name: &'static str,
    image: &'static str,
    line: &'static str,
    text: &'static str,
) -> Refusal {
    Refusal {
        name,
        image,
        line,
        text,
    }
}

const NO_SHRINK: &str = "instar: Use the --shrink option to perform a shrink operation.\n\
    instar: warning: Shrinking an image will delete all data beyond the shrunken image's end. \
    Before performing such an operation, make sure there is no important data there.\n";

pub const REFUSALS: &[Refusal] = &[
    refusal(
        "part of a sector",
        "base.qcow2",
        "base.qcow2 2000001",
        "instar: The new size must be a multiple of 512: 2000001 is not, the nearest that are, are \
         1999872 and 2000384\n",
    ),
    refusal(
        "a smaller qcow2 without the option",
        "base.qcow2",
        "base.qcow2 512k",
        NO_SHRINK,
    ),
    refusal(
        "a smaller raw without the option",
        "tail.raw",
        "-f raw tail.raw -1k",
        NO_SHRINK,
    ),
    refusal(
        "a smaller size with preallocation",
        "base.qcow2",
        "--shrink --preallocation=falloc base.qcow2 512k",
        "instar: Preallocation can only be used for growing images\n",
    ),
    refusal(
        "metadata preallocation of raw",
        "tail.raw",
        "-f raw --preallocation=metadata tail.raw 1M",
        "instar: Unsupported preallocation mode: metadata\n",
    ),
    refusal(
        "nothing left",
        "base.qcow2",
        "base.qcow2 -1M",
        "instar: New image size must be positive\n",
    ),
    refusal(
        "another format",
        "tail.raw",
        "-f qcow2 tail.raw 1M",
        "instar: Could not open 'tail.raw': Image is not in qcow2 format: it does not begin with \
         the magic number QFI\\xfb; name its real format with -f\n",
    ),
    refusal(
        "the corrupt flag",
        "corrupt.qcow2",
        "corrupt.qcow2 1M",
        "instar: Image is corrupt; cannot be opened read/write (the corrupt bit is set); repair a \
         copy with `qemu-img check -r all`\n",
    ),
    refusal(
        "version 2 with snapshots",
        "v2snap.qcow2",
        "v2snap.qcow2 1M",
        "instar: Can't resize a v2 image which has snapshots; run `qemu-img amend -o compat=1.1` \
         first, or delete the snapshots\n",
    ),
    refusal(
        "a missing backing file",
        "orphan.qcow2",
        "orphan.qcow2 1M",
        "instar: Could not open 'orphan.qcow2': Could not open backing file: Could not open \
         'gone.raw': No such file or directory\n",
    ),
    refusal(
        "a missing data file",
        "datafile.qcow2",
        "datafile.qcow2 1M",
        "instar: Could not open 'datafile.qcow2': Could not open 'data.raw': No such file or \
         directory\n",
    ),
    refusal(
        "more than the L1 table can hold",
        "snapshots.qcow2",
        "snapshots.qcow2 1T",
        "instar: Failed to grow the L1 table: File too large\n",
    ),
];

/// Runs one of [`REFUSALS`].
pub fn refused(refusal: &Refusal, sandbox: &str) -> Outcome {
    let folder = folder()?;
    fetch(folder.path(), refusal.image)?;
    let line = format!("resize {}", refusal.line);
    refuses(folder.path(), sandbox, &line, refusal.image, refusal.text)
}

/// Why a test cannot be run here, if that is so.
type Needs = fn() -> Option<String>;
/// The body gets the sandbox.
type Body = fn(&'static str) -> Outcome;

pub const OTHERS: &[(&str, Needs, Body)] = &[
    ("what is no regular file", || None, not_a_file),
    ("a file that cannot be written", missing_chattr, read_only),
    ("an unknown bit keeps everybody out", || None, unknown_bit),
];

fn not_a_file(sandbox: &'static str) -> Outcome {
    let folder = folder()?;
    for (file, why) in [
        (
            "nowhere",
            "Could not open 'nowhere': No such file or directory",
        ),
        (".", "Could not open '.': Is a directory"),
    ] {
        let step = instar(folder.path(), sandbox, &format!("resize {file} 1M"))?;
        let expected = format!("instar: Could not open '{file}': {why}\n");
        equal("standard error", expected, step.stderr)?;
        equal("exit status", 1, step.code)?;
    }
    let step = instar(folder.path(), sandbox, "resize -f raw /dev/null 1M")?;
    equal("exit status", 1, step.code)?;
    match step.stderr.contains("/dev/null") {
        true => Ok(()),
        false => Err(step.stderr),
    }
}

/// A file that not even root can write, until it is dropped.
struct Immutable<'a> {
    folder: &'a Path,
    file: &'a str,
}

impl<'a> Immutable<'a> {
    fn make(folder: &'a Path, file: &'a str) -> Result<Self, String> {
        must(folder, "chattr", &format!("+i {file}"))?;
        Ok(Self { folder, file })
    }
}

impl Drop for Immutable<'_> {
    fn drop(&mut self) {
        // A leftover shows when its folder cannot be removed.
        let _ = must(self.folder, "chattr", &format!("-i {}", self.file));
    }
}

/// Why no file can be made immutable here, if that is so.
fn missing_chattr() -> Option<String> {
    let tried = || {
        let folder = folder()?;
        std::fs::write(folder.path().join("file"), b"").map_err(|error| error.to_string())?;
        Immutable::make(folder.path(), "file").map(drop)
    };
    tried()
        .err()
        .map(|why| format!("no file can be made immutable: {why}"))
}

fn read_only(sandbox: &'static str) -> Outcome {
    let folder = folder()?;
    fetch(folder.path(), "base.qcow2")?;
    let _immutable = Immutable::make(folder.path(), "base.qcow2")?;
    refuses(
        folder.path(),
        sandbox,
        "resize base.qcow2 2M",
        "base.qcow2",
        "instar: Could not open 'base.qcow2': Could not open 'base.qcow2': Operation not \
         permitted\n",
    )
}

fn unknown_bit(sandbox: &'static str) -> Outcome {
    let folder = folder()?;
    fetch(folder.path(), "future.qcow2")?;
    let before = bytes(folder.path(), "future.qcow2")?;
    let step = instar(folder.path(), sandbox, "resize future.qcow2 1M")?;
    equal("exit status", 1, step.code)?;
    let text = "instar: Could not open 'future.qcow2': Unsupported qcow2 feature(s): Unknown \
        incompatible feature: 8000000000000000";
    if !step.stderr.starts_with(text) {
        return Err(step.stderr);
    }
    equal("bytes", before, bytes(folder.path(), "future.qcow2")?)
}

/// Why no small filesystem can be mounted, if that is so.
pub fn missing_small_disk() -> Option<String> {
    let id = Command::new("id").arg("-u").output().ok()?;
    if id.stdout != b"0\n" {
        return Some("only root can mount a small filesystem".to_owned());
    }
    let found = Command::new("losetup").arg("--find").output();
    match found {
        Ok(found) if found.status.success() => missing_program(&["mkfs.ext4", "mount"]),
        _ => Some("there is no free loop device".to_owned()),
    }
}

/// A small filesystem in a file, mounted until it is dropped.
struct SmallDisk<'a> {
    folder: &'a Path,
}

impl<'a> SmallDisk<'a> {
    fn mount(folder: &'a Path) -> Result<Self, String> {
        must(folder, "truncate", "-s 8M filesystem")?;
        success(crate::tools::run(
            folder,
            "mkfs.ext4",
            "-q -O ^has_journal filesystem",
        )?)?;
        must(folder, "mkdir", "small")?;
        must(folder, "mount", "-o loop filesystem small")?;
        Ok(Self { folder })
    }
}

impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        // A leftover mount shows in the next run; there is nobody to tell here.
        let _ = must(self.folder, "umount", "small");
    }
}

/// Space is reserved before anything is committed.
pub fn full_disk(sandbox: &'static str) -> Outcome {
    let folder = folder()?;
    let disk = SmallDisk::mount(folder.path())?;
    for format in ["qcow2", "raw"] {
        let file = format!("small/disk.{format}");
        must(
            folder.path(),
            "qemu-img",
            &format!("create -q -f {format} {file} 1M"),
        )?;
        must(
            folder.path(),
            "qemu-io",
            &format!("-f {format} -c write~-P~1~0~64k {file}"),
        )?;
        let before = bytes(folder.path(), &file)?;
        let line = format!("resize -f {format} --preallocation=falloc {file} 64M");
        let step = instar(folder.path(), sandbox, &line)?;
        equal("exit status", 1, step.code)?;
        if !step.stderr.contains("No space left on device") {
            return Err(step.stderr);
        }
        if before != bytes(folder.path(), &file)? {
            return Err(format!("the refused resize changed {file}"));
        }
        let line = format!("resize -f {format} {file} 2M");
        let resized = instar(folder.path(), sandbox, &line)?;
        equal("a smaller wish", "Image resized.\n", &success(resized)?)?;
    }
    drop(disk);
    Ok(())
}
