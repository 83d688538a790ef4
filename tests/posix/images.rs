//! Real images: an ext4 filesystem with some hundred files, made by
//! `mkfs.ext4 -d` and turned into every variant by `qemu-img`.

use crate::tools::{noise, run};
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};
use tempfile::TempDir;

/// Size of the original disk in bytes.
pub const DISK: u64 = 64 << 20;
/// Files in its filesystem.
const FILES: usize = 300;

/// A way to make an image of the original.
pub struct Variant {
    /// Its name.
    pub name: &'static str,
    /// The image's file name below SOURCE.
    pub file: &'static str,
    /// Sizes are multiples of this.
    pub size_unit: u64,
    /// Whether it is the plainest image of its format.
    pub plain: bool,
    /// Options of the mounts of it.
    pub mounted: &'static str,
    /// Options of `qemu-img convert`.
    options: &'static [&'static str],
}

const fn qcow2(name: &'static str, options: &'static [&'static str]) -> Variant {
    Variant {
        name,
        file: "disk.qcow2",
        size_unit: 512,
        plain: false,
        mounted: "",
        options,
    }
}

const fn raw(name: &'static str) -> Variant {
    Variant {
        name,
        file: "disk.raw",
        size_unit: 1,
        plain: false,
        mounted: "",
        options: &["-O", "raw"],
    }
}

/// All of them.
pub const VARIANTS: &[Variant] = &[
    Variant {
        plain: true,
        ..qcow2("qcow2", &["-O", "qcow2"])
    },
    Variant {
        plain: true,
        ..raw("raw")
    },
    qcow2("zlib", &["-O", "qcow2", "-c"]),
    qcow2(
        "zstd",
        &["-O", "qcow2", "-c", "-o", "compression_type=zstd"],
    ),
    qcow2("clusters-4k", &["-O", "qcow2", "-o", "cluster_size=4k"]),
    qcow2("clusters-2m", &["-O", "qcow2", "-o", "cluster_size=2M"]),
    qcow2("version-2", &["-O", "qcow2", "-o", "compat=0.10"]),
    qcow2("overlay", OVERLAY),
];

/// Images of the formats in which disks are read and resized.
pub const OTHERS: &[Variant] = &[
    other("vmdk", "disk.vmdk", &["-O", "vmdk"]),
    other(
        "vmdk-zeroed-grain",
        "disk.vmdk",
        &["-O", "vmdk", "-o", "zeroed_grain=on"],
    ),
    other(
        "vmdk-flat",
        "disk.vmdk",
        &["-O", "vmdk", "-o", "subformat=monolithicFlat"],
    ),
    other(
        "vmdk-split-flat",
        "disk.vmdk",
        &["-O", "vmdk", "-o", "subformat=twoGbMaxExtentFlat"],
    ),
    other(
        "vmdk-split",
        "disk.vmdk",
        &["-O", "vmdk", "-o", "subformat=twoGbMaxExtentSparse"],
    ),
    other("vhd", "disk.vhd", &["-O", "vpc", "-o", "force_size=on"]),
    other(
        "vhd-fixed",
        "disk.vhd",
        &["-O", "vpc", "-o", "force_size=on,subformat=fixed"],
    ),
    other("vhdx", "disk.vhdx", &["-O", "vhdx"]),
    other(
        "vhdx-fixed",
        "disk.vhdx",
        &["-O", "vhdx", "-o", "subformat=fixed"],
    ),
];

/// Images on other ways than the usual between the kernel and instar.
pub const WAYS: &[Variant] = &[
    Variant {
        mounted: "nopassthrough",
        ..raw("raw-served")
    },
    Variant {
        mounted: "writeback",
        ..raw("raw-writeback")
    },
    Variant {
        mounted: "writeback",
        ..qcow2("qcow2-writeback", &["-O", "qcow2"])
    },
];

/// An image that is read and not resized.
pub const STREAM: Variant = other(
    "vmdk-compressed",
    "disk.vmdk",
    &["-O", "vmdk", "-o", "subformat=streamOptimized"],
);

const fn other(
    name: &'static str,
    file: &'static str,
    options: &'static [&'static str],
) -> Variant {
    Variant {
        name,
        file,
        size_unit: 512,
        plain: false,
        mounted: "",
        options,
    }
}

/// Marks the variant whose content is all in its backing image.
const OVERLAY: &[&str] = &["overlay"];

/// The original and the images made of it, once per run.
pub struct Originals {
    directory: TempDir,
    raw: OnceLock<PathBuf>,
    built: Mutex<HashMap<&'static str, PathBuf>>,
}

impl Variant {
    /// Whether a new file with its name becomes an image of its kind.
    pub fn is_usual(&self) -> bool {
        ["qcow2", "raw", "vmdk", "vhd", "vhdx"].contains(&self.name)
    }

    /// Whether the kernel reads and writes it by itself, where it may.
    pub fn is_passed_through(&self) -> bool {
        self.format() == "raw" && self.mounted.is_empty()
    }

    /// The name of its format.
    pub fn format(&self) -> &'static str {
        match self.file.rsplit_once('.') {
            Some((_, "vhd")) => "vpc",
            Some((_, extension)) => extension,
            None => "raw",
        }
    }
}

impl Variant {
    /// Makes an image of a raw disk.
    pub fn convert(&self, raw: &Path, image: &Path) {
        let words = [&["convert"], self.options, &[s(raw), s(image)]].concat();
        run("qemu-img", &words);
    }
}

impl Originals {
    /// Nothing is made before it is needed.
    pub fn new() -> Self {
        Self {
            directory: tempfile::tempdir().expect("a temporary directory"),
            raw: OnceLock::new(),
            built: Mutex::default(),
        }
    }

    /// The original disk.
    pub fn raw(&self) -> &Path {
        self.raw.get_or_init(|| {
            let files = self.files();
            fs::create_dir(&files).unwrap();
            for number in 0..FILES {
                let length = number * 97 % 60_000;
                let content = noise(number as u64, length);
                fs::write(files.join(format!("file-{number:03}")), content).unwrap();
            }
            let path = self.directory.path().join("original");
            let disk = fs::File::create(&path).unwrap();
            disk.set_len(DISK).unwrap();
            run("mkfs.ext4", &["-q", "-d", s(&files), s(&path)]);
            path
        })
    }

    /// The files that are in its filesystem.
    pub fn files(&self) -> PathBuf {
        self.directory.path().join("files")
    }

    /// Puts an image of the variant into a directory; answers its path.
    pub fn place(&self, variant: &Variant, directory: &Path) -> PathBuf {
        let built = self.build(variant);
        for entry in fs::read_dir(built).unwrap() {
            let entry = entry.unwrap().path();
            run("cp", &["-r", "--sparse=always", s(&entry), s(directory)]);
        }
        directory.join(variant.file)
    }

    fn build(&self, variant: &Variant) -> PathBuf {
        let raw = self.raw();
        let mut built = self.built.lock().unwrap();
        let directory = built.entry(variant.name).or_insert_with(|| {
            let directory = self.directory.path().join(variant.name);
            fs::create_dir(&directory).unwrap();
            let image = directory.join(variant.file);
            if variant.options == OVERLAY {
                let bases = directory.join("bases");
                fs::create_dir(&bases).unwrap();
                let base = bases.join("base.qcow2");
                run("qemu-img", &["convert", "-O", "qcow2", s(raw), s(&base)]);
                let backing = ["-b", "bases/base.qcow2", "-F", "qcow2", s(&image)];
                run(
                    "qemu-img",
                    &[&["create", "-q", "-f", "qcow2"], &backing[..]].concat(),
                );
            } else {
                variant.convert(raw, &image);
            }
            directory
        });
        directory.clone()
    }
}

fn s(path: &Path) -> &str {
    path.to_str().expect("a temporary path is UTF-8")
}
