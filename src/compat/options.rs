//! Lists of `key=value` options: how `-o` writes them and how the `Formatting`
//! line shows them.

use instar_guest::Format;

/// Splits what `-o` gave: elements between commas, and `,,` for a comma inside
/// one. A key without a value is `on`, or `off` where `no` stands before it.
pub fn parse(text: &str) -> Vec<(String, String)> {
    elements(text)
        .into_iter()
        .filter(|element| !element.is_empty())
        .map(|element| match element.split_once('=') {
            Some((key, value)) => (key.to_owned(), value.to_owned()),
            None => match element.strip_prefix("no") {
                Some(key) => (key.to_owned(), "off".to_owned()),
                None => (element, "on".to_owned()),
            },
        })
        .collect()
}

/// Whether `-o` takes this: no element is empty or begins with a comma.
pub fn is_list(text: &str) -> bool {
    let is_sound = |element: &String| !element.is_empty() && !element.starts_with(',');
    text.is_empty() || elements(text).iter().all(is_sound)
}

fn elements(text: &str) -> Vec<String> {
    let mut elements = vec![String::new()];
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        if c == ',' && rest.next_if_eq(&',').is_none() {
            elements.push(String::new());
        } else if let Some(element) = elements.last_mut() {
            element.push(c);
        }
    }
    elements
}

/// Removes a key and returns the last value that it had.
pub fn take(options: &mut Vec<(String, String)>, key: &str) -> Option<String> {
    options
        .extract_if(.., |(name, _)| name == key)
        .last()
        .map(|(_, value)| value)
}

/// Whether the list of options is asked for, not an image.
pub fn wants_help(text: &str) -> bool {
    elements(text)
        .iter()
        .any(|element| element == "help" || element == "?")
}

/// An option as the list shows it: its name with the kind of value, and what it
/// means.
type Listed = (&'static str, &'static str);

const SIZE: Listed = ("size=<size>", "Size of the disk");
const BACKING_FILE: Listed = (
    "backing_file=<str>",
    "Image that holds what this one does not",
);

const RAW: &[Listed] = &[
    (
        "preallocation=<str>",
        "What is allocated at once: off, falloc, full",
    ),
    SIZE,
];

const QCOW2: &[Listed] = &[
    BACKING_FILE,
    ("backing_fmt=<str>", "Format of that image"),
    ("cluster_size=<size>", "Unit of allocation: 512 to 2M"),
    ("compat=<str>", "Version of the format: v2 (0.10), v3 (1.1)"),
    (
        "compression_type=<str>",
        "How clusters are compressed: zlib, zstd",
    ),
    ("data_file=<str>", "File of its own for the data"),
    (
        "data_file_raw=<bool (on/off)>",
        "Keep that file a raw image of the disk",
    ),
    (
        "extended_l2=<bool (on/off)>",
        "Allocate in 32nds of a cluster",
    ),
    (
        "lazy_refcounts=<bool (on/off)>",
        "Bring reference counts up to date later",
    ),
    (
        "preallocation=<str>",
        "What is allocated at once: off, metadata, falloc, full",
    ),
    ("refcount_bits=<num>", "Width of a reference count: 1 to 64"),
    SIZE,
];

const VMDK: &[Listed] = &[
    (
        "adapter_type=<str>",
        "Disk controller: ide, buslogic, lsilogic, legacyESX",
    ),
    BACKING_FILE,
    ("backing_fmt=<str>", "Format of that image: vmdk"),
    (
        "compat6=<bool (on/off)>",
        "Hardware version 6; not together with hwversion",
    ),
    ("hwversion=<str>", "Virtual hardware version"),
    SIZE,
    (
        "subformat=<str>",
        "monolithicSparse, monolithicFlat, twoGbMaxExtentSparse, twoGbMaxExtentFlat",
    ),
    ("toolsversion=<str>", "Version of the guest's VMware Tools"),
    (
        "zeroed_grain=<bool (on/off)>",
        "Note grains that are zero without storing them",
    ),
];

const VHD: &[Listed] = &[
    (
        "force_size=<bool (on/off)>",
        "Exactly this size, not the next one with a CHS geometry",
    ),
    SIZE,
    ("subformat=<str>", "dynamic, fixed"),
];

const VHDX: &[Listed] = &[
    (
        "block_size=<size>",
        "Unit of allocation: 1M to 256M, 0 for one that suits the size",
    ),
    (
        "block_state_zero=<bool (on/off)>",
        "Blocks without data are marked as zero",
    ),
    ("log_size=<size>", "Length of the log, a multiple of 1M"),
    SIZE,
    ("subformat=<str>", "dynamic, fixed"),
];

/// The list of a format's options.
pub fn help(format: Format) -> String {
    let options = match format {
        Format::Raw => RAW,
        Format::Qcow2 => QCOW2,
        Format::Vmdk => VMDK,
        Format::Vhd => VHD,
        Format::Vhdx => VHDX,
    };
    let mut text = format!("Supported {} options:\n", format.name());
    for (option, meaning) in options {
        text.push_str(&format!("  {option:<22} - {meaning}\n"));
    }
    text
}

/// The line that `create` prints.
pub fn formatting(file: &str, format: &str, options: &[(String, String)]) -> String {
    let mut line = format!("Formatting '{file}', fmt={format}");
    for (key, value) in options {
        line.push_str(&format!(" {key}={}", value.replace(',', ",,")));
    }
    line.push('\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        let owned = |&(key, value): &(&str, &str)| (key.to_owned(), value.to_owned());
        pairs.iter().map(owned).collect()
    }

    #[test]
    fn options_split_at_single_commas() {
        assert_eq!(parse(""), []);
        assert_eq!(
            parse("cluster_size=4k,backing_file=a,,b=c,lazy_refcounts"),
            pairs(&[
                ("cluster_size", "4k"),
                ("backing_file", "a,b=c"),
                ("lazy_refcounts", "on")
            ])
        );
        assert_eq!(parse("a=x,,,b=y"), pairs(&[("a", "x,"), ("b", "y")]));
    }

    #[test]
    fn a_switch_without_a_value_may_be_negated() {
        assert_eq!(
            parse("nolazy_refcounts"),
            pairs(&[("lazy_refcounts", "off")])
        );
        assert_eq!(parse("note=on"), pairs(&[("note", "on")]));
    }

    #[test]
    fn a_list_has_no_empty_elements() {
        for text in ["", "a", "a=1,b", "a=x,,y", "a=x,,", "a,,,b"] {
            assert!(is_list(text), "{text:?}");
        }
        for text in [",", "a,", ",a", ",,a=1", "a=1,,,"] {
            assert!(!is_list(text), "{text:?}");
        }
    }

    #[test]
    fn only_the_bare_word_asks_for_help() {
        assert!(wants_help("cluster_size=4k,help") && wants_help("?"));
        assert!(!wants_help("help=on") && !wants_help("helpless"));
    }

    #[test]
    fn the_last_value_of_a_key_counts() {
        let mut options = parse("size=1M,compat=1.1,size=2M");
        assert_eq!(take(&mut options, "size").as_deref(), Some("2M"));
        assert_eq!(options, pairs(&[("compat", "1.1")]));
        assert_eq!(take(&mut options, "size"), None);
    }

    #[test]
    fn the_formatting_line_doubles_commas() {
        let options = pairs(&[("size", "1024"), ("backing_file", "a,b")]);
        assert_eq!(
            formatting("x,y", "qcow2", &options),
            "Formatting 'x,y', fmt=qcow2 size=1024 backing_file=a,,b\n"
        );
    }
}
