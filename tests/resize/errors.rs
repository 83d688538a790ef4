//! Refusals: the exact text, exit status 1, no byte changed.

use crate::info::numbers;
use crate::live::instar_now;
use crate::machine::{Outcome, missing_program, qemu_img_version};
use crate::tools::{bytes, equal, fetch, folder, instar, must, refuses, run, success, unchanged};
use crate::transcript::{self, QEMU_IMG};
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

/// A `resize` of a new image of 1 MiB that changes nothing.
pub struct Wish {
    pub name: &'static str,
    pub formats: &'static [&'static str],
    /// What follows `resize -f FORMAT`.
    line: &'static str,
    /// The standard error; nothing if the wish is granted.
    text: &'static str,
    /// Whether qemu-img says the same.
    pub as_qemu_img: bool,
    /// What qemu-img said instead before 6.0.
    earlier: Option<&'static str>,
}

const fn wish(name: &'static str, line: &'static str, text: &'static str) -> Wish {
    Wish {
        name,
        formats: &["raw", "qcow2"],
        line,
        text,
        as_qemu_img: true,
        earlier: None,
    }
}

const NO_SIZE: &str = "instar: Parameter 'size' expects a non-negative number below 2^64\n\
    Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n\
    and exabytes, respectively.\n";
const NOT_POSITIVE: &str = "instar: New image size must be positive\n";
const ONLY_GROWING: &str = "instar: Preallocation can only be used for growing images\n";

pub const WISHES: &[Wish] = &[
    wish("no byte more", "disk +0", ""),
    wish("no byte less", "disk -0", ""),
    wish("the present size", "disk 1M", ""),
    wish("less without the option", "disk 512k", NO_SHRINK),
    wish("a byte less without the option", "disk -1", NO_SHRINK),
    wish("letters", "disk abc", NO_SIZE),
    wish("an empty size", "disk ''", NO_SIZE),
    wish("two suffixes", "disk 1kb", NO_SIZE),
    Wish {
        earlier: Some(NO_SHRINK),
        ..wish("an exponent", "disk 1e3", NO_SIZE)
    },
    Wish {
        earlier: Some("instar: Value '-1M' is out of range for parameter 'size'\n"),
        ..wish("two signs", "disk +-1M", NO_SIZE)
    },
    wish("zero", "disk 0", NOT_POSITIVE),
    wish("less than nothing", "--shrink disk -2M", NOT_POSITIVE),
    wish("all of it less", "--shrink disk -1M", NOT_POSITIVE),
    wish("2^63 bytes", "disk 8E", NOT_POSITIVE),
    wish("2^63 bytes more", "disk +9E", NOT_POSITIVE),
    wish(
        "2^64 bytes",
        "disk 16E",
        "instar: Value '16E' is out of range for parameter 'size'\n",
    ),
    wish(
        "2^64 bytes more",
        "disk +18446744073709551616",
        "instar: Value '18446744073709551616' is out of range for parameter 'size'\n",
    ),
    Wish {
        formats: &["raw"],
        ..wish(
            "metadata where there is none",
            "--preallocation=metadata disk 2M",
            "instar: Unsupported preallocation mode: metadata\n",
        )
    },
    wish(
        "less, with space reserved",
        "--shrink --preallocation=falloc disk 512k",
        ONLY_GROWING,
    ),
    wish(
        "less without the option, with space reserved",
        "--preallocation=full disk 512k",
        ONLY_GROWING,
    ),
    wish(
        "no byte more, with space reserved",
        "--preallocation=falloc disk +0",
        ONLY_GROWING,
    ),
    wish(
        "a mode that does not exist",
        "--preallocation=bogus disk 2M",
        "instar: Invalid preallocation mode 'bogus'\n",
    ),
    Wish {
        as_qemu_img: false,
        ..wish(
            "an object",
            "--object secret,id=key,data=word disk 2M",
            "instar: --object is not available: instar needs no secrets, it resizes encrypted \
             images without their key\n",
        )
    },
    Wish {
        as_qemu_img: false,
        ..wish(
            "an image described by options",
            "--image-opts driver=raw,file.filename=disk 2M",
            "instar: --image-opts is not available: name an image file, and its format with -f\n",
        )
    },
];

/// Asks instar for one of [`WISHES`].
pub fn as_wished(wish: &Wish, format: &str, sandbox: &str) -> Outcome {
    let folder = folder()?;
    let folder = folder.path();
    let line = format!("resize -f {format} {}", wish.line);
    success(instar(
        folder,
        sandbox,
        &format!("create -q -f {format} disk 1M"),
    )?)?;
    if !wish.text.is_empty() {
        return refuses(folder, sandbox, &line, "disk", wish.text);
    }
    let before = bytes(folder, "disk")?;
    let resized = success(instar(folder, sandbox, &line)?)?;
    equal("standard output", "Image resized.\n", &resized)?;
    unchanged(folder, "disk", &before)
}

/// Asks both programs for one of [`WISHES`].
pub fn as_by_qemu_img(wish: &Wish, format: &str, sandbox: &str) -> Outcome {
    let folder = folder()?;
    let folder = folder.path();
    must(folder, QEMU_IMG, &format!("create -q -f {format} disk 1M"))?;
    let before = bytes(folder, "disk")?;
    let line = format!("resize -f {format} {}", wish.line);
    let theirs = run(folder, QEMU_IMG, &line)?;
    unchanged(folder, "disk", &before)?;
    let ours = instar_now(folder, sandbox, &line)?;
    unchanged(folder, "disk", &before)?;
    match wish.earlier {
        Some(text) if numbers(&qemu_img_version()?) < (6, 0) => {
            let text = text.replace("instar: ", "qemu-img: ");
            equal("standard error", (text, 1), (theirs.stderr, theirs.code))
        }
        _ => transcript::same(&theirs, &ours),
    }
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
        success(run(folder, "mkfs.ext4", "-q -O ^has_journal filesystem")?)?;
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
