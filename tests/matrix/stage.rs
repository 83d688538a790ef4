//! Where a cell happens: a folder with an image that qemu made and filled, and
//! what is done to it.

use crate::cells::{Cell, Surface};
use crate::kinds::{DATA_END, Kind};
use crate::machine::Outcome;
use crate::random::Random;
use crate::transcript::{self, Step};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};
use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};

pub const INSTAR: &str = env!("CARGO_BIN_EXE_instar");
/// The raw file that says what the disk holds.
pub const EXPECTED: &str = "expected";
/// The directory of the image, in the folder of a cell.
pub const IMAGES: &str = "images";

/// A folder of one cell.
pub struct Stage {
    folder: tempfile::TempDir,
    pub cell: Cell,
    /// Disk space of the image's files at first, in bytes.
    pub allocated: u64,
}

impl Stage {
    /// A copy of the kind's image.
    pub fn set(cell: Cell) -> Result<Self, String> {
        let template = template(cell.kind)?;
        let folder = scratch()?;
        let from = format!("{}/.", template.path().display());
        must(folder.path(), "cp", &["-a", "--sparse=always", &from, "."])?;
        let mut stage = Self {
            folder,
            cell,
            allocated: 0,
        };
        stage.allocated = stage.space()?;
        Ok(stage)
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The directory of the image.
    pub fn images(&self) -> PathBuf {
        self.folder().join(IMAGES)
    }

    /// Disk space of all files of the image, in bytes.
    pub fn space(&self) -> Result<u64, String> {
        let sizes = self.files()?.into_iter().map(|path| {
            let metadata = fs::metadata(&path).map_err(|error| format!("{path:?}: {error}"))?;
            Ok(metadata.blocks() * 512)
        });
        sizes.sum()
    }

    /// The names, lengths and bytes of all files of the image; holes take no
    /// part.
    pub fn bytes(&self) -> Result<Vec<(PathBuf, u64, Segments)>, String> {
        let read = |path: PathBuf| {
            let (len, segments) =
                read_segments(&path).map_err(|error| format!("{path:?}: {error}"))?;
            Ok((path, len, segments))
        };
        self.files()?.into_iter().map(read).collect()
    }

    /// The files of the image, by name.
    pub fn files(&self) -> Result<Vec<PathBuf>, String> {
        let entries = fs::read_dir(self.images()).map_err(|error| error.to_string())?;
        let mut files: Vec<PathBuf> = entries
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<Result<_, _>>()
            .map_err(|error| error.to_string())?;
        files.sort();
        Ok(files)
    }

    /// Does what the cell says. What the surface answered, where it refused.
    pub fn play(&self) -> Result<Result<(), String>, String> {
        match self.cell.surface {
            Surface::Command => self.resize(),
            Surface::Truncate | Surface::Fallocate => self.mounted(),
        }
    }

    fn resize(&self) -> Result<Result<(), String>, String> {
        let Cell {
            kind, change, mode, ..
        } = self.cell;
        let mut line = format!("resize -f {} --preallocation={}", kind.format, mode.name());
        if change.is_shrink() {
            line.push_str(" --shrink");
        }
        line.push_str(&format!(" {} {}", kind.file, self.cell.size()));
        let step = instar(&self.images(), &line)?;
        Ok(match step.code {
            0 => Ok(()),
            _ => Err(step.stderr),
        })
    }

    fn mounted(&self) -> Result<Result<(), String>, String> {
        let at = self.folder().join("mnt");
        fs::create_dir(&at).map_err(|error| error.to_string())?;
        let options = format!(
            "log=log,preallocation={}{}",
            self.cell.mode.name(),
            if self.cell.change.is_shrink() {
                ",shrink"
            } else {
                ""
            }
        );
        let mount = instar(self.folder(), &format!("mount -o {options} {IMAGES} mnt"))?;
        expect_success(&mount)?;
        let answer = self.change_mounted(&at.join(self.cell.kind.file));
        let unmounted = instar(self.folder(), "umount mnt").and_then(|step| expect_success(&step));
        let answer = answer?;
        unmounted?;
        Ok(answer)
    }

    /// Asks for the size through the mounted file, in a process of its own.
    fn change_mounted(&self, disk: &Path) -> Result<Result<(), String>, String> {
        let (old, new) = (self.cell.kind.size, self.cell.size());
        let answer = match self.cell.surface {
            Surface::Fallocate => {
                let file = File::options().write(true).open(disk);
                file.and_then(|file| {
                    let (from, len) = (old as i64, (new - old) as i64);
                    Ok(fallocate(&file, FallocateFlags::empty(), from, len)?)
                })
            }
            _ => File::options()
                .write(true)
                .open(disk)
                .and_then(|file| file.set_len(new)),
        };
        let size = fs::metadata(disk)
            .map_err(|error| format!("{disk:?}: {error}"))?
            .len();
        match answer {
            Ok(()) if size == new => Ok(Ok(())),
            Err(error) if size == old => Ok(Err(error.to_string())),
            answer => Err(format!("{answer:?}, and the file has {size} bytes")),
        }
    }
}

/// Pieces of a file that are not holes: where each begins, and its bytes.
pub type Segments = Vec<(u64, Vec<u8>)>;

fn read_segments(path: &Path) -> std::io::Result<(u64, Segments)> {
    let file = File::open(path)?;
    let len = file.metadata()?.len();
    let mut segments = Vec::new();
    let mut at = 0;
    while let Ok(start) = lseek(&file, at, Whence::SeekData) {
        at = lseek(&file, start, Whence::SeekHole)?;
        let mut bytes = vec![0; (at - start) as usize];
        file.read_exact_at(&mut bytes, start as u64)?;
        segments.push((start as u64, bytes));
    }
    Ok((len, segments))
}

/// An image of a kind, and the raw file of what it holds: made once.
fn template(kind: &'static Kind) -> Result<Arc<tempfile::TempDir>, String> {
    type Slot = Arc<OnceLock<Result<Arc<tempfile::TempDir>, String>>>;
    static MADE: OnceLock<Mutex<HashMap<&'static str, Slot>>> = OnceLock::new();
    let slot = {
        let mut made = MADE
            .get_or_init(Mutex::default)
            .lock()
            .map_err(|_| "a template panicked")?;
        Arc::clone(made.entry(kind.name).or_default())
    };
    slot.get_or_init(|| make(kind).map(Arc::new)).clone()
}

/// Random data below [`DATA_END`] in pieces, written in random order and partly
/// twice, so that the image is fragmented.
fn make(kind: &Kind) -> Result<tempfile::TempDir, String> {
    let folder = scratch()?;
    let images = folder.path().join(IMAGES);
    fs::create_dir(&images).map_err(|error| error.to_string())?;
    let Kind {
        format,
        file,
        create,
        size,
        ..
    } = kind;
    let line = format!("create -q -f {format} {create} {file} {size}");
    must_line(&images, "qemu-img", &line)?;
    let mut random = Random(kind.size ^ 0x6d61_7472_6978);
    let noise: Vec<u8> = (0..DATA_END / 8)
        .flat_map(|_| random.next().to_le_bytes())
        .collect();
    fs::write(folder.path().join("noise"), noise).map_err(|error| error.to_string())?;
    let mut pieces: Vec<u64> = (0..DATA_END / PIECE).filter(|at| at % 3 != 1).collect();
    for at in (1..pieces.len()).rev() {
        pieces.swap(at, random.below(at + 1));
    }
    let mut arguments = vec!["-f".to_owned(), (*format).to_owned()];
    for piece in pieces {
        let at = piece * PIECE + 512 * random.below(40) as u64;
        let len = (512 * (1 + random.below(160)) as u64).min(DATA_END - at);
        arguments.extend(["-c".to_owned(), format!("write -q -s ../noise {at} {len}")]);
    }
    arguments.push((*file).to_owned());
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let said = must(&images, "qemu-io", &arguments)?;
    if said.contains("rror") {
        return Err(format!("qemu-io: {said}"));
    }
    let line = match kind.is_sampled() {
        false => format!("convert -f {format} -O raw {IMAGES}/{file} {EXPECTED}"),
        true => head(kind, EXPECTED),
    };
    must_line(folder.path(), "qemu-img", &line)?;
    Ok(folder)
}

/// The `qemu-img` line that copies the start of a disk, which has all its data.
pub fn head(kind: &Kind, to: &str) -> String {
    let Kind { format, file, .. } = kind;
    format!("dd -f {format} -O raw bs=1M count=16 if={IMAGES}/{file} of={to}")
}

/// The `qemu-img` line that copies the end of a disk, from before the end that
/// it had.
pub fn tail(cell: &Cell, to: &str) -> String {
    let Kind {
        format, file, size, ..
    } = cell.kind;
    let from = (size.min(&cell.size()) >> 20).saturating_sub(4);
    format!("dd -f {format} -O raw bs=1M skip={from} if={IMAGES}/{file} of={to}")
}

/// Pieces of data begin this far apart, in bytes.
const PIECE: u64 = 96 << 10;

fn scratch() -> Result<tempfile::TempDir, String> {
    tempfile::tempdir().map_err(|error| format!("temporary folder: {error}"))
}

/// Runs instar with the words of a line.
pub fn instar(folder: &Path, line: &str) -> Result<Step, String> {
    transcript::run(folder, INSTAR, &transcript::words(line), &[])
}

/// Runs a program with the words of a line; it has to succeed. Its output.
pub fn must_line(folder: &Path, program: &str, line: &str) -> Result<String, String> {
    let words = transcript::words(line);
    must(
        folder,
        program,
        &words.iter().map(String::as_str).collect::<Vec<_>>(),
    )
}

fn must(folder: &Path, program: &str, arguments: &[&str]) -> Result<String, String> {
    let arguments: Vec<String> = arguments.iter().map(|word| (*word).to_owned()).collect();
    let step = transcript::run(folder, program, &arguments, &[])?;
    match step.code {
        0 => Ok(step.stdout),
        _ => Err(format!("{program}: {step:#?}")),
    }
}

fn expect_success(step: &Step) -> Outcome {
    match step.code {
        0 => Ok(()),
        _ => Err(format!("{step:#?}")),
    }
}
