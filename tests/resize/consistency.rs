//! Formats that qemu-img does not resize: it still has to see the size that was
//! asked for, the content, and no fault.

use crate::cases::Case;
use crate::live::sound;
use crate::machine::Outcome;
use crate::tools::{equal, folder, instar, must, success, virtual_size};
use crate::transcript::QEMU_IMG;
use std::fs::File;
use std::path::Path;

/// Content at the start and in the last sectors of a disk of 1 MiB or more.
const FILL: &str = "-c write~-P~1~0~100k -c write~-P~2~1000k~24k";

/// Resizes an image that has content.
pub fn size_and_content(case: &Case, sandbox: &str) -> Outcome {
    let folder = folder()?;
    let folder = folder.path();
    let format = case.format();
    success(instar(folder, sandbox, &case.create())?)?;
    let start = size_by_both(folder, sandbox, format)?;
    equal("size that is created", theirs(case)?, start)?;
    must(folder, "qemu-io", &format!("-f {format} {FILL} disk"))?;
    let to_raw = format!("convert -f {format} -O raw disk expected");
    must(folder, QEMU_IMG, &to_raw)?;
    let resized = instar(folder, sandbox, &case.resize())?;
    equal("resize", "Image resized.\n", &success(resized)?)?;
    let wanted = case.size_from(start).ok_or("the table has no such size")?;
    equal("size", wanted, size_by_both(folder, sandbox, format)?)?;
    sound(folder, sandbox, format)?;
    File::options()
        .write(true)
        .open(folder.join("expected"))
        .and_then(|file| file.set_len(wanted))
        .map_err(|error| format!("expected: {error}"))?;
    let compare = format!("compare -f {format} -F raw disk expected");
    let same = must(folder, QEMU_IMG, &compare)?;
    equal("content", "Images are identical.\n", &same)
}

/// The size of the image that qemu-img creates.
fn theirs(case: &Case) -> Result<u64, String> {
    let folder = folder()?;
    must(folder.path(), QEMU_IMG, &case.create())?;
    let info = format!("info -f {} --output=json disk", case.format());
    virtual_size(&must(folder.path(), QEMU_IMG, &info)?)
}

/// The size that both programs see.
fn size_by_both(folder: &Path, sandbox: &str, format: &str) -> Result<u64, String> {
    let info = format!("info -f {format} --output=json disk");
    let theirs = virtual_size(&must(folder, QEMU_IMG, &info)?)?;
    let ours = virtual_size(&success(instar(folder, sandbox, &info)?)?)?;
    equal("virtual size", theirs, ours)?;
    Ok(theirs)
}
