//! What becomes of a state: the same request again, another request, a repair.
//! What the files look like after that is asked by the other rooms.

use super::super::bytes::Bytes;
use super::super::case::M;
use super::super::disk::Files;
use super::super::engine::{Change, Session};
use super::super::tools::qemu_img;
use super::end::parts;
use super::{Content, Judge};
use instar_guest::findings::Repair;
use instar_guest::plan::SECTOR;
use instar_guest::proto::Preallocation;

/// Plans that put an image in order, one after the other, before it counts as
/// one that cannot be.
const MAX_SETTLES: usize = 3;

impl Judge<'_> {
    pub(super) fn future(
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
    pub(super) fn repaired(&self, files: &Files) -> Result<Result<Files, String>, String> {
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
    pub(super) fn changed(&self, files: &Files, change: &Change) -> Result<Files, String> {
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
