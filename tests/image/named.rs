//! Files that images name: through the gate or not at all.

use crate::lab::{Case, content, equal, run, text};
use crate::machine::Outcome;
use instar::image::{Access, BackingPolicy, ErrorKind, OpenOptions};
use instar::sandbox::Pool;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub const CASES: &[Case] = &[
    ("a backing file outside the directory is refused", outside),
    ("an allowed directory opens the way", allowed),
    ("a link that leads outside is refused", link),
    ("json and protocol names are refused", protocols),
    ("a FIFO and a device are refused without waiting", not_files),
    ("a chain that closes on itself is refused", cycle),
    ("a chain is bounded", depth),
    (
        "a data file that is the image itself is refused",
        own_data_file,
    ),
    (
        "a format that is not known is refused by name",
        unknown_format,
    ),
    ("facts need no named file", facts_only),
    ("backing files can be refused altogether", none),
];

/// What gives a file away.
pub const AS_ROOT: &[Case] = &[("another user's private file is refused", foreign)];

struct Field {
    dir: tempfile::TempDir,
}

impl Field {
    fn new() -> Result<Self, String> {
        let dir = tempfile::tempdir().map_err(text)?;
        for sub in ["tree", "outside"] {
            fs::create_dir(dir.path().join(sub)).map_err(text)?;
        }
        let field = Self { dir };
        for base in ["tree/base", "outside/base"] {
            run(
                "qemu-img",
                &["create", "-q", "-f", "qcow2", &field.path(base), "1M"],
            )?;
            run("qemu-io", &["-c", "write -P 77 0 1M", &field.path(base)])?;
        }
        Ok(field)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn path(&self, name: &str) -> String {
        self.at(name).to_string_lossy().into_owned()
    }

    /// `tree/disk`, with a backing file by this name, unchecked.
    fn overlay(&self, backing: &str) -> Result<PathBuf, String> {
        self.overlay_of("tree/disk", backing, "qcow2")
    }

    fn overlay_of(&self, name: &str, backing: &str, format: &str) -> Result<PathBuf, String> {
        let args = [
            "create", "-q", "-u", "-f", "qcow2", "-F", format, "-b", backing,
        ];
        run("qemu-img", &[&args[..], &[&self.path(name), "1M"]].concat())?;
        Ok(self.at(name))
    }
}

fn refusal(
    pool: &Arc<Pool>,
    options: &OpenOptions,
    path: &Path,
) -> Result<(ErrorKind, String), String> {
    let before = fs::read(path).map_err(text)?;
    let error = options.open(pool, path).err().ok_or("it was opened")?;
    equal(fs::read(path).map_err(text)?, before, "the image")?;
    Ok((error.kind(), error.message().to_string()))
}

fn forbidden(pool: &Arc<Pool>, path: &Path, message: &str) -> Outcome {
    for access in [Access::Read, Access::Write] {
        let found = refusal(pool, &OpenOptions::new(access), path)?;
        equal(found, (ErrorKind::Forbidden, message.to_string()), "error")?;
    }
    Ok(())
}

fn outside_text(name: &str) -> String {
    format!("The backing file '{name}' lies outside the directories that the image may use")
}

fn outside(pool: &Arc<Pool>) -> Outcome {
    let field = Field::new()?;
    for name in [
        "../outside/base",
        &field.path("outside/base"),
        "/etc/passwd",
    ] {
        let disk = field.overlay(name)?;
        forbidden(pool, &disk, &outside_text(name))?;
    }
    Ok(())
}

fn allowed(pool: &Arc<Pool>) -> Outcome {
    let field = Field::new()?;
    let mut options = OpenOptions::new(Access::Read);
    options.allow_paths = vec![field.at("outside")];
    for name in ["../outside/base", &field.path("outside/base"), "base"] {
        let disk = field.overlay(name)?;
        let image = options.open(pool, &disk).map_err(text)?;
        equal(content(&image)?, vec![77; 1 << 20], "content")?;
    }
    Ok(())
}

fn link(pool: &Arc<Pool>) -> Outcome {
    let field = Field::new()?;
    symlink(field.at("outside/base"), field.at("tree/absolute")).map_err(text)?;
    symlink("../outside", field.at("tree/up")).map_err(text)?;
    for name in ["absolute", "up/base"] {
        let disk = field.overlay(name)?;
        forbidden(pool, &disk, &outside_text(name))?;
    }
    Ok(())
}

fn protocols(pool: &Arc<Pool>) -> Outcome {
    let field = Field::new()?;
    let json = r#"json:{"driver":"file","filename":"/etc/passwd"}"#;
    for name in [json, "nbd://127.0.0.1/x", "file:base", "fat:/etc"] {
        let disk = field.overlay(name)?;
        let message = format!("The backing file '{name}' names a protocol, not a file");
        forbidden(pool, &disk, &message)?;
    }
    Ok(())
}

fn not_files(pool: &Arc<Pool>) -> Outcome {
    let field = Field::new()?;
    run("mkfifo", &[&field.path("tree/fifo")])?;
    let disk = field.overlay("fifo")?;
    forbidden(pool, &disk, "The backing file 'fifo' is not a regular file")?;
    let disk = field.overlay("/dev/null")?;
    let mut options = OpenOptions::new(Access::Read);
    options.allow_paths = vec!["/dev".into()];
    let message = "The backing file '/dev/null' is not a regular file".to_string();
    equal(
        refusal(pool, &options, &disk)?,
        (ErrorKind::Forbidden, message),
        "error",
    )
}

fn foreign(pool: &Arc<Pool>) -> Outcome {
    let field = Field::new()?;
    let disk = field.overlay("base")?;
    // Root's own image may name everything: the image is given away.
    chown(&disk, Some(4242), None).map_err(text)?;
    fs::set_permissions(field.at("tree/base"), fs::Permissions::from_mode(0o600)).map_err(text)?;
    let message = "The backing file 'base' belongs to another user and is not open to the owner \
                   of the image that names it";
    forbidden(pool, &disk, message)?;
    fs::set_permissions(field.at("tree/base"), fs::Permissions::from_mode(0o604)).map_err(text)?;
    OpenOptions::new(Access::Read)
        .open(pool, &disk)
        .map_err(text)?;
    Ok(())
}

fn cycle(pool: &Arc<Pool>) -> Outcome {
    let field = Field::new()?;
    let disk = field.overlay("disk")?;
    let text =
        |name: &str| format!("The backing file '{name}' is an image of the chain that names it");
    let found = refusal(pool, &OpenOptions::new(Access::Read), &disk)?;
    equal(found, (ErrorKind::Damaged, text("disk")), "error")?;
    field.overlay("middle")?;
    field.overlay_of("tree/middle", "./disk", "qcow2")?;
    let (kind, message) = refusal(pool, &OpenOptions::new(Access::Read), &disk)?;
    let expected = format!(
        "Could not open backing file: {} (in 'middle')",
        text("./disk")
    );
    equal((kind, message), (ErrorKind::Damaged, expected), "error")
}

fn depth(pool: &Arc<Pool>) -> Outcome {
    let field = Field::new()?;
    let mut below = "base".to_string();
    for layer in 0..33 {
        let name = format!("tree/{layer}");
        field.overlay_of(&name, &below, "qcow2")?;
        below = layer.to_string();
    }
    let options = OpenOptions::new(Access::Read);
    let (kind, message) = refusal(pool, &options, &field.at("tree/32"))?;
    equal(kind, ErrorKind::Unsupported, "kind")?;
    let end = "The backing chain has more than 32 images (in '1')";
    equal(message.ends_with(end), true, &message)?;
    let image = options.open(pool, &field.at("tree/30")).map_err(text)?;
    equal(content(&image)?, vec![77; 1 << 20], "content")
}

fn own_data_file(pool: &Arc<Pool>) -> Outcome {
    let field = Field::new()?;
    let (disk, data) = (field.path("tree/disk"), field.path("tree/disk.data"));
    let options = format!("data_file={data}");
    run(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-o", &options, &disk, "1M"],
    )?;
    fs::remove_file(&data).map_err(text)?;
    fs::hard_link(&disk, &data).map_err(text)?;
    let found = refusal(pool, &OpenOptions::new(Access::Write), Path::new(&disk))?;
    let message = format!("The data file '{data}' is an image of the chain that names it");
    equal(found, (ErrorKind::Damaged, message), "error")
}

fn unknown_format(pool: &Arc<Pool>) -> Outcome {
    let field = Field::new()?;
    let disk = field.overlay_of("tree/disk", "base", "vdi")?;
    let found = refusal(pool, &OpenOptions::new(Access::Read), &disk)?;
    let message = "Could not open backing file: Unknown driver 'vdi' (in 'base')";
    equal(
        found,
        (ErrorKind::Unsupported, message.to_string()),
        "error",
    )
}

fn facts_only(pool: &Arc<Pool>) -> Outcome {
    let field = Field::new()?;
    let disk = field.overlay("gone")?;
    let mut options = OpenOptions::new(Access::Info);
    options.backing = BackingPolicy::Skip;
    let image = options.open(pool, &disk).map_err(text)?;
    let named = image
        .facts()
        .backing
        .as_ref()
        .map(|named| named.name().to_string());
    equal(named, Some("gone".to_string()), "backing file")?;
    equal(image.counters().exits, 1, "exits")?;
    let message =
        "Could not open backing file: Could not open 'gone': No such file or directory".to_string();
    let found = refusal(pool, &OpenOptions::new(Access::Read), &disk)?;
    equal(found, (ErrorKind::Os(libc::ENOENT), message), "error")
}

fn none(pool: &Arc<Pool>) -> Outcome {
    let field = Field::new()?;
    let disk = field.overlay("base")?;
    let mut options = OpenOptions::new(Access::Read);
    options.backing = BackingPolicy::Refuse;
    let message = "The image names the backing file 'base', and backing files are not allowed here";
    equal(
        refusal(pool, &options, &disk)?,
        (ErrorKind::Forbidden, message.to_string()),
        "error",
    )
}
