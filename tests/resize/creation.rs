//! New images over the options of every format, by qemu-img and by instar, side
//! by side.

use crate::info::{self, numbers};
use crate::live::{BOTH, no_larger, run_by, said_by_both, sound};
use crate::machine::Outcome;
use crate::tools::{equal, folder, must, success};
use crate::transcript::{self, QEMU_IMG};
use serde_json::Value;
use std::fs;
use std::path::Path;

/// A `create` of an image called `disk`.
pub struct Creation {
    pub format: &'static str,
    /// What follows `-o`; nothing for no options at all.
    pub options: &'static str,
    pub size: &'static str,
}

impl Creation {
    /// The row of the table, in words.
    pub fn name(&self) -> String {
        let options = match self.options {
            "" => "no options",
            options => options,
        };
        format!("{}/{options}/{}", self.format, self.size)
    }

    /// The command line, without the program.
    pub fn line(&self) -> String {
        let options = match self.options {
            "" => String::new(),
            options => format!("-o {options} "),
        };
        format!("create -f {} {options}disk {}", self.format, self.size)
    }

    /// The command line that shows the image.
    pub fn info(&self) -> String {
        format!("info -f {} --output=json disk", self.format)
    }

    /// Whether the disk has to have all its space from the beginning.
    pub fn is_allocated(&self) -> bool {
        let modes = ["preallocation=falloc", "preallocation=full"];
        modes.iter().any(|mode| self.options.contains(mode))
    }

    /// Why a version of qemu-img does something else, if that is so.
    pub fn too_early(&self, version: &str) -> Option<String> {
        let later = [
            ("zstd", "comes without zstd"),
            ("data_file_raw", "leaves the tables of a raw data file away"),
        ];
        let mut later = later.iter().filter(|_| numbers(version) < (6, 0));
        let (_, why) = later.find(|(option, _)| self.options.contains(option))?;
        Some(format!("qemu-img {version} {why}"))
    }
}

const fn new(format: &'static str, options: &'static str, size: &'static str) -> Creation {
    Creation {
        format,
        options,
        size,
    }
}

#[rustfmt::skip] // A table.
pub const CREATIONS: &[Creation] = &[
    new("qcow2", "", "0"),
    new("qcow2", "", "1000"),
    new("qcow2", "", "64M"),
    new("qcow2", "", "1T"),
    new("qcow2", "compat=0.10", "64M"),
    new("qcow2", "compat=v3", "64M"),
    new("qcow2", "cluster_size=512", "64M"),
    new("qcow2", "cluster_size=512", "1G"),
    new("qcow2", "cluster_size=4k", "64M"),
    new("qcow2", "cluster_size=4k", "64G"),
    new("qcow2", "cluster_size=2M", "64M"),
    new("qcow2", "refcount_bits=1", "64M"),
    new("qcow2", "refcount_bits=64,cluster_size=1k", "64M"),
    new("qcow2", "lazy_refcounts=on", "64M"),
    new("qcow2", "extended_l2=on,cluster_size=16k", "64M"),
    new("qcow2", "extended_l2=on,cluster_size=2M", "64M"),
    new("qcow2", "compression_type=zstd", "64M"),
    new("qcow2", "preallocation=metadata", "4M"),
    new("qcow2", "preallocation=falloc", "4M"),
    new("qcow2", "preallocation=full", "4M"),
    new("qcow2", "preallocation=metadata,cluster_size=512", "4M"),
    new("qcow2", "preallocation=falloc,cluster_size=4k", "40M"),
    new("qcow2", "preallocation=metadata,extended_l2=on", "4M"),
    new("qcow2", "preallocation=metadata,compat=0.10,cluster_size=1k", "3M"),
    new("qcow2", "data_file=data", "4M"),
    new("qcow2", "data_file=data,data_file_raw=on", "4M"),
    new("qcow2", "data_file=data,preallocation=falloc", "4M"),
    new("raw", "", "0"),
    new("raw", "", "1000"),
    new("raw", "", "64M"),
    new("raw", "preallocation=falloc", "4M"),
    new("raw", "preallocation=full", "4M"),
    new("vmdk", "", "1000"),
    new("vmdk", "", "64M"),
    new("vmdk", "", "100G"),
    new("vmdk", "adapter_type=lsilogic", "64M"),
    new("vmdk", "adapter_type=buslogic", "64M"),
    new("vmdk", "adapter_type=legacyESX", "64M"),
    new("vmdk", "hwversion=7,zeroed_grain=on", "64M"),
    new("vmdk", "compat6=on", "64M"),
    new("vmdk", "subformat=monolithicFlat", "4M"),
    new("vmdk", "subformat=twoGbMaxExtentSparse", "5G"),
    new("vmdk", "subformat=twoGbMaxExtentFlat", "5G"),
    new("vpc", "", "1000"),
    new("vpc", "", "64M"),
    new("vpc", "", "127G"),
    new("vpc", "force_size=on", "64M"),
    new("vpc", "subformat=fixed", "1M"),
    new("vpc", "subformat=fixed,force_size=on", "1M"),
    new("vhdx", "", "1000"),
    new("vhdx", "", "64M"),
    new("vhdx", "", "1T"),
    new("vhdx", "block_size=1M,log_size=2M,block_state_zero=off", "64M"),
    new("vhdx", "block_size=256M", "1G"),
    new("vhdx", "subformat=fixed", "8M"),
];

/// Largest disk in bytes that is read as a whole.
const READABLE: u64 = 8 << 30;

/// Both say the same, make the same files, see the same in them, and find only
/// zeroes and no fault.
pub fn as_qemu_img(creation: &Creation, sandbox: &str) -> Outcome {
    let format = creation.format;
    let (theirs, ours) = (folder()?, folder()?);
    let mut said = Vec::new();
    for (program, folder) in BOTH.into_iter().zip([theirs.path(), ours.path()]) {
        said.push(run_by(program, folder, sandbox, &creation.line())?);
    }
    transcript::same(&said[0], &said[1])?;
    equal("exit status", 0, said[0].code)?;
    let files = files(theirs.path())?;
    equal("files", &files, &self::files(ours.path())?)?;
    let of_theirs = said_by_both(format, theirs.path(), sandbox)?;
    let of_ours = said_by_both(format, ours.path(), sandbox)?;
    info::alike(&of_theirs, &of_ours)?;
    for file in &files {
        no_larger(file, theirs.path(), ours.path(), cluster(&of_ours))?;
    }
    sound(ours.path(), sandbox, format)?;
    match of_ours["virtual-size"].as_u64() {
        // qemu-img reads every byte where it does not know that there are none.
        Some(size) if size > READABLE => Ok(()),
        size => zeroes(ours.path(), format, size.unwrap_or(0)),
    }
}

/// By how many bytes a file of an image may be larger than another. Without
/// clusters there may be a descriptor, whose text grew with time.
pub fn cluster(info: &Value) -> u64 {
    info["cluster-size"].as_u64().unwrap_or(512)
}

/// The names of a folder's files.
pub fn files(folder: &Path) -> Result<Vec<String>, String> {
    let files = fs::read_dir(folder).map_err(|error| error.to_string())?;
    let mut names: Vec<String> = files
        .flatten()
        .map(|file| file.file_name().display().to_string())
        .collect();
    names.sort();
    Ok(names)
}

fn zeroes(folder: &Path, format: &str, size: u64) -> Outcome {
    success(crate::tools::run(
        folder,
        QEMU_IMG,
        &format!("create -q -f raw zeroes {size}"),
    )?)?;
    let compare = format!("compare -f {format} -F raw disk zeroes");
    let same = must(folder, QEMU_IMG, &compare)?;
    equal("content", "Images are identical.\n", &same)
}
