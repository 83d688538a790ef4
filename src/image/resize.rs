//! Making changes durable, and changing the disk's size: plans asked for,
//! checked and executed.

use super::ResizeOptions;
use super::change::{Change, SLACK, limits};
use super::disk::{Image, Link, exclusive, hold, shared};
use super::error::{Error, ErrorKind, Fault, Operation, printable_name};
use super::execute::execute;
use super::guest::{Serving, Stream};
use super::pieces::Units;
use super::plan_check::{Commits, Limits, check};
use super::read::unexpected;
use instar_guest::plan::MAX_GAP;
use instar_guest::proto::{PlanReply, Preallocation};
use instar_guest::{ExtentKind, Plan, Reply, Request};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// How many blocks a resize may move or allocate besides what it adds, and how
/// many bytes they are at most.
const BLOCKS: u64 = 3;
const MAX_BLOCKS: u64 = BLOCKS * (256 << 20);
/// The most memory that the plan of a dry run takes, in bytes.
const SHOWN: usize = 64 << 20;

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
        self.may_resize()
            .and_then(|()| self.put_in_order())
            .and_then(|_| self.resize_to(size, how))
            .map_err(|fault| fault.at(Operation::Resize, &self.path))
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
        self.catch_up(link)?;
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
        if reply.remap {
            exclusive(&self.extents).clear();
        }
        self.carry_flush(link, reply.plan)?;
        self.unflushed.store(false, Ordering::Release);
        link.placed = 0;
        Ok(())
    }

    /// Executes the plan of a flush for which there was no disk space before.
    /// The guest takes it for executed: nothing may be asked of it until it is.
    /// As the holder of the session and not of `traffic`.
    pub(super) fn catch_up(&self, link: &mut Link) -> Result<(), Fault> {
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
        self.may_resize()?;
        let _flushing = hold(&self.flushing);
        let mut link = hold(&self.session);
        self.flush_held(&mut link)?;
        if let Some(why) = shared(&self.facts).unsettled.clone() {
            return self.plan_settling(&mut link, &why);
        }
        let borrowed = self.borrowed_unit(&mut link, size)?;
        let mut reply = match self.judge(&mut link, size, how, borrowed.is_some()) {
            Err(fault) if fault.kind == ErrorKind::SettleFirst => {
                return self.plan_settling(&mut link, &fault.message);
            }
            reply => reply?,
        };
        if let Some(unit) = borrowed {
            reply.warnings.push(format!(
                "{} bytes at {} are copied from the backing file first, so that the disk does \
                 not show more of it; the plan does not list that",
                unit.len(),
                unit.start
            ));
        }
        Ok(reply)
    }

    /// The plan of a resize, checked and not executed. The guest may refuse it
    /// until the unit that the disk ends in is the image's own; what it would
    /// plan then, it plans for a backing image that goes on no further.
    fn judge(
        &self,
        link: &mut Link,
        size: u64,
        how: &ResizeOptions,
        borrowed: bool,
    ) -> Result<PlanReply, Fault> {
        let mut request = self.resize_request(size, how)?;
        let reply = match (self.collect_plan(link, &request), &mut request) {
            (Err(fault), Request::Resize { backing_size, .. })
                if borrowed && fault.kind == ErrorKind::OwnUnitFirst =>
            {
                *backing_size = Some(self.virtual_size());
                self.collect_plan(link, &request)
            }
            (reply, _) => reply,
        };
        let (reply, ()) = plan_in(reply?, "Resize")?;
        check(&reply.plan, &self.growth(size, how))?;
        Ok(reply)
    }

    /// The unit that the disk ends in, where a longer backing image holds it and
    /// a larger disk would show more of that.
    fn borrowed_unit(&self, link: &mut Link, size: u64) -> Result<Option<Units>, Fault> {
        let old = self.virtual_size();
        let unit = shared(&self.facts).write_unit.max(1);
        let longer = |backing: &Image| backing.virtual_size() > old;
        let cut = size > old && !old.is_multiple_of(unit);
        if !cut || !self.backing.as_deref().is_some_and(longer) {
            return Ok(None);
        }
        if shared(&self.facts).no_write.is_some() {
            return Ok(None);
        }
        let extent = self.look(old - 1, 1, &mut Some(link))?;
        let borrowed = matches!(extent.kind, ExtentKind::Unallocated { .. });
        Ok(borrowed.then(|| self.units(old - 1, old)))
    }

    /// Gives the image that unit for its own, so that the plan can clear what
    /// follows the disk's end in it: durably, and only where the plan would be
    /// made then. As the holder of the session and not of `traffic`.
    fn own_last_unit(&self, link: &mut Link, size: u64, how: &ResizeOptions) -> Result<(), Fault> {
        let Some(unit) = self.borrowed_unit(link, size)? else {
            return Ok(());
        };
        self.judge(link, size, how, true)?;
        self.place_old(link, unit, false)?;
        self.flush_held(link)
    }

    /// The plan that comes before any other.
    fn plan_settling(&self, link: &mut Link, why: &str) -> Result<PlanReply, Fault> {
        let reply = self.collect_plan(link, &Request::Settle)?;
        let (mut reply, ()) = plan_in(reply, "Settle")?;
        check(&reply.plan, &self.mending())?;
        reply.warnings.push(format!(
            "The image has to be put in order first ({}): this is the plan for that, the \
             resize is planned afterwards",
            printable_name(why)
        ));
        Ok(reply)
    }

    /// A plan that is not executed, streamed parts included.
    fn collect_plan(&self, link: &mut Link, request: &Request) -> Result<Reply, Fault> {
        let stream = Stream::Collect {
            stages: Vec::new(),
            room: SHOWN,
        };
        let mut serving = Serving::new(&self.files, stream);
        let reply = self.ask_serving(link, request, &mut serving);
        // The guest takes the plan for executed.
        link.stale = true;
        let mut reply = reply?;
        if let (Stream::Collect { stages, .. }, Reply::Plan(reply)) = (serving.stream, &mut reply) {
            reply.plan.stages.splice(0..0, stages);
        }
        Ok(reply)
    }

    fn resize_to(&self, size: u64, how: &ResizeOptions) -> Result<Vec<String>, Fault> {
        let _flushing = hold(&self.flushing);
        let mut link = hold(&self.session);
        self.flush_held(&mut link)?;
        {
            let _traffic = exclusive(&self.traffic);
            self.settle_held(&mut link)?;
        }
        let reply = match self.change_size(&mut link, size, how) {
            Err(fault) if fault.kind == ErrorKind::SettleFirst => {
                self.settle_first(&mut link)?;
                self.change_size(&mut link, size, how)?
            }
            reply => reply?,
        };
        self.take_size(size);
        Ok(reply.warnings)
    }

    fn change_size(
        &self,
        link: &mut Link,
        size: u64,
        how: &ResizeOptions,
    ) -> Result<PlanReply, Fault> {
        self.own_last_unit(link, size, how)?;
        let _traffic = exclusive(&self.traffic);
        let change = Change {
            request: self.resize_request(size, how)?,
            limits: self.growth(size, how),
            done: "holds the new size",
            telling: None,
        };
        let unchanged = size == self.virtual_size();
        let (reply, ()) = self.change(link, change, |reply| {
            let (reply, ()) = plan_in(reply, "Resize")?;
            match reply.plan.is_empty() && !unchanged {
                false => Ok((reply, ())),
                true => Err(unexpected("Resize")),
            }
        })?;
        Ok(reply)
    }

    /// Takes the new size over. That the guest reads the image again can wait
    /// until it is asked something.
    fn take_size(&self, size: u64) {
        self.forget_mapping();
        let mut facts = exclusive(&self.facts);
        Arc::make_mut(&mut facts).virtual_size = size;
        self.size.store(size, Ordering::Release);
    }

    pub(super) fn forget_mapping(&self) {
        exclusive(&self.extents).clear();
        hold(&self.inflated).clear();
    }

    /// Refuses what no resize of the image can be.
    fn may_resize(&self) -> Result<(), Fault> {
        self.writable()?;
        if self.backing.is_none() {
            self.no_backing_named()?;
        }
        match &shared(&self.facts).no_resize {
            None => Ok(()),
            Some(failure) => Err(Fault::from(failure)),
        }
    }

    fn resize_request(&self, size: u64, how: &ResizeOptions) -> Result<Request, Fault> {
        self.may_resize()?;
        Ok(Request::Resize {
            size,
            preallocation: how.preallocation,
            shrink: how.shrink,
            backing_size: self.backing.as_ref().map(|backing| backing.virtual_size()),
        })
    }

    /// Room for a few whole blocks: those that are moved out of a table's way,
    /// and what rounds the end of the disk up. In bytes.
    fn blocks(&self) -> u64 {
        let block = shared(&self.facts).cluster_size.unwrap_or(0);
        MAX_BLOCKS.min(BLOCKS * block)
    }

    /// What the plan of a resize may do.
    fn growth(&self, size: u64, how: &ResizeOptions) -> Limits {
        let old = self.virtual_size();
        let added = size.saturating_sub(old);
        // Counts of what a shrink releases are written anew.
        let metadata = SLACK + self.blocks() + size.abs_diff(old) / 8;
        let fill = match how.preallocation {
            Preallocation::Off => metadata,
            Preallocation::Metadata | Preallocation::Falloc => metadata.saturating_add(added),
            // Reserved first, then written.
            Preallocation::Full => metadata.saturating_add(added.saturating_mul(2)),
        };
        // What is kept may move to where there was something else before.
        // A change that was interrupted behind its commit is finished by the
        // same request, which gives space back.
        let shrinks = size == old || (how.shrink && size < old);
        // The last of several files may be copied to become longer.
        let moved = match shrinks || self.files.lens().len() > 1 {
            true => self.files.lens().into_iter().fold(0, u64::saturating_add),
            false => 0,
        };
        let room = metadata.saturating_add(added).saturating_add(MAX_GAP);
        let fill = fill.saturating_add(moved);
        let commits = match size == old {
            true => Commits::Any,
            false => Commits::Some,
        };
        Limits {
            names: self.names(metadata.saturating_add(size.max(old))),
            ..limits(&self.files, room, fill, commits, shrinks)
        }
    }
}

pub(super) fn plan_in(reply: Reply, request: &str) -> Result<(PlanReply, ()), Fault> {
    match reply {
        Reply::Plan(reply) => Ok((reply, ())),
        _ => Err(unexpected(request)),
    }
}
