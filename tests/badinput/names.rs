//! Images that name files which are not theirs to have.

use crate::program::instar;
use crate::refusals::{IMAGE, refused_name};
use crate::tools::{must, scratch, write};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;

/// An image with a hostile name in it.
pub struct Name {
    /// What is wrong.
    pub name: &'static str,
    /// Makes `image.qcow2`, and what it names.
    pub make: fn(&Path) -> Result<(), String>,
    /// What the refusal says.
    pub says: &'static str,
}

const OUTSIDE: &str = "outside the directories that the image may use";
const PROTOCOL: &str = "names a protocol, not a file";
const FOREIGN: &str = "belongs to another user";
const NOT_REGULAR: &str = "is not a regular file";
/// A user who is nobody in particular.
const TENANT: u32 = 65534;

/// All of them.
pub const NAMES: &[Name] = &[
    Name {
        name: "absolute, outside the tree",
        make: |dir| overlay(dir, "/etc/hostname"),
        says: OUTSIDE,
    },
    Name {
        name: "relative, outside the tree",
        make: |dir| overlay(dir, "../../../../../../etc/hostname"),
        says: OUTSIDE,
    },
    Name {
        name: "a link out of the tree",
        make: |dir| {
            symlink("/etc/hostname", dir.join("link")).map_err(|error| error.to_string())?;
            overlay(dir, "link")
        },
        says: OUTSIDE,
    },
    Name {
        name: "json:",
        make: |dir| {
            overlay(
                dir,
                "json:{\"driver\":\"file\",\"filename\":\"/etc/hostname\"}",
            )
        },
        says: PROTOCOL,
    },
    Name {
        name: "a protocol",
        make: |dir| overlay(dir, "nbd://127.0.0.1/disk"),
        says: PROTOCOL,
    },
    Name {
        name: "a directory",
        make: |dir| overlay(dir, "."),
        says: NOT_REGULAR,
    },
    Name {
        name: "a FIFO",
        make: |dir| {
            must(dir, "mkfifo", &["pipe"])?;
            overlay(dir, "pipe")
        },
        says: NOT_REGULAR,
    },
    Name {
        name: "another user's private file",
        make: |dir| {
            base(dir, "base", 0o600)?;
            overlay(dir, "base")?;
            chown(dir.join(IMAGE), Some(TENANT), Some(TENANT)).map_err(|error| error.to_string())
        },
        says: FOREIGN,
    },
    Name {
        name: "itself",
        make: |dir| {
            overlay_on(dir, "new.qcow2", IMAGE, "qcow2")?;
            std::fs::rename(dir.join("new.qcow2"), dir.join(IMAGE))
                .map_err(|error| error.to_string())
        },
        says: "is an image of the chain that names it",
    },
    Name {
        name: "a cycle of two",
        make: |dir| {
            overlay_on(dir, "other.qcow2", IMAGE, "qcow2")?;
            overlay_on(dir, IMAGE, "other.qcow2", "qcow2")
        },
        says: "is an image of the chain that names it",
    },
    Name {
        name: "a missing file",
        make: |dir| overlay(dir, "gone"),
        says: "No such file",
    },
    Name {
        name: "a data file outside the tree",
        make: |dir| data_file(dir, "/etc/hostname"),
        says: OUTSIDE,
    },
    Name {
        name: "a data file that is json:",
        make: |dir| data_file(dir, "json:{}123456"),
        says: PROTOCOL,
    },
];

/// Why the files of a case cannot be made here, if that is so.
pub fn missing(name: &Name) -> Option<String> {
    let needs_root = name.says == FOREIGN && !nix::unistd::geteuid().is_root();
    needs_root.then(|| "changing a file's owner needs root".to_owned())
}

/// The image is refused, and stays as it is.
pub fn check(name: &Name, isolation: &str) -> Result<(), String> {
    let dir = scratch()?;
    (name.make)(dir.path())?;
    // The facts need a backing file, where the chain is asked for; a data file
    // they do not need.
    let all: [&[&str]; 3] = [&["map"], &["resize", "+1M"], &["info", "--backing-chain"]];
    let commands = match name.name.contains("data file") {
        true => &all[..2],
        false => &all,
    };
    refused_name(dir.path(), isolation, commands, name.says)
}

fn overlay(dir: &Path, backing: &str) -> Result<(), String> {
    overlay_on(dir, IMAGE, backing, "raw")
}

fn overlay_on(dir: &Path, image: &str, backing: &str, format: &str) -> Result<(), String> {
    let arguments = [
        "create", "-q", "-u", "-f", "qcow2", "-F", format, "-b", backing, image, "1M",
    ];
    must(dir, "qemu-img", &arguments).map(drop)
}

fn base(dir: &Path, name: &str, mode: u32) -> Result<(), String> {
    let path = dir.join(name);
    write(&path, &[7; 4096])?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode))
        .map_err(|error| error.to_string())
}

/// An image with a data file of its own, whose name is then replaced.
fn data_file(dir: &Path, name: &str) -> Result<(), String> {
    let own = "x".repeat(name.len());
    let option = format!("data_file={own}");
    let arguments = ["create", "-q", "-f", "qcow2", "-o", &option, IMAGE, "1M"];
    must(dir, "qemu-img", &arguments)?;
    let path = dir.join(IMAGE);
    let mut image = crate::tools::read(&path)?;
    let at = image
        .windows(own.len())
        .position(|part| part == own.as_bytes());
    let at = at.ok_or("the data file's name is not in the header")?;
    image[at..at + name.len()].copy_from_slice(name.as_bytes());
    write(&path, &image)
}

/// A descriptor may call files left over. Only those go that could be extents of
/// the image, are none, and are nobody else's.
pub fn left_over(isolation: &str) -> Result<(), String> {
    let dir = scratch()?;
    let at = |name: &str| dir.path().join(name);
    let option = "subformat=twoGbMaxExtentSparse";
    let create = ["create", "-q", "-f", "vmdk", "-o", option, DISK, "3G"];
    must(dir.path(), "qemu-img", &create)?;
    let text = crate::tools::read(&at(DISK))?;
    let resize = |lines: &[(u32, String)], size: &str| {
        let lines: String = lines
            .iter()
            .map(|(count, name)| format!("# instar: leftover files {count} \"{name}\"\n"))
            .collect();
        write(&at(DISK), &[&text, lines.as_bytes()].concat())?;
        instar(dir.path(), isolation, &["resize", "-f", "vmdk", DISK, size])
    };
    let others = ["other.vmdk", "sub/disk-s009.vmdk", "disk-s009.raw"];
    std::fs::create_dir(at("sub")).map_err(|error| error.to_string())?;
    for name in others {
        write(&at(name), b"precious")?;
    }
    // What is in the way has that name in earnest.
    for (make, says) in IN_THE_WAY {
        make(&at("disk-s005.vmdk"), &at("other.vmdk"))?;
        let outcome = resize(&[(1, "disk-s005.vmdk".to_owned())], "4G")?;
        let there = at("disk-s005.vmdk").symlink_metadata().is_ok();
        let names = outcome.text.contains("disk-s005.vmdk") && outcome.text.contains(says);
        if outcome.code != 1 || !there || !names {
            return Err(format!("{says}: {}", outcome.brief()));
        }
        must(dir.path(), "rm", &["-r", "disk-s005.vmdk"])?;
    }
    let absolute = at("other.vmdk").to_string_lossy().into_owned();
    let hostile = ["disk-s001.vmdk", DISK, "../disk-s009.vmdk", &absolute];
    let named = hostile.into_iter().chain(others);
    let lines: Vec<(u32, String)> = named.map(|name| (3, name.to_owned())).collect();
    write(&at("disk-s003.vmdk"), b"left over")?;
    let outcome = resize(&lines, "3G")?;
    if outcome.code != 0 || crate::tools::read(&at(DISK))? != text {
        return Err(format!("lines stay: {}", outcome.brief()));
    }
    if at("disk-s003.vmdk").exists() {
        return Err("what is left over stays".to_owned());
    }
    for name in others {
        if crate::tools::read(&at(name))? != b"precious" {
            return Err(format!("{name} has changed"));
        }
    }
    must(dir.path(), "qemu-img", &["check", "-f", "vmdk", DISK]).map(drop)
}

/// An image of several files.
const DISK: &str = "disk.vmdk";

/// Puts something under the first path; the second is another file.
type Put = fn(&Path, &Path) -> Result<(), String>;

/// What is no file that an image could have left, and what is said of it.
const IN_THE_WAY: [(Put, &str); 3] = [
    (
        |path, other| std::fs::hard_link(other, path).map_err(|error| error.to_string()),
        "2 names",
    ),
    (
        |path, other| symlink(other, path).map_err(|error| error.to_string()),
        "Too many levels of symbolic links",
    ),
    (
        |path, _| std::fs::create_dir(path).map_err(|error| error.to_string()),
        "Is a directory",
    ),
];
