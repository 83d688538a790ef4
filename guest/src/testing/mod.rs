//! Test support: a host over byte vectors, a session on it, small images.
//!
//! Compiled for this crate's own tests, and for other crates' tests with the
//! feature `testing`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod blank;
mod refusals;

pub use blank::Blank;
pub use refusals::{Place, note, noted};

use crate::engine::{Engine, Host, Read};
use crate::error::{Failure, FailureKind};
use crate::facts::Facts;
use crate::findings::Finding;
use crate::plan::{NewName, Plan, Step};
use crate::proto::{Extent, ExtentKind, FileNo, Format, Fresh, MAX_INFLATE, Reply, Request};
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;

/// Chance and time as tests have them.
pub const FRESH: Fresh = Fresh {
    seed: *b"the same in all tests, by intent",
    time: 1_700_000_000,
};

/// Files in memory: the image, and the others that hold parts of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemHost {
    /// The image.
    pub image: Vec<u8>,
    /// The other files: number 1 and up. `None` is a file that was unlinked, or
    /// that took another's name.
    pub others: Vec<Option<Vec<u8>>>,
    /// The names that plans gave to files they created, by number.
    pub names: Vec<(FileNo, NewName)>,
    /// The created file that took another's place last, and that other.
    pub placed: Option<(FileNo, FileNo)>,
    /// How often the engine asked for bytes.
    pub reads: u64,
    /// How many bytes it asked for.
    pub bytes_read: u64,
    /// The parts of plans that were streamed.
    pub streamed: Vec<Plan>,
    /// What checks told.
    pub findings: Vec<Finding>,
}

impl MemHost {
    /// A host with an image.
    pub fn new(image: Vec<u8>) -> Self {
        Self {
            image,
            ..Self::default()
        }
    }

    /// The first of the other files: qcow2's external data file.
    pub fn data(&self) -> Option<&Vec<u8>> {
        self.others.first()?.as_ref()
    }

    /// A file's content.
    pub fn file(&mut self, file: FileNo) -> Result<&mut Vec<u8>, Failure> {
        let file = match self.placed {
            Some((placed, over)) if placed == file => over,
            _ => file,
        };
        let found = match file {
            FileNo::IMAGE => Some(&mut self.image),
            FileNo(n) => self.others.get_mut(n as usize - 1).and_then(Option::as_mut),
        };
        found.ok_or_else(|| Failure::new(FailureKind::Io, format!("no such file: {}", file.0)))
    }

    /// Removes a file and answers its content.
    fn take(&mut self, file: FileNo) -> Vec<u8> {
        let other = self.others.get_mut(file.0 as usize - 1);
        other.and_then(Option::take).expect("the plan names a file")
    }

    /// Executes a plan on the files.
    pub fn apply(&mut self, plan: &Plan) {
        for stage in &plan.stages {
            for step in &stage.steps {
                self.step(step);
            }
        }
        // From now on the files have other numbers.
        self.placed = None;
    }

    /// Executes one step.
    pub fn step(&mut self, step: &Step) {
        match step {
            Step::Create { file, name } => {
                assert_eq!(file.0 as usize, self.others.len() + 1, "the next number");
                self.placed = None;
                self.others.push(Some(Vec::new()));
                self.names.push((*file, name.clone()));
                return;
            }
            Step::Rename { file, over } => {
                let content = self.take(*file);
                self.placed = None;
                *self.file(*over).expect("the plan names a file") = content;
                self.placed = Some((*file, *over));
                return;
            }
            Step::Unlink { file } => {
                self.take(*file);
                return;
            }
            // Files that nothing has a number for are not kept.
            Step::Remove { .. } => return,
            _ => {}
        }
        if let &Step::CopyFrom {
            file,
            source,
            from,
            to,
            len,
        } = step
        {
            let source = self.file(source).expect("the plan names a file");
            let data = source[from as usize..(from + len) as usize].to_vec();
            let offset = to;
            return self.step(&Step::Write { file, offset, data });
        }
        let file = self.file(step.file()).expect("the plan names a file");
        match step {
            Step::Write { offset, data, .. } => {
                let end = *offset as usize + data.len();
                file.resize(file.len().max(end), 0);
                file[*offset as usize..end].copy_from_slice(data);
            }
            Step::Zero { offset, len, .. } | Step::Fill { offset, len, .. } => {
                let end = (offset + len) as usize;
                file.resize(file.len().max(end), 0);
                file[*offset as usize..end].fill(0);
            }
            Step::Copy { from, to, len, .. } => {
                let (from, to, len) = (*from as usize, *to as usize, *len as usize);
                file.resize(file.len().max(from + len).max(to + len), 0);
                file.copy_within(from..from + len, to);
            }
            Step::Reserve { .. } => {}
            Step::SetLength { len, .. } => file.resize(*len as usize, 0),
            Step::Punch { offset, len, .. } => {
                let end = ((offset + len) as usize).min(file.len());
                if let Some(range) = file.get_mut(*offset as usize..end) {
                    range.fill(0);
                }
            }
            Step::CopyFrom { .. }
            | Step::Create { .. }
            | Step::Rename { .. }
            | Step::Unlink { .. }
            | Step::Remove { .. } => {}
        }
    }
}

impl Host for MemHost {
    fn read(&mut self, reads: &mut [Read<'_>]) -> Result<(), Failure> {
        self.reads += 1;
        for read in reads {
            self.bytes_read += read.buf.len() as u64;
            read.buf.fill(0);
            let file = self.file(read.file)?;
            let from = file.len().min(read.offset as usize);
            let len = read.buf.len().min(file.len() - from);
            read.buf[..len].copy_from_slice(&file[from..from + len]);
        }
        Ok(())
    }

    fn stream(&mut self, part: Plan) -> Result<(), Failure> {
        self.apply(&part);
        self.streamed.push(part);
        Ok(())
    }

    fn tell(&mut self, findings: Vec<Finding>) -> Result<(), Failure> {
        self.findings.extend(findings);
        Ok(())
    }
}

/// A session on files in memory.
#[derive(Debug, Default)]
pub struct Session {
    /// The files.
    pub host: MemHost,
    /// The engine.
    pub engine: Engine,
}

impl Session {
    /// A session on an image; nothing is open yet.
    pub fn new(image: Vec<u8>) -> Self {
        Self {
            host: MemHost::new(image),
            engine: Engine::default(),
        }
    }

    /// One request.
    pub fn call(&mut self, request: Request) -> Result<Reply, Failure> {
        self.engine.handle(&mut self.host, request)
    }

    /// Opens the image for writing, with its other files if they are there.
    pub fn open(&mut self, format: Option<Format>) -> Result<Facts, Failure> {
        let file_len = self.host.image.len() as u64;
        let reply = self.call(Request::Open {
            format,
            file_len,
            write: true,
            fresh: FRESH,
        })?;
        let Reply::Opened(facts) = reply else {
            panic!("not an answer to Open: {reply:?}");
        };
        let others = self.host.others.iter();
        let lens: Vec<u64> = others.flatten().map(|file| file.len() as u64).collect();
        if facts.files.is_empty() || lens.len() != facts.files.len() {
            return Ok(facts);
        }
        match self.call(Request::Attach { lens })? {
            Reply::Opened(facts) => Ok(facts),
            reply => panic!("not an answer to Attach: {reply:?}"),
        }
    }

    /// The extents of a range, asked for until it is covered.
    pub fn map(&mut self, offset: u64, len: u64) -> Result<Vec<Extent>, Failure> {
        let mut all: Vec<Extent> = Vec::new();
        let mut at = offset;
        while at < offset + len {
            let rest = offset + len - at;
            let reply = self.call(Request::Map {
                offset: at,
                len: rest,
            })?;
            let Reply::Extents(extents) = reply else {
                panic!("not an answer to Map: {reply:?}");
            };
            assert!(!extents.is_empty(), "no progress at {at:#x}");
            for extent in extents {
                assert_eq!(extent.offset, at, "a gap in the extents");
                assert!(extent.len > 0 && extent.len <= offset + len - at);
                at += extent.len;
                all.push(extent);
            }
        }
        Ok(all)
    }

    /// The content of a range, from this image alone: what it does not hold
    /// reads as zeroes.
    pub fn read(&mut self, offset: u64, len: u64) -> Result<Vec<u8>, Failure> {
        let mut content = Vec::new();
        for extent in self.map(offset, len)? {
            let bytes = match extent.kind {
                ExtentKind::Data { file, at, .. } => {
                    let mut bytes = vec![0; extent.len as usize];
                    self.host.read(&mut [Read {
                        file,
                        offset: at,
                        buf: &mut bytes,
                    }])?;
                    bytes
                }
                ExtentKind::Compressed => self.inflate(extent.offset, extent.len)?,
                ExtentKind::Zero { .. } | ExtentKind::Unallocated { .. } => {
                    vec![0; extent.len as usize]
                }
            };
            content.extend(bytes);
        }
        Ok(content)
    }

    /// The content of compressed clusters.
    fn inflate(&mut self, offset: u64, len: u64) -> Result<Vec<u8>, Failure> {
        let mut content = Vec::new();
        for at in (offset..offset + len).step_by(MAX_INFLATE as usize) {
            let reply = self.call(Request::Inflate {
                offset: at,
                len: MAX_INFLATE.min(offset + len - at),
            })?;
            let Reply::Inflated(bytes) = reply else {
                panic!("not an answer to Inflate: {reply:?}");
            };
            content.extend(bytes);
        }
        Ok(content)
    }
}
