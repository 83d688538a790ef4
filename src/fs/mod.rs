//! The mounted filesystem: every image of a directory as a plain file that
//! holds the disk's content.
//!
//! [`Filesystem`] is the behaviour: names, attributes, handles, what each call
//! does. It knows neither FUSE nor any format and is tested with images that
//! exist in memory only. [`fuse`] translates between it and the kernel, and
//! [`device`] mounts and unmounts. What may not enter: image bytes, formats'
//! fields, and, outside of [`fuse`], any type of the `fuser` crate.

mod attributes;
mod catalog;
mod content;
mod crew;
pub mod device;
mod disk;
mod entries;
mod error;
mod filesystem;
pub mod fuse;
mod library;
mod memory;
mod moves;
mod names;
mod namespace;
mod namings;
mod nodes;
mod open;
mod open_image;
mod reached;
mod source;
mod sync;
mod tail;
mod xattrs;

#[cfg(test)]
mod tests;

pub use attributes::{Attributes, Changes};
pub use content::Seek;
pub use disk::{At, Disk, Library, Portrait, Run};
pub use entries::Birth;
pub use error::{Error, Result};
pub use filesystem::{Filesystem, Listed, OpenedHandle, Options};
pub use library::Images;
pub use memory::{Invalidate, Stale};
pub use names::FormatRules;
pub use namespace::Creation;
pub use nodes::NodeId;
pub use open::OpenFile;
pub use source::{Kind, NewTime, Source, Stat, Time};
