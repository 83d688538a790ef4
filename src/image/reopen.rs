//! Reading an image again: after a change, what its guest knew and perhaps the
//! files that it consists of are others.

use super::Access;
use super::chain::{attached, opened};
use super::disk::{Image, Link, changed, exclusive};
use super::error::Fault;
use super::handles::{Handle, id_of};
use super::open::{fresh, replaced};
use instar_guest::{Facts, FileNo, Request};
use std::sync::Arc;
use std::sync::atomic::Ordering;

impl Image {
    /// Has the guest read the image again: whatever it knew is dropped. Where
    /// that fails, the next request tries again.
    pub(super) fn reopen(&self, link: &mut Link) -> Result<(), Fault> {
        link.stale = false;
        let reopened = self.open_again(link);
        link.stale = reopened.is_err();
        reopened
    }

    fn open_again(&self, link: &mut Link) -> Result<(), Fault> {
        let facts = self.ask_open(link)?;
        if facts.files != self.facts().files {
            return Err(replaced());
        }
        self.take_over(link, facts)
    }

    /// The same as the holder of everything, after a plan that changed names:
    /// under the image's name there may be another file, and other files may
    /// belong to it. Where that fails nothing of the image can be used.
    pub(super) fn reopen_renamed(&self, link: &mut Link) -> Result<(), Fault> {
        link.stale = false;
        self.open_renamed(link).inspect_err(|_| self.lose())
    }

    fn open_renamed(&self, link: &mut Link) -> Result<(), Fault> {
        let known = self.files.handles();
        let has_name = |file: &&Arc<Handle>| self.home.holds(&file.file).unwrap_or(false);
        let image = Arc::clone(known.iter().find(has_name).ok_or_else(replaced)?);
        let others = known.iter().filter(|file| !Arc::ptr_eq(file, &image));
        let first = std::iter::once(&image);
        self.files
            .renumber(first.chain(others).map(Arc::clone).collect());
        if let Some(own) = link.reach.chain.last_mut() {
            *own = id_of(&image.file)?;
        }
        let facts = self.ask_open(link)?;
        let mut files = vec![image];
        files.extend(link.reach.files(&facts, &known)?);
        self.files.renumber(files);
        self.take_over(link, facts)
    }

    fn ask_open(&self, link: &mut Link) -> Result<Facts, Fault> {
        let request = Request::Open {
            format: Some(self.facts().format),
            file_len: self.files.len(FileNo::IMAGE).unwrap_or(0),
            write: self.access == Access::Write,
            fresh: fresh()?,
        };
        opened(self.ask(link, &request)?, "Open")
    }

    /// Has a new session read the image that the last one left, and find it as
    /// it was: what is known of the mapping stays. Where that fails nothing is
    /// known of it any more, and the session goes.
    pub(super) fn recognise(&self, link: &mut Link) -> Result<(), Fault> {
        let found = self.ask_open(link);
        let recognised = found
            .and_then(|facts| self.complete(link, facts))
            .and_then(|facts| match self.is_known(facts) {
                true => Ok(()),
                false => Err(changed()),
            });
        recognised.inspect_err(|_| {
            self.forget_mapping();
            link.seat.leave();
        })
    }

    /// Whether these are the facts of the image. What an image records of its
    /// own content changes where that is written, without a word from the guest.
    fn is_known(&self, found: Facts) -> bool {
        let known = self.facts();
        let found = match self.files.is_changed() {
            false => found,
            true => Facts {
                identity: known.identity.clone(),
                dirty: known.dirty,
                specific: known.specific.clone(),
                ..found
            },
        };
        *known == found
    }

    /// The facts with those of the image's other files.
    fn complete(&self, link: &mut Link, mut facts: Facts) -> Result<Facts, Fault> {
        if link.reach.wants_files(&facts)? {
            let attach = |lens| self.ask(link, &Request::Attach { lens });
            facts = attached(&facts, attach, &self.files)?;
        }
        facts.probed = self.facts().probed;
        Ok(facts)
    }

    /// Completes the facts and takes them over.
    fn take_over(&self, link: &mut Link, facts: Facts) -> Result<(), Fault> {
        let facts = self.complete(link, facts)?;
        self.forget_mapping();
        self.size.store(facts.virtual_size, Ordering::Release);
        *exclusive(&self.facts) = Arc::new(facts);
        Ok(())
    }
}
