//! Judges a state: is it the old disk or the new one for every reader, do
//! programs that we did not write find it sound, and does the same request on
//! it finish the work?
//!
//! The engine judges first, as it costs least. A state that was judged before
//! is not judged again: repairs turn many states into the same one.

use super::bytes::Bytes;
use super::case::{Case, M};
use super::disk::Files;
use super::engine::{Change, Session};
use super::setup::{Setup, wants_replay};
use super::tools::qemu_img;
use instar_guest::Format;
use instar_guest::findings::{Finding, Repair, Severity};
use instar_guest::plan::SECTOR;
use instar_guest::proto::Preallocation;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, HashMap};
use std::path::Path;

/// Plans that put an image in order, one after the other, before it counts as
/// one that cannot be.
const MAX_SETTLES: usize = 3;

/// One of so many states before a grow is also grown by qemu-img, and one of so
/// many after the same request again is looked at.
const SAMPLED: u64 = 4;

/// One of so many states is shown to qemu-img where some are.
const SHOWN: u64 = 8;

/// Bytes behind the end of a file in which nothing may be counted as used.
const LONGER: u64 = 4 << 20;

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

/// When files are looked at: a repair may have to finish before they are sound.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum When {
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
struct Seen {
    content: Option<Content>,
    leaks: bool,
    faults: Vec<String>,
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
}

impl<'a> Judge<'a> {
    /// A judge with its own copy of what the images refer to.
    pub fn new(case: &'a Case, setup: &'a Setup) -> Result<Self, String> {
        let dir = super::tools::scratch()?;
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

    /// The verdict on the files after the whole change: nothing stale may be
    /// left behind the end either.
    pub fn verdict_on_end(&self, files: &Files) -> Result<Vec<String>, String> {
        let seen = self.look_at(files, When::Finished)?;
        let mut faults = seen.faults;
        if !matches!(seen.content, Some(Content::New)) {
            faults.push(format!("the end of the change holds {:?}", seen.content));
        }
        if seen.leaks {
            faults.push("the change leaks space".to_owned());
        }
        if faults.is_empty() && self.is_unsettled(files)? {
            faults.push("the change leaves the image unsettled".to_owned());
        }
        if self.counts_behind_the_end(files)? {
            faults.push("space behind the end of the file counts as used".to_owned());
        }
        faults.extend(self.strays(files));
        faults.extend(self.stale(files)?);
        Ok(faults)
    }

    /// Whether space behind the end of the file counts as used, in a format that
    /// counts it.
    fn counts_behind_the_end(&self, files: &Files) -> Result<bool, String> {
        if !self.case.judges.counts {
            return Ok(false);
        }
        let mut longer = files.clone();
        let image = longer.find(self.setup.image_name()).ok_or("no image")?;
        let bytes = longer.bytes_mut(image);
        bytes.set_len(bytes.len() + LONGER);
        let mut behind = Seen::default();
        self.check_by_engine(&longer, &mut behind);
        Ok(behind.leaks)
    }

    fn future(
        &self,
        files: &Files,
        content: Option<Content>,
        leaks: bool,
    ) -> Result<Vec<String>, String> {
        let mut faults = self.rerun(files)?;
        let has_parts = !parts(self.case, &self.setup.files)?.is_empty();
        // Which files are left over no check of a reader counts.
        if leaks || has_parts {
            faults.extend(self.repair(files)?);
        }
        if has_parts {
            faults.extend(self.ask_otherwise(files, content));
        }
        if let Some(content) = content
            && self.is_to_be_grown(files, content)?
        {
            faults.extend(self.grow_by_qemu(files, content)?);
        }
        Ok(faults)
    }

    /// Whether a grow by qemu-img has to be seen: after a shrink always, of the
    /// many states before a grow of one in a few. Not where it already shows what
    /// is not zero in the image that the case begins with.
    fn is_to_be_grown(&self, files: &Files, content: Content) -> Result<bool, String> {
        let Change::Resize { size, .. } = self.setup.change else {
            return Ok(false);
        };
        let shrinks = size < self.setup.old_disk.len();
        let wanted = match self.shown.get() {
            Shown::Never => false,
            Shown::Some => files.digest().is_multiple_of(SHOWN),
            Shown::Always => shrinks || files.digest().is_multiple_of(SAMPLED),
        };
        if !self.case.judges.foreign_grow || !wanted {
            return Ok(false);
        }
        if content == Content::New {
            return Ok(true);
        }
        if self.shows_already.get().is_none() {
            let shows = self
                .grow_by_qemu(&self.setup.files, Content::Old)?
                .is_some();
            self.shows_already.set(Some(shows));
        }
        Ok(self.shows_already.get() == Some(false))
    }

    /// What every reader finds.
    fn look_at(&self, files: &Files, when: When) -> Result<Seen, String> {
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

    /// Whether the image has to be put in order before anything else.
    fn is_unsettled(&self, files: &Files) -> Result<bool, String> {
        let session = Session::open(files, self.setup.image_name(), self.case.format);
        Ok(session?.facts.unsettled.is_some())
    }

    /// Whether qemu-img finds the image of the case sound from the beginning: one
    /// that is repaired or put in order is not.
    fn starts_sound(&self) -> bool {
        !matches!(self.setup.change, Change::Settle | Change::Repair(_))
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

    fn describe(&self, reader: &str, disk: &Result<Bytes, String>) -> String {
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

    /// The files once they are in order.
    fn settled(&self, files: &Files) -> Result<Files, String> {
        let mut settled = files.clone();
        for _ in 0..MAX_SETTLES {
            let mut session = Session::open(&settled, self.setup.image_name(), self.case.format)?;
            if session.facts.unsettled.is_none() {
                return Ok(settled);
            }
            let planned = session.plan(&Change::Settle, &self.setup.old_disk)?;
            settled.apply_all(&planned.epochs);
        }
        Err("the image does not get settled".to_owned())
    }

    /// The files after a change to them, which are put in order first: before
    /// anything is asked, or where the change is refused until then.
    fn changed(&self, files: &Files, change: &Change) -> Result<Files, String> {
        let mut changed = self.settled(files)?;
        let image = self.setup.image_name();
        let mut session = Session::open(&changed, image, self.case.format)?;
        let disk = match change {
            Change::Write(_) => session.disk(self.setup.backing.as_ref())?,
            _ => Bytes::default(),
        };
        let change = on_size(change, session.facts.virtual_size);
        let planned = match session.plan(&change, &disk) {
            Err(_) if session.settles_first => {
                let mut session = Session::open(&changed, image, self.case.format)?;
                let settling = session.plan(&Change::Settle, &disk)?;
                changed.apply_all(&settling.epochs);
                Session::open(&changed, image, self.case.format)?.plan(&change, &disk)?
            }
            planned => planned?,
        };
        changed.apply_all(&planned.epochs);
        Ok(changed)
    }

    /// The same request on the state ends in the new disk, sound and without
    /// leaks. Guest writes may leave leaks that a repair finds.
    fn rerun(&self, files: &Files) -> Result<Vec<String>, String> {
        let digest = (files.digest(), self.shown.get());
        if let Some(known) = self.reruns.borrow().get(&digest) {
            return Ok(known.clone());
        }
        let faults = match self.changed(files, &self.setup.change) {
            Ok(finished) => self.judge_finished_once(&finished)?,
            Err(text) => vec![text],
        };
        let again = |fault| format!("the same request again: {fault}");
        let faults: Vec<String> = faults.into_iter().map(again).collect();
        self.reruns.borrow_mut().insert(digest, faults.clone());
        Ok(faults)
    }

    /// Many states end in the same one.
    fn judge_finished_once(&self, finished: &Files) -> Result<Vec<String>, String> {
        let key = (finished.digest(), self.shown.get());
        if let Some(known) = self.finished.borrow().get(&key) {
            return Ok(known.clone());
        }
        let faults = self.judge_finished(finished)?;
        self.finished.borrow_mut().insert(key, faults.clone());
        Ok(faults)
    }

    fn judge_finished(&self, finished: &Files) -> Result<Vec<String>, String> {
        let mut finished = finished.clone();
        let writes = matches!(self.setup.change, Change::Write(_));
        if writes && self.look_at(&finished, When::Again)?.leaks {
            match self.repaired(&finished)? {
                Ok(repaired) => finished = repaired,
                Err(text) => return Ok(vec![text]),
            }
        }
        let seen = self.look_at(&finished, When::Again)?;
        let mut faults = seen.faults;
        if seen.leaks {
            faults.push("leaks stay".to_owned());
        }
        if !writes && self.counts_behind_the_end(&finished)? {
            faults.push("space behind the end of the file counts as used".to_owned());
        }
        if seen.content != Some(Content::New) {
            faults.push(format!("ends in {:?}", seen.content));
        }
        faults.extend(self.strays(&finished));
        if faults.is_empty() {
            faults.extend(self.stale(&finished)?);
        }
        Ok(faults)
    }

    /// What is wrong with the names of finished files: besides what lay there from
    /// the beginning, they are those that the image consists of.
    fn strays(&self, files: &Files) -> Option<String> {
        let image = self.setup.image_name();
        let wanted = parts(self.case, files).and_then(|parts| {
            let before = self::parts(self.case, &self.setup.files)?;
            let is_besides = |name: &&str| {
                let own = before.iter().any(|part| part == name);
                !own && !self.case.left.contains(name)
            };
            let besides = self.setup.files.names().filter(is_besides);
            let mut wanted: BTreeSet<String> = besides.map(str::to_owned).collect();
            wanted.insert(image.to_owned());
            wanted.extend(parts);
            Ok(wanted)
        });
        let found: BTreeSet<String> = files.names().map(str::to_owned).collect();
        match wanted {
            Ok(wanted) if wanted == found => None,
            Ok(wanted) => Some(format!("the files are {found:?} instead of {wanted:?}")),
            Err(text) => Some(text),
        }
    }

    /// Another request than the one that was interrupted leaves nothing behind
    /// either, and the disk has the size asked for.
    fn ask_otherwise(&self, files: &Files, content: Option<Content>) -> Vec<String> {
        let disk = match content {
            Some(Content::Old) => &self.setup.old_disk,
            Some(Content::New) => &self.setup.new_disk,
            _ => return Vec::new(),
        };
        let (old, new) = (self.setup.old_disk.len(), self.setup.new_disk.len());
        let mut faults = Vec::new();
        for size in [old.max(new) + M, old.min(new) / 2] {
            let size = size.next_multiple_of(SECTOR);
            let change = Change::Resize {
                size,
                preallocation: Preallocation::Off,
                backing_size: None,
            };
            let mut wanted = disk.clone();
            wanted.set_len(size);
            let image = self.setup.image_name();
            let fault = self.changed(files, &change).map_or_else(Some, |changed| {
                let disk = Session::open(&changed, image, self.case.format)
                    .and_then(|mut session| session.disk(None));
                match disk.as_ref() == Ok(&wanted) {
                    true => self.strays(&changed),
                    false => Some(self.describe("instar", &disk)),
                }
            });
            faults.extend(fault.map(|fault| format!("{size} bytes instead: {fault}")));
        }
        faults
    }

    /// The engine's own check finds nothing wrong but leaks.
    fn check_by_engine(&self, files: &Files, seen: &mut Seen) {
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

    /// Without its leaks the state is the same disk, and the same request then
    /// ends in a clean image.
    fn repair(&self, files: &Files) -> Result<Vec<String>, String> {
        match self.repaired(files)? {
            Err(text) => Ok(vec![text]),
            Ok(repaired) => {
                let faults = self.rerun(&repaired)?.into_iter();
                Ok(faults
                    .map(|fault| format!("after check -r leaks: {fault}"))
                    .collect())
            }
        }
    }

    /// The files after a repair of leaks: by the engine where it can, else by
    /// qemu-img.
    fn repaired(&self, files: &Files) -> Result<Result<Files, String>, String> {
        let own = self.changed(files, &Change::Repair(Repair::Leaks));
        match own {
            Err(text) if text.ends_with("does not support checks") => {}
            own => return Ok(own),
        }
        self.setup.store(files, self.dir.path())?;
        let (format, image) = (self.case.format.name(), self.setup.image_name());
        let arguments = ["check", "-q", "-f", format, "-r", "leaks", image];
        let repair = qemu_img(self.dir.path(), &arguments)?;
        match repair.code {
            0 => self.setup.load(self.dir.path()).map(Ok),
            _ => Ok(Err(format!("check -r leaks: {}", repair.brief()))),
        }
    }

    /// What shows up behind the end of finished files when they grow: nothing,
    /// whether the engine grows them or a program that only writes a larger size.
    fn stale(&self, files: &Files) -> Result<Vec<String>, String> {
        let (Change::Resize { .. } | Change::Repair(Repair::Leaks)) = self.setup.change else {
            return Ok(Vec::new());
        };
        let (old, new) = (&self.setup.old_disk, &self.setup.new_disk);
        let size = old.len().max(new.len()) + old.len().min(new.len());
        let size = size.next_multiple_of(1 << 20);
        let mut wanted = new.clone();
        wanted.set_len(size);
        let image = self.setup.image_name();
        let grow = Change::Resize {
            size,
            preallocation: Preallocation::Off,
            backing_size: self.setup.backing.as_ref().map(Bytes::len),
        };
        let grown = self.changed(files, &grow).and_then(|grown| {
            let mut session = Session::open(&grown, image, self.case.format)?;
            session.disk(self.setup.backing.as_ref())
        });
        // What only repairs has the same size before and after.
        let naive_size = match old.len() == new.len() {
            true => size,
            false => old.len().max(new.len()),
        };
        let naive = self.case.judges.naive_grow;
        let naive = naive.map(|naive| naive(files, image, naive_size));
        let beyond = self.case.judges.beyond.map(|beyond| beyond(files, image));
        let mut faults: Vec<String> = beyond.and_then(Result::err).into_iter().collect();
        if grown.as_ref() != Ok(&wanted) {
            faults.push(self.describe("after a grow", &grown));
        }
        wanted.set_len(naive_size);
        if let Some(naive) = naive
            && naive.as_ref() != Ok(&wanted)
        {
            faults.push(self.describe("after a naive grow", &naive));
        }
        Ok(faults)
    }

    /// qemu-img grows the state to a larger disk: nothing stale lies beyond its
    /// end.
    fn grow_by_qemu(&self, files: &Files, content: Content) -> Result<Option<String>, String> {
        let (old, new) = (&self.setup.old_disk, &self.setup.new_disk);
        let mut wanted = if content == Content::New { new } else { old }.clone();
        let size = old.len().max(new.len());
        wanted.set_len(size);
        let (dir, image) = (self.dir.path(), self.setup.image_name());
        self.setup.store(files, dir)?;
        let format = self.case.format.name();
        let arguments = ["resize", "-q", "-f", format, image, &size.to_string()];
        let resized = qemu_img(dir, &arguments)?;
        if resized.code != 0 {
            return Ok(Some(format!("qemu-img resize: {}", resized.brief())));
        }
        let disk = self.setup.read_disk(dir)?;
        let same = disk.as_ref() == Ok(&wanted);
        Ok((!same).then(|| self.describe("after a grow by qemu-img", &disk)))
    }
}

/// The change as it is asked for on a disk of a size: nothing is allocated
/// where nothing is added.
fn on_size(change: &Change, virtual_size: u64) -> Change {
    let mut change = change.clone();
    if let Change::Resize {
        size,
        preallocation,
        ..
    } = &mut change
        && *size == virtual_size
    {
        *preallocation = Preallocation::Off;
    }
    change
}

/// The files that the image of a case consists of besides itself.
fn parts(case: &Case, files: &Files) -> Result<Vec<String>, String> {
    let image = super::setup::image_name(case.format);
    let parts = case.judges.parts.map(|parts| parts(files, image));
    parts.unwrap_or_else(|| Ok(Vec::new()))
}
