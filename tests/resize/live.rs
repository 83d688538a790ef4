//! The cases by qemu-img and by instar, side by side.

use crate::cases::Case;
use crate::info::{self, BLOCK};
use crate::machine::{Outcome, qemu_img_version};
use crate::tools::{bytes, equal, folder, instar_as, json, must, run, space, success, unchanged};
use crate::transcript::{self, QEMU_IMG, Step};
use serde_json::Value;
use std::path::Path;

/// The two programs.
pub const BOTH: [&str; 2] = [QEMU_IMG, INSTAR];
const INSTAR: &str = "instar";

/// Runs instar as the qemu-img that is asked.
pub fn instar_now(folder: &Path, sandbox: &str, line: &str) -> Result<Step, String> {
    instar_as(&qemu_img_version()?, folder, sandbox, line)
}

/// Runs one of [`BOTH`].
pub fn run_by(program: &str, folder: &Path, sandbox: &str, line: &str) -> Result<Step, String> {
    match program {
        INSTAR => instar_now(folder, sandbox, line),
        program => run(folder, program, line),
    }
}

/// `create` and `resize`; the last step.
fn pipeline(case: &Case, program: &str, folder: &Path, sandbox: &str) -> Result<Step, String> {
    success(run_by(program, folder, sandbox, &case.create())?)?;
    let before = bytes(folder, "disk")?;
    let resized = run_by(program, folder, sandbox, &case.resize())?;
    if resized.code != 0 {
        unchanged(folder, "disk", &before)?;
    }
    Ok(resized)
}

/// Both do the same with a new image each, and both say the same of both images.
pub fn as_qemu_img(case: &Case, sandbox: &str) -> Outcome {
    let (theirs, ours) = (folder()?, folder()?);
    let (theirs, ours) = (theirs.path(), ours.path());
    let expected = pipeline(case, QEMU_IMG, theirs, sandbox)?;
    let got = pipeline(case, INSTAR, ours, sandbox)?;
    transcript::same(&expected, &got)?;
    let of_theirs = said_by_both(case.format(), theirs, sandbox)?;
    let of_ours = said_by_both(case.format(), ours, sandbox)?;
    info::alike(&of_theirs, &of_ours)?;
    let cluster = of_ours["cluster-size"].as_u64().unwrap_or(0);
    no_larger("disk", theirs, ours, cluster)
}

/// [`is_no_larger`] for files in two folders.
pub fn no_larger(file: &str, theirs: &Path, ours: &Path, cluster: u64) -> Outcome {
    is_no_larger(file, space(theirs, file)?, space(ours, file)?, cluster)
}

/// A file of ours is at most a cluster longer than theirs, and takes at most so
/// much more space. Length and space go together.
pub fn is_no_larger(file: &str, theirs: (u64, u64), ours: (u64, u64), cluster: u64) -> Outcome {
    let (most_length, most_space) = theirs;
    let (length, allocated) = ours;
    let most = (most_length + cluster, most_space + cluster.max(BLOCK));
    match length <= most.0 && allocated <= most.1 {
        true => Ok(()),
        false => Err(format!(
            "{file}: length and disk space are {length} and {allocated}, by qemu-img {most_length} \
             and {most_space}"
        )),
    }
}

/// What qemu-img says of an image, once instar says the same.
pub fn said_by_both(format: &str, folder: &Path, sandbox: &str) -> Result<Value, String> {
    let line = format!("info -f {format} --output=json disk");
    let theirs = json(&must(folder, QEMU_IMG, &line)?)?;
    let ours = json(&success(instar_now(folder, sandbox, &line)?)?)?;
    info::same(&qemu_img_version()?, &theirs, &ours)?;
    Ok(theirs)
}

/// Whatever a case leaves, whoever ran it, both programs find no fault in it.
pub fn stays_sound(case: &Case, sandbox: &str) -> Outcome {
    for program in BOTH {
        let folder = folder()?;
        let folder = folder.path();
        if program == INSTAR || case.qemu_resizes() {
            pipeline(case, program, folder, sandbox)?;
        } else {
            success(run_by(program, folder, sandbox, &case.create())?)?;
        }
        sound(folder, sandbox, case.format())?;
    }
    Ok(())
}

/// Both programs check an image, as far as they check its format.
pub fn sound(folder: &Path, sandbox: &str, format: &str) -> Outcome {
    let line = format!("check -f {format} disk");
    let theirs = run(folder, QEMU_IMG, &line)?;
    let ours = instar_now(folder, sandbox, &line)?;
    if format == "vpc" {
        // Only instar checks it.
        equal("qemu-img check", 63, theirs.code)?;
        return success(ours).map(drop);
    }
    let code = if format == "raw" { 63 } else { 0 };
    equal("check", code, ours.code)?;
    transcript::same(&theirs, &ours)
}
