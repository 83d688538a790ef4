//! New images: complete or not there.

use crate::lab::{Case, equal, run, text};
use crate::machine::Outcome;
use instar::image::{Access, Blank, ErrorKind, Location, OpenOptions, Tree, create};
use instar::sandbox::Pool;
use instar_guest::Format;
use instar_guest::proto::Create;
use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;

pub const CASES: &[Case] = &[
    ("a new image is clean and alone in its directory", fresh),
    ("an existing file is replaced in place", existing),
    (
        "a refused request leaves nothing and changes nothing",
        refused,
    ),
    ("a locked file is not overwritten", locked),
    ("a directory that does not exist is told", missing_directory),
    (
        "an empty file whose image cannot be opened is empty again and locked",
        not_opened,
    ),
];

fn request(format: Format, size: u64) -> Create {
    Create {
        format,
        size,
        options: Vec::new(),
        backing: None,
        backing_size: None,
        backing_identity: None,
    }
}

const FORMATS: [Format; 2] = [Format::Raw, Format::Qcow2];

fn names(dir: &Path) -> Result<Vec<String>, String> {
    let entries = fs::read_dir(dir).map_err(text)?;
    let name = |entry: fs::DirEntry| entry.file_name().to_string_lossy().into_owned();
    entries.map(|entry| entry.map(name).map_err(text)).collect()
}

/// qemu-img takes the file for an empty disk of this format and size.
fn judge(path: &Path, format: Format, size: u64) -> Outcome {
    let path = path.to_string_lossy();
    let info = run(
        "qemu-img",
        &["info", "-f", format.name(), "--output=json", &path],
    )?;
    let expected = format!("\"virtual-size\": {size}");
    equal(info.contains(&expected), true, &info)?;
    if format == Format::Qcow2 {
        run("qemu-img", &["check", &path])?;
    }
    Ok(())
}

fn fresh(pool: &Arc<Pool>) -> Outcome {
    for format in FORMATS {
        for size in [0, 512, 1 << 20, 1 << 40] {
            let dir = tempfile::tempdir().map_err(text)?;
            let path = dir.path().join("new");
            create(pool, &path, &request(format, size)).map_err(text)?;
            equal(names(dir.path())?, vec!["new".to_string()], "directory")?;
            judge(&path, format, size)?;
            use std::os::unix::fs::PermissionsExt;
            let mode = fs::metadata(&path).map_err(text)?.permissions().mode();
            equal(mode & 0o777, 0o644, "mode")?;
        }
    }
    Ok(())
}

fn existing(pool: &Arc<Pool>) -> Outcome {
    for format in FORMATS {
        let dir = tempfile::tempdir().map_err(text)?;
        let path = dir.path().join("old");
        fs::write(&path, vec![7; 3 << 20]).map_err(text)?;
        let link = dir.path().join("link");
        fs::hard_link(&path, &link).map_err(text)?;
        create(pool, &path, &request(format, 1 << 20)).map_err(text)?;
        judge(&link, format, 1 << 20)?;
    }
    Ok(())
}

fn refused(pool: &Arc<Pool>) -> Outcome {
    let dir = tempfile::tempdir().map_err(text)?;
    let mut wrong = request(Format::Qcow2, 1 << 20);
    wrong.options = vec![("cluster_size".into(), "7".into())];
    let path = dir.path().join("new");
    let error = create(pool, &path, &wrong).err().ok_or("created")?;
    equal(error.kind(), ErrorKind::InvalidRequest, "kind")?;
    equal(names(dir.path())?, Vec::<String>::new(), "directory")?;
    fs::write(&path, b"precious").map_err(text)?;
    create(pool, &path, &wrong).err().ok_or("created")?;
    equal(fs::read(&path).map_err(text)?, b"precious".to_vec(), "file")
}

fn locked(pool: &Arc<Pool>) -> Outcome {
    let dir = tempfile::tempdir().map_err(text)?;
    let path = dir.path().join("held");
    create(pool, &path, &request(Format::Qcow2, 1 << 20)).map_err(text)?;
    let before = fs::read(&path).map_err(text)?;
    let _held = OpenOptions::new(Access::Read)
        .open(pool, &path)
        .map_err(text)?;
    let error = create(pool, &path, &request(Format::Raw, 1 << 20))
        .err()
        .ok_or("created")?;
    equal(error.kind(), ErrorKind::Locked, "kind")?;
    equal(error.message(), "Failed to get \"write\" lock", "message")?;
    equal(fs::read(&path).map_err(text)?, before, "file")
}

fn not_opened(pool: &Arc<Pool>) -> Outcome {
    let dir = tempfile::tempdir().map_err(text)?;
    let path = dir.path().join("new");
    fs::write(&path, b"").map_err(text)?;
    let at = Location {
        path: path.clone(),
        tree: Arc::new(Tree::open(dir.path()).map_err(text)?),
        inside: "new".into(),
    };
    let writable = || File::options().read(true).write(true).open(&path);
    let format = Format::Qcow2;
    let blank = Blank::open(writable().map_err(text)?, at, format, Access::Write).map_err(text)?;
    let good = OpenOptions {
        format: Some(format),
        ..OpenOptions::new(Access::Write)
    };
    // What a writer may not ask for.
    let bad = OpenOptions {
        force_share: true,
        ..good.clone()
    };
    let wanted = request(format, 1 << 20);
    let error = blank.create(pool, &wanted, &bad).err().ok_or("opened")?;
    equal(error.kind(), ErrorKind::InvalidRequest, "kind")?;
    equal(fs::metadata(&path).map_err(text)?.len(), 0, "length")?;
    let other = create(pool, &path, &wanted).err().ok_or("not locked")?;
    equal(other.kind(), ErrorKind::Locked, "kind")?;
    drop(blank.create(pool, &wanted, &good).map_err(text)?);
    judge(&path, format, 1 << 20)
}

fn missing_directory(pool: &Arc<Pool>) -> Outcome {
    let dir = tempfile::tempdir().map_err(text)?;
    let path = dir.path().join("gone/new");
    let error = create(pool, &path, &request(Format::Raw, 512))
        .err()
        .ok_or("created")?;
    equal(error.kind(), ErrorKind::Os(libc::ENOENT), "kind")?;
    equal(error.message(), "No such file or directory", "message")
}
