//! The real executor, recorded: what reaches the files through an open image,
//! sandbox and all, is explored like a plan. So a barrier that the executor
//! forgets is found, which no look at plans could.

use crate::cases::Case;
use crate::disk::{Epoch, Event};
use crate::engine::Change;
use crate::explore::State;
use crate::judge::{Content, Depth, Judge};
use crate::report::explore;
use crate::setup::Setup;
use instar::image::{Access, Effects, Image, OpenOptions, ResizeOptions};
use instar::sandbox::{Config, Pool};
use instar_guest::FileNo;
use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};

/// What happened so far.
#[derive(Default)]
struct Tape {
    done: Vec<Epoch>,
    running: Epoch,
    /// Files with an event since their last sync.
    unsynced: BTreeSet<FileNo>,
}

impl Tape {
    fn event(&mut self, file: FileNo, event: Event) {
        self.unsynced.insert(file);
        self.running.push(event);
    }

    /// A barrier ends the epoch once it covers every file that was changed:
    /// until then nothing of it counts as durable.
    fn sync(&mut self, file: FileNo) {
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
    /// The files, to read what is copied.
    paths: Vec<std::path::PathBuf>,
}

impl Recorder {
    fn note(&self, file: FileNo, event: Event) {
        if let Ok(mut tape) = self.tape.lock() {
            tape.event(file, event);
        }
    }

    fn bytes(&self, file: FileNo, offset: u64, len: u64) -> io::Result<Vec<u8>> {
        let all = std::fs::read(&self.paths[file.0 as usize])?;
        let range = offset as usize..(offset + len) as usize;
        all.get(range)
            .map(<[u8]>::to_vec)
            .ok_or_else(|| io::Error::other("a copy from past the end of the file"))
    }

    fn len(&self, file: FileNo) -> io::Result<u64> {
        Ok(std::fs::metadata(&self.paths[file.0 as usize])?.len())
    }
}

impl Effects for Recorder {
    fn write(&self, file: FileNo, offset: u64, data: &[u8]) -> io::Result<()> {
        let data = data.to_vec();
        self.real.write(file, offset, &data)?;
        self.note(file, Event::Write { file, offset, data });
        Ok(())
    }

    fn zero(&self, file: FileNo, offset: u64, len: u64) -> io::Result<()> {
        self.real.zero(file, offset, len)?;
        let data = vec![0; len as usize];
        self.note(file, Event::Write { file, offset, data });
        Ok(())
    }

    fn copy(&self, file: FileNo, from: u64, to: u64, len: u64) -> io::Result<()> {
        let data = self.bytes(file, from, len)?;
        self.real.copy(file, from, to, len)?;
        let offset = to;
        self.note(file, Event::Write { file, offset, data });
        Ok(())
    }

    fn reserve(&self, file: FileNo, offset: u64, len: u64) -> io::Result<()> {
        self.real.reserve(file, offset, len)
    }

    fn punch(&self, file: FileNo, offset: u64, len: u64) -> io::Result<()> {
        let inside = self.len(file)?.min(offset + len).saturating_sub(offset);
        self.real.punch(file, offset, len)?;
        let data = vec![0; inside as usize];
        self.note(file, Event::Write { file, offset, data });
        Ok(())
    }

    fn set_len(&self, file: FileNo, len: u64) -> io::Result<()> {
        self.real.set_len(file, len)?;
        self.note(file, Event::SetLength { file, len });
        Ok(())
    }

    fn sync(&self, file: FileNo) -> io::Result<()> {
        self.real.sync(file)?;
        if let Ok(mut tape) = self.tape.lock() {
            tape.sync(file);
        }
        Ok(())
    }
}

/// What the executor does is what the plan says, epoch for epoch, or at least
/// as safe: then every state that it can leave is judged.
pub fn is_as_good_as_the_plan(case: &'static Case, seed: u64) -> Result<(), String> {
    let setup = Setup::build(case)?;
    let planned = crate::orders::plan(case, &setup)?.epochs;
    let done = epochs(case, &setup)?;
    let mut finished = setup.files.clone();
    finished.apply_all(&done);
    let state = State {
        cause: "the executor's result".to_owned(),
        files: finished,
    };
    let verdict = Judge::new(case, &setup, Depth::Present)?.verdict(&state)?;
    if verdict.content != Some(Content::New) || verdict.leaks || !verdict.faults.is_empty() {
        return Err(format!("the executor's result: {verdict:?}"));
    }
    if pieces(&planned) == pieces(&done) {
        return Ok(());
    }
    let row = explore(case, &setup, &done, seed, Depth::Present)?;
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
fn epochs(case: &Case, setup: &Setup) -> Result<Vec<Epoch>, String> {
    let dir = crate::tools::scratch()?;
    setup.link_backing(dir.path())?;
    setup.store(&setup.files, dir.path())?;
    let tape = Arc::<Mutex<Tape>>::default();
    let image = open(case, setup, dir.path(), &tape)?;
    make(&image, &setup.change).map_err(|error| error.to_string())?;
    drop(image);
    let mut tape = tape.lock().map_err(|_| "poisoned")?;
    Ok(tape.epochs())
}

fn open(case: &Case, setup: &Setup, dir: &Path, tape: &Arc<Mutex<Tape>>) -> Result<Image, String> {
    let pool = Pool::new(Config::default()).map_err(|error| error.to_string())?;
    let mut options = OpenOptions::new(Access::Write);
    options.format = Some(case.format);
    let (tape, paths) = (Arc::clone(tape), setup.paths(dir));
    options.effects.0 = Some(Arc::new(move |real| {
        Box::new(Recorder {
            real,
            tape: Arc::clone(&tape),
            paths: paths.clone(),
        })
    }));
    options
        .open(&pool, &dir.join(setup.image_name()))
        .map_err(|error| error.to_string())
}

fn make(image: &Image, change: &Change) -> Result<(), instar::image::Error> {
    match change {
        Change::Grow {
            size,
            preallocation,
            ..
        } => {
            let how = ResizeOptions {
                preallocation: *preallocation,
                ..ResizeOptions::default()
            };
            image.resize(*size, &how).map(drop)
        }
        Change::Write(patches) => {
            for patch in patches {
                image.write_at(&vec![patch.value; patch.len as usize], patch.offset)?;
            }
            image.flush()
        }
    }
}
