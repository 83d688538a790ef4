//! New images: the layout that QEMU gives them, as a plan.
//!
//! Header, refcount table, refcount blocks, L1 table; with preallocation then
//! L2 tables and data. Everything but the file's first sector is laid down
//! first, the first sector commits: before it the file is no qcow2 image.

use super::format::{compatible, extension, header, limit};
use super::fresh::{self, Fill, FillRange, Subclusters};
use super::geometry::Geometry;
use super::layout::{Counting, Cursor, Run, counting};
use super::options::{self, Options};
use crate::bytes;
use crate::engine::Host;
use crate::error::{Failure, FailureKind};
use crate::plan::{NewName, Plan, Purpose, SECTOR, Stage, Step};
use crate::prepare::Prepare;
use crate::proto::{Create, FileNo, PlanReply, Preallocation};
use alloc::vec;
use alloc::vec::Vec;

/// Type, bit and name of each feature: what the header tells a program that
/// does not know a bit.
const FEATURES: [(u8, u8, &str); 8] = [
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
];

/// Cluster size up to which QEMU leaves the names out, as they would take too
/// much of the header's cluster.
const NO_NAMES_UP_TO: u64 = 4096;

/// Where the parts of a new image lie.
struct Layout {
    counting: Counting,
    table: Run,
    blocks: Run,
    l1: Run,
    l1_entries: u64,
    l2: Run,
    data: Run,
}

/// The plan that writes a new image into an empty file.
pub fn create(host: &mut dyn Host, create: &Create) -> Result<PlanReply, Failure> {
    let (options, list) = options::parse(create)?;
    let layout = Layout::new(&options, create.size)?;
    let head = head(&options, &layout, create)?;
    let (first, rest) = head
        .split_at_checked(SECTOR as usize)
        .unwrap_or((&head, &[]));
    let mut prepare = Prepare::new(host);
    layout.lay_down(&options, create, &mut prepare)?;
    prepare.fresh_slice(SECTOR, rest)?;
    let commit = Step::Write {
        file: FileNo::IMAGE,
        offset: 0,
        data: first.to_vec(),
    };
    let create_data = options.data_file.as_ref().map(|data| Step::Create {
        file: FileNo::DATA,
        name: NewName::Plain(data.name.clone()),
    });
    let stages = [
        (Purpose::Prepare, create_data.into_iter().collect()),
        (Purpose::Prepare, prepare.finish()),
        (Purpose::Commit, vec![commit]),
    ];
    let stages = stages
        .into_iter()
        .filter(|(_, steps): &(Purpose, Vec<Step>)| !steps.is_empty())
        .map(|(purpose, steps)| Stage { purpose, steps });
    Ok(PlanReply {
        plan: Plan {
            stages: stages.collect(),
        },
        options: list,
        ..PlanReply::default()
    })
}

impl Layout {
    fn new(options: &Options, size: u64) -> Result<Self, Failure> {
        let geometry = options.geometry;
        let l1_entries = geometry.l1_entries_for(size);
        if l1_entries > limit::MAX_L1_ENTRIES || i64::try_from(size).is_err() {
            return Err(too_large());
        }
        let clusters = geometry.clusters(size);
        let (tables, data) = match (options.preallocation, &options.data_file) {
            (Preallocation::Off, _) => (0, 0),
            (_, Some(_)) => (l1_entries, 0),
            (_, None) => (l1_entries, clusters),
        };
        let l1_clusters = geometry.l1_clusters(l1_entries);
        let base = 1 + l1_clusters + tables + data;
        let counting = counting(geometry, 0, base, &[], 0).ok_or_else(too_large)?;
        let mut cursor = Cursor(1);
        Ok(Self {
            table: cursor.take(counting.table),
            blocks: cursor.take(counting.blocks.len() as u64),
            l1: cursor.take(l1_clusters),
            l1_entries,
            l2: cursor.take(tables),
            data: cursor.take(data),
            counting,
        })
    }

    /// Length of the file: to the end of the last part that is not empty.
    fn file_len(&self, geometry: Geometry) -> u64 {
        if !self.l2.is_empty() {
            geometry.host_offset(self.data.end())
        } else if !self.l1.is_empty() {
            geometry.host_offset(self.l1.first) + self.l1_entries * 8
        } else {
            geometry.host_offset(self.blocks.end())
        }
    }

    /// Everything behind the header cluster.
    fn lay_down(
        &self,
        options: &Options,
        create: &Create,
        prepare: &mut Prepare<'_>,
    ) -> Result<(), Failure> {
        let geometry = options.geometry;
        let len = self.file_len(geometry);
        if let Some(step) = self.allocation(options, create.size) {
            match step.file() {
                FileNo::IMAGE => prepare.fresh(step)?,
                _ => prepare.inside(step),
            }
        }
        prepare.fresh(Step::SetLength {
            file: FileNo::IMAGE,
            len,
        })?;
        if options.data_file.is_some() {
            prepare.inside(Step::SetLength {
                file: FileNo::DATA,
                len: create.size,
            });
        }
        let place = |run: Run| {
            (
                geometry.host_offset(run.first),
                geometry.host_offset(run.count),
            )
        };
        let numbers = &self.counting.blocks;
        let used = 0..self.data.end();
        let (at, len) = place(self.table);
        prepare.fresh_bytes(at, len, |_, distance, piece| {
            fresh::fill_table(geometry, numbers, self.blocks.first, distance, piece)
        })?;
        let (at, len) = place(self.blocks);
        prepare.fresh_bytes(at, len, |_, distance, piece| {
            fresh::fill_blocks(geometry, numbers, &used, distance, piece);
            Ok(())
        })?;
        prepare.fresh_bytes(
            geometry.host_offset(self.l1.first),
            self.l2.count * 8,
            |_, distance, piece| fresh::fill_l1(geometry, self.l2.first, distance, piece),
        )?;
        let at = match options.data_file {
            Some(_) => 0,
            None => geometry.host_offset(self.data.first),
        };
        let mapped = FillRange {
            clusters: 0..geometry.clusters(create.size),
            fill: Fill::Data {
                at,
                subclusters: Subclusters::Unallocated,
            },
        };
        let (at, len) = place(self.l2);
        prepare.fresh_bytes(at, len, |_, distance, piece| {
            mapped.fill_l2(geometry, 0, distance, piece)
        })
    }
}

impl Layout {
    /// What gives the data of a disk of `size` bytes its disk space, where that
    /// was asked for.
    fn allocation(&self, options: &Options, size: u64) -> Option<Step> {
        let geometry = options.geometry;
        let (file, offset, len) = match options.data_file {
            Some(_) => (FileNo::DATA, 0, size),
            None => (
                FileNo::IMAGE,
                geometry.host_offset(self.data.first),
                geometry.host_offset(self.data.count),
            ),
        };
        match options.preallocation {
            _ if len == 0 => None,
            Preallocation::Off | Preallocation::Metadata => None,
            Preallocation::Falloc => Some(Step::Reserve { file, offset, len }),
            Preallocation::Full => Some(Step::Fill { file, offset, len }),
        }
    }
}

/// The header, its extensions and the backing file's name.
fn head(options: &Options, layout: &Layout, create: &Create) -> Result<Vec<u8>, Failure> {
    let geometry = options.geometry;
    let header_len = match options.version {
        2 => header::V2_LEN,
        _ => header::V3_LEN,
    };
    let mut head = vec![0; header_len];
    put_fields(&mut head, options, layout, create)?;
    let name = create.backing.as_ref().map(|file| file.name.as_bytes());
    let format = create
        .backing
        .as_ref()
        .and_then(|file| file.format.as_ref());
    if let Some(format) = format {
        push_extension(&mut head, extension::BACKING_FORMAT, format.as_bytes());
    }
    if let Some(data) = &options.data_file {
        push_extension(&mut head, extension::DATA_FILE, data.name.as_bytes());
    }
    if options.version >= 3 && geometry.cluster_size() > NO_NAMES_UP_TO {
        push_extension(&mut head, extension::FEATURE_NAMES, &feature_names());
    }
    head.extend_from_slice(&[0; extension::HEADER_LEN]);
    if let Some(name) = name {
        check_backing_name(geometry, head.len(), name)?;
        let at = head.len() as u64;
        bytes::put_be64(&mut head, header::BACKING_OFFSET, at)?;
        bytes::put_be32(&mut head, header::BACKING_LEN, name.len() as u32)?;
        head.extend_from_slice(name);
    }
    Ok(head)
}

fn put_fields(
    head: &mut [u8],
    options: &Options,
    layout: &Layout,
    create: &Create,
) -> Result<(), Failure> {
    let geometry = options.geometry;
    let l1_offset = match layout.l1.count {
        0 => 0,
        _ => geometry.host_offset(layout.l1.first),
    };
    let words = [
        (0, header::MAGIC_VALUE),
        (header::VERSION, options.version),
        (header::CLUSTER_BITS, geometry.cluster_bits()),
        (header::L1_SIZE, layout.l1_entries as u32),
        (header::REFCOUNT_TABLE_CLUSTERS, layout.table.count as u32),
    ];
    for (at, value) in words {
        bytes::put_be32(head, at, value)?;
    }
    let table = geometry.host_offset(layout.table.first);
    bytes::put_be64(head, header::SIZE, create.size)?;
    bytes::put_be64(head, header::L1_OFFSET, l1_offset)?;
    bytes::put_be64(head, header::REFCOUNT_TABLE_OFFSET, table)?;
    if options.version < 3 {
        return Ok(());
    }
    let compatible = match options.lazy_refcounts {
        true => compatible::LAZY_REFCOUNTS,
        false => 0,
    };
    bytes::put_be64(head, header::INCOMPATIBLE, options.incompatible())?;
    bytes::put_be64(head, header::COMPATIBLE, compatible)?;
    bytes::put_be64(head, header::AUTOCLEAR, options.autoclear())?;
    bytes::put_be32(head, header::REFCOUNT_ORDER, geometry.refcount_order())?;
    bytes::put_be32(head, header::HEADER_LENGTH, header::V3_LEN as u32)?;
    let compression = u8::from(options.zstd);
    Ok(bytes::put(head, header::COMPRESSION_TYPE, &[compression])?)
}

fn push_extension(head: &mut Vec<u8>, kind: u32, data: &[u8]) {
    head.extend_from_slice(&kind.to_be_bytes());
    head.extend_from_slice(&(data.len() as u32).to_be_bytes());
    head.extend_from_slice(data);
    head.resize(head.len().next_multiple_of(8), 0);
}

fn feature_names() -> Vec<u8> {
    let mut table = Vec::new();
    for (kind, bit, name) in FEATURES {
        let end = table.len() + extension::FEATURE_NAME_LEN;
        table.extend_from_slice(&[kind, bit]);
        table.extend_from_slice(name.as_bytes());
        table.resize(end, 0);
    }
    table
}

fn check_backing_name(geometry: Geometry, at: usize, name: &[u8]) -> Result<(), Failure> {
    let room = geometry.cluster_size().saturating_sub(at as u64);
    let most = room.min(limit::MAX_BACKING_NAME);
    if name.is_empty() {
        return Err(crate::options::invalid(
            "Expected backing file name, got empty string",
        ));
    }
    if name.len() as u64 > most {
        return Err(crate::options::invalid(alloc::format!(
            "Could not assign backing file: its name is {} bytes long, at most {most} fit; use a \
             shorter name or larger clusters",
            name.len()
        )));
    }
    Ok(())
}

fn too_large() -> Failure {
    Failure::new(
        FailureKind::TooLarge,
        "The image size is too large for file format 'qcow2' (try using a larger cluster size)",
    )
}
