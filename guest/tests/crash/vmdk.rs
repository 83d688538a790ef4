//! The changes of vmdk images that are explored.

use super::bytes::Bytes;
use super::case::{Ask, BASIC, Case, Judges, K, M, patch};
use super::disk::Files;
use super::readers::vmdk;
use instar_guest::Format;
use instar_guest::findings::Repair;
use instar_guest::proto::Preallocation::{Falloc, Full, Metadata, Off};

/// Who judges the states.
const JUDGES: Judges = Judges {
    check: true,
    convert: true,
    readers: &[("a strict reader", vmdk::strictly)],
    parts: Some(vmdk::parts),
    naive_grow: Some(vmdk::grown_naively),
    ..Judges::NONE
};

/// What the cases of this page have in common.
const VMDK: Case = Case {
    format: Format::Vmdk,
    size: 3 * M,
    prepare: &["io write -P 1 0 64k", "io write -P 2 1900k 60k"],
    judges: &JUDGES,
    ..BASIC
};

/// Who judges guest writes: an entry and its redundant copy lie in two sectors,
/// and each leads to durable data or to none.
const WRITES: Judges = Judges {
    may_differ: true,
    ..JUDGES
};

/// A disk that ends inside a grain that holds data.
const ODD: Case = Case {
    size: 3 * M + 3 * 512,
    prepare: &[
        "io write -P 1 0 64k",
        "io write -P 2 1900k 60k",
        "io write -P 3 3072k 1536",
    ],
    ..VMDK
};

/// A disk whose last grains in the file belong to its beginning.
const BACKWARDS: Case = Case {
    size: 40 * M,
    prepare: &[
        "io write -P 2 39M 200k",
        "io write -P 3 20M 64k",
        "io write -P 4 5M 64k",
        "io write -P 5 1M 100k",
    ],
    ..VMDK
};

/// All of them.
pub const CASES: &[Case] = &[
    Case {
        name: "grow/inside the tables",
        ask: Ask::Grow(5 * M, Off),
        ..VMDK
    },
    Case {
        name: "grow/tables over grains",
        ask: Ask::Grow(900 * M, Off),
        ..VMDK
    },
    Case {
        name: "grow/from inside a grain",
        ask: Ask::Grow(5 * M, Off),
        ..ODD
    },
    Case {
        name: "grow/from inside a grain that is in the way",
        ask: Ask::Grow(900 * M, Off),
        ..ODD
    },
    Case {
        name: "grow/with zeroed grains",
        options: "zeroed_grain=on",
        prepare: &["io write -P 1 0 256k", "io write -z 64k 64k"],
        ask: Ask::Grow(900 * M + 512, Off),
        ..VMDK
    },
    Case {
        name: "grow/metadata",
        ask: Ask::Grow(5 * M, Metadata),
        ..ODD
    },
    Case {
        name: "grow/falloc",
        ask: Ask::Grow(40 * M, Falloc),
        ..VMDK
    },
    Case {
        name: "grow/full",
        ask: Ask::Grow(4 * M, Full),
        ..ODD
    },
    Case {
        name: "shrink/to empty space",
        ask: Ask::Shrink(2 * M),
        ..VMDK
    },
    Case {
        name: "shrink/through data",
        ask: Ask::Shrink(6 * M),
        ..BACKWARDS
    },
    Case {
        name: "shrink/through a grain",
        ask: Ask::Shrink(M + 3 * 512),
        ..BACKWARDS
    },
    Case {
        name: "shrink/through a grain that stays",
        ask: Ask::Shrink(39 * M + 5 * 512),
        ..BACKWARDS
    },
    Case {
        name: "write/into new grains and old ones",
        ask: Ask::Write(&[
            patch(100 * K, 200 * K, 7),
            patch(512, 1024, 8),
            patch(3 * M, 1536, 9),
        ]),
        judges: &WRITES,
        ..ODD
    },
    Case {
        name: "write/over zeroed grains",
        options: "zeroed_grain=on",
        prepare: &["io write -P 1 0 256k", "io write -z 64k 64k"],
        ask: Ask::Write(&[patch(70 * K, 1024, 7)]),
        judges: &WRITES,
        ..VMDK
    },
    Case {
        name: "write/into an extent",
        options: "subformat=twoGbMaxExtentSparse",
        ask: Ask::Write(&[patch(100 * K, 200 * K, 7)]),
        judges: &WRITES,
        ..VMDK
    },
    Case {
        name: "files/a flat one grows",
        options: "subformat=monolithicFlat",
        ask: Ask::Grow(5 * M, Off),
        ..VMDK
    },
    Case {
        name: "files/a flat one shrinks",
        options: "subformat=monolithicFlat",
        ask: Ask::Shrink(2 * M),
        ..VMDK
    },
    Case {
        name: "files/a split flat one grows",
        options: "subformat=twoGbMaxExtentFlat",
        ask: Ask::Grow(5 * M, Falloc),
        ..VMDK
    },
    Case {
        name: "files/a split sparse one grows",
        options: "subformat=twoGbMaxExtentSparse",
        ask: Ask::Grow(5 * M, Off),
        ..VMDK
    },
    Case {
        name: "files/a split sparse one grows from inside a grain",
        options: "subformat=twoGbMaxExtentSparse",
        ask: Ask::Grow(5 * M, Off),
        ..ODD
    },
    Case {
        name: "files/a split sparse one grows from inside a grain, full",
        options: "subformat=twoGbMaxExtentSparse",
        ask: Ask::Grow(4 * M, Full),
        ..ODD
    },
    Case {
        name: "files/a split sparse one grows, full",
        options: "subformat=twoGbMaxExtentSparse",
        ask: Ask::Grow(4 * M, Full),
        ..VMDK
    },
    SPLIT_SHRINKS,
    Case {
        name: "files/three sparse ones become more",
        ask: Ask::Grow(14 * M, Off),
        ..THREE
    },
    Case {
        name: "files/three sparse ones become more, falloc",
        ask: Ask::Grow(14 * M, Falloc),
        ..THREE
    },
    Case {
        name: "files/three sparse ones become one",
        ask: Ask::Shrink(M + 37 * 512),
        ..THREE
    },
    Case {
        name: "files/three sparse ones become two",
        ask: Ask::Shrink(6 * M),
        ..THREE
    },
    Case {
        name: "files/three flat ones become one",
        ask: Ask::Shrink(M + 512),
        ..THREE_FLAT
    },
    Case {
        name: "files/three flat ones become more",
        ask: Ask::Grow(17 * M, Off),
        ..THREE_FLAT
    },
    Case {
        name: "files/what was left goes",
        tamper: Some(leave_files),
        left: LEFT,
        ask: Ask::Settle,
        ..SPLIT_SHRINKS
    },
    Case {
        name: "files/what was left goes with a repair",
        tamper: Some(leave_files),
        left: LEFT,
        ask: Ask::Repair(Repair::Leaks),
        ..SPLIT_SHRINKS
    },
];

/// An image of several files of which one is replaced by another.
pub const SPLIT_SHRINKS: Case = Case {
    name: "files/a split sparse one shrinks inside an extent",
    size: 3 * M,
    options: "subformat=twoGbMaxExtentSparse",
    prepare: &[
        "io write -P 3 2M 64k",
        "io write -P 1 0 64k",
        "io write -P 2 1000k 200k",
    ],
    ask: Ask::Shrink(M + 37 * 512),
    ..VMDK
};

/// The same extent three times.
const THREE: Case = Case {
    tamper: Some(three_times),
    ..SPLIT_SHRINKS
};

/// Three flat extents of 3 MiB.
const THREE_FLAT: Case = Case {
    options: "subformat=twoGbMaxExtentFlat",
    ..THREE
};

/// What an interrupted resize left, and the lines that name it.
const LEFT: &[&str] = &[
    "image-s002.vmdk",
    "image-s004.vmdk",
    "image.vmdk.instar-new",
];
const LINES: &str = "# instar: leftover files 3 \"image-s002.vmdk\"\n";

fn leave_files(files: &mut Files) -> Result<(), String> {
    let mut named = all(files)?;
    for name in LEFT {
        named.push(((*name).to_owned(), Bytes::from(&b"left over"[..])));
    }
    let descriptor = named.iter_mut().find(|(name, _)| name == IMAGE);
    let (_, bytes) = descriptor.ok_or("no descriptor")?;
    bytes.write(bytes.len(), LINES.as_bytes());
    *files = Files::named(named);
    Ok(())
}

const IMAGE: &str = "image.vmdk";

/// Every file with its name.
fn all(files: &Files) -> Result<Vec<(String, Bytes)>, String> {
    let named = |name: &str| Ok((name.to_owned(), files.get(name)?.clone()));
    files.names().map(named).collect()
}

/// Makes the only extent the first of three.
fn three_times(files: &mut Files) -> Result<(), String> {
    let descriptor = files.get(IMAGE)?;
    let text = descriptor.read(0, descriptor.len());
    let text = String::from_utf8(text).map_err(|error| error.to_string())?;
    let text = text.trim_end_matches('\0');
    let line = text.lines().find(|line| line.starts_with("RW "));
    let line = line.ok_or("no extent")?;
    let mut named = all(files)?;
    let mut lines = vec![line.to_owned()];
    let part = vmdk::parts(files, IMAGE)?.remove(0);
    for number in ["002", "003"] {
        let name = part.replace("001", number);
        named.push((name.clone(), files.get(&part)?.clone()));
        lines.push(line.replace(&part, &name));
    }
    let text = text.replace(line, &lines.join("\n"));
    named.retain(|(name, _)| name != IMAGE);
    named.push((IMAGE.to_owned(), Bytes::from(text.as_bytes())));
    *files = Files::named(named);
    Ok(())
}
