//! What every format's engine answers once an image is open.
//!
//! The dispatcher knows formats by [`Disk`] alone. What a format cannot do is
//! refused here, so that an engine says only what it can.

use crate::chance::Chance;
use crate::engine::Host;
use crate::error::{Failure, FailureKind};
use crate::facts::Facts;
use crate::findings::{Repair, Report};
use crate::proto::{Create, Extent, Format, PlanReply, Reply};
use crate::resize::Wish;
use alloc::boxed::Box;
use alloc::format;
use alloc::vec::Vec;
use core::fmt::Debug;

/// A file that is to be opened.
pub struct Opening<'a> {
    /// Its first 64 KiB, or all of a shorter file.
    pub head: &'a [u8],
    /// Its last 4 KiB, or all of a shorter file.
    pub tail: &'a [u8],
    /// Its length in bytes.
    pub file_len: u64,
    /// Whether the format was found by probing.
    pub probed: bool,
    /// Whether the session may be asked for changes.
    pub write: bool,
    /// Where new identifiers come from.
    pub chance: Chance,
}

/// A new image that is to be made.
pub struct Creating<'a> {
    /// What it is to be.
    pub create: &'a Create,
    /// The name of its file, without a directory.
    pub name: &'a str,
    /// Where new identifiers come from.
    pub chance: Chance,
}

/// An image that a format's engine has opened, with what it says about itself.
pub type Opened = (Box<dyn Disk>, Facts);

/// An open image. Guest ranges have been checked: they lie inside the disk.
pub trait Disk: Debug {
    /// The format, for refusals.
    fn format(&self) -> Format;

    /// Size of the disk that a guest sees, in bytes.
    fn virtual_size(&self) -> u64;

    /// The host has executed the plan that it was given last.
    fn executed(&mut self) {}

    /// The files that the facts name are open, with these lengths in bytes:
    /// completes the facts.
    fn attach(
        &mut self,
        _host: &mut dyn Host,
        _lens: &[u64],
        _facts: &mut Facts,
    ) -> Result<(), Failure> {
        Err(self.refuse("has no other files"))
    }

    /// See [`Request::Map`](crate::Request::Map).
    fn map(&mut self, host: &mut dyn Host, offset: u64, len: u64) -> Result<Vec<Extent>, Failure>;

    /// See [`Request::Inflate`](crate::Request::Inflate); the length is in bounds.
    fn inflate(
        &mut self,
        _host: &mut dyn Host,
        _offset: u64,
        _len: u64,
    ) -> Result<Vec<u8>, Failure> {
        Err(self.refuse("has no compressed clusters"))
    }

    /// See [`Request::Settle`](crate::Request::Settle).
    fn settle(&mut self, _host: &mut dyn Host) -> Result<PlanReply, Failure> {
        Ok(PlanReply::default())
    }

    /// See [`Request::Check`](crate::Request::Check).
    fn check(
        &mut self,
        _host: &mut dyn Host,
        _repair: Option<Repair>,
    ) -> Result<(Report, PlanReply), Failure> {
        Err(Failure::new(
            FailureKind::Unsupported,
            "This image format does not support checks",
        ))
    }

    /// See [`Request::Resize`](crate::Request::Resize).
    fn resize(&mut self, host: &mut dyn Host, wish: &Wish) -> Result<PlanReply, Failure>;

    /// See [`Request::Allocate`](crate::Request::Allocate).
    fn allocate(
        &mut self,
        _host: &mut dyn Host,
        _offset: u64,
        _len: u64,
    ) -> Result<Reply, Failure> {
        Err(Failure::new(
            FailureKind::Unsupported,
            format!(
                "data is not written to new places in {} images; convert the image with `qemu-img \
                 convert -O qcow2`, and write to that",
                self.format().name()
            ),
        ))
    }

    /// See [`Request::Undo`](crate::Request::Undo).
    fn undo(&mut self) -> Result<(), Failure> {
        Ok(())
    }

    /// See [`Request::Flush`](crate::Request::Flush). After a failure the image
    /// is dropped.
    fn flush(&mut self, _host: &mut dyn Host) -> Result<PlanReply, Failure> {
        Ok(PlanReply::default())
    }

    /// The refusal of a request that makes no sense for the image.
    fn refuse(&self, why: &str) -> Failure {
        Failure::new(
            FailureKind::InvalidRequest,
            format!("the {} image {why}", self.format().name()),
        )
    }
}
