//! One image of a backing chain while it is being opened: its guest, its files,
//! the images below it.

use super::Access;
use super::disk::{Image, Link};
use super::error::{ErrorKind, Fault, printable_name};
use super::files::FileTable;
use super::gate::{Passed, Role};
use super::guest::{Serving, Stream};
use super::handles::id;
use super::name::{NameRule, format_of_name};
use super::open::{BackingPolicy, Guests, OpenOptions, fresh};
use super::reach::{Reach, cycle, refused_name};
use super::read::unexpected;
use super::rest::Seat;
use instar_guest::facts::Backing;
use instar_guest::{Facts, FileNo, Format, Reply, Request};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, RwLock};

/// The most images in a backing chain. Each has a sandbox of its own.
const MAX_DEPTH: usize = 32;
/// The most names of one backing file that are tried.
const MAX_NAMES: usize = 8;
/// The greatest allocation unit that a guest may claim, in bytes.
pub(super) const MAX_UNIT: u64 = 64 << 20;
/// The greatest cluster or block that a guest may claim, in bytes: no format has
/// greater ones.
const MAX_CLUSTER: u64 = 2 << 30;
/// The smallest cluster that a guest may claim, in bytes: what is kept for each
/// cluster must stay small beside the cluster.
const MIN_CLUSTER: u64 = 512;

/// One image of a chain while it is being opened.
pub(super) struct Opening<'a> {
    pub options: &'a OpenOptions,
    pub guests: Guests,
    pub format: Option<Format>,
    pub path: PathBuf,
    pub reach: Reach,
}

impl Opening<'_> {
    pub fn open(mut self, file: File) -> Result<Image, Fault> {
        let access = self.reach.access;
        let write = access == Access::Write;
        let mut files = FileTable::new(file, write, self.options.effects.0.as_ref())?;
        files.locked = !self.options.force_share;
        let mut guest = (self.guests)()?;
        let request = Request::Open {
            format: self.format,
            file_len: files.len(FileNo::IMAGE).unwrap_or(0),
            write,
            fresh: fresh()?,
        };
        let mut ask = |request: &Request, files: &FileTable| {
            let serving = &mut Serving::new(files, Stream::Refuse);
            guest.call(request, serving).map_err(Fault::from)
        };
        let mut facts = opened(ask(&request, &files)?, "Open")?;
        if self.reach.wants_files(&facts)? {
            files.add(self.reach.files(&facts, &[])?);
            facts = attached(
                &facts,
                |lens| ask(&Request::Attach { lens }, &files),
                &files,
            )?;
        }
        let backing = match self.wanted_backing(&facts)? {
            Some(named) => Some(Box::new(self.open_backing(named)?)),
            None => None,
        };
        Ok(Image {
            path: self.path,
            home: self.reach.home.clone(),
            access,
            force_share: self.options.force_share,
            files,
            backing,
            size: AtomicU64::new(facts.virtual_size),
            facts: RwLock::new(Arc::new(facts)),
            extents: RwLock::default(),
            inflated: Mutex::default(),
            flushing: Mutex::default(),
            session: Mutex::new(Link {
                seat: Seat::new(guest, self.guests),
                reach: self.reach,
                placed: 0,
                stale: false,
                postponed: None,
            }),
            traffic: RwLock::default(),
            unflushed: AtomicBool::new(false),
            lost: AtomicBool::new(false),
            unlocked: Mutex::default(),
        })
    }

    fn wanted_backing<'f>(&self, facts: &'f Facts) -> Result<Option<&'f Backing>, Fault> {
        match (&facts.backing, self.options.backing) {
            (None, _) | (_, BackingPolicy::Skip) => Ok(None),
            (Some(named), BackingPolicy::Open) => Ok(Some(named)),
            (Some(named), BackingPolicy::Refuse) => Err(refused_name("backing file", named.name())),
        }
    }

    fn open_backing(&mut self, named: &Backing) -> Result<Image, Fault> {
        let (name, passed) = self.find_backing(named)?;
        let metadata = passed.file.metadata()?;
        if self.reach.chain.contains(&id(&metadata)) {
            return Err(cycle("backing file", name));
        }
        if self.reach.chain.len() >= MAX_DEPTH {
            return Err(Fault::new(
                ErrorKind::Unsupported,
                format!("The backing chain has more than {MAX_DEPTH} images"),
            ));
        }
        let format = match backing_format(named)? {
            None if self.options.trust_names => format_by_name(&passed.spot.path),
            stated => stated,
        };
        let access = match self.reach.access {
            Access::Info => Access::Info,
            Access::Read | Access::Write => Access::Read,
        };
        let home = self.reach.lock(&passed.file, &passed.spot, access)?;
        let mut chain = self.reach.chain.clone();
        chain.push(id(&metadata));
        let owner = metadata.uid();
        let next = Opening {
            options: self.options,
            guests: Arc::clone(&self.guests),
            format,
            path: self.path.parent().unwrap_or(Path::new("")).join(name),
            reach: Reach {
                options: self.options.clone(),
                access,
                home,
                chain,
                owner,
                gate: Some(self.reach.gate()?.next(passed.spot, owner)),
            },
        };
        let image = next.open(passed.file).map_err(|fault| below(fault, name))?;
        check_identity(&image.facts(), named, name)?;
        Ok(image)
    }

    /// The first of the names that a file has which may be opened. Where there
    /// is none, the first name's refusal is the one to tell.
    fn find_backing<'n>(&mut self, named: &'n Backing) -> Result<(&'n str, Passed), Fault> {
        let gate = self.reach.gate()?;
        let mut refusal = None;
        for name in named.names.iter().take(MAX_NAMES) {
            match gate.pass(name, Role::Backing) {
                Ok(passed) => return Ok((name, passed)),
                Err(fault) => {
                    refusal.get_or_insert(fault);
                }
            }
        }
        Err(match (refusal, named.names.get(1..)) {
            (Some(fault), Some([])) => fault,
            (Some(fault), Some(others)) => {
                let shown = others.iter().take(MAX_NAMES - 1);
                let shown: Vec<String> = shown
                    .map(|name| format!("'{}'", printable_name(name)))
                    .collect();
                fault.with_hint(format!(
                    "Nor does any other name of it lead to a file that may be used: {}.",
                    shown.join(", ")
                ))
            }
            (None, _) | (Some(_), None) => Fault::new(
                ErrorKind::BadGuest,
                "The sandbox's facts about the image are refused: a backing file without a name",
            ),
        })
    }
}

/// How an error begins that happened below the image that was asked for.
const BACKING_FAILED: &str = "Could not open backing file";

/// What is told of an image that lies below the one that was asked for.
fn below(mut fault: Fault, name: &str) -> Fault {
    fault.message = match fault.kind {
        // Names the file that is missing, which may lie further down.
        ErrorKind::Os(_) => format!("{BACKING_FAILED}: {}", fault.message),
        _ if fault.message.starts_with(BACKING_FAILED) => {
            format!("{BACKING_FAILED}: {}", fault.message)
        }
        _ => format!(
            "{BACKING_FAILED}: {} (in '{}')",
            fault.message,
            printable_name(name)
        ),
    };
    fault
}

/// An image that was made on another file, or on this one before it changed,
/// would show a mixture.
fn check_identity(facts: &Facts, named: &Backing, name: &str) -> Result<(), Fault> {
    let Some(wanted) = &named.identity else {
        return Ok(());
    };
    let found = facts.identity.as_deref();
    if found == Some(wanted) {
        return Ok(());
    }
    let found = match found {
        Some(found) => format!("'{}'", printable_name(found)),
        None => "nothing".to_string(),
    };
    Err(Fault::new(
        ErrorKind::Damaged,
        format!(
            "The backing file '{}' is not the one that the image was made on: \
             it is identified by {found}, the image wants '{}'",
            printable_name(name),
            printable_name(wanted)
        ),
    ))
}

/// The format that an image says its backing file has; `None` probes.
fn backing_format(named: &Backing) -> Result<Option<Format>, Fault> {
    let Some(name) = named.format.as_deref() else {
        return Ok(None);
    };
    match Format::of_name(name) {
        Some(format) => Ok(Some(format)),
        None => Err(unsupported_backing(named, name)),
    }
}

/// The format that a backing file's own name says it has; `None` probes.
fn format_by_name(path: &Path) -> Option<Format> {
    match format_of_name(path.file_name().unwrap_or_default()) {
        NameRule::Raw => Some(Format::Raw),
        NameRule::Must(format) => Some(format),
        NameRule::Probe => None,
    }
}

fn unsupported_backing(named: &Backing, format: &str) -> Fault {
    Fault::new(
        ErrorKind::Unsupported,
        format!(
            "{BACKING_FAILED}: Unknown driver '{}' (in '{}')",
            printable_name(format),
            printable_name(named.name())
        ),
    )
}

/// The facts in the answer to a request.
pub(super) fn opened(reply: Reply, request: &str) -> Result<Facts, Fault> {
    match reply {
        Reply::Opened(facts) => checked_facts(facts),
        _ => Err(unexpected(request)),
    }
}

/// The facts once the files that they name are attached: the same files.
pub(super) fn attached(
    facts: &Facts,
    attach: impl FnOnce(Vec<u64>) -> Result<Reply, Fault>,
    files: &FileTable,
) -> Result<Facts, Fault> {
    let lens = files.lens().split_off(1);
    let complete = opened(attach(lens)?, "Attach")?;
    match complete.files == facts.files {
        true => Ok(complete),
        false => Err(refused_facts("the files that it consists of change")),
    }
}

/// Facts that the rest of this module can rely on.
fn checked_facts(facts: Facts) -> Result<Facts, Fault> {
    let sound_unit = |unit: u64| unit.is_power_of_two() && unit <= MAX_UNIT;
    let clusters = MIN_CLUSTER..=MAX_CLUSTER;
    let sound_cluster = |size: u64| size.is_power_of_two() && clusters.contains(&size);
    let sound = sound_unit(facts.write_unit)
        && sound_unit(facts.size_unit)
        && facts.cluster_size.is_none_or(sound_cluster)
        && facts.virtual_size <= i64::MAX as u64;
    match sound {
        true => Ok(facts),
        false => Err(refused_facts("a size or unit is out of range")),
    }
}

fn refused_facts(why: &str) -> Fault {
    Fault::new(
        ErrorKind::BadGuest,
        format!("The sandbox's facts about the image are refused: {why}"),
    )
}
