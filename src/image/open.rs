//! Opening: how an image is opened, which file, and under which lock.

use super::Access;
use super::chain::Opening;
use super::disk::{EffectsHook, Image};
use super::error::{Error, ErrorKind, Fault, Operation};
use super::gate::Tree;
use super::guest::Guest;
use super::handles::id;
use super::home::Home;
use super::lock::LockSet;
use super::reach::Reach;
use crate::sandbox::Pool;
use instar_guest::Format;
use instar_guest::proto::Fresh;
use std::fs::File;
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

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

/// Where the guests of a chain's images come from, when it is opened and later:
/// a pool, or a test.
pub(super) type Guests = Arc<dyn Fn() -> Result<Box<dyn Guest>, Fault> + Send + Sync>;

fn guests_of(pool: &Arc<Pool>) -> Guests {
    let pool = Arc::clone(pool);
    Arc::new(move || Ok(Box::new(pool.session()?)))
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

    pub(super) fn open_path(&self, guests: &Guests, path: &Path) -> Result<Image, Fault> {
        self.check_sharing()?;
        let home = Home::Path(path.to_path_buf());
        for _ in 0..MAX_REPLACED {
            let file = open_by_name(path, self.access)?;
            self.take_lock(&file, path)?;
            if home.holds(&file)? {
                return self.start(guests, file, path, home);
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

    fn open_located(&self, guests: &Guests, file: File, at: Location) -> Result<Image, Fault> {
        self.check_sharing()?;
        check_regular(&file, &at.path)?;
        let home = Home::Below(Arc::clone(&at.tree), at.inside.clone());
        self.take_lock(&file, &at.path)?;
        match home.holds(&file)? {
            true => self.start(guests, file, &at.path, home),
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

    /// Opens the first image of a chain.
    fn start(&self, guests: &Guests, file: File, path: &Path, home: Home) -> Result<Image, Fault> {
        let metadata = file.metadata()?;
        let opening = Opening {
            options: self,
            guests: Arc::clone(guests),
            format: self.format,
            path: path.to_path_buf(),
            reach: Reach {
                options: self.clone(),
                access: self.access,
                home,
                chain: vec![id(&metadata)],
                owner: metadata.uid(),
                gate: None,
            },
        };
        opening.open(file)
    }
}

/// Opens a file that the user named. Nothing blocks and nothing but a regular
/// file is accepted.
fn open_by_name(path: &Path, access: Access) -> Result<File, Fault> {
    let file = File::options()
        .read(true)
        .write(access == Access::Write)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)?;
    check_regular(&file, path)?;
    Ok(file)
}

/// `name` is the file as it was named.
pub(super) fn check_regular(file: &File, name: &Path) -> Result<(), Fault> {
    match file.metadata()?.is_file() {
        true => Ok(()),
        false => Err(Fault::new(
            ErrorKind::NotAFile,
            format!(
                "'file' driver requires '{}' to be a regular file; devices are not supported",
                name.display()
            ),
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

/// A file that is not what was found under its name before.
pub(super) fn replaced() -> Fault {
    Fault::new(
        ErrorKind::Stale,
        "The file was replaced by another while it was being opened",
    )
}
