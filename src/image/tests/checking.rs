//! Checks and repairs: what is asked of the guest, told to the caller, and
//! written to the file.

use super::{Fixture, Script, facts, for_writing, told};
use crate::image::{Access, CheckEvent, Checked, Error, ErrorKind, Image, OpenOptions};
use crate::sandbox::{CallError, Files};
use instar_guest::findings::{Finding, Repair, Report, Severity};
use instar_guest::plan::{Plan, Purpose, Stage, Step};
use instar_guest::proto::{MAX_FINDINGS, PlanReply};
use instar_guest::{Failure, FailureKind, FileNo, Reply, Request};
use std::sync::{Arc, Mutex};

const OLD: [u8; 8192] = [1; 8192];

fn finding(severity: Severity, text: &str) -> Finding {
    let text = text.to_string();
    Finding { severity, text }
}

fn repairing(steps: Vec<Step>) -> PlanReply {
    let purpose = Purpose::Release;
    let stages = match steps.is_empty() {
        true => Vec::new(),
        false => vec![Stage { purpose, steps }],
    };
    PlanReply {
        plan: Plan { stages },
        ..PlanReply::default()
    }
}

fn write(offset: u64) -> Step {
    let (file, data) = (FileNo::IMAGE, vec![7; 16]);
    Step::Write { file, offset, data }
}

/// An image whose guest opens it and answers everything else like this.
fn image(
    access: Access,
    answer: impl FnMut(&Request, &mut dyn Files) -> Result<Reply, CallError> + Clone + Send + 'static,
) -> (Fixture, Image) {
    let fixture = Fixture::new(&OLD);
    let mut answer = answer;
    let guest = Script(
        move |request: &Request, files: &mut dyn Files| match request {
            Request::Open { .. } => Ok(Reply::Opened(facts(1 << 20, 512))),
            other => answer(other, files),
        },
    );
    let image = fixture.open(&OpenOptions::new(access), guest);
    (fixture, image)
}

/// What a check has come to, and what it has told.
fn check(image: &Image, repair: Option<Repair>) -> (Result<Checked, Error>, Vec<String>) {
    let mut events = Vec::new();
    let checked = image.check(repair, &mut |event| {
        events.push(match event {
            CheckEvent::Settled(why) => format!("settled: {why}"),
            CheckEvent::Finding(finding) => format!("{:?}: {}", finding.severity, finding.text),
            CheckEvent::Repaired(report) => format!("repaired {} leaks", report.leaks_fixed),
        });
    });
    (checked, events)
}

#[test]
fn a_check_tells_what_was_found_and_changes_nothing() {
    let report = Report {
        corruptions: 1,
        total_clusters: 9,
        ..Report::default()
    };
    let (fixture, image) = image(Access::Read, move |request, files| {
        assert_eq!(*request, Request::Check { repair: None });
        files
            .tell(vec![finding(Severity::Corruption, "one\x1b[2J")])
            .unwrap();
        files.tell(vec![finding(Severity::Leak, "two")]).unwrap();
        let repair = PlanReply::default();
        Ok(Reply::Checked { report, repair })
    });
    let (checked, events) = check(&image, None);
    assert_eq!(checked.unwrap().report, report);
    assert_eq!(events, ["Corruption: one\\u{1b}[2J", "Leak: two"]);
    assert_eq!(fixture.content(), OLD);
    assert_eq!(image.counters().writes, 0);
}

#[test]
fn a_repair_is_carried_out_and_the_image_checked_again() {
    let asked = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&asked);
    let (fixture, image) = image(Access::Write, move |request, files| {
        let Request::Check { repair } = *request else {
            panic!("{request:?}")
        };
        log.lock().unwrap().push(repair);
        let report = Report {
            leaks: 1,
            leaks_fixed: if repair.is_some() { 2 } else { 0 },
            ..Report::default()
        };
        let text = format!("asked {repair:?}");
        files.tell(vec![finding(Severity::Leak, &text)]).unwrap();
        let steps = repair.map(|_| write(512)).into_iter().collect();
        let repair = repairing(steps);
        Ok(Reply::Checked { report, repair })
    });
    let (checked, events) = check(&image, Some(Repair::Leaks));
    let expected = Report {
        leaks: 1,
        leaks_fixed: 2,
        ..Report::default()
    };
    assert_eq!(checked.unwrap().report, expected);
    assert_eq!(
        events,
        [
            "Leak: asked Some(Leaks)",
            "repaired 2 leaks",
            "Leak: asked None"
        ]
    );
    assert_eq!(*asked.lock().unwrap(), [Some(Repair::Leaks), None]);
    assert_eq!(fixture.content()[512..528], [7; 16]);
    assert_eq!(image.counters().fdatasyncs, 1);
}

#[test]
fn where_nothing_needs_repair_the_image_is_checked_once() {
    let (_fixture, image) = image(Access::Write, |request, _| {
        assert_eq!(
            *request,
            Request::Check {
                repair: Some(Repair::All)
            }
        );
        let (report, repair) = Default::default();
        Ok(Reply::Checked { report, repair })
    });
    let (checked, events) = check(&image, Some(Repair::All));
    assert_eq!(checked.unwrap().report, Report::default());
    assert_eq!(events, [] as [String; 0]);
}

#[test]
fn an_image_that_was_opened_for_reading_is_not_repaired() {
    let (fixture, image) = image(Access::Read, |request, _| panic!("{request:?}"));
    let (checked, _) = check(&image, Some(Repair::All));
    assert_eq!(checked.unwrap_err().kind(), ErrorKind::ReadOnly);
    assert_eq!(fixture.content(), OLD);
}

#[test]
fn a_format_without_checks_says_so_in_its_own_words() {
    let text = "This image format does not support checks";
    let (_fixture, image) = image(Access::Read, move |_, _| {
        let failure = Failure::new(FailureKind::Unsupported, text);
        Err(CallError::Refused(failure))
    });
    let (checked, _) = check(&image, None);
    let expected = (ErrorKind::Unsupported, text.to_string());
    assert_eq!(told(&checked.unwrap_err()), expected);
}

#[test]
fn a_repair_that_nobody_asked_for_is_refused() {
    let (fixture, image) = image(Access::Write, |_, _| {
        let (report, repair) = (Report::default(), repairing(vec![write(0)]));
        Ok(Reply::Checked { report, repair })
    });
    let (checked, _) = check(&image, None);
    let text = "The sandbox sent a plan that nobody asked for".to_string();
    assert_eq!(told(&checked.unwrap_err()), (ErrorKind::BadGuest, text));
    assert_eq!(fixture.content(), OLD);
}

#[test]
fn a_repair_keeps_to_the_image() {
    let file = FileNo::IMAGE;
    let (offset, len) = (0, 1 << 40);
    let steps = [
        write(1 << 50),
        Step::Reserve { file, offset, len },
        Step::SetLength {
            file: FileNo::DATA,
            len: 0,
        },
    ];
    for step in steps {
        let (fixture, image) = image(Access::Write, move |_, _| {
            let repair = repairing(vec![step.clone()]);
            let report = Report::default();
            Ok(Reply::Checked { report, repair })
        });
        let (checked, _) = check(&image, Some(Repair::All));
        assert_eq!(checked.unwrap_err().kind(), ErrorKind::BadGuest);
        assert_eq!(fixture.content(), OLD);
    }
}

#[test]
fn findings_are_refused_where_no_check_was_asked_for_and_where_they_are_too_many() {
    let text = "The sandbox sent findings that nobody asked for, or too many at once";
    let expected = (ErrorKind::BadGuest, text.to_string());
    let (_fixture, image) = image(Access::Read, |request, files| {
        let count = match request {
            Request::Check { .. } => MAX_FINDINGS + 1,
            _ => 1,
        };
        files
            .tell(vec![finding(Severity::Leak, "x"); count])
            .unwrap_err();
        let failure = Failure::new(FailureKind::Io, "io");
        Err(CallError::Refused(failure))
    });
    let (checked, events) = check(&image, None);
    assert_eq!(told(&checked.unwrap_err()), expected);
    assert_eq!(events, [] as [String; 0]);
    let error = image.read_at(&mut [0; 16], 0).unwrap_err();
    assert_eq!(told(&error), expected);
}

#[test]
fn of_endless_findings_a_million_are_told() {
    let (_fixture, image) = image(Access::Read, |_, files| {
        let many = vec![finding(Severity::Leak, ""); MAX_FINDINGS];
        for _ in 0..260 {
            files.tell(many.clone()).unwrap();
        }
        let (report, repair) = Default::default();
        Ok(Reply::Checked { report, repair })
    });
    let mut told = 0;
    image.check(None, &mut |_| told += 1).unwrap();
    assert_eq!(told, 1 << 20);
}

#[test]
fn a_failed_repair_says_what_became_of_the_image() {
    let log = super::faulty::Faulty::default();
    let mut options = for_writing();
    options.effects = log.hook();
    let fixture = Fixture::new(&OLD);
    let guest = Script(|request: &Request, _: &mut dyn Files| {
        Ok(match request {
            Request::Open { .. } => Reply::Opened(facts(1 << 20, 512)),
            _ => Reply::Checked {
                report: Report::default(),
                repair: repairing(vec![write(8192), write(0)]),
            },
        })
    });
    let image = fixture.open(&options, guest);
    log.fail(0, libc::ENOSPC);
    let (checked, _) = check(&image, Some(Repair::All));
    let text = "Could not write metadata: No space left on device; the image is unchanged";
    let expected = (ErrorKind::Os(libc::ENOSPC), text.to_string());
    assert_eq!(told(&checked.unwrap_err()), expected);
    assert_eq!(fixture.content(), OLD);
}
