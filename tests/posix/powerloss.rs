//! A loss of power at any moment under a mount. What the daemon does to the
//! image's file while calls are made on the disk is taped; the crash explorer
//! builds the states that the tape can leave - all of an epoch between two
//! barriers, none of it, each piece alone or missing, random subsets, torn at
//! sectors - and each is judged by what the writer knew to be durable by then.
//!
//! `INSTAR_CRASH_SEED` repeats the calls and the subsets of an earlier run.

use crate::explorer::bytes::Bytes;
use crate::explorer::disk::{Epoch, Event, Files};
use crate::explorer::engine::{Change, Session};
use crate::explorer::explore::states;
use crate::explorer::setup::wants_replay;
use crate::explorer::tools::{qemu_img, scratch};
use crate::faults::{Entry, Faults};
use crate::random::Random;
use crate::record::{Call, Record};
use crate::rig::Rig;
use crate::{Claim, claim};
use instar_guest::Format;
use instar_guest::findings::{Repair, Severity};
use std::fs::{self, File};
use std::ops::ControlFlow;
use std::path::Path;

/// What is proven here, for one image of each format.
pub const CLAIMS: &[Claim] = &[claim(
    "nothing_durable_is_lost_when_the_power_fails",
    &[],
    nothing_durable_is_lost,
)
.in_one_sandbox()];

/// Size of the disk in bytes.
const SIZE: u64 = 8 << 20;
/// Calls on it.
const CALLS: usize = 40;
/// States that the calls leave at least.
const LEAST_STATES: usize = 300;
/// One of so many states is shown to qemu-img, and one of so many has its leaks
/// repaired.
const SAMPLED: usize = 64;

/// What happened between two barriers, and what the disk may hold if the power
/// fails before the second one is complete.
struct Span {
    epoch: Epoch,
    record: Record,
}

fn nothing_durable_is_lost(rig: &Rig) {
    let seed = crate::explorer::seed();
    let (start, spans) = tape(rig, seed);
    let judge = Judge::new(rig);
    let mut count = 0;
    let mut base = start.clone();
    for span in &spans {
        let epochs = std::slice::from_ref(&span.epoch);
        states(&base, epochs, seed, |state| {
            let verdict = judge.verdict(&state.files, &span.record, count);
            if let Err(fault) = verdict {
                panic!("seed {seed}, {}: {fault}", state.cause);
            }
            count += 1;
            ControlFlow::Continue(())
        });
        base.apply_all(epochs);
    }
    let steps: usize = spans.iter().map(|span| span.epoch.len()).sum();
    println!(
        "{}: {count} states after a loss of power in {} epochs of {steps} steps (seed {seed})",
        rig.variant.name,
        spans.len()
    );
    assert!(count >= LEAST_STATES, "{count} states");
    without_barriers_it_is_lost(&judge, &start, &spans, seed);
}

/// The same tape without its barriers is found to lose something: the judge can
/// say no.
fn without_barriers_it_is_lost(judge: &Judge<'_>, start: &Files, spans: &[Span], seed: u64) {
    let epoch: Epoch = spans.iter().flat_map(|span| span.epoch.clone()).collect();
    let record = &spans.last().expect("something was taped").record;
    let mut found = false;
    states(start, &[epoch], seed, |state| {
        match judge.verdict(&state.files, record, 1) {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => {
                found = true;
                ControlFlow::Break(())
            }
        }
    });
    assert!(found, "no barrier is needed");
}

/// Makes calls on a disk; answers the image's files before, and what happened to
/// them.
fn tape(rig: &Rig, seed: u64) -> (Files, Vec<Span>) {
    let [below, shown, raw] = ["below", "shown", "empty"].map(|name| rig.path(name));
    for new in [&below, &shown] {
        fs::create_dir(new).unwrap();
    }
    File::create(&raw).unwrap().set_len(SIZE).unwrap();
    let name = rig.variant.file;
    rig.variant.convert(&raw, &below.join(name));
    let bytes = Bytes::load(&below.join(name)).unwrap();
    let start = Files::named([(name.to_owned(), bytes)]);
    let faults = Faults::mount(&below, &shown);
    let mount = rig.mount_source(&shown, "");
    let disk = File::options().write(true).open(&mount.disk).unwrap();
    faults.tape(name.as_ref());
    let mut random = Random(seed);
    let mut size = SIZE;
    let mut calls = Vec::new();
    while calls.len() < CALLS {
        let call = match random.below(10) {
            0 => Call::Grow {
                size: size + 65_536,
            },
            1..4 => Call::Sync,
            _ => Call::draw(&mut random, size),
        };
        if let Call::Grow { size: new } = call {
            size = new;
        }
        faults.note(2 * calls.len());
        call.make(&disk).unwrap();
        faults.note(2 * calls.len() + 1);
        calls.push(call);
    }
    let tape = faults.taped();
    drop(disk);
    mount.unmount();
    (start, spans(&tape, &calls))
}

/// The tape at its barriers. Notes are the beginnings and the ends of calls.
fn spans(tape: &[Entry], calls: &[Call]) -> Vec<Span> {
    let mut record = Record::new(vec![0; SIZE as usize]);
    let (mut spans, mut epoch) = (Vec::new(), Epoch::new());
    let file = 0;
    for entry in tape {
        match *entry {
            Entry::Write { offset, ref data } => {
                let data = data.clone();
                epoch.push(Event::Write { file, offset, data });
            }
            Entry::Zero { offset, len } => {
                let data = vec![0; len as usize];
                epoch.push(Event::Write { file, offset, data });
            }
            Entry::SetLength { len } => epoch.push(Event::SetLength { file, len }),
            Entry::Note(at) if at % 2 == 0 => record.begin(calls[at / 2]),
            Entry::Note(at) => record.done(calls[at / 2]),
            Entry::Synced if epoch.is_empty() => {}
            Entry::Synced => spans.push(Span {
                epoch: std::mem::take(&mut epoch),
                record: record.clone(),
            }),
        }
    }
    if !epoch.is_empty() {
        spans.push(Span { epoch, record });
    }
    spans
}

struct Judge<'a> {
    rig: &'a Rig,
    format: Format,
    dir: tempfile::TempDir,
}

impl<'a> Judge<'a> {
    fn new(rig: &'a Rig) -> Self {
        let format = match rig.variant.format() {
            "qcow2" => Format::Qcow2,
            "vmdk" => Format::Vmdk,
            "vpc" => Format::Vhd,
            "vhdx" => Format::Vhdx,
            _ => Format::Raw,
        };
        let dir = scratch().unwrap();
        Self { rig, format, dir }
    }

    /// What is wrong with a state, the `count`th, if anything is.
    fn verdict(&self, files: &Files, record: &Record, count: usize) -> Result<(), String> {
        let mut session = self.open(files)?;
        let disk = content(&mut session)?;
        record.fault(&disk).map_or(Ok(()), Err)?;
        let settled = match session.facts.unsettled {
            Some(_) => Some(self.changed(files, &Change::Settle)?),
            None => None,
        };
        let files = settled.as_ref().unwrap_or(files);
        let mut session = self.open(files)?;
        let leaks = sound(&mut session)?;
        if settled.is_some() && content(&mut session)? != disk {
            return Err("it holds another disk once it is in order".to_owned());
        }
        if leaks && count.is_multiple_of(SAMPLED / 8) {
            let repaired = self.changed(files, &Change::Repair(Repair::Leaks))?;
            let mut session = self.open(&repaired)?;
            if sound(&mut session)? || content(&mut session)? != disk {
                return Err("a repair of its leaks is no good".to_owned());
            }
        }
        match count.is_multiple_of(SAMPLED) {
            true => self.verdict_of_qemu(files, &disk),
            false => Ok(()),
        }
    }

    fn open<'f>(&self, files: &'f Files) -> Result<Session<'f>, String> {
        Session::open(files, self.rig.variant.file, self.format)
    }

    fn changed(&self, files: &Files, change: &Change) -> Result<Files, String> {
        let mut session = self.open(files)?;
        let planned = session.plan(change, &Bytes::default())?;
        let mut changed = files.clone();
        changed.apply_all(&planned.epochs);
        Ok(changed)
    }

    /// qemu-img finds the image sound, and the same disk in it.
    fn verdict_of_qemu(&self, files: &Files, disk: &[u8]) -> Result<(), String> {
        let (dir, name) = (self.dir.path(), self.rig.variant.file);
        let format = self.rig.variant.format();
        files.store(dir, &[])?;
        if ["qcow2", "vmdk", "vhdx"].contains(&format) {
            let mut check = qemu_img(dir, &["check", "-f", format, name])?;
            if wants_replay(&check.text) {
                qemu_img(dir, &["check", "-q", "-f", format, "-r", "all", name])?;
                check = qemu_img(dir, &["check", "-f", format, name])?;
            }
            if !matches!(check.code, 0 | 3) {
                return Err(format!("qemu-img check: {}", check.brief()));
            }
        }
        let converted = qemu_img(dir, &["convert", "-f", format, "-O", "raw", name, "disk"])?;
        let read = |path: &Path| fs::read(path).map_err(|error| error.to_string());
        match converted.code {
            0 if read(&dir.join("disk"))? == disk => Ok(()),
            0 => Err("qemu-img finds another disk".to_owned()),
            _ => Err(format!("qemu-img convert: {}", converted.brief())),
        }
    }
}

fn content(session: &mut Session<'_>) -> Result<Vec<u8>, String> {
    let disk = session.disk(None)?;
    Ok(disk.read(0, disk.len()))
}

/// Whether the image leaks space; fails where anything worse is found.
fn sound(session: &mut Session<'_>) -> Result<bool, String> {
    let Some((report, findings)) = session.check()? else {
        return Ok(false);
    };
    let worse = |severity| matches!(severity, Severity::Corruption | Severity::Error);
    match report.corruptions + report.check_errors {
        0 => Ok(report.leaks > 0),
        _ => {
            let first = findings.iter().find(|finding| worse(finding.severity));
            let text = first.map(|finding| &*finding.text).unwrap_or_default();
            Err(format!("a check finds {report:?}: {text}"))
        }
    }
}
