//! Making changes durable, and changing the disk's size: plans asked for,
//! checked and executed.

use super::ResizeOptions;
use super::check::{Commits, FileLimits, Limits, check};
use super::disk::{Image, Link, exclusive, hold, shared};
use super::error::{Error, Fault, Operation};
use super::execute::{Aborted, execute, truncate_back};
use super::files::FileTable;
use super::guest::{Serving, Stream};
use super::open::checked_facts;
use super::read::unexpected;
use instar_guest::proto::{PlanReply, Preallocation};
use instar_guest::{FileNo, Plan, Reply, Request};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Room for metadata that does not depend on a change's size (tables that are
/// moved as a whole), in bytes.
const SLACK: u64 = 64 << 20;
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
        self.resize_to(size, how)
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
        let Reply::Plan(reply) = self.ask(link, &Request::Flush)? else {
            self.lose();
            return Err(unexpected("Flush"));
        };
        let room = SLACK.saturating_add(link.placed.saturating_mul(4));
        let limits = limits(&self.files, room, room, Commits::None, false);
        let done = check(&reply.plan, &limits)
            .map_err(Fault::from)
            .and_then(|_| {
                execute(&self.files, &reply.plan, &self.files.lens()).map_err(Aborted::cause)
            });
        // From here on the guest takes its mapping for durable.
        done.inspect_err(|_| self.lose())?;
        if reply.plan.is_empty() {
            self.sync()?;
        }
        self.unflushed.store(false, Ordering::Release);
        link.placed = 0;
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
        self.reopen(&mut link)?;
        Ok(reply)
    }

    fn resize_to(&self, size: u64, how: &ResizeOptions) -> Result<Vec<String>, Fault> {
        let _flushing = hold(&self.flushing);
        let mut link = hold(&self.session);
        self.flush_held(&mut link)?;
        let _traffic = exclusive(&self.traffic);
        let old = self.files.lens();
        let mut limits = self.growth(size, how);
        let stream = Stream::Execute {
            limits: streamed_part(&limits),
            streamed: false,
        };
        let mut serving = Serving::new(&self.files, stream);
        let reply = self.ask_resize(&mut link, size, how, &mut serving);
        let Stream::Execute {
            limits: left,
            streamed,
        } = serving.stream
        else {
            return Err(unexpected("Resize"));
        };
        limits.fill = left.fill;
        for (file, now) in limits.files.iter_mut().zip(self.files.lens()) {
            if let Some(file) = file {
                file.len = now;
            }
        }
        let plan = reply.and_then(|reply| match check(&reply.plan, &limits) {
            Ok(_) => Ok(reply),
            Err(error) => Err(error.into()),
        });
        let reply = match plan {
            Ok(reply) => reply,
            Err(fault) if streamed => {
                truncate_back(&self.files, &old)?;
                self.reopen(&mut link)?;
                return Err(fault);
            }
            Err(fault) => return Err(fault),
        };
        if reply.plan.is_empty() && !streamed {
            return Ok(reply.warnings);
        }
        let done = self.carry_out(&reply.plan, streamed, &old);
        let reopened = self.reopen(&mut link);
        done?;
        reopened.map_err(|fault| {
            self.lose();
            fault.and("the image holds the new size and has to be opened again")
        })?;
        Ok(reply.warnings)
    }

    fn carry_out(&self, plan: &Plan, streamed: bool, old: &[u64]) -> Result<(), Fault> {
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
        execute(&self.files, plan, old).map_err(|aborted| aborted.fault("holds the new size"))
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
        match self.ask_serving(link, &request, serving)? {
            Reply::Plan(reply) => Ok(reply),
            _ => Err(unexpected("Resize")),
        }
    }

    /// What the plan of a resize may do.
    fn growth(&self, size: u64, how: &ResizeOptions) -> Limits {
        let old = self.virtual_size();
        let added = size.saturating_sub(old);
        let metadata = SLACK + added / 8;
        let fill = match how.preallocation {
            Preallocation::Off => metadata,
            Preallocation::Metadata | Preallocation::Falloc | Preallocation::Full => {
                metadata.saturating_add(added)
            }
        };
        let room = metadata.saturating_add(added);
        limits(
            &self.files,
            room,
            fill,
            Commits::One,
            how.shrink && size < old,
        )
    }

    /// Has the guest read the image again: whatever it knew is dropped.
    fn reopen(&self, link: &mut Link) -> Result<(), Fault> {
        let old = self.facts();
        let request = Request::Open {
            format: Some(old.format),
            file_len: self.file_len(),
            write: true,
        };
        let Reply::Opened(facts) = self.ask(link, &request)? else {
            return Err(unexpected("Open"));
        };
        let mut facts = checked_facts(facts)?;
        facts.probed = old.probed;
        if let Some(data_len) = self.files.len(FileNo::DATA) {
            self.ask(link, &Request::Attach { data_len })?;
        }
        exclusive(&self.extents).clear();
        hold(&self.inflated).clear();
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
