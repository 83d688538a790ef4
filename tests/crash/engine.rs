//! The real engine, in this process, over files as bytes: what a request would
//! do to them, as epochs. The engine's plan is split by the explorer, so the
//! executor is not involved here.

use crate::disk::{Epoch, Event, Files, epochs_of};
use instar_guest::findings::Finding;
use instar_guest::plan::{Plan, Stage};
use instar_guest::proto::{Content, Fresh, Place, PlanReply, Preallocation};
use instar_guest::{Engine, Failure, FileNo, Format, Host, Read, Reply, Request};

/// What is asked of an image.
#[derive(Clone, Debug)]
pub enum Change {
    /// A larger virtual size.
    Grow {
        /// The new size in bytes.
        size: u64,
        /// How the added range is allocated.
        preallocation: Preallocation,
        /// Size of the backing image's disk, where there is one.
        backing_size: Option<u64>,
    },
    /// Guest writes of one byte value each, followed by one flush.
    Write(Vec<Patch>),
}

/// A guest range that is filled with one byte value.
#[derive(Clone, Copy, Debug)]
pub struct Patch {
    /// Guest offset of the first byte.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// The byte.
    pub value: u8,
}

/// The stages of a change and the epochs that they are.
pub struct Planned {
    /// The stages, those that the engine streamed first.
    pub plan: Plan,
    /// The data of guest writes, which the host writes before the first stage.
    pub data: Epoch,
    /// One epoch per stage. The data of guest writes is in the first.
    pub epochs: Vec<Epoch>,
}

/// The files of a case, as the engine's world.
struct World<'a> {
    files: &'a Files,
    streamed: Plan,
}

impl Host for World<'_> {
    fn read(&mut self, reads: &mut [Read<'_>]) -> Result<(), Failure> {
        for read in reads {
            let bytes = self
                .files
                .read(read.file, read.offset, read.buf.len() as u64);
            read.buf.copy_from_slice(&bytes);
        }
        Ok(())
    }

    fn stream(&mut self, part: Plan) -> Result<(), Failure> {
        self.streamed.stages.extend(part.stages);
        Ok(())
    }

    fn tell(&mut self, _: Vec<Finding>) -> Result<(), Failure> {
        Ok(())
    }
}

/// One session of the engine on one state of the files.
pub struct Session<'a> {
    engine: Engine,
    world: World<'a>,
    write_unit: u64,
    virtual_size: u64,
}

impl<'a> Session<'a> {
    /// Opens file 0 for writing.
    pub fn open(files: &'a Files, format: Format) -> Result<Self, String> {
        let mut session = Self {
            engine: Engine::default(),
            world: World {
                files,
                streamed: Plan::default(),
            },
            write_unit: 0,
            virtual_size: 0,
        };
        let opened = session.ask(Request::Open {
            format: Some(format),
            file_len: files.0[0].len() as u64,
            write: true,
            fresh: Fresh::default(),
        })?;
        let Reply::Opened(facts) = opened else {
            return Err(format!("open was answered by {opened:?}"));
        };
        (session.write_unit, session.virtual_size) = (facts.write_unit, facts.virtual_size);
        if !facts.files.is_empty() {
            let lens = files.0.iter().skip(1).map(|file| file.len() as u64);
            session.ask(Request::Attach {
                lens: lens.collect(),
            })?;
        }
        Ok(session)
    }

    /// What `change` does to the files, whose guest-visible content is `disk`.
    pub fn plan(&mut self, change: &Change, disk: &[u8]) -> Result<Planned, String> {
        match change {
            Change::Grow {
                size,
                preallocation,
                backing_size,
            } => {
                let plan = self.plan_of(Request::Resize {
                    size: *size,
                    preallocation: *preallocation,
                    shrink: false,
                    backing_size: *backing_size,
                })?;
                let epochs = epochs_of(&plan, self.world.files)?;
                Ok(Planned {
                    plan,
                    data: Epoch::new(),
                    epochs,
                })
            }
            Change::Write(patches) => self.plan_writes(patches, disk),
        }
    }

    fn plan_writes(&mut self, patches: &[Patch], disk: &[u8]) -> Result<Planned, String> {
        let mut disk = disk.to_vec();
        let mut data = Epoch::new();
        for patch in patches {
            let range = patch.offset as usize..(patch.offset + patch.len) as usize;
            disk[range].fill(patch.value);
            data.extend(self.place(patch, &disk)?);
        }
        let plan = self.plan_of(Request::Flush)?;
        let mut written = self.world.files.clone();
        written.apply_all(std::slice::from_ref(&data));
        let mut epochs = epochs_of(&plan, &written)?;
        match epochs.first_mut() {
            Some(first) => drop(first.splice(0..0, data.iter().cloned())),
            None => epochs.push(data.clone()),
        }
        Ok(Planned { plan, data, epochs })
    }

    /// The writes that bring one patch to its places. `disk` holds the content
    /// of the guest's disk with the patch in it.
    fn place(&mut self, patch: &Patch, disk: &[u8]) -> Result<Vec<Event>, String> {
        let unit = self.write_unit;
        let mut offset = patch.offset / unit * unit;
        let end = ((patch.offset + patch.len).next_multiple_of(unit)).min(self.virtual_size);
        let mut len = end - offset;
        let places = loop {
            match self.ask(Request::Allocate { offset, len })? {
                Reply::Placed(places) => break places,
                Reply::Wider {
                    offset: start,
                    len: wider,
                } if wider > len => (offset, len) = (start, wider),
                other => return Err(format!("allocate was answered by {other:?}")),
            }
        };
        Ok(places
            .iter()
            .filter_map(|place| write_to(place, patch, disk))
            .collect())
    }

    fn plan_of(&mut self, request: Request) -> Result<Plan, String> {
        let reply = self.ask(request)?;
        let Reply::Plan(PlanReply { plan, .. }) = reply else {
            return Err(format!("a plan was asked for; the answer is {reply:?}"));
        };
        let mut stages: Vec<Stage> = std::mem::take(&mut self.world.streamed).stages;
        stages.extend(plan.stages);
        Ok(Plan { stages })
    }

    fn ask(&mut self, request: Request) -> Result<Reply, String> {
        let what = format!("{request:?}");
        self.engine
            .handle(&mut self.world, request)
            .map_err(|failure| format!("{what}: {failure}"))
    }
}

/// The write that a place needs, whatever is there before it.
fn write_to(place: &Place, patch: &Patch, disk: &[u8]) -> Option<Event> {
    let (from, to) = match place.content {
        Content::Current => (
            place.offset.max(patch.offset),
            (place.offset + place.len).min(patch.offset + patch.len),
        ),
        Content::Zero | Content::Stale => (place.offset, place.offset + place.len),
    };
    (from < to).then(|| Event::Write {
        file: place.file,
        offset: place.at + (from - place.offset),
        data: disk[from as usize..to as usize].to_vec(),
    })
}

/// Whether the engine's file numbers are those of [`Files`].
const _: () = assert!(FileNo::IMAGE.0 == 0 && FileNo::DATA.0 == 1);
