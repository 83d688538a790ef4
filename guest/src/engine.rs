//! The dispatcher: one open image, one request at a time.

use crate::error::{Failure, FailureKind};
use crate::plan::Plan;
use crate::probe::probe;
use crate::proto::{FileNo, Format, HEAD, MAX_INFLATE, PlanReply, Reply, Request, TAIL};
use crate::qcow2::{self, Qcow2};
use crate::raw::{self, Raw};
use crate::resize::Wish;
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
}

/// The image that a session is about.
#[derive(Debug)]
enum Image {
    Raw(Raw),
    Qcow2(Box<Qcow2>),
}

/// The engine: the state of one image between requests.
#[derive(Debug, Default)]
pub struct Engine {
    image: Option<Image>,
}

impl Engine {
    /// Answers one request.
    pub fn handle(&mut self, host: &mut dyn Host, request: Request) -> Result<Reply, Failure> {
        if let Some(Image::Qcow2(qcow2)) = &mut self.image {
            // The host executes a plan before it asks for anything else.
            qcow2.tables.executed();
        }
        match request {
            Request::Open {
                format,
                file_len,
                write,
            } => self.open(host, format, file_len, write),
            Request::Attach { data_len } => self.attach(data_len),
            Request::Map { offset, len } => self.map(host, offset, len),
            Request::Inflate { offset, len } => self.inflate(host, offset, len),
            Request::Resize {
                size,
                preallocation,
                shrink,
                backing_size,
            } => self.resize(
                host,
                &Wish {
                    size,
                    preallocation,
                    shrink,
                    backing_size,
                },
            ),
            Request::Allocate { offset, len } => self.allocate(host, offset, len),
            Request::Undo => self.undo(),
            Request::Flush => self.flush(host),
            Request::Create(create) => match create.format {
                Format::Raw => raw::create(&create),
                Format::Qcow2 => qcow2::create(host, &create),
            }
            .map(Reply::Plan),
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

    fn open(
        &mut self,
        host: &mut dyn Host,
        format: Option<Format>,
        file_len: u64,
        write: bool,
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
        let (image, facts) = match format {
            Format::Raw => {
                let raw = Raw { file_len };
                (Image::Raw(raw), raw.facts(probed))
            }
            Format::Qcow2 => {
                let qcow2 = Qcow2::open(host, &ends.head, file_len)?;
                let facts = qcow2.facts(host, probed, write)?;
                (Image::Qcow2(Box::new(qcow2)), facts)
            }
        };
        self.image = Some(image);
        Ok(Reply::Opened(facts))
    }

    fn attach(&mut self, data_len: u64) -> Result<Reply, Failure> {
        match self.image()? {
            Image::Qcow2(qcow2) => qcow2.attach(data_len).map(|()| Reply::Done),
            Image::Raw(_) => Err(Failure::new(
                FailureKind::InvalidRequest,
                "a raw image has no external data file",
            )),
        }
    }

    fn map(&mut self, host: &mut dyn Host, offset: u64, len: u64) -> Result<Reply, Failure> {
        let image = self.image()?;
        check_range(image.virtual_size(), offset, len)?;
        match image {
            Image::Raw(raw) => Ok(raw.map(offset, len)),
            Image::Qcow2(qcow2) => qcow2.map(host, offset, len),
        }
        .map(Reply::Extents)
    }

    fn resize(&mut self, host: &mut dyn Host, wish: &Wish) -> Result<Reply, Failure> {
        match self.image()? {
            Image::Raw(raw) => raw.resize(wish),
            Image::Qcow2(qcow2) => qcow2.resize(host, wish),
        }
        .map(Reply::Plan)
    }

    fn allocate(&mut self, host: &mut dyn Host, offset: u64, len: u64) -> Result<Reply, Failure> {
        let image = self.image()?;
        check_range(image.virtual_size(), offset, len)?;
        match image {
            Image::Raw(raw) => Ok(Reply::Placed(raw.allocate(offset, len))),
            Image::Qcow2(qcow2) => qcow2.allocate(host, offset, len),
        }
    }

    fn undo(&mut self) -> Result<Reply, Failure> {
        match self.image()? {
            Image::Raw(_) => Ok(Reply::Done),
            Image::Qcow2(qcow2) => qcow2.undo().map(|()| Reply::Done),
        }
    }

    fn flush(&mut self, host: &mut dyn Host) -> Result<Reply, Failure> {
        let plan = match self.image()? {
            Image::Raw(_) => Ok(PlanReply::default()),
            Image::Qcow2(qcow2) => qcow2.flush(host),
        };
        // A plan that failed half way leaves a state that agrees with no file:
        // nothing of it may ever be written.
        plan.map(Reply::Plan).inspect_err(|_| self.image = None)
    }

    fn inflate(&mut self, host: &mut dyn Host, offset: u64, len: u64) -> Result<Reply, Failure> {
        let image = self.image()?;
        check_range(image.virtual_size(), offset, len)?;
        if len > MAX_INFLATE {
            return Err(Failure::new(
                FailureKind::InvalidRequest,
                format!("{len} bytes are too many to inflate at once, at most {MAX_INFLATE}"),
            ));
        }
        match image {
            Image::Qcow2(qcow2) => qcow2.inflate(host, offset, len).map(Reply::Inflated),
            Image::Raw(_) => Err(Failure::new(
                FailureKind::InvalidRequest,
                "a raw image has no compressed clusters",
            )),
        }
    }
}

impl Image {
    fn virtual_size(&self) -> u64 {
        match self {
            Self::Raw(raw) => raw.file_len,
            Self::Qcow2(qcow2) => qcow2.header.size,
        }
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
