//! VMDK images under test: their files, what qemu-img says, what the engine says.

use crate::disk::Random;
use crate::lab::Lab;
use instar_guest::facts::{Fact, FactValue, Facts};
use instar_guest::proto::{Create, PlanReply, Preallocation};
use instar_guest::testing::{FRESH, MemHost, Session};
use instar_guest::{ExtentKind, Failure, Format, Reply, Request};
use serde_json::{Map, Value, json};

/// The image of every test.
pub const DISK: &str = "disk.vmdk";

/// The image in a lab with the files that it names, open.
pub fn opened(lab: &Lab) -> (Session, Facts) {
    let mut session = Session::new(lab.bytes(DISK));
    let facts = session.open(Some(Format::Vmdk)).expect("the image opens");
    if facts.files.is_empty() {
        return (session, facts);
    }
    let files = facts.files.iter();
    session.host.others = files.map(|file| Some(lab.bytes(&file.name))).collect();
    let facts = session.open(Some(Format::Vmdk)).expect("its extents open");
    (session, facts)
}

/// Runs qemu-io commands on the image.
pub fn qemu_io(lab: &Lab, commands: &[String]) {
    for chunk in commands.chunks(64) {
        let mut words = vec!["-f", "vmdk"];
        for command in chunk {
            words.extend(["-c", command.as_str()]);
        }
        words.push(DISK);
        let output = lab.run("qemu-io", &words);
        assert!(!output.contains("failed"), "qemu-io {chunk:?}: {output}");
    }
}

/// Writes of random places and lengths.
pub fn scattered(size: u64, count: u64, seed: u64) -> Vec<String> {
    let mut random = Random(seed);
    (0..count)
        .map(|_| {
            let at = random.below(size / 512) * 512;
            let len = (random.below(300) * 512 + 512).min(size - at);
            format!("write -P {} {at} {len}", 1 + random.below(255))
        })
        .collect()
}

/// An image with scattered data.
pub fn make(lab: &Lab, options: &str, size: u64) {
    lab.qemu_img(&format!(
        "create -q -f vmdk -o subformat={options} {DISK} {size}"
    ));
    qemu_io(lab, &scattered(size, 40, 7));
}

/// What the disk holds, as qemu-img reads it.
pub fn content(lab: &Lab) -> Vec<u8> {
    lab.qemu_img(&format!("convert -f vmdk -O raw {DISK} content.raw"));
    lab.bytes("content.raw")
}

/// A tree of facts as JSON, the image's own name filled in.
pub fn tree(facts: &[Fact]) -> Value {
    let mut rest = facts;
    members(&mut rest, 0)
}

fn members(rest: &mut &[Fact], depth: u8) -> Value {
    let mut object = Map::new();
    while let Some((fact, later)) = rest.split_first().filter(|(fact, _)| fact.depth == depth) {
        *rest = later;
        object.insert(fact.key.clone(), value(fact, rest, depth));
    }
    Value::Object(object)
}

fn value(fact: &Fact, rest: &mut &[Fact], depth: u8) -> Value {
    match &fact.value {
        FactValue::Bool(value) => json!(value),
        FactValue::Number(value) => json!(value),
        FactValue::Text(text) if fact.key == "filename" && text.is_empty() => json!(DISK),
        FactValue::Text(text) => json!(text),
        FactValue::Object => members(rest, depth + 1),
        FactValue::List => {
            let mut list = Vec::new();
            while let Some((element, later)) =
                rest.split_first().filter(|(fact, _)| fact.depth > depth)
            {
                *rest = later;
                list.push(value(element, rest, depth + 1));
            }
            Value::Array(list)
        }
    }
}

/// The whole mapping as `qemu-img map` shows one.
pub fn map(session: &mut Session, size: u64) -> Vec<Value> {
    let mut list: Vec<Value> = Vec::new();
    for extent in session.map(0, size).expect("a mapping") {
        let (present, zero, data, compressed, at) = match extent.kind {
            ExtentKind::Data { at, .. } => (true, false, true, false, Some(at)),
            ExtentKind::Compressed => (true, false, true, true, None),
            ExtentKind::Zero { at } => (true, true, false, false, at),
            ExtentKind::Unallocated { .. } => (false, true, false, false, None),
        };
        let mut entry = json!({
            "start": extent.offset, "length": extent.len, "depth": 0, "present": present,
            "zero": zero, "data": data, "compressed": compressed,
        });
        if let Some(at) = at {
            entry["offset"] = json!(at);
        }
        list.push(entry);
    }
    list
}

/// A request to create an image.
pub fn create(size: u64, options: &str) -> Create {
    Create {
        format: Format::Vmdk,
        size: size.next_multiple_of(512),
        options: options
            .split(',')
            .filter_map(|option| option.split_once('='))
            .map(|(key, value)| (key.to_string(), value.to_string()))
            .collect(),
        backing: None,
        backing_size: None,
        backing_identity: None,
    }
}

/// The answer to a request for a plan.
pub fn plan(session: &mut Session, request: Request) -> Result<PlanReply, Failure> {
    match session.call(request)? {
        Reply::Plan(reply) => Ok(reply),
        other => panic!("not a plan: {other:?}"),
    }
}

/// The answer to a request to create.
pub fn plan_create(session: &mut Session, create: Create) -> Result<PlanReply, Failure> {
    let request = Request::Create {
        create,
        name: DISK.to_string(),
        fresh: FRESH,
    };
    plan(session, request)
}

/// A request to resize.
pub fn resize(size: u64, preallocation: Preallocation, shrink: bool) -> Request {
    Request::Resize {
        size,
        preallocation,
        shrink,
        backing_size: None,
    }
}

/// Writes the files of a host into the lab: the image, and the others by name.
pub fn store(lab: &Lab, host: &MemHost, names: &[String]) {
    lab.write(DISK, &host.image);
    for (name, file) in names.iter().zip(&host.others) {
        match file {
            Some(bytes) => lab.write(name, bytes),
            None => {
                // A file that took the image's name has none of its own.
                let _ = std::fs::remove_file(lab.path(name));
            }
        }
    }
}
