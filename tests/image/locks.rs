//! Locks against a real QEMU.

use crate::lab::{Case, equal, open, run, text};
use crate::machine::Outcome;
use instar::image::{Access, Error, ErrorKind, OpenOptions};
use instar::sandbox::Pool;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

pub const CASES: &[Case] = &[
    ("a QEMU that writes keeps everybody out", writer_excludes),
    (
        "a QEMU that reads keeps writers out",
        reader_excludes_writers,
    ),
    ("a writer keeps QEMU out", own_writer_excludes),
    ("a reader keeps a writing QEMU out", own_reader_excludes),
    ("force-share reads what another writes", force_share),
    (
        "an image that is given up is noticed when it changed",
        given_up,
    ),
];

/// qemu-io with an image open, until it is dropped.
struct QemuIo {
    child: Child,
}

impl QemuIo {
    fn open(path: &Path, format: &str, options: &[&str]) -> Result<Self, String> {
        let mut child = Command::new("qemu-io")
            .args(["-f", format])
            .args(options)
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(text)?;
        // Its answer to a command says that the image is open by now.
        let stdin = child.stdin.as_mut().ok_or("no stdin")?;
        stdin.write_all(b"length\n").map_err(text)?;
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().ok_or("no stdout")?)
            .read_line(&mut line)
            .map_err(text)?;
        match line.contains("MiB") {
            true => Ok(Self { child }),
            false => Err(format!("qemu-io says {line:?}")),
        }
    }
}

impl Drop for QemuIo {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// Images and their formats.
type Images = Vec<(PathBuf, &'static str)>;

fn images() -> Result<(tempfile::TempDir, Images), String> {
    let dir = tempfile::tempdir().map_err(text)?;
    let mut images = Vec::new();
    for format in ["raw", "qcow2"] {
        let path = dir.path().join(format);
        run(
            "qemu-img",
            &["create", "-q", "-f", format, &path.to_string_lossy(), "1M"],
        )?;
        images.push((path, format));
    }
    Ok((dir, images))
}

fn refused(pool: &Arc<Pool>, path: &Path, access: Access, message: &str) -> Outcome {
    let Err(error) = OpenOptions::new(access).open(pool, path) else {
        return Err(format!("{access:?} was not refused"));
    };
    equal(
        told(&error),
        (ErrorKind::Locked, message.to_string()),
        "error",
    )?;
    let hint = format!("Is another process using the image [{}]?", path.display());
    equal(error.hint(), Some(hint.as_str()), "hint")?;
    equal(error.errno(), libc::EBUSY, "errno")
}

fn told(error: &Error) -> (ErrorKind, String) {
    (error.kind(), error.message().to_string())
}

const WRITE: &str = "Failed to get \"write\" lock";
const SHARED_WRITE: &str = "Failed to get shared \"write\" lock";

fn writer_excludes(pool: &Arc<Pool>) -> Outcome {
    let (_dir, images) = images()?;
    // QEMU shares writing with other writers of a raw image, instar does not.
    let (path, format) = &images[1];
    let _qemu = QemuIo::open(path, format, &[])?;
    refused(pool, path, Access::Write, WRITE)?;
    refused(pool, path, Access::Read, SHARED_WRITE)?;
    refused(pool, path, Access::Info, SHARED_WRITE)?;
    let (path, format) = &images[0];
    let _qemu = QemuIo::open(path, format, &[])?;
    refused(pool, path, Access::Write, SHARED_WRITE)?;
    refused(pool, path, Access::Read, SHARED_WRITE)
}

fn reader_excludes_writers(pool: &Arc<Pool>) -> Outcome {
    let (_dir, images) = images()?;
    for (path, format) in &images {
        let _qemu = QemuIo::open(path, format, &["-r"])?;
        if *format == "qcow2" {
            refused(pool, path, Access::Write, WRITE)?;
        }
        open(pool, path, format, Access::Read)?;
        open(pool, path, format, Access::Info)?;
    }
    Ok(())
}

/// What qemu-io says when it may not open the image.
fn qemu_refused(path: &Path, format: &str, message: &str) -> Outcome {
    match run(
        "qemu-io",
        &["-f", format, "-c", "write 0 512", &path.to_string_lossy()],
    ) {
        Ok(said) => Err(format!("qemu-io was let in: {said}")),
        Err(said) if said.contains(message) => Ok(()),
        Err(said) => Err(said),
    }
}

fn own_writer_excludes(pool: &Arc<Pool>) -> Outcome {
    let (_dir, images) = images()?;
    for (path, format) in &images {
        let image = open(pool, path, format, Access::Write)?;
        qemu_refused(path, format, WRITE)?;
        refused(pool, path, Access::Write, WRITE)?;
        refused(pool, path, Access::Read, SHARED_WRITE)?;
        drop(image);
        run(
            "qemu-io",
            &["-f", format, "-c", "write 0 512", &path.to_string_lossy()],
        )?;
    }
    Ok(())
}

fn own_reader_excludes(pool: &Arc<Pool>) -> Outcome {
    let (_dir, images) = images()?;
    for (path, format) in &images {
        let _image = open(pool, path, format, Access::Read)?;
        qemu_refused(path, format, WRITE)?;
        open(pool, path, format, Access::Read)?;
        run(
            "qemu-io",
            &[
                "-r",
                "-f",
                format,
                "-c",
                "read 0 512",
                &path.to_string_lossy(),
            ],
        )?;
    }
    Ok(())
}

fn force_share(pool: &Arc<Pool>) -> Outcome {
    let (_dir, images) = images()?;
    for (path, format) in &images {
        let _qemu = QemuIo::open(path, format, &[])?;
        let mut options = OpenOptions::new(Access::Read);
        options.force_share = true;
        let image = options.open(pool, path).map_err(text)?;
        image.read_at(&mut [0; 512], 0).map_err(text)?;
        options.access = Access::Write;
        let error = options.open(pool, path).err().ok_or("writing is shared")?;
        let message = "force-share=on can only be used with read-only images";
        equal(error.message(), message, "error")?;
    }
    Ok(())
}

fn given_up(pool: &Arc<Pool>) -> Outcome {
    let (_dir, images) = images()?;
    for (path, format) in &images {
        let image = open(pool, path, format, Access::Write)?;
        image.unlock().map_err(text)?;
        image.lock().map_err(text)?;
        image.unlock().map_err(text)?;
        let qemu = QemuIo::open(path, format, &[])?;
        let error = image.lock().err().ok_or("locked beside qemu-io")?;
        equal(error.kind(), ErrorKind::Locked, "kind")?;
        drop(qemu);
        run(
            "qemu-io",
            &[
                "-f",
                format,
                "-c",
                "write -P 5 64k 4k",
                &path.to_string_lossy(),
            ],
        )?;
        let error = image.lock().err().ok_or("a changed file was taken")?;
        equal(error.kind(), ErrorKind::Stale, "kind")?;
        equal(error.errno(), libc::ESTALE, "errno")?;
        // Nothing stays locked after that.
        open(pool, path, format, Access::Write)?;
    }
    Ok(())
}
