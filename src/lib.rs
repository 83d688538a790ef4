//! instar resizes virtual-machine disk images.
pub mod fs;
pub mod image;
pub mod sandbox;
