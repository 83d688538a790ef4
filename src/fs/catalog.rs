//! What every file of the tree is, remembered for as long as it does not
//! change.

use super::crew::together;
use super::disk::{At, Library, Portrait};
use super::error::{Error, Result};
use super::moves::{self, Move};
use super::names::{FormatRules, is_replacement, may_be_a_part};
use super::namings::{Namings, parent};
use super::source::{FileId, Kind, Name, Source, Stat, Time};
use super::sync::lock;
use crate::image::NameRule;
use instar_guest::proto::Format;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Files remembered; past that, everything is forgotten and looked at again.
const REMEMBERED: usize = 64 << 10;
/// Time stamps of files advance in steps of up to 10 ms (one tick). What was
/// looked at sooner than this after a change may change again unnoticed.
const TICK: Duration = Duration::from_millis(20);

/// What a file is to the mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Face {
    /// An image.
    Image(Arc<Portrait>),
    /// An empty file that is to become an image of this format.
    Blank(Format),
    /// An image that cannot be used: shown with size 0.
    Unusable(Error),
    /// No image, or part of another one: not shown.
    Hidden,
}

/// The version of a file that a face belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    size: u64,
    mtime: Time,
    ctime: Time,
}

/// A file, and the format that it is read as.
type Look = (FileId, Option<Format>);

/// A look at all images of a directory. Done once; who comes second waits for
/// the first.
struct Survey {
    /// The directory as it was before.
    of: Stamp,
    /// Whether its time stamps tell every change since.
    lasts: bool,
    done: OnceLock<()>,
}

type Surveys = HashMap<(PathBuf, FileId), Arc<Survey>>;

/// See the module.
pub struct Catalog {
    formats: FormatRules,
    library: Box<dyn Library>,
    faces: Mutex<HashMap<Look, (Stamp, Face)>>,
    namings: Namings,
    /// Directories whose images have been asked for the names they hold.
    surveys: Mutex<Surveys>,
}

impl Catalog {
    /// An empty catalog.
    pub fn new(library: Box<dyn Library>, formats: FormatRules) -> Self {
        Self {
            formats,
            library,
            faces: Mutex::default(),
            namings: Namings::default(),
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
        let directory = source.stat(parent(path)).ok();
        if let Some(directory) = directory.filter(|_| may_be_a_part(rule)) {
            self.survey_once(source, parent(path), &directory);
        }
        let face = match rule {
            NameRule::Raw => Face::Image(Arc::new(raw_portrait(stat))),
            NameRule::Must(format) if stat.size == 0 => {
                self.namings.remove(stat.id);
                Face::Blank(format)
            }
            NameRule::Must(format) => self.described(source, path, stat, Some(format)),
            NameRule::Probe => self.described(source, path, stat, None),
        };
        let is_part = |directory: &Stat| {
            let namings = &self.namings;
            namings.is_part(source, path, stat.id, directory, None)
        };
        match face != Face::Hidden && directory.as_ref().is_some_and(is_part) {
            true => Face::Hidden,
            false => face,
        }
    }

    /// What the name of a file says about its format.
    pub fn rule_for(&self, path: &Path) -> NameRule {
        self.formats.rule_for(path)
    }

    /// Whether what names say depends on the directories that they are in.
    pub fn has_rules_for_paths(&self) -> bool {
        self.formats.has_paths()
    }

    /// Whether the file is used by any other image of the tree than `image`, of
    /// which it is a part, as far as they are known: to be asked after
    /// [`survey_all`](Self::survey_all).
    pub fn is_used_besides(&self, source: &Source, path: &Path, id: FileId, image: FileId) -> bool {
        let is_part = |directory: &Stat| {
            let namings = &self.namings;
            namings.is_part(source, path, id, directory, Some(image))
        };
        source.stat(parent(path)).as_ref().is_ok_and(is_part) || self.namings.is_backing(source, id)
    }

    /// An image of the tree that would not find a file any more that it names.
    pub fn disturbed_by(&self, moved: Move<'_>) -> Option<(PathBuf, String)> {
        self.survey_all(moved.source);
        self.namings.all().into_iter().find_map(|(path, portrait)| {
            let lost = moved.lost(&path, &portrait)?.to_string();
            Some((path, lost))
        })
    }

    /// An image that names a file at this path, be it there or not, for a part.
    pub fn expects(&self, source: &Source, path: &Path) -> Option<PathBuf> {
        self.survey_siblings(source, path);
        let names = |portrait: &Portrait, by: &Path| {
            let mut files = portrait.files.iter();
            files.any(|file| moves::target(source, by, &file.name).as_deref() == Some(path))
        };
        let all = self.namings.all().into_iter();
        all.map(|(by, portrait)| (names(&portrait, &by), by))
            .find_map(|(names, by)| (names && by != path).then_some(by))
    }

    /// Disk space of the other files that an image names for its parts, in
    /// blocks of 512 bytes.
    pub fn blocks_of_parts(
        &self,
        source: &Source,
        path: &Path,
        id: FileId,
        portrait: &Portrait,
    ) -> u64 {
        self.namings.blocks_of_parts(source, path, id, portrait)
    }

    /// Whether another image of the tree names the file as its backing image.
    /// Looks at every image of the tree that has changed.
    pub fn is_backing(&self, source: &Source, file: FileId) -> bool {
        self.survey_all(source);
        self.namings.is_backing(source, file)
    }

    /// Looks at every image of the tree that has changed.
    pub fn survey_all(&self, source: &Source) {
        let mut directories = vec![PathBuf::new()];
        while let Some(directory) = directories.pop() {
            let before = source.stat(&directory);
            directories.extend(self.survey(source, &directory));
            if let Ok(before) = before {
                let survey = Arc::new(Survey::of(&before));
                survey.done.get_or_init(|| ());
                remember(&mut lock(&self.surveys), (directory, before.id), survey);
            }
        }
    }

    /// Looks at every image of a directory that may name other files, and
    /// answers its subdirectories.
    fn survey(&self, source: &Source, directory: &Path) -> Vec<PathBuf> {
        let entries = source.list(directory).unwrap_or_default();
        let (files, directories): (Vec<_>, Vec<_>) = entries
            .into_iter()
            .partition(|entry| entry.kind == Kind::File);
        let files: Vec<Name> = files
            .into_iter()
            .filter(|file| self.may_name_files(&directory.join(&file.name)))
            .collect();
        let stats = source.stat_in(directory, &files).unwrap_or_default();
        let found: Vec<(Name, Option<Stat>)> = files.into_iter().zip(stats).collect();
        together(&found, |(file, stat)| {
            // An empty file is none yet.
            if let Some(stat) = stat.filter(|stat| stat.kind == Kind::File && stat.size > 0) {
                let path = directory.join(&file.name);
                self.described(source, &path, &stat, self.format_for(&path));
            }
        });
        let paths = directories
            .into_iter()
            .map(|name| directory.join(name.name));
        paths.filter(|path| !is_replacement(path)).collect()
    }

    /// Whether it may be an image that names others: what is raw says nothing.
    fn may_name_files(&self, path: &Path) -> bool {
        !is_replacement(path) && self.formats.rule_for(path) != NameRule::Raw
    }

    /// Before a file is shown that may be a part of an image, its neighbours are
    /// asked whether it is: once, until something in the directory changes.
    pub fn survey_siblings(&self, source: &Source, path: &Path) {
        let directory = parent(path);
        if let Ok(stat) = source.stat(directory) {
            self.survey_once(source, directory, &stat);
        }
    }

    fn survey_once(&self, source: &Source, directory: &Path, stat: &Stat) {
        let key = (directory.to_path_buf(), stat.id);
        let survey = {
            let mut surveys = lock(&self.surveys);
            match surveys.get(&key) {
                Some(survey) if survey.of == Stamp::of(stat) && survey.lasts => Arc::clone(survey),
                _ => {
                    let survey = Arc::new(Survey::of(stat));
                    remember(&mut surveys, key, Arc::clone(&survey));
                    survey
                }
            }
        };
        // Whoever comes second waits: until then the answer is not known.
        survey.done.get_or_init(|| {
            self.survey(source, directory);
        });
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
                let keep = !error.is_of_the_machine() && settled(stat);
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
            Face::Image(Arc::new(portrait))
        };
        Ok((face, Stamp::of(&stat)))
    }

    fn note_names(&self, path: &Path, id: FileId, face: &Face) {
        match face {
            Face::Image(portrait) => self.namings.note(path, id, portrait),
            // What it names is as little known as the rest.
            Face::Unusable(error) if error.is_of_the_machine() => {}
            _ => self.namings.remove(id),
        }
    }
}

impl Survey {
    /// A look that is to be taken at a directory with these attributes.
    fn of(directory: &Stat) -> Self {
        Self {
            of: Stamp::of(directory),
            lasts: settled(directory),
            done: OnceLock::new(),
        }
    }
}

impl Stamp {
    /// The version of which these are the attributes.
    pub(super) fn of(stat: &Stat) -> Self {
        Self {
            size: stat.size,
            mtime: stat.mtime,
            ctime: stat.ctime,
        }
    }
}

fn remember(surveys: &mut Surveys, key: (PathBuf, FileId), survey: Arc<Survey>) {
    if surveys.len() >= REMEMBERED {
        surveys.clear();
    }
    surveys.insert(key, survey);
}

fn raw_portrait(stat: &Stat) -> Portrait {
    Portrait {
        format: Format::Raw,
        virtual_size: stat.size,
        backing: None,
        files: Vec::new(),
    }
}

/// Whether the file last changed long enough ago for its time stamp to tell a
/// further change.
pub(super) fn settled(stat: &Stat) -> bool {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let changed = u64::try_from(stat.ctime.sec)
        .map(|sec| Duration::new(sec, stat.ctime.nsec))
        .unwrap_or_default();
    now >= changed + TICK
}
