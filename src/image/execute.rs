//! The executor: carries a checked plan out, with durability barriers, and
//! knows what a failure leaves behind.

use super::error::Fault;
use super::files::FileTable;
use instar_guest::plan::{Plan, Purpose, Stage, Step};
use std::io;

/// How far a plan got that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// No reader sees a difference.
    Unchanged,
    /// The commit was written and may or may not be durable.
    Unknown,
    /// Of several commits the first are durable, and not all.
    Halfway,
    /// The change is durable, tidying up is not finished.
    Committed,
}

/// A plan that failed.
#[derive(Debug)]
pub(crate) struct Aborted {
    pub progress: Progress,
    pub error: io::Error,
    what: &'static str,
    /// Whether it failed before its first barrier.
    in_first_stage: bool,
}

impl Aborted {
    /// The failure alone.
    pub fn cause(self) -> Fault {
        Fault::os(self.what, self.error)
    }

    /// Whether the disk is full, or what the user may have of it, and nothing
    /// was done but a part of the first stage.
    pub fn is_for_want_of_space(&self) -> bool {
        let full = matches!(self.error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT));
        full && self.in_first_stage
    }

    /// The failure, with what it means for the image.
    pub fn fault(self, new: &str) -> Fault {
        let progress = self.progress;
        let fault = self.cause();
        match progress {
            Progress::Unchanged => fault.and("the image is unchanged"),
            Progress::Unknown => fault.and(&format!(
                "the image is either unchanged or {new}; check it before using it"
            )),
            Progress::Halfway => fault.and(&format!(
                "the image {new} in part; the same request again finishes it"
            )),
            Progress::Committed => fault.and(&format!(
                "the image {new}, but space that it no longer uses is not released"
            )),
        }
    }
}

/// Executes a plan that has been checked. `old` are the files' lengths, by
/// number, before anything of the plan was done: where it fails before it has
/// changed anything below them, the files get these lengths back.
pub(crate) fn execute(files: &FileTable, plan: &Plan, old: &[u64]) -> Result<(), Aborted> {
    let mut run = Run {
        files,
        old,
        inside: false,
        passed: false,
        committed: false,
        commits: plan.stages.iter().filter(|stage| is_commit(stage)).count(),
    };
    plan.stages.iter().try_for_each(|stage| run.stage(stage))
}

/// Gives the files the lengths that they had. One that is as long as it was may
/// have space reserved past its end, which setting the length gives back.
pub(crate) fn truncate_back(files: &FileTable, old: &[u64]) -> io::Result<()> {
    for (file, &len) in files.numbers().zip(old) {
        if files.writable(file) && files.len(file).is_some_and(|now| now >= len) {
            files.set_len(file, len)?;
        }
    }
    Ok(())
}

struct Run<'a> {
    files: &'a FileTable,
    old: &'a [u64],
    /// Whether anything below the old lengths was changed.
    inside: bool,
    /// Whether a barrier has been passed.
    passed: bool,
    committed: bool,
    /// Commits that are not durable yet.
    commits: usize,
}

fn is_commit(stage: &Stage) -> bool {
    stage.purpose == Purpose::Commit
}

/// Steps of a stage may run in any order. This one finds a full disk first,
/// and what can be taken back by truncating precedes what cannot.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Turn {
    Create,
    Reserve,
    PastOldEnd,
    Inside,
}

impl Run<'_> {
    fn stage(&mut self, stage: &Stage) -> Result<(), Aborted> {
        let commit = is_commit(stage);
        for turn in [Turn::Create, Turn::Reserve, Turn::PastOldEnd, Turn::Inside] {
            let steps = stage.steps.iter();
            for step in steps.filter(|step| turn_of(step, self.old) == turn) {
                let inside = turn == Turn::Inside;
                self.inside |= inside && is_torn(step);
                self.files
                    .step(step)
                    .map_err(|error| self.abort(what(step), error, is_torn(step) && commit))?;
                self.inside |= inside;
            }
        }
        self.barrier(commit)?;
        self.passed = true;
        self.committed |= commit;
        self.commits -= usize::from(commit);
        Ok(())
    }

    fn barrier(&mut self, commit: bool) -> Result<(), Aborted> {
        let synced = self.files.sync();
        synced.map_err(|error| self.abort("Could not make changes durable", error, commit))
    }

    fn abort(&self, what: &'static str, error: io::Error, unknown: bool) -> Aborted {
        let progress = match (self.committed, unknown) {
            (true, _) if self.commits > 0 => Progress::Halfway,
            (true, _) => Progress::Committed,
            (false, true) => Progress::Unknown,
            (false, false) => Progress::Unchanged,
        };
        if progress == Progress::Unchanged {
            let gone = self.files.remove_made(self.old.len());
            // What the image may say about files that stay is past its old end.
            if gone && !self.inside {
                // The failure at hand is the one to tell; a longer file is
                // harmless.
                let _ = truncate_back(self.files, self.old);
            }
        }
        Aborted {
            progress,
            error,
            what,
            in_first_stage: !self.passed,
        }
    }
}

fn turn_of(step: &Step, old: &[u64]) -> Turn {
    let start = match *step {
        Step::Reserve { .. } => return Turn::Reserve,
        Step::Write { offset, .. }
        | Step::Zero { offset, .. }
        | Step::Fill { offset, .. }
        | Step::Punch { offset, .. } => offset,
        Step::Copy { to, .. } | Step::CopyFrom { to, .. } => to,
        Step::SetLength { len, .. } => len,
        Step::Create { .. } => return Turn::Create,
        Step::Rename { .. } | Step::Unlink { .. } | Step::Remove { .. } => return Turn::Inside,
    };
    let old_len = old.get(step.file().0 as usize).copied().unwrap_or(0);
    match start >= old_len {
        true => Turn::PastOldEnd,
        false => Turn::Inside,
    }
}

/// Whether a failing step may have had its effect: a length is set or not, and
/// so is a name.
fn is_torn(step: &Step) -> bool {
    !matches!(step, Step::SetLength { .. } | Step::Rename { .. })
}

fn what(step: &Step) -> &'static str {
    match step {
        Step::Write { .. } | Step::Zero { .. } => "Could not write metadata",
        Step::Fill { .. } => "Could not allocate disk space",
        Step::Copy { .. } => "Could not copy metadata",
        Step::CopyFrom { .. } => "Could not copy data",
        Step::Reserve { .. } => "Could not reserve disk space",
        Step::SetLength { .. } => "Could not set the length of the file",
        Step::Punch { .. } => "Could not release disk space",
        Step::Create { .. } => "Could not create a file",
        Step::Rename { .. } => "Could not rename a file",
        Step::Unlink { .. } | Step::Remove { .. } => "Could not remove a file",
    }
}
