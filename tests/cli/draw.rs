//! Images and changes to them, drawn at random.

use crate::random::Random;

const SECTOR: u64 = 512;
const MIB: u64 = 1 << 20;
/// The largest disk that is drawn, in bytes.
const MAX_SIZE: u64 = 12 * MIB;
/// The size of the largest clusters in bytes.
const CLUSTER: u64 = 2 * MIB;

/// An image as it was drawn, and how it has become.
pub struct Drawn {
    pub format: &'static str,
    options: Vec<&'static str>,
    /// Size in bytes of the raw backing file `base`, if it has one.
    pub base: Option<u64>,
    /// Size of the disk in bytes.
    pub size: u64,
    /// The size that it is to have.
    next: u64,
}

/// Formats, the ones that qemu-img resizes more often.
const FORMATS: [&str; 8] = [
    "qcow2", "qcow2", "qcow2", "qcow2", "raw", "vmdk", "vpc", "vhdx",
];

/// Options that may be combined: of each list none or one.
const QCOW2: &[&[&str]] = &[
    &[
        "compat=0.10",
        "compat=1.1",
        "lazy_refcounts=on",
        "nolazy_refcounts",
    ],
    &[
        "cluster_size=512",
        "cluster_size=4k",
        "cluster_size=16k",
        "cluster_size=0x10000",
    ],
    &[
        "refcount_bits=1",
        "refcount_bits=8",
        "refcount_bits=64",
        "extended_l2=on",
    ],
    &[
        "preallocation=off",
        "preallocation=metadata",
        "preallocation=falloc",
    ],
];
const RAW: &[&[&str]] = &[&[
    "preallocation=off",
    "preallocation=falloc",
    "preallocation=full",
]];
const VMDK: &[&[&str]] = &[
    &[
        "subformat=monolithicSparse",
        "zeroed_grain=on",
        "subformat=twoGbMaxExtentSparse",
    ],
    &["adapter_type=lsilogic", "hwversion=7", "compat6"],
];
const VPC: &[&[&str]] = &[&["force_size", "force_size=off"], &["subformat=fixed"]];
const VHDX: &[&[&str]] = &[
    &["subformat=fixed", "block_state_zero=off"],
    &["block_size=1M", "block_size=2M", "log_size=2M"],
];

fn options_of(format: &str) -> &'static [&'static [&'static str]] {
    match format {
        "qcow2" => QCOW2,
        "raw" => RAW,
        "vmdk" => VMDK,
        "vpc" => VPC,
        _ => VHDX,
    }
}

/// An image.
pub fn image(random: &mut Random) -> Drawn {
    let format = FORMATS[random.below(FORMATS.len())];
    let mut options = Vec::new();
    for list in options_of(format) {
        let drawn = random.below(2 * list.len());
        options.extend(list.get(drawn).copied());
    }
    let has_base = format == "qcow2" && random.below(3) == 0;
    let base = has_base.then(|| size(random));
    let size = size(random);
    Drawn {
        format,
        options,
        base,
        size,
        next: size,
    }
}

fn size(random: &mut Random) -> u64 {
    match random.below(3) {
        0 => MIB * (1 + random.below(12) as u64),
        _ => SECTOR * (1 + random.below((MAX_SIZE / SECTOR) as usize) as u64),
    }
}

impl Drawn {
    /// The arguments that make it.
    pub fn create(&self) -> Vec<String> {
        let mut args = vec!["create", "-f", self.format];
        let options = self.options.join(",");
        if !options.is_empty() {
            args.extend(["-o", &options]);
        }
        if self.base.is_some() {
            args.extend(["-b", "base", "-F", "raw"]);
        }
        let size = self.size.to_string();
        args.extend(["disk", &size]);
        args.into_iter().map(str::to_owned).collect()
    }

    /// Whether qemu-img resizes the format, too.
    pub fn both_resize(&self) -> bool {
        matches!(self.format, "qcow2" | "raw")
    }

    /// The commands that look at it.
    pub fn looks(&self) -> &'static [&'static str] {
        match self.format {
            "raw" => &[
                "info -f raw disk",
                "map -f raw disk",
                "map -f raw --output=json disk",
            ],
            "vpc" => &[
                "info -f vpc disk",
                "info -f vpc --output=json disk",
                "map -f vpc --output=json disk",
            ],
            "vhdx" => &["info disk", "info --output=json disk", "check disk"],
            _ => &[
                "info disk",
                "info --output=json disk",
                "check disk",
                "check --output=json disk",
                "map disk",
                "map --output=json disk",
            ],
        }
    }

    /// Commands for qemu-io, and whether they may free clusters.
    pub fn writes(&self, random: &mut Random) -> (Vec<String>, bool) {
        let mut frees = false;
        let commands = (0..1 + random.below(4)).map(|_| {
            let sectors = self.size / SECTOR;
            let first = random.next() % sectors;
            let most = (sectors - first).min(MIB / SECTOR);
            let (offset, len) = (first * SECTOR, (1 + random.next() % most) * SECTOR);
            match (random.below(6), self.format) {
                (0, "qcow2") => {
                    frees = true;
                    format!("discard {offset} {len}")
                }
                (1, "qcow2" | "raw") => {
                    frees = true;
                    format!("write -z {offset} {len}")
                }
                (pattern, _) => format!("write -P {} {offset} {len}", pattern + 1),
            }
        });
        let commands = commands.collect();
        (commands, frees)
    }

    /// The arguments of a resize, perhaps a relative one.
    pub fn resize(&mut self, random: &mut Random) -> Vec<String> {
        let grows = self.size < MAX_SIZE && random.below(3) > 0;
        let unit = if self.format == "vhdx" { MIB } else { SECTOR };
        let drawn = size(random).next_multiple_of(unit);
        self.next = match grows {
            true => self.size.next_multiple_of(unit) + drawn.min(MAX_SIZE - self.size).max(unit),
            // qemu-img leaves what lies behind the new end in its last cluster, and
            // shows it again in a larger disk.
            false if self.format == "qcow2" => drawn.next_multiple_of(CLUSTER).min(self.size),
            false => drawn.min(self.size),
        };
        let mut args = vec!["resize", "-f", self.format];
        if self.next < self.size {
            args.push("--shrink");
        } else if self.next > self.size && self.both_resize() {
            let modes = ["off", "metadata", "falloc", "full"];
            args.extend(["--preallocation", modes[random.below(modes.len())]]);
        }
        args.push("disk");
        let text = match (random.below(2), self.next.checked_sub(self.size)) {
            (0, Some(more)) => format!("+{more}"),
            (0, None) => format!("-{}", self.size - self.next),
            _ => self.next.to_string(),
        };
        args.push(&text);
        args.into_iter().map(str::to_owned).collect()
    }

    /// Takes note of the size that it has got.
    pub fn has(&mut self, size: u64) {
        self.size = size;
    }

    /// Takes note that it was resized.
    pub fn resized(&mut self) {
        self.size = self.next;
    }
}
