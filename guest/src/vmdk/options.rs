//! Creation options, in the words and order of qemu-img.

use super::refuse::unsupported;
use crate::error::Failure;
use crate::options::{invalid, switch, unknown};
use crate::proto::Create;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

/// How a new image's bytes lie in files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subformat {
    /// Its name.
    pub name: &'static str,
    /// Whether extents hold the disk's bytes as they are.
    pub flat: bool,
    /// Whether an extent has at most 2 GiB.
    pub split: bool,
}

const SUBFORMATS: [Subformat; 4] = [
    Subformat {
        name: "monolithicSparse",
        flat: false,
        split: false,
    },
    Subformat {
        name: "monolithicFlat",
        flat: true,
        split: false,
    },
    Subformat {
        name: "twoGbMaxExtentSparse",
        flat: false,
        split: true,
    },
    Subformat {
        name: "twoGbMaxExtentFlat",
        flat: true,
        split: true,
    },
];

/// Virtual adapters that QEMU knows.
const ADAPTERS: [&str; 4] = ["ide", "buslogic", "lsilogic", "legacyESX"];

/// Checked options.
#[derive(Clone, Debug)]
pub struct Options {
    /// How the bytes lie.
    pub subformat: Subformat,
    /// The virtual adapter.
    pub adapter: String,
    /// The version of the virtual hardware.
    pub hardware: String,
    /// The version of the guest tools.
    pub tools: String,
    /// Whether grain table entries of 1 stand for zeroes.
    pub zeroed_grain: bool,
}

/// Options as they were given; the last of two equal ones counts.
#[derive(Default)]
struct Given<'a> {
    adapter: Option<&'a str>,
    compat6: Option<&'a str>,
    hardware: Option<&'a str>,
    subformat: Option<&'a str>,
    tools: Option<&'a str>,
    zeroed_grain: Option<&'a str>,
}

/// Checks the options of a request. Answers them, and all that is effective in
/// the order in which qemu-img prints it.
pub fn parse(create: &Create) -> Result<(Options, Vec<(String, String)>), Failure> {
    let mut given = Given::default();
    for (key, value) in &create.options {
        let slot = match key.as_str() {
            "adapter_type" => &mut given.adapter,
            "compat6" => &mut given.compat6,
            "hwversion" => &mut given.hardware,
            "subformat" => &mut given.subformat,
            "toolsversion" => &mut given.tools,
            "zeroed_grain" => &mut given.zeroed_grain,
            _ => return Err(unknown(key)),
        };
        *slot = Some(value);
    }
    let compat6 = given.compat6.map(|value| switch("compat6", value));
    let zeroed_grain = given
        .zeroed_grain
        .map(|value| switch("zeroed_grain", value));
    let compat6 = compat6.transpose()?.unwrap_or(false);
    let zeroed_grain = zeroed_grain.transpose()?;
    if let Some(backing) = &create.backing
        && backing
            .format
            .as_ref()
            .is_some_and(|format| format != "vmdk")
    {
        return Err(invalid("backing_file must be a vmdk image"));
    }
    let adapter = given.adapter.unwrap_or("ide");
    if !ADAPTERS.contains(&adapter) {
        return Err(invalid(format!("invalid parameter value: {adapter}")));
    }
    let options = Options {
        subformat: subformat(given.subformat)?,
        adapter: adapter.to_string(),
        hardware: hardware(given.hardware, compat6)?.to_string(),
        tools: given.tools.unwrap_or("2147483647").to_string(),
        zeroed_grain: zeroed_grain.unwrap_or(false),
    };
    if options.subformat.flat && create.backing.is_some() {
        return Err(invalid("Flat image can't have backing file"));
    }
    if options.subformat.flat && options.zeroed_grain {
        return Err(invalid("Flat image can't enable zeroed grain"));
    }
    check_text("hwversion", &options.hardware)?;
    check_text("toolsversion", &options.tools)?;
    Ok((options, effective(create, &given, compat6, zeroed_grain)))
}

/// A value goes into the descriptor in quotes and must not end them.
fn check_text(key: &str, value: &str) -> Result<(), Failure> {
    match value.contains(|c: char| c == '"' || c.is_control()) {
        false => Ok(()),
        true => Err(invalid(format!(
            "Parameter '{key}' may have no quotes or control characters"
        ))),
    }
}

fn subformat(name: Option<&str>) -> Result<Subformat, Failure> {
    let name = name.unwrap_or("monolithicSparse");
    if name == "streamOptimized" {
        return Err(unsupported(
            "creating streamOptimized images is not supported, as they are written once, in one \
             go",
        ));
    }
    let known = SUBFORMATS.into_iter().find(|known| known.name == name);
    known.ok_or_else(|| invalid(format!("invalid parameter value: {name}")))
}

fn hardware(version: Option<&str>, compat6: bool) -> Result<&str, Failure> {
    match (version.filter(|&version| version != "undefined"), compat6) {
        (Some(_), true) => Err(invalid("compat6 cannot be enabled with hwversion set")),
        (Some(version), false) => Ok(version),
        (None, true) => Ok("6"),
        (None, false) => Ok("4"),
    }
}

fn effective(
    create: &Create,
    given: &Given<'_>,
    compat6: bool,
    zeroed_grain: Option<bool>,
) -> Vec<(String, String)> {
    let on_off = |on: bool| if on { "on" } else { "off" };
    let size = create.size.to_string();
    let backing = create.backing.as_ref();
    let list = [
        ("size", Some(size.as_str())),
        ("adapter_type", given.adapter),
        ("backing_file", backing.map(|file| file.name.as_str())),
        (
            "backing_fmt",
            backing.and_then(|file| file.format.as_deref()),
        ),
        ("compat6", Some(on_off(compat6))),
        ("hwversion", Some(given.hardware.unwrap_or("undefined"))),
        ("subformat", given.subformat),
        ("toolsversion", given.tools),
        ("zeroed_grain", zeroed_grain.map(on_off)),
    ];
    list.into_iter()
        .filter_map(|(key, value)| Some((key.to_string(), value?.to_string())))
        .collect()
}
