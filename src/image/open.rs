//! Opening: which file, under which lock, in which format, over which backing
//! chain.

use super::Access;
use super::disk::{EffectsHook, Image, Link};
use super::error::{Error, ErrorKind, Fault, Operation, printable_name};
use super::files::FileTable;
use super::gate::{Gate, Role, Spot, Tree};
use super::guest::{Guest, Serving, Stream};
use super::lock::LockSet;
use super::name::{NameRule, format_of_name};
use crate::sandbox::Pool;
use instar_guest::facts::{Backing, NamedFile};
use instar_guest::proto::Fresh;
use instar_guest::{Facts, FileNo, Format, Reply, Request};
use nix::fcntl::OFlag;
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

/// The most images in a backing chain. Each has a sandbox of its own.
const MAX_DEPTH: usize = 32;
/// The greatest allocation unit or cluster that a guest may claim, in bytes.
pub(super) const MAX_UNIT: u64 = 64 << 20;
/// The smallest cluster that a guest may claim, in bytes: what is kept for each
/// cluster must stay small beside the cluster.
const MIN_CLUSTER: u64 = 512;
/// How often a file may be replaced while it is being opened.
const MAX_REPLACED: usize = 10;

/// What happens with the backing file that an image names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BackingPolicy {
    /// It is opened, and so is the chain below it.
    #[default]
    Open,
    /// It is left alone: facts and resizes work, ranges that are not in this
    /// image cannot be read.
    Skip,
    /// An image that names one is refused, and so is one that names a data
    /// file.
    Refuse,
}

/// How to open an image.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// The format to read the file as; `None` probes.
    pub format: Option<Format>,
    /// What the image is opened for.
    pub access: Access,
    /// Reads although another process may be writing: no locks are taken.
    pub force_share: bool,
    /// What happens with the backing file.
    pub backing: BackingPolicy,
    /// Whether the name of a backing file decides its format where the image
    /// states none: a guest that wrote another format's header into its raw
    /// disk gains nothing.
    pub trust_names: bool,
    /// Directories besides the tree whose files an image may name.
    pub allow_paths: Vec<PathBuf>,
    /// Something to put around the effects on the image's files: tests record
    /// or fail them.
    pub effects: EffectsHook,
}

/// Where an image lies, for one that is opened by descriptor.
#[derive(Clone, Debug)]
pub struct Location {
    /// The path that texts name.
    pub path: PathBuf,
    /// The tree whose files the image may name.
    pub tree: Arc<Tree>,
    /// The image's path below the tree's root.
    pub inside: PathBuf,
}

/// Where the name of an open file can be looked up again.
#[derive(Clone, Debug)]
pub(super) enum Home {
    /// A path that the user gave.
    Path(PathBuf),
    /// A path below a tree.
    Below(Arc<Tree>, PathBuf),
}

impl Home {
    /// Whether the name still stands for this file.
    pub fn holds(&self, file: &File) -> io::Result<bool> {
        let named = match self {
            Self::Path(path) => std::fs::metadata(path),
            Self::Below(tree, path) => tree
                .open_below(path, OFlag::O_PATH)
                .and_then(|file| file.metadata()),
        };
        match named {
            Ok(named) => Ok(id(&named) == id(&file.metadata()?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// What tells files apart.
type Id = (u64, u64);

fn id(metadata: &Metadata) -> Id {
    (metadata.dev(), metadata.ino())
}

/// Where the guests of a chain's images come from: a pool, or a test.
pub(super) type Guests<'a> = &'a dyn Fn() -> Result<Box<dyn Guest>, Fault>;

fn guests_of(pool: &Arc<Pool>) -> impl Fn() -> Result<Box<dyn Guest>, Fault> {
    || Ok(Box::new(pool.session()?))
}

/// One image of a chain while it is being opened.
struct Opening<'a> {
    options: &'a OpenOptions,
    guests: Guests<'a>,
    access: Access,
    format: Option<Format>,
    path: PathBuf,
    home: Home,
    /// Images of the chain so far, this one included.
    chain: Vec<Id>,
}

impl OpenOptions {
    /// Options for an access, everything else as usual.
    pub fn new(access: Access) -> Self {
        Self {
            format: None,
            access,
            force_share: false,
            backing: BackingPolicy::Open,
            trust_names: false,
            allow_paths: Vec::new(),
            effects: EffectsHook::default(),
        }
    }

    /// Opens the image at a path. Files that it names must lie in its own
    /// directory, below it, or below one of the allowed paths.
    pub fn open(&self, pool: &Arc<Pool>, path: &Path) -> Result<Image, Error> {
        self.open_path(&guests_of(pool), path)
            .map_err(|fault| fault.at(Operation::Open, path))
    }

    pub(super) fn open_path(&self, guests: Guests<'_>, path: &Path) -> Result<Image, Fault> {
        self.check_sharing()?;
        let home = Home::Path(path.to_path_buf());
        for _ in 0..MAX_REPLACED {
            let file = open_by_name(path, self.access)?;
            self.take_lock(&file, path)?;
            if home.holds(&file)? {
                return self.start(guests, file, path, home, || {
                    let dir = match path.parent() {
                        Some(dir) if dir != Path::new("") => dir,
                        _ => Path::new("."),
                    };
                    let name = path.file_name().unwrap_or_default();
                    Ok((Arc::new(Tree::open(dir)?), name.into()))
                });
            }
        }
        Err(replaced())
    }

    /// Opens the image that a descriptor stands for. The descriptor must allow
    /// writing if `access` does; the image keeps it, and with it the lock.
    pub fn open_file(&self, pool: &Arc<Pool>, file: File, at: Location) -> Result<Image, Error> {
        let path = at.path.clone();
        self.open_located(&guests_of(pool), file, at)
            .map_err(|fault| fault.at(Operation::Open, &path))
    }

    fn open_located(&self, guests: Guests<'_>, file: File, at: Location) -> Result<Image, Fault> {
        self.check_sharing()?;
        check_regular(&file)?;
        let home = Home::Below(Arc::clone(&at.tree), at.inside.clone());
        self.take_lock(&file, &at.path)?;
        match home.holds(&file)? {
            true => self.start(guests, file, &at.path, home, || Ok((at.tree, at.inside))),
            false => Err(replaced()),
        }
    }

    fn check_sharing(&self) -> Result<(), Fault> {
        match self.force_share && self.access == Access::Write {
            false => Ok(()),
            true => Err(Fault::new(
                ErrorKind::InvalidRequest,
                "force-share=on can only be used with read-only images",
            )),
        }
    }

    fn take_lock(&self, file: &File, path: &Path) -> Result<(), Fault> {
        match self.force_share {
            true => Ok(()),
            false => LockSet::of(self.access).take(file, path),
        }
    }

    /// Opens the first image of a chain. Where it lies is looked up only if it
    /// names another file.
    fn start(
        &self,
        guests: Guests<'_>,
        file: File,
        path: &Path,
        home: Home,
        locate: impl FnOnce() -> io::Result<(Arc<Tree>, PathBuf)>,
    ) -> Result<Image, Fault> {
        let metadata = file.metadata()?;
        let opening = Opening {
            options: self,
            guests,
            access: self.access,
            format: self.format,
            path: path.to_path_buf(),
            home,
            chain: vec![id(&metadata)],
        };
        opening.open(file, || {
            let (tree, inside) = locate()?;
            let mut trees = vec![tree];
            for path in &self.allow_paths {
                let tree = Tree::open(path).map_err(|error| {
                    Fault::os(
                        format_args!("Could not open the allowed path '{}'", path.display()),
                        error,
                    )
                })?;
                trees.push(Arc::new(tree));
            }
            Ok(Gate {
                trees: trees.into(),
                from: Spot {
                    tree: 0,
                    path: inside,
                },
                owners: vec![metadata.uid()],
            })
        })
    }
}

impl Opening<'_> {
    fn open(self, file: File, gate: impl FnOnce() -> Result<Gate, Fault>) -> Result<Image, Fault> {
        let write = self.access == Access::Write;
        let wrap = self.options.effects.0.as_ref();
        let mut files = FileTable::new(file, write, wrap)?;
        files.locked = !self.options.force_share;
        let mut guest = (self.guests)()?;
        let request = Request::Open {
            format: self.format,
            file_len: files.len(FileNo::IMAGE).unwrap_or(0),
            write,
            fresh: fresh()?,
        };
        let Reply::Opened(facts) = ask(guest.as_mut(), &files, &request)? else {
            return Err(super::read::unexpected("Open"));
        };
        let facts = checked_facts(facts)?;
        let data = self.wanted_data(&facts)?;
        let backing = self.wanted_backing(&facts)?;
        let gate = match data.is_some() || backing.is_some() {
            true => Some(gate()?),
            false => None,
        };
        if let (Some(gate), Some(named)) = (&gate, data) {
            files = files.and(self.open_data(gate, named)?, write, wrap)?;
            let lens = files.lens().split_off(1);
            ask(guest.as_mut(), &files, &Request::Attach { lens })?;
        }
        let backing = match (&gate, backing) {
            (Some(gate), Some(named)) => Some(Box::new(self.open_backing(gate, named)?)),
            _ => None,
        };
        Ok(Image {
            path: self.path,
            home: self.home,
            access: self.access,
            force_share: self.options.force_share,
            files,
            backing,
            size: AtomicU64::new(facts.virtual_size),
            facts: RwLock::new(Arc::new(facts)),
            extents: RwLock::default(),
            inflated: Mutex::default(),
            flushing: Mutex::default(),
            session: Mutex::new(Link {
                guest,
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

    /// The data file to open. Facts alone do not need it.
    fn wanted_data<'f>(&self, facts: &'f Facts) -> Result<Option<&'f NamedFile>, Fault> {
        match (facts.files.first(), self.options.backing) {
            (Some(named), BackingPolicy::Refuse) => Err(refused_name("data file", &named.name)),
            (named, _) => Ok(named.filter(|_| self.access != Access::Info)),
        }
    }

    fn wanted_backing<'f>(&self, facts: &'f Facts) -> Result<Option<&'f Backing>, Fault> {
        match (&facts.backing, self.options.backing) {
            (None, _) | (_, BackingPolicy::Skip) => Ok(None),
            (Some(named), BackingPolicy::Open) => Ok(Some(named)),
            (Some(named), BackingPolicy::Refuse) => Err(refused_name("backing file", named.name())),
        }
    }

    fn open_data(&self, gate: &Gate, named: &NamedFile) -> Result<File, Fault> {
        let write = self.access == Access::Write;
        let passed = gate.pass(&named.name, Role::Data { write })?;
        if self.chain.contains(&id(&passed.file.metadata()?)) {
            return Err(cycle("data file", &named.name));
        }
        self.lock_named(gate, &passed.file, &passed.spot, self.access)?;
        Ok(passed.file)
    }

    fn open_backing(&self, gate: &Gate, named: &Backing) -> Result<Image, Fault> {
        let passed = gate.pass(named.name(), Role::Backing)?;
        let metadata = passed.file.metadata()?;
        if self.chain.contains(&id(&metadata)) {
            return Err(cycle("backing file", named.name()));
        }
        if self.chain.len() >= MAX_DEPTH {
            return Err(Fault::new(
                ErrorKind::Unsupported,
                format!("The backing chain has more than {MAX_DEPTH} images"),
            ));
        }
        let format = match backing_format(named)? {
            None if self.options.trust_names => format_by_name(&passed.spot.path, named)?,
            stated => stated,
        };
        let access = match self.access {
            Access::Info => Access::Info,
            Access::Read | Access::Write => Access::Read,
        };
        self.lock_named(gate, &passed.file, &passed.spot, access)?;
        let mut chain = self.chain.clone();
        chain.push(id(&metadata));
        let next = Opening {
            options: self.options,
            guests: self.guests,
            access,
            format,
            path: self
                .path
                .parent()
                .unwrap_or(Path::new(""))
                .join(named.name()),
            home: Home::Below(
                Arc::clone(&gate.trees[passed.spot.tree]),
                passed.spot.path.clone(),
            ),
            chain,
        };
        let gate = gate.next(passed.spot, metadata.uid());
        next.open(passed.file, || Ok(gate)).map_err(|mut fault| {
            fault.message = match fault.kind {
                // Names the file that is missing, which may lie further down.
                ErrorKind::Os(_) => format!("Could not open backing file: {}", fault.message),
                _ => format!(
                    "Could not open backing file '{}': {}",
                    printable_name(named.name()),
                    fault.message
                ),
            };
            fault
        })
    }

    /// Locks a file that an image names.
    fn lock_named(
        &self,
        gate: &Gate,
        file: &File,
        spot: &Spot,
        access: Access,
    ) -> Result<(), Fault> {
        if self.options.force_share {
            return Ok(());
        }
        LockSet::of(access).take(file, &spot.path)?;
        let home = Home::Below(Arc::clone(&gate.trees[spot.tree]), spot.path.clone());
        match home.holds(file)? {
            true => Ok(()),
            false => Err(replaced()),
        }
    }
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
fn format_by_name(path: &Path, named: &Backing) -> Result<Option<Format>, Fault> {
    match format_of_name(path.file_name().unwrap_or_default()) {
        NameRule::Raw => Ok(Some(Format::Raw)),
        NameRule::Must(format) => Ok(Some(format)),
        NameRule::Unsupported(name) => Err(unsupported_backing(named, name)),
        NameRule::Probe => Ok(None),
    }
}

fn unsupported_backing(named: &Backing, format: &str) -> Fault {
    Fault::new(
        ErrorKind::Unsupported,
        format!(
            "Could not open backing file '{}': its format '{}' is not supported",
            printable_name(named.name()),
            printable_name(format)
        ),
    )
}

/// What an image is told that names a file where none may be named.
fn refused_name(noun: &str, name: &str) -> Fault {
    Fault::new(
        ErrorKind::Forbidden,
        format!(
            "The image names the {noun} '{}', and {noun}s are not allowed here",
            printable_name(name)
        ),
    )
}

fn cycle(noun: &str, name: &str) -> Fault {
    Fault::new(
        ErrorKind::Damaged,
        format!(
            "The {noun} '{}' is an image of the chain that names it",
            printable_name(name)
        ),
    )
}

fn replaced() -> Fault {
    Fault::new(
        ErrorKind::Stale,
        "The file was replaced by another while it was being opened",
    )
}

/// Opens a file that the user named. Nothing blocks and nothing but a regular
/// file is accepted.
fn open_by_name(path: &Path, access: Access) -> Result<File, Fault> {
    let file = File::options()
        .read(true)
        .write(access == Access::Write)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)?;
    check_regular(&file)?;
    Ok(file)
}

pub(super) fn check_regular(file: &File) -> Result<(), Fault> {
    match file.metadata()?.is_file() {
        true => Ok(()),
        false => Err(Fault::new(
            ErrorKind::NotAFile,
            "Not a regular file; devices are not supported",
        )),
    }
}

/// What a session makes new identifiers from.
pub(super) fn fresh() -> Result<Fresh, Fault> {
    let mut fresh = Fresh::default();
    getrandom::fill(&mut fresh.seed).map_err(io::Error::from)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    fresh.time = now.unwrap_or_default().as_secs();
    Ok(fresh)
}

/// Sends a request before there is an image around the guest.
fn ask(guest: &mut dyn Guest, files: &FileTable, request: &Request) -> Result<Reply, Fault> {
    Ok(guest.call(request, &mut Serving::new(files, Stream::Refuse))?)
}

/// Facts that the rest of this module can rely on.
pub(super) fn checked_facts(facts: Facts) -> Result<Facts, Fault> {
    let sound_unit = |unit: u64| unit.is_power_of_two() && unit <= MAX_UNIT;
    let sound_cluster = |size: u64| sound_unit(size) && size >= MIN_CLUSTER;
    let sound = sound_unit(facts.write_unit)
        && sound_unit(facts.size_unit)
        && facts.cluster_size.is_none_or(sound_cluster)
        && facts.virtual_size <= i64::MAX as u64;
    match sound {
        true => Ok(facts),
        false => Err(Fault::new(
            ErrorKind::BadGuest,
            "The sandbox's facts about the image are refused: a size or unit is out of range",
        )),
    }
}
