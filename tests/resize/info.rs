//! What `info --output=json` says, compared between programs and files.

use crate::machine::Outcome;
use crate::tools::equal;
use serde_json::{Map, Value};

/// The first two numbers of a version.
pub fn numbers(version: &str) -> (u32, u32) {
    let mut numbers = version.split('.').map(|number| number.parse().unwrap_or(0));
    let mut next = || numbers.next().unwrap_or(0);
    (next(), next())
}

/// The version before which the disk space of a data file counts. It is opened
/// for that, which instar does not do.
const WITHOUT_DATA_FILE: (u32, u32) = (6, 0);

/// Whether a version of qemu-img and instar say the same of one file, to the
/// order of the keys.
pub fn same(version: &str, expected: &Value, got: &Value) -> Outcome {
    let data_file = expected.pointer("/format-specific/data/data-file");
    if data_file.is_none() || numbers(version) >= WITHOUT_DATA_FILE {
        return equal("info", expected.to_string(), got.to_string());
    }
    let known = |info: &Value| {
        let mut info = info.clone();
        if let Some(all) = info.as_object_mut() {
            clear(all, &["actual-size"]);
        }
        info.to_string()
    };
    equal("info", known(expected), known(got))
}

/// Whether an image is like another one: not what it is called, what is drawn
/// anew for every image, and the length and the disk space of the file. Those
/// two may be smaller, or larger by up to one cluster.
pub fn alike(expected: &Value, got: &Value) -> Outcome {
    equal(
        "info",
        without_chance(expected).to_string(),
        without_chance(got).to_string(),
    )?;
    let slack = got["cluster-size"].as_u64().unwrap_or(BLOCK);
    not_larger(
        "disk space",
        &expected["actual-size"],
        &got["actual-size"],
        slack,
    )?;
    let children = |info: &Value| info["children"].as_array().cloned().unwrap_or_default();
    for (expected, got) in children(expected).iter().zip(&children(got)) {
        for key in ["virtual-size", "actual-size"] {
            not_larger(key, &expected["info"][key], &got["info"][key], slack)?;
        }
    }
    Ok(())
}

/// What filesystems allocate at a time, for images that have no clusters.
pub const BLOCK: u64 = 4096;

fn not_larger(what: &str, expected: &Value, got: &Value, slack: u64) -> Outcome {
    match (expected.as_u64(), got.as_u64()) {
        (Some(expected), Some(got)) if got <= expected + slack => Ok(()),
        _ => Err(format!(
            "{what}: {got} is more than {expected} and {slack} bytes"
        )),
    }
}

fn without_chance(info: &Value) -> Value {
    let mut info = info.clone();
    if let Some(all) = info.as_object_mut() {
        clear(all, &["actual-size"]);
    }
    let children = info.get_mut("children").and_then(Value::as_array_mut);
    for child in children.into_iter().flatten() {
        if let Some(all) = child.get_mut("info").and_then(Value::as_object_mut) {
            clear(all, &["actual-size", "virtual-size"]);
        }
    }
    let specific = info.pointer_mut("/format-specific/data");
    if let Some(all) = specific.and_then(Value::as_object_mut) {
        clear(all, &["cid", "parent-cid"]);
    }
    info
}

fn clear(all: &mut Map<String, Value>, keys: &[&str]) {
    for key in keys {
        if let Some(value) = all.get_mut(*key) {
            *value = Value::Null;
        }
    }
}
