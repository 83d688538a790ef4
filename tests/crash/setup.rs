//! Makes a case's image with qemu's own tools, and says what the change is to
//! turn it into.

use crate::cases::{Ask, Case};
use crate::disk::Files;
use crate::engine::Change;
use crate::judge::read_disk;
use crate::tools::{must, qemu_img, read, write};
use instar_guest::Format;
use std::path::{Path, PathBuf};

/// The external data file of a case that has one.
const DATA: &str = "data.raw";
/// The backing image of a case that has one.
const BASE: &str = "base.qcow2";
/// Where the virtual size stands in a qcow2 header, big endian.
const SIZE_FIELD: std::ops::Range<usize> = 24..32;
/// Where the lowest byte of the cluster bits stands, and the L1 table's fields.
const CLUSTER_BITS: usize = 23;
const L1_SIZE: usize = 36;
const L1_OFFSET: usize = 40;

/// A prepared case.
pub struct Setup {
    dir: tempfile::TempDir,
    image: &'static str,
    snapshots: &'static [&'static str],
    bitmaps: bool,
    has_backing: bool,
    /// The files before the change.
    pub files: Files,
    /// The guest's disk before the change.
    pub old_disk: Vec<u8>,
    /// The guest's disk after it.
    pub new_disk: Vec<u8>,
    /// Snapshots and bitmaps before the change, as text to compare.
    pub kept_before: String,
    /// What is asked of the engine.
    pub change: Change,
}

impl Setup {
    /// Builds the image of a case.
    pub fn build(case: &'static Case) -> Result<Self, String> {
        let dir = crate::tools::scratch()?;
        let path = dir.path();
        let image = match case.format {
            Format::Raw => "image.raw",
            _ => "image.qcow2",
        };
        let backing_size = build_backing(case, path)?;
        create(case, path, image)?;
        for line in case.prepare {
            prepare(path, image, line)?;
        }
        let mut files = vec![read(&path.join(image))?];
        if path.join(DATA).exists() {
            files.push(read(&path.join(DATA))?);
        }
        let old_disk = match case.format {
            Format::Raw => files[0].clone(),
            _ => read_disk(path, image, &[])??,
        };
        let change = change_of(case, backing_size);
        let mut setup = Self {
            image,
            snapshots: case.snapshots,
            bitmaps: case.bitmaps,
            has_backing: backing_size.is_some(),
            files: Files(files),
            new_disk: changed(&old_disk, &change),
            old_disk,
            kept_before: String::new(),
            change,
            dir,
        };
        setup.kept_before = setup.kept(setup.dir.path())??;
        Ok(setup)
    }

    /// The image's file name in any directory that it is stored to.
    pub fn image_name(&self) -> &'static str {
        self.image
    }

    /// Puts the backing image into another directory.
    pub fn link_backing(&self, dir: &Path) -> Result<(), String> {
        if self.has_backing {
            write(&dir.join(BASE), &read(&self.dir.path().join(BASE))?)?;
        }
        Ok(())
    }

    /// The files of a state that is stored in a directory, by number.
    pub fn paths(&self, dir: &Path) -> Vec<PathBuf> {
        let names = [self.image, DATA].into_iter().take(self.files.0.len());
        names.map(|name| dir.join(name)).collect()
    }

    /// Writes a state's files into a directory.
    pub fn store(&self, files: &Files, dir: &Path) -> Result<(), String> {
        let mut all = self.paths(dir).into_iter().zip(&files.0);
        all.try_for_each(|(path, bytes)| write(&path, bytes))
    }

    /// Reads a state's files back.
    pub fn load(&self, dir: &Path) -> Result<Files, String> {
        let files: Result<Vec<_>, _> = self.paths(dir).iter().map(|path| read(path)).collect();
        files.map(Files)
    }

    /// What a change has to leave alone besides the disk, as text: the content
    /// of snapshots; names, flags and granularities of bitmaps.
    pub fn kept(&self, dir: &Path) -> Result<Result<String, String>, String> {
        let mut kept = String::new();
        for snapshot in self.snapshots {
            match read_disk(dir, self.image, &["-l", snapshot])? {
                // qemu reads a snapshot at the active disk's size.
                Ok(disk) => {
                    let own = &disk[..self.old_disk.len().min(disk.len())];
                    let digest = Files(vec![own.to_vec()]).digest();
                    kept += &format!("{snapshot}={digest:x} ");
                }
                Err(text) => return Ok(Err(format!("snapshot {snapshot}: {text}"))),
            }
        }
        if self.bitmaps {
            let arguments = ["info", "--output=json", "-f", "qcow2", self.image];
            let info = qemu_img(dir, &arguments)?;
            let json: serde_json::Value = match serde_json::from_str(&info.text) {
                Ok(json) => json,
                Err(_) => return Ok(Err(info.brief())),
            };
            kept += &json["format-specific"]["data"]["bitmaps"].to_string();
        }
        Ok(Ok(kept))
    }
}

fn build_backing(case: &Case, dir: &Path) -> Result<Option<u64>, String> {
    let Some((size, lines)) = case.backing else {
        return Ok(None);
    };
    let size = size.to_string();
    must(
        dir,
        "qemu-img",
        &["create", "-q", "-f", "qcow2", BASE, &size],
    )?;
    for line in lines {
        prepare(dir, BASE, line)?;
    }
    size.parse().map(Some).map_err(|_| "size".to_owned())
}

fn create(case: &Case, dir: &Path, image: &str) -> Result<(), String> {
    let size = case.size.to_string();
    if case.format == Format::Raw {
        return write(&dir.join(image), &vec![0; case.size as usize]);
    }
    let mut arguments = vec!["create", "-q", "-f", "qcow2"];
    if !case.options.is_empty() {
        arguments.extend(["-o", case.options]);
    }
    if case.backing.is_some() {
        arguments.extend(["-F", "qcow2", "-b", BASE]);
    }
    arguments.extend([image, &size]);
    must(dir, "qemu-img", &arguments).map(drop)
}

/// One line of preparation: `io COMMAND` for qemu-io, `img ARGUMENTS` for
/// qemu-img with `@` for the image, or `size BYTES`, which changes the header's
/// size alone, as an interrupted shrink leaves it, or `slack BYTE`, which fills
/// the first L1 cluster behind the table.
fn prepare(dir: &Path, image: &str, line: &str) -> Result<(), String> {
    let (tool, rest) = line.split_once(' ').ok_or("an empty line")?;
    match tool {
        "io" if image.ends_with(".raw") => {
            must(dir, "qemu-io", &["-f", "raw", "-c", rest, image]).map(drop)
        }
        "io" => must(dir, "qemu-io", &["-f", "qcow2", "-c", rest, image]).map(drop),
        "img" => {
            let arguments: Vec<&str> = rest
                .split(' ')
                .map(|word| if word == "@" { image } else { word })
                .collect();
            must(dir, "qemu-img", &arguments).map(drop)
        }
        "size" => {
            let size: u64 = rest.parse().map_err(|_| format!("bad size {rest}"))?;
            let mut bytes = read(&dir.join(image))?;
            bytes[SIZE_FIELD].copy_from_slice(&size.to_be_bytes());
            write(&dir.join(image), &bytes)
        }
        "slack" => {
            let byte = rest.parse().map_err(|_| format!("bad byte {rest}"))?;
            let mut bytes = read(&dir.join(image))?;
            let entries = u32::from_be_bytes(std::array::from_fn(|at| bytes[L1_SIZE + at]));
            let offset = u64::from_be_bytes(std::array::from_fn(|at| bytes[L1_OFFSET + at]));
            let end = offset as usize + entries as usize * 8;
            let cluster = 1 << bytes[CLUSTER_BITS];
            bytes[end..end.next_multiple_of(cluster)].fill(byte);
            write(&dir.join(image), &bytes)
        }
        _ => Err(format!("unknown preparation {line}")),
    }
}

fn change_of(case: &Case, backing_size: Option<u64>) -> Change {
    match case.ask {
        Ask::Grow(size, preallocation) => Change::Grow {
            size,
            preallocation,
            backing_size,
        },
        Ask::Write(patches) => Change::Write(patches.to_vec()),
    }
}

/// The guest's disk after a change: what a user expects, said without looking
/// at any format.
fn changed(old_disk: &[u8], change: &Change) -> Vec<u8> {
    let mut disk = old_disk.to_vec();
    match change {
        Change::Grow { size, .. } => disk.resize(*size as usize, 0),
        Change::Write(patches) => {
            for patch in patches {
                disk[patch.offset as usize..(patch.offset + patch.len) as usize].fill(patch.value);
            }
        }
    }
    disk
}
