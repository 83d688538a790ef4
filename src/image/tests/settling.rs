//! Images that were not closed in order: put in order before the first change,
//! and not before.

use super::{Fixture, Script, facts, for_writing, told};
use crate::image::{Access, CheckEvent, ErrorKind, Image, OpenOptions, ResizeOptions};
use crate::sandbox::{CallError, Files};
use instar_guest::findings::{Repair, Report};
use instar_guest::plan::{Plan, Purpose, Stage, Step};
use instar_guest::proto::{Content, Place, PlanReply};
use instar_guest::{
    Extent, ExtentKind, Facts, Failure, FailureKind, FileNo, Format, Reply, Request,
};
use std::sync::{Arc, Mutex};

const OLD: [u8; 8192] = [1; 8192];
const SIZE: u64 = 1 << 20;

/// A guest whose image is unsettled until its plan has been executed: the
/// first byte of the file tells.
fn guest(
    asked: &Arc<Mutex<Vec<&'static str>>>,
    works: bool,
) -> impl FnMut(&Request, &mut dyn Files) -> Result<Reply, CallError> + Clone + Send + 'static {
    let asked = Arc::clone(asked);
    let mut opened = 0;
    move |request: &Request, _: &mut dyn Files| {
        let (name, reply) = match *request {
            Request::Open { .. } => {
                opened += 1;
                let why = (opened == 1 || !works).then(|| "a log to replay".to_string());
                let facts = Facts {
                    format: Format::Vhdx,
                    unsettled: why,
                    ..facts(SIZE, 512)
                };
                ("open", Reply::Opened(facts))
            }
            Request::Settle => ("settle", planned(Purpose::Link, 0)),
            Request::Flush => ("flush", planned(Purpose::Link, 1024)),
            Request::Resize { .. } => ("resize", planned(Purpose::Commit, 512)),
            Request::Check { .. } => {
                let (report, repair) = Default::default();
                ("check", Reply::Checked { report, repair })
            }
            Request::Map { offset, len } => {
                let kind = ExtentKind::Unallocated { at: None };
                let extents = vec![Extent { offset, len, kind }];
                ("map", Reply::Extents(extents))
            }
            Request::Allocate { offset, len } => {
                let (file, at, content) = (FileNo::IMAGE, 8192, Content::Zero);
                let place = Place {
                    offset,
                    len,
                    file,
                    at,
                    content,
                };
                ("allocate", Reply::Placed(vec![place]))
            }
            ref other => panic!("{other:?}"),
        };
        asked.lock().unwrap().push(name);
        Ok(reply)
    }
}

fn planned(purpose: Purpose, offset: u64) -> Reply {
    let step = Step::Write {
        file: FileNo::IMAGE,
        offset,
        data: vec![7; 16],
    };
    let steps = vec![step];
    Reply::Plan(PlanReply {
        plan: Plan {
            stages: vec![Stage { purpose, steps }],
        },
        ..PlanReply::default()
    })
}

struct Run {
    fixture: Fixture,
    image: Image,
    asked: Arc<Mutex<Vec<&'static str>>>,
}

fn run(access: Access, works: bool) -> Run {
    let fixture = Fixture::new(&OLD);
    let asked = Arc::default();
    let image = fixture.open(&OpenOptions::new(access), Script(guest(&asked, works)));
    asked.lock().unwrap().clear();
    Run {
        fixture,
        image,
        asked,
    }
}

impl Run {
    fn asked(&self) -> Vec<&'static str> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }

    /// Whether the plan that puts the image in order was executed.
    fn is_settled(&self) -> bool {
        self.fixture.content()[..16] == [7; 16]
    }
}

#[test]
fn a_resize_puts_the_image_in_order_first() {
    let run = run(Access::Write, true);
    assert_eq!(
        run.image.facts().unsettled.as_deref(),
        Some("a log to replay")
    );
    run.image
        .resize(2 * SIZE, &ResizeOptions::default())
        .unwrap();
    assert_eq!(run.asked(), ["settle", "open", "resize"]);
    assert!(run.is_settled());
    assert_eq!(run.fixture.content()[512..528], [7; 16]);
    assert_eq!(run.image.counters().fdatasyncs, 2);
    assert_eq!(run.image.facts().unsettled, None);
    // Once is enough.
    run.image
        .resize(4 * SIZE, &ResizeOptions::default())
        .unwrap();
    assert_eq!(run.asked(), ["open", "resize"]);
}

#[test]
fn so_do_the_first_write_and_the_first_allocation() {
    let write = run(Access::Write, true);
    write.image.write_at(&[9; 512], 0).unwrap();
    assert_eq!(write.asked(), ["settle", "open", "map", "allocate"]);
    assert!(write.is_settled());
    let allocate = run(Access::Write, true);
    allocate.image.preallocate(0, 512).unwrap();
    let expected = ["settle", "open", "map", "allocate", "flush"];
    assert_eq!(allocate.asked(), expected);
}

#[test]
fn so_does_a_repair_which_tells_it_and_counts_it() {
    let run = run(Access::Write, true);
    let mut events = Vec::new();
    let checked = run
        .image
        .check(Some(Repair::All), &mut |event| match event {
            CheckEvent::Settled(why) => events.push(why.to_string()),
            other => panic!("{other:?}"),
        })
        .unwrap();
    assert_eq!(events, ["a log to replay"]);
    let expected = Report {
        corruptions_fixed: 1,
        ..Report::default()
    };
    assert_eq!(checked.report, expected);
    assert_eq!(run.asked(), ["settle", "open", "check"]);
}

#[test]
fn reading_checking_and_refused_requests_leave_it_as_it_is() {
    for access in [Access::Read, Access::Write] {
        let run = run(access, true);
        run.image.read_at(&mut [0; 16], 0).unwrap();
        run.image.check(None, &mut |_| ()).unwrap();
        assert!(!run.asked().contains(&"settle"));
        assert_eq!(run.fixture.content(), OLD);
    }
    let run = run(Access::Read, true);
    let how = ResizeOptions::default();
    assert_eq!(
        run.image.resize(2 * SIZE, &how).unwrap_err().kind(),
        ErrorKind::ReadOnly
    );
    assert_eq!(
        run.image.write_at(&[9], 0).unwrap_err().kind(),
        ErrorKind::ReadOnly
    );
    assert_eq!(run.asked(), [] as [&str; 0]);
    assert_eq!(run.fixture.content(), OLD);
}

#[test]
fn a_dry_run_shows_what_comes_first() {
    let run = run(Access::Write, true);
    let reply = run
        .image
        .plan_resize(2 * SIZE, &ResizeOptions::default())
        .unwrap();
    assert_eq!(reply.plan.stages[0].purpose, Purpose::Link);
    assert_eq!(
        reply.warnings,
        [
            "The image has to be put in order first (a log to replay): this is the plan for \
             that, the resize is planned afterwards"
        ]
    );
    assert_eq!(run.asked(), ["settle"]);
    assert_eq!(run.fixture.content(), OLD);
    // The guest took the plan for executed, and has to look again.
    run.image
        .resize(2 * SIZE, &ResizeOptions::default())
        .unwrap();
    assert_eq!(run.asked()[0], "open");
}

#[test]
fn an_image_that_stays_unsettled_is_not_changed() {
    let run = run(Access::Write, false);
    let error = run
        .image
        .resize(2 * SIZE, &ResizeOptions::default())
        .unwrap_err();
    let text = "The sandbox's plan did not put the image in order".to_string();
    assert_eq!(told(&error), (ErrorKind::BadGuest, text));
    assert_eq!(run.asked(), ["settle", "open"]);
}

#[test]
fn a_plan_that_would_do_more_than_that_is_refused() {
    let fixture = Fixture::new(&OLD);
    let guest = Script(|request: &Request, _: &mut dyn Files| {
        Ok(match request {
            Request::Open { .. } => Reply::Opened(Facts {
                unsettled: Some("why".to_string()),
                ..facts(SIZE, 512)
            }),
            _ => planned(Purpose::Link, 1 << 50),
        })
    });
    let image = fixture.open(&for_writing(), guest);
    let error = image.write_at(&[9], 0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BadGuest);
    assert_eq!(fixture.content(), OLD);
}

/// A guest that refuses to change the size until it has put the image in order.
fn settles_first(
    asked: &Arc<Mutex<Vec<&'static str>>>,
) -> impl FnMut(&Request, &mut dyn Files) -> Result<Reply, CallError> + Clone + Send + 'static {
    let asked = Arc::clone(asked);
    let mut settled = false;
    move |request: &Request, _: &mut dyn Files| {
        let (name, reply) = match *request {
            Request::Open { .. } => ("open", Ok(Reply::Opened(facts(SIZE, 512)))),
            Request::Settle => {
                settled = true;
                ("settle", Ok(planned(Purpose::Release, 0)))
            }
            Request::Resize { .. } if !settled => {
                let failure = Failure::new(FailureKind::SettleFirst, "interrupted");
                ("refused", Err(CallError::Refused(failure)))
            }
            Request::Resize { .. } => ("resize", Ok(planned(Purpose::Commit, 512))),
            ref other => panic!("{other:?}"),
        };
        asked.lock().unwrap().push(name);
        reply
    }
}

#[test]
fn what_an_interrupted_change_left_is_given_back_before_the_next() {
    let fixture = Fixture::new(&OLD);
    let asked = Arc::default();
    let image = fixture.open(&for_writing(), Script(settles_first(&asked)));
    asked.lock().unwrap().clear();
    image.resize(2 * SIZE, &ResizeOptions::default()).unwrap();
    let expected = ["refused", "open", "settle", "open", "resize"];
    assert_eq!(*asked.lock().unwrap(), expected);
    assert_eq!(fixture.content()[..16], [7; 16]);
    assert_eq!(fixture.content()[512..528], [7; 16]);
    assert_eq!(image.virtual_size(), 2 * SIZE);
}

#[test]
fn a_dry_run_shows_how_that_is_given_back() {
    let fixture = Fixture::new(&OLD);
    let image = fixture.open(&for_writing(), Script(settles_first(&Arc::default())));
    let reply = image
        .plan_resize(2 * SIZE, &ResizeOptions::default())
        .unwrap();
    assert_eq!(reply.plan.stages[0].purpose, Purpose::Release);
    assert_eq!(
        reply.warnings,
        [
            "The image has to be put in order first (interrupted): this is the plan for that, the \
             resize is planned afterwards"
        ]
    );
    assert_eq!(fixture.content(), OLD);
}
