//! The runtime below the guest program: everything that a `no_std` binary needs
//! to stand on its own, and the only `unsafe` code inside the sandbox.
//!
//! A program brings `fn main() -> !`, which [`entry`] calls on the program's own
//! stack once the sandbox is closed, and talks through [`doorbell`].
//!
//! What may not enter: anything about disk images.

pub mod doorbell;
mod entry;
mod heap;
mod linux;
mod memory;
mod panic;
