//! The host does not parse: a guest that answers from a script decides what an
//! image is, whatever its bytes are. And the host does not trust: a script that
//! reaches too far is refused, each time with its own text, and the file stays
//! as it is.

use crate::scripted;
use crate::tools::{read, scratch, write};
use instar::compat::info::{Layer, OnDisk, to_json};
use instar::compat::version::QemuVersion;
use instar::image::{Access, Image, OpenOptions, ResizeOptions};
use instar::sandbox::{Config, Isolation, Pool};
use instar_guest::facts::{Fact, FactValue};
use instar_guest::plan::{Plan, Purpose, Stage, Step};
use instar_guest::proto::PlanReply;
use instar_guest::{Extent, ExtentKind, Facts, FileNo, Format};
use instar_test_guest::Script;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const K: u64 = 1 << 10;
/// Length of the image file.
const FILE: u64 = 256 * K;
/// The scripted disk's size before and after the resize.
pub const OLD: u64 = 192 * K;
pub const NEW: u64 = 256 * K;
/// Where the scripted resize commits.
const COMMIT: u64 = 100_000;

/// Contents that a parser would tell apart: noise, nothing, and headers.
pub fn contents() -> Vec<(&'static str, Vec<u8>)> {
    let mut random = crate::random::Random(7);
    let noise: Vec<u8> = (0..FILE).map(|_| random.next() as u8).collect();
    let headed = |magic: &[u8]| {
        let mut file = noise.clone();
        file[..magic.len()].copy_from_slice(magic);
        file
    };
    vec![
        ("zeroes", vec![0; FILE as usize]),
        ("a qcow2 header", headed(b"QFI\xfb\0\0\0\x03")),
        ("a VMDK header", headed(b"KDMV\x01\0\0\0")),
        ("a VHD header", headed(b"conectix")),
        ("noise", noise),
    ]
}

fn facts(virtual_size: u64) -> Facts {
    Facts {
        format: Format::Qcow2,
        probed: false,
        virtual_size,
        cluster_size: Some(64 * K),
        write_unit: 64 * K,
        size_unit: 512,
        backing: None,
        identity: None,
        files: Vec::new(),
        files_first: false,
        encrypted: false,
        dirty: false,
        corrupt: false,
        unsettled: None,
        no_write: None,
        no_resize: None,
        snapshots: Vec::new(),
        specific: vec![Fact {
            depth: 0,
            key: "said-by".to_owned(),
            value: FactValue::Text("the script".to_owned()),
        }],
    }
}

fn data(offset: u64, at: u64) -> Extent {
    Extent {
        offset,
        len: 64 * K,
        kind: ExtentKind::Data {
            file: FileNo::IMAGE,
            at,
            in_place: true,
        },
    }
}

/// The disk is the file's third quarter, zeroes, and the file's first quarter.
fn image() -> instar_test_guest::Image {
    let empty = |offset, kind| Extent {
        offset,
        len: 64 * K,
        kind,
    };
    instar_test_guest::Image {
        opens: vec![facts(OLD), facts(NEW)],
        extents: vec![
            data(0, 128 * K),
            empty(64 * K, ExtentKind::Zero { at: None }),
            data(128 * K, 0),
            empty(192 * K, ExtentKind::Unallocated { at: None }),
        ],
        resize: reply(vec![commit(COMMIT, 8)]),
        reads: Vec::new(),
    }
}

/// The disk that the script makes of a file.
pub fn disk(file: &[u8], size: u64) -> Vec<u8> {
    let quarter = 64 * K as usize;
    let mut disk = file[2 * quarter..3 * quarter].to_vec();
    disk.extend(vec![0; quarter]);
    disk.extend(&file[..quarter]);
    disk.extend(vec![0; size as usize - disk.len()]);
    disk
}

/// The file after the scripted resize.
pub fn resized(file: &[u8]) -> Vec<u8> {
    let mut file = file.to_vec();
    file[COMMIT as usize..COMMIT as usize + 8].fill(0xc0);
    file
}

fn reply(stages: Vec<Stage>) -> PlanReply {
    PlanReply {
        plan: Plan { stages },
        ..PlanReply::default()
    }
}

fn step(file: FileNo, offset: u64, len: usize) -> Step {
    Step::Write {
        file,
        offset,
        data: vec![0xc0; len],
    }
}

fn stage(purpose: Purpose, step: Step) -> Stage {
    Stage {
        purpose,
        steps: vec![step],
    }
}

fn commit(offset: u64, len: usize) -> Stage {
    stage(Purpose::Commit, step(FileNo::IMAGE, offset, len))
}

/// A pool of scripted guests.
pub fn pool(isolation: Isolation, image: instar_test_guest::Image) -> Result<Arc<Pool>, String> {
    let config = Config {
        program: scripted::program(&Script::Image(image)),
        isolation,
        ..Config::default()
    };
    Pool::new(config).map_err(|error| error.to_string())
}

/// The pool for the image that everything here is about.
pub fn honest_pool(isolation: Isolation) -> Result<Arc<Pool>, String> {
    pool(isolation, image())
}

fn open(pool: &Arc<Pool>, path: &Path) -> Result<Image, String> {
    OpenOptions::new(Access::Write)
        .open(pool, path)
        .map_err(|error| error.to_string())
}

fn stored(dir: &Path, content: &[u8]) -> Result<PathBuf, String> {
    let path = dir.join("disk.qcow2");
    write(&path, content)?;
    Ok(path)
}

fn equal<T: PartialEq>(what: &str, is: &T, wanted: &T) -> Result<(), String> {
    match is == wanted {
        true => Ok(()),
        false => Err(format!("{what} is not what the script says")),
    }
}

/// Open, facts, reading and resizing act on the script alone.
pub fn the_script_decides(isolation: Isolation) -> Result<(), String> {
    let pool = honest_pool(isolation)?;
    for (name, content) in contents() {
        let dir = scratch()?;
        let path = stored(dir.path(), &content)?;
        let image = open(&pool, &path)?;
        equal(name, &image.virtual_size(), &OLD)?;
        let on_disk = OnDisk {
            len: FILE,
            allocated: FILE,
        };
        let file = "disk.qcow2".to_owned();
        let info = to_json(
            &Layer::new(file, &image.facts(), &[on_disk]),
            QemuVersion::CURRENT,
        );
        let said = info.contains("\"said-by\": \"the script\"");
        equal(&format!("{name}: info"), &said, &true)?;
        let mut bytes = vec![1; OLD as usize];
        let told = |error: instar::image::Error| format!("{name}: {error}");
        image.read_at(&mut bytes, 0).map_err(told)?;
        equal(&format!("{name}: the disk"), &bytes, &disk(&content, OLD))?;
        image.resize(NEW, &ResizeOptions::default()).map_err(told)?;
        equal(&format!("{name}: the size"), &image.virtual_size(), &NEW)?;
        drop(image);
        equal(
            &format!("{name}: the file"),
            &read(&path)?,
            &resized(&content),
        )?;
    }
    Ok(())
}

/// A resize that a script answers with something that the host must refuse.
struct Misdeed {
    name: &'static str,
    stages: fn() -> Vec<Stage>,
    says: &'static str,
}

const MISDEEDS: &[Misdeed] = &[
    Misdeed {
        name: "a step far outside the file",
        stages: || {
            let far = stage(Purpose::Prepare, step(FileNo::IMAGE, 1 << 50, 8));
            vec![far, commit(COMMIT, 8)]
        },
        says: "the file may grow to",
    },
    Misdeed {
        name: "a step that overflows",
        stages: || {
            let far = Step::Zero {
                file: FileNo::IMAGE,
                offset: u64::MAX - 1,
                len: 512,
            };
            vec![stage(Purpose::Prepare, far), commit(COMMIT, 8)]
        },
        says: "overflow",
    },
    Misdeed {
        name: "a length of 8 EiB",
        stages: || {
            let len = Step::SetLength {
                file: FileNo::IMAGE,
                len: 1 << 62,
            };
            vec![stage(Purpose::Commit, len)]
        },
        says: "the file may grow to",
    },
    Misdeed {
        name: "a commit of two sectors",
        stages: || vec![commit(0, 1024)],
        says: "is not inside one sector",
    },
    Misdeed {
        name: "a commit across a sector's end",
        stages: || vec![commit(510, 4)],
        says: "is not inside one sector",
    },
    Misdeed {
        name: "more commits than any format has copies",
        stages: || vec![commit(0, 8); 5],
        says: "it has 5 commits, 4 are allowed",
    },
    Misdeed {
        name: "no commit",
        stages: || vec![stage(Purpose::Prepare, step(FileNo::IMAGE, 0, 8))],
        says: "it has no commit",
    },
    Misdeed {
        name: "a file that it may not write",
        stages: || {
            let other = stage(Purpose::Prepare, step(FileNo(1), 0, 8));
            vec![other, commit(COMMIT, 8)]
        },
        says: "a step changes file 1, which it may not",
    },
];

/// Every plan that reaches too far is refused whole, with its own text.
pub fn misdeeds_are_refused(isolation: Isolation) -> Result<(), String> {
    let content = contents().remove(0).1;
    for misdeed in MISDEEDS {
        let dir = scratch()?;
        let path = stored(dir.path(), &content)?;
        let hostile = instar_test_guest::Image {
            resize: reply((misdeed.stages)()),
            ..image()
        };
        let opened = open(&pool(isolation, hostile)?, &path)?;
        let said = match opened.resize(NEW, &ResizeOptions::default()) {
            Ok(_) => return Err(format!("{}: not refused", misdeed.name)),
            Err(error) => error.to_string(),
        };
        drop(opened);
        if !said.contains(misdeed.says) {
            return Err(format!("{}: {said}", misdeed.name));
        }
        equal(misdeed.name, &read(&path)?, &content)?;
    }
    Ok(())
}

/// Extents that reach past the file, or name another one, are refused.
pub fn extents_are_checked(isolation: Isolation) -> Result<(), String> {
    let content = contents().remove(0).1;
    let elsewhere = Extent {
        kind: ExtentKind::Data {
            file: FileNo(3),
            at: 0,
            in_place: true,
        },
        ..data(0, 0)
    };
    let cases = [
        (
            "past the end of the file",
            data(0, FILE - 512),
            "of a file that may reach",
        ),
        (
            "at the end of all offsets",
            data(0, u64::MAX - 512),
            "overflow",
        ),
        ("a file that is not open", elsewhere, "which is not open"),
    ];
    for (name, extent, says) in cases {
        let dir = scratch()?;
        let path = stored(dir.path(), &content)?;
        let mut hostile = image();
        hostile.extents[0] = extent;
        let opened = open(&pool(isolation, hostile)?, &path)?;
        let said = match opened.read_at(&mut [0; 512], 0) {
            Ok(()) => return Err(format!("{name}: not refused")),
            Err(error) => error.to_string(),
        };
        if !said.contains(says) {
            return Err(format!("{name}: {said}"));
        }
        drop(opened);
        equal(name, &read(&path)?, &content)?;
    }
    Ok(())
}
