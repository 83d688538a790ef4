//! The real executor, recorded: what reaches the files through an open image,
//! sandbox and all, is explored like a plan. So a barrier that the executor
//! forgets is found, which no look at plans could.

use crate::explorer::case::Case;
use crate::explorer::disk::{Epoch, Event, Inode};
use crate::explorer::engine::{Change, Session};
use crate::explorer::judge::{Depth, Judge};
use crate::explorer::report::{Exploration, Until};
use crate::explorer::setup::Setup;
use instar::image::{Access, Effects, Image, OpenOptions, ResizeOptions};
use instar::sandbox::{Config, Pool};
use instar_guest::FileNo;
use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// What happened so far.
#[derive(Default)]
struct Tape {
    done: Vec<Epoch>,
    running: Epoch,
    /// Files with an event since their last sync.
    unsynced: BTreeSet<Inode>,
}

impl Tape {
    fn event(&mut self, file: Inode, event: Event) {
        self.unsynced.insert(file);
        self.running.push(event);
    }

    /// A barrier ends the epoch once it covers every file that was changed:
    /// until then nothing of it counts as durable.
    fn sync(&mut self, file: Inode) {
        self.unsynced.remove(&file);
        if self.unsynced.is_empty() && !self.running.is_empty() {
            self.done.push(std::mem::take(&mut self.running));
        }
    }

    fn epochs(&mut self) -> Vec<Epoch> {
        let mut epochs = std::mem::take(&mut self.done);
        let rest = std::mem::take(&mut self.running);
        epochs.extend((!rest.is_empty()).then_some(rest));
        epochs
    }
}

/// The real effects, noted on a tape.
struct Recorder {
    real: Box<dyn Effects>,
    tape: Arc<Mutex<Tape>>,
    /// The files by number, and where they are, to read what is copied.
    files: Vec<(Inode, PathBuf)>,
}

impl Recorder {
    fn note(&self, number: FileNo, event: impl FnOnce(Inode) -> Event) {
        let file = self.files[number.0 as usize].0;
        if let Ok(mut tape) = self.tape.lock() {
            tape.event(file, event(file));
        }
    }

    fn bytes(&self, file: FileNo, offset: u64, len: u64) -> io::Result<Vec<u8>> {
        let all = std::fs::read(&self.files[file.0 as usize].1)?;
        let range = offset as usize..(offset + len) as usize;
        all.get(range)
            .map(<[u8]>::to_vec)
            .ok_or_else(|| io::Error::other("a copy from past the end of the file"))
    }

    fn len(&self, file: FileNo) -> io::Result<u64> {
        Ok(std::fs::metadata(&self.files[file.0 as usize].1)?.len())
    }
}

impl Effects for Recorder {
    fn write(&self, file: FileNo, offset: u64, data: &[u8]) -> io::Result<()> {
        let data = data.to_vec();
        self.real.write(file, offset, &data)?;
        self.note(file, |file| Event::Write { file, offset, data });
        Ok(())
    }

    fn zero(&self, file: FileNo, offset: u64, len: u64) -> io::Result<()> {
        self.real.zero(file, offset, len)?;
        let data = vec![0; len as usize];
        self.note(file, |file| Event::Write { file, offset, data });
        Ok(())
    }

    fn copy(&self, file: FileNo, from: u64, to: u64, len: u64) -> io::Result<()> {
        let data = self.bytes(file, from, len)?;
        self.real.copy(file, from, to, len)?;
        let offset = to;
        self.note(file, |file| Event::Write { file, offset, data });
        Ok(())
    }

    fn reserve(&self, file: FileNo, offset: u64, len: u64) -> io::Result<()> {
        self.real.reserve(file, offset, len)
    }

    fn punch(&self, file: FileNo, offset: u64, len: u64) -> io::Result<()> {
        let inside = self.len(file)?.min(offset + len).saturating_sub(offset);
        self.real.punch(file, offset, len)?;
        let data = vec![0; inside as usize];
        self.note(file, |file| Event::Write { file, offset, data });
        Ok(())
    }

    fn set_len(&self, file: FileNo, len: u64) -> io::Result<()> {
        self.real.set_len(file, len)?;
        self.note(file, |file| Event::SetLength { file, len });
        Ok(())
    }

    fn sync(&self, file: FileNo) -> io::Result<()> {
        self.real.sync(file)?;
        if let Ok(mut tape) = self.tape.lock() {
            tape.sync(self.files[file.0 as usize].0);
        }
        Ok(())
    }
}

/// What the executor does is what the plan says, epoch for epoch, or at least
/// as safe: then every state that it can leave is judged.
pub fn is_as_good_as_the_plan(case: &'static Case, seed: u64) -> Result<(), String> {
    let setup = Setup::build(case)?;
    let mut session = Session::open(&setup.files, setup.image_name(), case.format)?;
    let planned = session.plan(&setup.change, &setup.old_disk)?.epochs;
    let done = epochs(case, &setup, &session.numbers().files)?;
    let judge = Judge::new(case, &setup)?;
    let mut finished = setup.files.clone();
    finished.apply_all(&done);
    let faults = judge.verdict_on_end(&finished)?;
    if !faults.is_empty() {
        return Err(format!("the executor's result: {}", faults.join("; ")));
    }
    if pieces(&planned) == pieces(&done) {
        return Ok(());
    }
    let row = Exploration {
        judge: &judge,
        start: &setup.files,
        epochs: &done,
        seed,
        depth: Depth::Present,
        until: Until::Complete,
    }
    .run();
    match row.bad {
        0 => Ok(()),
        _ => Err(format!("(seed {seed})\n{}", row.examples.join("\n"))),
    }
}

/// Epochs in a form in which the order and the splitting of events inside an
/// epoch make no difference.
fn pieces(epochs: &[Epoch]) -> Vec<BTreeSet<String>> {
    let pieces = |epoch: &Epoch| {
        let split = epoch.iter().flat_map(Event::split);
        split.map(|piece| format!("{piece:?}")).collect()
    };
    epochs.iter().map(pieces).collect()
}

/// Makes the case's change through an open image, and answers what reached its
/// files.
fn epochs(case: &Case, setup: &Setup, files: &[Inode]) -> Result<Vec<Epoch>, String> {
    let dir = crate::explorer::tools::scratch()?;
    setup.link_backing(dir.path())?;
    setup.store(&setup.files, dir.path())?;
    let tape = Arc::<Mutex<Tape>>::default();
    let path = |&file: &Inode| match setup
        .files
        .names()
        .find(|name| setup.files.find(name) == Some(file))
    {
        Some(name) => (file, dir.path().join(name)),
        None => (file, dir.path().to_owned()),
    };
    let files = files.iter().map(path).collect();
    let image = open(case, &dir.path().join(setup.image_name()), &tape, files)?;
    make(&image, &setup.change).map_err(|error| error.to_string())?;
    drop(image);
    let mut tape = tape.lock().map_err(|_| "poisoned")?;
    Ok(tape.epochs())
}

fn open(
    case: &Case,
    path: &Path,
    tape: &Arc<Mutex<Tape>>,
    files: Vec<(Inode, PathBuf)>,
) -> Result<Image, String> {
    let pool = Pool::new(Config::default()).map_err(|error| error.to_string())?;
    let mut options = OpenOptions::new(Access::Write);
    options.format = Some(case.format);
    let tape = Arc::clone(tape);
    options.effects.0 = Some(Arc::new(move |real| {
        Box::new(Recorder {
            real,
            tape: Arc::clone(&tape),
            files: files.clone(),
        })
    }));
    options.open(&pool, path).map_err(|error| error.to_string())
}

fn make(image: &Image, change: &Change) -> Result<(), instar::image::Error> {
    match change {
        Change::Resize {
            size,
            preallocation,
            ..
        } => {
            let how = ResizeOptions {
                preallocation: *preallocation,
                shrink: *size < image.virtual_size(),
            };
            image.resize(*size, &how).map(drop)
        }
        Change::Write(patches) => {
            for patch in patches {
                image.write_at(&vec![patch.value; patch.len as usize], patch.offset)?;
            }
            image.flush()
        }
        // Both are made by commands of their own, not through an open image.
        Change::Settle | Change::Repair(_) => Ok(()),
    }
}
