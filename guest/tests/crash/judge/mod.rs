//! Judges a state: is it the old disk or the new one for every reader, do
//! programs that we did not write find it sound, and does the same request on
//! it finish the work?
//!
//! The engine judges first, as it costs least. A state that was judged before
//! is not judged again: repairs turn many states into the same one. Each question
//! has a room of its own; here are the verdict and what all of them go by.

mod end;
mod future;
mod growth;
mod present;

use super::case::Case;
use super::disk::Files;
use super::setup::Setup;
use super::tools;
use present::{Seen, When};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;

/// One of so many states before a grow is also grown by qemu-img, and one of so
/// many after the same request again is looked at.
const SAMPLED: u64 = 4;

/// One of so many states is shown to qemu-img where some are.
const SHOWN: u64 = 8;

/// Which disk a state holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// The one before the change.
    Old,
    /// The one after it.
    New,
    /// Guest writes only: some sectors old, the others new.
    Mixed,
    /// Some readers see the old one, others the new one, as the format allows.
    Differs,
}

/// How much of a state is judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// What a reader finds.
    Present,
    /// And what becomes of it: the same request again, a repair, a grow by
    /// another program.
    AndFuture,
}

/// Which states are shown to qemu-img, which takes a hundred times as long as
/// the others that judge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Shown {
    /// None.
    Never,
    /// One of a few.
    Some,
    /// All.
    Always,
}

/// What was found out about a state.
#[derive(Clone, Debug, Default)]
pub struct Verdict {
    /// Which disk it holds; `None` is a fault.
    pub content: Option<Content>,
    /// Whether space is leaked.
    pub leaks: bool,
    /// What is wrong; empty for a good state.
    pub faults: Vec<String>,
}

/// Judges the states of one case in a directory of its own.
pub struct Judge<'a> {
    /// The case.
    pub case: &'a Case,
    /// Its image.
    pub setup: &'a Setup,
    /// Which states qemu-img sees from now on.
    pub shown: Cell<Shown>,
    /// Whether identifiers have to tell of changes.
    pub announced: bool,
    dir: tempfile::TempDir,
    seen: RefCell<HashMap<(u64, When, bool), Seen>>,
    reruns: RefCell<HashMap<(u64, Shown), Vec<String>>>,
    finished: RefCell<HashMap<(u64, Shown), Vec<String>>>,
    /// Whether a grow by qemu-img of the untouched image shows what is not zero.
    shows_already: Cell<Option<bool>>,
    /// How long the image's file may be after the change.
    most_len: Cell<Option<u64>>,
}

impl<'a> Judge<'a> {
    /// A judge with its own copy of what the images refer to.
    pub fn new(case: &'a Case, setup: &'a Setup) -> Result<Self, String> {
        let dir = tools::scratch()?;
        setup.link_backing(dir.path())?;
        Ok(Self {
            case,
            setup,
            shown: Cell::new(Shown::Always),
            announced: true,
            dir,
            seen: RefCell::default(),
            reruns: RefCell::default(),
            finished: RefCell::default(),
            shows_already: Cell::default(),
            most_len: Cell::default(),
        })
    }

    /// The verdict on one state.
    pub fn verdict(&self, files: &Files, depth: Depth) -> Result<Verdict, String> {
        let seen = self.look_at(files, When::Between)?;
        let mut faults = seen.faults;
        if faults.is_empty() && depth == Depth::AndFuture {
            faults.extend(self.future(files, seen.content, seen.leaks)?);
        }
        Ok(Verdict {
            content: seen.content,
            leaks: seen.leaks,
            faults,
        })
    }
}
