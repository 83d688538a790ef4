//! The real engine, in this process, over files as bytes: what it reads in
//! them, and what a request would do to them, as epochs. The engine's plan is
//! split by the explorer, so the executor is not involved here.

use super::bytes::Bytes;
use super::disk::{Epoch, Event, Files, Numbers, epochs_of};
use instar_guest::findings::{Finding, Repair, Report};
use instar_guest::plan::{Plan, Stage};
use instar_guest::proto::{
    Content, Extent, ExtentKind, FileNo, Fresh, MAX_INFLATE, Place, PlanReply, Preallocation,
};
use instar_guest::{Engine, Facts, Failure, FailureKind, Format, Host, Read, Reply, Request};

/// Chance and time as the explorer has them.
const FRESH: Fresh = Fresh {
    seed: *b"the same in all runs, by intent.",
    time: 1_700_000_000,
};

/// What is asked of an image.
#[derive(Clone, Debug)]
pub enum Change {
    /// Another virtual size.
    Resize {
        /// The new size in bytes.
        size: u64,
        /// How an added range is allocated.
        preallocation: Preallocation,
        /// Size of the backing image's disk, where there is one.
        backing_size: Option<u64>,
    },
    /// Guest writes of one byte value each, followed by one flush.
    Write(Vec<Patch>),
    /// The image is put in order.
    Settle,
    /// A check repairs the image.
    Repair(Repair),
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
#[derive(Clone, Debug)]
pub struct Planned {
    /// The stages, those that the engine streamed first.
    pub plan: Plan,
    /// The data of guest writes, each with the stage before whose barrier it
    /// reaches the files: flushes may come between the writes.
    pub data: Vec<(usize, Epoch)>,
    /// The files of the plan's numbers.
    pub numbers: Numbers,
    /// One epoch per stage. The data of guest writes is in those it belongs to.
    pub epochs: Vec<Epoch>,
}

impl Planned {
    /// The epochs of another plan in the place of this one's.
    pub fn epochs_of(&self, plan: &Plan, files: &Files) -> Result<Vec<Epoch>, String> {
        let mut written = files.clone();
        self.data
            .iter()
            .for_each(|(_, data)| written.apply_all(std::slice::from_ref(data)));
        let mut epochs = epochs_of(plan, &written, &self.numbers)?;
        for (stage, data) in self.data.iter().rev() {
            match epochs.get_mut(*stage) {
                Some(epoch) => drop(epoch.splice(0..0, data.iter().cloned())),
                None => epochs.push(data.clone()),
            }
        }
        Ok(epochs)
    }
}

/// Stages, and guest data with the stages it belongs to.
type Placed = (Vec<Stage>, Vec<(usize, Epoch)>);

/// The files of a case, as the engine's world.
struct World<'a> {
    files: &'a Files,
    numbers: Numbers,
    streamed: Plan,
    findings: Vec<Finding>,
}

impl Host for World<'_> {
    fn read(&mut self, reads: &mut [Read<'_>]) -> Result<(), Failure> {
        for read in reads {
            let file = self.numbers.file(read.file);
            let file = file.map_err(|text| Failure::new(FailureKind::Internal, text))?;
            self.files.bytes(file).read_into(read.offset, read.buf);
        }
        Ok(())
    }

    fn stream(&mut self, part: Plan) -> Result<(), Failure> {
        self.streamed.stages.extend(part.stages);
        Ok(())
    }

    fn tell(&mut self, findings: Vec<Finding>) -> Result<(), Failure> {
        self.findings.extend(findings);
        Ok(())
    }
}

/// One session of the engine on one state of the files.
pub struct Session<'a> {
    engine: Engine,
    world: World<'a>,
    /// What the image says about itself.
    pub facts: Facts,
    /// Whether a change was refused until the image is put in order.
    pub settles_first: bool,
}

impl<'a> Session<'a> {
    /// Opens the image of that name for writing, and the files that it names.
    pub fn open(files: &'a Files, image: &str, format: Format) -> Result<Self, String> {
        let file = files.find(image).ok_or("the image has no name any more")?;
        let mut engine = Engine::default();
        let mut world = World {
            files,
            numbers: Numbers {
                files: vec![file],
                image: image.to_owned(),
            },
            streamed: Plan::default(),
            findings: Vec::new(),
        };
        let open = Request::Open {
            format: Some(format),
            file_len: files.bytes(file).len(),
            write: true,
            fresh: FRESH,
        };
        let mut facts = opened(ask(&mut engine, &mut world, open)?)?;
        if !facts.files.is_empty() {
            let mut lens = Vec::new();
            for named in &facts.files {
                let file = files.find(&named.name);
                let file = file.ok_or_else(|| format!("there is no file {}", named.name))?;
                world.numbers.files.push(file);
                lens.push(files.bytes(file).len());
            }
            facts = opened(ask(&mut engine, &mut world, Request::Attach { lens })?)?;
        }
        Ok(Self {
            engine,
            world,
            facts,
            settles_first: false,
        })
    }

    /// The files that the engine knows by number.
    #[allow(dead_code, reason = "the executor's test program uses it")]
    pub fn numbers(&self) -> &Numbers {
        &self.world.numbers
    }

    /// The guest's disk; what the image does not hold comes from `backing`.
    pub fn disk(&mut self, backing: Option<&Bytes>) -> Result<Bytes, String> {
        let size = self.facts.virtual_size;
        let mut disk = Bytes::zeroes(size);
        let mut at = 0;
        while at < size {
            let len = size - at;
            let reply = self.ask(Request::Map { offset: at, len })?;
            let Reply::Extents(extents) = reply else {
                return Err(format!("map was answered by {reply:?}"));
            };
            for extent in &extents {
                if extent.offset != at || extent.len == 0 || extent.len > size - at {
                    return Err(format!("an extent out of line at {at:#x}: {extent:?}"));
                }
                self.fetch(extent, backing, &mut disk)?;
                at += extent.len;
            }
            if extents.is_empty() {
                return Err(format!("no extent at {at:#x}"));
            }
        }
        Ok(disk)
    }

    /// Whether the image has a place for every byte of the disk from an offset
    /// on.
    pub fn is_mapped_from(&mut self, offset: u64) -> Result<bool, String> {
        let size = self.facts.virtual_size;
        let numbers = &self.world.numbers;
        let data = numbers.file(FileNo::DATA).or(numbers.file(FileNo::IMAGE))?;
        let data_len = self.world.files.bytes(data).len();
        let mut at = offset;
        while at < size {
            let len = size - at;
            let Reply::Extents(extents) = self.ask(Request::Map { offset: at, len })? else {
                return Err("map was not answered by extents".to_owned());
            };
            let mapped = |extent: &Extent| match extent.kind {
                ExtentKind::Data { .. } => true,
                // Subclusters that are not written yet.
                ExtentKind::Unallocated { at: Some(at) } | ExtentKind::Zero { at: Some(at) } => {
                    at + extent.len <= data_len
                }
                _ => false,
            };
            if extents.is_empty() || !extents.iter().all(mapped) {
                return Ok(false);
            }
            at += extents.iter().map(|extent| extent.len).sum::<u64>();
        }
        Ok(true)
    }

    fn fetch(
        &mut self,
        extent: &Extent,
        backing: Option<&Bytes>,
        disk: &mut Bytes,
    ) -> Result<(), String> {
        match extent.kind {
            ExtentKind::Data { file, at, .. } => {
                let file = self.world.numbers.file(file)?;
                let bytes = self.world.files.bytes(file);
                disk.copy(bytes, at, extent.offset, extent.len);
            }
            ExtentKind::Compressed => {
                let end = extent.offset + extent.len;
                for offset in (extent.offset..end).step_by(MAX_INFLATE as usize) {
                    let len = MAX_INFLATE.min(end - offset);
                    let reply = self.ask(Request::Inflate { offset, len })?;
                    let Reply::Inflated(bytes) = reply else {
                        return Err(format!("inflate was answered by {reply:?}"));
                    };
                    disk.write(offset, &bytes);
                }
            }
            ExtentKind::Unallocated { .. } => {
                if let Some(backing) = backing {
                    disk.copy(backing, extent.offset, extent.offset, extent.len);
                }
            }
            ExtentKind::Zero { .. } => {}
        }
        Ok(())
    }

    /// What a check finds: the sums, and the findings that count. `None` where
    /// the format has no check.
    pub fn check(&mut self) -> Result<Option<(Report, Vec<Finding>)>, String> {
        let checked = self
            .engine
            .handle(&mut self.world, Request::Check { repair: None });
        match checked {
            Ok(Reply::Checked { report, .. }) => {
                Ok(Some((report, std::mem::take(&mut self.world.findings))))
            }
            Ok(reply) => Err(format!("check was answered by {reply:?}")),
            Err(failure) if failure.message.ends_with("does not support checks") => Ok(None),
            Err(failure) => Err(format!("check: {failure}")),
        }
    }

    /// What `change` does to the files, whose guest-visible content is `disk`.
    pub fn plan(&mut self, change: &Change, disk: &Bytes) -> Result<Planned, String> {
        let (mut stages, data) = match change {
            Change::Write(patches) => self.place_all(patches, disk)?,
            _ => (Vec::new(), Vec::new()),
        };
        let reply = match *change {
            Change::Write(_) => self.ask(Request::Flush)?,
            Change::Settle => self.ask(Request::Settle)?,
            Change::Repair(repair) => self.ask(Request::Check {
                repair: Some(repair),
            })?,
            Change::Resize {
                size,
                preallocation,
                backing_size,
            } => self.ask(Request::Resize {
                size,
                preallocation,
                shrink: size <= self.facts.virtual_size,
                backing_size,
            })?,
        };
        let (Reply::Plan(PlanReply { plan, .. })
        | Reply::Checked {
            repair: PlanReply { plan, .. },
            ..
        }) = reply
        else {
            return Err(format!("a plan was asked for; the answer is {reply:?}"));
        };
        stages.extend(std::mem::take(&mut self.world.streamed).stages);
        stages.extend(plan.stages);
        let mut planned = Planned {
            plan: Plan { stages },
            data,
            numbers: self.world.numbers.clone(),
            epochs: Vec::new(),
        };
        planned.epochs = planned.epochs_of(&planned.plan, self.world.files)?;
        Ok(planned)
    }

    /// The stages of the flushes that the engine wants before it goes on, and the
    /// writes with the stage that each belongs to.
    fn place_all(&mut self, patches: &[Patch], disk: &Bytes) -> Result<Placed, String> {
        let mut disk = disk.clone();
        let (mut stages, mut data) = (Vec::new(), Vec::new());
        for patch in patches {
            disk.write(patch.offset, &vec![patch.value; patch.len as usize]);
            let places = match self.places(patch)? {
                Some(places) => Some(places),
                None => {
                    match self.ask(Request::Flush)? {
                        Reply::Plan(reply) => stages.extend(reply.plan.stages),
                        other => return Err(format!("flush was answered by {other:?}")),
                    }
                    self.places(patch)?
                }
            };
            let places = places.ok_or("a flush made no room")?;
            data.push((stages.len(), self.place(&places, patch, &disk)?));
        }
        Ok((stages, data))
    }

    /// The places of one patch; `None` where a flush has to come first.
    fn places(&mut self, patch: &Patch) -> Result<Option<Vec<Place>>, String> {
        let unit = self.facts.write_unit;
        let mut offset = patch.offset / unit * unit;
        let end = (patch.offset + patch.len).next_multiple_of(unit);
        let mut len = end.min(self.facts.virtual_size) - offset;
        loop {
            let request = Request::Allocate { offset, len };
            match self.engine.handle(&mut self.world, request) {
                Ok(Reply::Placed(places)) => return Ok(Some(places)),
                Ok(Reply::Wider {
                    offset: start,
                    len: wider,
                }) if wider > len => (offset, len) = (start, wider),
                Err(failure) if failure.kind == FailureKind::FlushFirst => return Ok(None),
                other => return Err(format!("allocate was answered by {other:?}")),
            }
        }
    }

    /// The writes that bring one patch to its places. `disk` holds the content
    /// of the guest's disk with the patch in it.
    fn place(&self, places: &[Place], patch: &Patch, disk: &Bytes) -> Result<Epoch, String> {
        let mut events = Epoch::new();
        for place in places {
            let file = self.world.numbers.file(place.file)?;
            events.extend(write_to(file, place, patch, disk));
        }
        Ok(events)
    }

    fn ask(&mut self, request: Request) -> Result<Reply, String> {
        let what = format!("{request:?}");
        self.engine
            .handle(&mut self.world, request)
            .map_err(|failure| {
                self.settles_first = failure.kind == FailureKind::SettleFirst;
                format!("{what}: {failure}")
            })
    }
}

fn ask(engine: &mut Engine, world: &mut World<'_>, request: Request) -> Result<Reply, String> {
    engine
        .handle(world, request)
        .map_err(|failure| format!("open: {failure}"))
}

fn opened(reply: Reply) -> Result<Facts, String> {
    match reply {
        Reply::Opened(facts) => Ok(facts),
        other => Err(format!("open was answered by {other:?}")),
    }
}

/// The write that a place needs, whatever is there before it.
fn write_to(file: usize, place: &Place, patch: &Patch, disk: &Bytes) -> Option<Event> {
    let (from, to) = match place.content {
        Content::Current => (
            place.offset.max(patch.offset),
            (place.offset + place.len).min(patch.offset + patch.len),
        ),
        Content::Zero | Content::Stale => (place.offset, place.offset + place.len),
    };
    (from < to).then(|| Event::Write {
        file,
        offset: place.at + (from - place.offset),
        data: disk.read(from, to - from),
    })
}
