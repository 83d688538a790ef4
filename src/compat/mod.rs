//! What makes instar's command line read like qemu-img's: the size grammar,
//! human sizes, the JSON layout, the texts of `info`, `check` and `map`, option lists and
//! messages.
//!
//! Pure functions over plain data, measured against qemu-img 10.0 and, where [`version`] says so, older ones. Nothing here
//! opens a file, and nothing here knows how a format lays out its bytes.

pub mod check;
pub mod info;
pub mod json;
mod localtime;
pub mod map;
pub mod messages;
pub mod names;
pub mod options;
pub mod size;
pub mod version;
