//! Checks against `qemu-img check`: the same images with the same damage, the
//! same counters and the same lines.

use crate::damages::{DAMAGES, Image};
use crate::disk::Random;
use crate::lab::{Check, Lab};
use instar_guest::findings::{Finding, Repair, Report, Severity};
use instar_guest::proto::PlanReply;
use instar_guest::testing::Session;
use instar_guest::{Failure, Reply, Request};
use serde_json::Value;
use std::collections::BTreeMap;
use std::process::{Command, Output};

/// Images with flipped bits per kind; `INSTAR_FLIPS` tries more.
const FLIPS: u64 = 10;

/// All checks by name.
pub fn trials() -> Vec<(String, Check)> {
    let damages = IMAGES.iter().map(|kind| {
        let check: Check = Box::new(move || kind.check());
        let name = format!("damage_is_found_as_qemu_img_finds_it::{}", kind.name);
        (name, check)
    });
    let flips = IMAGES.iter().map(|kind| {
        let check: Check = Box::new(move || flipped(kind));
        let name = format!(
            "flipped_bits_are_found_as_qemu_img_finds_them::{}",
            kind.name
        );
        (name, check)
    });
    let beyond: (String, Check) = (
        "what_lies_beyond_the_end_is_warned_of".into(),
        Box::new(beyond_the_end),
    );
    damages.chain(flips).chain([beyond]).collect()
}

/// Bits of the metadata are flipped at random: qemu-img and the engine see the
/// same in what is left, where both open it.
fn flipped(kind: &Kind) {
    let lab = Lab::new();
    let sound = kind.make(&lab);
    let is_data = |byte: u8| matches!(byte, 0x11 | 0x22 | 0x33 | 0x34 | 0x44 | 0x55);
    let places: Vec<usize> = (512..sound.len())
        .filter(|&at| sound[at] != 0 && !is_data(sound[at]))
        .collect();
    let mut random = Random(0x1234_5678_9abc_def1);
    let count = std::env::var("INSTAR_FLIPS").map_or(FLIPS, |it| it.parse().expect("a number"));
    let mut compared = 0;
    for _ in 0..count {
        let mut image = sound.clone();
        let mut flips = Vec::new();
        for _ in 0..=random.below(3) {
            let at = places[random.below(places.len() as u64) as usize];
            let at = at ^ random.below(8) as usize;
            let bit = random.below(8);
            image[at] ^= 1 << bit;
            flips.push((at, bit));
        }
        if Session::new(image.clone()).open(None).is_err() {
            continue;
        }
        lab.write("disk.qcow2", &image);
        let theirs = Verdict::of_qemu(&lab, "").sorted();
        if theirs.lines.is_empty() && theirs.sums.is_empty() {
            // qemu-img does not open it: two bitmaps have the same name.
            continue;
        }
        let ours = Verdict::of_engine(&lab, &image).sorted();
        compared += 1;
        let same = ours == theirs;
        assert!(same, "{flips:x?}:\n{}\n{}", ours.short(), theirs.short());
    }
    assert!(
        compared >= count / 4,
        "{compared} of {count} could be opened"
    );
}

/// A kind of image.
pub struct Kind {
    pub name: &'static str,
    pub options: &'static str,
    pub extras: Extras,
}

/// What an image has besides data.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Extras {
    Nothing,
    Snapshots,
    Compressed,
    Bitmaps,
}

pub const IMAGES: [Kind; 12] = [
    kind("defaults", "", Extras::Nothing),
    kind("clusters_512", "cluster_size=512", Extras::Nothing),
    kind(
        "clusters_4k_snapshots",
        "cluster_size=4k",
        Extras::Snapshots,
    ),
    kind("clusters_2m", "cluster_size=2M", Extras::Nothing),
    kind(
        "refcounts_1",
        "cluster_size=4k,refcount_bits=1",
        Extras::Nothing,
    ),
    kind(
        "refcounts_8_snapshots",
        "cluster_size=4k,refcount_bits=8",
        Extras::Snapshots,
    ),
    kind(
        "refcounts_64",
        "cluster_size=1k,refcount_bits=64",
        Extras::Snapshots,
    ),
    kind(
        "version_2",
        "compat=0.10,cluster_size=4k",
        Extras::Snapshots,
    ),
    kind(
        "extended_l2",
        "extended_l2=on,cluster_size=16k",
        Extras::Snapshots,
    ),
    kind("compressed", "cluster_size=4k", Extras::Compressed),
    kind("bitmaps", "cluster_size=4k", Extras::Bitmaps),
    kind(
        "data_file",
        "cluster_size=4k,data_file=disk.data",
        Extras::Nothing,
    ),
];

const fn kind(name: &'static str, options: &'static str, extras: Extras) -> Kind {
    Kind {
        name,
        options,
        extras,
    }
}

impl Kind {
    /// Makes the image `disk.qcow2` in a lab.
    pub fn make(&self, lab: &Lab) -> Vec<u8> {
        let options = match self.options {
            "" => String::new(),
            options => format!("-o {options}"),
        };
        lab.qemu_img(&format!("create -q -f qcow2 {options} disk.qcow2 3M"));
        let writes = [
            "write -P 0x11 0 20k",
            "write -P 0x22 300k 33k",
            "write -z 1M 64k",
        ];
        lab.qemu_io("disk.qcow2", &writes);
        match self.extras {
            Extras::Nothing => {}
            Extras::Snapshots => {
                lab.qemu_img("snapshot -c first disk.qcow2");
                lab.qemu_io("disk.qcow2", &["write -P 0x33 0 5k", "write -P 0x34 2M 9k"]);
                lab.qemu_img("snapshot -c second disk.qcow2");
                lab.qemu_io("disk.qcow2", &["write -P 0x44 8k 5k"]);
            }
            Extras::Compressed => {
                lab.qemu_img(&format!(
                    "convert -c -O qcow2 {options} disk.qcow2 new.qcow2"
                ));
                lab.write("disk.qcow2", &lab.bytes("new.qcow2"));
            }
            Extras::Bitmaps => {
                lab.qemu_img("bitmap --add -g 512 disk.qcow2 b0");
                lab.qemu_img("bitmap --add -g 65536 disk.qcow2 b1");
                lab.qemu_io("disk.qcow2", &["write -P 0x55 2M 9k"]);
            }
        }
        lab.bytes("disk.qcow2")
    }

    /// Every damage that the image can have.
    pub fn damaged(&self, lab: &Lab) -> Vec<(&'static str, Vec<u8>)> {
        let sound = self.make(lab);
        let mut list = vec![("none", sound.clone())];
        for (name, damage) in DAMAGES {
            let mut image = Image::new(sound.clone());
            if damage(&mut image).is_some() {
                assert!(image.bytes != sound, "{name} changes nothing");
                list.push((name, image.bytes));
            }
        }
        list
    }

    fn check(&self) {
        let lab = Lab::new();
        let mut wrong = String::new();
        for (name, image) in self.damaged(&lab) {
            lab.write("disk.qcow2", &image);
            let theirs = Verdict::of_qemu(&lab, "");
            let ours = Verdict::of_engine(&lab, &image);
            if ours != theirs {
                wrong += &format!("{name}:\n{}\n{}\n", ours.short(), theirs.short());
            }
        }
        assert!(wrong.is_empty(), "ours, then qemu-img's\n{wrong}");
    }
}

/// What a check says, as far as both say it.
#[derive(Debug, PartialEq, Eq)]
pub struct Verdict {
    pub exit: i32,
    /// The sums in JSON, where the check was completed.
    pub sums: BTreeMap<String, u64>,
    pub lines: Vec<String>,
}

impl Verdict {
    /// What qemu-img says.
    pub fn of_qemu(lab: &Lab, options: &str) -> Self {
        let line = format!("check -f qcow2 --output json {options} disk.qcow2");
        let output: Output = Command::new("qemu-img")
            .args(line.split_whitespace())
            .current_dir(lab.path(""))
            .output()
            .expect("an installed tool");
        let text = String::from_utf8(output.stderr).expect("text");
        let sums = match serde_json::from_slice::<Value>(&output.stdout) {
            Ok(Value::Object(sums)) => sums,
            _ => serde_json::Map::default(),
        };
        Self {
            exit: output.status.code().expect("an exit"),
            sums: sums
                .into_iter()
                .filter_map(|(key, value)| Some((key, value.as_u64()?)))
                .collect(),
            lines: text
                .lines()
                .filter(|line| !line.starts_with("qemu-img: "))
                .map(String::from)
                .collect(),
        }
    }

    /// What the engine says.
    pub fn of_engine(lab: &Lab, image: &[u8]) -> Self {
        let mut session = Session::new(image.to_vec());
        if lab.path("disk.data").exists() {
            session.host.others = vec![Some(lab.bytes("disk.data"))];
        }
        let answer = check(&mut session, None);
        Self::new(&answer.map(|(report, _)| report), &session.host.findings)
    }

    /// Tables that snapshots share are looked at once, not in the order of the
    /// snapshots.
    fn sorted(mut self) -> Self {
        self.lines.sort();
        self
    }

    /// What an earlier repair has fixed counts as well.
    pub fn fixed(&mut self, corruptions: u64, leaks: u64) {
        for (key, value) in [("corruptions-fixed", corruptions), ("leaks-fixed", leaks)] {
            if value > 0 {
                self.sums.insert(key.into(), value);
            }
        }
    }

    /// The verdict, where it is wrong.
    pub fn short(&self) -> String {
        let text = format!("{self:?}");
        text.chars().take(1500).collect()
    }

    pub fn new(report: &Result<Report, Failure>, findings: &[Finding]) -> Self {
        let lines = findings
            .iter()
            .filter(|finding| is_theirs(finding))
            .map(|finding| finding.text.clone())
            .collect();
        match report {
            Err(_) => Self {
                exit: 1,
                sums: BTreeMap::new(),
                lines,
            },
            Ok(report) => Self {
                exit: exit(report),
                sums: sums(report),
                lines,
            },
        }
    }
}

/// Opens the image and asks for a check.
pub fn check(
    session: &mut Session,
    repair: Option<Repair>,
) -> Result<(Report, PlanReply), Failure> {
    session.host.findings.clear();
    session.open(None)?;
    match session.call(Request::Check { repair })? {
        Reply::Checked { report, repair } => Ok((report, repair)),
        other => panic!("not an answer to Check: {other:?}"),
    }
}

/// Whether qemu-img has the line, too.
fn is_theirs(finding: &Finding) -> bool {
    let both = ["Use qemu-img amend", "qcow2: "];
    finding.severity != Severity::Warning || both.iter().any(|it| finding.text.starts_with(it))
}

fn exit(report: &Report) -> i32 {
    match report {
        report if report.check_errors > 0 => 1,
        report if report.corruptions > 0 => 2,
        report if report.leaks > 0 => 3,
        _ => 0,
    }
}

fn sums(report: &Report) -> BTreeMap<String, u64> {
    let all = [
        ("image-end-offset", report.image_end_offset.unwrap_or(0)),
        ("total-clusters", report.total_clusters),
        ("check-errors", report.check_errors),
        ("leaks", report.leaks),
        ("leaks-fixed", report.leaks_fixed),
        ("corruptions", report.corruptions),
        ("corruptions-fixed", report.corruptions_fixed),
        ("allocated-clusters", report.allocated_clusters),
        ("fragmented-clusters", report.fragmented_clusters),
        ("compressed-clusters", report.compressed_clusters),
    ];
    all.into_iter()
        .filter(|&(key, value)| value != 0 || key == "check-errors")
        .map(|(key, value)| (key.to_string(), value))
        .collect()
}

/// What lies behind the end of the disk is warned of, and not counted.
fn beyond_the_end() {
    let lab = Lab::new();
    lab.qemu_img("create -q -f qcow2 -o cluster_size=4k disk.qcow2 64k");
    lab.qemu_io("disk.qcow2", &["write -P 1 0 64k"]);
    let mut image = lab.bytes("disk.qcow2");
    image[24..32].copy_from_slice(&(33u64 * 1024 + 512).to_be_bytes());
    let mut session = Session::new(image);
    let (report, _) = check(&mut session, None).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0));
    let texts: Vec<_> = session
        .host
        .findings
        .iter()
        .map(|it| it.text.as_str())
        .collect();
    let expected = [
        "7 clusters are mapped beyond the end of the disk (34304 bytes)",
        "the last cluster holds stale bytes beyond the end of the disk (34304 bytes)",
    ];
    assert_eq!(texts, expected);
}
