//! raw: the disk's bytes and nothing else.

use crate::disk::{Disk, Opened, Opening};
use crate::engine::Host;
use crate::error::{Failure, FailureKind};
use crate::facts::Facts;
use crate::options;
use crate::plan::{Plan, Purpose, Stage, Step};
use crate::proto::{
    Content, Create, Extent, ExtentKind, FileNo, Format, Place, PlanReply, Preallocation, Reply,
};
use crate::resize::{Direction, Wish};
use alloc::boxed::Box;
use alloc::format;
use alloc::string::ToString;
use alloc::vec;
use alloc::vec::Vec;

/// An open raw image.
#[derive(Clone, Copy, Debug)]
pub struct Raw {
    /// Length of the file, which is the disk's size.
    pub file_len: u64,
}

/// Opens a file as a raw image.
pub fn open(opening: &Opening<'_>) -> Opened {
    let raw = Raw {
        file_len: opening.file_len,
    };
    (Box::new(raw), raw.facts(opening.probed))
}

impl Raw {
    /// The facts. The size is exact, not rounded up to a sector.
    fn facts(self, probed: bool) -> Facts {
        Facts {
            format: Format::Raw,
            probed,
            virtual_size: self.file_len,
            cluster_size: None,
            write_unit: 1,
            size_unit: 1,
            backing: None,
            identity: None,
            files: Vec::new(),
            files_first: false,
            encrypted: false,
            dirty: false,
            corrupt: false,
            unsettled: None,
            no_write: None,
            no_resize: None,
            snapshots: Vec::new(),
            specific: Vec::new(),
        }
    }

    /// What lies behind a guest range inside the disk.
    fn extents(self, offset: u64, len: u64) -> Vec<Extent> {
        let extent = Extent {
            offset,
            len,
            kind: ExtentKind::Data {
                file: FileNo::IMAGE,
                at: offset,
                in_place: true,
            },
        };
        Vec::from_iter((len > 0).then_some(extent))
    }

    /// The plan that changes the size: one set-length, which is atomic.
    fn plan(self, wish: &Wish) -> Result<PlanReply, Failure> {
        match wish.direction(self.file_len)? {
            Direction::Same => Ok(PlanReply::default()),
            Direction::Shrink => {
                let (file, len) = (FileNo::IMAGE, wish.size);
                let commit = Step::SetLength { file, len };
                Ok(reply(plan(vec![(Purpose::Commit, commit)])))
            }
            Direction::Grow => {
                lengthen(self.file_len, wish.size, wish.preallocation, true).map(reply)
            }
        }
    }

    /// Every byte has its place already.
    fn places(self, offset: u64, len: u64) -> Vec<Place> {
        let place = Place {
            offset,
            len,
            file: FileNo::IMAGE,
            at: offset,
            content: Content::Current,
        };
        Vec::from_iter((len > 0).then_some(place))
    }
}

impl Disk for Raw {
    fn format(&self) -> Format {
        Format::Raw
    }

    fn virtual_size(&self) -> u64 {
        self.file_len
    }

    fn map(&mut self, _: &mut dyn Host, offset: u64, len: u64) -> Result<Vec<Extent>, Failure> {
        Ok(self.extents(offset, len))
    }

    fn resize(&mut self, _: &mut dyn Host, wish: &Wish) -> Result<PlanReply, Failure> {
        self.plan(wish)
    }

    fn allocate(&mut self, _: &mut dyn Host, offset: u64, len: u64) -> Result<Reply, Failure> {
        Ok(Reply::Placed(self.places(offset, len)))
    }
}

/// The plan that writes a new image into an empty file.
pub fn create(create: &Create) -> Result<PlanReply, Failure> {
    let mut preallocation = Preallocation::Off;
    let mut options = vec![("size".to_string(), create.size.to_string())];
    let keys = ["nocow", "preallocation", "extent_size_hint"];
    if let Some((key, _)) = create
        .options
        .iter()
        .find(|(key, _)| !keys.contains(&key.as_str()))
    {
        return Err(options::unknown(key));
    }
    for key in keys {
        let mut given = create.options.iter().filter(|(name, _)| name == key);
        let Some((_, value)) = given.next_back() else {
            continue;
        };
        let shown = match key {
            // Hints to filesystems, which change nothing in the image.
            "nocow" => if options::switch(key, value)? {
                "on"
            } else {
                "off"
            }
            .to_string(),
            "extent_size_hint" => options::size(key, value)?.to_string(),
            _ => {
                preallocation = options::preallocation(value)
                    .ok_or_else(|| options::invalid(format!("invalid parameter value: {value}")))?;
                value.clone()
            }
        };
        options.push((key.to_string(), shown));
    }
    if create.backing.is_some() {
        return Err(options::invalid(
            "Backing file not supported for file format 'raw'",
        ));
    }
    Ok(PlanReply {
        plan: lengthen(0, create.size, preallocation, false)?,
        options,
        ..PlanReply::default()
    })
}

fn reply(plan: Plan) -> PlanReply {
    PlanReply {
        plan,
        ..PlanReply::default()
    }
}

/// Refuses what no file can be, and what the format does not have.
fn check(len: u64, preallocation: Preallocation) -> Result<(), Failure> {
    if i64::try_from(len).is_err() {
        return Err(Failure::new(
            FailureKind::TooLarge,
            format!("a file cannot be {len} bytes long"),
        ));
    }
    if preallocation == Preallocation::Metadata {
        return Err(options::invalid("Unsupported preallocation mode: metadata"));
    }
    Ok(())
}

/// Makes a file longer. Disk space for what is added is reserved first, so that
/// a full disk changes nothing. Zeroes are written once the disk has its new
/// size, which they do not change; in a file that is no disk yet, before.
fn lengthen(
    old: u64,
    new: u64,
    preallocation: Preallocation,
    is_disk: bool,
) -> Result<Plan, Failure> {
    check(new, preallocation)?;
    let (file, offset, len) = (FileNo::IMAGE, old, new - old);
    let reserve = (Purpose::Prepare, Step::Reserve { file, offset, len });
    let fill = |purpose| (purpose, Step::Fill { file, offset, len });
    let commit = (Purpose::Commit, Step::SetLength { file, len: new });
    let stages = match preallocation {
        Preallocation::Falloc if len > 0 => vec![reserve, commit],
        Preallocation::Full if len > 0 && is_disk => {
            vec![reserve, commit, fill(Purpose::Release)]
        }
        Preallocation::Full if len > 0 => vec![reserve, fill(Purpose::Prepare), commit],
        _ => vec![commit],
    };
    Ok(plan(stages))
}

fn plan(stages: Vec<(Purpose, Step)>) -> Plan {
    let stages = stages.into_iter().map(|(purpose, step)| Stage {
        purpose,
        steps: vec![step],
    });
    Plan {
        stages: stages.collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resized(old: u64, size: u64, preallocation: Preallocation) -> Vec<(Purpose, Step)> {
        let wish = Wish {
            size,
            preallocation,
            shrink: true,
            backing_size: None,
        };
        let reply = Raw { file_len: old }.plan(&wish).unwrap();
        steps(reply.plan)
    }

    fn steps(plan: Plan) -> Vec<(Purpose, Step)> {
        plan.stages
            .into_iter()
            .map(|stage| match <[Step; 1]>::try_from(stage.steps) {
                Ok([step]) => (stage.purpose, step),
                Err(steps) => panic!("{} steps in a stage", steps.len()),
            })
            .collect()
    }

    const FILE: FileNo = FileNo::IMAGE;

    fn commit(len: u64) -> (Purpose, Step) {
        (Purpose::Commit, Step::SetLength { file: FILE, len })
    }

    #[test]
    fn a_shrink_is_one_set_length() {
        assert_eq!(resized(3000, 1000, Preallocation::Off), [commit(1000)]);
        assert_eq!(resized(3000, 3000, Preallocation::Off), []);
    }

    #[test]
    fn zeroes_are_written_after_the_commit_into_space_reserved_before_it() {
        let (offset, len) = (1000, 2000);
        let reserve = Step::Reserve {
            file: FILE,
            offset,
            len,
        };
        let fill = Step::Fill {
            file: FILE,
            offset,
            len,
        };
        assert_eq!(
            resized(1000, 3000, Preallocation::Full),
            [
                (Purpose::Prepare, reserve.clone()),
                commit(3000),
                (Purpose::Release, fill)
            ]
        );
        assert_eq!(
            resized(1000, 3000, Preallocation::Falloc),
            [(Purpose::Prepare, reserve), commit(3000)]
        );
    }

    #[test]
    fn a_new_file_is_filled_before_it_is_a_disk() {
        let plan = lengthen(0, 512, Preallocation::Full, false).unwrap();
        let purposes: Vec<Purpose> = steps(plan).iter().map(|(purpose, _)| *purpose).collect();
        assert_eq!(
            purposes,
            [Purpose::Prepare, Purpose::Prepare, Purpose::Commit]
        );
        let empty = lengthen(0, 0, Preallocation::Full, false).unwrap();
        assert_eq!(steps(empty), [commit(0)]);
    }

    #[test]
    fn a_mapping_is_nothing_that_raw_has() {
        let refused = lengthen(0, 512, Preallocation::Metadata, true).unwrap_err();
        assert_eq!(refused.message, "Unsupported preallocation mode: metadata");
    }
}
