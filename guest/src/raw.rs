//! raw: the disk's bytes and nothing else.

use crate::disk::{Disk, Opened, Opening};
use crate::engine::Host;
use crate::error::{Failure, FailureKind};
use crate::facts::Facts;
use crate::options;
use crate::plan::{Plan, Purpose, Stage, Step};
use crate::proto::{
    Content, Create, Extent, ExtentKind, FileNo, Format, Place, PlanReply, Preallocation, Reply,
};
use crate::resize::{self, Direction, Wish};
use alloc::boxed::Box;
use alloc::format;
use alloc::string::ToString;
use alloc::vec;
use alloc::vec::Vec;

/// An open raw image.
#[derive(Clone, Copy, Debug)]
pub struct Raw {
    /// Length of the file, which is the disk's size.
    pub file_len: u64,
}

/// Opens a file as a raw image.
pub fn open(opening: &Opening<'_>) -> Opened {
    let raw = Raw {
        file_len: opening.file_len,
    };
    (Box::new(raw), raw.facts(opening.probed))
}

impl Raw {
    /// The facts. The size is exact, not rounded up to a sector.
    fn facts(self, probed: bool) -> Facts {
        Facts {
            format: Format::Raw,
            probed,
            virtual_size: self.file_len,
            cluster_size: None,
            write_unit: 1,
            size_unit: 1,
            backing: None,
            identity: None,
            files: Vec::new(),
            files_first: false,
            encrypted: false,
            dirty: false,
            corrupt: false,
            unsettled: None,
            no_write: None,
            no_resize: None,
            snapshots: Vec::new(),
            specific: Vec::new(),
        }
    }

    /// What lies behind a guest range inside the disk.
    fn extents(self, offset: u64, len: u64) -> Vec<Extent> {
        let extent = Extent {
            offset,
            len,
            kind: ExtentKind::Data {
                file: FileNo::IMAGE,
                at: offset,
                in_place: true,
            },
        };
        Vec::from_iter((len > 0).then_some(extent))
    }

    /// The plan that changes the size: one set-length, which is atomic.
    fn plan(self, wish: &Wish) -> Result<PlanReply, Failure> {
        match wish.direction(self.file_len)? {
            Direction::Same => Ok(PlanReply::default()),
            Direction::Shrink => Err(resize::cannot_shrink("raw")),
            Direction::Grow => {
                let plan = lengthen(self.file_len, wish.size, wish.preallocation)?;
                Ok(PlanReply {
                    plan,
                    ..PlanReply::default()
                })
            }
        }
    }

    /// Every byte has its place already.
    fn places(self, offset: u64, len: u64) -> Vec<Place> {
        let place = Place {
            offset,
            len,
            file: FileNo::IMAGE,
            at: offset,
            content: Content::Current,
        };
        Vec::from_iter((len > 0).then_some(place))
    }
}

impl Disk for Raw {
    fn format(&self) -> Format {
        Format::Raw
    }

    fn virtual_size(&self) -> u64 {
        self.file_len
    }

    fn map(&mut self, _: &mut dyn Host, offset: u64, len: u64) -> Result<Vec<Extent>, Failure> {
        Ok(self.extents(offset, len))
    }

    fn resize(&mut self, _: &mut dyn Host, wish: &Wish) -> Result<PlanReply, Failure> {
        self.plan(wish)
    }

    fn allocate(&mut self, _: &mut dyn Host, offset: u64, len: u64) -> Result<Reply, Failure> {
        Ok(Reply::Placed(self.places(offset, len)))
    }
}

/// The plan that writes a new image into an empty file.
pub fn create(create: &Create) -> Result<PlanReply, Failure> {
    let mut preallocation = Preallocation::Off;
    let mut options = vec![("size".to_string(), create.size.to_string())];
    for (key, value) in &create.options {
        if key != "preallocation" {
            return Err(options::unknown(key));
        }
        preallocation = options::preallocation(value)
            .ok_or_else(|| options::invalid(format!("invalid parameter value: {value}")))?;
        options.retain(|(key, _)| key != "preallocation");
        options.push((key.clone(), value.clone()));
    }
    if create.backing.is_some() {
        return Err(options::invalid(
            "Backing file not supported for file format 'raw'",
        ));
    }
    Ok(PlanReply {
        plan: lengthen(0, create.size, preallocation)?,
        options,
        warnings: Vec::new(),
    })
}

/// Makes a file longer. Disk space for what is added is allocated first, so
/// that a full disk changes nothing.
fn lengthen(old: u64, new: u64, preallocation: Preallocation) -> Result<Plan, Failure> {
    if i64::try_from(new).is_err() {
        return Err(Failure::new(
            FailureKind::TooLarge,
            format!("a file cannot be {new} bytes long"),
        ));
    }
    let mut stages = Vec::new();
    match preallocation {
        Preallocation::Off => {}
        Preallocation::Falloc => stages.push(Stage {
            purpose: Purpose::Prepare,
            steps: vec![Step::Reserve {
                file: FileNo::IMAGE,
                offset: old,
                len: new - old,
            }],
        }),
        Preallocation::Metadata => {
            return Err(options::invalid("Unsupported preallocation mode: metadata"));
        }
        Preallocation::Full => {
            return Err(Failure::new(
                FailureKind::Unsupported,
                "preallocation mode 'full' is not supported; use falloc, which allocates the same \
                 disk space",
            ));
        }
    }
    stages.push(Stage {
        purpose: Purpose::Commit,
        steps: vec![Step::SetLength {
            file: FileNo::IMAGE,
            len: new,
        }],
    });
    Ok(Plan { stages })
}
