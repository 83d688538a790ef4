//! New images: the layout that QEMU gives them, as a plan.

use super::chs::Chs;
use super::footer::{Footer, Kind, New};
use super::format::MAX_SECTORS;
use super::header::Header;
use super::settle::write_footer;
use crate::disk::Creating;
use crate::engine::Host;
use crate::error::{Failure, FailureKind};
use crate::options;
use crate::plan::{Plan, Purpose, SECTOR, Stage, Step};
use crate::prepare::Prepare;
use crate::proto::{Create, FileNo, PlanReply};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;

/// What the user wants.
struct Options {
    kind: Kind,
    /// Whether the size is taken as it is, where others round up to a geometry.
    force_size: bool,
}

/// The plan that writes a new image into an empty file. The commit makes it one:
/// without the first sector, or the only footer, it is none.
pub fn create(host: &mut dyn Host, mut creating: Creating<'_>) -> Result<PlanReply, Failure> {
    let (options, list) = parse(creating.create)?;
    let (size, geometry) = options.round(creating.create.size)?;
    let footer = Footer::new(&New {
        kind: options.kind,
        creator: match options.force_size {
            true => b"qem2",
            false => b"qemu",
        },
        size,
        geometry,
        uuid: creating.chance.uuid(),
        time: creating.chance.time,
    })?;
    let (prepare, commit) = match options.kind {
        Kind::Fixed => (reserve_nothing(size), write_footer(&footer, size)),
        _ => (lay_down(host, &footer)?, write_footer(&footer, 0)),
    };
    let stages = [(Purpose::Prepare, prepare), (Purpose::Commit, vec![commit])]
        .into_iter()
        .map(|(purpose, steps)| Stage { purpose, steps });
    Ok(PlanReply {
        plan: Plan {
            stages: stages.collect(),
        },
        options: list,
        ..PlanReply::default()
    })
}

/// The data of a disk of fixed size: a hole up to the footer.
fn reserve_nothing(size: u64) -> Vec<Step> {
    vec![Step::SetLength {
        file: FileNo::IMAGE,
        len: size,
    }]
}

/// Header, table and the last footer of a dynamic image.
fn lay_down(host: &mut dyn Host, footer: &Footer) -> Result<Vec<Step>, Failure> {
    let header = Header::new(0)?;
    let header = Header::new(header.entries_for(footer.virtual_size()))?;
    let mut prepare = Prepare::new(host);
    prepare.fresh_slice(header.at, header.bytes())?;
    let len = header.table_end() - header.table;
    prepare.fresh_bytes(header.table, len, |_, _, piece| {
        piece.fill(0xff);
        Ok(())
    })?;
    prepare.fresh(write_footer(footer, header.table_end()))?;
    Ok(prepare.finish())
}

impl Options {
    /// Size and geometry of the new disk.
    fn round(&self, size: u64) -> Result<(u64, Chs), Failure> {
        let sectors = size.div_ceil(SECTOR);
        let geometry = match self.force_size {
            true => Chs::MAX,
            false => Chs::at_least(sectors),
        };
        let sectors = match geometry == Chs::MAX {
            true => sectors,
            false => geometry.total(),
        };
        match sectors > MAX_SECTORS {
            false => Ok((sectors * SECTOR, geometry)),
            true => Err(too_large()),
        }
    }
}

/// The options, and the list of those that count in QEMU's order.
fn parse(create: &Create) -> Result<(Options, Vec<(String, String)>), Failure> {
    let (mut subformat, mut force_size) = (None, None);
    for (key, value) in &create.options {
        match key.as_str() {
            "subformat" => subformat = Some(value),
            "force_size" => force_size = Some(value),
            _ => return Err(options::unknown(key)),
        }
    }
    if create.backing.is_some() {
        return Err(options::invalid(
            "Backing file not supported for file format 'vpc'",
        ));
    }
    let force = force_size.map(|value| options::switch("force_size", value));
    let kind = match subformat.map(String::as_str) {
        None | Some("dynamic") => Kind::Dynamic,
        Some("fixed") => Kind::Fixed,
        Some(other) => {
            return Err(options::invalid(format!(
                "Parameter 'subformat' does not accept value '{other}'"
            )));
        }
    };
    let mut list = vec![("size".to_string(), create.size.to_string())];
    let given = [("subformat", subformat), ("force_size", force_size)];
    for (key, value) in given {
        list.extend(value.map(|value| (key.to_string(), value.clone())));
    }
    let options = Options {
        kind,
        force_size: force.transpose()?.unwrap_or(false),
    };
    Ok((options, list))
}

/// The refusal of a size that the format cannot have.
pub fn too_large() -> Failure {
    Failure::new(
        FailureKind::TooLarge,
        "The image size is too large for file format 'vpc'",
    )
}
