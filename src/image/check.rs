//! The check of a plan: bounds and the commit's shape, of the whole plan before
//! its first step.
//!
//! The guest is not trusted to be right, only confined to its image: whatever
//! passes here can damage nothing but that image and can fill no more disk
//! space than the request accounts for.

use super::error::{ErrorKind, Fault};
use instar_guest::FileNo;
use instar_guest::plan::{Plan, Purpose, SECTOR, Stage, Step};
use std::fmt;

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
    /// The smallest length that may be set.
    pub shortest: u64,
}

/// Where the commit is expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Commits {
    /// Nowhere.
    None,
    /// Once, unless the plan is empty.
    One,
    /// Once, in the last stage.
    Last,
}

/// What a plan may do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Per file number; `None` for a file that may not be changed.
    pub files: Vec<Option<FileLimits>>,
    /// Where the commit is expected.
    pub commits: Commits,
    /// The most bytes of disk space that the plan may fill.
    pub fill: u64,
}

/// Why a plan is refused. Offsets and lengths are bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PlanError {
    UnknownFile(FileNo),
    Overflow { offset: u64, len: u64 },
    PastCap { end: u64, cap: u64 },
    BelowFloor { offset: u64, floor: u64 },
    Shortens { len: u64, shortest: u64 },
    PastEnd { end: u64, len: u64 },
    CopyOverlaps { from: u64, to: u64, len: u64 },
    Fills { bytes: u64, fill: u64 },
    UnexpectedCommit,
    CommitMissing,
    SecondCommit,
    CommitNotLast,
    CommitSteps(usize),
    CommitSpansSectors { offset: u64, len: u64 },
    CommitNotAtomic,
}

impl fmt::Display for PlanError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::UnknownFile(FileNo(n)) => write!(f, "a step changes file {n}, which it may not"),
            Self::Overflow { offset, len } => {
                write!(f, "a step's range of {len} bytes at {offset:#x} overflows")
            }
            Self::PastCap { end, cap } => {
                write!(
                    f,
                    "a step reaches up to {end:#x}, the file may grow to {cap:#x}"
                )
            }
            Self::BelowFloor { offset, floor } => write!(
                f,
                "a streamed step changes the file at {offset:#x}, below its old end at {floor:#x}"
            ),
            Self::Shortens { len, shortest } => {
                write!(f, "a step cuts the file to {len} bytes, below {shortest}")
            }
            Self::PastEnd { end, len } => {
                write!(
                    f,
                    "a step uses bytes up to {end:#x} of a file of {len} bytes"
                )
            }
            Self::CopyOverlaps { from, to, len } => write!(
                f,
                "a copy of {len} bytes from {from:#x} to {to:#x} overlaps itself"
            ),
            Self::Fills { bytes, fill } => {
                write!(
                    f,
                    "the steps fill {bytes} bytes of disk space, {fill} are allowed"
                )
            }
            Self::UnexpectedCommit => f.write_str("it has a commit and may not have one"),
            Self::CommitMissing => f.write_str("it has no commit"),
            Self::SecondCommit => f.write_str("it has a second commit"),
            Self::CommitNotLast => f.write_str("its commit is not its last stage"),
            Self::CommitSteps(n) => write!(f, "its commit has {n} steps instead of one"),
            Self::CommitSpansSectors { offset, len } => write!(
                f,
                "its commit of {len} bytes at {offset:#x} is not inside one sector"
            ),
            Self::CommitNotAtomic => f.write_str("its commit is neither a write nor a set-length"),
        }
    }
}

impl From<PlanError> for Fault {
    fn from(error: PlanError) -> Self {
        Self::new(
            ErrorKind::BadGuest,
            format!("The sandbox's plan is refused, nothing was changed: {error}"),
        )
    }
}

/// Checks a whole plan; answers how much disk space it may fill, in bytes.
pub(crate) fn check(plan: &Plan, limits: &Limits) -> Result<u64, PlanError> {
    check_commits(plan, limits.commits)?;
    let lens = limits
        .files
        .iter()
        .map(|file| file.map_or(0, |file| file.len));
    let mut walk = Walk {
        limits,
        lens: lens.collect(),
        filled: 0,
    };
    plan.stages
        .iter()
        .flat_map(|stage| &stage.steps)
        .try_for_each(|step| walk.step(step))?;
    Ok(walk.filled)
}

fn check_commits(plan: &Plan, expected: Commits) -> Result<(), PlanError> {
    let mut commits = plan
        .stages
        .iter()
        .enumerate()
        .filter(|(_, stage)| stage.purpose == Purpose::Commit);
    let first = commits.next();
    if commits.next().is_some() {
        return Err(PlanError::SecondCommit);
    }
    match (expected, first) {
        (Commits::None, None) => Ok(()),
        (Commits::None, Some(_)) => Err(PlanError::UnexpectedCommit),
        (Commits::One, None) if plan.is_empty() => Ok(()),
        (Commits::One | Commits::Last, None) => Err(PlanError::CommitMissing),
        (Commits::Last, Some((at, _))) if at + 1 != plan.stages.len() => {
            Err(PlanError::CommitNotLast)
        }
        (Commits::One | Commits::Last, Some((_, stage))) => check_commit(stage),
    }
}

fn check_commit(stage: &Stage) -> Result<(), PlanError> {
    let [step] = stage.steps.as_slice() else {
        return Err(PlanError::CommitSteps(stage.steps.len()));
    };
    match *step {
        Step::SetLength { .. } => Ok(()),
        Step::Write {
            offset, ref data, ..
        } => {
            let len = data.len() as u64;
            match len > 0 && offset % SECTOR + len <= SECTOR {
                true => Ok(()),
                false => Err(PlanError::CommitSpansSectors { offset, len }),
            }
        }
        Step::Zero { .. } | Step::Copy { .. } | Step::Reserve { .. } | Step::Punch { .. } => {
            Err(PlanError::CommitNotAtomic)
        }
    }
}

/// The files' lengths as the steps change them.
struct Walk<'a> {
    limits: &'a Limits,
    lens: Vec<u64>,
    filled: u64,
}

impl Walk<'_> {
    fn step(&mut self, step: &Step) -> Result<(), PlanError> {
        let file = step.file();
        let index = file.0 as usize;
        let Some(&Some(limits)) = self.limits.files.get(index) else {
            return Err(PlanError::UnknownFile(file));
        };
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
                if len < limits.shortest {
                    let shortest = limits.shortest;
                    return Err(PlanError::Shortens { len, shortest });
                }
                len
            }
        };
        Ok(())
    }

    fn fills(&mut self, bytes: u64) -> Result<(), PlanError> {
        self.filled = self.filled.saturating_add(bytes);
        match self.filled <= self.limits.fill {
            true => Ok(()),
            false => Err(PlanError::Fills {
                bytes: self.filled,
                fill: self.limits.fill,
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

#[cfg(test)]
mod tests {
    use super::*;

    const IMAGE: FileNo = FileNo::IMAGE;

    /// One writable file of 64 KiB that may grow to 128 KiB.
    fn limits(commits: Commits) -> Limits {
        Limits {
            files: vec![Some(FileLimits {
                len: 0x10000,
                cap: 0x20000,
                floor: 0,
                shortest: 0x10000,
            })],
            commits,
            fill: 0x8000,
        }
    }

    fn write(offset: u64, len: usize) -> Step {
        let data = vec![1; len];
        Step::Write {
            file: IMAGE,
            offset,
            data,
        }
    }

    fn stage(purpose: Purpose, steps: &[Step]) -> Stage {
        let steps = steps.to_vec();
        Stage { purpose, steps }
    }

    fn plan(stages: &[Stage]) -> Plan {
        let stages = stages.to_vec();
        Plan { stages }
    }

    /// The verdict on steps that are no commit.
    fn steps(steps: &[Step]) -> Result<u64, PlanError> {
        let plan = plan(&[stage(Purpose::Prepare, steps)]);
        check(&plan, &limits(Commits::None))
    }

    /// The verdict on a commit stage of its own.
    fn commit(steps: &[Step]) -> Result<u64, PlanError> {
        let plan = plan(&[stage(Purpose::Commit, steps)]);
        check(&plan, &limits(Commits::One))
    }

    #[test]
    fn a_sound_plan_passes_and_its_bytes_are_counted() {
        let plan = plan(&[
            stage(Purpose::Prepare, &[write(0x10000, 512), write(0, 512)]),
            stage(Purpose::Commit, &[write(0, 512)]),
            stage(Purpose::Release, &[write(512, 8)]),
        ]);
        assert_eq!(check(&plan, &limits(Commits::One)), Ok(3 * 512 + 8));
    }

    #[test]
    fn every_step_stays_below_the_cap() {
        let (end, cap) = (0x20001, 0x20000);
        let file = IMAGE;
        let past = [
            write(0x20000, 1),
            Step::Zero {
                file,
                offset: 0x1ffff,
                len: 2,
            },
            Step::Reserve {
                file,
                offset: 0x20000,
                len: 1,
            },
            Step::SetLength { file, len: 0x20001 },
            Step::Copy {
                file,
                from: 0,
                to: 0x1fff1,
                len: 0x10,
            },
            Step::Punch {
                file,
                offset: 0x20000,
                len: 1,
            },
        ];
        for step in past {
            let refusal = Err(PlanError::PastCap { end, cap });
            assert_eq!(steps(std::slice::from_ref(&step)), refusal, "{step:?}");
        }
    }

    #[test]
    fn no_range_wraps_around_or_passes_off_t() {
        let (file, len) = (IMAGE, 2);
        for offset in [u64::MAX, i64::MAX as u64 - 1] {
            let overflow = Err(PlanError::Overflow { offset, len });
            assert_eq!(steps(&[write(offset, 2)]), overflow);
            assert_eq!(steps(&[Step::Zero { file, offset, len }]), overflow);
            assert_eq!(steps(&[Step::Reserve { file, offset, len }]), overflow);
            assert_eq!(steps(&[Step::Punch { file, offset, len }]), overflow);
            let copy = |from, to| {
                steps(&[Step::Copy {
                    file,
                    from,
                    to,
                    len,
                }])
            };
            assert_eq!(copy(offset, 0), overflow);
            assert_eq!(copy(0, offset), overflow);
        }
    }

    #[test]
    fn a_file_that_may_not_be_changed_is_not_changed() {
        for file in [FileNo(1), FileNo(2), FileNo(u32::MAX)] {
            let mut limits = limits(Commits::None);
            limits.files.push(None);
            let step = Step::SetLength { file, len: 0 };
            let plan = plan(&[stage(Purpose::Prepare, &[step])]);
            assert_eq!(check(&plan, &limits), Err(PlanError::UnknownFile(file)));
        }
    }

    #[test]
    fn a_file_is_not_cut_below_its_length() {
        let (file, len, shortest) = (IMAGE, 0xffff, 0x10000);
        let cut = [Step::SetLength { file, len }];
        assert_eq!(steps(&cut), Err(PlanError::Shortens { len, shortest }));
        assert_eq!(commit(&cut), Err(PlanError::Shortens { len, shortest }));
    }

    #[test]
    fn copies_read_inside_the_file_as_it_is_by_then() {
        let file = IMAGE;
        let copy = Step::Copy {
            file,
            from: 0x10000,
            to: 0,
            len: 512,
        };
        let refusal = PlanError::PastEnd {
            end: 0x10200,
            len: 0x10000,
        };
        assert_eq!(steps(std::slice::from_ref(&copy)), Err(refusal));
        assert_eq!(steps(&[write(0x10000, 512), copy]), Ok(1024));
    }

    #[test]
    fn copies_do_not_overlap_themselves() {
        let (file, len) = (IMAGE, 512);
        for (from, to) in [(0, 511), (511, 0), (100, 100)] {
            let copy = [Step::Copy {
                file,
                from,
                to,
                len,
            }];
            assert_eq!(steps(&copy), Err(PlanError::CopyOverlaps { from, to, len }));
        }
        assert_eq!(
            steps(&[Step::Copy {
                file,
                from: 0,
                to: 512,
                len
            }]),
            Ok(512)
        );
    }

    #[test]
    fn only_what_exists_is_punched() {
        let punch = [Step::Punch {
            file: IMAGE,
            offset: 0xffff,
            len: 2,
        }];
        let refusal = PlanError::PastEnd {
            end: 0x10001,
            len: 0x10000,
        };
        assert_eq!(steps(&punch), Err(refusal));
    }

    #[test]
    fn the_disk_space_of_a_whole_plan_is_bounded() {
        let reserve = |len| Step::Reserve {
            file: IMAGE,
            offset: 0,
            len,
        };
        assert_eq!(steps(&[reserve(0x7fff), write(0, 1)]), Ok(0x8000));
        let refusal = PlanError::Fills {
            bytes: 0x8001,
            fill: 0x8000,
        };
        assert_eq!(steps(&[reserve(0x8000), write(0, 1)]), Err(refusal));
        let zero = |len| Step::Zero {
            file: IMAGE,
            offset: 0,
            len,
        };
        let (bytes, fill) = (u64::MAX, 0x8000);
        assert_eq!(steps(&[zero(bytes)]), Err(PlanError::Fills { bytes, fill }));
    }

    #[test]
    fn a_commit_is_one_write_inside_one_sector() {
        assert_eq!(commit(&[write(0, 512)]), Ok(512));
        assert_eq!(commit(&[write(1000, 24)]), Ok(24));
        for (offset, len) in [(0, 513), (511, 2), (1000, 25), (512, 1024), (0, 0)] {
            let refusal = PlanError::CommitSpansSectors {
                offset,
                len: len as u64,
            };
            assert_eq!(commit(&[write(offset, len)]), Err(refusal));
        }
    }

    #[test]
    fn or_one_set_length_and_nothing_else() {
        let file = IMAGE;
        assert_eq!(commit(&[Step::SetLength { file, len: 0x20000 }]), Ok(0));
        let others = [
            Step::Zero {
                file,
                offset: 0,
                len: 1,
            },
            Step::Copy {
                file,
                from: 0,
                to: 512,
                len: 1,
            },
            Step::Reserve {
                file,
                offset: 0,
                len: 1,
            },
            Step::Punch {
                file,
                offset: 0,
                len: 1,
            },
        ];
        for step in others {
            assert_eq!(commit(&[step]), Err(PlanError::CommitNotAtomic));
        }
    }

    #[test]
    fn a_commit_stands_alone_in_its_stage() {
        assert_eq!(commit(&[]), Err(PlanError::CommitSteps(0)));
        let two = [write(0, 8), write(8, 8)];
        assert_eq!(commit(&two), Err(PlanError::CommitSteps(2)));
    }

    #[test]
    fn commits_come_exactly_where_they_are_expected() {
        let commit = stage(Purpose::Commit, &[write(0, 8)]);
        let other = stage(Purpose::Release, &[write(0, 8)]);
        let verdict = |commits, stages: &[&Stage]| {
            let stages: Vec<Stage> = stages.iter().map(|&stage| stage.clone()).collect();
            check(&plan(&stages), &limits(commits)).map(|_| ())
        };
        use Commits::{Last, None, One};
        assert_eq!(verdict(None, &[&commit]), Err(PlanError::UnexpectedCommit));
        assert_eq!(verdict(None, &[&other]), Ok(()));
        assert_eq!(verdict(One, &[]), Ok(()));
        assert_eq!(verdict(One, &[&other]), Err(PlanError::CommitMissing));
        assert_eq!(verdict(One, &[&commit, &other]), Ok(()));
        let twice = [&commit, &other, &commit];
        for expected in [None, One, Last] {
            assert_eq!(verdict(expected, &twice), Err(PlanError::SecondCommit));
        }
        assert_eq!(verdict(Last, &[]), Err(PlanError::CommitMissing));
        assert_eq!(
            verdict(Last, &[&commit, &other]),
            Err(PlanError::CommitNotLast)
        );
        assert_eq!(verdict(Last, &[&other, &commit]), Ok(()));
    }

    #[test]
    fn a_streamed_part_keeps_to_the_space_past_the_old_end() {
        let mut limits = limits(Commits::None);
        limits.files[0].as_mut().unwrap().floor = 0x10000;
        let verdict = |step| check(&plan(&[stage(Purpose::Prepare, &[step])]), &limits);
        let (file, floor, len) = (IMAGE, 0x10000, 1);
        let below = |offset| Err(PlanError::BelowFloor { offset, floor });
        assert_eq!(verdict(write(0x10000, 512)), Ok(512));
        assert_eq!(verdict(write(0xffff, 512)), below(0xffff));
        assert_eq!(
            verdict(Step::Zero {
                file,
                offset: 0,
                len
            }),
            below(0)
        );
        assert_eq!(
            verdict(Step::Reserve {
                file,
                offset: 0,
                len
            }),
            below(0)
        );
        assert_eq!(
            verdict(Step::Punch {
                file,
                offset: 0,
                len
            }),
            below(0)
        );
        assert_eq!(
            verdict(Step::Copy {
                file,
                from: 512,
                to: 0,
                len
            }),
            below(0)
        );
        assert_eq!(
            verdict(Step::Copy {
                file,
                from: 0,
                to: 0x10000,
                len
            }),
            Ok(1)
        );
    }
}
