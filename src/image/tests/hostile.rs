//! Guests that lie: each lie is its own error and has no effect.

use super::toy::UNIT;
use super::{Fixture, Script, facts, for_writing, told};
use crate::image::{Access, ErrorKind, Image, OpenOptions, ResizeOptions};
use crate::sandbox::{CallError, Crash, Files, SandboxError};
use instar_guest::plan::{Plan, Purpose, Stage, Step};
use instar_guest::proto::{Content, Place, PlanReply};
use instar_guest::{Extent, ExtentKind, Facts, FileNo, Reply, Request};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

const FILE: FileNo = FileNo::IMAGE;
const SIZE: u64 = 1 << 20;
const LEN: usize = 8192;

/// An image of 8 KiB whose guest opens it and then answers as it likes.
fn image(
    answer: impl FnMut(&Request, &mut dyn Files) -> Result<Reply, CallError> + Send + Clone + 'static,
) -> (Fixture, Image) {
    let fixture = Fixture::new(&[1; LEN]);
    let mut answer = answer;
    let guest = Script(
        move |request: &Request, files: &mut dyn Files| match request {
            Request::Open { .. } => Ok(Reply::Opened(facts(SIZE, UNIT))),
            other => answer(other, files),
        },
    );
    let image = fixture.open(&for_writing(), guest);
    (fixture, image)
}

fn planned(stages: Vec<Stage>) -> Reply {
    Reply::Plan(PlanReply {
        plan: Plan { stages },
        ..PlanReply::default()
    })
}

fn stage(purpose: Purpose, step: Step) -> Stage {
    let steps = vec![step];
    Stage { purpose, steps }
}

fn write(file: FileNo, offset: u64, len: usize) -> Step {
    let data = vec![7; len];
    Step::Write { file, offset, data }
}

fn bad(text: &str) -> (ErrorKind, String) {
    (ErrorKind::BadGuest, text.to_string())
}

#[test]
fn facts_out_of_range_are_refused() {
    let lies: [fn(&mut Facts); 9] = [
        |facts| facts.write_unit = 0,
        |facts| facts.write_unit = 3,
        |facts| facts.size_unit = 0,
        |facts| facts.cluster_size = Some(1 << 40),
        |facts| facts.cluster_size = Some(4 << 30),
        |facts| facts.cluster_size = Some(3 << 20),
        |facts| facts.cluster_size = Some(0),
        |facts| facts.cluster_size = Some(256),
        |facts| facts.virtual_size = u64::MAX,
    ];
    for lie in lies {
        let mut facts = facts(SIZE, UNIT);
        lie(&mut facts);
        let guest = Script(move |_: &Request, _: &mut dyn Files| Ok(Reply::Opened(facts.clone())));
        let fixture = Fixture::new(&[1; LEN]);
        let error = fixture.try_open(&for_writing(), guest).unwrap_err();
        let text =
            "The sandbox's facts about the image are refused: a size or unit is out of range";
        assert_eq!(told(&error), bad(text));
        assert_eq!(error.errno(), libc::EIO);
    }
}

#[test]
fn an_extent_past_the_end_of_the_file_is_not_read() {
    let (_fixture, image) = image(|request, _| {
        let Request::Map { offset, len } = *request else {
            panic!()
        };
        let kind = ExtentKind::Data {
            file: FILE,
            at: 0,
            in_place: true,
        };
        Ok(Reply::Extents(vec![Extent { offset, len, kind }]))
    });
    let error = image.read_at(&mut [0; 16], 0).unwrap_err();
    let text =
        "The sandbox's mapping is refused: bytes up to 0x100000 of a file that may reach 0x2000";
    assert_eq!(told(&error), bad(text));
}

#[test]
fn a_reply_to_another_question_is_refused() {
    let (_fixture, image) = image(|_, _| Ok(Reply::Done));
    let reply = |request| {
        bad(&format!(
            "The sandbox's reply does not answer the request ({request})"
        ))
    };
    assert_eq!(
        told(&image.read_at(&mut [0; 16], 0).unwrap_err()),
        reply("Map")
    );
    let error = image
        .resize(2 * SIZE, &ResizeOptions::default())
        .unwrap_err();
    assert_eq!(told(&error), reply("Resize"));
}

#[test]
fn a_plan_that_breaks_the_rules_has_no_effect() {
    let refused = "The sandbox's plan is refused, nothing was changed: ";
    let commit = || stage(Purpose::Commit, write(FILE, 0, 8));
    let far = 1 << 40;
    let lies = [
        (
            vec![stage(Purpose::Prepare, write(FILE, far, 1)), commit()],
            format!(
                "a step reaches up to {:#x}, the file may grow to 0x8004925000",
                far + 1
            ),
        ),
        (
            vec![stage(Purpose::Prepare, write(FileNo::DATA, 0, 1)), commit()],
            "a step changes file 1, which it may not".to_string(),
        ),
        (
            vec![stage(Purpose::Commit, write(FILE, 0, 1024))],
            "a commit of 1024 bytes at 0x0 is not inside one sector".to_string(),
        ),
        (
            vec![commit(), commit(), commit(), commit(), commit()],
            "it has 5 commits, 4 are allowed".to_string(),
        ),
        (
            vec![stage(Purpose::Prepare, write(FILE, 0, 8))],
            "it has no commit".to_string(),
        ),
    ];
    for (stages, why) in lies {
        let (fixture, image) = image(move |_, _| Ok(planned(stages.clone())));
        let error = image
            .resize(2 * SIZE, &ResizeOptions::default())
            .unwrap_err();
        assert_eq!(told(&error), bad(&format!("{refused}{why}")));
        assert_eq!(fixture.content(), [1; LEN]);
    }
}

#[test]
fn a_streamed_part_below_the_old_end_has_no_effect() {
    let (fixture, image) = image(|_, files| {
        let part = Plan {
            stages: vec![stage(Purpose::Prepare, write(FILE, 8191, 2))],
        };
        files.stream(part).unwrap_err();
        let failure = instar_guest::Failure::new(instar_guest::FailureKind::Io, "io");
        Err(CallError::Refused(failure))
    });
    let error = image
        .resize(2 * SIZE, &ResizeOptions::default())
        .unwrap_err();
    let text = "The sandbox's plan is refused, nothing was changed: a streamed step changes \
                the file at 0x1fff, below its old end at 0x2000";
    assert_eq!(told(&error), bad(text));
    assert_eq!(fixture.content(), [1; LEN]);
}

#[test]
fn streamed_parts_are_taken_back_when_the_rest_is_refused() {
    let (fixture, image) = image(|_, files| {
        let part = Plan {
            stages: vec![stage(Purpose::Prepare, write(FILE, 8192, 512))],
        };
        files.stream(part).unwrap();
        Ok(planned(vec![stage(Purpose::Commit, write(FILE, 0, 1024))]))
    });
    let error = image
        .resize(2 * SIZE, &ResizeOptions::default())
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BadGuest);
    assert_eq!(fixture.content(), [1; LEN]);
}

#[test]
fn nobody_streams_a_plan_that_was_not_asked_for() {
    let (fixture, image) = image(|_, files| {
        let part = Plan {
            stages: vec![stage(Purpose::Prepare, write(FILE, 8192, 512))],
        };
        files.stream(part).unwrap_err();
        let failure = instar_guest::Failure::new(instar_guest::FailureKind::Io, "io");
        Err(CallError::Refused(failure))
    });
    let error = image.read_at(&mut [0; 16], 0).unwrap_err();
    let text = "The sandbox sent a part of a plan that nobody asked for";
    assert_eq!(told(&error), bad(text));
    assert_eq!(fixture.content(), [1; LEN]);
}

#[test]
fn a_resize_that_plans_nothing_is_none() {
    let (_fixture, image) = image(|_, _| Ok(planned(Vec::new())));
    let error = image
        .resize(2 * SIZE, &ResizeOptions::default())
        .unwrap_err();
    assert_eq!(
        told(&error),
        bad("The sandbox's reply does not answer the request (Resize)")
    );
    image.resize(SIZE, &ResizeOptions::default()).unwrap();
}

/// Answers mappings with "nothing is allocated", allocations with `places`.
fn placing(places: Reply) -> (Fixture, Image) {
    image(move |request, _| match *request {
        Request::Map { offset, len } => {
            let kind = ExtentKind::Unallocated { at: None };
            Ok(Reply::Extents(vec![Extent { offset, len, kind }]))
        }
        Request::Allocate { .. } => Ok(places.clone()),
        ref other => panic!("{other:?}"),
    })
}

#[test]
fn places_outside_the_file_are_not_written_and_end_the_image() {
    let content = Content::Stale;
    let place = Place {
        offset: 0,
        len: UNIT,
        file: FILE,
        at: 1 << 40,
        content,
    };
    let (fixture, image) = placing(Reply::Placed(vec![place]));
    let error = image.write_at(&[9; 7], 0).unwrap_err();
    let text = "The sandbox's mapping is refused: bytes up to 0x10000001000 of a file that may \
                reach 0x8004006000";
    assert_eq!(told(&error), bad(text));
    assert_eq!(image.flush().unwrap_err().kind(), ErrorKind::Lost);
    assert_eq!(fixture.content(), [1; LEN]);
}

#[test]
fn a_wider_range_must_contain_what_was_asked_for_and_end() {
    for (offset, len) in [(0, UNIT), (UNIT, 4 * UNIT), (0, SIZE + UNIT), (0, u64::MAX)] {
        let (fixture, image) = placing(Reply::Wider { offset, len });
        let error = image.write_at(&[9; 7], 0).unwrap_err();
        assert_eq!(
            told(&error),
            bad("The sandbox's reply does not answer the request (Allocate)")
        );
        assert_eq!(fixture.content(), [1; LEN]);
    }
}

#[test]
fn a_range_that_grows_again_and_again_ends() {
    // Slowly, without an end; and at once, by less than the limit each time.
    for (more, requests) in [(UNIT, 5), (72 << 20, 2)] {
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        let guest = Script(move |request: &Request, _: &mut dyn Files| match *request {
            Request::Open { .. } => Ok(Reply::Opened(facts(1 << 30, UNIT))),
            Request::Map { offset, len } => {
                let kind = ExtentKind::Unallocated { at: None };
                Ok(Reply::Extents(vec![Extent { offset, len, kind }]))
            }
            Request::Allocate { offset, len } => {
                count.fetch_add(1, Ordering::Relaxed);
                let len = len + more;
                Ok(Reply::Wider { offset, len })
            }
            ref other => panic!("{other:?}"),
        });
        let fixture = Fixture::new(&[1; LEN]);
        let image = fixture.open(&for_writing(), guest);
        let error = image.write_at(&[9; 7], 0).unwrap_err();
        assert_eq!(
            told(&error),
            bad("The sandbox's reply does not answer the request (Allocate)")
        );
        assert_eq!(asked.load(Ordering::Relaxed), requests);
        assert_eq!(image.flush().unwrap_err().kind(), ErrorKind::Lost);
        assert_eq!(fixture.content(), [1; LEN]);
    }
}

#[test]
fn a_session_that_dies_takes_only_unflushed_changes_along() {
    let crash = || CallError::Sandbox(SandboxError::Crashed(Crash::Halted));
    let (fixture, image) = image(move |request, _| match *request {
        Request::Map { offset, len } => {
            let kind = ExtentKind::Unallocated { at: None };
            Ok(Reply::Extents(vec![Extent { offset, len, kind }]))
        }
        Request::Allocate { offset, len } => {
            let content = Content::Zero;
            let place = Place {
                offset,
                len,
                file: FILE,
                at: 8192,
                content,
            };
            Ok(Reply::Placed(vec![place]))
        }
        _ => Err(crash()),
    });
    image.write_at(&[9; 7], 0).unwrap();
    assert_eq!(image.flush().unwrap_err().kind(), ErrorKind::Sandbox);
    assert_eq!(
        image.read_at(&mut [0; 4], 0).unwrap_err().kind(),
        ErrorKind::Lost
    );
    assert_eq!(fixture.content()[..LEN], [1; LEN]);
}

#[test]
fn what_is_opened_for_reading_is_not_changed() {
    let guest = Script(|request: &Request, _: &mut dyn Files| match request {
        Request::Open { .. } => Ok(Reply::Opened(facts(SIZE, UNIT))),
        other => panic!("{other:?}"),
    });
    let fixture = Fixture::new(&[1; LEN]);
    let read_only = (
        ErrorKind::ReadOnly,
        "The image was opened for reading only".to_string(),
    );
    let image = fixture.open(&OpenOptions::new(Access::Read), guest);
    assert_eq!(told(&image.write_at(&[1], 0).unwrap_err()), read_only);
    assert_eq!(told(&image.preallocate(0, 1).unwrap_err()), read_only);
    let error = image
        .resize(2 * SIZE, &ResizeOptions::default())
        .unwrap_err();
    assert_eq!(told(&error), read_only);
    assert_eq!(error.errno(), libc::EROFS);
}
