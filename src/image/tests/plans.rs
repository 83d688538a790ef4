//! Plans that break a rule: each is refused for its own reason.

use crate::image::plan_check::{Commits, FileLimits, Limits, check};
use crate::image::plan_error::PlanError;
use instar_guest::FileNo;
use instar_guest::plan::{Plan, Purpose, Stage, Step};

pub const IMAGE: FileNo = FileNo::IMAGE;

/// One writable file of 64 KiB that may grow to 128 KiB.
pub fn limits(commits: Commits) -> Limits {
    Limits {
        files: vec![Some(FileLimits {
            len: 0x10000,
            cap: 0x20000,
            floor: 0,
            shortest: 0x10000,
        })],
        names: None,
        commits,
        fill: 0x8000,
        streamed: false,
    }
}

pub fn write(offset: u64, len: usize) -> Step {
    let data = vec![1; len];
    Step::Write {
        file: IMAGE,
        offset,
        data,
    }
}

pub fn stage(purpose: Purpose, steps: &[Step]) -> Stage {
    let steps = steps.to_vec();
    Stage { purpose, steps }
}

pub fn plan(stages: &[Stage]) -> Plan {
    let stages = stages.to_vec();
    Plan { stages }
}

/// The verdict on steps that are no commit.
pub fn steps(steps: &[Step]) -> Result<u64, PlanError> {
    let plan = plan(&[stage(Purpose::Prepare, steps)]);
    check(&plan, &limits(Commits::None))
}

/// The verdict on a commit stage of its own.
fn commit(steps: &[Step]) -> Result<u64, PlanError> {
    let plan = plan(&[stage(Purpose::Commit, steps)]);
    check(&plan, &limits(Commits::Some))
}

#[test]
fn a_sound_plan_passes_and_its_bytes_are_counted() {
    let plan = plan(&[
        stage(Purpose::Prepare, &[write(0x10000, 512), write(0, 512)]),
        stage(Purpose::Commit, &[write(0, 512)]),
        stage(Purpose::Release, &[write(512, 8)]),
    ]);
    assert_eq!(check(&plan, &limits(Commits::Some)), Ok(3 * 512 + 8));
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
    // What an interrupted change had added behind it goes after the commit.
    let tidy = [
        stage(Purpose::Commit, &[write(0, 512)]),
        stage(Purpose::Release, &cut),
    ];
    assert_eq!(check(&plan(&tidy), &limits(Commits::Some)), Ok(512));
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
fn copies_from_another_file_read_inside_that_as_it_is_by_then() {
    let mut limits = limits(Commits::None);
    let mut other = limits.files[0].unwrap();
    other.len = 0x400;
    limits.files.push(Some(other));
    limits.files.push(None);
    let verdict = |source, from, to, len| {
        let step = Step::CopyFrom {
            file: IMAGE,
            source: FileNo(source),
            from,
            to,
            len,
        };
        check(&plan(&[stage(Purpose::Prepare, &[step])]), &limits)
    };
    assert_eq!(verdict(1, 0x200, 0x1000, 0x200), Ok(0x200));
    let past = |end| Err(PlanError::PastEnd { end, len: 0x400 });
    assert_eq!(verdict(1, 0x201, 0x1000, 0x200), past(0x401));
    assert_eq!(verdict(1, 0x10000, 0, 1), past(0x10001));
    let (end, cap) = (0x20001, 0x20000);
    let refusal = Err(PlanError::PastCap { end, cap });
    assert_eq!(verdict(1, 0, 0x20000, 1), refusal);
    let (offset, len) = (u64::MAX, 2);
    let overflow = Err(PlanError::Overflow { offset, len });
    assert_eq!(verdict(1, offset, 0, 2), overflow);
    for source in [0, 2, 3] {
        let refusal = Err(PlanError::UnknownFile(FileNo(source)));
        assert_eq!(verdict(source, 0, 0x1000, 1), refusal, "{source}");
    }
    let (bytes, fill) = (0x8001, 0x8000);
    limits.files[1].as_mut().unwrap().len = bytes;
    let step = Step::CopyFrom {
        file: IMAGE,
        source: FileNo(1),
        from: 0,
        to: 0,
        len: bytes,
    };
    let plan = plan(&[stage(Purpose::Prepare, &[step])]);
    assert_eq!(check(&plan, &limits), Err(PlanError::Fills { bytes, fill }));
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
    let two = [write(0, 8), write(512, 9)];
    assert_eq!(commit(&two), Err(PlanError::CommitSteps(2)));
}

#[test]
fn a_commit_may_write_the_same_to_two_places() {
    assert_eq!(commit(&[write(0, 512), write(512, 512)]), Ok(1024));
    let three = [write(0, 8), write(512, 8), write(1024, 8)];
    assert_eq!(commit(&three), Err(PlanError::CommitSteps(3)));
    let wide = PlanError::CommitSpansSectors {
        offset: 1,
        len: 512,
    };
    assert_eq!(commit(&[write(512, 512), write(1, 512)]), Err(wide));
    let length = Step::SetLength {
        file: IMAGE,
        len: 512,
    };
    let lengths = [length.clone(), length];
    assert_eq!(commit(&lengths), Err(PlanError::CommitSteps(2)));
}

#[test]
fn commits_come_exactly_where_they_are_expected() {
    let commit = stage(Purpose::Commit, &[write(0, 8)]);
    let other = stage(Purpose::Release, &[write(0, 8)]);
    let verdict = |commits, stages: &[&Stage]| {
        let stages: Vec<Stage> = stages.iter().map(|&stage| stage.clone()).collect();
        check(&plan(&stages), &limits(commits)).map(|_| ())
    };
    let too_many = |count, most| Err(PlanError::Commits { count, most });
    use Commits::{Any, Last, None, Some};
    assert_eq!(verdict(None, &[&commit]), too_many(1, 0));
    for expected in [None, Any] {
        assert_eq!(verdict(expected, &[]), Ok(()));
        assert_eq!(verdict(expected, &[&other]), Ok(()));
    }
    assert_eq!(verdict(Some, &[]), Ok(()));
    assert_eq!(verdict(Some, &[&other]), Err(PlanError::CommitMissing));
    for expected in [Any, Some] {
        assert_eq!(verdict(expected, &[&commit, &other, &commit]), Ok(()));
        assert_eq!(verdict(expected, &[&commit; 4]), Ok(()));
        assert_eq!(verdict(expected, &[&commit; 5]), too_many(5, 4));
    }
    assert_eq!(verdict(Last, &[]), Err(PlanError::CommitMissing));
    assert_eq!(verdict(Last, &[&commit, &commit]), too_many(2, 1));
    assert_eq!(
        verdict(Last, &[&commit, &other]),
        Err(PlanError::CommitNotLast)
    );
    assert_eq!(verdict(Last, &[&other, &commit]), Ok(()));
}

#[test]
fn every_commit_has_the_shape_of_one() {
    let sound = stage(Purpose::Commit, &[write(0, 8)]);
    let wide = stage(Purpose::Commit, &[write(0, 513)]);
    let (offset, len) = (0, 513);
    assert_eq!(
        check(&plan(&[sound, wide]), &limits(Commits::Any)),
        Err(PlanError::CommitSpansSectors { offset, len })
    );
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
