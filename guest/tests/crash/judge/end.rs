//! What the end must look like: the new disk, sound, nothing leaked, no other
//! files than its own, and no more room than without a crash.

use super::super::case::Case;
use super::super::disk::Files;
use super::super::engine::{Change, Session};
use super::super::setup::image_name;
use super::present::{Seen, When};
use super::{Content, Judge};
use std::collections::BTreeSet;

/// Bytes behind the end of a file in which nothing may be counted as used.
const LONGER: u64 = 4 << 20;

impl Judge<'_> {
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

    /// Many states end in the same one.
    pub(super) fn judge_finished_once(&self, finished: &Files) -> Result<Vec<String>, String> {
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
        faults.extend(self.keeps_room(&finished)?);
        if faults.is_empty() {
            faults.extend(self.stale(&finished)?);
        }
        Ok(faults)
    }

    /// Whether the image has to be put in order before anything else.
    fn is_unsettled(&self, files: &Files) -> Result<bool, String> {
        let session = Session::open(files, self.setup.image_name(), self.case.format);
        Ok(session?.facts.unsettled.is_some())
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

    /// What is wrong with the names of finished files: besides what lay there from
    /// the beginning, they are those that the image consists of.
    pub(super) fn strays(&self, files: &Files) -> Option<String> {
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

    /// The file is longer than the resize makes it without a crash.
    fn keeps_room(&self, finished: &Files) -> Result<Option<String>, String> {
        if !self.case.judges.length || !matches!(self.setup.change, Change::Resize { .. }) {
            return Ok(None);
        }
        let most = match self.most_len.get() {
            Some(most) => most,
            None => {
                let most = self.len_without_crash()?;
                self.most_len.set(Some(most));
                most
            }
        };
        let len = finished.get(self.setup.image_name())?.len();
        Ok((len > most).then(|| format!("the file has {len} bytes instead of {most}")))
    }

    /// Length of the image's file after the change; of a shrink the greatest on the
    /// way: what it has put behind everything else stays there, in use, where
    /// it is cut off between its commits.
    fn len_without_crash(&self) -> Result<u64, String> {
        let (start, image) = (&self.setup.files, self.setup.image_name());
        let mut session = Session::open(start, image, self.case.format)?;
        let planned = session.plan(&self.setup.change, &self.setup.old_disk)?;
        let mut files = start.clone();
        let mut lens = Vec::new();
        for epoch in &planned.epochs {
            files.apply_all(std::slice::from_ref(epoch));
            lens.push(files.get(image)?.len());
        }
        let shrinks = self.setup.new_disk.len() < self.setup.old_disk.len();
        let len = match shrinks {
            true => lens.into_iter().max(),
            false => lens.pop(),
        };
        len.ok_or_else(|| "an empty plan".to_owned())
    }
}

/// The files that the image of a case consists of besides itself.
pub(super) fn parts(case: &Case, files: &Files) -> Result<Vec<String>, String> {
    let image = image_name(case.format);
    let parts = case.judges.parts.map(|parts| parts(files, image));
    parts.unwrap_or_else(|| Ok(Vec::new()))
}
