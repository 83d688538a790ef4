//! The recorder: runs the cases by the qemu-img that the environment names.

use crate::cases::{CASES, Case, TARGETS};
use crate::created;
use crate::machine::Outcome;
use crate::recorded::{Recording, Said};
use crate::recording::{Meta, Ran, Record, save};
use crate::tools::{folder, json, run, space, success};
use crate::transcript::QEMU_IMG;
use std::path::Path;

/// Writes what qemu-img says to all cases, where the recordings are looked for.
pub fn record() -> Outcome {
    for &target in TARGETS {
        let cases = CASES.iter().filter(|case| case.target == target);
        let asked = cases.map(|case| Ok((case.name.to_owned(), ask(case)?)));
        save(&Recording::of(target, asked)?)?;
    }
    created::record()
}

/// What qemu-img says to a case.
pub fn ask(case: &Case) -> Result<Record, String> {
    let folder = folder()?;
    let folder = folder.path();
    let create = ran(folder, &case.create())?;
    let resize = ran(folder, &case.resize())?;
    let info = match resize.said.code {
        0 => {
            let said = run(folder, QEMU_IMG, "info --output=json disk")?;
            Some(json(&success(said)?)?)
        }
        _ => None,
    };
    Ok(Record {
        meta: meta(case)?,
        create,
        resize,
        info,
    })
}

/// What is recorded of the case itself.
pub fn meta(case: &Case) -> Result<Meta, String> {
    Ok(Meta {
        start: case.start.to_owned(),
        end: case.end.to_owned(),
        options: case.options.map(str::to_owned),
        preallocation: case.preallocation.map(str::to_owned),
        shrink: case.shrink,
        size: case.size().ok_or("the table has a size that is none")?,
    })
}

fn ran(folder: &Path, line: &str) -> Result<Ran, String> {
    let step = run(folder, QEMU_IMG, line)?;
    let (length, allocated) = space(folder, "disk")?;
    Ok(Ran {
        said: Said::new(line, step),
        length,
        allocated,
    })
}
