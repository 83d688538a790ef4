//! instar and qemu-img side by side over images drawn at random: created, written
//! by qemu-io, resized, and looked at by both after each step.
//!
//! `INSTAR_FUZZ_SEED` repeats a run, `INSTAR_FUZZ_ROUNDS` makes a long one. Which
//! clusters a program takes is its own affair, so the maps of two files are
//! compared without offsets; those of one file have to be equal.

use crate::draw::{self, Drawn};
use crate::machine::{Outcome, qemu_img};
use crate::random::Random;
use crate::transcript::{self, Step};
use serde_json::Value;
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// Images in a run, unless the environment says otherwise.
const ROUNDS: u64 = 24;

/// What a run of the usual length is drawn from: it judges a change, not luck.
const USUAL_SEED: u64 = 9;

/// The number that a run is drawn from. A long run looks for something new.
pub fn seed() -> u64 {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).ok();
    number("INSTAR_FUZZ_SEED").unwrap_or_else(|| match number("INSTAR_FUZZ_ROUNDS") {
        None => USUAL_SEED,
        Some(_) => now().map_or(USUAL_SEED, |now| now.as_secs()),
    })
}

/// How many images a run has.
pub fn rounds() -> u64 {
    number("INSTAR_FUZZ_ROUNDS").unwrap_or(ROUNDS)
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{variable} is no number: {text}")),
    )
}

/// Every `stride`th image of a run, from `first` on.
pub fn run(seed: u64, first: u64, stride: u64, sandbox: &str) -> Outcome {
    for round in (first..rounds()).step_by(stride as usize) {
        let mut pair = Pair::new(seed, round, sandbox)?;
        if let Err(why) = pair.live_through() {
            return Err(format!(
                "INSTAR_FUZZ_SEED={seed}, image {round}:\n{}{why}",
                pair.history
            ));
        }
    }
    Ok(())
}

/// An image made by instar beside one made by qemu-img.
struct Pair<'a> {
    random: Random,
    drawn: Drawn,
    sandbox: &'a str,
    ours: tempfile::TempDir,
    theirs: tempfile::TempDir,
    /// Whether instar's image has got another size than qemu-img can give its own.
    alone: bool,
    /// Whether clusters may have been freed inside the file.
    freed: bool,
    /// The commands so far, for whoever wants to repeat them by hand.
    history: String,
}

impl<'a> Pair<'a> {
    fn new(seed: u64, round: u64, sandbox: &'a str) -> Result<Self, String> {
        let folder = || tempfile::tempdir().map_err(|error| format!("folder: {error}"));
        let mut random = Random(seed ^ round.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        Ok(Self {
            drawn: draw::image(&mut random),
            random,
            sandbox,
            ours: folder()?,
            theirs: folder()?,
            alone: false,
            freed: false,
            history: String::new(),
        })
    }

    fn live_through(&mut self) -> Outcome {
        self.lay_base()?;
        let create = self.drawn.create();
        if self.by_both(&create)?.code != 0 {
            return Ok(());
        }
        // A VHD gets the next size that has a geometry.
        let line = format!("info -f {} --output=json disk", self.drawn.format);
        let made = json(self.theirs.path(), &line)?;
        let size = made["virtual-size"].as_u64().unwrap_or(0);
        self.drawn.has(size);
        self.look()?;
        for _ in 0..1 + self.random.below(3) {
            self.write()?;
            self.look()?;
            self.resize()?;
            self.look()?;
        }
        Ok(())
    }

    /// The same backing file, without holes, for both.
    fn lay_base(&mut self) -> Outcome {
        let Some(len) = self.drawn.base else {
            return Ok(());
        };
        let words = std::iter::repeat_with(|| self.random.next().to_le_bytes());
        let bytes: Vec<u8> = words.take(len as usize / 8).flatten().collect();
        let _ = writeln!(self.history, "a file `base` of {len} bytes");
        for folder in self.folders() {
            fs::write(folder.join("base"), &bytes).map_err(|error| format!("base: {error}"))?;
        }
        Ok(())
    }

    /// The same command by each program in its own folder: the same answer.
    fn by_both(&mut self, args: &[String]) -> Result<Step, String> {
        let _ = writeln!(self.history, "{}", args.join(" "));
        let expected = transcript::run(self.theirs.path(), qemu_img(), args, &[])?;
        let got = crate::instar_now(self.ours.path(), self.sandbox, args)?;
        transcript::same(&expected, &got).map(|()| expected)
    }

    /// The same content into both.
    fn write(&mut self) -> Outcome {
        let (commands, frees) = self.drawn.writes(&mut self.random);
        self.freed |= frees;
        let mut args = vec!["-f".to_owned(), self.drawn.format.to_owned()];
        for command in commands {
            args.extend(["-c".to_owned(), command]);
        }
        args.push("disk".to_owned());
        let _ = writeln!(self.history, "qemu-io {args:?}");
        for folder in self.folders() {
            succeed(folder, "qemu-io", &args)?;
        }
        Ok(())
    }

    /// Where images are that have what was drawn.
    fn folders(&self) -> impl Iterator<Item = &Path> {
        let theirs = (!self.alone).then(|| self.theirs.path());
        [self.ours.path()].into_iter().chain(theirs)
    }

    fn resize(&mut self) -> Outcome {
        let args = self.drawn.resize(&mut self.random);
        if self.drawn.both_resize() {
            let has = |word: &str| args.iter().any(|arg| arg == word);
            let before = self.drawn.size;
            let done = self.by_both(&args)?;
            self.freed |= has("--shrink");
            if done.code == 0 {
                self.drawn.resized();
                return self.grown(before, has("metadata"));
            }
            return Ok(());
        }
        let _ = writeln!(self.history, "{}", args.join(" "));
        let mut before = content(self.ours.path(), self.drawn.format)?;
        let step = crate::instar_now(self.ours.path(), self.sandbox, &args)?;
        if step.code != 0 {
            return Err(format!("{args:?}: {}", step.stderr));
        }
        self.drawn.resized();
        self.alone = true;
        before.resize(self.drawn.size as usize, 0);
        match content(self.ours.path(), self.drawn.format)? == before {
            true => Ok(()),
            false => Err("the content is another one after the resize".to_owned()),
        }
    }

    /// What instar has added reads as zeroes. With metadata alone qemu-img may
    /// put clusters there that were freed before, with what they held: zeroes
    /// are written over that.
    fn grown(&self, before: u64, metadata: bool) -> Outcome {
        let more = self.drawn.size.saturating_sub(before);
        if more == 0 {
            return Ok(());
        }
        let args =
            |command: &str| ["-f", self.drawn.format, "-c", command, "disk"].map(str::to_owned);
        let read = args(&format!("read -P 0 {before} {more}"));
        succeed(self.ours.path(), "qemu-io", &read)?;
        if metadata {
            let write = args(&format!("write -P 0 {before} {more}"));
            for folder in self.folders() {
                succeed(folder, "qemu-io", &write)?;
            }
        }
        Ok(())
    }

    /// Both programs at both files, and the files beside each other.
    fn look(&self) -> Outcome {
        for folder in self.folders() {
            read_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
            for line in self.drawn.looks() {
                let args = transcript::words(line);
                let expected = transcript::run(folder, qemu_img(), &args, &[])?;
                let got = crate::instar_now(folder, self.sandbox, &args)?;
                let Some(got) = without_warnings(got) else {
                    continue;
                };
                let equal = match self.freed && line.starts_with("map") {
                    true => same_mapping(&expected, &got),
                    false => transcript::same(&expected, &got),
                };
                equal.map_err(|why| format!("in {}:{why}", side(folder, self)))?;
            }
        }
        match self.alone {
            true => Ok(()),
            false => self.compare(),
        }
    }

    /// The two files: the same disk, the same facts, the same mapping.
    fn compare(&self) -> Outcome {
        let (ours, theirs) = (self.ours.path(), self.theirs.path());
        let format = self.drawn.format;
        let ours_disk = ours.join("disk").display().to_string();
        let args = ["compare", "-f", format, "-F", format, "disk", &ours_disk];
        succeed(theirs, "qemu-img", &args.map(str::to_owned))?;
        let info = format!("info -f {format} --output=json disk");
        equal("info", facts(theirs, &info)?, facts(ours, &info)?)?;
        if format != "raw" {
            let map = format!("map -f {format} --output=json disk");
            // Behind the end of a backing file qemu-img makes zero clusters where
            // instar leaves nothing.
            let end = self.drawn.base.unwrap_or(u64::MAX);
            let mapping = |folder| Ok::<_, String>(mapped(&json(folder, &map)?, end));
            equal("map", mapping(theirs)?, mapping(ours)?)?;
        }
        Ok(())
    }
}

/// Reads all files. Where space is reserved and not written, a file has a hole
/// until something of that is in memory: so the first program to look would be
/// told otherwise than the second.
fn read_all(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        fs::read(entry?.path())?;
    }
    Ok(())
}

/// What a check says besides its warnings, of which qemu-img has none. Nothing
/// where they stand in JSON.
fn without_warnings(mut step: Step) -> Option<Step> {
    let lines = step.stderr.lines();
    let lines = lines.filter(|line| !line.starts_with("instar: warning: "));
    step.stderr = lines.map(|line| format!("{line}\n")).collect();
    (!step.stdout.contains("\"warnings\"")).then_some(step)
}

fn side(folder: &Path, pair: &Pair<'_>) -> &'static str {
    match folder == pair.ours.path() {
        true => "instar's image",
        false => "qemu-img's image",
    }
}

fn succeed(folder: &Path, program: &str, args: &[String]) -> Result<String, String> {
    let step = transcript::run(folder, program, args, &[])?;
    match step.code {
        0 => Ok(step.stdout),
        _ => Err(format!(
            "{program} {args:?}: {}{}",
            step.stdout, step.stderr
        )),
    }
}

fn equal<T: PartialEq + std::fmt::Debug>(what: &str, theirs: T, ours: T) -> Outcome {
    match theirs == ours {
        true => Ok(()),
        false => Err(format!(
            "{what}: qemu-img's image {theirs:?}, instar's {ours:?}"
        )),
    }
}

/// What the image says about itself, without what depends on the file.
fn facts(folder: &Path, line: &str) -> Result<Value, String> {
    let mut info = json(folder, line)?;
    if let Some(members) = info.as_object_mut() {
        for key in ["children", "actual-size"] {
            members.remove(key);
        }
        let own = members.get_mut("format-specific");
        let own = own.and_then(|own| own["data"].as_object_mut());
        own.and_then(|own| own.remove("cid"));
    }
    Ok(info)
}

/// Where an image holds something below `end`: without places, and without the
/// holes that its file may have there.
fn mapped(map: &Value, end: u64) -> Vec<(u64, u64, bool)> {
    let mut joined: Vec<(u64, u64, bool)> = Vec::new();
    for entry in map.as_array().into_iter().flatten() {
        let number = |key: &str| entry[key].as_u64().unwrap_or(u64::MAX);
        let (start, length) = (number("start"), number("length"));
        let stop = start.saturating_add(length).min(end);
        let present = entry["present"] == true;
        match joined.last_mut() {
            _ if start >= stop => {}
            Some((_, last, same)) if *same == present => *last = stop,
            _ => joined.push((start, stop, present)),
        }
    }
    joined
}

/// Once clusters were freed, the programs may differ in what they take for
/// space that was never allocated: see the documentation of `map`.
fn same_mapping(expected: &Step, got: &Step) -> Outcome {
    let parsed = |step: &Step| serde_json::from_str::<Value>(&step.stdout).ok();
    match (parsed(expected), parsed(got)) {
        (Some(expected), Some(got)) => {
            let all = |map| mapped(map, u64::MAX);
            equal("map", all(&expected), all(&got))
        }
        _ => Ok(()),
    }
}

fn json(folder: &Path, line: &str) -> Result<Value, String> {
    let text = succeed(folder, "qemu-img", &transcript::words(line))?;
    serde_json::from_str(&text).map_err(|error| format!("{line}: {error}: {text}"))
}

/// The disk's bytes, read by qemu-img.
fn content(folder: &Path, format: &str) -> Result<Vec<u8>, String> {
    let args = ["convert", "-f", format, "-O", "raw", "disk", "content.raw"];
    succeed(folder, "qemu-img", &args.map(str::to_owned))?;
    let bytes = fs::read(folder.join("content.raw")).map_err(|error| error.to_string())?;
    fs::remove_file(folder.join("content.raw")).map_err(|error| error.to_string())?;
    Ok(bytes)
}
