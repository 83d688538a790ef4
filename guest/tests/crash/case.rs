//! What a case is: an image that qemu's tools make, and a change to it.
//!
//! Clusters and disks are small, so that a change has few sectors and nearly
//! all its states can be judged. Each format has a table of cases in a file of
//! its own.

use super::bytes::Bytes;
use super::disk::Files;
use super::engine::Patch;
use instar_guest::Format;
use instar_guest::findings::Repair;
use instar_guest::proto::Preallocation;

/// A kibibyte.
pub const K: u64 = 1024;
/// A mebibyte.
pub const M: u64 = 1024 * K;

/// Changes the files of a case as no tool does.
pub type Tamper = fn(&mut Files) -> Result<(), String>;

/// What a program that writes a larger size (in bytes) into the image of that
/// name, and nothing else, makes of the disk.
pub type NaiveGrow = fn(&Files, &str, u64) -> Result<Bytes, String>;

/// An image and a change to it.
pub struct Case {
    /// What the case is about; up to the first slash, what is done.
    pub name: &'static str,
    /// The image's format.
    pub format: Format,
    /// Options for `qemu-img create -o`.
    pub options: &'static str,
    /// Virtual size in bytes.
    pub size: u64,
    /// Size of a backing image, and the lines that fill it.
    pub backing: Option<(u64, &'static [&'static str])>,
    /// Lines that fill the image, see [`setup`](super::setup).
    pub prepare: &'static [&'static str],
    /// What happens to the files before the change, by their names, that no
    /// tool does: a log is left, a copy is damaged.
    pub tamper: Option<Tamper>,
    /// Snapshots that have to stay as they are.
    pub snapshots: &'static [&'static str],
    /// Whether there are bitmaps that have to stay as they are.
    pub bitmaps: bool,
    /// Names of files that an earlier change left, which this one has to remove.
    pub left: &'static [&'static str],
    /// Who judges the states.
    pub judges: &'static Judges,
    /// What can go without a bad state, and why it stays.
    pub harmless: &'static [Harmless],
    /// What is asked.
    pub ask: Ask,
}

/// A case to start from.
pub const BASIC: Case = Case {
    name: "",
    format: Format::Raw,
    options: "",
    size: M,
    backing: None,
    prepare: &[],
    tamper: None,
    snapshots: &[],
    bitmaps: false,
    left: &[],
    judges: &Judges::NONE,
    harmless: &[],
    ask: Ask::Grow(4 * M, Preallocation::Off),
};

/// What is asked of the engine.
#[derive(Clone, Copy)]
pub enum Ask {
    /// A larger size.
    Grow(u64, Preallocation),
    /// A smaller size.
    Shrink(u64),
    /// Guest writes, then a flush.
    Write(&'static [Patch]),
    /// The image is put in order after an interruption.
    Settle,
    /// A check repairs the image.
    Repair(Repair),
}

/// A guest write of one byte value.
pub const fn patch(offset: u64, len: u64, value: u8) -> Patch {
    Patch { offset, len, value }
}

/// A program's or a specification's view of the disk in some files, whose image
/// has this name; or why it refuses them. Uses nothing of the engine.
pub type Reader = fn(&Files, image: &str) -> Result<Bytes, String>;

/// Whether nothing is left behind the end of the disk in some files, whose image
/// has this name; or what is. Uses nothing of the engine.
pub type Beyond = fn(&Files, image: &str) -> Result<(), String>;

/// Fails where files have changed and a program that remembers the image of that
/// name by its identifiers could not know.
pub type Announced = fn(before: &Files, now: &Files, image: &str) -> Result<(), String>;

/// The names of the files that an image of that name consists of besides itself.
/// Uses nothing of the engine.
pub type Parts = fn(&Files, image: &str) -> Result<Vec<String>, String>;

/// Who judges the states of a format, besides the engine itself.
pub struct Judges {
    /// Whether `qemu-img check` does.
    pub check: bool,
    /// Whether `qemu-img convert` does.
    pub convert: bool,
    /// Whether `qemu-img resize` can grow the image: nothing stale may appear
    /// then.
    pub foreign_grow: bool,
    /// Finds what is left behind the end of the disk once a change is finished,
    /// where no reader of the disk would see it.
    pub beyond: Option<Beyond>,
    /// Whether space behind the end of the image's file can be counted as used,
    /// which a check finds once the file is longer.
    pub counts: bool,
    /// Whether qemu-img may refuse a state until it has replayed a log.
    pub replay: bool,
    /// Readers of other copies, each with what it is called.
    pub readers: &'static [(&'static str, Reader)],
    /// Whether one reader may see the old disk where another sees the new one:
    /// each has an authoritative copy of its own.
    pub may_differ: bool,
    /// What the identifiers of an image have to say about a change of its files,
    /// which is from the first to the second.
    pub announced: Option<Announced>,
    /// The files that an image consists of, where that may be several.
    pub parts: Option<Parts>,
    /// The disk that a program finds which grows a finished image by writing a
    /// larger size and touches nothing else: zeroes behind the old end. The size
    /// is in bytes.
    pub naive_grow: Option<NaiveGrow>,
}

impl Judges {
    /// Nobody.
    pub const NONE: Self = Self {
        check: false,
        convert: false,
        foreign_grow: false,
        beyond: None,
        counts: false,
        replay: false,
        readers: &[],
        may_differ: false,
        announced: None,
        parts: None,
        naive_grow: None,
    };
}

/// A part of a plan whose removal leaves no bad state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Harmless {
    /// The part.
    pub part: Part,
    /// Why it is there all the same.
    pub why: &'static str,
}

/// A part of a plan that can be taken out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The barrier after a stage, counted from 0.
    Barrier(usize),
    /// The zeroing by a step of a stage: stage and step, counted from 0.
    Zero(usize, usize),
}

impl Harmless {
    /// The barrier after a stage.
    pub const fn barrier(stage: usize, why: &'static str) -> Self {
        Self {
            part: Part::Barrier(stage),
            why,
        }
    }
}
