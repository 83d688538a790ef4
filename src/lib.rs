//! instar resizes virtual-machine disk images.
pub mod image;
pub mod sandbox;
