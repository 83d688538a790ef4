//! What only instar says: plans, the doctor, refusals of options, strings of
//! images on a terminal, completions and manual pages.

use crate::machine::Outcome;
use crate::transcript::{Step, words};
use crate::{folder, instar};
use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

/// Name and body; the body gets the sandbox.
type Body = fn(&'static str) -> Outcome;

pub const CASES: &[(&str, Body)] = &[
    ("a dry run prints the plan and changes nothing", dry_run),
    (
        "a dry run as JSON names every step and one commit",
        dry_run_json,
    ),
    (
        "a dry run of an equal size has nothing to do",
        dry_run_of_nothing,
    ),
    ("a rebuild of all counts leaves a sound image", rebuild),
    (
        "warnings count only where they are asked to",
        strict_warnings,
    ),
    ("options that name more than a file are refused", elsewhere),
    (
        "formats that are not supported are refused by name",
        other_formats,
    ),
    ("strings of an image cannot drive a terminal", escapes),
    ("long strings of an image are cut on a terminal", long_names),
    ("a missing link of a backing chain is named", missing_link),
    (
        "a file that ends inside its header is refused",
        short_header,
    ),
    ("the doctor tries what it reports", doctor),
    (
        "help, completions and manual pages come from one definition",
        generated,
    ),
    ("a closed pipe is no error worth a message", closed_pipe),
    (
        "a change that is made is a success whoever is told",
        nobody_is_told,
    ),
    (
        "the sandbox that was asked for is checked",
        unknown_isolation,
    ),
];

fn equal<T: PartialEq + std::fmt::Debug>(what: &str, expected: T, got: T) -> Outcome {
    match expected == got {
        true => Ok(()),
        false => Err(format!("{what}: expected {expected:#?}, got {got:#?}")),
    }
}

fn run(folder: &Path, sandbox: &str, line: &str) -> Result<Step, String> {
    instar(folder, sandbox, &words(line))
}

/// Runs a command that has to succeed silently on the standard error.
fn succeed(folder: &Path, sandbox: &str, line: &str) -> Result<String, String> {
    let step = run(folder, sandbox, line)?;
    equal(line, (0, ""), (step.code, step.stderr.as_str()))?;
    Ok(step.stdout)
}

fn refused(folder: &Path, sandbox: &str, line: &str, message: &str) -> Outcome {
    let step = run(folder, sandbox, line)?;
    equal(line, (1, message), (step.code, step.stderr.as_str()))
}

fn bytes(folder: &Path, file: &str) -> Result<Vec<u8>, String> {
    fs::read(folder.join(file)).map_err(|error| format!("{file}: {error}"))
}

fn dry_run(sandbox: &'static str) -> Outcome {
    let folder = folder(&["base.qcow2"])?;
    let before = bytes(folder.path(), "base.qcow2")?;
    let text = succeed(folder.path(), sandbox, "resize --dry-run base.qcow2 +1M")?;
    equal("bytes", before, bytes(folder.path(), "base.qcow2")?)?;
    let mut lines = text.lines();
    equal(
        "first line",
        Some("base.qcow2: qcow2, 1 MiB to 2 MiB (1048576 to 2097152 bytes)"),
        lines.next(),
    )?;
    let commits = text.matches("<- the new size takes effect").count();
    equal("commits", 1, commits)?;
    let steps = text
        .lines()
        .filter(|line| line.contains("  commit  "))
        .count();
    equal("steps of the commit", 1, steps)?;
    let end = text.lines().last().unwrap_or_default();
    match end.ends_with(" barriers. Nothing was written.") {
        true => Ok(()),
        false => Err(text),
    }
}

fn dry_run_json(sandbox: &'static str) -> Outcome {
    let folder = folder(&["base.qcow2"])?;
    let text = succeed(
        folder.path(),
        sandbox,
        "resize --dry-run --output=json base.qcow2 8G",
    )?;
    let plan: serde_json::Value =
        serde_json::from_str(&text).map_err(|error| format!("{error}: {text}"))?;
    equal("old size", 1 << 20, plan["old-size"].as_u64().unwrap_or(0))?;
    equal("new size", 8 << 30, plan["new-size"].as_u64().unwrap_or(0))?;
    let stages = plan["stages"].as_array().cloned().unwrap_or_default();
    let commits: Vec<_> = stages
        .iter()
        .filter(|stage| stage["commit"] == true)
        .collect();
    equal("commits", 1, commits.len())?;
    let steps = commits[0]["steps"].as_array().map_or(0, Vec::len);
    equal("steps of the commit", 1, steps)
}

fn dry_run_of_nothing(sandbox: &'static str) -> Outcome {
    let folder = folder(&["base.qcow2"])?;
    let text = succeed(folder.path(), sandbox, "resize --dry-run base.qcow2 1M")?;
    equal(
        "text",
        "base.qcow2: qcow2, 1 MiB to 1 MiB (1048576 to 1048576 bytes)\nNothing has to change.\n",
        text.as_str(),
    )
}

/// Writes bytes into a file.
fn damage(folder: &Path, file: &str, offset: u64, bytes: &[u8]) -> Outcome {
    fs::File::options()
        .write(true)
        .open(folder.join(file))
        .and_then(|file| file.write_all_at(bytes, offset))
        .map_err(|error| format!("{file}: {error}"))
}

fn rebuild(sandbox: &'static str) -> Outcome {
    let folder = folder(&[])?;
    let path = folder.path();
    succeed(path, sandbox, "create -q -f qcow2 disk 1M")?;
    // The counts of the clusters 1 to 3, which are in cluster 2.
    damage(path, "disk", 0x2_0002, &[0; 6])?;
    let found = run(path, sandbox, "check disk")?;
    equal("exit status", 2, found.code)?;
    let repaired = run(path, sandbox, "check -r all disk")?;
    equal("exit status after the repair", 0, repaired.code)?;
    let told = "The following inconsistencies were found and repaired:\n\n    0 leaked clusters\n";
    match repaired.stdout.starts_with(told) {
        true => {}
        false => return Err(repaired.stdout),
    }
    let clean = succeed(path, sandbox, "check disk")?;
    equal("first line", Some(NO_ERRORS), clean.lines().next())
}

const NO_ERRORS: &str = "No errors were found on the image.";

fn strict_warnings(sandbox: &'static str) -> Outcome {
    let folder = folder(&[])?;
    let path = folder.path();
    succeed(path, sandbox, "create -q -f vhdx disk 64M")?;
    // The copy of the region table, at which qemu-img does not look.
    damage(path, "disk", 256 << 10, b"gone")?;
    for (line, code) in [
        ("check disk", 0),
        ("check --strict disk", 2),
        ("check -q --strict disk", 2),
    ] {
        let step = run(path, sandbox, line)?;
        equal(line, code, step.code)?;
        match step.stderr.starts_with("instar: warning: ") {
            true => {}
            false => return Err(step.stderr),
        }
    }
    let json = run(path, sandbox, "check --output=json disk")?.stdout;
    let json: serde_json::Value =
        serde_json::from_str(&json).map_err(|error| format!("{error}: {json}"))?;
    match json["warnings"].as_array() {
        Some(warnings) if !warnings.is_empty() => Ok(()),
        _ => Err(json.to_string()),
    }
}

fn elsewhere(sandbox: &'static str) -> Outcome {
    let folder = folder(&["base.qcow2"])?;
    for command in ["info", "map", "check", "resize", "create"] {
        let size = if command == "resize" { " 2M" } else { "" };
        refused(
            folder.path(),
            sandbox,
            &format!("{command} --image-opts driver=qcow2,file.filename=base.qcow2{size}"),
            "instar: --image-opts is not available: name an image file, and its format with -f\n",
        )?;
        refused(
            folder.path(),
            sandbox,
            &format!("{command} --object secret,id=s base.qcow2{size}"),
            "instar: --object is not available: instar needs no secrets, it resizes encrypted \
             images without their key\n",
        )?;
    }
    Ok(())
}

fn other_formats(sandbox: &'static str) -> Outcome {
    let folder = folder(&["base.qcow2"])?;
    refused(
        folder.path(),
        sandbox,
        "resize -f vdi base.qcow2 2M",
        "instar: Could not open 'base.qcow2': images of the format 'vdi' are not supported; convert \
         the image with 'qemu-img convert -O qcow2'\n",
    )?;
    refused(
        folder.path(),
        sandbox,
        "create -f qed new 2M",
        "instar: new: images of the format 'qed' are not supported: make a qcow2 image and convert \
         it with 'qemu-img convert'\n",
    )
}

/// An image whose backing file has this name.
fn image_on(folder: &Path, sandbox: &str, name: &str) -> Outcome {
    let args = [
        "create", "-q", "-f", "qcow2", "-u", "-b", name, "-F", "raw", "top", "1M",
    ];
    let step = instar(folder, sandbox, &args.map(str::to_owned))?;
    equal("create", (0, ""), (step.code, step.stderr.as_str()))
}

fn escapes(sandbox: &'static str) -> Outcome {
    let folder = folder(&[])?;
    image_on(folder.path(), sandbox, "a\x1b[2J\u{202e}b\n")?;
    let text = succeed(folder.path(), sandbox, "info top")?;
    let line = text.lines().find(|line| line.starts_with("backing file: "));
    equal(
        "backing file",
        Some("backing file: a\\u{1b}[2J\\u{202e}b\\n"),
        line,
    )?;
    let json = succeed(folder.path(), sandbox, "info --output=json top")?;
    match json.contains(r#""backing-filename": "a\u001B[2J\u202Eb\n","#) {
        true => Ok(()),
        false => Err(json),
    }
}

fn long_names(sandbox: &'static str) -> Outcome {
    let folder = folder(&[])?;
    image_on(folder.path(), sandbox, &"n".repeat(1000))?;
    let text = succeed(folder.path(), sandbox, "info top")?;
    let line = text.lines().find(|line| line.starts_with("backing file: "));
    let expected = format!("backing file: {}…", "n".repeat(256));
    equal("backing file", Some(expected.as_str()), line)
}

fn missing_link(sandbox: &'static str) -> Outcome {
    let folder = folder(&["orphan.qcow2"])?;
    refused(
        folder.path(),
        sandbox,
        "info --backing-chain orphan.qcow2",
        "instar: Could not open 'orphan.qcow2': Could not open backing file: Could not open \
         'gone.raw': No such file or directory\n",
    )
}

fn short_header(sandbox: &'static str) -> Outcome {
    let folder = folder(&["short.qcow2"])?;
    refused(
        folder.path(),
        sandbox,
        "info short.qcow2",
        "instar: Could not open 'short.qcow2': the file ends inside the qcow2 header, at byte 48; \
         the header is damaged: restore the image from a backup\n",
    )
}

fn doctor(sandbox: &'static str) -> Outcome {
    let folder = folder(&[])?;
    let step = run(folder.path(), sandbox, "doctor --output=json")?;
    let report: serde_json::Value =
        serde_json::from_str(&step.stdout).map_err(|error| format!("{error}: {}", step.stdout))?;
    let can_mount = report["can-mount"].as_bool();
    equal("exit status", can_mount, Some(step.code == 0))?;
    let checks = report["checks"].as_array().cloned().unwrap_or_default();
    let works = |name: &str| {
        checks
            .iter()
            .any(|check| check["name"] == name && check["works"] == true)
    };
    equal("this sandbox", true, works(sandbox))?;
    let mountable =
        works("fuse") && (works("fusermount3") || nix::unistd::Uid::effective().is_root());
    equal("mounting", Some(mountable), can_mount)
}

fn generated(sandbox: &'static str) -> Outcome {
    let folder = folder(&[])?;
    for (line, wanted) in [
        ("--help", "Change the size of a disk image"),
        ("resize --help", "Print the plan"),
        ("create -f qcow2 -o help", "  cluster_size=<size>    - "),
        ("create -f raw -o ? disk", "Supported raw options:\n"),
        ("create -f vmdk -o help", "  subformat=<str>        - "),
        ("create -f vpc -o help", "  force_size=<bool (on/off)> - "),
        ("create -f vhdx -o help", "  block_size=<size>      - "),
        ("check --help", "Exit codes: 0 nothing is wrong"),
        ("completions bash", "--preallocation"),
        ("completions fish", "dry-run"),
        ("man", "instar\\-resize"),
        ("man resize", "\\-\\-dry\\-run"),
    ] {
        let text = succeed(folder.path(), sandbox, line)?;
        if !text.contains(wanted) {
            return Err(format!("{line} does not say {wanted:?}:\n{text}"));
        }
    }
    refused(
        folder.path(),
        sandbox,
        "man bogus",
        "instar: Command not found: bogus\n",
    )
}

fn closed_pipe(sandbox: &'static str) -> Outcome {
    let folder = folder(&["base.qcow2"])?;
    let program = env!("CARGO_BIN_EXE_instar");
    let script = format!("'{program}' info base.qcow2 3>&1 >&- | true");
    let step = crate::transcript::run(
        folder.path(),
        "sh",
        &["-c".to_owned(), script],
        &[("INSTAR_ISOLATION", sandbox)],
    )?;
    match step.stderr.contains("panicked") {
        false => Ok(()),
        true => Err(step.stderr),
    }
}

fn nobody_is_told(sandbox: &'static str) -> Outcome {
    let folder = folder(&["base.qcow2"])?;
    let program = env!("CARGO_BIN_EXE_instar");
    for (line, code) in [
        ("info missing.qcow2 2>/dev/full", 1),
        ("bogus 2>/dev/full", 1),
        ("resize base.qcow2 512k 2>/dev/full", 1),
        ("info base.qcow2 >/dev/full 2>/dev/full", 1),
        ("resize base.qcow2 +1M >/dev/full", 0),
        ("resize base.qcow2 +1M >/dev/full 2>/dev/full", 0),
        ("create -f qcow2 new.qcow2 1M >/dev/full", 0),
    ] {
        let environment = [("INSTAR_ISOLATION", sandbox)];
        let script = ["-c".to_owned(), format!("'{program}' {line}")];
        let step = crate::transcript::run(folder.path(), "sh", &script, &environment)?;
        equal(line, code, step.code)?;
    }
    let step = run(folder.path(), sandbox, "info --output=json base.qcow2")?;
    match step.stdout.contains("\"virtual-size\": 3145728") {
        true => Ok(()),
        false => Err(step.stdout),
    }
}

fn unknown_isolation(_: &'static str) -> Outcome {
    let folder = folder(&["base.qcow2"])?;
    let step = run(folder.path(), "none", "info base.qcow2")?;
    equal("exit status", 1, step.code)?;
    match step
        .stderr
        .starts_with("instar: invalid value 'none' for '--isolation")
    {
        true => Ok(()),
        false => Err(step.stderr),
    }
}
