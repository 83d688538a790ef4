//! A made-up format whose mapping lives in the guest alone: small enough to be
//! right, and rich enough to show the host every kind of extent and place.

use super::facts;
use crate::image::guest::Guest;
use crate::sandbox::{CallError, Files};
use instar_guest::plan::{Purpose, Stage, Step};
use instar_guest::proto::{Content, Place, PlanReply};
use instar_guest::{Extent, ExtentKind, Failure, FailureKind, FileNo, Plan, Reply, Request};
use std::sync::{Arc, Mutex};

/// Allocation unit, in bytes.
pub const UNIT: u64 = 4096;

/// What is known of one unit of the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unit {
    Absent,
    Zero,
    Compressed(Vec<u8>),
    /// At a host offset, shared with a snapshot or not.
    At(u64, bool),
}

/// The guest's state. Host offset 0 is a header that flushes count in.
#[derive(Debug)]
pub struct State {
    pub units: Vec<Unit>,
    pub size: u64,
    /// First host offset that was never used.
    pub end: u64,
    /// Units that may be used again, and those that may be after a flush.
    pub free: Vec<u64>,
    pub released: Vec<u64>,
    before: Option<Before>,
    pub flushes: u8,
    /// Allocations that are accepted before a flush is asked for.
    pub room: usize,
    pub allocated: usize,
    /// Whether a shared unit can only be placed with its neighbour, which then
    /// moves as well.
    pub pairs: bool,
}

/// What an undo brings back.
#[derive(Debug)]
struct Before {
    units: Vec<Unit>,
    end: u64,
    free: Vec<u64>,
    released: Vec<u64>,
}

/// The guest; clones share the state.
#[derive(Clone, Debug)]
pub struct Toy(pub Arc<Mutex<State>>);

impl Toy {
    /// A disk of these units, in a file that holds `end` bytes.
    pub fn new(units: Vec<Unit>, end: u64) -> Self {
        Self(Arc::new(Mutex::new(State {
            size: units.len() as u64 * UNIT,
            units,
            end,
            free: Vec::new(),
            released: Vec::new(),
            before: None,
            flushes: 0,
            room: usize::MAX,
            allocated: 0,
            pairs: false,
        })))
    }
}

fn refused(kind: FailureKind, message: &str) -> CallError {
    CallError::Refused(Failure::new(kind, message))
}

impl State {
    fn extents(&self, offset: u64, len: u64) -> Vec<Extent> {
        let end = offset + len;
        let mut next = offset;
        let mut extents = Vec::new();
        while next < end {
            let (index, skip) = (next / UNIT, next % UNIT);
            let stop = ((index + 1) * UNIT).min(end);
            let kind = match &self.units[index as usize] {
                Unit::Absent => ExtentKind::Unallocated { at: None },
                Unit::Zero => ExtentKind::Zero { at: None },
                Unit::Compressed(_) => ExtentKind::Compressed,
                Unit::At(at, shared) => ExtentKind::Data {
                    file: FileNo::IMAGE,
                    at: at + skip,
                    in_place: !shared,
                },
            };
            extents.push(Extent {
                offset: next,
                len: stop - next,
                kind,
            });
            next = stop;
        }
        extents
    }

    fn inflate(&self, offset: u64, len: u64) -> Option<Vec<u8>> {
        let range = offset / UNIT..(offset + len).div_ceil(UNIT);
        let units = range.map(|index| match &self.units[index as usize] {
            Unit::Compressed(bytes) => Some(bytes.as_slice()),
            _ => None,
        });
        let mut content = units.collect::<Option<Vec<_>>>()?.concat();
        content.truncate(len as usize);
        Some(content)
    }

    fn allocate(&mut self, offset: u64, len: u64) -> Result<Reply, CallError> {
        assert!(offset.is_multiple_of(UNIT) && len > 0 && offset + len <= self.size);
        let (first, last) = (offset / UNIT, (offset + len).div_ceil(UNIT));
        let shared = |unit: &Unit| matches!(unit, Unit::At(_, true));
        if self.pairs && self.units[first as usize..last as usize].iter().any(shared) {
            let (first, last) = (first / 2 * 2, last.next_multiple_of(2));
            let (offset, wide) = (first * UNIT, (last - first) * UNIT);
            if wide > len {
                return Ok(Reply::Wider { offset, len: wide });
            }
        }
        if self.allocated >= self.room {
            return Err(refused(FailureKind::FlushFirst, "flush first"));
        }
        self.allocated += 1;
        self.before = Some(Before {
            units: self.units.clone(),
            end: self.end,
            free: self.free.clone(),
            released: self.released.clone(),
        });
        let range = first as usize..last as usize;
        let moves = self.pairs && self.units[range].iter().any(shared);
        let places = (first..last).map(|index| self.place(index, offset + len, moves));
        Ok(Reply::Placed(places.collect()))
    }

    fn place(&mut self, index: u64, end: u64, moves: bool) -> Place {
        let (at, content) = match self.units[index as usize] {
            Unit::At(at, false) if !moves => (at, Content::Current),
            ref old => {
                if let Unit::At(at, _) = *old {
                    self.released.push(at);
                }
                match self.free.pop() {
                    Some(at) => (at, Content::Stale),
                    None => {
                        self.end += UNIT;
                        (self.end - UNIT, Content::Zero)
                    }
                }
            }
        };
        self.units[index as usize] = Unit::At(at, false);
        let offset = index * UNIT;
        Place {
            offset,
            len: UNIT.min(end - offset),
            file: FileNo::IMAGE,
            at,
            content,
        }
    }

    fn undo(&mut self) {
        if let Some(before) = self.before.take() {
            self.units = before.units;
            self.end = before.end;
            self.free = before.free;
            self.released = before.released;
        }
    }

    /// The mapping of this format is not kept in its file: the plan only counts.
    fn flush(&mut self) -> Plan {
        self.flushes += 1;
        self.allocated = 0;
        self.free.append(&mut self.released);
        let step = Step::Write {
            file: FileNo::IMAGE,
            offset: 0,
            data: vec![self.flushes],
        };
        let stage = |purpose| Stage {
            purpose,
            steps: vec![step.clone()],
        };
        Plan {
            stages: vec![stage(Purpose::Count), stage(Purpose::Link)],
        }
    }

    fn resize(&mut self, size: u64) -> Plan {
        self.units
            .resize(size.div_ceil(UNIT) as usize, Unit::Absent);
        self.size = size;
        let step = Step::Write {
            file: FileNo::IMAGE,
            offset: 8,
            data: size.to_be_bytes().to_vec(),
        };
        let stage = Stage {
            purpose: Purpose::Commit,
            steps: vec![step],
        };
        Plan {
            stages: vec![stage],
        }
    }
}

fn planned(plan: Plan) -> Reply {
    Reply::Plan(PlanReply {
        plan,
        ..PlanReply::default()
    })
}

impl Guest for Toy {
    fn call(&mut self, request: &Request, _files: &mut dyn Files) -> Result<Reply, CallError> {
        let mut state = self.0.lock().unwrap();
        Ok(match *request {
            Request::Open { .. } => Reply::Opened(facts(state.size, UNIT)),
            Request::Map { offset, len } => Reply::Extents(state.extents(offset, len)),
            Request::Inflate { offset, len } => Reply::Inflated(
                state
                    .inflate(offset, len)
                    .ok_or(refused(FailureKind::InvalidRequest, "not compressed"))?,
            ),
            Request::Allocate { offset, len } => state.allocate(offset, len)?,
            Request::Undo => {
                state.undo();
                Reply::Done
            }
            Request::Flush => planned(state.flush()),
            Request::Resize { size, .. } => planned(state.resize(size)),
            Request::Attach { .. }
            | Request::Create { .. }
            | Request::Settle
            | Request::Check { .. } => {
                return Err(refused(FailureKind::InvalidRequest, "not in this format"));
            }
        })
    }

    fn exits(&self) -> u64 {
        0
    }
}
