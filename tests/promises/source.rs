//! The host reads no format: its source knows none of their magic numbers.

use std::path::{Path, PathBuf};

/// What identifies a format, as source code could spell it, in lower case.
const MAGICS: &[&str] = &[
    // qcow, qcow2
    "qfi\\xfb",
    "qfi\\u{fb}",
    "514649fb",
    "0x51, 0x46, 0x49",
    "b\"qfi",
    // VMDK, COWD, seSparse
    "kdmv",
    "4b444d56",
    "564d444b",
    "disk descriptorfile",
    "cowd",
    "434f5744",
    "cafebabe",
    // VHD
    "conectix",
    "636f6e6563746978",
    "cxsparse",
    // VHDX
    "vhdxfile",
    "7668647866696c65",
    "656c696678646876",
    // VDI, QED, LUKS, parallels
    "beda107f",
    "7f10dabe",
    "b\"qed",
    "51454400",
    "luks\\xba",
    "4c554b53",
    "withoutfreespace",
    "withoufrespacext",
];

/// No file below the host's source folders spells a magic number outside its
/// unit tests.
pub fn host_knows_no_magic() -> Result<(), String> {
    let found = [search("src")?, search("mount-helper/src")?].concat();
    match found.is_empty() {
        true => Ok(()),
        false => Err(found.join("\n")),
    }
}

/// The search finds what it looks for, where it is allowed to be.
pub fn search_finds_the_guests_magic() -> Result<(), String> {
    let found = search("guest/src")?;
    let qcow2 = found.iter().any(|line| line.contains("qcow2"));
    let probe = found.iter().any(|line| line.contains("probe"));
    match qcow2 && probe {
        true => Ok(()),
        false => Err(format!("only {found:?}")),
    }
}

/// Lines with a magic number below a folder of this package.
fn search(folder: &str) -> Result<Vec<String>, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    for file in sources(&root.join(folder))? {
        let text = std::fs::read_to_string(&file).map_err(|error| error.to_string())?;
        let shown = file.strip_prefix(root).unwrap_or(&file).display();
        for (number, line) in without_tests(&text).lines().enumerate() {
            let plain = line.to_lowercase().replace('_', "");
            let magic = MAGICS.iter().find(|magic| plain.contains(*magic));
            found.extend(magic.map(|magic| format!("{shown}:{}: {magic}", number + 1)));
        }
    }
    Ok(found)
}

/// The part of a file before its unit tests, which stand at its end.
fn without_tests(text: &str) -> &str {
    text.split("#[cfg(test)]\nmod tests {")
        .next()
        .unwrap_or(text)
}

/// Every Rust file below a folder but those that hold only unit tests.
fn sources(folder: &Path) -> Result<Vec<PathBuf>, String> {
    let mut files = Vec::new();
    let entries = std::fs::read_dir(folder).map_err(|error| error.to_string())?;
    for entry in entries {
        let path = entry.map_err(|error| error.to_string())?.path();
        if path.is_dir() {
            files.extend(sources(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "rs")
            && path.file_stem().is_some_and(|stem| stem != "tests")
        {
            files.push(path);
        }
    }
    Ok(files)
}
