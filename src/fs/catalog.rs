//! What every file of the tree is, remembered for as long as it does not
//! change, and which files another image names.

use super::disk::{At, Library, Portrait};
use super::error::{Error, Result};
use super::names::{FormatRules, is_replacement, may_be_a_part};
use super::source::{FileId, Kind, Source, Stat, Time};
use super::sync::lock;
use crate::image::NameRule;
use instar_guest::proto::Format;
use nix::errno::Errno;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Files remembered; past that, everything is forgotten and looked at again.
const REMEMBERED: usize = 64 << 10;
/// Time stamps of files advance in steps of up to 10 ms (one tick). What was
/// looked at sooner than this after a change may change again unnoticed.
const TICK: Duration = Duration::from_millis(20);

/// Permission of others to read a file.
const OTHERS_READ: u16 = 0o004;
/// Permission of others to write a file.
const OTHERS_WRITE: u16 = 0o002;

/// What a file is to the mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Face {
    /// An image.
    Image(Portrait),
    /// An image that cannot be used: shown with size 0.
    Unusable(Error),
    /// No image, or part of another one: not shown.
    Hidden,
}

/// The version of a file that a face belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    size: u64,
    mtime: Time,
    ctime: Time,
}

/// A file, and the format that it is read as.
type Look = (FileId, Option<Format>);

/// What an image names, to be resolved when it matters.
#[derive(Clone, Debug)]
struct Naming {
    path: PathBuf,
    backing: Vec<String>,
    files: Vec<String>,
}

/// A look at all images of a directory. Done once; who comes second waits for
/// the first.
struct Survey {
    /// The directory as it was before.
    of: Stamp,
    /// Whether its time stamps tell every change since.
    lasts: bool,
    done: OnceLock<()>,
}

/// See the module.
pub struct Catalog {
    formats: FormatRules,
    library: Box<dyn Library>,
    faces: Mutex<HashMap<Look, (Stamp, Face)>>,
    namings: Mutex<HashMap<FileId, Naming>>,
    /// Directories whose images have been asked for the names they hold.
    surveys: Mutex<HashMap<(PathBuf, FileId), Arc<Survey>>>,
}

impl Catalog {
    /// An empty catalog.
    pub fn new(library: Box<dyn Library>, formats: FormatRules) -> Self {
        Self {
            formats,
            library,
            faces: Mutex::default(),
            namings: Mutex::default(),
            surveys: Mutex::default(),
        }
    }

    /// The library that opens what the catalog describes.
    pub fn library(&self) -> &dyn Library {
        self.library.as_ref()
    }

    /// The format that a file must be opened as; `None` probes.
    pub fn format_for(&self, path: &Path) -> Option<Format> {
        match self.formats.rule_for(path) {
            NameRule::Raw => Some(Format::Raw),
            NameRule::Must(format) => Some(format),
            NameRule::Probe => None,
        }
    }

    /// What a regular file is.
    pub fn face(&self, source: &Source, path: &Path, stat: &Stat) -> Face {
        if is_replacement(path) {
            return Face::Hidden;
        }
        let rule = self.formats.rule_for(path);
        if may_be_a_part(rule) {
            self.survey_siblings(source, path);
        }
        let face = match rule {
            NameRule::Raw => Face::Image(raw_portrait(stat)),
            NameRule::Must(format) => self.described(source, path, stat, Some(format)),
            NameRule::Probe => self.described(source, path, stat, None),
        };
        if face != Face::Hidden && self.is_part(source, stat.id) {
            return Face::Hidden;
        }
        face
    }

    /// Disk space of the other files that an image names for its parts, in
    /// blocks of 512 bytes.
    pub fn blocks_of_parts(&self, source: &Source, path: &Path, portrait: &Portrait) -> u64 {
        let files = portrait.files.iter();
        let found = files.filter_map(|file| source.resolve(path, &file.name));
        found.fold(0, |sum, part| part.blocks.saturating_add(sum))
    }

    /// Whether another image of the tree names the file as its backing image.
    /// Looks at every image of the tree that has changed.
    pub fn is_backing(&self, source: &Source, file: FileId) -> bool {
        let mut directories = vec![PathBuf::new()];
        while let Some(directory) = directories.pop() {
            directories.extend(self.survey(source, &directory));
        }
        self.named(source, file, OTHERS_READ, |naming| &naming.backing)
    }

    /// Looks at every image of a directory that may name other files, and
    /// answers its subdirectories.
    fn survey(&self, source: &Source, directory: &Path) -> Vec<PathBuf> {
        let mut subdirectories = Vec::new();
        for entry in source.list(directory).unwrap_or_default() {
            let path = directory.join(&entry.name);
            if is_replacement(&path) {
                continue;
            }
            let format = match (entry.kind, self.formats.rule_for(&path)) {
                (Kind::Directory, _) => {
                    subdirectories.push(path);
                    continue;
                }
                (Kind::File, NameRule::Must(format)) => Some(format),
                (Kind::File, NameRule::Probe) => None,
                (Kind::File, NameRule::Raw) => continue,
            };
            if let Ok(stat) = source.stat(&path) {
                self.described(source, &path, &stat, format);
            }
        }
        subdirectories
    }

    /// Before a file is shown that may be a part of an image, its neighbours are
    /// asked whether it is: once, until something in the directory changes.
    fn survey_siblings(&self, source: &Source, path: &Path) {
        let directory = path.parent().unwrap_or(Path::new(""));
        let Ok(stat) = source.stat(directory) else {
            return;
        };
        let key = (directory.to_path_buf(), stat.id);
        let survey = {
            let mut surveys = lock(&self.surveys);
            if surveys.len() >= REMEMBERED {
                surveys.clear();
            }
            match surveys.get(&key) {
                Some(survey) if survey.of == Stamp::of(&stat) && survey.lasts => Arc::clone(survey),
                _ => {
                    let survey = Arc::new(Survey {
                        of: Stamp::of(&stat),
                        lasts: settled(&stat),
                        done: OnceLock::new(),
                    });
                    surveys.insert(key, Arc::clone(&survey));
                    survey
                }
            }
        };
        // Whoever comes second waits: until then the answer is not known.
        survey.done.get_or_init(|| {
            self.survey(source, directory);
        });
    }

    fn is_part(&self, source: &Source, file: FileId) -> bool {
        self.named(source, file, OTHERS_READ | OTHERS_WRITE, |naming| {
            &naming.files
        })
    }

    /// Whether an image whose owner may use the file names it: what anybody
    /// else's image says must not take it from its owner. `perm` is what others
    /// need for that use.
    fn named(
        &self,
        source: &Source,
        file: FileId,
        perm: u16,
        field: impl Fn(&Naming) -> &[String],
    ) -> bool {
        let namings: Vec<(FileId, PathBuf, String)> = lock(&self.namings)
            .iter()
            .flat_map(|(id, naming)| {
                let names = field(naming).iter();
                names.map(|name| (*id, naming.path.clone(), name.clone()))
            })
            .collect();
        namings.iter().any(|(namer, path, name)| {
            let stat = source.stat(path);
            let is_gone = match &stat {
                Ok(stat) => stat.id != *namer,
                Err(error) => error.errno == Errno::ENOENT,
            };
            if is_gone {
                self.forget_naming(*namer, path);
            }
            *namer != file
                && stat.is_ok_and(|stat| {
                    stat.id == *namer
                        && source.resolve(path, name).is_some_and(|target| {
                            target.id == file && may_name(stat.uid, &target, perm)
                        })
                })
        })
    }

    /// Forgets what an image names that is not where it was: if it has moved,
    /// it is looked at under its new name.
    fn forget_naming(&self, namer: FileId, path: &Path) {
        let mut namings = lock(&self.namings);
        if namings
            .get(&namer)
            .is_some_and(|naming| naming.path == path)
        {
            namings.remove(&namer);
        }
    }

    fn described(&self, source: &Source, path: &Path, stat: &Stat, format: Option<Format>) -> Face {
        let key = (stat.id, format);
        let stamp = Stamp::of(stat);
        let known = lock(&self.faces).get(&key).cloned();
        if let Some((_, face)) = known.filter(|(known, _)| *known == stamp) {
            self.note_names(path, stat.id, &face);
            return face;
        }
        let (face, keep) = match self.look(source, path, format) {
            Ok((face, seen)) => (face, seen == stamp && settled(stat)),
            Err(error) => {
                let keep = !error.is_passing() && settled(stat);
                (Face::Unusable(error.of_opening()), keep)
            }
        };
        self.note_names(path, stat.id, &face);
        if keep {
            let mut faces = lock(&self.faces);
            if faces.len() >= REMEMBERED {
                faces.clear();
            }
            faces.insert(key, (stamp, face.clone()));
        }
        face
    }

    fn look(&self, source: &Source, path: &Path, format: Option<Format>) -> Result<(Face, Stamp)> {
        let (file, stat) = source.open_file(path, false)?;
        let at = At {
            source,
            path,
            format,
        };
        let portrait = self.library.describe(at, file)?;
        let face = if format.is_none() && portrait.format == Format::Raw {
            Face::Hidden
        } else {
            Face::Image(portrait)
        };
        Ok((face, Stamp::of(&stat)))
    }

    fn note_names(&self, path: &Path, id: FileId, face: &Face) {
        let mut namings = lock(&self.namings);
        match face {
            Face::Image(portrait) if portrait.backing.is_some() || !portrait.files.is_empty() => {
                let (backing, files) = (portrait.backing.as_ref(), portrait.files.iter());
                let naming = Naming {
                    path: path.to_path_buf(),
                    backing: backing.map(|named| named.names.clone()).unwrap_or_default(),
                    files: files.map(|named| named.name.clone()).collect(),
                };
                namings.insert(id, naming);
            }
            // What it names is as little known as the rest.
            Face::Unusable(error) if error.is_passing() => {}
            _ => {
                namings.remove(&id);
            }
        }
    }
}

impl Stamp {
    fn of(stat: &Stat) -> Self {
        Self {
            size: stat.size,
            mtime: stat.mtime,
            ctime: stat.ctime,
        }
    }
}

/// Whether an image of that owner may have the file for a backing or data file,
/// as the gate decides it when the image is opened.
fn may_name(owner: u32, file: &Stat, perm: u16) -> bool {
    owner == 0 || owner == file.uid || file.perm & perm == perm
}

fn raw_portrait(stat: &Stat) -> Portrait {
    Portrait {
        format: Format::Raw,
        virtual_size: stat.size,
        cluster_size: None,
        backing: None,
        files: Vec::new(),
    }
}

/// Whether the file last changed long enough ago for its time stamp to tell a
/// further change.
fn settled(stat: &Stat) -> bool {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let changed = u64::try_from(stat.ctime.sec)
        .map(|sec| Duration::new(sec, stat.ctime.nsec))
        .unwrap_or_default();
    now >= changed + TICK
}
