//! Whether the images of the tree still find the files that they name once
//! something has another name: judged by the paths alone, before it is done.

use super::disk::Portrait;
use super::source::Source;
use std::path::{Component, Path, PathBuf};

/// A change of one name: of a file, or of a directory and all that lies below.
#[derive(Clone, Copy)]
pub struct Move<'a> {
    /// The tree.
    pub source: &'a Source,
    /// Path below SOURCE before.
    pub from: &'a Path,
    /// And after.
    pub to: &'a Path,
}

impl Move<'_> {
    /// The first file that an image at `path` names, finds, and would not find
    /// any more. A backing image may be named in several ways, of which one is
    /// enough.
    pub fn lost<'a>(&self, path: &Path, portrait: &'a Portrait) -> Option<&'a str> {
        let parts = portrait.files.iter().map(|file| file.name.as_str());
        let lost = |name: &&str| self.is_found(path, name) && !self.survives(path, name);
        let backing = portrait.backing.iter();
        let mut ways = backing
            .flat_map(|backing| &backing.names)
            .map(String::as_str)
            .filter(|name| self.is_found(path, name));
        let first = ways.clone().next();
        let kept = ways.any(|name| self.survives(path, name));
        parts.into_iter().find(lost).or(first.filter(|_| !kept))
    }

    fn is_found(&self, path: &Path, name: &str) -> bool {
        self.source.resolve(path, name).is_some()
    }

    fn survives(&self, path: &Path, name: &str) -> bool {
        let before = target(self.source, path, name).map(|target| self.moved(&target));
        before == target(self.source, &self.moved(path), name)
    }

    fn moved(&self, path: &Path) -> PathBuf {
        match path.strip_prefix(self.from) {
            Ok(rest) if rest.as_os_str().is_empty() => self.to.to_path_buf(),
            Ok(rest) => self.to.join(rest),
            Err(_) => path.to_path_buf(),
        }
    }
}

/// Where below the root a name in an image leads, links left aside; nothing if
/// it leads out.
pub fn target(source: &Source, path: &Path, name: &str) -> Option<PathBuf> {
    let mut target = PathBuf::new();
    for part in source.named(path, name)?.components() {
        match part {
            Component::Normal(name) => target.push(name),
            Component::ParentDir if !target.pop() => return None,
            Component::ParentDir | Component::CurDir => {}
            Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    Some(target)
}

#[cfg(test)]
mod tests {
    use super::*;
    use instar_guest::facts::{Backing, NamedFile};
    use instar_guest::proto::Format;

    fn portrait(parts: &[&str], backing: &[&str]) -> Portrait {
        let files = parts.iter().map(|name| NamedFile {
            name: name.to_string(),
            format: None,
        });
        let names = backing.iter().map(|name| name.to_string());
        let backing = (!backing.is_empty()).then(|| Backing {
            names: names.collect(),
            format: None,
            identity: None,
        });
        Portrait {
            format: Format::Vmdk,
            virtual_size: 0,
            backing,
            files: files.collect(),
        }
    }

    #[test]
    fn a_name_survives_if_it_still_leads_to_the_same_file() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("d")).unwrap();
        for name in ["part", "d/part", "base"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let source = Source::open(dir.path()).unwrap();
        let absolute = source.path().join("d/part");
        let absolute = absolute.to_str().unwrap();
        let lost = |from: &str, to: &str, image: &str, portrait: &Portrait| {
            let (from, to) = (Path::new(from), Path::new(to));
            let source = &source;
            let lost = Move { source, from, to }.lost(Path::new(image), portrait);
            lost.map(str::to_string)
        };
        let named = portrait(&["part"], &[]);
        // The image alone, in its directory and out of it.
        assert_eq!(lost("a", "b", "a", &named), None);
        assert_eq!(lost("a", "d/a", "a", &named).unwrap(), "part");
        // With its directory, and without.
        assert_eq!(lost("d", "e", "d/a", &named), None);
        let out = portrait(&["../part"], &[]);
        assert_eq!(lost("d", "e", "d/a", &out), None);
        assert_eq!(lost("d", "e/d", "d/a", &out).unwrap(), "../part");
        let into = portrait(&["d/part"], &[]);
        assert_eq!(lost("d", "e", "a", &into).unwrap(), "d/part");
        let fixed = portrait(&[absolute], &[]);
        assert_eq!(lost("a", "d/a", "a", &fixed), None);
        assert_eq!(lost("d", "e", "d/a", &fixed).unwrap(), absolute);
        // What is not found cannot be lost, and one of several ways is enough.
        assert_eq!(lost("a", "d/a", "a", &portrait(&["none"], &[])), None);
        assert_eq!(
            lost("a", "d/a", "a", &portrait(&[], &["base", absolute])),
            None
        );
        let backing = portrait(&[], &["none", "base"]);
        assert_eq!(lost("a", "d/a", "a", &backing).unwrap(), "base");
    }
}
