//! Recordings of qemu-img: `tests/data/qemu-img`.

use crate::machine::{Outcome, missing_program};
use crate::tools::{bytes, data, equal, folder, instar, must, run, success};
use crate::transcript::{self, QEMU_IMG, Step};
use std::fs;
use std::path::Path;

/// What qemu-img says to a resize in a format that it does not resize.
const NO_RESIZE: &str = "qemu-img: Image format driver does not support resize\n";

/// `FORMAT/CASE` of every recording.
pub fn cases() -> Vec<String> {
    let mut cases: Vec<String> = ["qcow2", "raw", "vmdk", "vpc", "vhdx"]
        .iter()
        .flat_map(|format| {
            let files = fs::read_dir(data().join("qemu-img").join(format));
            let names = files.into_iter().flatten().flatten();
            names.map(move |file| format!("{format}/{}", file.file_name().display()))
        })
        .filter_map(|name| name.strip_suffix(".txt").map(str::to_owned))
        .collect();
    cases.sort();
    cases
}

fn recording(case: &str) -> Result<Vec<Step>, String> {
    let path = data().join(format!("qemu-img/{case}.txt"));
    let text = fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    match transcript::parse(&text) {
        steps if steps.is_empty() => Err(format!("{} is empty", path.display())),
        steps => Ok(steps),
    }
}

/// Whether the qemu-img that is installed says what was recorded.
pub fn still_says_so(case: &str) -> Outcome {
    let folder = folder()?;
    for recorded in recording(case)? {
        let live = run(folder.path(), QEMU_IMG, &recorded.args.join(" "))?;
        transcript::same(&recorded, &live)?;
    }
    Ok(())
}

/// Whether instar says and does what was recorded, and resizes what qemu-img
/// does not. A rejected resize changes no byte.
pub fn as_recorded(case: &str, sandbox: &str) -> Outcome {
    let folder = folder()?;
    let mut before = Vec::new();
    for recorded in recording(case)? {
        if recorded.stderr == NO_RESIZE {
            return resized(folder.path(), sandbox, &recorded.args);
        }
        let got = instar(folder.path(), sandbox, &recorded.args.join(" "))?;
        transcript::same(&recorded, &with_file_length(&got, &recorded))?;
        if recorded.code != 0 {
            unchanged(folder.path(), &before)?;
        }
        before = bytes(folder.path(), "disk")?;
    }
    Ok(())
}

/// Resizes an empty image; the arguments are `resize -f FMT ... disk SIZE`. The
/// size is exactly the one that was asked for, and QEMU sees it, the zeroes and
/// no fault.
fn resized(folder: &Path, sandbox: &str, args: &[String]) -> Outcome {
    let (Some(format), Some(size)) = (args.get(2), args.last()) else {
        return Err(format!("{args:?} is not understood"));
    };
    let info = format!("info -f {format} --output=json disk");
    let says = || success(instar(folder, sandbox, &info)?);
    let wanted = match size.strip_prefix('+') {
        Some(more) => virtual_size(&says()?)? + mebibytes(more)?,
        None => mebibytes(size)?,
    };
    let said = success(instar(folder, sandbox, &args.join(" "))?)?;
    equal("resize", "Image resized.\n", &said)?;
    let says = says()?;
    equal("virtual size", wanted, virtual_size(&says)?)?;
    let check = format!("check -f {format} disk");
    success(instar(folder, sandbox, &check)?)?;
    if missing_program(&["qemu-img"]).is_some() {
        return Ok(());
    }
    equal("qemu-img info", must(folder, QEMU_IMG, &info)?, says)?;
    if format != "vpc" {
        must(folder, QEMU_IMG, &check)?;
    }
    must(folder, QEMU_IMG, &format!("create -q -f raw zero {wanted}"))?;
    let compare = format!("compare -f {format} -F raw disk zero");
    let same = must(folder, QEMU_IMG, &compare)?;
    equal("content", "Images are identical.\n", &same)
}

fn virtual_size(info: &str) -> Result<u64, String> {
    let info: serde_json::Value =
        serde_json::from_str(info).map_err(|error| format!("{error}: {info}"))?;
    info["virtual-size"]
        .as_u64()
        .ok_or_else(|| format!("no size: {info}"))
}

/// Reads `64M`.
fn mebibytes(text: &str) -> Result<u64, String> {
    let number = text.strip_suffix('M').and_then(|text| text.parse().ok());
    number
        .map(|number: u64| number << 20)
        .ok_or_else(|| format!("{text} is no number of mebibytes"))
}

/// The step with the file length of the other one, if the file is not longer
/// than that: instar may find space inside the file where QEMU appends.
fn with_file_length(step: &Step, other: &Step) -> Step {
    const LABEL: &str = "                \"virtual-size\": ";
    let line = |step: &Step| {
        let line = step.stdout.lines().find(|line| line.starts_with(LABEL))?;
        let number = line[LABEL.len()..].trim_end_matches(',');
        Some((line.to_owned(), number.parse::<u64>().ok()?))
    };
    let mut step = step.clone();
    if let (Some((mine, len)), Some((other, most))) = (line(&step), line(other))
        && len <= most
    {
        step.stdout = step.stdout.replacen(&mine, &other, 1);
    }
    step
}

fn unchanged(folder: &Path, before: &[u8]) -> Outcome {
    match before == bytes(folder, "disk")? {
        true => Ok(()),
        false => Err("the rejected resize changed the image".to_owned()),
    }
}
