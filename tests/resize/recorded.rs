//! Recordings of qemu-img: `tests/data/qemu-img`.

use crate::machine::Outcome;
use crate::tools::{bytes, data, equal, folder, instar, run};
use crate::transcript::{self, QEMU_IMG, Step};
use std::fs;

/// What this version refuses, and the text with which it does.
const REFUSED: &[(&str, &str)] = &[
    (
        "qcow2/1M-to-4M-prealloc-metadata",
        "instar: preallocation mode 'metadata' is not supported for qcow2; use off or falloc, or \
         `qemu-img resize --preallocation=metadata`\n",
    ),
    (
        "qcow2/1M-to-4M-prealloc-full",
        "instar: preallocation mode 'full' is not supported for qcow2; use off or falloc, or \
         `qemu-img resize --preallocation=full`\n",
    ),
    (
        "qcow2/64M-minus-32M-shrink",
        "instar: shrinking qcow2 images is not supported; use `qemu-img resize --shrink`\n",
    ),
    (
        "raw/1M-to-4M-prealloc-full",
        "instar: preallocation mode 'full' is not supported; use falloc, which allocates the same \
         disk space\n",
    ),
    (
        "raw/64M-to-1M-shrink",
        "instar: shrinking raw images is not supported; use `qemu-img resize --shrink`\n",
    ),
];

/// `FORMAT/CASE` of every recording.
pub fn cases() -> Vec<String> {
    let mut cases: Vec<String> = ["qcow2", "raw"]
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

/// Whether instar says and does what was recorded. A rejected resize changes no
/// byte.
pub fn as_recorded(case: &str, sandbox: &str) -> Outcome {
    let refused = REFUSED.iter().find(|(name, _)| *name == case);
    let folder = folder()?;
    let mut before = Vec::new();
    for recorded in recording(case)? {
        let got = instar(folder.path(), sandbox, &recorded.args.join(" "))?;
        if let (Some("resize"), Some((_, text))) =
            (recorded.args.first().map(String::as_str), refused)
        {
            equal("refusal", (1, *text), (got.code, got.stderr.as_str()))?;
            return unchanged(folder.path(), &before);
        }
        transcript::same(&recorded, &with_file_length(&got, &recorded))?;
        if recorded.code != 0 {
            unchanged(folder.path(), &before)?;
        }
        before = bytes(folder.path(), "disk")?;
    }
    Ok(())
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

fn unchanged(folder: &std::path::Path, before: &[u8]) -> Outcome {
    match before == bytes(folder, "disk")? {
        true => Ok(()),
        false => Err("the rejected resize changed the image".to_owned()),
    }
}
