//! instar resizes virtual-machine disk images.
pub mod compat;
pub mod fs;
pub mod image;
pub mod sandbox;
