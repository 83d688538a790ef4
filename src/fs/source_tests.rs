//! What of a tree is reached, and what is not.

use super::*;
use std::os::unix::fs::symlink;

fn tree() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("a.raw"), [0; 512]).unwrap();
    std::fs::create_dir(dir.path().join("sub")).unwrap();
    std::fs::write(dir.path().join("sub/b.raw"), [0; 1024]).unwrap();
    symlink("/etc/passwd", dir.path().join("link.raw")).unwrap();
    symlink("/etc", dir.path().join("linked")).unwrap();
    nix::unistd::mkfifo(&dir.path().join("pipe.raw"), Mode::S_IRWXU).unwrap();
    dir
}

fn sorted(mut names: Vec<Name>) -> Vec<(String, Kind)> {
    names.sort_by(|a, b| a.name.cmp(&b.name));
    names
        .into_iter()
        .map(|n| (n.name.into_string().unwrap(), n.kind))
        .collect()
}

#[test]
fn only_directories_and_regular_files_are_listed() {
    let dir = tree();
    let source = Source::open(dir.path()).unwrap();
    assert_eq!(
        sorted(source.list(Path::new("")).unwrap()),
        [
            ("a.raw".to_string(), Kind::File),
            ("sub".to_string(), Kind::Directory)
        ]
    );
}

#[test]
fn a_link_leads_nowhere_as_a_file_and_as_a_directory() {
    let dir = tree();
    let source = Source::open(dir.path()).unwrap();
    for path in ["link.raw", "linked/passwd", "linked", "pipe.raw"] {
        let error = source.stat(Path::new(path)).unwrap_err();
        assert_eq!(error.errno, Errno::ENOENT, "{path}");
    }
    let error = source.open_file(Path::new("link.raw"), false).unwrap_err();
    assert_eq!(error.errno, Errno::ENOENT);
}

#[test]
fn nothing_above_the_root_is_reached() {
    let dir = tree();
    let source = Source::open(&dir.path().join("sub")).unwrap();
    let error = source.stat(Path::new("../a.raw")).unwrap_err();
    assert_eq!(error.errno, Errno::EXDEV);
    assert_eq!(source.resolve(Path::new("b.raw"), "../a.raw"), None);
}

#[test]
fn a_single_image_is_the_only_file() {
    let dir = tree();
    std::fs::write(dir.path().join("c.raw"), b"").unwrap();
    let source = Source::open(&dir.path().join("c.raw")).unwrap();
    assert_eq!(
        sorted(source.list(Path::new("")).unwrap()),
        [("c.raw".to_string(), Kind::File)]
    );
    assert_eq!(
        source.stat(Path::new("a.raw")).unwrap_err().errno,
        Errno::ENOENT
    );
    assert_eq!(source.stat(Path::new("c.raw")).unwrap().size, 0);
}

#[test]
fn a_name_resolves_relative_to_its_image_or_absolute() {
    let dir = tree();
    let source = Source::open(dir.path()).unwrap();
    let id = source.stat(Path::new("a.raw")).unwrap().id;
    let image = Path::new("sub/b.raw");
    let absolute = source.path().join("a.raw");
    let resolve = |name| source.resolve(image, name).map(|stat| stat.id);
    assert_eq!(resolve("../a.raw"), Some(id));
    assert_eq!(resolve(absolute.to_str().unwrap()), Some(id));
    assert_eq!(resolve("/etc/passwd"), None);
    assert_eq!(resolve("a.raw"), None);
}
