//! Images of every kind, made by qemu-img, and what must hold for each.

use crate::machine::Outcome;
use crate::{resize, write};
use instar::image::{Access, Image, OpenOptions};
use instar::sandbox::Pool;
use std::fmt::Debug;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

/// A claim and the test of it.
pub type Case = (&'static str, fn(&Arc<Pool>) -> Outcome);
/// A claim about every kind of image.
pub type VariantCase = (&'static str, fn(&Arc<Pool>, &'static Variant) -> Outcome);

/// A kind of image.
pub struct Variant {
    pub name: &'static str,
    pub format: &'static str,
    /// Options for `qemu-img create -o`, or for `convert` if compressed.
    pub options: &'static str,
    pub make: Make,
}

/// How an image comes about.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Make {
    /// Converted from a raw disk.
    Convert,
    /// The same, compressed.
    Compress,
    /// An overlay over such an image, with some data of its own.
    Overlay,
    /// Converted, then a snapshot, then some data.
    Snapshot,
}

const fn variant(
    name: &'static str,
    format: &'static str,
    options: &'static str,
    make: Make,
) -> Variant {
    Variant {
        name,
        format,
        options,
        make,
    }
}

/// The kinds of images.
pub const VARIANTS: &[Variant] = &[
    variant("raw", "raw", "", Make::Convert),
    variant("qcow2", "qcow2", "", Make::Convert),
    variant("v2", "qcow2", "compat=0.10", Make::Convert),
    variant("512", "qcow2", "cluster_size=512", Make::Convert),
    variant("4k", "qcow2", "cluster_size=4k", Make::Convert),
    variant("2m", "qcow2", "cluster_size=2M", Make::Convert),
    variant("refcount 1", "qcow2", "refcount_bits=1", Make::Convert),
    variant("refcount 64", "qcow2", "refcount_bits=64", Make::Convert),
    variant("extended L2", "qcow2", "extended_l2=on", Make::Convert),
    variant("zlib", "qcow2", "", Make::Compress),
    variant("zstd", "qcow2", "compression_type=zstd", Make::Compress),
    variant(
        "zlib extended L2",
        "qcow2",
        "extended_l2=on",
        Make::Compress,
    ),
    variant("overlay", "qcow2", "", Make::Overlay),
    variant(
        "overlay extended L2",
        "qcow2",
        "extended_l2=on",
        Make::Overlay,
    ),
    variant(
        "overlay v2 4k",
        "qcow2",
        "compat=0.10,cluster_size=4k",
        Make::Overlay,
    ),
    variant("snapshot", "qcow2", "", Make::Snapshot),
    variant(
        "snapshot extended L2",
        "qcow2",
        "extended_l2=on",
        Make::Snapshot,
    ),
    variant("data file", "qcow2", "data_file=DISK.data", Make::Convert),
];

/// What must hold for each kind.
pub const PER_VARIANT: &[VariantCase] = &[
    ("reads as qemu-img does", reads_alike),
    (
        "a second read leaves the sandbox alone",
        second_read_is_free,
    ),
    ("grows and keeps its content", resize::grows),
    ("random writes arrive", write::random_writes),
    (
        "writers do not disturb each other",
        write::concurrent_writers,
    ),
    (
        "flushes and resizes disturb no writer",
        write::beside_flushes_and_resizes,
    ),
    ("preallocation keeps the content", write::preallocation),
];

/// Size of the disks, in bytes: no multiple of a large cluster.
pub const SIZE: u64 = (6 << 20) + 5 * 512;

/// A directory with one image in it.
pub struct Lab {
    dir: tempfile::TempDir,
    pub image: PathBuf,
    pub variant: &'static Variant,
    /// What the disk holds.
    pub content: Vec<u8>,
}

/// An error's text.
pub fn text(error: impl Debug) -> String {
    format!("{error:?}")
}

/// Runs a program to its successful end; answers what it wrote.
pub fn run(program: &str, args: &[&str]) -> Result<String, String> {
    let output = Command::new("timeout")
        .args(["60", program])
        .args(args)
        .output()
        .map_err(text)?;
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    match output.status.success() {
        true => Ok(said(&output.stdout)),
        false => Err(format!(
            "{program} {}: {}{}",
            args.join(" "),
            said(&output.stdout),
            said(&output.stderr)
        )),
    }
}

/// Numbers that are the same in every run (xorshift64*).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let words = (0..len.div_ceil(8)).flat_map(|_| self.next().to_le_bytes());
        words.take(len).collect()
    }
}

/// A disk with data, text that compresses, and holes.
fn sample() -> Vec<u8> {
    let mut random = Random(7);
    let mut disk = vec![0; SIZE as usize];
    disk[100_000..900_000].copy_from_slice(&random.bytes(800_000));
    for (index, byte) in disk[2_000_000..3_500_000].iter_mut().enumerate() {
        *byte = b"all work and no play "[index % 21];
    }
    disk[5_000_000..5_000_700].copy_from_slice(&random.bytes(700));
    let end = disk.len();
    disk[end - 900..].copy_from_slice(&random.bytes(900));
    disk
}

impl Lab {
    pub fn new(variant: &'static Variant) -> Result<Self, String> {
        let dir = tempfile::tempdir().map_err(text)?;
        let image = dir.path().join("disk");
        let mut lab = Self {
            dir,
            image,
            variant,
            content: sample(),
        };
        lab.make()?;
        lab.content = lab.as_qemu_reads()?;
        Ok(lab)
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn make(&self) -> Outcome {
        fs::write(self.at("original"), &self.content).map_err(text)?;
        let overlay = self.variant.make == Make::Overlay;
        let target = if overlay { "base" } else { "disk" };
        self.convert(target)?;
        let disk = self.path("disk");
        if overlay {
            let base = self.path("base");
            let options = self.options();
            let mut args = vec!["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &base];
            args.extend(options.iter().map(String::as_str));
            // Larger than its backing file.
            let size = (SIZE + (1 << 20)).to_string();
            args.extend([disk.as_str(), &size]);
            run("qemu-img", &args)?;
        }
        if self.variant.make == Make::Snapshot {
            run("qemu-img", &["snapshot", "-c", "before", &disk])?;
        }
        if matches!(self.variant.make, Make::Overlay | Make::Snapshot) {
            let write = "write -P 33 500k 130k";
            run(
                "qemu-io",
                &["-f", "qcow2", "-c", write, "-c", "write -P 34 4M 1k", &disk],
            )?;
        }
        Ok(())
    }

    fn convert(&self, target: &str) -> Outcome {
        let (original, target) = (self.path("original"), self.path(target));
        let options = self.options();
        let mut args = vec!["convert", "-f", "raw", "-O", self.variant.format];
        if self.variant.make == Make::Compress {
            args.push("-c");
        }
        args.extend(options.iter().map(String::as_str));
        args.extend([original.as_str(), &target]);
        run("qemu-img", &args).map(|_| ())
    }

    fn options(&self) -> Vec<String> {
        match self.variant.options {
            "" => Vec::new(),
            options => vec!["-o".into(), options.replace("DISK", &self.path("disk"))],
        }
    }

    pub fn path(&self, name: &str) -> String {
        self.at(name).to_string_lossy().into_owned()
    }

    /// The disk as qemu-img sees it.
    pub fn as_qemu_reads(&self) -> Result<Vec<u8>, String> {
        let (disk, out) = (self.path("disk"), self.path("out"));
        run(
            "qemu-img",
            &[
                "convert",
                "-f",
                self.variant.format,
                "-O",
                "raw",
                &disk,
                &out,
            ],
        )?;
        fs::read(&out).map_err(text)
    }

    pub fn open(&self, pool: &Arc<Pool>, access: Access) -> Result<Image, String> {
        open(pool, &self.image, self.variant.format, access)
    }

    /// qemu-img finds nothing wrong, not even a leak, and reads `expected`.
    pub fn judge(&self, expected: &[u8]) -> Outcome {
        if self.variant.format != "raw" {
            run("qemu-img", &["check", &self.path("disk")])?;
        }
        same(&self.as_qemu_reads()?, expected, "qemu-img reads")
    }
}

/// Opens an image whose format is known.
pub fn open(pool: &Arc<Pool>, path: &Path, format: &str, access: Access) -> Result<Image, String> {
    let mut options = OpenOptions::new(access);
    if format == "raw" {
        options.format = Some(instar_guest::Format::Raw);
    }
    options.open(pool, path).map_err(|error| error.to_string())
}

/// The whole disk, read in pieces of an odd length.
pub fn content(image: &Image) -> Result<Vec<u8>, String> {
    let mut disk = vec![0xaa; image.virtual_size() as usize];
    for (index, piece) in disk.chunks_mut(300_007).enumerate() {
        let offset = index as u64 * 300_007;
        image
            .read_at(piece, offset)
            .map_err(|error| error.to_string())?;
    }
    Ok(disk)
}

/// Compares two disks and names the first difference.
pub fn same(found: &[u8], expected: &[u8], what: &str) -> Outcome {
    if found.len() != expected.len() {
        return Err(format!(
            "{what}: {} bytes, not {}",
            found.len(),
            expected.len()
        ));
    }
    // The slices first: an iterator is slow in a build for debugging.
    if found == expected {
        return Ok(());
    }
    match found.iter().zip(expected).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(at) => Err(format!(
            "{what}: byte {at:#x} is {:#x}, not {:#x}",
            found[at], expected[at]
        )),
    }
}

pub fn equal<T: PartialEq + Debug>(found: T, expected: T, what: &str) -> Outcome {
    match found == expected {
        true => Ok(()),
        false => Err(format!("{what}: {found:?}, not {expected:?}")),
    }
}

fn reads_alike(pool: &Arc<Pool>, variant: &'static Variant) -> Outcome {
    let lab = Lab::new(variant)?;
    let image = lab.open(pool, Access::Read)?;
    same(&content(&image)?, &lab.content, "read")
}

fn second_read_is_free(pool: &Arc<Pool>, variant: &'static Variant) -> Outcome {
    let lab = Lab::new(variant)?;
    let image = lab.open(pool, Access::Read)?;
    content(&image)?;
    let before = image.counters().exits;
    content(&image)?;
    equal(image.counters().exits, before, "exits")
}
