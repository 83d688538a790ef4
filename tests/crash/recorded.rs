//! The real executor, recorded: what reaches the files through an open image,
//! sandbox and all, is explored like a plan. So a barrier that the executor
//! forgets is found, which no look at plans could.

use crate::explorer::case::Case;
use crate::explorer::disk::{Epoch, Event, Files, Inode, Numbers, event_of};
use crate::explorer::engine::{Change, Session};
use crate::explorer::explore::states;
use crate::explorer::judge::{Depth, Judge};
use crate::explorer::report::Exploration;
use crate::explorer::setup::Setup;
use instar::image::{Access, Effects, Image, OpenOptions, ResizeOptions};
use instar::sandbox::{Config, Pool};
use instar_guest::plan::NewName;
use instar_guest::proto::Preallocation;
use instar_guest::{FileNo, Step};
use std::collections::BTreeSet;
use std::io;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::{Arc, Mutex};

/// States from which the same request is made again.
const REPEATED: usize = 4;

/// What happened so far.
struct Tape {
    done: Vec<Epoch>,
    running: Epoch,
    /// Files with an event since their last sync.
    unsynced: BTreeSet<Inode>,
    /// Whether names have changed since they were last synced.
    unsynced_names: bool,
    /// The files as they are now, and by number.
    files: Files,
    numbers: Numbers,
}

impl Tape {
    fn note(&mut self, step: &Step) -> Result<(), String> {
        let Some(event) = event_of(step, &self.files, &self.files, &mut self.numbers)? else {
            return Ok(());
        };
        match event {
            Event::Write { file, .. } | Event::SetLength { file, .. } => {
                self.unsynced.insert(file);
            }
            _ => self.unsynced_names = true,
        }
        self.files.apply(&event);
        self.running.push(event);
        Ok(())
    }

    /// A barrier ends the epoch once it covers everything that was changed:
    /// until then nothing of it counts as durable.
    fn synced(&mut self) {
        let durable = self.unsynced.is_empty() && !self.unsynced_names;
        if durable && !self.running.is_empty() {
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
}

impl Recorder {
    fn note(&self, step: &Step) -> io::Result<()> {
        let tape = self.tape.lock();
        let mut tape = tape.map_err(|_| io::Error::other("a poisoned tape"))?;
        tape.note(step).map_err(io::Error::other)
    }

    fn note_sync(&self, sync: impl FnOnce(&mut Tape)) {
        if let Ok(mut tape) = self.tape.lock() {
            sync(&mut tape);
            tape.synced();
        }
    }
}

impl Effects for Recorder {
    fn write(&self, file: FileNo, offset: u64, data: &[u8]) -> io::Result<()> {
        self.real.write(file, offset, data)?;
        let data = data.to_vec();
        self.note(&Step::Write { file, offset, data })
    }

    fn zero(&self, file: FileNo, offset: u64, len: u64) -> io::Result<()> {
        self.real.zero(file, offset, len)?;
        self.note(&Step::Zero { file, offset, len })
    }

    fn copy(&self, file: FileNo, from: u64, to: u64, len: u64) -> io::Result<()> {
        self.real.copy(file, from, to, len)?;
        self.note(&Step::Copy {
            file,
            from,
            to,
            len,
        })
    }

    fn copy_from(
        &self,
        file: FileNo,
        source: FileNo,
        from: u64,
        to: u64,
        len: u64,
    ) -> io::Result<()> {
        self.real.copy_from(file, source, from, to, len)?;
        self.note(&Step::CopyFrom {
            file,
            source,
            from,
            to,
            len,
        })
    }

    fn reserve(&self, file: FileNo, offset: u64, len: u64) -> io::Result<()> {
        self.real.reserve(file, offset, len)
    }

    fn punch(&self, file: FileNo, offset: u64, len: u64) -> io::Result<()> {
        self.real.punch(file, offset, len)?;
        self.note(&Step::Punch { file, offset, len })
    }

    fn set_len(&self, file: FileNo, len: u64) -> io::Result<()> {
        self.real.set_len(file, len)?;
        self.note(&Step::SetLength { file, len })
    }

    fn sync(&self, file: FileNo) -> io::Result<()> {
        self.real.sync(file)?;
        self.note_sync(|tape| {
            if let Ok(inode) = tape.numbers.file(file) {
                tape.unsynced.remove(&inode);
            }
        });
        Ok(())
    }

    fn create(&self, file: FileNo, name: &NewName) -> io::Result<()> {
        self.real.create(file, name)?;
        let name = name.clone();
        self.note(&Step::Create { file, name })
    }

    fn rename(&self, file: FileNo, over: FileNo) -> io::Result<()> {
        self.real.rename(file, over)?;
        self.note(&Step::Rename { file, over })
    }

    fn unlink(&self, file: FileNo) -> io::Result<()> {
        self.real.unlink(file)?;
        self.note(&Step::Unlink { file })
    }

    fn remove(&self, name: &NewName) -> io::Result<()> {
        self.real.remove(name)?;
        let name = name.clone();
        self.note(&Step::Remove { name })
    }

    fn sync_names(&self) -> io::Result<()> {
        self.real.sync_names()?;
        self.note_sync(|tape| tape.unsynced_names = false);
        Ok(())
    }
}

/// What the executor does is what the plan says, epoch for epoch, or at least
/// as safe: then every state that it can leave is judged.
pub fn is_as_good_as_the_plan(case: &'static Case, seed: u64) -> Result<(), String> {
    let setup = Setup::build(case)?;
    let mut session = Session::open(&setup.files, setup.image_name(), case.format)?;
    let planned = session.plan(&setup.change, &setup.old_disk)?.epochs;
    let done = epochs(case, &setup, session.numbers())?;
    let judge = Judge::new(case, &setup)?;
    let mut finished = setup.files.clone();
    finished.apply_all(&done);
    let faults = judge.verdict_on_end(&finished)?;
    if !faults.is_empty() {
        return Err(format!("the executor's result: {}", faults.join("; ")));
    }
    ends_the_same_again(&judge, &done, seed)?;
    if pieces(&planned) == pieces(&done) {
        return Ok(());
    }
    let row = Exploration {
        judge: &judge,
        start: &setup.files,
        epochs: &done,
        seed,
        depth: Depth::Present,
    }
    .run();
    match row.bad {
        0 => Ok(()),
        _ => Err(format!("(seed {seed})\n{}", row.examples.join("\n"))),
    }
}

/// The same request on what a crash has left is not refused by the host either,
/// and finishes the change.
fn ends_the_same_again(judge: &Judge<'_>, done: &[Epoch], seed: u64) -> Result<(), String> {
    let (case, setup) = (judge.case, judge.setup);
    if !matches!(setup.change, Change::Resize { .. }) {
        return Ok(());
    }
    let mut left = Vec::new();
    states(&setup.files, done, seed, |state| {
        left.extend(state.telling.then_some(state));
        ControlFlow::Continue(())
    });
    let step = left.len().div_ceil(REPEATED).max(1);
    for state in left.iter().step_by(step) {
        let told = |fault: String| format!("the same request after {}: {fault}", state.cause);
        let dir = crate::explorer::tools::scratch()?;
        setup.link_backing(dir.path())?;
        setup.store(&state.files, dir.path())?;
        let path = dir.path().join(setup.image_name());
        let image = opened(case, &path, OpenOptions::new(Access::Write)).map_err(told)?;
        make(&image, setup).map_err(|error| told(error.to_string()))?;
        drop(image);
        let faults = judge.verdict_on_end(&setup.load(dir.path())?)?;
        if !faults.is_empty() {
            return Err(told(faults.join("; ")));
        }
    }
    Ok(())
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
fn epochs(case: &Case, setup: &Setup, numbers: &Numbers) -> Result<Vec<Epoch>, String> {
    let dir = crate::explorer::tools::scratch()?;
    setup.link_backing(dir.path())?;
    setup.store(&setup.files, dir.path())?;
    let tape = Arc::new(Mutex::new(Tape {
        done: Vec::new(),
        running: Epoch::new(),
        unsynced: BTreeSet::new(),
        unsynced_names: false,
        files: setup.files.clone(),
        numbers: numbers.clone(),
    }));
    let image = open(case, &dir.path().join(setup.image_name()), &tape)?;
    make(&image, setup).map_err(|error| error.to_string())?;
    drop(image);
    let mut tape = tape.lock().map_err(|_| "poisoned")?;
    Ok(tape.epochs())
}

fn open(case: &Case, path: &Path, tape: &Arc<Mutex<Tape>>) -> Result<Image, String> {
    let mut options = OpenOptions::new(Access::Write);
    let tape = Arc::clone(tape);
    options.effects.0 = Some(Arc::new(move |real| {
        let tape = Arc::clone(&tape);
        Box::new(Recorder { real, tape })
    }));
    opened(case, path, options)
}

fn opened(case: &Case, path: &Path, mut options: OpenOptions) -> Result<Image, String> {
    let pool = Pool::new(Config::default()).map_err(|error| error.to_string())?;
    options.format = Some(case.format);
    options.open(&pool, path).map_err(|error| error.to_string())
}

fn make(image: &Image, setup: &Setup) -> Result<(), instar::image::Error> {
    match &setup.change {
        Change::Resize {
            size,
            preallocation,
            ..
        } => {
            // Nothing is allocated where nothing is added.
            let adds = *size != image.virtual_size();
            let how = ResizeOptions {
                preallocation: if adds {
                    *preallocation
                } else {
                    Preallocation::Off
                },
                shrink: *size < setup.old_disk.len(),
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
