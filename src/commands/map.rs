//! `instar map`.

use super::look::Look;
use super::{Error, Global, Output, on_disk};
use instar::compat::map::{self, Entry, Joiner};
use instar::compat::version::QemuVersion;
use instar::compat::{messages, names, size};
use instar::image::{Access, Image, Segment, SegmentKind};
use instar_guest::{Facts, FileNo, Format};
use std::io::{BufWriter, StdoutLock, Write as _};

/// The most segments that are asked for at once.
const SEGMENTS: u64 = 1 << 18;
/// The smallest extent of a file that a filesystem is expected to have.
const BLOCK: u64 = 4096;
/// Disks are shown in whole sectors of this many bytes.
const SECTOR: u64 = 512;

/// Arguments of `map`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Guest offset at which to begin
    #[arg(short, long, value_name = "OFFSET", default_value = "0")]
    #[arg(hide_default_value = true, allow_hyphen_values = true)]
    start_offset: String,
    /// Number of bytes to show
    #[arg(short = 'l', long, value_name = "LENGTH", allow_hyphen_values = true)]
    max_length: Option<String>,
    #[command(flatten)]
    look: Look,
}

/// Runs `map`.
pub fn run(args: &Args, global: &Global) -> Result<(), Error> {
    let start = number("start offset", &args.start_offset, global)?;
    let max_length = match &args.max_length {
        Some(text) => number("max length", text, global)?,
        None => u64::MAX,
    };
    let image = args.look.open(Access::Read, global, |options| options)?;
    if image.facts().encrypted {
        return Err(Error::Refused(format!(
            "Could not open '{}': {}",
            args.look.file(),
            messages::ENCRYPTED
        )));
    }
    let size = image.virtual_size();
    let end = whole_sectors(size).min(start.saturating_add(max_length));
    let layers = Layers::of(&image, &args.look.file())?;
    let mut out = Out::new(args.look.output, &layers, start, global.qemu_version)?;
    show(&image, &layers, start, end, &mut out)?;
    out.end()
}

/// Where the map goes, line by line: a map can be longer than memory.
struct Out<'a> {
    form: Form<'a>,
    start: u64,
    version: QemuVersion,
    to: BufWriter<StdoutLock<'static>>,
}

enum Form<'a> {
    Json(map::Json),
    Table { layers: &'a Layers },
}

impl<'a> Out<'a> {
    fn new(
        output: Output,
        layers: &'a Layers,
        start: u64,
        version: QemuVersion,
    ) -> Result<Self, Error> {
        let form = match output {
            Output::Json => Form::Json(map::Json::new(version)),
            Output::Human => Form::Table { layers },
        };
        let mut out = Self {
            form,
            start,
            version,
            to: BufWriter::new(std::io::stdout().lock()),
        };
        if output == Output::Human {
            out.write(&map::header())?;
        }
        Ok(out)
    }

    fn write(&mut self, text: &str) -> Result<(), Error> {
        self.to.write_all(text.as_bytes()).map_err(Error::Output)
    }

    fn entry(&mut self, entry: &Entry) -> Result<(), Error> {
        let text = match &mut self.form {
            Form::Json(json) => json.entry(entry),
            Form::Table { layers } => {
                match map::table_row(entry, |depth, file| layers.file(depth, file)) {
                    Ok(row) => row,
                    Err(map::Unmappable) => {
                        self.to.flush().map_err(Error::Output)?;
                        return Err(Error::refused(messages::UNMAPPABLE));
                    }
                }
            }
        };
        self.write(&text)
    }

    fn end(mut self) -> Result<(), Error> {
        if let Form::Json(json) = &mut self.form {
            let end = std::mem::take(json).end(self.start);
            self.write(&end)?;
        }
        self.to.flush().map_err(Error::Output)
    }
}

/// A number below 2^63.
fn number(what: &str, text: &str, global: &Global) -> Result<u64, Error> {
    size::parse(text)
        .and_then(|number| match i64::try_from(number) {
            Ok(_) => Ok(number),
            Err(_) => Err(size::SizeError::Range),
        })
        .map_err(|error| global.bad_number(what, text, error))
}

/// What `map` has to know of a layer of the backing chain.
struct Layer {
    /// The names of its files, by number.
    files: Vec<String>,
    /// How a hole in a file below mapped data is shown.
    hole: Hole,
    /// Whether what lies in the file is not what the disk holds.
    encrypted: bool,
    /// Where the disk ends. The rest of a last sector counts as a hole.
    end: u64,
}

/// The layers, the image first.
struct Layers {
    all: Vec<Layer>,
    /// The longest range in bytes that has no more than [`SEGMENTS`].
    stride: u64,
}

/// How a hole in the file below mapped data is shown.
#[derive(Clone, Copy)]
enum Hole {
    /// As zeroes: the file's holes are the disk's.
    Zero,
    /// As data: nobody looks below the mapping.
    Data,
    /// As data that reads as zeroes: the mapping is there, its space is not.
    ZeroData,
}

impl Layers {
    fn of(image: &Image, file: &str) -> Result<Self, Error> {
        let mut layers = Self {
            all: Vec::new(),
            stride: u64::MAX,
        };
        let mut file = file.to_owned();
        for image in std::iter::successors(Some(image), |image| image.backing()) {
            let facts = image.facts();
            let named = facts.files.iter();
            let named = named.map(|named| names::combine(&file, &named.name));
            layers.all.push(Layer {
                files: std::iter::once(file.clone()).chain(named).collect(),
                hole: holes(image, &facts)?,
                encrypted: facts.encrypted,
                end: facts.virtual_size,
            });
            let unit = match facts.cluster_size {
                Some(_) => facts.write_unit.max(SECTOR),
                None => BLOCK,
            };
            layers.stride = layers.stride.min(unit.saturating_mul(SEGMENTS));
            if let Some(backing) = &facts.backing {
                file = names::combine(&file, backing.name());
            }
        }
        Ok(layers)
    }

    /// The name of a file of a layer.
    fn file(&self, depth: usize, file: FileNo) -> &str {
        let number = usize::try_from(file.0).unwrap_or(usize::MAX);
        let name = self
            .all
            .get(depth)
            .and_then(|layer| layer.files.get(number));
        name.map_or("", String::as_str)
    }

    /// The layer that decides on a range that nobody holds: the lowest one that
    /// is long enough. A disk may end inside a sector, or inside the range:
    /// answers how much of it is decided by this layer, and what it says.
    fn absent(&self, offset: u64, depth: usize) -> Absent {
        let covers = |&depth: &usize| whole_sectors(self.all[depth].end) > offset;
        let last = depth.min(self.all.len() - 1);
        let depth = (0..=last).rfind(covers).unwrap_or(0);
        let end = self.all[depth].end;
        Absent {
            depth,
            until: if offset < end {
                end
            } else {
                whole_sectors(end)
            },
            is_rest_of_sector: offset >= end,
        }
    }
}

/// See [`Layers::absent`].
struct Absent {
    depth: usize,
    /// Guest offset up to which this holds.
    until: u64,
    /// Whether it is what a raw file's last sector has past the file's end.
    is_rest_of_sector: bool,
}

fn whole_sectors(bytes: u64) -> u64 {
    bytes.checked_next_multiple_of(SECTOR).unwrap_or(bytes)
}

fn holes(image: &Image, facts: &Facts) -> Result<Hole, Error> {
    Ok(match (facts.format, facts.cluster_size) {
        (Format::Raw, _) => Hole::Zero,
        (Format::Qcow2, Some(cluster)) => preallocated(image, cluster)?,
        (Format::Qcow2, None) | (Format::Vhdx, _) => Hole::ZeroData,
        // A disk in one piece, or allocated in units that are written whole.
        (Format::Vmdk | Format::Vhd, None) => Hole::ZeroData,
        (Format::Vmdk | Format::Vhd, Some(_)) => Hole::Data,
    })
}

/// qemu looks below the mapping of qcow2 only where the file takes clearly less
/// space than its clusters would: then their space was never allocated.
fn preallocated(image: &Image, cluster: u64) -> Result<Hole, Error> {
    let Some(on_disk) = on_disk(image)?.first().copied() else {
        return Ok(Hole::Data);
    };
    let clusters = on_disk.len.div_ceil(cluster);
    let allocated = on_disk.allocated / cluster;
    let threshold = (allocated * 10 / 9).max(allocated + 2);
    Ok(match clusters >= threshold {
        true => Hole::ZeroData,
        false => Hole::Data,
    })
}

/// Shows a range; `end` may lie behind the disk's end by the rest of a sector.
fn show(
    image: &Image,
    layers: &Layers,
    start: u64,
    end: u64,
    out: &mut Out<'_>,
) -> Result<(), Error> {
    let mut joiner = Joiner::new(out.version);
    let mut entries = Vec::new();
    let mut at = start;
    let disk_end = end.min(image.virtual_size());
    while at < disk_end {
        let len = (disk_end - at).min(layers.stride);
        for segment in image.segments(at, len)? {
            push(&mut entries, segment, layers);
        }
        for entry in entries.drain(..).filter_map(|entry| joiner.push(entry)) {
            out.entry(&entry)?;
        }
        at += len;
    }
    let rest = (at < end).then(|| rest_of_sector(at, end - at, 0));
    let last = rest.and_then(|rest| joiner.push(rest));
    for entry in last.into_iter().chain(joiner.finish()) {
        out.entry(&entry)?;
    }
    Ok(())
}

/// Adds a segment; one that nobody holds in the parts that different layers
/// decide on.
fn push(entries: &mut Vec<Entry>, mut segment: Segment, layers: &Layers) {
    while segment.kind == SegmentKind::Absent && segment.len > 0 {
        let depth = usize::try_from(segment.depth).unwrap_or(usize::MAX);
        let absent = layers.absent(segment.offset, depth);
        let left = absent.until.saturating_sub(segment.offset);
        let here = segment.at.filter(|_| absent.depth == depth);
        let length = match left {
            0 => segment.len,
            left => left.min(segment.len),
        };
        entries.push(match absent.is_rest_of_sector {
            true => rest_of_sector(segment.offset, length, absent.depth),
            false => Entry {
                present: false,
                at: here,
                ..rest_of_sector(segment.offset, length, absent.depth)
            },
        });
        segment.offset += length;
        segment.len -= length;
        segment.at = segment.at.map(|(file, at)| (file, at + length));
    }
    if segment.len > 0 {
        entries.push(entry(&segment, layers));
    }
}

/// What follows a raw file's end inside its last sector.
fn rest_of_sector(start: u64, length: u64, depth: usize) -> Entry {
    Entry {
        start,
        length,
        depth,
        present: true,
        zero: true,
        data: false,
        compressed: false,
        at: Some((FileNo::IMAGE, start)),
    }
}

fn entry(segment: &Segment, layers: &Layers) -> Entry {
    let depth = usize::try_from(segment.depth).unwrap_or(usize::MAX);
    let layer = layers.all.get(depth);
    let hole = layer.map_or(Hole::Data, |layer| layer.hole);
    let (present, zero, data) = match segment.kind {
        SegmentKind::Data | SegmentKind::Compressed => (true, false, true),
        SegmentKind::Zero => (true, true, false),
        SegmentKind::Absent => (false, true, false),
        SegmentKind::Hole => match hole {
            Hole::Zero => (true, true, false),
            Hole::Data => (true, false, true),
            Hole::ZeroData => (true, true, true),
        },
    };
    Entry {
        start: segment.offset,
        length: segment.len,
        depth,
        present,
        zero,
        data,
        compressed: segment.kind == SegmentKind::Compressed,
        at: segment
            .at
            .filter(|_| !layer.is_some_and(|layer| layer.encrypted)),
    }
}
