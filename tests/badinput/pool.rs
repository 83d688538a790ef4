//! Sound images of every kind, made by qemu's tools, to be damaged.

use crate::random::Random;
use crate::tools::must;
use std::path::Path;

/// A kind of image.
pub struct Kind {
    /// Its name; the file is `NAME.qcow2`.
    pub name: &'static str,
    /// Options for `qemu-img create -o`.
    options: &'static str,
    /// Commands for qemu-io.
    fill: &'static [&'static str],
    /// Further calls of qemu-img, with `@` for the image.
    then: &'static [&'static str],
}

/// Virtual size of every kind, in bytes.
pub const SIZE: u64 = 8 << 20;
/// A size for which the L1 table of kind `small` has to move, in bytes.
pub const LARGE: u64 = 4 << 30;

const PLAIN: Kind = Kind {
    name: "plain",
    options: "cluster_size=65536",
    fill: &["write -P 1 0 300k", "write -P 2 5M 100k"],
    then: &[],
};

/// All kinds.
pub const KINDS: &[Kind] = &[
    PLAIN,
    Kind {
        name: "small",
        options: "cluster_size=4096",
        ..PLAIN
    },
    Kind {
        name: "old",
        options: "compat=0.10",
        ..PLAIN
    },
    Kind {
        name: "extended",
        options: "extended_l2=on",
        ..PLAIN
    },
    Kind {
        name: "deflate",
        fill: &["write -c -P 1 0 256k", "write -P 2 5M 100k"],
        ..PLAIN
    },
    Kind {
        name: "zstd",
        options: "compression_type=zstd",
        fill: &["write -c -P 1 0 256k", "write -P 2 5M 100k"],
        ..PLAIN
    },
    Kind {
        name: "snapshot",
        then: &["snapshot -c first @", "snapshot -c second @"],
        ..PLAIN
    },
    Kind {
        name: "bitmap",
        then: &[
            "bitmap --add @ b0",
            "bitmap --add @ b1",
            "bitmap --disable @ b0",
            "bitmap --disable @ b1",
        ],
        ..PLAIN
    },
];

impl Kind {
    /// The generator for one round of damage: different for every kind.
    pub fn random(&self, seed: u64, round: u64) -> Random {
        let name = self
            .name
            .bytes()
            .fold(0, |sum: u64, byte| sum * 31 + u64::from(byte));
        Random(seed ^ name << 32 ^ round)
    }
}

/// Makes the image of a kind.
pub fn make(kind: &Kind, dir: &Path) -> Result<Vec<u8>, String> {
    let file = format!("{}.qcow2", kind.name);
    let size = SIZE.to_string();
    let create = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        kind.options,
        &file,
        &size,
    ];
    must(dir, "qemu-img", &create)?;
    for command in kind.fill {
        must(dir, "qemu-io", &["-f", "qcow2", "-c", command, &file])?;
    }
    for line in kind.then {
        let arguments: Vec<&str> = line
            .split(' ')
            .map(|word| if word == "@" { &file } else { word })
            .collect();
        must(dir, "qemu-img", &arguments)?;
    }
    crate::tools::read(&dir.join(&file))
}

/// Makes the image of the kind with that name.
pub fn named(name: &str, dir: &Path) -> Result<Vec<u8>, String> {
    let kind = KINDS.iter().find(|kind| kind.name == name);
    make(kind.ok_or_else(|| format!("no kind {name}"))?, dir)
}
