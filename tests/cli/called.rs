//! `ln -s instar qemu-img`, in a directory that stands first in PATH.

use crate::machine::Outcome;
use crate::transcript::{self, Step};
use crate::{as_recorded_by, cases, folder};
use std::os::unix::fs::symlink;
use std::path::Path;

/// Name and body; the body gets the sandbox.
type Body = fn(&'static str) -> Outcome;

pub const CASES: &[(&str, Body)] = &[
    ("every recorded command has qemu-img's own text", texts),
    ("a script runs unchanged", script),
    ("the version reads as qemu-img's", version),
    ("other commands say that they are not provided", others),
];

/// A folder with instar under that name.
fn linked() -> Result<tempfile::TempDir, String> {
    let bin = folder(&[])?;
    let to = bin.path().join("qemu-img");
    symlink(env!("CARGO_BIN_EXE_instar"), &to).map_err(|error| format!("symlink: {error}"))?;
    Ok(bin)
}

fn shell(folder: &Path, bin: &Path, sandbox: &str, script: &str) -> Result<Step, String> {
    let path = std::env::var("PATH").unwrap_or_default();
    let path = format!("{}:{path}", bin.display());
    let environment = [
        ("PATH", path.as_str()),
        ("INSTAR_ISOLATION", sandbox),
        ("INSTAR_QEMU_VERSION", "10.0.2"),
    ];
    let args = ["-c".to_owned(), script.to_owned()];
    transcript::run(folder, "sh", &args, &environment)
}

fn texts(sandbox: &'static str) -> Outcome {
    let bin = linked()?;
    let program = bin.path().join("qemu-img").display().to_string();
    let usage = |name: &str| name.ends_with("-usage") || name.ends_with("-refused");
    let mut cases = cases::CASES.iter().filter(|case| usage(case.name));
    cases.try_for_each(|case| as_recorded_by(case, &program, sandbox))
}

fn script(sandbox: &'static str) -> Outcome {
    let (bin, place) = (linked()?, folder(&[])?);
    let script = "set -e
        qemu-img create -q -f qcow2 a.qcow2 64M
        qemu-img resize -q a.qcow2 +1G
        qemu-img info --output=json a.qcow2 | grep -q '\"virtual-size\": 1140850688'
        qemu-img check -q a.qcow2
        qemu-img map --output=json a.qcow2 | grep -q '\"length\": 1140850688'
        if qemu-img resize a.qcow2 1M 2>said; then exit 9; fi
        grep -q '^qemu-img: Use the --shrink option' said
        grep -q '^qemu-img: warning: Shrinking an image' said
        if qemu-img info gone 2>said; then exit 9; fi
        cat said";
    let step = shell(place.path(), bin.path(), sandbox, script)?;
    let expected = "qemu-img: Could not open 'gone': Could not open 'gone': No such file or \
                    directory\n";
    match (step.code, step.stdout == expected) {
        (0, true) => Ok(()),
        _ => Err(format!("{step:#?}")),
    }
}

fn version(sandbox: &'static str) -> Outcome {
    let (bin, place) = (linked()?, folder(&[])?);
    let script = "qemu-img --version; qemu-img -V; qemu-img --qemu-version 7.2 --version";
    let step = shell(place.path(), bin.path(), sandbox, script)?;
    let own = env!("CARGO_PKG_VERSION");
    let line = |version: &str| format!("qemu-img version {version} (instar {own})\n");
    let expected = [line("10.0.2"), line("10.0.2"), line("7.2.0")].concat();
    match step.code == 0 && step.stdout == expected {
        true => Ok(()),
        false => Err(format!("{step:#?}")),
    }
}

fn others(sandbox: &'static str) -> Outcome {
    let (bin, place) = (linked()?, folder(&[])?);
    for command in [
        "amend", "bench", "bitmap", "commit", "compare", "convert", "dd", "measure", "rebase",
        "snapshot",
    ] {
        let script = format!("qemu-img {command} -f qcow2 a b");
        let step = shell(place.path(), bin.path(), sandbox, &script)?;
        let expected = format!(
            "qemu-img: '{command}' is not provided: it is a command of QEMU's qemu-img, which has \
             to be called by its path, such as /usr/bin/qemu-img\n"
        );
        if (step.code, &step.stderr) != (1, &expected) {
            return Err(format!("{step:#?}"));
        }
    }
    Ok(())
}
