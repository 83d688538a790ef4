//! What `info` prints, for people and as JSON.

use super::size::Human;
use super::version::QemuVersion;
use super::{json, localtime, names};
use crate::image::printable_name;
use instar_guest::facts::{Fact, FactValue, Facts, Snapshot};
use serde_json::{Map, Value, json};
use std::fmt::{self, Write as _};
use std::fs::Metadata;
use std::iter::Peekable;
use std::os::unix::fs::MetadataExt;
use std::slice::Iter;

/// What the host's filesystem says about a file, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OnDisk {
    /// Length of the file.
    pub len: u64,
    /// Disk space that it takes.
    pub allocated: u64,
}

impl From<&Metadata> for OnDisk {
    fn from(found: &Metadata) -> Self {
        Self {
            len: found.len(),
            allocated: found.blocks() * 512,
        }
    }
}

/// One image of a backing chain, as `info` reports it.
#[derive(Clone, Debug)]
pub struct Layer<'a> {
    /// The name under which the user or the overlay knows it.
    file: String,
    facts: &'a Facts,
    /// The image file.
    image: OnDisk,
    /// The other open files, with their names as seen from where the user is.
    parts: Vec<(String, OnDisk)>,
}

impl<'a> Layer<'a> {
    /// The image that the user or the overlay knows as `file`. `on_disk` are
    /// its open files in the order of their numbers.
    pub fn new(file: String, facts: &'a Facts, on_disk: &[OnDisk]) -> Self {
        let nothing = OnDisk {
            len: 0,
            allocated: 0,
        };
        let (image, others) = match on_disk {
            [image, others @ ..] => (*image, others),
            [] => (nothing, &[][..]),
        };
        let names = facts.files.iter();
        let names = names.map(|named| names::combine(&file, &named.name));
        let parts = names.zip(others.iter().copied()).collect();
        Self {
            file,
            facts,
            image,
            parts,
        }
    }

    /// The name of the backing file as seen from where this image is.
    pub fn backing_file(&self) -> Option<String> {
        let backing = self.facts.backing.as_ref()?;
        Some(names::combine(&self.file, backing.name()))
    }

    fn virtual_size(&self) -> u64 {
        whole_sectors(self.facts.virtual_size)
    }

    fn allocated(&self) -> u64 {
        let parts = self.parts.iter().map(|(_, part)| part.allocated);
        parts.fold(self.image.allocated, u64::saturating_add)
    }

    /// The nodes below the format: the files, the last extent first.
    fn nodes(&self) -> impl Iterator<Item = (String, &str, OnDisk)> {
        let parts = self.parts.iter().enumerate().rev();
        let parts = parts.map(|(number, (name, part))| {
            let node = format!("extents.{number}");
            (node, name.as_str(), *part)
        });
        parts.chain([("file".to_owned(), self.file.as_str(), self.image)])
    }

    /// The format's own facts. An image names its files as seen from its own
    /// place, and itself not at all.
    fn specific(&self, version: QemuVersion) -> Map<String, Value> {
        let mut specific = members(&mut self.facts.specific.iter().peekable(), 0);
        let encryption = specific.get_mut("encrypt").and_then(Value::as_object_mut);
        if !version.shows_detached_header() {
            encryption.and_then(|luks| luks.shift_remove("detached-header"));
        }
        let extents = specific.get_mut("extents").and_then(Value::as_array_mut);
        for extent in extents.into_iter().flatten() {
            if let Some(Value::String(name)) = extent.get_mut("filename") {
                *name = match name.as_str() {
                    "" => self.file.clone(),
                    named => names::combine(&self.file, named),
                };
            }
        }
        specific
    }
}

/// Sizes are shown in whole sectors.
fn whole_sectors(bytes: u64) -> u64 {
    bytes.checked_next_multiple_of(512).unwrap_or(bytes)
}

/// JSON of one image.
pub fn to_json(layer: &Layer<'_>, version: QemuVersion) -> String {
    json::pretty(&layer_json(layer, version)) + "\n"
}

/// JSON of a backing chain: a list, the image first.
pub fn chain_to_json(layers: &[Layer<'_>], version: QemuVersion) -> String {
    let layers = layers.iter().map(|layer| layer_json(layer, version));
    json::pretty(&Value::Array(layers.collect())) + "\n"
}

/// The members in qemu's order, which is that of a hash table.
fn layer_json(layer: &Layer<'_>, version: QemuVersion) -> Value {
    let facts = layer.facts;
    let backing = facts.backing.as_ref();
    let specific = layer.specific(version);
    let snapshots: Vec<Value> = facts.snapshots.iter().map(snapshot_json).collect();
    let mut all = Map::new();
    let mut put = |key: &str, value: Option<Value>| {
        if let Some(value) = value {
            all.insert(key.to_owned(), value);
        }
    };
    let children = || layer.nodes().map(node_json).collect();
    put("children", version.shows_children().then(children));
    put(
        "backing-filename-format",
        backing.and_then(|backing| backing.format.clone().map(Value::from)),
    );
    put(
        "snapshots",
        (!snapshots.is_empty()).then_some(Value::from(snapshots)),
    );
    put("virtual-size", Some(layer.virtual_size().into()));
    put("filename", Some(layer.file.as_str().into()));
    put("cluster-size", facts.cluster_size.map(Value::from));
    put("format", Some(facts.format.name().into()));
    put("actual-size", Some(layer.allocated().into()));
    put(
        "format-specific",
        (!specific.is_empty())
            .then(|| json!({"type": facts.format.name(), "data": Value::Object(specific)})),
    );
    put(
        "full-backing-filename",
        layer.backing_file().map(Value::from),
    );
    put("encrypted", facts.encrypted.then_some(true.into()));
    put(
        "backing-filename",
        backing.map(|backing| backing.name().into()),
    );
    put("dirty-flag", Some(facts.dirty.into()));
    Value::Object(all)
}

/// A node below the format: a file.
fn node_json((node, file, on_disk): (String, &str, OnDisk)) -> Value {
    json!({
        "name": node,
        "info": {
            "children": [],
            "virtual-size": whole_sectors(on_disk.len),
            "filename": file,
            "format": "file",
            "actual-size": on_disk.allocated,
            "format-specific": {"type": "file", "data": {}},
            "dirty-flag": false
        }
    })
}

fn snapshot_json(snapshot: &Snapshot) -> Value {
    let mut all = Map::new();
    if let Some(icount) = snapshot.icount {
        all.insert("icount".to_owned(), icount.into());
    }
    let rest = [
        (
            "vm-clock-nsec",
            (snapshot.vm_clock_nsec % 1_000_000_000).into(),
        ),
        ("name", snapshot.name.as_str().into()),
        ("date-sec", snapshot.date_sec.into()),
        ("date-nsec", snapshot.date_nsec.into()),
        (
            "vm-clock-sec",
            (snapshot.vm_clock_nsec / 1_000_000_000).into(),
        ),
        ("id", snapshot.id.as_str().into()),
        ("vm-state-size", snapshot.vm_state_size.into()),
    ];
    all.extend(rest.map(|(key, value): (&str, Value)| (key.to_owned(), value)));
    Value::Object(all)
}

type Lines<'a> = Peekable<Iter<'a, Fact>>;

/// The members of an object: the lines of this depth, each with what it owns.
/// The depth is a byte, so recursion is bounded.
fn members(lines: &mut Lines<'_>, depth: u8) -> Map<String, Value> {
    let mut members = Map::new();
    while let Some(line) = lines.next_if(|line| line.depth >= depth) {
        members.insert(line.key.clone(), fact_json(line, lines));
    }
    members
}

fn elements(lines: &mut Lines<'_>, depth: u8) -> Vec<Value> {
    let mut elements = Vec::new();
    while let Some(line) = lines.next_if(|line| line.depth >= depth) {
        elements.push(fact_json(line, lines));
    }
    elements
}

fn fact_json(line: &Fact, lines: &mut Lines<'_>) -> Value {
    let inside = line.depth.saturating_add(1);
    match &line.value {
        FactValue::Bool(value) => (*value).into(),
        FactValue::Number(value) => (*value).into(),
        FactValue::Text(value) => value.as_str().into(),
        FactValue::Object if inside > line.depth => Value::Object(members(lines, inside)),
        FactValue::List if inside > line.depth => Value::Array(elements(lines, inside)),
        FactValue::Object | FactValue::List => Value::Null,
    }
}

/// The text for people, of one image or of a chain.
pub fn human(layers: &[Layer<'_>], version: QemuVersion) -> String {
    let texts = layers.iter().map(|layer| layer_human(layer, version));
    let texts: Vec<String> = texts.collect();
    texts.join("\n")
}

fn layer_human(layer: &Layer<'_>, version: QemuVersion) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = write_layer(&mut out, layer, version);
    out
}

fn write_layer(out: &mut String, layer: &Layer<'_>, version: QemuVersion) -> fmt::Result {
    let facts = layer.facts;
    let size = layer.virtual_size();
    writeln!(out, "image: {}", layer.file)?;
    writeln!(out, "file format: {}", facts.format.name())?;
    writeln!(out, "virtual size: {} ({size} bytes)", Human(size))?;
    writeln!(out, "disk size: {}", Human(layer.allocated()))?;
    if facts.encrypted {
        writeln!(out, "encrypted: yes")?;
    }
    if let Some(size) = facts.cluster_size {
        writeln!(out, "cluster_size: {size}")?;
    }
    if facts.dirty {
        writeln!(out, "cleanly shut down: no")?;
    }
    write_backing(out, layer)?;
    if !facts.snapshots.is_empty() {
        write_snapshots(out, &facts.snapshots, version)?;
    }
    let specific = layer.specific(version);
    if !specific.is_empty() {
        writeln!(out, "Format specific information:")?;
        write_members(out, &specific, 1)?;
    }
    match version.shows_children() {
        true => layer.nodes().try_for_each(|node| write_node(out, node)),
        false => Ok(()),
    }
}

fn write_backing(out: &mut String, layer: &Layer<'_>) -> fmt::Result {
    let Some(backing) = &layer.facts.backing else {
        return Ok(());
    };
    write!(out, "backing file: {}", printable_name(backing.name()))?;
    match layer.backing_file() {
        Some(full) if full != backing.name() => {
            writeln!(out, " (actual path: {})", printable_name(&full))?;
        }
        _ => writeln!(out)?,
    }
    match &backing.format {
        Some(format) => writeln!(out, "backing file format: {}", printable_name(format)),
        None => Ok(()),
    }
}

fn write_node(out: &mut String, (node, file, on_disk): (String, &str, OnDisk)) -> fmt::Result {
    let len = whole_sectors(on_disk.len);
    writeln!(out, "Child node '/{node}':")?;
    writeln!(out, "    filename: {file}")?;
    writeln!(out, "    protocol type: file")?;
    writeln!(out, "    file length: {} ({len} bytes)", Human(len))?;
    writeln!(out, "    disk size: {}", Human(on_disk.allocated))
}

fn write_snapshots(out: &mut String, snapshots: &[Snapshot], version: QemuVersion) -> fmt::Result {
    let wide = version.widens_snapshots();
    let none = if wide { "--" } else { "" };
    writeln!(out, "Snapshot list:")?;
    match wide {
        true => writeln!(
            out,
            "{:<7} {:<16} {:>8} {:>19} {:>15} {:>10}",
            "ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"
        )?,
        false => writeln!(
            out,
            "{:<9} {:<16} {:>8}{:>20}{:>13}{:>11}",
            "ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT"
        )?,
    }
    for snapshot in snapshots {
        let name = padded(&snapshot.name, 16);
        let size = Human(snapshot.vm_state_size).to_string();
        let date = localtime::date(snapshot.date_sec);
        let clock = clock(snapshot.vm_clock_nsec, wide);
        let icount = snapshot.icount.map(|icount| icount.to_string());
        let icount = icount.unwrap_or_else(|| none.to_owned());
        match (wide, &snapshot.id) {
            (true, id) => writeln!(
                out,
                "{} {name} {size:>8} {date:>19} {clock:>15} {icount:>10}",
                padded(id, 7)
            )?,
            (false, id) => writeln!(
                out,
                "{} {name} {size:>8}{date:>20}{clock:>13}{icount:>11}",
                padded(id, 9)
            )?,
        }
    }
    Ok(())
}

/// Pads to a width in bytes, as C does.
fn padded(text: &str, width: usize) -> String {
    let mut text = printable_name(text);
    let missing = width.saturating_sub(text.len());
    text.extend(std::iter::repeat_n(' ', missing));
    text
}

/// Running time of a guest as `hhhh:mm:ss.mmm`, or with two digits for hours.
fn clock(nanoseconds: u64, wide: bool) -> String {
    let milliseconds = nanoseconds / 1_000_000;
    let seconds = milliseconds / 1000;
    let digits = if wide { 4 } else { 2 };
    format!(
        "{:0digits$}:{:02}:{:02}.{:03}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60,
        milliseconds % 1000
    )
}

fn write_members(out: &mut String, members: &Map<String, Value>, level: usize) -> fmt::Result {
    for (key, value) in members {
        write_line(out, &key.replace('-', " "), value, level)?;
    }
    Ok(())
}

fn write_line(out: &mut String, label: &str, value: &Value, level: usize) -> fmt::Result {
    let indent = 4 * level;
    write!(out, "{:indent$}{label}:", "")?;
    match value {
        Value::Object(members) => {
            writeln!(out)?;
            write_members(out, members, level + 1)
        }
        Value::Array(items) => {
            writeln!(out)?;
            for (number, item) in items.iter().enumerate() {
                write_line(out, &format!("[{number}]"), item, level + 1)?;
            }
            Ok(())
        }
        Value::String(text) => writeln!(out, " {}", printable_name(text)),
        value => writeln!(out, " {value}"),
    }
}

#[cfg(test)]
#[path = "info_tests.rs"]
mod tests;
