//! The engine in this process, without sandbox and program: the same damage,
//! far more of it, and the engine's reading of a disk next to qemu's.

use crate::damage::{Damage, Refused};
use crate::flips::hurt;
use crate::pool::{self, Kind};
use crate::tools::{qemu_img, read, scratch, write};
use instar_guest::findings::Finding;
use instar_guest::plan::Plan;
use instar_guest::proto::{FileNo, Fresh, MAX_INFLATE, Preallocation};
use instar_guest::{Engine, Extent, ExtentKind, Failure, Format, Host, Read, Reply, Request, Step};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Damaged images per kind that the engine alone sees.
const ROUNDS: u64 = 300;
/// Damaged images per kind that qemu-img reads too.
const COMPARED: u64 = 24;
/// The largest disk that is read whole, in bytes.
const MOST: u64 = 64 << 20;
/// Bytes asked for in one request.
const CHUNK: u64 = 1 << 20;

struct World<'a>(&'a [u8]);

impl Host for World<'_> {
    fn read(&mut self, reads: &mut [Read<'_>]) -> Result<(), Failure> {
        for Read { offset, buf, .. } in reads {
            buf.fill(0);
            let start = (*offset).min(self.0.len() as u64) as usize;
            let len = buf.len().min(self.0.len() - start);
            buf[..len].copy_from_slice(&self.0[start..start + len]);
        }
        Ok(())
    }

    fn stream(&mut self, _: Plan) -> Result<(), Failure> {
        Ok(())
    }

    fn tell(&mut self, _: Vec<Finding>) -> Result<(), Failure> {
        Ok(())
    }
}

/// A session on an image.
struct Session<'a> {
    engine: Engine,
    world: World<'a>,
    size: u64,
}

impl<'a> Session<'a> {
    fn open(image: &'a [u8]) -> Result<Self, Failure> {
        let mut session = Self {
            engine: Engine::default(),
            world: World(image),
            size: 0,
        };
        let request = Request::Open {
            format: Some(Format::Qcow2),
            file_len: image.len() as u64,
            write: true,
            fresh: Fresh::default(),
        };
        if let Reply::Opened(facts) = session.ask(request)? {
            session.size = facts.virtual_size;
        }
        Ok(session)
    }

    fn ask(&mut self, request: Request) -> Result<Reply, Failure> {
        self.engine.handle(&mut self.world, request)
    }

    fn grow(&mut self) -> Result<Plan, Failure> {
        let reply = self.ask(Request::Resize {
            size: self.size.max(pool::LARGE),
            preallocation: Preallocation::Off,
            shrink: false,
            backing_size: None,
        })?;
        match reply {
            Reply::Plan(reply) => Ok(reply.plan),
            _ => Ok(Plan::default()),
        }
    }

    fn write(&mut self) -> Result<Plan, Failure> {
        let len = (256 << 10).min(self.size);
        self.ask(Request::Allocate { offset: 0, len })?;
        match self.ask(Request::Flush)? {
            Reply::Plan(reply) => Ok(reply.plan),
            _ => Ok(Plan::default()),
        }
    }

    /// The extents of the whole disk, or of its first part.
    fn map(&mut self) -> Result<Vec<Extent>, Failure> {
        let (mut all, mut at) = (Vec::new(), 0);
        let size = self.size.min(MOST);
        while at < size {
            let len = CHUNK.min(size - at);
            if let Reply::Extents(extents) = self.ask(Request::Map { offset: at, len })? {
                at = extents.last().map_or(size, |last| last.offset + last.len);
                all.extend(extents);
            }
        }
        Ok(all)
    }

    fn disk(&mut self) -> Result<Vec<u8>, Failure> {
        let mut disk = Vec::new();
        for extent in self.map()? {
            match extent.kind {
                ExtentKind::Data { at, .. } => disk.extend(self.bytes(at, extent.len)?),
                ExtentKind::Compressed => disk.extend(self.inflate(&extent)?),
                ExtentKind::Zero { .. } | ExtentKind::Unallocated => {
                    disk.resize(disk.len() + extent.len as usize, 0);
                }
            }
        }
        Ok(disk)
    }

    fn bytes(&mut self, at: u64, len: u64) -> Result<Vec<u8>, Failure> {
        let mut bytes = vec![0; len as usize];
        self.world.read(&mut [Read {
            file: FileNo::IMAGE,
            offset: at,
            buf: &mut bytes,
        }])?;
        Ok(bytes)
    }

    fn inflate(&mut self, extent: &Extent) -> Result<Vec<u8>, Failure> {
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < extent.len {
            let done = bytes.len() as u64;
            let request = Request::Inflate {
                offset: extent.offset + done,
                len: MAX_INFLATE.min(extent.len - done),
            };
            match self.ask(request)? {
                Reply::Inflated(part) if !part.is_empty() => bytes.extend(part),
                _ => break,
            }
        }
        Ok(bytes)
    }
}

/// The engine refuses a damaged image, where it has to, with the right text.
pub fn damaged(damage: &Damage) -> Result<(), String> {
    let dir = scratch()?;
    let mut image = pool::named(damage.kind, dir.path())?;
    (damage.edit)(&mut image);
    let opened = Session::open(&image);
    let failure = match (damage.refused, opened) {
        (Refused::Everything, opened) => opened.err(),
        (_, Err(failure)) => return Err(format!("the facts are sound: {failure}")),
        (Refused::Mapping, Ok(mut session)) => session.map().err(),
        (Refused::Reading, Ok(mut session)) => session.disk().err(),
        (Refused::Resizing, Ok(mut session)) => session.grow().err(),
    };
    match failure {
        None => Err("is not refused".to_owned()),
        Some(failure) if failure.message.to_lowercase().contains(damage.says) => Ok(()),
        Some(failure) => Err(format!("{failure}; the text has to name {:?}", damage.says)),
    }
}

/// Whatever is hit, the engine answers, and no plan reaches past the largest
/// offset of a file.
pub fn answers_whatever_is_hit(kind: &Kind, seed: u64) -> Result<(), String> {
    let dir = scratch()?;
    let sound = pool::make(kind, dir.path())?;
    for round in 0..ROUNDS {
        let mut image = sound.clone();
        let hits = hurt(&mut image, &mut kind.random(seed, round));
        let used = catch_unwind(AssertUnwindSafe(|| use_all(&image)));
        let fault = match used {
            Ok(Ok(())) => continue,
            Ok(Err(fault)) => fault,
            Err(_) => "panic".to_owned(),
        };
        return Err(format!("round {round} (seed {seed}): {hits}: {fault}"));
    }
    Ok(())
}

/// Uses an image in every way. A refusal is fine, if it says something.
fn use_all(image: &[u8]) -> Result<(), String> {
    let told = |what: &str, failure: Failure| match failure.message.len() {
        0 => Err(format!("{what}: a refusal without a text")),
        _ => Ok(()),
    };
    let mut session = match Session::open(image) {
        Ok(session) => session,
        Err(failure) => return told("open", failure),
    };
    if let Err(failure) = session.disk() {
        told("read", failure)?;
    }
    for (what, plan) in [("resize", session.grow()), ("write", session.write())] {
        match plan {
            Ok(plan) => in_bounds(&plan).map_err(|at| {
                format!(
                    "{what}: a step up to byte {at:#x} in a file of {:#x}",
                    image.len()
                )
            })?,
            Err(failure) => told(what, failure)?,
        }
    }
    Ok(())
}

/// Every step ends below the largest offset that a file can have. How far past
/// the end of the file a plan may reach, the host decides.
fn in_bounds(plan: &Plan) -> Result<(), u64> {
    let steps = plan.stages.iter().flat_map(|stage| &stage.steps);
    for step in steps {
        let end = match *step {
            Step::Write {
                offset, ref data, ..
            } => offset.checked_add(data.len() as u64),
            Step::Zero { offset, len, .. }
            | Step::Fill { offset, len, .. }
            | Step::Reserve { offset, len, .. }
            | Step::Punch { offset, len, .. } => offset.checked_add(len),
            Step::Copy { from, to, len, .. } | Step::CopyFrom { from, to, len, .. } => {
                from.max(to).checked_add(len)
            }
            Step::SetLength { len, .. } => Some(len),
            Step::Create { .. }
            | Step::Rename { .. }
            | Step::Unlink { .. }
            | Step::Remove { .. } => Some(0),
        };
        if end.is_none_or(|end| i64::try_from(end).is_err()) {
            return Err(end.unwrap_or(u64::MAX));
        }
    }
    Ok(())
}

/// Where the engine and qemu-img both read a damaged image, they read the same
/// disk. Answers where only qemu-img can read it, for review.
pub fn reads_like_qemu(kind: &Kind, seed: u64) -> Result<Vec<String>, String> {
    let dir = scratch()?;
    let sound = pool::make(kind, dir.path())?;
    let mut notes = Vec::new();
    for round in 0..COMPARED {
        let mut image = sound.clone();
        let hits = hurt(&mut image, &mut kind.random(seed, ROUNDS + round));
        write(&dir.path().join("hurt.qcow2"), &image)?;
        let info = qemu_img(dir.path(), &["info", "-f", "qcow2", "hurt.qcow2"])?;
        let ours = Session::open(&image).and_then(|mut session| match session.size {
            0..=MOST => session.disk().map(Some),
            _ => Ok(None),
        });
        let Ok(Some(ours)) = ours else {
            let refusal = ours.err().filter(|_| info.code == 0);
            notes.extend(refusal.map(|text| format!("{}: {hits}: {text}", kind.name)));
            continue;
        };
        let convert = [
            "convert",
            "-f",
            "qcow2",
            "-O",
            "raw",
            "hurt.qcow2",
            "hurt.raw",
        ];
        let converted = qemu_img(dir.path(), &convert)?;
        if converted.code != 0 {
            notes.push(format!(
                "{}: {hits}: only qemu-img: {}",
                kind.name,
                converted.brief()
            ));
            continue;
        }
        if read(&dir.path().join("hurt.raw"))? != ours {
            return Err(format!("round {round} (seed {seed}): {hits}: another disk"));
        }
    }
    Ok(notes)
}
