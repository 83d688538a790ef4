//! Images of several files, against qemu's tools: opened, read, locked, made.

use crate::lab::{Case, equal, run, same, text};
use crate::machine::Outcome;
use instar::image::{Access, CheckEvent, ErrorKind, Image, OpenOptions, ResizeOptions, create};
use instar::sandbox::Pool;
use instar_guest::Format;
use instar_guest::findings::{Repair, Report};
use instar_guest::proto::Create;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub const CASES: &[Case] = &[
    ("every extent is read as qemu reads it", read),
    ("an extent in use keeps a writer out", extent_in_use),
    ("a writer keeps qemu out of every extent", keeps_out),
    ("an extent that is gone is told by its name", gone),
    ("a new image of several files is whole", made),
    ("extents that are there are made anew in place", made_anew),
    ("files come and go with the size", resized),
    ("a descriptor with a second name stays", second_name),
    ("what an interrupted resize left goes", left),
    ("leaks are repaired to qemu's satisfaction", repaired),
];

const SUBFORMATS: [&str; 3] = [
    "monolithicFlat",
    "twoGbMaxExtentFlat",
    "twoGbMaxExtentSparse",
];
const GIB: u64 = 1 << 30;
const SIZE: u64 = 5 * GIB;
/// Offsets of what is written, on both sides of where extents meet.
const WRITTEN: [u64; 3] = [0, 2 * GIB - 65536, 4 * GIB];
const PIECE: usize = 131072;

/// A VMDK of this kind in a directory of its own, with something in it.
fn image(subformat: &str) -> Result<(tempfile::TempDir, PathBuf), String> {
    let dir = tempfile::tempdir().map_err(text)?;
    let path = dir.path().join("disk.vmdk");
    let name = path.to_string_lossy();
    let option = format!("subformat={subformat}");
    run(
        "qemu-img",
        &["create", "-q", "-f", "vmdk", "-o", &option, &name, "5G"],
    )?;
    let writes = WRITTEN.iter().enumerate();
    let writes: Vec<String> = writes
        .map(|(index, at)| format!("write -P {} {at} {PIECE}", index + 1))
        .collect();
    let commands: Vec<&str> = writes.iter().flat_map(|write| ["-c", write]).collect();
    run(
        "qemu-io",
        &[&["-f", "vmdk"], &commands[..], &[&name]].concat(),
    )?;
    Ok((dir, path))
}

fn open(pool: &Arc<Pool>, path: &Path, access: Access) -> Result<Image, instar::image::Error> {
    let mut options = OpenOptions::new(access);
    options.format = Some(Format::Vmdk);
    options.open(pool, path)
}

/// The files beside the descriptor.
fn extents(dir: &Path) -> Result<Vec<PathBuf>, String> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(dir).map_err(text)? {
        paths.push(entry.map_err(text)?.path());
    }
    paths.retain(|path| path.file_name().is_some_and(|name| name != "disk.vmdk"));
    paths.sort();
    Ok(paths)
}

fn read(pool: &Arc<Pool>) -> Outcome {
    for subformat in SUBFORMATS {
        let (_dir, path) = image(subformat)?;
        let image = open(pool, &path, Access::Read).map_err(text)?;
        equal(image.virtual_size(), SIZE, "size")?;
        let mut piece = vec![0; PIECE];
        for (index, at) in WRITTEN.into_iter().enumerate() {
            image.read_at(&mut piece, at).map_err(text)?;
            same(&piece, &vec![index as u8 + 1; PIECE], subformat)?;
        }
        image.read_at(&mut piece, GIB).map_err(text)?;
        same(&piece, &vec![0; PIECE], subformat)?;
    }
    Ok(())
}

fn extent_in_use(pool: &Arc<Pool>) -> Outcome {
    for subformat in SUBFORMATS {
        let (dir, path) = image(subformat)?;
        for extent in extents(dir.path())? {
            // Held as an image of its own: as raw bytes, for writing.
            let held = OpenOptions {
                format: Some(Format::Raw),
                ..OpenOptions::new(Access::Write)
            };
            let held = held.open(pool, &extent).map_err(text)?;
            for access in [Access::Read, Access::Write] {
                let error = open(pool, &path, access).err().ok_or("it was opened")?;
                equal(error.kind(), ErrorKind::Locked, &error.to_string())?;
            }
            drop(held);
        }
        open(pool, &path, Access::Write).map_err(text)?;
    }
    Ok(())
}

fn keeps_out(pool: &Arc<Pool>) -> Outcome {
    let (dir, path) = image("twoGbMaxExtentSparse")?;
    let image = open(pool, &path, Access::Write).map_err(text)?;
    for extent in extents(dir.path())? {
        let name = extent.to_string_lossy();
        let refusal = run("qemu-io", &["-f", "raw", "-c", "length", &name]);
        let text = refusal.err().ok_or("qemu-io opened it")?;
        equal(text.contains("lock"), true, &text)?;
    }
    drop(image);
    run(
        "qemu-io",
        &["-f", "vmdk", "-c", "length", &path.to_string_lossy()],
    )
    .map(drop)
}

fn gone(pool: &Arc<Pool>) -> Outcome {
    let (dir, path) = image("twoGbMaxExtentFlat")?;
    fs::remove_file(dir.path().join("disk-f002.vmdk")).map_err(text)?;
    for access in [Access::Info, Access::Read, Access::Write] {
        let error = open(pool, &path, access).err().ok_or("it was opened")?;
        equal(error.kind(), ErrorKind::Os(libc::ENOENT), "kind")?;
        let expected = "Could not open 'disk-f002.vmdk': No such file or directory";
        equal(error.message(), expected, "message")?;
    }
    Ok(())
}

fn create_vmdk(pool: &Arc<Pool>, path: &Path, subformat: &str) -> Outcome {
    let request = Create {
        format: Format::Vmdk,
        size: SIZE,
        options: vec![("subformat".to_string(), subformat.to_string())],
        backing: None,
        backing_size: None,
        backing_identity: None,
    };
    create(pool, path, &request).map(drop).map_err(text)
}

fn judge(path: &Path, subformat: &str) -> Outcome {
    let name = path.to_string_lossy();
    let info = run("qemu-img", &["info", "-f", "vmdk", "--output=json", &name])?;
    for expected in [
        format!("\"virtual-size\": {SIZE}"),
        format!("\"create-type\": \"{subformat}\""),
    ] {
        equal(info.contains(&expected), true, &info)?;
    }
    run(
        "qemu-io",
        &["-f", "vmdk", "-r", "-c", "read -P 0 4G 64k", &name],
    )
    .map(drop)
}

fn made(pool: &Arc<Pool>) -> Outcome {
    for subformat in SUBFORMATS {
        let dir = tempfile::tempdir().map_err(text)?;
        let path = dir.path().join("disk.vmdk");
        create_vmdk(pool, &path, subformat)?;
        judge(&path, subformat)?;
        let count = match subformat {
            "monolithicFlat" => 1,
            _ => 3,
        };
        equal(extents(dir.path())?.len(), count, subformat)?;
    }
    Ok(())
}

fn made_anew(pool: &Arc<Pool>) -> Outcome {
    let (dir, path) = image("twoGbMaxExtentSparse")?;
    let before = extents(dir.path())?;
    let held = open(pool, &path, Access::Read).map_err(text)?;
    let refused = create_vmdk(pool, &path, "twoGbMaxExtentSparse");
    equal(refused.is_err(), true, "an image in use")?;
    let mut piece = vec![0; PIECE];
    held.read_at(&mut piece, WRITTEN[2]).map_err(text)?;
    same(&piece, &vec![3; PIECE], "the image in use")?;
    drop(held);
    create_vmdk(pool, &path, "twoGbMaxExtentSparse")?;
    equal(extents(dir.path())?, before, "extents")?;
    judge(&path, "twoGbMaxExtentSparse")
}

/// Grows by a few extents, and shrinks to fewer than there were.
fn resized(pool: &Arc<Pool>) -> Outcome {
    for (subformat, grown, shrunk) in [
        ("monolithicFlat", 1, 1),
        ("twoGbMaxExtentFlat", 5, 1),
        ("twoGbMaxExtentSparse", 5, 1),
    ] {
        let (dir, path) = image(subformat)?;
        let image = open(pool, &path, Access::Write).map_err(text)?;
        let how = ResizeOptions {
            shrink: true,
            ..ResizeOptions::default()
        };
        for (size, count) in [(9 * GIB, grown), (2 * GIB, shrunk)] {
            image.resize(size, &how).map_err(text)?;
            equal(extents(dir.path())?.len(), count, subformat)?;
            equal(image.virtual_size(), size, "size")?;
            let mut piece = vec![0; PIECE / 2];
            image.read_at(&mut piece, WRITTEN[1]).map_err(text)?;
            same(&piece, &vec![2; PIECE / 2], subformat)?;
        }
        let mut start = 1;
        if image.facts().no_write.is_none() {
            start = 9;
            image.write_at(&[start; 512], 4096).map_err(text)?;
        }
        drop(image);
        let name = path.to_string_lossy();
        let start = format!("read -P {start} 4096 512");
        let end = format!("read -P 2 {} 64k", WRITTEN[1]);
        let reads = ["-c", &start, "-c", &end];
        run(
            "qemu-io",
            &[&["-f", "vmdk", "-r"], &reads[..], &[&name]].concat(),
        )?;
        let info = run("qemu-img", &["info", "-f", "vmdk", &name])?;
        equal(info.contains("virtual size: 2 GiB"), true, &info)?;
    }
    Ok(())
}

fn second_name(pool: &Arc<Pool>) -> Outcome {
    let (dir, path) = image("twoGbMaxExtentFlat")?;
    fs::hard_link(&path, dir.path().join("other.vmdk")).map_err(text)?;
    let before = (fs::read(&path).map_err(text)?, extents(dir.path())?);
    let image = open(pool, &path, Access::Write).map_err(text)?;
    let error = image.resize(9 * GIB, &ResizeOptions::default());
    let error = error.err().ok_or("it was resized")?;
    equal(error.kind(), ErrorKind::Unsupported, &error.to_string())?;
    let names = error
        .message()
        .contains("'disk.vmdk' has 2 names (hard links)");
    equal(names, true, error.message())?;
    let after = (fs::read(&path).map_err(text)?, extents(dir.path())?);
    equal(after == before, true, "the files")
}

/// What a shrink leaves that is cut off behind its commit: found by a check,
/// removed by a repair and by the same request.
fn left(pool: &Arc<Pool>) -> Outcome {
    let (dir, path) = image("twoGbMaxExtentSparse")?;
    let last = dir.path().join("disk-s003.vmdk");
    let kept = fs::read(&last).map_err(text)?;
    let how = ResizeOptions {
        shrink: true,
        ..ResizeOptions::default()
    };
    let shrink = || -> Outcome {
        let image = open(pool, &path, Access::Write).map_err(text)?;
        image.resize(4 * GIB, &how).map(drop).map_err(text)
    };
    shrink()?;
    let settled = (fs::read(&path).map_err(text)?, extents(dir.path())?);
    equal(settled.1.len(), 2, "extents")?;
    let line = "# instar: leftover files 1 \"disk-s003.vmdk\"\n";
    let cut_off = || -> Outcome {
        fs::write(&last, &kept).map_err(text)?;
        fs::write(&path, [&settled.0, line.as_bytes()].concat()).map_err(text)
    };
    let is_settled = |what| -> Outcome {
        let now = (fs::read(&path).map_err(text)?, extents(dir.path())?);
        equal(now == settled, true, what)
    };
    cut_off()?;
    let name = path.to_string_lossy();
    run("qemu-img", &["check", "-f", "vmdk", &name])?;
    let image = open(pool, &path, Access::Read).map_err(text)?;
    let checked = image.check(None, &mut |_| ()).map_err(text)?;
    equal(checked.report.leaks, 1, "leaks")?;
    drop(image);
    equal(last.exists(), true, "the file after a check")?;
    shrink()?;
    is_settled("after the same request")?;
    cut_off()?;
    let image = open(pool, &path, Access::Write).map_err(text)?;
    let checked = image.check(Some(Repair::Leaks), &mut |_| ());
    let report = checked.map_err(text)?.report;
    equal((report.leaks, report.leaks_fixed), (0, 1), "repaired")?;
    drop(image);
    is_settled("after a repair")?;
    run("qemu-img", &["check", "-f", "vmdk", &name]).map(drop)
}

/// Counts one cluster of a qcow2 image as used that is not.
fn repaired(pool: &Arc<Pool>) -> Outcome {
    let dir = tempfile::tempdir().map_err(text)?;
    let path = dir.path().join("disk.qcow2");
    let name = path.to_string_lossy();
    run("qemu-img", &["create", "-q", "-f", "qcow2", &name, "64M"])?;
    let file = fs::File::options().write(true).open(&path).map_err(text)?;
    // The refcount block is the third cluster, an entry has 16 bits.
    file.write_all_at(&[0, 1], 0x20000 + 2 * 5).map_err(text)?;
    file.set_len(6 << 16).map_err(text)?;
    drop(file);
    let before = fs::read(&path).map_err(text)?;
    let image = OpenOptions::new(Access::Read)
        .open(pool, &path)
        .map_err(text)?;
    let mut found = Vec::new();
    let checked = image.check(None, &mut |event| {
        if let CheckEvent::Finding(finding) = event {
            found.push(finding.text.clone());
        }
    });
    equal(checked.map_err(text)?.report.leaks, 1, "leaks")?;
    let expected = ["Leaked cluster 5 refcount=1 reference=0"];
    equal(&found[..], &expected.map(String::from)[..], "findings")?;
    drop(image);
    equal(fs::read(&path).map_err(text)? == before, true, "the image")?;
    let image = OpenOptions::new(Access::Write)
        .open(pool, &path)
        .map_err(text)?;
    let checked = image
        .check(Some(Repair::Leaks), &mut |_| ())
        .map_err(text)?;
    let Report {
        leaks, leaks_fixed, ..
    } = checked.report;
    equal((leaks, leaks_fixed), (0, 1), "after the repair")?;
    drop(image);
    run("qemu-img", &["check", &name]).map(drop)
}
