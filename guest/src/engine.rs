//! The dispatcher: one open image, one request at a time.

use crate::chance::Chance;
use crate::disk::{Creating, Disk, Opening};
use crate::error::{Failure, FailureKind};
use crate::facts::Facts;
use crate::findings::Finding;
use crate::plan::Plan;
use crate::probe::probe;
use crate::proto::{FileNo, Format, Fresh, HEAD, MAX_INFLATE, PlanReply, Reply, Request, TAIL};
use crate::resize::Wish;
use crate::{qcow2, raw, vhd, vhdx, vmdk};
use alloc::boxed::Box;
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;

/// One range to read. The buffer's length is the range's; bytes past the end of
/// the file read as zero.
pub struct Read<'a> {
    /// The file.
    pub file: FileNo,
    /// Host offset of the first byte.
    pub offset: u64,
    /// Where the bytes go.
    pub buf: &'a mut [u8],
}

/// What the engine may ask of the world.
pub trait Host {
    /// Reads all the ranges. One call is one exit from the sandbox, so callers
    /// batch.
    fn read(&mut self, reads: &mut [Read<'_>]) -> Result<(), Failure>;

    /// Executes the first stages of a plan that is too large for memory. They
    /// may write only past the old end of the file.
    fn stream(&mut self, part: Plan) -> Result<(), Failure>;

    /// Tells what a check has found.
    fn tell(&mut self, findings: Vec<Finding>) -> Result<(), Failure>;
}

/// The engine: the state of one image between requests.
#[derive(Debug, Default)]
pub struct Engine {
    image: Option<Image>,
}

/// The image that a session is about.
#[derive(Debug)]
struct Image {
    disk: Box<dyn Disk>,
    facts: Facts,
}

impl Engine {
    /// Answers one request.
    pub fn handle(&mut self, host: &mut dyn Host, request: Request) -> Result<Reply, Failure> {
        if let Some(image) = &mut self.image {
            // The host executes a plan before it asks for anything else.
            image.disk.executed();
        }
        match request {
            Request::Open {
                format,
                file_len,
                write,
                fresh,
            } => self.open(host, format, file_len, write, &fresh),
            Request::Attach { lens } => self.attach(host, &lens),
            Request::Map { offset, len } => {
                let disk = self.disk_with(offset, len)?;
                disk.map(host, offset, len).map(Reply::Extents)
            }
            Request::Inflate { offset, len } => self.inflate(host, offset, len),
            Request::Settle => self.disk()?.settle(host).map(Reply::Plan),
            Request::Check { repair } => {
                let (report, repair) = self.disk()?.check(host, repair)?;
                Ok(Reply::Checked { report, repair })
            }
            Request::Resize {
                size,
                preallocation,
                shrink,
                backing_size,
            } => {
                let wish = Wish {
                    size,
                    preallocation,
                    shrink,
                    backing_size,
                };
                self.disk()?.resize(host, &wish).map(Reply::Plan)
            }
            Request::Allocate { offset, len } => {
                let disk = self.disk_with(offset, len)?;
                disk.allocate(host, offset, len)
            }
            Request::Undo => self.disk()?.undo().map(|()| Reply::Done),
            Request::Flush => self.flush(host),
            Request::Create {
                create,
                name,
                fresh,
            } => {
                let creating = Creating {
                    create: &create,
                    name: &name,
                    chance: Chance::new(&fresh),
                };
                self::create(host, creating).map(Reply::Plan)
            }
        }
    }

    fn image(&mut self) -> Result<&mut Image, Failure> {
        self.image.as_mut().ok_or_else(|| {
            Failure::new(
                FailureKind::InvalidRequest,
                "no image is open in this session",
            )
        })
    }

    fn disk(&mut self) -> Result<&mut (dyn Disk + 'static), Failure> {
        self.image().map(|image| image.disk.as_mut())
    }

    /// The disk, where it has this range.
    fn disk_with(&mut self, offset: u64, len: u64) -> Result<&mut (dyn Disk + 'static), Failure> {
        let disk = self.disk()?;
        check_range(disk.virtual_size(), offset, len)?;
        Ok(disk)
    }

    fn open(
        &mut self,
        host: &mut dyn Host,
        format: Option<Format>,
        file_len: u64,
        write: bool,
        fresh: &Fresh,
    ) -> Result<Reply, Failure> {
        self.image = None;
        let ends = match format {
            Some(Format::Raw) => Ends::default(),
            _ => Ends::read(host, file_len)?,
        };
        let probed = format.is_none();
        let format = match format {
            Some(format) => format,
            None => probe(&ends.head, &ends.tail)?,
        };
        let opening = Opening {
            head: &ends.head,
            tail: &ends.tail,
            file_len,
            probed,
            write,
            chance: Chance::new(fresh),
        };
        let (disk, facts) = match format {
            Format::Raw => raw::open(&opening),
            Format::Qcow2 => qcow2::open(host, &opening)?,
            Format::Vmdk => vmdk::open(host, opening)?,
            Format::Vhd => vhd::open(host, opening)?,
            Format::Vhdx => vhdx::open(host, opening)?,
        };
        self.image = Some(Image {
            disk,
            facts: facts.clone(),
        });
        Ok(Reply::Opened(facts))
    }

    fn attach(&mut self, host: &mut dyn Host, lens: &[u64]) -> Result<Reply, Failure> {
        let Image { disk, facts } = self.image()?;
        disk.attach(host, lens, facts)?;
        Ok(Reply::Opened(facts.clone()))
    }

    fn flush(&mut self, host: &mut dyn Host) -> Result<Reply, Failure> {
        let plan = self.disk()?.flush(host);
        // A plan that failed half way leaves a state that agrees with no file:
        // nothing of it may ever be written.
        plan.map(Reply::Plan).inspect_err(|_| self.image = None)
    }

    fn inflate(&mut self, host: &mut dyn Host, offset: u64, len: u64) -> Result<Reply, Failure> {
        let disk = self.disk_with(offset, len)?;
        if len > MAX_INFLATE {
            return Err(Failure::new(
                FailureKind::InvalidRequest,
                format!("{len} bytes are too many to inflate at once, at most {MAX_INFLATE}"),
            ));
        }
        disk.inflate(host, offset, len).map(Reply::Inflated)
    }
}

fn create(host: &mut dyn Host, creating: Creating<'_>) -> Result<PlanReply, Failure> {
    match creating.create.format {
        Format::Raw => raw::create(creating.create),
        Format::Qcow2 => qcow2::create(host, creating.create),
        Format::Vmdk => vmdk::create(host, creating),
        Format::Vhd => vhd::create(host, creating),
        Format::Vhdx => vhdx::create(host, creating),
    }
}

/// A guest range has to lie inside the disk.
fn check_range(virtual_size: u64, offset: u64, len: u64) -> Result<(), Failure> {
    match offset.checked_add(len) {
        Some(end) if end <= virtual_size => Ok(()),
        _ => Err(Failure::new(
            FailureKind::InvalidRequest,
            format!("{len} bytes at {offset:#x} are not inside a disk of {virtual_size} bytes"),
        )),
    }
}

/// A file's first and last bytes, read at once.
#[derive(Default)]
struct Ends {
    head: Vec<u8>,
    tail: Vec<u8>,
}

impl Ends {
    fn read(host: &mut dyn Host, file_len: u64) -> Result<Self, Failure> {
        let head_len = file_len.min(HEAD as u64);
        let tail_len = file_len.min(TAIL as u64);
        let mut ends = Self {
            head: vec![0; head_len as usize],
            tail: vec![0; tail_len as usize],
        };
        if file_len > 0 {
            host.read(&mut [
                Read {
                    file: FileNo::IMAGE,
                    offset: 0,
                    buf: &mut ends.head,
                },
                Read {
                    file: FileNo::IMAGE,
                    offset: file_len - tail_len,
                    buf: &mut ends.tail,
                },
            ])?;
        }
        Ok(ends)
    }
}
