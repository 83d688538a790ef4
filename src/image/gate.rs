//! The gate that every file name in an image passes.
//!
//! An image may be hostile, and the names it holds are its way to reach other
//! files: the guest never opens anything, it only says a string. Here the host
//! decides whether that string may become a file. Default is no.

use super::error::{ErrorKind, Fault, printable_name};
use super::home::Home;
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use std::fs::{File, Metadata};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

/// A directory below which images may name files.
#[derive(Debug)]
pub struct Tree {
    root: OwnedFd,
    /// The root's absolute paths, for absolute names.
    paths: Vec<PathBuf>,
}

impl Tree {
    /// The tree below a directory.
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let root = nix::fcntl::open(path, flags, nix::sys::stat::Mode::empty())?;
        Ok(Self::new(root, path))
    }

    /// The tree below a directory that is open already; `path` is the path
    /// under which absolute names may refer to it.
    pub fn new(root: OwnedFd, path: &Path) -> Self {
        let mut paths: Vec<PathBuf> = Vec::new();
        for path in [std::path::absolute(path), path.canonicalize()] {
            paths.extend(path.ok().map(|path| lexical(&path)));
        }
        paths.dedup();
        Self { root, paths }
    }

    /// Opens a path below the root; no component, and no symbolic link on the
    /// way, may lead out of it.
    pub(crate) fn open_below(&self, path: &Path, flags: OFlag) -> io::Result<File> {
        let how = OpenHow::new()
            .flags(flags | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        loop {
            match openat2(&self.root, path, how) {
                // A rename on the way to a "..": the kernel could not decide.
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                opened => return Ok(opened?.into()),
            }
        }
    }

    /// What is left of an absolute path below the root.
    fn strip<'a>(&self, path: &'a Path) -> Option<&'a Path> {
        let rest = self
            .paths
            .iter()
            .find_map(|root| path.strip_prefix(root).ok())?;
        Some(rest)
    }
}

/// A path below one of the trees, by the tree's number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Spot {
    pub tree: usize,
    pub path: PathBuf,
}

impl Spot {
    /// Where the file can be looked up again.
    pub fn home(&self, gate: &Gate) -> Home {
        Home::Below(Arc::clone(&gate.trees[self.tree]), self.path.clone())
    }
}

/// Where the image that names a file lies, and what is open to it.
#[derive(Clone, Debug)]
pub(crate) struct Gate {
    /// The tree of the image that the user opened, then those that the user
    /// allowed besides.
    pub trees: Arc<[Arc<Tree>]>,
    /// The image that names files.
    pub from: Spot,
    /// Owners of the images in the chain so far; each must be able to read the
    /// file, or one tenant's image could read another's through a third.
    pub owners: Vec<u32>,
}

/// A file that passed.
#[derive(Debug)]
pub(crate) struct Passed {
    pub file: File,
    pub spot: Spot,
}

/// What a named file is used for, as texts call it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Backing,
    Data { write: bool },
    Extent { write: bool },
}

impl Role {
    pub fn noun(self) -> &'static str {
        match self {
            Self::Backing => "backing file",
            Self::Data { .. } => "data file",
            Self::Extent { .. } => "extent",
        }
    }

    fn writes(self) -> bool {
        matches!(
            self,
            Self::Data { write: true } | Self::Extent { write: true }
        )
    }
}

impl Gate {
    /// Opens the file that an image names, or says why not.
    pub fn pass(&self, name: &str, role: Role) -> Result<Passed, Fault> {
        if has_protocol(name) {
            return Err(forbidden(role, name, "names a protocol, not a file"));
        }
        let (found, spot) = self.find(name, role)?;
        let metadata = found.metadata()?;
        if !metadata.is_file() {
            return Err(forbidden(role, name, "is not a regular file"));
        }
        if !self
            .owners
            .iter()
            .all(|&owner| may_use(owner, &metadata, role.writes()))
        {
            return Err(forbidden(
                role,
                name,
                "belongs to another user and is not open to the owner of the image that names it",
            ));
        }
        self.check_ways(&spot, &found, role, name)?;
        let file =
            reopen(&found, role.writes()).map_err(|error| Fault::os(quoted(role, name), error))?;
        Ok(Passed { file, spot })
    }

    /// Refuses a file that an owner could not reach by himself: each directory
    /// between the tree's root and the place where the file really lies must let
    /// him through. That the root does is the user's word.
    fn check_ways(&self, spot: &Spot, found: &File, role: Role, name: &str) -> Result<(), Fault> {
        let closed = || forbidden(role, name, CLOSED);
        if self.owners.iter().all(|&owner| owner == 0) {
            return Ok(());
        }
        let tree = &self.trees[spot.tree];
        let place = place_of(found)?;
        let inside = place
            .strip_prefix(place_of(&tree.root)?)
            .map_err(|_| closed())?;
        for dir in inside
            .ancestors()
            .skip(1)
            .filter(|dir| *dir != Path::new(""))
        {
            let metadata = tree
                .open_below(dir, OFlag::O_PATH | OFlag::O_DIRECTORY)
                .and_then(|dir| dir.metadata())
                .map_err(|error| Fault::os(quoted(role, name), error))?;
            if !self.owners.iter().all(|&owner| may_pass(owner, &metadata)) {
                return Err(closed());
            }
        }
        Ok(())
    }

    /// Finds the name below one of the trees, without opening what it finds:
    /// opening a device can have effects.
    fn find(&self, name: &str, role: Role) -> Result<(File, Spot), Fault> {
        let mut missing = None;
        for spot in self.candidates(Path::new(name)) {
            match self.trees[spot.tree].open_below(&spot.path, OFlag::O_PATH) {
                Ok(file) => return Ok((file, spot)),
                Err(error) if error.raw_os_error() == Some(libc::EXDEV) => {}
                Err(error) => missing = Some(error),
            }
        }
        Err(match missing {
            Some(error) => Fault::os(quoted(role, name), error),
            None => forbidden(role, name, OUTSIDE)
                .with_hint("To allow it, name its directory with --allow-path.".to_string()),
        })
    }

    /// Every way to read the name as a path below a tree.
    fn candidates(&self, name: &Path) -> Vec<Spot> {
        let dir = self.from.path.parent().unwrap_or(Path::new(""));
        let mut candidates = Vec::new();
        let mut absolute = Vec::new();
        if name.is_absolute() {
            absolute.push(lexical(name));
        } else {
            candidates.push(Spot {
                tree: self.from.tree,
                path: dir.join(name),
            });
            let roots = &self.trees[self.from.tree].paths;
            absolute.extend(roots.iter().map(|root| lexical(&root.join(dir).join(name))));
        }
        for (tree, root) in self.trees.iter().enumerate() {
            let rest = absolute.iter().find_map(|path| root.strip(path));
            let spot = rest.map(|rest| Spot {
                tree,
                path: rest.to_path_buf(),
            });
            candidates.extend(spot.filter(|spot| !candidates.contains(spot)));
        }
        candidates
    }

    /// The gate for the names in an image that has itself passed this one.
    pub fn next(&self, spot: Spot, owner: u32) -> Self {
        let mut owners = self.owners.clone();
        if !owners.contains(&owner) {
            owners.push(owner);
        }
        Self {
            trees: Arc::clone(&self.trees),
            from: spot,
            owners,
        }
    }
}

/// Why a name is refused that no tree holds.
const OUTSIDE: &str = "lies outside the directories that the image may use";

/// Why a name is refused that the owner himself could not follow.
const CLOSED: &str = "lies in a directory that is not open to the owner of the image that names it";

/// As qemu says it.
fn quoted(role: Role, name: &str) -> String {
    let name = printable_name(name);
    match role {
        Role::Backing => format!("Could not open backing file: Could not open '{name}'"),
        Role::Data { .. } | Role::Extent { .. } => format!("Could not open '{name}'"),
    }
}

fn forbidden(role: Role, name: &str, why: &str) -> Fault {
    Fault::new(
        ErrorKind::Forbidden,
        format!("The {} '{}' {why}", role.noun(), printable_name(name)),
    )
}

/// Whether QEMU would take the name for a protocol's: a colon before any slash
/// (block.c, path_has_protocol).
fn has_protocol(name: &str) -> bool {
    name.split('/')
        .next()
        .is_some_and(|first| first.contains(':'))
}

/// Whether the user who owns an image could use the file by himself.
pub(crate) fn may_use(owner: u32, file: &Metadata, write: bool) -> bool {
    let others = if write { 0o006 } else { 0o004 };
    owner == 0 || owner == file.uid() || file.mode() & others == others
}

/// Whether the user who owns an image could go through the directory by
/// himself. Groups are not asked: which ones he is in is not known here.
fn may_pass(owner: u32, dir: &Metadata) -> bool {
    let search = if owner == dir.uid() { 0o100 } else { 0o001 };
    owner == 0 || dir.mode() & search != 0
}

/// Whether the user who owns an image could make, replace or remove a name in
/// the directory by himself; `file` is the one that has the name. Where he is
/// the one who runs this program, the kernel judges.
pub(crate) fn may_rename(owner: u32, dir: &Metadata, file: Option<&Metadata>) -> bool {
    if owner == 0 || owner == dir.uid() || owner == nix::unistd::geteuid().as_raw() {
        return true;
    }
    let sticky = dir.mode() & 0o1000 != 0;
    let his = file.is_none_or(|file| owner == file.uid());
    dir.mode() & 0o003 == 0o003 && (his || !sticky)
}

/// Where an open file lies: links on the way to it do not show.
fn place_of(file: &impl AsRawFd) -> io::Result<PathBuf> {
    std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Opens for real what was found, by descriptor: nothing can have been put in
/// its place.
fn reopen(found: &File, write: bool) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).write(write);
    std::os::unix::fs::OpenOptionsExt::custom_flags(
        &mut options,
        libc::O_NONBLOCK | libc::O_NOCTTY,
    );
    options.open(format!("/proc/self/fd/{}", found.as_raw_fd()))
}

/// The path without `.` and `..`, by its text alone. What it names is decided
/// by the kernel below a tree; this only finds the tree.
fn lexical(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => {
                out.pop();
            }
            other => out.push(other),
        }
    }
    out
}

#[cfg(test)]
#[path = "gate_tests.rs"]
mod tests;
