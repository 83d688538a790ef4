//! Plans that change the names of an image's files, and those that may not.

use super::plans::{limits, plan, stage, steps, write};
use crate::image::plan_check::{Commits, check};
use crate::image::plan_error::PlanError;
use crate::image::plan_names::NameLimits;
use instar_guest::FileNo;
use instar_guest::plan::{NewName, Purpose, Stage, Step};

/// The verdict on a plan over two writable files, `disk.vmdk` and
/// `disk-s001.vmdk`, that may make two more.
fn naming(stages: &[Stage]) -> Result<u64, PlanError> {
    let mut limits = limits(Commits::Any);
    limits.files.push(limits.files[0]);
    limits.names = Some(NameLimits {
        most: 2,
        cap: 0x1000,
        has: Some(["disk.vmdk", "disk-s001.vmdk"].map(String::from).to_vec()),
    });
    check(&plan(stages), &limits)
}

fn create(file: u32, name: &str) -> Step {
    let (file, name) = (FileNo(file), NewName::Plain(name.to_string()));
    Step::Create { file, name }
}

fn replacement(file: u32) -> Step {
    let (file, name) = (FileNo(file), NewName::Replacement);
    Step::Create { file, name }
}

fn rename(file: u32, over: u32) -> Step {
    let (file, over) = (FileNo(file), FileNo(over));
    Step::Rename { file, over }
}

fn unlink(file: u32) -> Step {
    let file = FileNo(file);
    Step::Unlink { file }
}

fn prepare(steps: &[Step]) -> Stage {
    stage(Purpose::Prepare, steps)
}

fn committing(step: Step) -> Stage {
    stage(Purpose::Commit, &[step])
}

#[test]
fn a_plan_may_make_files_and_put_them_in_the_place_of_its_own() {
    let into_made = Step::Write {
        file: FileNo(2),
        offset: 0,
        data: vec![1; 0x1000],
    };
    let verdict = naming(&[
        prepare(&[create(2, "disk-s002.vmdk"), into_made, replacement(3)]),
        committing(rename(3, 0)),
        stage(Purpose::Release, &[unlink(1)]),
    ]);
    assert_eq!(verdict, Ok(0x1000));
}

#[test]
fn names_change_only_where_they_may() {
    for step in [create(1, "disk-1"), replacement(1)] {
        assert_eq!(steps(&[step]), Err(PlanError::Names));
    }
    let commit = || committing(write(0, 8));
    let (file, over) = (FileNo(0), FileNo(1));
    let plain = stage(Purpose::Release, &[unlink(0)]);
    assert_eq!(
        check(&plan(&[commit(), plain]), &limits(Commits::Any)),
        Err(PlanError::Unlink(file))
    );
    assert_eq!(
        naming(&[committing(rename(0, 1))]),
        Err(PlanError::Rename { file, over })
    );
}

#[test]
fn a_made_file_gets_the_next_number_a_fitting_name_and_a_bound() {
    let made = |steps: &[Step]| naming(&[prepare(steps)]);
    let wrong = |file| Err(PlanError::WrongNumber(FileNo(file)));
    assert_eq!(made(&[create(1, "disk-s002.vmdk")]), wrong(1));
    assert_eq!(made(&[create(3, "disk-s002.vmdk")]), wrong(3));
    assert_eq!(made(&[create(2, "../x")]), Err(PlanError::BadName));
    for name in [".bashrc", "disk.vmdk", "other.vmdk"] {
        assert_eq!(made(&[create(2, name)]), Err(PlanError::ForeignName));
    }
    let twice = [create(2, "disk-s002.vmdk"), create(3, "disk-s002.vmdk")];
    assert_eq!(made(&twice), Err(PlanError::NameTwice));
    let names = ["disk-s002.vmdk", "disk-s003.vmdk", "disk-s004.vmdk"];
    let many: Vec<Step> = (2..).zip(names).map(|(n, name)| create(n, name)).collect();
    assert_eq!(made(&many), Err(PlanError::TooManyFiles(2)));
    let (end, cap) = (0x1001, 0x1000);
    let long = Step::SetLength {
        file: FileNo(2),
        len: end,
    };
    assert_eq!(
        made(&[create(2, "disk-s002.vmdk"), long]),
        Err(PlanError::PastCap { end, cap })
    );
}

#[test]
fn a_replacement_takes_one_files_place() {
    assert_eq!(
        naming(&[prepare(&[replacement(2)])]),
        Err(PlanError::Replacement)
    );
    assert_eq!(
        naming(&[prepare(&[replacement(2), replacement(3)])]),
        Err(PlanError::Replacement)
    );
    // One after the other, each for a file of its own.
    let both = [
        prepare(&[replacement(2)]),
        committing(rename(2, 1)),
        prepare(&[replacement(3)]),
        committing(rename(3, 0)),
    ];
    assert_eq!(naming(&both), Ok(0));
    let (file, over) = (FileNo(3), FileNo(1));
    let twice = [both[0].clone(), both[1].clone(), both[2].clone()];
    let twice = [&twice[..], &[committing(rename(3, 1))]].concat();
    assert_eq!(naming(&twice), Err(PlanError::Rename { file, over }));
}

#[test]
fn a_rename_is_a_commit_of_its_own() {
    let stages = [prepare(&[replacement(2)]), prepare(&[rename(2, 0)])];
    assert_eq!(naming(&stages), Err(PlanError::RenameOutsideCommit));
    let two = stage(Purpose::Commit, &[rename(2, 0), write(0, 8)]);
    let stages = [prepare(&[replacement(2)]), two];
    assert_eq!(naming(&stages), Err(PlanError::CommitSteps(2)));
}

#[test]
fn what_a_rename_takes_is_a_file_of_the_image_that_may_be_written() {
    let over = |over: u32| {
        naming(&[
            prepare(&[create(2, "disk-s002.vmdk"), replacement(3)]),
            committing(rename(3, over)),
        ])
    };
    let file = FileNo(3);
    for bad in [2, 3] {
        let over_bad = FileNo(bad);
        let refusal = PlanError::Rename {
            file,
            over: over_bad,
        };
        assert_eq!(over(bad), Err(refusal));
    }
    assert_eq!(over(7), Err(PlanError::UnknownFile(FileNo(7))));
    assert_eq!(over(1), Ok(0));
}

#[test]
fn only_an_extent_is_removed_and_only_after_a_commit() {
    let commit = || committing(write(0, 8));
    let after = |steps: &[Step]| naming(&[commit(), stage(Purpose::Release, steps)]);
    let refused = |file| Err(PlanError::Unlink(FileNo(file)));
    assert_eq!(after(&[unlink(1)]), Ok(8));
    assert_eq!(after(&[unlink(0)]), refused(0));
    assert_eq!(after(&[unlink(1), unlink(1)]), refused(1));
    assert_eq!(after(&[create(2, "disk-1.vmdk"), unlink(2)]), refused(2));
    let before = [stage(Purpose::Release, &[unlink(1)]), commit()];
    assert_eq!(naming(&before), refused(1));
    let file = FileNo(1);
    let change = Step::SetLength { file, len: 0x10000 };
    assert_eq!(after(&[unlink(1), change]), Err(PlanError::Gone(file)));
}

fn remove(name: &str) -> Step {
    let name = NewName::Plain(name.to_string());
    Step::Remove { name }
}

#[test]
fn by_name_goes_only_what_the_image_could_have_and_does_not() {
    let release = |steps: &[Step]| naming(&[stage(Purpose::Release, steps)]);
    let name = NewName::Replacement;
    let replacement_goes = Step::Remove { name };
    let both = [replacement_goes.clone(), remove("disk-s002.vmdk")];
    assert_eq!(release(&both), Ok(0));
    for name in [".bashrc", "other.vmdk", "diskette-s001.vmdk"] {
        assert_eq!(
            release(&[remove(name)]),
            Err(PlanError::ForeignName),
            "{name}"
        );
    }
    for name in ["../x", "", "sub/disk-s002.vmdk", ".."] {
        assert_eq!(release(&[remove(name)]), Err(PlanError::BadName), "{name}");
    }
    let own = Err(PlanError::NameTwice);
    assert_eq!(release(&[remove("disk-s001.vmdk")]), own);
    let twice = [remove("disk-s002.vmdk"), remove("disk-s002.vmdk")];
    assert_eq!(release(&twice), own);
    let made = [create(2, "disk-s002.vmdk"), remove("disk-s002.vmdk")];
    assert_eq!(release(&made), own);
    let made = [replacement(2), replacement_goes];
    assert_eq!(release(&made), Err(PlanError::Replacement));
    assert_eq!(steps(&[remove("disk-s002.vmdk")]), Err(PlanError::Names));
}
