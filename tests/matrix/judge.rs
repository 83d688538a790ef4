//! What has to be true of an image after a cell.

use crate::cells::{Cell, Mode, Outlook};
use crate::kinds::DATA_END;
use crate::machine::Outcome;
use crate::stage::{EXPECTED, IMAGES, Stage, head, instar, must_line, tail};
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;

/// Plays a cell and judges what came of it.
pub fn cell(cell: Cell) -> Outcome {
    let stage = Stage::set(cell)?;
    match cell.outlook() {
        Outlook::Done => match stage.play()? {
            Ok(()) => is_resized(&stage),
            Err(text) => Err(format!("refused: {text}")),
        },
        Outlook::Refused(why) => is_refused(&stage, why),
    }
}

/// The error says why, and no byte has changed.
fn is_refused(stage: &Stage, why: &str) -> Outcome {
    let before = stage.bytes()?;
    match stage.play()? {
        Ok(()) => Err("it was not refused".to_owned()),
        Err(text) if !text.contains(why) => Err(format!("refused with another text: {text}")),
        Err(_) if before != stage.bytes()? => {
            Err("it was refused and the image has changed".to_owned())
        }
        Err(_) => Ok(()),
    }
}

/// The disk has exactly the size asked for, holds what it held, as far as there
/// is room, and then zeroes; nobody finds a fault.
fn is_resized(stage: &Stage) -> Outcome {
    let cell = &stage.cell;
    let (folder, kind, size) = (stage.folder(), cell.kind, cell.size());
    let image = format!("{IMAGES}/{}", kind.file);
    File::options()
        .write(true)
        .open(folder.join(EXPECTED))
        .and_then(|file| file.set_len(size))
        .map_err(|error| format!("{EXPECTED}: {error}"))?;

    let line = format!("info -f {} --output=json {image}", kind.format);
    let theirs = must_line(folder, "qemu-img", &line)?;
    let info: serde_json::Value =
        serde_json::from_str(&theirs).map_err(|error| format!("{error}: {theirs}"))?;
    let rounded = size.next_multiple_of(512);
    if info["virtual-size"] != rounded {
        return Err(format!("{size} bytes were asked for, there are {theirs}"));
    }
    if kind.is_checked_by_qemu() {
        must_line(
            folder,
            "qemu-img",
            &format!("check -f {} {image}", kind.format),
        )?;
    }
    if kind.format != "raw" {
        let checked = instar(folder, &format!("check -f {} {image}", kind.format))?;
        if checked.code != 0 || !checked.stderr.is_empty() {
            return Err(format!("instar check: {checked:#?}"));
        }
    }
    match kind.is_sampled() {
        true => has_the_ends(stage)?,
        false => {
            let line = format!("compare -f {} -F raw {image} {EXPECTED}", kind.format);
            let compared = must_line(folder, "qemu-img", &line)?;
            if compared != "Images are identical.\n" {
                return Err(format!("content: {compared}"));
            }
        }
    }
    is_allocated(stage)
}

/// The start of the disk is what it was, and its end reads as zeroes from before
/// the end that it had.
fn has_the_ends(stage: &Stage) -> Outcome {
    let (folder, cell) = (stage.folder(), &stage.cell);
    must_line(folder, "qemu-img", &head(cell.kind, "head"))?;
    must_line(folder, "qemu-img", &tail(cell, "tail"))?;
    let read = |name: &str| fs::read(folder.join(name)).map_err(|error| error.to_string());
    let (head, tail) = (read("head")?, read("tail")?);
    let mut expected = vec![0; head.len()];
    File::open(folder.join(EXPECTED))
        .and_then(|file| file.read_exact_at(&mut expected, 0))
        .map_err(|error| format!("{EXPECTED}: {error}"))?;
    let is_empty = cell.size() > 2 * DATA_END;
    match (head == expected, tail.iter().all(|&byte| byte == 0)) {
        (true, zero) if zero || !is_empty => Ok(()),
        found => Err(format!("the start is the same, the end is zero: {found:?}")),
    }
}

/// What was added takes the disk space that was asked for.
fn is_allocated(stage: &Stage) -> Outcome {
    let cell = &stage.cell;
    if !cell.change.is_growth() {
        return Ok(());
    }
    let (added, before) = (cell.size() - cell.kind.size, stage.allocated);
    let now = stage.space()?;
    let is_right = match cell.allocation() {
        // The tables of a sparse VMDK are all there from the beginning.
        Mode::Off | Mode::Metadata => now < before + added,
        Mode::Falloc | Mode::Full => now >= before + added,
    };
    match is_right {
        true => Ok(()),
        false => Err(format!(
            "{added} bytes were added, and disk space went from {before} to {now}"
        )),
    }
}
