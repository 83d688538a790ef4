//! Names that pass the gate, and names that do not.

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
            "Could not open backing file: Could not open 'gone': No such file or directory".into()
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
