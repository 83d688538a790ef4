//! The program that runs in the sandbox: the only code of instar that reads
//! image metadata.
//!
//! It is loaded into a micro-VM without devices, where it runs in ring 3 without
//! any kernel below it, or into a process, where it gives up all system calls
//! before it sees a byte of an image. In both it has the same address space
//! (`layout.rs`): its own code and constants, read-only; a stack with nothing
//! below it; statics; and the window, which it shares with the host and where
//! its heap lies.
//!
//! It may assume that the host wrote the areas of the window that are the
//! host's, and nothing about an image. It has no clock, no randomness, no
//! files, no second thread. All that it can do is to ring the doorbell: the
//! host then copies the message that the mailbox names, serves it, and lets
//! the program continue behind the ring. A fault of any kind, and a panic, is
//! the end of it; the host reports that and throws the sandbox away.
#![no_std]
#![no_main]

extern crate alloc;

mod dispatch;
mod rt;

/// What the runtime calls once the sandbox is closed.
fn main() -> ! {
    dispatch::serve()
}
