//! The image's side of the conversation with its guest: what the guest may read,
//! and what happens to parts of a plan that it streams.

use super::error::Fault;
use super::files::FileTable;
use super::plan_check::{Limits, check};
use crate::sandbox::{CallError, Files, Session, escape_deceptive};
use instar_guest::findings::Finding;
use instar_guest::plan::Stage;
use instar_guest::proto::MAX_FINDINGS;
use instar_guest::{FileNo, Plan, Reply, Request};
use std::io;
use vm_memory::VolatileSlice;

/// The guest that serves one image: a sandbox's session, or a test's script.
pub(crate) trait Guest: Send {
    /// Sends one request.
    fn call(&mut self, request: &Request, files: &mut dyn Files) -> Result<Reply, CallError>;
    /// Exits from the sandbox so far.
    fn exits(&self) -> u64;
}

impl Guest for Session {
    fn call(&mut self, request: &Request, files: &mut dyn Files) -> Result<Reply, CallError> {
        Session::call(self, request, files)
    }

    fn exits(&self) -> u64 {
        self.counters().exits
    }
}

/// What becomes of the first parts of a plan that is too large for one message.
#[derive(Debug)]
pub(crate) enum Stream {
    /// No plan was asked for: they are refused.
    Refuse,
    /// They are executed at once.
    Execute(Limits),
    /// They are kept, up to so many bytes, to be shown.
    Collect { stages: Vec<Stage>, room: usize },
    /// The same, but where they are more, none of them is kept.
    Draft {
        stages: Option<Vec<Stage>>,
        room: usize,
    },
}

/// The most findings of one check that are passed on: a terminal is no place
/// for more, and the sums count all of them.
const MAX_TOLD: usize = 1 << 20;
/// The longest text of a finding that reaches a terminal or a log, in bytes.
const MAX_TEXT: usize = 1024;

/// Passes findings on as they come, so that none of them are kept.
pub(crate) struct Telling<'a> {
    to: &'a mut dyn FnMut(&Finding),
    left: usize,
}

impl<'a> Telling<'a> {
    pub fn new(to: &'a mut dyn FnMut(&Finding)) -> Self {
        let left = MAX_TOLD;
        Self { to, left }
    }

    /// The same for a shorter while.
    pub fn again(&mut self) -> Telling<'_> {
        let left = self.left;
        let to = &mut *self.to;
        Telling { to, left }
    }

    fn tell(&mut self, finding: Finding) {
        if let Some(left) = self.left.checked_sub(1) {
            self.left = left;
            (self.to)(&Finding {
                text: escape_deceptive(&finding.text, MAX_TEXT),
                ..finding
            });
        }
    }
}

/// The files of an image as its guest sees them.
pub(crate) struct Serving<'a> {
    pub files: &'a FileTable,
    pub stream: Stream,
    /// Why the last part was refused, in words: the guest only learns that.
    pub refusal: Option<Fault>,
    /// Where findings go; without it they are refused.
    pub telling: Option<Telling<'a>>,
}

impl<'a> Serving<'a> {
    pub fn new(files: &'a FileTable, stream: Stream) -> Self {
        Self {
            files,
            stream,
            refusal: None,
            telling: None,
        }
    }

    fn refuse(&mut self, fault: Fault) -> io::Result<()> {
        let errno = fault.kind.errno();
        self.refusal.get_or_insert(fault);
        Err(io::Error::from_raw_os_error(errno))
    }
}

impl Files for Serving<'_> {
    fn tell(&mut self, findings: Vec<Finding>) -> io::Result<()> {
        match &mut self.telling {
            Some(telling) if findings.len() <= MAX_FINDINGS => {
                findings
                    .into_iter()
                    .for_each(|finding| telling.tell(finding));
                Ok(())
            }
            Some(_) | None => self.refuse(untold()),
        }
    }

    fn len(&mut self, file: FileNo) -> io::Result<u64> {
        self.files.len(file).ok_or(io::ErrorKind::NotFound.into())
    }

    fn read_at(&mut self, file: FileNo, offset: u64, dst: VolatileSlice<'_>) -> io::Result<()> {
        self.files.read_volatile(file, offset, dst)
    }

    fn stream(&mut self, part: Plan) -> io::Result<()> {
        match &mut self.stream {
            Stream::Refuse => self.refuse(unasked()),
            Stream::Execute(limits) => {
                let done = run_part(self.files, &part, limits);
                done.or_else(|fault| self.refuse(fault))
            }
            Stream::Collect { stages, room } => match room.checked_sub(weight(&part)) {
                Some(left) => {
                    *room = left;
                    stages.extend(part.stages);
                    Ok(())
                }
                None => self.refuse(too_long()),
            },
            Stream::Draft { stages, room } => {
                let left = room.checked_sub(weight(&part));
                *room = left.unwrap_or(0);
                match (stages.as_mut(), left) {
                    (Some(stages), Some(_)) => stages.extend(part.stages),
                    (_, _) => *stages = None,
                }
                Ok(())
            }
        }
    }
}

fn unasked() -> Fault {
    Fault::new(
        super::ErrorKind::BadGuest,
        "The sandbox sent a part of a plan that nobody asked for",
    )
}

fn untold() -> Fault {
    Fault::new(
        super::ErrorKind::BadGuest,
        "The sandbox sent findings that nobody asked for, or too many at once",
    )
}

fn too_long() -> Fault {
    Fault::new(
        super::ErrorKind::TooLarge,
        "The plan is too long to be shown",
    )
}

/// Memory that a part of a plan takes, roughly, in bytes.
fn weight(part: &Plan) -> usize {
    let step = |step: &instar_guest::Step| match step {
        instar_guest::Step::Write { data, .. } => data.len() + 64,
        _ => 64,
    };
    part.stages
        .iter()
        .map(|stage| 64 + stage.steps.iter().map(step).sum::<usize>())
        .sum()
}

/// Executes a streamed part. It is durable only at the next barrier, which
/// comes before anything that refers to it.
fn run_part(files: &FileTable, part: &Plan, limits: &mut Limits) -> Result<(), Fault> {
    let filled = check(part, limits)?;
    limits.fill -= filled;
    limits.streamed = true;
    for step in part.stages.iter().flat_map(|stage| &stage.steps) {
        files.step(step)?;
    }
    for (file, limits) in files.numbers().zip(&mut limits.files) {
        if let (Some(limits), Some(len)) = (limits, files.len(file)) {
            limits.len = len;
        }
    }
    Ok(())
}
