//! An open image: its files and their locks, the gate for the names it holds,
//! the executor of plans, and the cache of extents.
//!
//! What may not enter: parsing of image bytes, any format's magic number or
//! layout. What an image means is asked of the guest, and what the guest says
//! is checked here before it has an effect.

mod blank;
mod chain;
mod change;
mod check;
mod copy;
mod create;
mod disk;
mod effects;
mod error;
mod execute;
mod extents;
mod files;
mod gate;
mod guest;
mod handles;
mod home;
mod inflated;
mod lock;
mod name;
mod names;
mod on_disk;
mod open;
mod pieces;
mod plan_check;
mod plan_error;
mod plan_names;
mod reach;
mod read;
mod reopen;
mod resize;
mod rest;
mod segments;
mod settle;
mod volatile;
mod write;
mod zero;

#[cfg(test)]
mod tests;

pub use blank::Blank;
pub use check::{CheckEvent, Checked};
pub use create::{Created, create};
pub use disk::{EffectsHook, Image};
pub use effects::{Effects, WrapEffects};
pub use error::{Error, ErrorKind, Operation, printable_name};
pub use gate::Tree;
pub use name::{NameRule, format_of_name};
pub use open::{BackingPolicy, Location, OpenOptions};
pub use segments::{Segment, SegmentKind};
pub use zero::Space;

use instar_guest::proto::Preallocation;

/// What an image is opened for: which of QEMU's lock sets is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Facts only.
    Info,
    /// Facts and content.
    Read,
    /// Everything.
    Write,
}

/// How to resize.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ResizeOptions {
    /// How much of the added range is allocated.
    pub preallocation: Preallocation,
    /// Whether the disk may become smaller.
    pub shrink: bool,
}

/// What an image has cost since it was opened, its backing chain excluded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Exits from the sandbox.
    pub exits: u64,
    /// Reads from the image's files, those for the guest included.
    pub reads: u64,
    /// Writes to the image's files, all kinds.
    pub writes: u64,
    /// Calls of fdatasync, those that make names durable included.
    pub fdatasyncs: u64,
}
