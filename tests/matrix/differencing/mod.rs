//! Differencing VHD and VHDX images. qemu ignores a VHD's parent and refuses a
//! VHDX's, so the images come from a writer, and the content that is compared
//! with from a reader, that were written from the specifications for these
//! tests: neither knows instar's engine.

mod vhd;
mod vhdx;

use crate::machine::Outcome;
use crate::random::Random;
use crate::stage::instar;
use std::path::Path;

pub const SECTOR: usize = 512;
/// Size of the disks in bytes: not a whole number of blocks.
const SIZE: usize = (5 << 20) + 3 * SECTOR;

/// What one image of a chain holds itself.
pub struct Layer {
    /// The disk, zero where another layer decides.
    pub content: Vec<u8>,
    /// Which sectors are its own.
    own: Vec<bool>,
}

impl Layer {
    /// Runs of random data with gaps between them; about `share` percent.
    fn random(seed: u64, size: usize, share: usize) -> Self {
        let mut random = Random(seed);
        let mut layer = Self {
            content: vec![0; size],
            own: vec![false; size / SECTOR],
        };
        let mut sector = 0;
        while sector < layer.own.len() {
            let run = (1 + random.below(3000)).min(layer.own.len() - sector);
            if random.below(100) < share {
                layer.own[sector..sector + run].fill(true);
                for byte in &mut layer.content[sector * SECTOR..(sector + run) * SECTOR] {
                    *byte = random.next() as u8;
                }
            }
            sector += run;
        }
        layer
    }

    /// Whether the sector at this offset is its own.
    pub fn has(&self, offset: usize) -> bool {
        self.own.get(offset / SECTOR).is_some_and(|&own| own)
    }

    /// Whether any sector of a range is its own.
    pub fn has_any(&self, offset: usize, len: usize) -> bool {
        (offset..offset + len)
            .step_by(SECTOR)
            .any(|at| self.has(at))
    }

    /// Whether all sectors of a range are its own.
    pub fn has_all(&self, offset: usize, len: usize) -> bool {
        (offset..offset + len)
            .step_by(SECTOR)
            .all(|at| self.has(at))
    }
}

pub fn utf16(text: &str, order: fn(u16) -> [u8; 2]) -> Vec<u8> {
    text.encode_utf16().flat_map(order).collect()
}

pub fn from_utf16(bytes: &[u8]) -> String {
    let units: Vec<u16> = bytes
        .as_chunks::<2>()
        .0
        .iter()
        .map(|unit| u16::from_le_bytes(*unit))
        .collect();
    String::from_utf16(&units).expect("text")
}

/// A chain of three images in a folder: base, middle, top. The names of parents
/// are spelt as Windows spells them; the drive does not exist here.
fn make(folder: &Path, extension: &str) -> Vec<u8> {
    let mut disk = vec![0; SIZE];
    for (number, name) in ["base", "middle", "top"].into_iter().enumerate() {
        let layer = Layer::random(number as u64 + 7, SIZE, 70 - 20 * number);
        for at in (0..SIZE).step_by(SECTOR).filter(|&at| layer.has(at)) {
            disk[at..at + SECTOR].copy_from_slice(&layer.content[at..at + SECTOR]);
        }
        let below = ["", "base", "middle"][number];
        let relative = format!(".\\{below}.{extension}");
        let absolute = format!("D:\\elsewhere\\{below}.{extension}");
        let (id, parent_id) = ([number as u8 + 1; 16], [number as u8; 16]);
        let bytes = match extension {
            "vhd" => {
                let parent = vhd::Parent {
                    uuid: parent_id,
                    relative: &relative,
                    absolute: &absolute,
                };
                vhd::write(&layer, id, Some(&parent).filter(|_| number > 0))
            }
            _ => {
                let parent = vhdx::Parent {
                    data_write: parent_id,
                    relative: &relative,
                    absolute: &absolute,
                };
                vhdx::write(&layer, id, Some(&parent).filter(|_| number > 0))
            }
        };
        std::fs::write(folder.join(format!("{name}.{extension}")), bytes).expect("room");
    }
    disk
}

/// What is proven, and its proof for an extension.
pub type Claim = (&'static str, fn(&str) -> Outcome);

/// What is proven, for `vhd` and `vhdx`.
pub const CLAIMS: &[Claim] = &[
    ("is read through the mount as its layers have it", is_read),
    ("checks clean", checks_clean),
    ("shows its parent in info", shows_its_parent),
    ("is not resized", is_not_resized),
    (
        "refuses a parent that is another image",
        refuses_another_parent,
    ),
];

fn folder() -> Result<tempfile::TempDir, String> {
    tempfile::tempdir().map_err(|error| format!("temporary folder: {error}"))
}

/// The second reader, the model and the mount agree.
fn is_read(extension: &str) -> Outcome {
    let folder = folder()?;
    std::fs::create_dir(folder.path().join("images")).map_err(|error| error.to_string())?;
    std::fs::create_dir(folder.path().join("mnt")).map_err(|error| error.to_string())?;
    let disk = make(&folder.path().join("images"), extension);
    let top = folder.path().join(format!("images/top.{extension}"));
    let second = match extension {
        "vhd" => vhd::read(&top),
        _ => vhdx::read(&top),
    };
    if second != disk {
        return Err("the second reader and the model differ".to_owned());
    }
    let mounted = instar(folder.path(), "mount -o log=log images mnt")?;
    if mounted.code != 0 {
        return Err(format!("{mounted:#?}"));
    }
    let seen = std::fs::read(folder.path().join(format!("mnt/top.{extension}")));
    let unmounted = instar(folder.path(), "umount mnt")?;
    let seen = seen.map_err(|error| error.to_string())?;
    let differs = seen.iter().zip(&disk).position(|(is, should)| is != should);
    match (unmounted.code, differs) {
        (0, None) if seen.len() == disk.len() => Ok(()),
        _ => Err(format!(
            "{} of {} bytes, the first difference at {differs:#x?}; {unmounted:#?}",
            seen.len(),
            disk.len()
        )),
    }
}

fn checks_clean(extension: &str) -> Outcome {
    let folder = folder()?;
    make(folder.path(), extension);
    for name in ["base", "middle", "top"] {
        let checked = instar(folder.path(), &format!("check {name}.{extension}"))?;
        if checked.code != 0 || !checked.stderr.is_empty() {
            return Err(format!("{name}: {checked:#?}"));
        }
    }
    Ok(())
}

fn shows_its_parent(extension: &str) -> Outcome {
    let folder = folder()?;
    make(folder.path(), extension);
    let line = format!("info --output=json --backing-chain top.{extension}");
    let shown = instar(folder.path(), &line)?;
    let value: serde_json::Value =
        serde_json::from_str(&shown.stdout).map_err(|error| format!("{error}: {shown:#?}"))?;
    let names: Vec<&str> = value
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|image| image["filename"].as_str())
        .map(|name| name.rsplit('/').next().unwrap_or(name))
        .collect();
    let expected = ["top", "middle", "base"].map(|name| format!("{name}.{extension}"));
    match names == expected {
        true => Ok(()),
        false => Err(format!("{names:?}")),
    }
}

fn is_not_resized(extension: &str) -> Outcome {
    let folder = folder()?;
    make(folder.path(), extension);
    let file = format!("top.{extension}");
    let before = std::fs::read(folder.path().join(&file)).map_err(|error| error.to_string())?;
    let resized = instar(folder.path(), &format!("resize {file} +1M"))?;
    let after = std::fs::read(folder.path().join(&file)).map_err(|error| error.to_string())?;
    match resized.code == 1 && resized.stderr.contains("differencing") && before == after {
        true => Ok(()),
        false => Err(format!("changed: {}; {resized:#?}", before != after)),
    }
}

fn refuses_another_parent(extension: &str) -> Outcome {
    let folder = folder()?;
    make(folder.path(), extension);
    let path = |name: &str| folder.path().join(format!("{name}.{extension}"));
    std::fs::copy(path("top"), path("base")).map_err(|error| error.to_string())?;
    let mapped = instar(folder.path(), &format!("map middle.{extension}"))?;
    match mapped.code == 1 && mapped.stderr.contains(&format!("base.{extension}")) {
        true => Ok(()),
        false => Err(format!("{mapped:#?}")),
    }
}
