//! Which files the images of the tree name, and what those names lead to.
//!
//! An image may name thousands of files, and every file that is shown could be
//! one of them. So its names are followed once, and again only when something
//! may lead elsewhere: when its directory has changed, or after a while where a
//! name leads out of that directory. That a file is named is checked with the
//! one name that matters before it counts.

use super::catalog::{Stamp, settled};
use super::disk::Portrait;
use super::source::{FileId, Source, Stat};
use super::sync::lock;
use nix::errno::Errno;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How long names are believed that lead somewhere where a change cannot be
/// seen from the image's directory: that, or [`PER_NAME`] if that is longer.
const BELIEVED: Duration = Duration::from_secs(1);
/// The same for each of many names, so that following them takes a small part
/// of the time.
const PER_NAME: Duration = Duration::from_millis(1);
/// How long the space of the parts is believed for each of them.
const SPACE_PER_NAME: Duration = Duration::from_micros(250);

/// Permission of others to read a file.
const OTHERS_READ: u16 = 0o004;
/// Permission of others to write a file.
const OTHERS_WRITE: u16 = 0o002;

/// See the module.
#[derive(Default)]
pub struct Namings {
    known: Mutex<HashMap<FileId, Naming>>,
    /// Held by whoever follows names, so that the same are not followed twice.
    following: Mutex<()>,
}

struct Naming {
    path: PathBuf,
    portrait: Arc<Portrait>,
    followed: Option<Followed>,
    /// Blocks of the parts, and when they were counted.
    space: Option<(Instant, u64)>,
}

/// Where the names of an image's parts have led.
struct Followed {
    /// The image's directory as it was before.
    directory: Option<Stamp>,
    /// Whether its time stamps tell every change since.
    settled: bool,
    /// Whether all names stay in it.
    stays: bool,
    at: Instant,
    /// One of the names that lead there, for every file.
    parts: HashMap<FileId, usize>,
}

/// An image whose names are to be followed.
struct Namer {
    id: FileId,
    path: PathBuf,
    portrait: Arc<Portrait>,
}

impl Namings {
    /// Takes note of what an image names.
    pub fn note(&self, path: &Path, id: FileId, portrait: &Arc<Portrait>) {
        let mut known = lock(&self.known);
        if portrait.backing.is_none() && portrait.files.is_empty() {
            known.remove(&id);
            return;
        }
        if known.get(&id).is_some_and(|naming| {
            naming.path == path
                && (Arc::ptr_eq(&naming.portrait, portrait) || naming.portrait == *portrait)
        }) {
            return;
        }
        let naming = Naming {
            path: path.to_path_buf(),
            portrait: Arc::clone(portrait),
            followed: None,
            space: None,
        };
        known.insert(id, naming);
    }

    /// What is no image names nothing.
    pub fn remove(&self, id: FileId) {
        lock(&self.known).remove(&id);
    }

    /// Whether an image names the file at `path` for a part of it, the image
    /// `except` left aside. `directory` is what the file's directory is like.
    pub fn is_part(
        &self,
        source: &Source,
        path: &Path,
        file: FileId,
        directory: &Stat,
        except: Option<FileId>,
    ) -> bool {
        let place = (parent(path), Stamp::of(directory));
        if !self.due(place).is_empty() {
            let _following = lock(&self.following);
            self.follow(source, self.due(place));
        }
        let candidates: Vec<(Namer, usize)> = lock(&self.known)
            .iter()
            .filter(|(id, _)| **id != file && Some(**id) != except)
            .filter_map(|(id, naming)| {
                let followed = naming.followed.as_ref()?;
                Some((naming.namer(*id), *followed.parts.get(&file)?))
            })
            .collect();
        candidates.iter().any(|(namer, at)| {
            let name = namer.portrait.files.get(*at).map(|named| &named.name);
            self.stat(source, namer).is_some_and(|stat| {
                let names = name.into_iter();
                leads_to(
                    source,
                    namer,
                    &stat,
                    names,
                    file,
                    OTHERS_READ | OTHERS_WRITE,
                )
            })
        })
    }

    /// Every image that names files, as far as they are known.
    pub fn all(&self) -> Vec<(PathBuf, Arc<Portrait>)> {
        lock(&self.known)
            .values()
            .map(|naming| (naming.path.clone(), Arc::clone(&naming.portrait)))
            .collect()
    }

    /// Whether an image names the file for its backing image.
    pub fn is_backing(&self, source: &Source, file: FileId) -> bool {
        let namers: Vec<Namer> = lock(&self.known)
            .iter()
            .filter(|(id, naming)| **id != file && naming.portrait.backing.is_some())
            .map(|(id, naming)| naming.namer(*id))
            .collect();
        namers.iter().any(|namer| {
            let backing = namer.portrait.backing.iter();
            let names = backing.flat_map(|backing| &backing.names);
            self.stat(source, namer)
                .is_some_and(|stat| leads_to(source, namer, &stat, names, file, OTHERS_READ))
        })
    }

    /// Disk space of the parts of an image, in blocks of 512 bytes.
    pub fn blocks_of_parts(
        &self,
        source: &Source,
        path: &Path,
        id: FileId,
        portrait: &Portrait,
    ) -> u64 {
        let many = u32::try_from(portrait.files.len()).unwrap_or(u32::MAX);
        let space = lock(&self.known).get(&id).and_then(|naming| naming.space);
        if let Some((_, blocks)) =
            space.filter(|(at, _)| at.elapsed() < SPACE_PER_NAME.saturating_mul(many))
        {
            return blocks;
        }
        let files = portrait.files.iter();
        let found = files.filter_map(|file| source.resolve(path, &file.name));
        let blocks = found.fold(0, |sum: u64, part| part.blocks.saturating_add(sum));
        if let Some(naming) = lock(&self.known).get_mut(&id) {
            naming.space = Some((Instant::now(), blocks));
        }
        blocks
    }

    /// The images whose names may lead elsewhere by now, as seen from a
    /// directory in its present state.
    fn due(&self, place: (&Path, Stamp)) -> Vec<Namer> {
        lock(&self.known)
            .iter()
            .filter(|(_, naming)| !naming.portrait.files.is_empty() && naming.is_due(place))
            .map(|(id, naming)| naming.namer(*id))
            .collect()
    }

    fn follow(&self, source: &Source, due: Vec<Namer>) {
        let mut directories = HashMap::new();
        for namer in due {
            if self.stat(source, &namer).is_none() {
                continue;
            }
            let directory = directories
                .entry(parent(&namer.path).to_path_buf())
                .or_insert_with_key(|path| source.stat(path).ok());
            let followed = follow(source, &namer, directory.as_ref());
            if let Some(naming) = lock(&self.known).get_mut(&namer.id)
                && Arc::ptr_eq(&naming.portrait, &namer.portrait)
            {
                naming.followed = Some(followed);
            }
        }
    }

    /// The image's attributes, if it is where it was. If it has gone, what it
    /// names is forgotten: if it has moved, it is looked at under its new name.
    fn stat(&self, source: &Source, namer: &Namer) -> Option<Stat> {
        let stat = source.stat(&namer.path);
        let is_gone = match &stat {
            Ok(stat) => stat.id != namer.id,
            Err(error) => error.errno == Errno::ENOENT,
        };
        if is_gone {
            let mut known = lock(&self.known);
            let naming = known.get(&namer.id);
            if naming.is_some_and(|naming| naming.path == namer.path) {
                known.remove(&namer.id);
            }
        }
        stat.ok().filter(|stat| stat.id == namer.id)
    }
}

impl Naming {
    fn namer(&self, id: FileId) -> Namer {
        Namer {
            id,
            path: self.path.clone(),
            portrait: Arc::clone(&self.portrait),
        }
    }

    fn is_due(&self, (directory, stamp): (&Path, Stamp)) -> bool {
        let Some(followed) = &self.followed else {
            return true;
        };
        let is_here = parent(&self.path) == directory;
        if is_here && (!followed.settled || followed.directory != Some(stamp)) {
            return true;
        }
        let many = u32::try_from(self.portrait.files.len()).unwrap_or(u32::MAX);
        let believed = BELIEVED.max(PER_NAME.saturating_mul(many));
        !(is_here && followed.stays) && followed.at.elapsed() > believed
    }
}

fn follow(source: &Source, namer: &Namer, directory: Option<&Stat>) -> Followed {
    let mut followed = Followed {
        directory: directory.map(Stamp::of),
        settled: directory.is_some_and(settled),
        stays: true,
        at: Instant::now(),
        parts: HashMap::new(),
    };
    for (at, file) in namer.portrait.files.iter().enumerate() {
        let (target, stays) = source.resolve_in(&namer.path, &file.name);
        followed.stays &= stays;
        if let Some(target) = target {
            followed.parts.entry(target.id).or_insert(at);
        }
    }
    followed
}

/// Whether one of the names leads to the file, and the image's owner may use
/// it: what anybody else's image says must not take it from its owner. `perm`
/// is what others need for that use.
fn leads_to<'a>(
    source: &Source,
    namer: &Namer,
    stat: &Stat,
    mut names: impl Iterator<Item = &'a String>,
    file: FileId,
    perm: u16,
) -> bool {
    names.any(|name| {
        let target = source.resolve(&namer.path, name);
        target.is_some_and(|target| target.id == file && may_name(stat.uid, &target, perm))
    })
}

/// Whether an image of that owner may have the file for a backing or data file,
/// as the gate decides it when the image is opened.
fn may_name(owner: u32, file: &Stat, perm: u16) -> bool {
    owner == 0 || owner == file.uid || file.perm & perm == perm
}

/// The directory that a path below SOURCE is in.
pub(super) fn parent(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new(""))
}
