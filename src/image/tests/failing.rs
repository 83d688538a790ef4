//! Failures in the middle: what is reported, and what is left behind.

use super::faulty::Faulty;
use super::toy::{Toy, UNIT, Unit};
use super::{Fixture, Script, facts, for_writing, told};
use crate::image::{ErrorKind, Image, ResizeOptions};
use instar_guest::plan::{Plan, Purpose, Stage, Step};
use instar_guest::proto::PlanReply;
use instar_guest::{FileNo, Reply, Request};

const FILE: FileNo = FileNo::IMAGE;
const OLD: usize = 8192;

fn write(offset: u64) -> Step {
    let data = vec![7; 16];
    Step::Write {
        file: FILE,
        offset,
        data,
    }
}

/// A guest whose resize is this plan.
fn planning(stages: Vec<Stage>) -> impl FnMut(&Request) -> Reply + Clone {
    move |request| match request {
        Request::Open { .. } => Reply::Opened(facts(1 << 20, 512)),
        Request::Resize { .. } => Reply::Plan(PlanReply {
            plan: Plan {
                stages: stages.clone(),
            },
            ..PlanReply::default()
        }),
        other => panic!("{other:?}"),
    }
}

/// New structures past the end, a hook inside, the commit, a release.
fn stages() -> Vec<Stage> {
    let reserve = Step::Reserve {
        file: FILE,
        offset: 8192,
        len: 4096,
    };
    let extend = Step::SetLength {
        file: FILE,
        len: 12288,
    };
    let stage = |purpose, steps| Stage { purpose, steps };
    vec![
        stage(
            Purpose::Prepare,
            vec![write(1024), write(8192), extend, reserve],
        ),
        stage(Purpose::Commit, vec![write(0)]),
        stage(Purpose::Release, vec![write(2048)]),
    ]
}

struct Run {
    fixture: Fixture,
    image: Image,
    log: Faulty,
}

fn run() -> Run {
    let fixture = Fixture::new(&[1; OLD]);
    let log = Faulty::default();
    let mut options = for_writing();
    options.effects = log.hook();
    let mut guest = planning(stages());
    let image = fixture.open(
        &options,
        Script(move |request: &Request, _: &mut dyn crate::sandbox::Files| Ok(guest(request))),
    );
    Run {
        fixture,
        image,
        log,
    }
}

impl Run {
    /// Resizes while the effect after the first `after` ones fails.
    fn failing(&self, after: usize) -> (ErrorKind, String) {
        self.log.fail(after, libc::ENOSPC);
        let error = self
            .image
            .resize(2 << 20, &ResizeOptions::default())
            .unwrap_err();
        assert_eq!(error.errno(), libc::ENOSPC);
        told(&error)
    }
}

#[test]
fn stages_run_in_order_with_a_barrier_after_each() {
    let run = run();
    run.image
        .resize(2 << 20, &ResizeOptions::default())
        .unwrap();
    let expected = [
        // What finds a full disk first, then what truncating takes back, then
        // the rest: within a stage the order is free.
        "reserve 8192+4096",
        "write 8192+16",
        "set_len 12288",
        "write 1024+16",
        "sync",
        "write 0+16",
        "sync",
        "write 2048+16",
        "sync",
    ];
    assert_eq!(run.log.take(), expected);
    assert_eq!(run.image.counters().fdatasyncs, 3);
}

#[test]
fn before_anything_is_changed_inside_the_file_gets_its_length_back() {
    let texts = [
        "Could not reserve disk space: No space left on device",
        "Could not write metadata: No space left on device",
        "Could not resize file: No space left on device",
    ];
    for (after, text) in texts.into_iter().enumerate() {
        let run = run();
        let text = format!("{text}; the image is unchanged");
        assert_eq!(run.failing(after), (ErrorKind::Os(libc::ENOSPC), text));
        assert_eq!(run.fixture.content(), [1; OLD]);
    }
}

#[test]
fn once_something_inside_may_refer_to_it_the_new_space_stays() {
    for (after, what) in [
        (3, "Could not write metadata"),
        (4, "Could not make changes durable"),
    ] {
        let run = run();
        let text = format!("{what}: No space left on device; the image is unchanged");
        assert_eq!(run.failing(after), (ErrorKind::Os(libc::ENOSPC), text));
        assert_eq!(run.fixture.content().len(), 12288);
        assert_eq!(run.fixture.content()[..512], [1; 512]);
    }
}

#[test]
fn a_commit_that_may_or_may_not_be_durable_is_told_as_such() {
    for (after, what) in [
        (5, "Could not write metadata"),
        (6, "Could not make changes durable"),
    ] {
        let run = run();
        let text = format!(
            "{what}: No space left on device; the image is either unchanged or holds the new \
             size; check it before using it"
        );
        assert_eq!(run.failing(after), (ErrorKind::Os(libc::ENOSPC), text));
    }
}

#[test]
fn after_the_commit_the_image_is_said_to_hold_the_new_size() {
    for (after, what) in [
        (7, "Could not write metadata"),
        (8, "Could not make changes durable"),
    ] {
        let run = run();
        let text = format!(
            "{what}: No space left on device; the image holds the new size, but space that it \
             no longer uses is not released"
        );
        assert_eq!(run.failing(after), (ErrorKind::Os(libc::ENOSPC), text));
        assert_eq!(run.fixture.content()[..16], [7; 16]);
    }
}

#[test]
fn a_sync_that_fails_in_a_resize_ends_the_image_as_in_a_flush() {
    // In front of the commit, behind it, and at the very end.
    for after in [4, 6, 8] {
        let run = run();
        run.failing(after);
        let error = run.image.read_at(&mut [0; 4], 0).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Lost);
        assert_eq!(run.image.flush().unwrap_err().kind(), ErrorKind::Lost);
    }
}

/// A disk of two units, the first shared, over effects that can fail.
fn toy_run() -> (Fixture, Toy, Image, Faulty) {
    let fixture = Fixture::new(&[1; 2 * UNIT as usize]);
    let toy = Toy::new(vec![Unit::At(UNIT, true), Unit::Absent], 2 * UNIT);
    let log = Faulty::default();
    let mut options = for_writing();
    options.effects = log.hook();
    let image = fixture.open(&options, toy.clone());
    (fixture, toy, image, log)
}

#[test]
fn data_that_cannot_be_written_leaves_mapping_and_file_as_they_were() {
    // The write itself, and the extension after it.
    for after in [0, 1] {
        let (fixture, toy, image, log) = toy_run();
        log.fail(after, libc::ENOSPC);
        let error = image.write_at(&[9; 7], UNIT).unwrap_err();
        let text = "No space left on device".to_string();
        assert_eq!(told(&error), (ErrorKind::Os(libc::ENOSPC), text));
        assert_eq!(toy.0.lock().unwrap().units[1], Unit::Absent);
        assert_eq!(fixture.content(), [1; 2 * UNIT as usize]);
        let mut buf = [9; 4];
        image.read_at(&mut buf, UNIT).unwrap();
        assert_eq!(buf, [0; 4]);
        // And the next attempt succeeds.
        image.write_at(&[9; 7], UNIT).unwrap();
        image.read_at(&mut buf, UNIT).unwrap();
        assert_eq!(buf, [9; 4]);
        image.flush().unwrap();
    }
}

#[test]
fn a_flush_that_fails_ends_the_image_until_it_is_opened_again() {
    for after in 0..4 {
        let (_fixture, _toy, image, log) = toy_run();
        image.write_at(&[9; 7], UNIT).unwrap();
        log.take();
        log.fail(after, libc::EIO);
        assert_eq!(image.flush().unwrap_err().errno(), libc::EIO);
        assert_eq!(
            log.take().len(),
            after + 1,
            "nothing is written after the failure"
        );
        let lost = (
            ErrorKind::Lost,
            "Changes were lost that had not been flushed; close the image and open it again"
                .to_string(),
        );
        let mut buf = [0; 4];
        assert_eq!(told(&image.read_at(&mut buf, 0).unwrap_err()), lost);
        assert_eq!(told(&image.write_at(&buf, 0).unwrap_err()), lost);
        assert_eq!(told(&image.flush().unwrap_err()), lost);
        assert_eq!(
            told(
                &image
                    .resize(1 << 20, &ResizeOptions::default())
                    .unwrap_err()
            ),
            lost
        );
        assert_eq!(log.take(), [""; 0]);
    }
}

#[test]
fn a_flush_without_disk_space_is_carried_out_later() {
    for (errno, text) in [
        (libc::ENOSPC, "No space left on device"),
        (libc::EDQUOT, "Disk quota exceeded"),
    ] {
        let (fixture, toy, image, log) = toy_run();
        image.write_at(&[9; 7], UNIT).unwrap();
        log.fail(0, errno);
        let full = (
            ErrorKind::Os(errno),
            format!("Could not write metadata: {text}"),
        );
        assert_eq!(told(&image.flush().unwrap_err()), full);
        assert!(image.is_dirty());
        // What is known is read and written over; nothing new gets a place.
        let mut buf = [0; 7];
        image.read_at(&mut buf, UNIT).unwrap();
        assert_eq!(buf, [9; 7]);
        image.write_at(&[8; 7], UNIT).unwrap();
        log.fail(0, errno);
        assert_eq!(told(&image.write_at(&[7; 7], 0).unwrap_err()), full);
        assert_eq!(toy.0.lock().unwrap().units[0], Unit::At(UNIT, true));
        // With space again, the plan is the first thing that happens.
        log.take();
        image.flush().unwrap();
        assert_eq!(log.take()[..2], ["write 0+1", "sync"]);
        assert!(!image.is_dirty());
        image.read_at(&mut buf, UNIT).unwrap();
        assert_eq!(buf, [8; 7]);
        assert_eq!(fixture.content()[2 * UNIT as usize..][..7], [8; 7]);
    }
}

#[test]
fn a_flush_without_disk_space_for_its_second_stage_ends_the_image() {
    let (_fixture, _toy, image, log) = toy_run();
    image.write_at(&[9; 7], UNIT).unwrap();
    log.fail(2, libc::ENOSPC);
    assert_eq!(image.flush().unwrap_err().errno(), libc::ENOSPC);
    assert_eq!(image.flush().unwrap_err().kind(), ErrorKind::Lost);
}
