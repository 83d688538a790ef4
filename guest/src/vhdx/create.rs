//! New images: the layout that QEMU gives them, as a plan.
//!
//! Log, BAT, metadata and both copies of everything in front of them are laid
//! down first; the first sector commits: before it the file is no VHDX image.

use super::checksum::seal;
use super::format::{MIB, bat as on_disk, file_id, header, limit, region as region_at};
use super::geometry::Geometry;
use super::guid::Guid;
use super::update::{fresh_guid, stage, write};
use super::{metadata, region};
use crate::bytes;
use crate::chance::Chance;
use crate::disk::Creating;
use crate::engine::Host;
use crate::error::{Failure, FailureKind};
use crate::options::{self, invalid};
use crate::plan::{Plan, Purpose, SECTOR, Stage, Step};
use crate::prepare::Prepare;
use crate::proto::{Create, FileNo, PlanReply};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;

/// Space that QEMU leaves between the metadata and the blocks, in bytes.
const SLACK: u64 = 4 * MIB;
/// Length of the metadata region.
const METADATA_LEN: u64 = MIB;
/// What the file says made it.
const CREATOR: &str = concat!("instar v", env!("CARGO_PKG_VERSION"));

/// The plan that writes a new image into an empty file.
pub fn create(host: &mut dyn Host, creating: Creating<'_>) -> Result<PlanReply, Failure> {
    let (options, list) = parse(creating.create)?;
    let layout = Layout::new(&options, creating.create.size)?;
    let mut chance = creating.chance;
    let mut prepare = Prepare::new(host);
    layout.lay_down(&mut prepare, &mut chance)?;
    let stages = vec![
        Stage {
            purpose: Purpose::Prepare,
            steps: prepare.finish(),
        },
        stage(Purpose::Commit, write(0, first_sector()?)),
    ];
    Ok(PlanReply {
        plan: Plan { stages },
        options: list,
        ..PlanReply::default()
    })
}

/// What `-o` may say.
#[derive(Debug)]
struct Options {
    log_size: u64,
    block_size: u64,
    fixed: bool,
    state_zero: bool,
}

/// Reads the options; answers them also as QEMU prints them.
fn parse(create: &Create) -> Result<(Options, Vec<(String, String)>), Failure> {
    if create.backing.is_some() {
        return Err(invalid("Backing file not supported for file format 'vhdx'"));
    }
    let mut options = Options {
        log_size: MIB,
        block_size: 0,
        fixed: false,
        state_zero: true,
    };
    let mut subformat = None;
    let mut state_zero = None;
    for (key, value) in &create.options {
        match key.as_str() {
            "log_size" => options.log_size = options::size(key, value)?,
            "block_size" => options.block_size = options::size(key, value)?,
            "subformat" => subformat = Some(value),
            "block_state_zero" => {
                options.state_zero = options::switch(key, value)?;
                state_zero = Some(value);
            }
            _ => return Err(options::unknown(key)),
        }
    }
    let mut list = vec![
        ("size", create.size.to_string()),
        ("log_size", options.log_size.to_string()),
        ("block_size", options.block_size.to_string()),
    ];
    list.extend(subformat.map(|value| ("subformat", value.clone())));
    list.extend(state_zero.map(|value| ("block_state_zero", value.clone())));
    options.fixed = match subformat.map_or("dynamic", String::as_str) {
        "dynamic" => false,
        "fixed" => true,
        other => {
            return Err(invalid(format!(
                "Parameter 'subformat' does not accept value '{other}'"
            )));
        }
    };
    options.round(create.size)?;
    let list = list
        .into_iter()
        .map(|(key, value)| (key.to_string(), value));
    Ok((options, list.collect()))
}

impl Options {
    /// Rounds sizes as QEMU does, and refuses what it refuses.
    fn round(&mut self, size: u64) -> Result<(), Failure> {
        if size > limit::MAX_SIZE {
            return Err(Failure::new(
                FailureKind::TooLarge,
                "Image size too large; max of 64TB",
            ));
        }
        self.log_size = self.log_size.div_ceil(MIB).saturating_mul(MIB);
        if u32::try_from(self.log_size).is_err() {
            return Err(invalid("Log size must be smaller than 4 GB"));
        }
        if self.log_size == 0 {
            return Err(invalid("Log size must be a multiple of 1 MB"));
        }
        let block = match self.block_size {
            0 => default_block_size(size),
            size => size.min(limit::MAX_BLOCK).next_multiple_of(MIB),
        };
        if !block.is_power_of_two() {
            return Err(invalid("Block size must be a power of two"));
        }
        self.block_size = block;
        Ok(())
    }
}

fn default_block_size(size: u64) -> u64 {
    const GIB: u64 = 1 << 30;
    let bounds = [
        (GIB, 8 * MIB),
        (100 * GIB, 16 * MIB),
        (32 * 1024 * GIB, 32 * MIB),
    ];
    let found = bounds.into_iter().find(|&(most, _)| size <= most);
    found.map_or(64 * MIB, |(_, block)| block)
}

/// Where the parts of a new image lie, and what they say.
#[derive(Debug)]
struct Layout<'a> {
    options: &'a Options,
    size: u64,
    geometry: Geometry,
    bat: (u64, u64),
    metadata: (u64, u64),
    data: u64,
}

impl<'a> Layout<'a> {
    fn new(options: &'a Options, size: u64) -> Result<Self, Failure> {
        let geometry = Geometry {
            block_size: options.block_size,
            sector: SECTOR,
            has_parent: false,
        };
        let bat = MIB + options.log_size;
        let bat_len = (entries_of_qemu(geometry, size) * on_disk::LEN).next_multiple_of(MIB);
        let metadata = bat + bat_len;
        Ok(Self {
            options,
            size,
            geometry,
            bat: (bat, bat_len),
            metadata: (metadata, METADATA_LEN),
            data: metadata + METADATA_LEN + SLACK,
        })
    }

    /// Everything but the first sector.
    fn lay_down(&self, prepare: &mut Prepare<'_>, chance: &mut Chance) -> Result<(), Failure> {
        let data_len = if self.options.fixed { self.size } else { 0 };
        prepare.fresh(Step::SetLength {
            file: FileNo::IMAGE,
            len: self.data + data_len,
        })?;
        let (file_write, data_write) = (fresh_guid(chance), fresh_guid(chance));
        let sequence = chance.number() & u64::from(u32::MAX);
        for (sequence, at) in (sequence..).zip(header::SLOTS) {
            let header = self.header(sequence, file_write, data_write)?;
            prepare.fresh_slice(at, &header)?;
        }
        let table = region::encode(self.bat, self.metadata)?;
        for at in region_at::TABLES {
            prepare.fresh_slice(at, &table)?;
        }
        let Options {
            block_size, fixed, ..
        } = *self.options;
        let metadata = metadata::encode(self.size, block_size, fixed, fresh_guid(chance))?;
        prepare.fresh_slice(self.metadata.0, &metadata)?;
        if !self.options.fixed && !self.options.state_zero {
            return Ok(());
        }
        let len = self.geometry.bat_len(self.size);
        prepare.fresh_bytes(self.bat.0, len, |_, done, piece| {
            let (entries, _) = piece.as_chunks_mut::<{ on_disk::LEN as usize }>();
            for (index, entry) in (done / on_disk::LEN..).zip(entries) {
                *entry = self.entry(index).to_le_bytes();
            }
            Ok(())
        })
    }

    /// The BAT entry at an index.
    fn entry(&self, index: u64) -> u64 {
        match self.geometry.block_at(index) {
            None => on_disk::NOT_PRESENT,
            Some(_) if self.options.state_zero => on_disk::ZERO,
            Some(block) => (self.data + block * self.options.block_size) | on_disk::FULLY_PRESENT,
        }
    }

    fn header(&self, sequence: u64, file: Guid, data: Guid) -> Result<Vec<u8>, Failure> {
        let mut bytes = vec![0; header::LEN];
        bytes::put(&mut bytes, 0, header::SIGNATURE)?;
        bytes::put_le64(&mut bytes, header::SEQUENCE, sequence)?;
        bytes::put(&mut bytes, header::FILE_WRITE, &file.0)?;
        bytes::put(&mut bytes, header::DATA_WRITE, &data.0)?;
        bytes::put(&mut bytes, header::VERSION, &[1, 0])?;
        bytes::put_le32(&mut bytes, header::LOG_LEN, self.options.log_size as u32)?;
        bytes::put_le64(&mut bytes, header::LOG_OFFSET, MIB)?;
        seal(&mut bytes, header::CHECKSUM);
        Ok(bytes)
    }
}

/// Entries that QEMU takes a disk to have: for an empty one its 32-bit numbers
/// wrap around, and it opens no image whose BAT is shorter than that.
fn entries_of_qemu(geometry: Geometry, size: u64) -> u64 {
    match size {
        0 => u64::from(u32::MAX) / geometry.ratio(),
        size => geometry.entries(size),
    }
}

/// The file identifier: the signature and who made the file.
fn first_sector() -> Result<Vec<u8>, Failure> {
    let mut sector = vec![0; SECTOR as usize];
    bytes::put(&mut sector, 0, file_id::SIGNATURE)?;
    let creator: Vec<u8> = CREATOR.encode_utf16().flat_map(u16::to_le_bytes).collect();
    bytes::put(&mut sector, file_id::CREATOR, &creator)?;
    Ok(sector)
}
