//! A change that the guest plans: asked for, its first parts executed as they
//! come, the rest checked as a whole and carried out.

use super::disk::{Image, Link};
use super::error::Fault;
use super::execute::{execute, truncate_back};
use super::files::FileTable;
use super::guest::{Serving, Stream, Telling};
use super::plan_check::{Commits, FileLimits, Limits, check};
use instar_guest::plan::MAX_GAP;
use instar_guest::proto::PlanReply;
use instar_guest::{Plan, Reply, Request};

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
        if let Err(fault) = self.carry_out(&planned.plan.plan, planned.streamed, &old, done) {
            // The failure at hand is the one to report; the next request meets
            // the other again.
            let _ = self.reopen(link);
            return Err(fault);
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
            Stream::Refuse | Stream::Collect { .. } => false,
        };
        let planned = reply.and_then(plan_of).and_then(|(plan, rest)| {
            check(&plan.plan, &limits)?;
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
        limits(
            &self.files,
            room.saturating_add(MAX_GAP),
            room,
            Commits::Any,
            true,
        )
    }
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
        commits,
        fill,
        streamed: false,
    }
}

/// What a streamed part may do: nothing below the files' old ends.
fn streamed_part(limits: &Limits) -> Limits {
    let mut part = limits.clone();
    part.commits = Commits::None;
    for file in part.files.iter_mut().flatten() {
        file.floor = file.len;
        file.shortest = file.len;
    }
    part
}
