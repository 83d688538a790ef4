//! What shows up behind the end when a disk grows later, by the engine or by
//! programs that know nothing of how it was left: nothing but zeroes.

use super::super::bytes::Bytes;
use super::super::disk::Files;
use super::super::engine::{Change, Session};
use super::super::tools::qemu_img;
use super::{Content, Judge, SAMPLED, SHOWN, Shown};
use instar_guest::findings::Repair;
use instar_guest::proto::Preallocation;

impl Judge<'_> {
    /// What shows up behind the end of finished files when they grow: nothing,
    /// whether the engine grows them or a program that only writes a larger size.
    pub(super) fn stale(&self, files: &Files) -> Result<Vec<String>, String> {
        let (Change::Resize { .. } | Change::Repair(Repair::Leaks) | Change::Settle) =
            self.setup.change
        else {
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

    /// Whether a grow by qemu-img has to be seen: after a shrink always, of the
    /// many states before a grow of one in a few. Not where it already shows what
    /// is not zero in the image that the case begins with.
    pub(super) fn is_to_be_grown(&self, files: &Files, content: Content) -> Result<bool, String> {
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

    /// qemu-img grows the state to a larger disk: nothing stale lies beyond its
    /// end. It may refuse one that says so.
    pub(super) fn grow_by_qemu(
        &self,
        files: &Files,
        content: Content,
    ) -> Result<Option<String>, String> {
        let (old, new) = (&self.setup.old_disk, &self.setup.new_disk);
        let mut wanted = if content == Content::New { new } else { old }.clone();
        let size = old.len().max(new.len());
        wanted.set_len(size);
        let (dir, image) = (self.dir.path(), self.setup.image_name());
        self.setup.store(files, dir)?;
        let format = self.case.format.name();
        let size = size.to_string();
        let arguments = ["resize", "-q", "-f", format];
        let arguments = [&arguments, self.case.judges.grow_with, &[image, &size]];
        let resized = qemu_img(dir, &arguments.concat())?;
        if let Some(flag) = &self.case.judges.flag
            && (flag.is_set)(files, image)?
            && resized.code != 0
            && resized.text.contains(flag.refusal)
        {
            return Ok(None);
        }
        if resized.code != 0 {
            return Ok(Some(format!("qemu-img resize: {}", resized.brief())));
        }
        let disk = self.setup.read_disk(dir)?;
        let same = disk.as_ref() == Ok(&wanted);
        Ok((!same).then(|| self.describe("after a grow by qemu-img", &disk)))
    }
}
