//! Judges a state: is it the old disk or the new one, do programs that we did
//! not write find it sound, and does the same request on it finish the work?

use crate::cases::Case;
use crate::disk::Files;
use crate::engine::{Change, Session};
use crate::explore::State;
use crate::setup::Setup;
use crate::tools::{Outcome, qemu_img};
use instar_guest::Format;
use instar_guest::plan::SECTOR;
use std::cell::RefCell;
use std::collections::HashMap;
use std::path::Path;

/// Which disk a state holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// The one before the change.
    Old,
    /// The one after it.
    New,
    /// Guest writes only: some sectors old, the others new.
    Mixed,
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

/// What was found out about a state.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// Which disk it holds; `None` is a fault.
    pub content: Option<Content>,
    /// Whether clusters are leaked.
    pub leaks: bool,
    /// What is wrong; empty for a good state.
    pub faults: Vec<String>,
}

/// What qemu-img says about some files.
struct Seen {
    sound: bool,
    leaks: bool,
    text: String,
    disk: Result<Vec<u8>, String>,
    kept: Result<String, String>,
}

/// Judges the states of one case in a directory of its own.
pub struct Judge<'a> {
    case: &'a Case,
    setup: &'a Setup,
    depth: Depth,
    dir: tempfile::TempDir,
    /// What the same request on files came to that were met before: repairs
    /// turn many states into the same one.
    reruns: RefCell<HashMap<u64, Option<String>>>,
}

impl<'a> Judge<'a> {
    /// A judge with its own copy of what the images refer to.
    pub fn new(case: &'a Case, setup: &'a Setup, depth: Depth) -> Result<Self, String> {
        let dir = crate::tools::scratch()?;
        setup.link_backing(dir.path())?;
        Ok(Self {
            case,
            setup,
            depth,
            dir,
            reruns: RefCell::default(),
        })
    }

    /// The verdict on one state.
    pub fn verdict(&self, state: &State) -> Result<Verdict, String> {
        if self.case.format == Format::Raw {
            return Ok(self.verdict_raw(state));
        }
        let seen = self.look_at(&state.files)?;
        let content = seen.disk.as_ref().ok().and_then(|disk| self.classify(disk));
        let mut faults = Vec::new();
        if !seen.sound {
            faults.push(format!("check: {}", seen.text));
        }
        if content.is_none() {
            faults.push(self.describe_disk(&seen.disk));
        }
        faults.extend(self.compare_kept(&seen));
        if faults.is_empty() && self.depth == Depth::AndFuture {
            let disk = seen.disk.as_deref().unwrap_or_default();
            faults.extend(self.rerun(&state.files, disk)?);
            if seen.leaks {
                faults.extend(self.repair(&state.files, disk)?);
            }
            if self.case.foreign_grow && content == Some(Content::Old) {
                faults.extend(self.grow_by_qemu(&state.files)?);
            }
        }
        Ok(Verdict {
            content,
            leaks: seen.leaks,
            faults,
        })
    }

    /// A raw image is its disk.
    fn verdict_raw(&self, state: &State) -> Verdict {
        let disk = &state.files.0[0];
        let content = self.classify(disk);
        let mut faults = Vec::new();
        if content.is_none() {
            faults.push(self.describe_disk(&Ok(disk.clone())));
        }
        if content == Some(Content::Old) {
            match self.finish(&state.files, disk) {
                Ok(finished) if finished.0[0] == self.setup.new_disk => {}
                Ok(_) => faults.push("the same request again ends in another disk".to_owned()),
                Err(text) => faults.push(text),
            }
        }
        Verdict {
            content,
            leaks: false,
            faults,
        }
    }

    fn classify(&self, disk: &[u8]) -> Option<Content> {
        let (old, new) = (&self.setup.old_disk, &self.setup.new_disk);
        if disk == new {
            return Some(Content::New);
        }
        if disk == old {
            return Some(Content::Old);
        }
        let by_sector =
            |(sector, (old, new)): (&[u8], (&[u8], &[u8]))| sector == old || sector == new;
        let sectors = |bytes| <[u8]>::chunks(bytes, SECTOR as usize);
        let mixed = matches!(self.setup.change, Change::Write(_))
            && disk.len() == new.len()
            && sectors(disk)
                .zip(sectors(old).zip(sectors(new)))
                .all(by_sector);
        mixed.then_some(Content::Mixed)
    }

    fn describe_disk(&self, disk: &Result<Vec<u8>, String>) -> String {
        let new = &self.setup.new_disk;
        match disk {
            Err(text) => format!("cannot be read: {text}"),
            Ok(disk) if disk.len() != new.len() && disk.len() != self.setup.old_disk.len() => {
                format!("a disk of {} bytes", disk.len())
            }
            Ok(disk) => {
                let at = disk.iter().zip(new).position(|(is, new)| is != new);
                format!(
                    "neither the old nor the new disk: {} bytes, differs from the new one at {at:#x?}",
                    disk.len()
                )
            }
        }
    }

    /// Puts the files where qemu-img can see them, and asks it.
    fn look_at(&self, files: &Files) -> Result<Seen, String> {
        self.setup.store(files, self.dir.path())?;
        self.look()
    }

    fn look(&self) -> Result<Seen, String> {
        let dir = self.dir.path();
        let image = self.setup.image_name();
        let check = qemu_img(dir, &["check", "-f", "qcow2", image])?;
        let disk = read_disk(dir, image, &[])?;
        Ok(Seen {
            sound: matches!(check.code, 0 | 3),
            leaks: check.code == 3,
            text: check.brief(),
            disk,
            kept: self.setup.kept(dir)?,
        })
    }

    /// Snapshots and bitmaps are those of the untouched image.
    fn compare_kept(&self, seen: &Seen) -> Option<String> {
        match &seen.kept {
            Ok(kept) if *kept == self.setup.kept_before => None,
            Ok(kept) => Some(format!(
                "snapshots or bitmaps changed: {kept} instead of {}",
                self.setup.kept_before
            )),
            Err(text) => Some(text.clone()),
        }
    }

    /// The files after the same request on a state, whose disk is `disk`.
    fn finish(&self, files: &Files, disk: &[u8]) -> Result<Files, String> {
        let planned = Session::open(files, self.case.format)
            .and_then(|mut session| session.plan(&self.setup.change, disk))
            .map_err(|text| format!("the same request again: {text}"))?;
        let mut finished = files.clone();
        finished.apply_all(&planned.epochs);
        Ok(finished)
    }

    /// The same request on the state ends in the new disk without corruption.
    /// Counts that an interrupted change left for places past the end of the
    /// file may show as leaks then, which the repair of leaks takes away.
    fn rerun(&self, files: &Files, disk: &[u8]) -> Result<Option<String>, String> {
        let grows = matches!(self.setup.change, Change::Grow { .. });
        if grows && *disk == self.setup.new_disk {
            return Ok(None);
        }
        let digest = files.digest();
        let known = self.reruns.borrow().get(&digest).cloned();
        if let Some(known) = known {
            return Ok(known);
        }
        let result = self.rerun_anew(files, disk)?;
        self.reruns.borrow_mut().insert(digest, result.clone());
        Ok(result)
    }

    fn rerun_anew(&self, files: &Files, disk: &[u8]) -> Result<Option<String>, String> {
        let finished = match self.finish(files, disk) {
            Ok(finished) => finished,
            Err(text) => return Ok(Some(text)),
        };
        let mut seen = self.look_at(&finished)?;
        if seen.leaks {
            self.repair_leaks()?;
            seen = self.look()?;
        }
        let new = seen
            .disk
            .as_ref()
            .is_ok_and(|disk| *disk == self.setup.new_disk);
        let what = if new { "the new disk" } else { "another disk" };
        let fault = || format!("the same request again ends in {what}: {}", seen.text);
        let unclean = !new || !seen.sound || seen.leaks;
        Ok(unclean.then(fault).or_else(|| {
            let changed = self.compare_kept(&seen)?;
            Some(format!("after the same request again: {changed}"))
        }))
    }

    /// `check -r leaks` leaves the same disk without leaks, and the same request
    /// then ends in a clean image.
    fn repair(&self, files: &Files, disk: &[u8]) -> Result<Option<String>, String> {
        self.setup.store(files, self.dir.path())?;
        let repair = self.repair_leaks()?;
        if repair.code != 0 {
            return Ok(Some(format!("check -r leaks: {}", repair.brief())));
        }
        let repaired = self.setup.load(self.dir.path())?;
        Ok(self
            .rerun(&repaired, disk)?
            .map(|fault| format!("after check -r leaks: {fault}")))
    }

    fn repair_leaks(&self) -> Result<Outcome, String> {
        let image = self.setup.image_name();
        let arguments = ["check", "-q", "-f", "qcow2", "-r", "leaks", image];
        qemu_img(self.dir.path(), &arguments)
    }

    /// qemu-img grows the state to the same disk: nothing stale lies beyond the
    /// old end.
    fn grow_by_qemu(&self, files: &Files) -> Result<Option<String>, String> {
        self.setup.store(files, self.dir.path())?;
        let size = self.setup.new_disk.len().to_string();
        let image = self.setup.image_name();
        let resized: Outcome = qemu_img(
            self.dir.path(),
            &["resize", "-q", "-f", "qcow2", image, &size],
        )?;
        if resized.code != 0 {
            return Ok(Some(format!("qemu-img resize: {}", resized.brief())));
        }
        let disk = read_disk(self.dir.path(), image, &[])?;
        let same = disk.as_ref().is_ok_and(|disk| *disk == self.setup.new_disk);
        let fault = || "after a grow by qemu-img: ".to_owned() + &self.describe_disk(&disk);
        Ok((!same).then(fault))
    }
}

/// The guest-visible content of an image, or of the snapshot that `options` name.
pub fn read_disk(
    dir: &Path,
    image: &str,
    options: &[&str],
) -> Result<Result<Vec<u8>, String>, String> {
    let mut arguments = vec!["convert", "-f", "qcow2", "-O", "raw"];
    arguments.extend(options);
    arguments.extend([image, "disk.raw"]);
    let converted = qemu_img(dir, &arguments)?;
    if converted.code != 0 {
        return Ok(Err(converted.brief()));
    }
    crate::tools::read(&dir.join("disk.raw")).map(Ok)
}
