//! What readers find in some files now: the old disk or the new one, sound, with
//! what is to be kept. What may become of the files is not asked here.

use super::super::bytes::Bytes;
use super::super::disk::Files;
use super::super::engine::{Change, Session};
use super::super::setup::wants_replay;
use super::super::tools::qemu_img;
use super::{Content, Judge, SAMPLED, SHOWN, Shown};
use instar_guest::Format;
use instar_guest::findings::{Finding, Severity};
use instar_guest::proto::Preallocation;
use std::path::Path;

/// When files are looked at: a repair may have to finish before they are sound.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum When {
    /// After a crash.
    Between,
    /// After the whole change.
    Finished,
    /// After the same request again. There are as many of these as of states, so
    /// that qemu-img looks at one in a few.
    Again,
}

/// What readers find in some files.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    pub(super) content: Option<Content>,
    pub(super) leaks: bool,
    pub(super) faults: Vec<String>,
}

impl Judge<'_> {
    /// What every reader finds.
    pub(super) fn look_at(&self, files: &Files, when: When) -> Result<Seen, String> {
        let by_qemu = self.is_shown(files, when);
        let key = (files.digest(), when, by_qemu);
        if let Some(seen) = self.seen.borrow().get(&key) {
            return Ok(seen.clone());
        }
        let seen = self.look(files, when, by_qemu)?;
        self.seen.borrow_mut().insert(key, seen.clone());
        Ok(seen)
    }

    /// Whether qemu-img looks at some files.
    fn is_shown(&self, files: &Files, when: When) -> bool {
        match (self.shown.get(), when) {
            (Shown::Never, _) => false,
            (Shown::Some, When::Between) => files.digest().is_multiple_of(SHOWN),
            (Shown::Some, When::Again) => files.digest().is_multiple_of(SHOWN * SAMPLED),
            (Shown::Always, When::Again) => files.digest().is_multiple_of(SAMPLED),
            (_, When::Finished) | (Shown::Always, When::Between) => true,
        }
    }

    fn look(&self, files: &Files, when: When, by_qemu: bool) -> Result<Seen, String> {
        let (judges, image) = (self.case.judges, self.setup.image_name());
        let mut seen = Seen::default();
        let mut contents = Vec::new();
        let mut hear = |seen: &mut Seen, reader: &str, disk: Result<Bytes, String>| match disk
            .as_ref()
            .ok()
            .and_then(|disk| self.classify(disk))
        {
            Some(content) => contents.push(content),
            None => seen.faults.push(self.describe(reader, &disk)),
        };
        let own = Session::open(files, image, self.case.format)
            .and_then(|mut session| session.disk(self.setup.backing.as_ref()));
        hear(&mut seen, "instar", own);
        for (name, reader) in judges.readers {
            hear(&mut seen, name, reader(files, image));
        }
        if when != When::Between {
            self.check_by_engine(files, &mut seen);
        }
        if let (Some(announced), When::Between, true) = (judges.announced, when, self.announced) {
            seen.faults
                .extend(announced(&self.setup.files, files, image).err());
        }
        if by_qemu && seen.faults.is_empty() && (judges.check || judges.convert) {
            self.setup.store(files, self.dir.path())?;
            if judges.check && (when != When::Between || self.starts_sound()) {
                self.check_by_qemu(&mut seen)?;
            }
            if judges.convert {
                let disk = self.setup.read_disk(self.dir.path())?;
                hear(&mut seen, "qemu-img", disk);
                seen.faults.extend(self.compare_kept(self.dir.path())?);
            }
        }
        seen.content = contents.first().copied();
        if seen.content == Some(Content::New) && seen.faults.is_empty() {
            seen.faults.extend(self.not_allocated(files)?);
        }
        if contents
            .iter()
            .any(|content| Some(*content) != seen.content)
        {
            seen.content = Some(Content::Differs);
            if !judges.may_differ {
                seen.faults.push(format!("readers differ: {contents:?}"));
            }
        }
        Ok(seen)
    }

    /// The engine's own check finds nothing wrong but leaks.
    pub(super) fn check_by_engine(&self, files: &Files, seen: &mut Seen) {
        let checked = Session::open(files, self.setup.image_name(), self.case.format)
            .and_then(|mut session| session.check());
        match checked {
            Err(text) => seen.faults.push(text),
            Ok(None) => {}
            Ok(Some((report, findings))) => {
                seen.leaks |= report.leaks > 0;
                if report.corruptions + report.check_errors > 0 {
                    let counts = |finding: &&Finding| {
                        matches!(finding.severity, Severity::Corruption | Severity::Error)
                    };
                    let text = findings.iter().find(counts).map(|finding| &*finding.text);
                    let text = text.unwrap_or_default();
                    seen.faults
                        .push(format!("instar check: {report:?}: {text}"));
                }
            }
        }
    }

    fn check_by_qemu(&self, seen: &mut Seen) -> Result<(), String> {
        let (dir, image) = (self.dir.path(), self.setup.image_name());
        let arguments = ["check", "-f", self.case.format.name(), image];
        let mut check = qemu_img(dir, &arguments)?;
        if self.case.judges.replay && wants_replay(&check.text) {
            let repair = ["-q", "-r", "all"];
            qemu_img(dir, &[&arguments[..3], &repair, &[image]].concat())?;
            check = qemu_img(dir, &arguments)?;
        }
        seen.leaks |= check.code == 3;
        if !matches!(check.code, 0 | 3) {
            seen.faults
                .push(format!("qemu-img check: {}", check.brief()));
        }
        Ok(())
    }

    /// Whether qemu-img finds the image of the case sound from the beginning: one
    /// that is repaired or put in order is not.
    fn starts_sound(&self) -> bool {
        !matches!(self.setup.change, Change::Settle | Change::Repair(_))
    }

    fn classify(&self, disk: &Bytes) -> Option<Content> {
        let (old, new) = (&self.setup.old_disk, &self.setup.new_disk);
        if disk == new {
            return Some(Content::New);
        }
        if disk == old {
            return Some(Content::Old);
        }
        let mixed = matches!(self.setup.change, Change::Write(_))
            && disk.len() == new.len()
            && disk.mixes(old, new);
        mixed.then_some(Content::Mixed)
    }

    pub(super) fn describe(&self, reader: &str, disk: &Result<Bytes, String>) -> String {
        let (old, new) = (&self.setup.old_disk, &self.setup.new_disk);
        match disk {
            Err(text) => format!("{reader}: {text}"),
            Ok(disk) if disk.len() != new.len() && disk.len() != old.len() => {
                format!("{reader}: a disk of {} bytes", disk.len())
            }
            Ok(disk) => {
                let wanted = if disk.len() == new.len() { new } else { old };
                format!(
                    "{reader}: a disk of {} bytes that differs at {:#x?}",
                    disk.len(),
                    disk.difference(wanted)
                )
            }
        }
    }

    /// The new disk has a place for what a grow adds that allocates it, in a
    /// format that maps it cluster by cluster.
    fn not_allocated(&self, files: &Files) -> Result<Option<String>, String> {
        let Change::Resize { preallocation, .. } = self.setup.change else {
            return Ok(None);
        };
        if self.case.format != Format::Qcow2 || preallocation == Preallocation::Off {
            return Ok(None);
        }
        let mut session = Session::open(files, self.setup.image_name(), self.case.format)?;
        let cluster = session.facts.cluster_size.unwrap_or(1);
        let added = self.setup.old_disk.len().next_multiple_of(cluster);
        let mapped = session.is_mapped_from(added)?;
        Ok((!mapped).then(|| "a part of the added range is not allocated".to_owned()))
    }

    /// Snapshots and bitmaps are those of the untouched image.
    fn compare_kept(&self, dir: &Path) -> Result<Option<String>, String> {
        let before = &self.setup.kept_before;
        Ok(match self.setup.kept(dir)? {
            Ok(kept) if kept == *before => None,
            Ok(kept) => Some(format!(
                "snapshots or bitmaps changed: {kept} instead of {before}"
            )),
            Err(text) => Some(text),
        })
    }
}
