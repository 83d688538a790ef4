//! Images that other programs made: Hyper-V, Virtual PC, VMware.

use crate::machine::Outcome;
use crate::stage::{instar, must_line};
use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

/// An image in the repository, packed with bzip2.
pub struct Sample {
    pub name: &'static str,
    /// Below the repository's root.
    packed: &'static str,
    format: &'static str,
    /// Whether qemu-img's map shows the places of data, so that it can be
    /// compared with.
    has_map: bool,
    /// What a refusal to resize it has to contain.
    fixed_because: Option<&'static str>,
}

pub const SAMPLES: &[Sample] = &[
    Sample {
        name: "a dynamic VHD of Hyper-V",
        packed: "guest/tests/engine/data/hyperv2012r2-dynamic.vhd.bz2",
        format: "vpc",
        has_map: true,
        fixed_because: None,
    },
    Sample {
        name: "a dynamic VHD of Virtual PC",
        packed: "guest/tests/engine/data/virtualpc-dynamic.vhd.bz2",
        format: "vpc",
        has_map: true,
        fixed_because: None,
    },
    Sample {
        name: "a dynamic VHDX of Hyper-V",
        packed: "tests/data/images/iotest-dynamic-1G.vhdx.bz2",
        format: "vhdx",
        has_map: false,
        fixed_because: None,
    },
    Sample {
        name: "a stream-optimized VMDK of VMware",
        packed: "guest/tests/data/iotest-version3.vmdk.bz2",
        format: "vmdk",
        has_map: false,
        fixed_because: Some("qemu-img convert"),
    },
];

impl Sample {
    fn file(&self) -> String {
        let extension = if self.format == "vpc" {
            "vhd"
        } else {
            self.format
        };
        format!("disk.{extension}")
    }
}

/// It opens, maps, checks and reads as it does in qemu-img; then it grows, or is
/// refused with the way out.
pub fn is_what_qemu_sees(sample: &Sample) -> Outcome {
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    let images = folder.path().join("images");
    for directory in [&images, &folder.path().join("mnt")] {
        fs::create_dir(directory).map_err(|error| error.to_string())?;
    }
    unpack(sample, &images.join(sample.file()))?;
    is_told_alike(sample, &images)?;
    is_read_alike(sample, folder.path())?;
    resizes(sample, &images)
}

fn unpack(sample: &Sample, to: &Path) -> Outcome {
    let packed = Path::new(env!("CARGO_MANIFEST_DIR")).join(sample.packed);
    let out = File::create(to).map_err(|error| error.to_string())?;
    let status = Command::new("bzip2")
        .arg("-dc")
        .arg(packed)
        .stdout(out)
        .status();
    match status {
        Ok(status) if status.success() => Ok(()),
        other => Err(format!("bzip2: {other:?}")),
    }
}

fn is_told_alike(sample: &Sample, images: &Path) -> Outcome {
    let Sample { format, .. } = sample;
    let file = sample.file();
    let commands: &[&str] = match sample.has_map {
        true => &["info", "map"],
        false => &["info"],
    };
    for command in commands {
        let line = format!("{command} -f {format} --output=json {file}");
        let theirs = must_line(images, "qemu-img", &line)?;
        let ours = instar(images, &line)?;
        if ours.code != 0 || ours.stdout != theirs {
            return Err(format!("{line}: qemu-img says {theirs}, instar {ours:#?}"));
        }
    }
    let checked = instar(images, &format!("check -f {format} {file}"))?;
    match checked.code {
        0 => Ok(()),
        _ => Err(format!("{checked:#?}")),
    }
}

fn is_read_alike(sample: &Sample, folder: &Path) -> Outcome {
    let file = sample.file();
    let mounted = instar(folder, "mount -o ro,log=log images mnt")?;
    if mounted.code != 0 {
        return Err(format!("{mounted:#?}"));
    }
    let copied = must_line(folder, "cp", &format!("mnt/{file} copy.raw"));
    let unmounted = instar(folder, "umount mnt")?;
    copied?;
    if unmounted.code != 0 {
        return Err(format!("{unmounted:#?}"));
    }
    let line = format!("compare -f {} -F raw images/{file} copy.raw", sample.format);
    must_line(folder, "qemu-img", &line).map(drop)
}

fn resizes(sample: &Sample, images: &Path) -> Outcome {
    let Sample { format, .. } = sample;
    let path = images.join(sample.file());
    let before = fs::read(&path).map_err(|error| error.to_string())?;
    let info = format!("info -f {format} --output=json {}", sample.file());
    let size = || -> Result<u64, String> {
        let text = must_line(images, "qemu-img", &info)?;
        let info: serde_json::Value =
            serde_json::from_str(&text).map_err(|error| format!("{error}: {text}"))?;
        info["virtual-size"].as_u64().ok_or(text)
    };
    let old = size()?;
    let line = format!("resize -f {format} {} +64M", sample.file());
    let resized = instar(images, &line)?;
    match sample.fixed_because {
        None => {
            let checked = instar(images, &format!("check -f {format} {}", sample.file()))?;
            match (resized.code, checked.code, size()?) {
                (0, 0, new) if new == old + (64 << 20) => Ok(()),
                (_, _, new) => Err(format!("{old} to {new}: {resized:#?} {checked:#?}")),
            }
        }
        Some(why) => {
            let after = fs::read(&path).map_err(|error| error.to_string())?;
            match resized.code == 1 && resized.stderr.contains(why) && before == after {
                true => Ok(()),
                false => Err(format!("{resized:#?}")),
            }
        }
    }
}
