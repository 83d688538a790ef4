//! A change that the guest plans: asked for, its first parts executed as they
//! come, the rest checked as a whole and carried out.

use super::disk::{Image, Link, shared};
use super::error::Fault;
use super::execute::{execute, truncate_back};
use super::files::FileTable;
use super::guest::{Serving, Stream, Telling};
use super::lock::LockSet;
use super::names::Names;
use super::plan_check::{Commits, FileLimits, Limits, check};
use super::plan_names::NameLimits;
use super::reach::spare_files;
use instar_guest::plan::{MAX_GAP, NewName, Step};
use instar_guest::proto::PlanReply;
use instar_guest::{FileNo, Plan, Reply, Request};
use std::path::Path;

/// Room for metadata that does not depend on a change's size (tables that are
/// moved as a whole), in bytes.
pub(super) const SLACK: u64 = 64 << 20;

/// What a change may do, and what it is.
pub(super) struct Change<'a> {
    pub request: Request,
    pub limits: Limits,
    /// What the image does once it is made, after "the image": "holds the new
    /// size".
    pub done: &'static str,
    /// Where findings go.
    pub telling: Option<Telling<'a>>,
}

/// A plan that has been checked.
struct Planned<T> {
    plan: PlanReply,
    rest: T,
    /// Whether its first parts are in the files by now.
    streamed: bool,
}

impl Image {
    /// Makes a change, as the holder of everything. `plan_of` takes the plan
    /// out of the guest's reply. After a failure the guest reads the image
    /// again: old or new, only the file can tell.
    pub(super) fn change<T>(
        &self,
        link: &mut Link,
        change: Change<'_>,
        plan_of: impl FnOnce(Reply) -> Result<(PlanReply, T), Fault>,
    ) -> Result<(PlanReply, T), Fault> {
        let old = self.files.lens();
        let done = change.done;
        let planned = self.plan_streaming(link, change, plan_of)?;
        let plan = &planned.plan.plan;
        let named = changes_names(plan);
        let made = self.carry_out(plan, planned.streamed, &old, done);
        if named {
            self.files.forbid_names();
        }
        match made {
            Ok(()) if named => self
                .reopen_renamed(link)
                .map_err(|fault| fault.and(&format!("the image {done}; open it again")))?,
            Ok(()) => {}
            Err(fault) => {
                // The failure at hand is the one to report; the next request
                // meets the other again.
                let _ = match named {
                    true => self.reopen_renamed(link),
                    false => self.reopen(link),
                };
                return Err(fault);
            }
        }
        Ok((planned.plan, planned.rest))
    }

    /// Asks for a plan, executes the parts that are streamed, and checks the
    /// rest.
    fn plan_streaming<T>(
        &self,
        link: &mut Link,
        change: Change<'_>,
        plan_of: impl FnOnce(Reply) -> Result<(PlanReply, T), Fault>,
    ) -> Result<Planned<T>, Fault> {
        let old = self.files.lens();
        let (mut limits, mut telling) = (change.limits, change.telling);
        let mut serving = Serving::new(&self.files, Stream::Execute(streamed_part(&limits)));
        serving.telling = telling.as_mut().map(Telling::again);
        let reply = self.ask_serving(link, &change.request, &mut serving);
        // The guest may take a plan for executed, whatever becomes of it.
        link.stale = true;
        let streamed = match serving.stream {
            Stream::Execute(left) => limits.go_on(&left),
            Stream::Refuse | Stream::Collect { .. } | Stream::Draft { .. } => false,
        };
        let planned = reply.and_then(plan_of).and_then(|(plan, rest)| {
            check(&plan.plan, &limits)?;
            if changes_names(&plan.plan) {
                self.allow_names(&plan.plan, &link.reach.owners())?;
            }
            Ok(Planned {
                plan,
                rest,
                streamed,
            })
        });
        if planned.is_err() && streamed {
            truncate_back(&self.files, &old)?;
        }
        planned
    }

    /// Lets a plan change names, where it can: each of them can be changed so
    /// that the old file is gone with it.
    fn allow_names(&self, plan: &Plan, owners: &[u32]) -> Result<(), Fault> {
        let mut targets = Vec::new();
        let (mut wanted, mut left) = (Vec::new(), Vec::new());
        for step in plan.stages.iter().flat_map(|stage| &stage.steps) {
            let file = match *step {
                Step::Create {
                    name: NewName::Plain(ref name),
                    ..
                } => {
                    wanted.push(name.as_str());
                    continue;
                }
                Step::Remove {
                    name: NewName::Plain(ref name),
                } => {
                    left.push(name.as_str());
                    continue;
                }
                Step::Rename { over, .. } => over,
                Step::Unlink { file } => file,
                _ => continue,
            };
            targets.push((file, self.files.file(file)?));
        }
        let image = self.files.file(FileNo::IMAGE)?;
        let lock = (!self.force_share).then(|| LockSet::of(self.access));
        let names = Names::over(&self.home, image, targets, [&wanted, &left], lock, owners)?;
        self.files.allow_names(names);
        Ok(())
    }

    /// Which names a plan may change, in an image of several files; each that
    /// it makes may get so long.
    pub(super) fn names(&self, cap: u64) -> Option<NameLimits> {
        let facts = shared(&self.facts);
        if facts.files.is_empty() {
            return None;
        }
        let own = self.home.name().to_string_lossy().into_owned();
        let others = facts.files.iter().filter_map(|named| {
            let name = Path::new(&named.name).file_name()?;
            Some(name.to_string_lossy().into_owned())
        });
        Some(NameLimits {
            most: spare_files(facts.files.len() + 1),
            cap,
            has: Some(std::iter::once(own).chain(others).collect()),
        })
    }

    fn carry_out(&self, plan: &Plan, streamed: bool, old: &[u64], done: &str) -> Result<(), Fault> {
        if streamed {
            // Nothing may refer to a streamed part that is not durable.
            self.files.sync().map_err(|error| {
                let fault = Fault::os("Could not make changes durable", error);
                match truncate_back(&self.files, old) {
                    Ok(()) => fault.and("the image is unchanged"),
                    Err(_) => fault.and("the image is unchanged, its file is longer"),
                }
            })?;
        }
        execute(&self.files, plan, old).map_err(|aborted| aborted.fault(done))
    }

    /// What a plan may do that puts an image in order or repairs it: what it
    /// lays down is counted by what is there.
    pub(super) fn mending(&self) -> Limits {
        let lens = self.files.lens().into_iter();
        let room = SLACK + lens.fold(0, u64::saturating_add) / 8;
        let cap = room.saturating_add(MAX_GAP);
        Limits {
            names: self.names(cap),
            ..limits(&self.files, cap, room, Commits::Any, true)
        }
    }
}

fn changes_names(plan: &Plan) -> bool {
    let mut steps = plan.stages.iter().flat_map(|stage| &stage.steps);
    steps.any(|step| {
        matches!(
            step,
            Step::Create { .. } | Step::Rename { .. } | Step::Unlink { .. } | Step::Remove { .. }
        )
    })
}

/// Limits for a plan over the files that may be changed: each may get longer by
/// `room` bytes.
pub(super) fn limits(
    files: &FileTable,
    room: u64,
    fill: u64,
    commits: Commits,
    may_cut: bool,
) -> Limits {
    let limits_of = |file| {
        let writable = files.writable(file);
        let len = files.len(file).filter(|_| writable)?;
        Some(FileLimits {
            len,
            cap: len.saturating_add(room).min(i64::MAX as u64),
            floor: 0,
            shortest: if may_cut { 0 } else { len },
        })
    };
    Limits {
        files: files.numbers().map(limits_of).collect(),
        names: None,
        commits,
        fill,
        streamed: false,
    }
}

/// What a streamed part may do: nothing below the files' old ends.
pub(super) fn streamed_part(limits: &Limits) -> Limits {
    let mut part = limits.clone();
    part.commits = Commits::None;
    part.names = None;
    for file in part.files.iter_mut().flatten() {
        file.floor = file.len;
        file.shortest = file.len;
    }
    part
}
