//! New images: the files that QEMU makes, as a plan.
//!
//! Extents are laid down first. What makes them an image comes last: the header
//! of a file that holds everything, or the first sector of a descriptor file.

use super::descriptor::ExtentType;
use super::format::{fresh as new, limit};
use super::fresh::{self, Fresh};
use super::options::{self, Options};
use crate::disk::Creating;
use crate::engine::Host;
use crate::error::{Failure, FailureKind};
use crate::options::invalid;
use crate::plan::{NewName, Plan, Purpose, SECTOR, Stage, Step};
use crate::prepare::Prepare;
use crate::proto::{Create, FileNo, PlanReply};
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

/// The longest name of a backing file that QEMU reads, in bytes.
const MAX_BACKING_NAME: usize = 1023;

/// The plan that writes a new image into an empty file.
pub fn create(host: &mut dyn Host, creating: Creating<'_>) -> Result<PlanReply, Failure> {
    let create = creating.create;
    let (options, list) = options::parse(create)?;
    check_name(creating.name)?;
    let mut chance = creating.chance;
    let cid = fresh::content_id(&mut chance);
    let single = !options.subformat.flat && !options.subformat.split;
    let names = match single {
        true => vec![(creating.name.into(), create.size / SECTOR)],
        false => extent_files(&options, create.size / SECTOR, creating.name)?,
    };
    let text = descriptor(create, &options, cid, &names)?;
    let stages = match single {
        true => embedded(host, &options, create.size / SECTOR, &text)?,
        false => separate(&options, &names, text.as_bytes())?,
    };
    Ok(PlanReply {
        plan: Plan { stages },
        options: list,
        ..PlanReply::default()
    })
}

/// Names go into the descriptor in quotes.
fn check_name(name: &str) -> Result<(), Failure> {
    match name.contains(|c: char| c == '"' || c.is_control()) {
        false => Ok(()),
        true => Err(invalid(
            "a name with quotes or control characters cannot stand in a VMDK descriptor",
        )),
    }
}

/// Names and sectors of the files that hold the disk.
fn extent_files(
    options: &Options,
    sectors: u64,
    name: &str,
) -> Result<Vec<(String, u64)>, Failure> {
    let (stem, suffix) = match name.rfind('.') {
        Some(dot) => name.split_at(dot),
        None => (name, ""),
    };
    if !options.subformat.split {
        let whole = (sectors > 0).then(|| (format!("{stem}-flat{suffix}"), sectors));
        return Ok(whole.into_iter().collect());
    }
    if sectors.div_ceil(limit::SPLIT_SECTORS) > limit::MAX_EXTENTS as u64 {
        return Err(Failure::new(
            FailureKind::TooLarge,
            format!(
                "a disk of {sectors} sectors would need more than {} extents; use the subformat \
                 monolithicFlat or monolithicSparse",
                limit::MAX_EXTENTS
            ),
        ));
    }
    let letter = if options.subformat.flat { 'f' } else { 's' };
    let files = (0..sectors.div_ceil(limit::SPLIT_SECTORS)).map(|index| {
        let rest = sectors - index * limit::SPLIT_SECTORS;
        let number = index + 1;
        (
            format!("{stem}-{letter}{number:03}{suffix}"),
            rest.min(limit::SPLIT_SECTORS),
        )
    });
    Ok(files.collect())
}

/// The text of a new descriptor, as QEMU writes it.
fn descriptor(
    create: &Create,
    options: &Options,
    cid: u32,
    files: &[(String, u64)],
) -> Result<String, Failure> {
    let (parent_cid, parent) = parent(create)?;
    let kind = match options.subformat.flat {
        true => ExtentType::Flat,
        false => ExtentType::Sparse,
    };
    let lines: String = files
        .iter()
        .map(|(name, sectors)| fresh::extent_line(kind, name, *sectors) + "\n")
        .collect();
    let heads = if options.adapter == "ide" { 16 } else { 255 };
    let cylinders = create.size / (63 * heads * SECTOR);
    Ok(format!(
        "# Disk DescriptorFile\n\
         version=1\n\
         CID={cid:08x}\n\
         parentCID={parent_cid:x}\n\
         createType=\"{create_type}\"\n\
         {parent}\n\
         # Extent description\n\
         {lines}\n\
         # The Disk Data Base\n\
         #DDB\n\
         \n\
         ddb.virtualHWVersion = \"{hardware}\"\n\
         ddb.geometry.cylinders = \"{cylinders}\"\n\
         ddb.geometry.heads = \"{heads}\"\n\
         ddb.geometry.sectors = \"63\"\n\
         ddb.adapterType = \"{adapter}\"\n\
         ddb.toolsVersion = \"{tools}\"\n",
        create_type = options.subformat.name,
        hardware = options.hardware,
        adapter = options.adapter,
        tools = options.tools,
    ))
}

/// What the descriptor says about the parent: its CID and a line, without end.
fn parent(create: &Create) -> Result<(u32, String), Failure> {
    let Some(backing) = &create.backing else {
        return Ok((new::NO_PARENT, String::new()));
    };
    check_name(&backing.name)?;
    if !(1..=MAX_BACKING_NAME).contains(&backing.name.len()) {
        return Err(invalid(format!(
            "the backing file's name is {} bytes long, not 1 to {MAX_BACKING_NAME}",
            backing.name.len()
        )));
    }
    let cid = create
        .backing_identity
        .as_ref()
        .and_then(|identity| u32::from_str_radix(identity, 16).ok())
        .ok_or_else(|| invalid("Failed to read parent CID"))?;
    let line = format!("parentFileNameHint=\"{}\"", backing.name);
    Ok((cid, line))
}

/// The stages that make one file with everything in it.
fn embedded(
    host: &mut dyn Host,
    options: &Options,
    sectors: u64,
    text: &str,
) -> Result<Vec<Stage>, Failure> {
    let room = new::DESCRIPTOR_SECTORS * SECTOR;
    if text.len() as u64 > room {
        return Err(invalid(format!(
            "the descriptor would be {} bytes long, at most {room} fit; use shorter names",
            text.len()
        )));
    }
    let fresh = Fresh::new(sectors, options.zeroed_grain)?;
    let mut prepare = Prepare::new(host);
    prepare.fresh(Step::SetLength {
        file: FileNo::IMAGE,
        len: fresh.header.overhead * SECTOR,
    })?;
    prepare.fresh_slice(new::DESCRIPTOR * SECTOR, text.as_bytes())?;
    for (at, first) in fresh.directories() {
        let len = fresh.header.directory_entries() * 4;
        prepare.fresh_bytes(at * SECTOR, len, |_, distance, piece| {
            fresh::fill_directory(&fresh.header, first, distance, piece);
            Ok(())
        })?;
    }
    let stages = vec![
        prepared(prepare.finish()),
        commit(&fresh.header.to_sector()?),
    ];
    Ok(stages)
}

/// The stages that make a descriptor and its extents.
fn separate(
    options: &Options,
    files: &[(String, u64)],
    text: &[u8],
) -> Result<Vec<Stage>, Failure> {
    let mut names = Vec::new();
    let mut contents = Vec::new();
    for (number, (name, sectors)) in (1..).zip(files) {
        let file = FileNo(number);
        names.push(Step::Create {
            file,
            name: NewName::Plain(name.clone()),
        });
        match options.subformat.flat {
            true => contents.push(Step::SetLength {
                file,
                len: sectors * SECTOR,
            }),
            false => contents.extend(Fresh::new(*sectors, options.zeroed_grain)?.steps(file)?),
        }
    }
    let (first, rest) = text
        .split_at_checked(SECTOR as usize)
        .unwrap_or((text, &[]));
    if !rest.is_empty() {
        contents.push(Step::Write {
            file: FileNo::IMAGE,
            offset: SECTOR,
            data: rest.to_vec(),
        });
    }
    names.append(&mut contents);
    let mut stages = vec![prepared(names)];
    stages.retain(|stage| !stage.steps.is_empty());
    stages.push(commit(first));
    Ok(stages)
}

fn prepared(steps: Vec<Step>) -> Stage {
    Stage {
        purpose: Purpose::Prepare,
        steps,
    }
}

fn commit(first_sector: &[u8]) -> Stage {
    Stage {
        purpose: Purpose::Commit,
        steps: vec![Step::Write {
            file: FileNo::IMAGE,
            offset: 0,
            data: first_sector.to_vec(),
        }],
    }
}
