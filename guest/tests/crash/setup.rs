//! Makes a case's image with qemu's own tools, and says what the change is to
//! turn it into.

use super::bytes::Bytes;
use super::case::{Ask, Case, Judges};
use super::disk::Files;
use super::engine::Change;
use super::tools::{must, qemu_img};
use instar_guest::Format;
use instar_guest::proto::Preallocation;
use std::path::Path;

/// The backing image of a case that has one.
const BASE: &str = "base.qcow2";
/// Where the virtual size stands in a qcow2 header, big endian.
const SIZE_FIELD: u64 = 24;
/// Where the cluster bits stand, and the L1 table's fields.
const CLUSTER_BITS: u64 = 20;
const L1_SIZE: u64 = 36;
const L1_OFFSET: u64 = 40;

/// A prepared case.
pub struct Setup {
    dir: tempfile::TempDir,
    format: Format,
    snapshots: &'static [&'static str],
    bitmaps: bool,
    judges: &'static Judges,
    has_backing: bool,
    /// The files before the change.
    pub files: Files,
    /// The guest's disk before the change.
    pub old_disk: Bytes,
    /// The guest's disk after it.
    pub new_disk: Bytes,
    /// The backing image's disk.
    pub backing: Option<Bytes>,
    /// Snapshots and bitmaps before the change, as text to compare.
    pub kept_before: String,
    /// What is asked of the engine.
    pub change: Change,
}

impl Setup {
    /// Builds the image of a case.
    pub fn build(case: &'static Case) -> Result<Self, String> {
        let dir = super::tools::scratch()?;
        let path = dir.path();
        let backing = build_backing(case, path)?;
        create(case, path)?;
        for line in case.prepare {
            prepare(path, case.format, image_name(case.format), line)?;
        }
        let mut setup = Self {
            dir,
            format: case.format,
            snapshots: case.snapshots,
            bitmaps: case.bitmaps,
            judges: case.judges,
            has_backing: backing.is_some(),
            files: Files::default(),
            old_disk: Bytes::default(),
            new_disk: Bytes::default(),
            kept_before: String::new(),
            change: change_of(case, backing.as_ref().map(Bytes::len)),
            backing,
        };
        setup.files = Files::load(setup.dir.path(), setup.besides())?;
        if let Some(tamper) = case.tamper {
            tamper(&mut setup.files)?;
            setup.files.store(setup.dir.path(), setup.besides())?;
        }
        setup.old_disk = setup.read_disk(setup.dir.path())??;
        setup.kept_before = setup.kept(setup.dir.path())??;
        // Reading may have replayed a log.
        setup.files.store(setup.dir.path(), setup.besides())?;
        setup.new_disk = changed(&setup.old_disk, &setup.change);
        Ok(setup)
    }

    /// The image's file name in any directory that it is stored to.
    pub fn image_name(&self) -> &'static str {
        image_name(self.format)
    }

    /// What lies in a directory of states besides them.
    fn besides(&self) -> &'static [&'static str] {
        &[BASE]
    }

    /// Puts the backing image into another directory.
    pub fn link_backing(&self, dir: &Path) -> Result<(), String> {
        if self.has_backing {
            let copied = std::fs::copy(self.dir.path().join(BASE), dir.join(BASE));
            copied.map_err(|error| format!("{BASE}: {error}"))?;
        }
        Ok(())
    }

    /// Makes a directory hold a state, and nothing else but the backing image.
    pub fn store(&self, files: &Files, dir: &Path) -> Result<(), String> {
        files.store(dir, self.besides())
    }

    /// Reads a state's files back.
    pub fn load(&self, dir: &Path) -> Result<Files, String> {
        Files::load(dir, self.besides())
    }

    /// What qemu-img finds on the disk of the image in a directory. Replays its
    /// log first, where it has one that keeps qemu-img from reading.
    pub fn read_disk(&self, dir: &Path) -> Result<Result<Bytes, String>, String> {
        let disk = self.convert(dir, &[])?;
        match disk {
            Err(text) if self.judges.replay && wants_replay(&text) => {
                let arguments = ["check", "-q", "-f", self.format.name(), "-r", "all"];
                qemu_img(dir, &[&arguments[..], &[self.image_name()]].concat())?;
                self.convert(dir, &[])
            }
            disk => Ok(disk),
        }
    }

    /// The guest-visible content of an image, or of the snapshot that `options`
    /// name.
    fn convert(&self, dir: &Path, options: &[&str]) -> Result<Result<Bytes, String>, String> {
        let image = dir.join(self.image_name());
        if self.format == Format::Raw {
            return Bytes::load(&image).map(Ok);
        }
        let out = super::tools::scratch()?;
        let (out, image) = (out.path().join("disk"), image.to_string_lossy());
        let mut arguments = vec!["convert", "-f", self.format.name(), "-O", "raw"];
        arguments.extend(options);
        let target = out.to_string_lossy();
        arguments.extend([&*image, &*target]);
        let converted = qemu_img(dir, &arguments)?;
        match converted.code {
            0 => Bytes::load(&out).map(Ok),
            _ => Ok(Err(converted.brief())),
        }
    }

    /// What a change has to leave alone besides the disk, as text: the content
    /// of snapshots; names, flags and granularities of bitmaps.
    pub fn kept(&self, dir: &Path) -> Result<Result<String, String>, String> {
        let mut kept = String::new();
        for snapshot in self.snapshots {
            match self.convert(dir, &["-l", snapshot])? {
                Ok(disk) => kept += &format!("{snapshot}={} ", self.snapshot(&disk)),
                Err(text) => return Ok(Err(format!("snapshot {snapshot}: {text}"))),
            }
        }
        if self.bitmaps {
            let arguments = ["info", "--output=json", "-f", "qcow2", self.image_name()];
            let info = qemu_img(dir, &arguments)?;
            let json: serde_json::Value = match serde_json::from_str(&info.text) {
                Ok(json) => json,
                Err(_) => return Ok(Err(info.brief())),
            };
            kept += &json["format-specific"]["data"]["bitmaps"].to_string();
        }
        Ok(Ok(kept))
    }

    /// A snapshot's content as text. qemu reads a snapshot at the active disk's
    /// size, so only what every size has is compared.
    fn snapshot(&self, disk: &Bytes) -> String {
        let mut own = disk.clone();
        own.set_len(match self.change {
            Change::Resize { size, .. } => size.min(self.old_disk.len()),
            _ => self.old_disk.len(),
        });
        format!("{:x}", own.digest())
    }
}

/// Whether qemu-img refuses to read before a log is replayed.
pub fn wants_replay(text: &str) -> bool {
    text.contains("log that needs to be replayed")
}

/// What the image of a format is called.
pub fn image_name(format: Format) -> &'static str {
    match format {
        Format::Raw => "image.raw",
        Format::Qcow2 => "image.qcow2",
        Format::Vmdk => "image.vmdk",
        Format::Vhd => "image.vhd",
        Format::Vhdx => "image.vhdx",
    }
}

fn build_backing(case: &Case, dir: &Path) -> Result<Option<Bytes>, String> {
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
        prepare(dir, Format::Qcow2, BASE, line)?;
    }
    let disk = super::tools::scratch()?;
    let disk = disk.path().join("disk");
    let target = disk.to_string_lossy();
    must(
        dir,
        "qemu-img",
        &["convert", "-f", "qcow2", "-O", "raw", BASE, &target],
    )?;
    Bytes::load(&disk).map(Some)
}

fn create(case: &Case, dir: &Path) -> Result<(), String> {
    let image = image_name(case.format);
    if case.format == Format::Raw {
        return Bytes::zeroes(case.size).store(&dir.join(image));
    }
    let size = case.size.to_string();
    let mut arguments = vec!["create", "-q", "-f", case.format.name()];
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
/// qemu-img with `@` for the image, or `size BYTES`, which changes a qcow2
/// header's size alone, as an interrupted shrink leaves it, or `slack BYTE`,
/// which fills the first L1 cluster behind the table.
fn prepare(dir: &Path, format: Format, image: &str, line: &str) -> Result<(), String> {
    let (tool, rest) = line.split_once(' ').ok_or("an empty line")?;
    let edit = |edit: &dyn Fn(&mut Bytes) -> Result<(), String>| {
        let path = dir.join(image);
        let mut bytes = Bytes::load(&path)?;
        edit(&mut bytes)?;
        bytes.store(&path)
    };
    let number = || {
        rest.parse::<u64>()
            .map_err(|_| format!("bad number {rest}"))
    };
    match tool {
        "io" => must(dir, "qemu-io", &["-f", format.name(), "-c", rest, image]).map(drop),
        "img" => {
            let words = rest.split(' ');
            let arguments: Vec<&str> = words
                .map(|word| if word == "@" { image } else { word })
                .collect();
            must(dir, "qemu-img", &arguments).map(drop)
        }
        "size" => edit(&|bytes| {
            bytes.write(SIZE_FIELD, &number()?.to_be_bytes());
            Ok(())
        }),
        "slack" => edit(&|bytes| {
            let end = bytes.big::<8>(L1_OFFSET) + bytes.big::<4>(L1_SIZE) * 8;
            let cluster = 1 << bytes.big::<4>(CLUSTER_BITS);
            let len = end.next_multiple_of(cluster) - end;
            bytes.write(end, &vec![number()? as u8; len as usize]);
            Ok(())
        }),
        _ => Err(format!("unknown preparation {line}")),
    }
}

fn change_of(case: &Case, backing_size: Option<u64>) -> Change {
    let resize = |size, preallocation| Change::Resize {
        size,
        preallocation,
        backing_size,
    };
    match case.ask {
        Ask::Grow(size, preallocation) => resize(size, preallocation),
        Ask::Shrink(size) => resize(size, Preallocation::Off),
        Ask::Write(patches) => Change::Write(patches.to_vec()),
        Ask::Settle => Change::Settle,
        Ask::Repair(repair) => Change::Repair(repair),
    }
}

/// The guest's disk after a change: what a user expects, said without looking
/// at any format.
fn changed(old_disk: &Bytes, change: &Change) -> Bytes {
    let mut disk = old_disk.clone();
    match change {
        Change::Resize { size, .. } => disk.set_len(*size),
        Change::Write(patches) => {
            for patch in patches {
                disk.write(patch.offset, &vec![patch.value; patch.len as usize]);
            }
        }
        Change::Settle | Change::Repair(_) => {}
    }
    disk
}
