//! The check of a plan: bounds and the commits' shape, of the whole plan before
//! its first step.
//!
//! The guest is not trusted to be right, only confined to its image: whatever
//! passes here can damage nothing but that image and can fill no more disk
//! space than the request accounts for.

use super::plan_error::PlanError;
use super::plan_names::{NameLimits, Names};
use instar_guest::FileNo;
use instar_guest::plan::{MAX_COMMITS, MAX_COPIES, NewName, Plan, Purpose, SECTOR, Stage, Step};

/// No file offset may be past this (`off_t`).
const MAX_OFFSET: u64 = i64::MAX as u64;

/// What a plan may do to one file. Offsets and lengths are bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileLimits {
    /// Length before the plan.
    pub len: u64,
    /// The greatest length it may get.
    pub cap: u64,
    /// The first offset that may be changed.
    pub floor: u64,
    /// The smallest length that may be set before the first commit is durable.
    pub shortest: u64,
}

/// Where the commit is expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Commits {
    /// Nowhere.
    None,
    /// Anywhere, or nowhere.
    Any,
    /// At least once, unless the plan is empty.
    Some,
    /// Once, in the last stage.
    Last,
}

/// What a plan may do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Per file number; `None` for a file that may not be changed.
    pub files: Vec<Option<FileLimits>>,
    /// Which names it may change; `None` for none.
    pub names: Option<NameLimits>,
    /// Where the commit is expected.
    pub commits: Commits,
    /// The most bytes of disk space that the plan may fill.
    pub fill: u64,
    /// Whether a part of the plan has been executed already.
    pub streamed: bool,
}

impl Limits {
    /// Goes on after parts of the plan that were held to other limits: what
    /// they filled and how long they made the files. Answers whether there were
    /// any.
    pub fn go_on(&mut self, parts: &Self) -> bool {
        for (file, part) in self.files.iter_mut().zip(&parts.files) {
            if let (Some(file), Some(part)) = (file, part) {
                file.len = part.len;
            }
        }
        self.fill = parts.fill;
        parts.streamed
    }
}

/// Checks a whole plan; answers how much disk space it may fill, in bytes.
pub(crate) fn check(plan: &Plan, limits: &Limits) -> Result<u64, PlanError> {
    check_commits(plan, limits.commits)?;
    let len = |file: &Option<FileLimits>| file.map_or(0, |file| file.len);
    let mut walk = Walk {
        files: limits.files.clone(),
        lens: limits.files.iter().map(len).collect(),
        names: Names::new(limits.names.as_ref(), limits.files.len()),
        fill: limits.fill,
        filled: 0,
    };
    plan.stages.iter().try_for_each(|stage| walk.stage(stage))?;
    walk.names.finish()?;
    Ok(walk.filled)
}

fn check_commits(plan: &Plan, expected: Commits) -> Result<(), PlanError> {
    let is_commit = |stage: &Stage| stage.purpose == Purpose::Commit;
    let commits: Vec<&Stage> = plan
        .stages
        .iter()
        .filter(|stage| is_commit(stage))
        .collect();
    let most = match expected {
        Commits::None => 0,
        Commits::Any | Commits::Some => MAX_COMMITS,
        Commits::Last => 1,
    };
    let missing = match expected {
        Commits::None | Commits::Any => false,
        Commits::Some => commits.is_empty() && !plan.is_empty(),
        Commits::Last => commits.is_empty(),
    };
    if missing {
        return Err(PlanError::CommitMissing);
    }
    if commits.len() > most {
        let count = commits.len();
        return Err(PlanError::Commits { count, most });
    }
    if expected == Commits::Last && !plan.stages.last().is_some_and(is_commit) {
        return Err(PlanError::CommitNotLast);
    }
    commits.into_iter().try_for_each(check_commit)
}

/// A commit is one step; where there are copies of what it writes, the same bytes
/// for each, in another sector of the file.
fn check_commit(stage: &Stage) -> Result<(), PlanError> {
    let count = stage.steps.len();
    let Some((first, copies)) = stage.steps.split_first() else {
        return Err(PlanError::CommitSteps(count));
    };
    let is_copy = |copy: &Step| {
        written(copy) == written(first)
            && copy.file() == first.file()
            && sector(copy) != sector(first)
    };
    if count > MAX_COPIES || !copies.iter().all(is_copy) {
        return Err(PlanError::CommitSteps(count));
    }
    match first {
        Step::SetLength { .. } | Step::Rename { .. } if copies.is_empty() => Ok(()),
        Step::Write { .. } => stage.steps.iter().try_for_each(check_atomic),
        _ if copies.is_empty() => Err(PlanError::CommitNotAtomic),
        _ => Err(PlanError::CommitSteps(count)),
    }
}

fn written(step: &Step) -> Option<&[u8]> {
    match step {
        Step::Write { data, .. } => Some(data),
        _ => None,
    }
}

fn sector(step: &Step) -> Option<u64> {
    match step {
        Step::Write { offset, .. } => Some(offset / SECTOR),
        _ => None,
    }
}

fn check_atomic(step: &Step) -> Result<(), PlanError> {
    match *step {
        Step::Write {
            offset, ref data, ..
        } => {
            let len = data.len() as u64;
            match len > 0 && offset % SECTOR + len <= SECTOR {
                true => Ok(()),
                false => Err(PlanError::CommitSpansSectors { offset, len }),
            }
        }
        _ => Err(PlanError::CommitNotAtomic),
    }
}

/// The files as the steps change them.
struct Walk<'a> {
    files: Vec<Option<FileLimits>>,
    lens: Vec<u64>,
    names: Names<'a>,
    fill: u64,
    filled: u64,
}

impl<'a> Walk<'a> {
    fn stage(&mut self, stage: &'a Stage) -> Result<(), PlanError> {
        let commit = stage.purpose == Purpose::Commit;
        for step in &stage.steps {
            match *step {
                Step::Create { file, ref name } => self.create(file, name)?,
                Step::Rename { file, over } => {
                    self.writable(file)?;
                    self.writable(over)?;
                    self.names.rename(file, over, commit)?;
                }
                Step::Unlink { file } => {
                    self.writable(file)?;
                    self.names.unlink(file)?;
                }
                Step::Remove { ref name } => self.names.remove(name)?,
                ref other => self.step(other)?,
            }
        }
        self.names.committed |= commit;
        Ok(())
    }

    fn create(&mut self, file: FileNo, name: &'a NewName) -> Result<(), PlanError> {
        let cap = self.names.create(file, name)?;
        self.lens.push(0);
        self.files.push(Some(FileLimits {
            len: 0,
            cap,
            floor: 0,
            shortest: 0,
        }));
        Ok(())
    }

    /// What may be done to a file that may be changed.
    fn writable(&self, file: FileNo) -> Result<FileLimits, PlanError> {
        let limits = self.files.get(file.0 as usize).copied().flatten();
        limits.ok_or(PlanError::UnknownFile(file))
    }

    fn step(&mut self, step: &Step) -> Result<(), PlanError> {
        let file = step.file();
        let index = file.0 as usize;
        let limits = self.writable(file)?;
        self.names.touch(file)?;
        let len = self.lens[index];
        self.lens[index] = match *step {
            Step::Write {
                offset, ref data, ..
            } => {
                let bytes = data.len() as u64;
                self.fills(bytes)?;
                len.max(target(offset, bytes, limits)?)
            }
            Step::Zero {
                offset, len: bytes, ..
            }
            | Step::Fill {
                offset, len: bytes, ..
            } => {
                self.fills(bytes)?;
                len.max(target(offset, bytes, limits)?)
            }
            Step::Reserve {
                offset, len: bytes, ..
            } => {
                self.fills(bytes)?;
                target(offset, bytes, limits)?;
                len
            }
            Step::Copy {
                from,
                to,
                len: bytes,
                ..
            } => {
                self.fills(bytes)?;
                within(from, bytes, len)?;
                let end = target(to, bytes, limits)?;
                if from < end && to < from + bytes {
                    return Err(PlanError::CopyOverlaps {
                        from,
                        to,
                        len: bytes,
                    });
                }
                len.max(end)
            }
            Step::CopyFrom {
                source,
                from,
                to,
                len: bytes,
                ..
            } => {
                self.fills(bytes)?;
                within(from, bytes, self.readable(source, file)?)?;
                len.max(target(to, bytes, limits)?)
            }
            Step::Punch {
                offset, len: bytes, ..
            } => {
                target(offset, bytes, limits)?;
                within(offset, bytes, len)?;
                len
            }
            Step::SetLength { len, .. } => {
                if len > limits.cap {
                    return Err(PlanError::PastCap {
                        end: len,
                        cap: limits.cap,
                    });
                }
                // Behind a commit goes what an interrupted change had added, also
                // where the disk grows.
                if len < limits.shortest && !self.names.committed {
                    let shortest = limits.shortest;
                    return Err(PlanError::Shortens { len, shortest });
                }
                len
            }
            Step::Create { .. }
            | Step::Rename { .. }
            | Step::Unlink { .. }
            | Step::Remove { .. } => len,
        };
        Ok(())
    }

    /// The length of a file that is copied into another.
    fn readable(&self, source: FileNo, into: FileNo) -> Result<u64, PlanError> {
        self.writable(source)?;
        self.names.touch(source)?;
        match self.lens.get(source.0 as usize) {
            Some(&len) if source != into => Ok(len),
            _ => Err(PlanError::UnknownFile(source)),
        }
    }

    fn fills(&mut self, bytes: u64) -> Result<(), PlanError> {
        self.filled = self.filled.saturating_add(bytes);
        match self.filled <= self.fill {
            true => Ok(()),
            false => Err(PlanError::Fills {
                bytes: self.filled,
                fill: self.fill,
            }),
        }
    }
}

/// Checks a range that is to be changed; answers its end.
fn target(offset: u64, len: u64, limits: FileLimits) -> Result<u64, PlanError> {
    let end = end_of(offset, len)?;
    if end > limits.cap {
        return Err(PlanError::PastCap {
            end,
            cap: limits.cap,
        });
    }
    if offset < limits.floor {
        let floor = limits.floor;
        return Err(PlanError::BelowFloor { offset, floor });
    }
    Ok(end)
}

fn within(offset: u64, len: u64, file_len: u64) -> Result<(), PlanError> {
    let end = end_of(offset, len)?;
    match end <= file_len {
        true => Ok(()),
        false => Err(PlanError::PastEnd { end, len: file_len }),
    }
}

fn end_of(offset: u64, len: u64) -> Result<u64, PlanError> {
    offset
        .checked_add(len)
        .filter(|&end| end <= MAX_OFFSET)
        .ok_or(PlanError::Overflow { offset, len })
}
