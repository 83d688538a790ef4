//! Making changes durable, and changing the disk's size: plans asked for,
//! checked and executed.

use super::ResizeOptions;
use super::check::{Commits, FileLimits, Limits, check};
use super::disk::{Image, Link, exclusive, hold, shared};
use super::error::{Error, Fault, Operation};
use super::execute::{execute, truncate_back};
use super::files::FileTable;
use super::guest::{Serving, Stream};
use super::open::{checked_facts, fresh};
use super::read::unexpected;
use instar_guest::plan::MAX_GAP;
use instar_guest::proto::{PlanReply, Preallocation};
use instar_guest::{ExtentKind, Plan, Reply, Request};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Room for metadata that does not depend on a change's size (tables that are
/// moved as a whole), in bytes.
const SLACK: u64 = 64 << 20;
/// The most memory that the plan of a dry run takes, in bytes.
const SHOWN: usize = 64 << 20;

/// A plan that has been checked.
struct Planned {
    reply: PlanReply,
    /// Whether its first parts are in the files by now.
    streamed: bool,
}

impl Image {
    /// Makes everything written so far survive a loss of power: data and
    /// mapping.
    pub fn flush(&self) -> Result<(), Error> {
        self.flush_all()
            .map_err(|fault| fault.at(Operation::Flush, &self.path))
    }

    /// The plan of a resize, without executing it. Needs the same access.
    pub fn plan_resize(&self, size: u64, how: &ResizeOptions) -> Result<PlanReply, Error> {
        self.plan_only(size, how)
            .map_err(|fault| fault.at(Operation::Resize, &self.path))
    }

    /// Changes the disk's size, durably; answers warnings for the user. The
    /// error's text says whether the image is unchanged or holds the new size.
    pub fn resize(&self, size: u64, how: &ResizeOptions) -> Result<Vec<String>, Error> {
        self.own_last_unit(size)
            .and_then(|()| self.resize_to(size, how))
            .map_err(|fault| fault.at(Operation::Resize, &self.path))
    }

    /// Where a longer backing image holds the unit that the disk ends in, a
    /// larger disk would show more of it. Only the host has those bytes: it
    /// writes one of them over, so that the image gets the unit for its own and
    /// the plan can clear the rest.
    fn own_last_unit(&self, size: u64) -> Result<(), Fault> {
        let old = self.virtual_size();
        let unit = shared(&self.facts).write_unit.max(1);
        let longer = |backing: &Image| backing.virtual_size() > old;
        let cut = size > old && !old.is_multiple_of(unit);
        if !cut || !self.backing.as_deref().is_some_and(longer) {
            return Ok(());
        }
        let facts = shared(&self.facts).clone();
        if self.writable().is_err() || facts.no_write.is_some() || facts.no_resize.is_some() {
            return Ok(());
        }
        let last = old - 1;
        if self.look(last, 1, &mut None)?.kind != ExtentKind::Unallocated {
            return Ok(());
        }
        let mut byte = [0];
        self.fill(&mut byte, last, &mut None)?;
        self.store(&byte, last)
    }

    pub(super) fn flush_all(&self) -> Result<(), Fault> {
        let _flushing = hold(&self.flushing);
        self.alive()?;
        if self.unflushed.load(Ordering::Acquire) {
            return self.flush_held(&mut hold(&self.session));
        }
        self.sync()
    }

    /// Makes the files' changes durable. After a failure nobody knows what of
    /// them is; the kernel would not say so twice.
    fn sync(&self) -> Result<(), Fault> {
        self.files.sync().map_err(|error| {
            self.lose();
            Fault::os("Could not make changes durable", error)
        })
    }

    /// Flushes, as the holder of the session and not of `traffic`. The first
    /// barrier of the plan makes the data durable, before anything refers to it.
    pub(super) fn flush_held(&self, link: &mut Link) -> Result<(), Fault> {
        if !self.unflushed.load(Ordering::Acquire) {
            return self.sync();
        }
        self.settle(link)?;
        // The guest takes its changes for planned even where it then fails.
        let reply = self
            .ask(link, &Request::Flush)
            .inspect_err(|_| self.lose())?;
        let Reply::Plan(reply) = reply else {
            self.lose();
            return Err(unexpected("Flush"));
        };
        let room = SLACK.saturating_add(link.placed.saturating_mul(4));
        let limits = limits(
            &self.files,
            room.saturating_add(MAX_GAP),
            room,
            Commits::None,
            false,
        );
        // From here on the guest takes its mapping for durable.
        check(&reply.plan, &limits)
            .map_err(Fault::from)
            .inspect_err(|_| self.lose())?;
        if reply.plan.is_empty() {
            self.sync()?;
        }
        self.carry_flush(link, reply.plan)?;
        self.unflushed.store(false, Ordering::Release);
        link.placed = 0;
        Ok(())
    }

    /// Executes the plan of a flush for which there was no disk space before.
    /// The guest takes it for executed: nothing may be asked of it until it is.
    /// As the holder of the session and not of `traffic`.
    pub(super) fn settle(&self, link: &mut Link) -> Result<(), Fault> {
        match link.postponed.take() {
            None => Ok(()),
            Some(plan) => self.alive().and_then(|()| self.carry_flush(link, plan)),
        }
    }

    /// Executes the plan of a flush, or keeps it where the disk is full: nothing
    /// refers to anything that its first stage writes, which can be repeated.
    fn carry_flush(&self, link: &mut Link, plan: Plan) -> Result<(), Fault> {
        if let Err(aborted) = execute(&self.files, &plan, &self.files.lens()) {
            match aborted.is_for_want_of_space() && !self.files.is_sync_failed() {
                true => link.postponed = Some(plan),
                false => self.lose(),
            }
            return Err(aborted.cause());
        }
        // Space that was released may be used again from now on: whoever still
        // reads from it finishes first.
        drop(exclusive(&self.traffic));
        Ok(())
    }

    fn plan_only(&self, size: u64, how: &ResizeOptions) -> Result<PlanReply, Fault> {
        let _flushing = hold(&self.flushing);
        let mut link = hold(&self.session);
        self.flush_held(&mut link)?;
        let stream = Stream::Collect {
            stages: Vec::new(),
            room: SHOWN,
        };
        let mut serving = Serving::new(&self.files, stream);
        let mut reply = self.ask_resize(&mut link, size, how, &mut serving)?;
        if let Stream::Collect { stages, .. } = serving.stream {
            reply.plan.stages.splice(0..0, stages);
        }
        check(&reply.plan, &self.growth(size, how))?;
        Ok(reply)
    }

    fn resize_to(&self, size: u64, how: &ResizeOptions) -> Result<Vec<String>, Fault> {
        let _flushing = hold(&self.flushing);
        let mut link = hold(&self.session);
        self.flush_held(&mut link)?;
        let _traffic = exclusive(&self.traffic);
        let old = self.files.lens();
        let planned = self.plan_streaming(&mut link, size, how)?;
        if let Err(fault) = self.carry_out(&planned, &old) {
            // Old or new: only the file can tell. The failure at hand is the
            // one to report; the next request meets the other again.
            let _ = self.reopen(&mut link);
            return Err(fault);
        }
        self.take_size(size);
        Ok(planned.reply.warnings)
    }

    /// Asks for the plan of a resize, executes the parts that are streamed, and
    /// checks the rest.
    fn plan_streaming(
        &self,
        link: &mut Link,
        size: u64,
        how: &ResizeOptions,
    ) -> Result<Planned, Fault> {
        let old = self.files.lens();
        let mut limits = self.growth(size, how);
        let stream = Stream::Execute(streamed_part(&limits));
        let mut serving = Serving::new(&self.files, stream);
        let reply = self.ask_resize(link, size, how, &mut serving);
        let streamed = match serving.stream {
            Stream::Execute(left) => limits.go_on(&left),
            Stream::Refuse | Stream::Collect { .. } => false,
        };
        let planned = reply.and_then(|reply| {
            check(&reply.plan, &limits)?;
            match reply.plan.is_empty() && size != self.virtual_size() {
                false => Ok(Planned { reply, streamed }),
                true => Err(unexpected("Resize")),
            }
        });
        if planned.is_err() && streamed {
            truncate_back(&self.files, &old)?;
        }
        planned
    }

    fn carry_out(&self, planned: &Planned, old: &[u64]) -> Result<(), Fault> {
        if planned.streamed {
            // Nothing may refer to a streamed part that is not durable.
            self.files.sync().map_err(|error| {
                let fault = Fault::os("Could not make changes durable", error);
                match truncate_back(&self.files, old) {
                    Ok(()) => fault.and("the image is unchanged"),
                    Err(_) => fault.and("the image is unchanged, its file is longer"),
                }
            })?;
        }
        let plan = &planned.reply.plan;
        execute(&self.files, plan, old).map_err(|aborted| aborted.fault("holds the new size"))
    }

    /// Takes the new size over. That the guest reads the image again can wait
    /// until it is asked something.
    fn take_size(&self, size: u64) {
        self.forget_mapping();
        let mut facts = exclusive(&self.facts);
        Arc::make_mut(&mut facts).virtual_size = size;
        self.size.store(size, Ordering::Release);
    }

    fn forget_mapping(&self) {
        exclusive(&self.extents).clear();
        hold(&self.inflated).clear();
    }

    fn ask_resize(
        &self,
        link: &mut Link,
        size: u64,
        how: &ResizeOptions,
        serving: &mut Serving<'_>,
    ) -> Result<PlanReply, Fault> {
        self.writable()?;
        if self.backing.is_none() {
            self.no_backing_named()?;
        }
        if let Some(failure) = &shared(&self.facts).no_resize {
            return Err(Fault::from(failure));
        }
        let request = Request::Resize {
            size,
            preallocation: how.preallocation,
            shrink: how.shrink,
            backing_size: self.backing.as_ref().map(|backing| backing.virtual_size()),
        };
        let reply = self.ask_serving(link, &request, serving);
        // The guest may take a plan for executed, whatever becomes of it.
        link.stale = true;
        match reply? {
            Reply::Plan(reply) => Ok(reply),
            _ => Err(unexpected("Resize")),
        }
    }

    /// What the plan of a resize may do.
    fn growth(&self, size: u64, how: &ResizeOptions) -> Limits {
        let old = self.virtual_size();
        let added = size.saturating_sub(old);
        // Counts of what a shrink releases are written anew.
        let metadata = SLACK + size.abs_diff(old) / 8;
        let fill = match how.preallocation {
            Preallocation::Off => metadata,
            Preallocation::Metadata | Preallocation::Falloc => metadata.saturating_add(added),
            // Reserved first, then written.
            Preallocation::Full => metadata.saturating_add(added.saturating_mul(2)),
        };
        let room = metadata.saturating_add(added).saturating_add(MAX_GAP);
        limits(
            &self.files,
            room,
            fill,
            Commits::One,
            how.shrink && size < old,
        )
    }

    /// Has the guest read the image again: whatever it knew is dropped. Where
    /// that fails, the next request tries again.
    pub(super) fn reopen(&self, link: &mut Link) -> Result<(), Fault> {
        link.stale = false;
        let reopened = self.open_again(link);
        link.stale = reopened.is_err();
        reopened
    }

    fn open_again(&self, link: &mut Link) -> Result<(), Fault> {
        let old = self.facts();
        let request = Request::Open {
            format: Some(old.format),
            file_len: self.file_len(),
            write: true,
            fresh: fresh()?,
        };
        let Reply::Opened(facts) = self.ask(link, &request)? else {
            return Err(unexpected("Open"));
        };
        let mut facts = checked_facts(facts)?;
        facts.probed = old.probed;
        if !facts.files.is_empty() {
            let lens = self.files.lens().split_off(1);
            self.ask(link, &Request::Attach { lens })?;
        }
        self.forget_mapping();
        self.size.store(facts.virtual_size, Ordering::Release);
        *exclusive(&self.facts) = Arc::new(facts);
        Ok(())
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
