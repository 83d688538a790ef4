//! The gate that every file name in an image passes.
//!
//! An image may be hostile, and the names it holds are its way to reach other
//! files: the guest never opens anything, it only says a string. Here the host
//! decides whether that string may become a file. Default is no.

use super::error::{ErrorKind, Fault, printable_name};
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
}

impl Role {
    fn noun(self) -> &'static str {
        match self {
            Self::Backing => "backing file",
            Self::Data { .. } => "data file",
        }
    }

    fn writes(self) -> bool {
        self == Self::Data { write: true }
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
        Role::Data { .. } => format!("Could not open '{name}'"),
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
fn may_use(owner: u32, file: &Metadata, write: bool) -> bool {
    let others = if write { 0o006 } else { 0o004 };
    owner == 0 || owner == file.uid() || file.mode() & others == others
}

/// Whether the user who owns an image could go through the directory by
/// himself. Groups are not asked: which ones he is in is not known here.
fn may_pass(owner: u32, dir: &Metadata) -> bool {
    let search = if owner == dir.uid() { 0o100 } else { 0o001 };
    owner == 0 || dir.mode() & search != 0
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
mod tests {
    use super::*;
    use std::fs::{create_dir, write};
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    struct Fixture {
        dir: tempfile::TempDir,
        allowed: Vec<PathBuf>,
        owner: u32,
    }

    /// `tree/sub/image` names; `outside/secret` and `tree/base` lie around it.
    fn fixture() -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        let at = |path: &str| dir.path().join(path);
        create_dir(at("tree")).unwrap();
        create_dir(at("tree/sub")).unwrap();
        create_dir(at("outside")).unwrap();
        for file in ["tree/base", "tree/sub/near", "outside/secret", "tree/a:b"] {
            write(at(file), file).unwrap();
        }
        Fixture {
            dir,
            allowed: Vec::new(),
            owner: nix::unistd::getuid().as_raw(),
        }
    }

    impl Fixture {
        fn at(&self, path: &str) -> PathBuf {
            self.dir.path().join(path)
        }

        fn pass(&self, name: &str, role: Role) -> Result<String, (ErrorKind, String)> {
            let own = std::iter::once(self.at("tree"));
            let trees = own.chain(self.allowed.iter().cloned());
            let trees = trees.map(|path| Arc::new(Tree::open(&path).unwrap()));
            let gate = Gate {
                trees: trees.collect(),
                from: Spot {
                    tree: 0,
                    path: "sub/image".into(),
                },
                owners: vec![self.owner],
            };
            let passed = gate
                .pass(name, role)
                .map_err(|fault| (fault.kind, fault.message))?;
            Ok(io::read_to_string(passed.file).unwrap())
        }

        fn backing(&self, name: &str) -> Result<String, (ErrorKind, String)> {
            self.pass(name, Role::Backing)
        }

        fn refused(&self, name: &str, why: &str) {
            let text = format!("The backing file '{name}' {why}");
            assert_eq!(self.backing(name), Err((ErrorKind::Forbidden, text)));
        }
    }

    #[test]
    fn names_inside_the_tree_pass_relative_and_absolute() {
        let f = fixture();
        assert_eq!(f.backing("near").unwrap(), "tree/sub/near");
        assert_eq!(f.backing("../base").unwrap(), "tree/base");
        assert_eq!(f.backing("./../sub/near").unwrap(), "tree/sub/near");
        let absolute = f.at("tree/base");
        assert_eq!(f.backing(absolute.to_str().unwrap()).unwrap(), "tree/base");
    }

    #[test]
    fn a_link_that_stays_inside_passes() {
        let f = fixture();
        symlink("../base", f.at("tree/sub/link")).unwrap();
        assert_eq!(f.backing("link").unwrap(), "tree/base");
    }

    #[test]
    fn names_that_leave_the_tree_are_refused() {
        let f = fixture();
        f.refused("../../outside/secret", OUTSIDE);
        f.refused("/etc/passwd", OUTSIDE);
        f.refused("../../../../../../../../etc/passwd", OUTSIDE);
        f.refused(f.at("outside/secret").to_str().unwrap(), OUTSIDE);
        let sneaky = format!("{}/../outside/secret", f.at("tree").display());
        f.refused(&sneaky, OUTSIDE);
    }

    #[test]
    fn links_that_leave_the_tree_are_refused() {
        let f = fixture();
        symlink("../../outside/secret", f.at("tree/sub/file")).unwrap();
        symlink(f.at("outside"), f.at("tree/sub/dir")).unwrap();
        symlink("/proc/self/fd/0", f.at("tree/sub/magic")).unwrap();
        for name in ["file", "dir/secret", "magic"] {
            f.refused(name, OUTSIDE);
        }
    }

    #[test]
    fn an_allowed_path_opens_that_directory_and_no_other() {
        let mut f = fixture();
        f.allowed.push(f.at("outside"));
        assert_eq!(f.backing("../../outside/secret").unwrap(), "outside/secret");
        let absolute = f.at("outside/secret");
        assert_eq!(
            f.backing(absolute.to_str().unwrap()).unwrap(),
            "outside/secret"
        );
        f.refused("/etc/passwd", OUTSIDE);
    }

    #[test]
    fn protocols_are_refused_before_any_look_at_the_disk() {
        let f = fixture();
        for name in [
            "json:{\"driver\":\"nbd\"}",
            "nbd://host/x",
            "file:near",
            "a:b",
        ] {
            let shown = printable_name(name);
            f.refused(&shown, "names a protocol, not a file");
        }
        // With a slash before it, the colon is part of a file's name.
        assert_eq!(f.backing("../a:b").unwrap(), "tree/a:b");
    }

    #[test]
    fn only_regular_files_pass_and_none_blocks() {
        let f = fixture();
        let fifo = f.at("tree/sub/fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRUSR).unwrap();
        symlink("../sub", f.at("tree/sub/up")).unwrap();
        for name in ["fifo", "up", ".."] {
            f.refused(name, "is not a regular file");
        }
    }

    #[test]
    fn a_device_is_refused_without_being_opened() {
        let mut f = fixture();
        f.allowed.push("/dev".into());
        f.refused("/dev/null", "is not a regular file");
    }

    #[test]
    fn a_missing_file_is_told_as_such() {
        let f = fixture();
        assert_eq!(
            f.backing("gone"),
            Err((
                ErrorKind::Os(libc::ENOENT),
                "Could not open backing file: Could not open 'gone': No such file or directory"
                    .into()
            ))
        );
    }

    #[test]
    fn another_users_private_file_is_refused_and_a_public_one_passes() {
        let why = "belongs to another user and is not open to the owner of the image that names it";
        let mut f = fixture();
        let near = f.at("tree/sub/near");
        f.owner = 4242;
        std::fs::set_permissions(&near, PermissionsExt::from_mode(0o600)).unwrap();
        f.refused("near", why);
        std::fs::set_permissions(&near, PermissionsExt::from_mode(0o604)).unwrap();
        assert_eq!(f.backing("near").unwrap(), "tree/sub/near");
        let data = f.pass("near", Role::Data { write: true });
        assert_eq!(data.unwrap_err().1, format!("The data file 'near' {why}"));
        if nix::unistd::getuid().is_root() {
            std::fs::set_permissions(&near, PermissionsExt::from_mode(0o600)).unwrap();
            chown(&near, Some(4242), None).unwrap();
            assert_eq!(f.backing("near").unwrap(), "tree/sub/near");
        }
    }

    #[test]
    fn a_file_behind_another_users_private_directory_is_refused() {
        let mut f = fixture();
        let sub = f.at("tree/sub");
        symlink("sub/near", f.at("tree/link")).unwrap();
        let mode = |mode| std::fs::set_permissions(&sub, PermissionsExt::from_mode(mode)).unwrap();
        mode(0o700);
        for name in ["near", "../sub/near", "../link"] {
            assert_eq!(f.backing(name).unwrap(), "tree/sub/near");
        }
        f.owner = 4242;
        for name in ["near", "../sub/near", "../link"] {
            f.refused(name, CLOSED);
        }
        // What lies beside the directory is open, and what lies in it once
        // others may go through.
        assert_eq!(f.backing("../base").unwrap(), "tree/base");
        mode(0o701);
        assert_eq!(f.backing("near").unwrap(), "tree/sub/near");
        // The root's own permissions are not asked.
        std::fs::set_permissions(f.at("tree"), PermissionsExt::from_mode(0o700)).unwrap();
        assert_eq!(f.backing("near").unwrap(), "tree/sub/near");
    }

    #[test]
    fn every_owner_of_the_chain_must_be_able_to_read_the_file() {
        let f = fixture();
        std::fs::set_permissions(f.at("tree/base"), PermissionsExt::from_mode(0o600)).unwrap();
        let gate = Gate {
            trees: Arc::new([Arc::new(Tree::open(&f.at("tree")).unwrap())]),
            from: Spot {
                tree: 0,
                path: "image".into(),
            },
            owners: vec![4242],
        };
        // The second image of the chain belongs to the owner of `base`.
        let second = gate.next(gate.from.clone(), f.owner);
        assert_eq!(second.owners, [4242, f.owner]);
        assert_eq!(
            second.pass("base", Role::Backing).unwrap_err().kind,
            ErrorKind::Forbidden
        );
    }
}
