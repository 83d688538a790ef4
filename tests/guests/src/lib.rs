//! What a test can tell the test guest to do. The test writes a [`Script`] into
//! the program's [`SECTION`] before it loads the program.

#![no_std]

extern crate alloc;

use alloc::vec::Vec;
use instar_guest::proto::{Extent, PlanReply};
use instar_guest::{Facts, FileNo};
use serde::{Deserialize, Serialize};

/// The ELF section for the script: its length as a little-endian `u32`, then the
/// postcard encoding.
pub const SECTION: &str = ".script";

/// Size of the section in bytes.
pub const SECTION_SIZE: usize = 256 << 10;

/// What the program does.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Script {
    /// Sends these bytes as messages, one after the other, whatever the host
    /// asks or answers. The last is repeated for ever.
    Replay(Vec<Vec<u8>>),
    /// Answers as if there were such an image.
    Image(Image),
    /// Does this at the first request.
    Act(Act),
    /// Answers every request with what the host has placed of the file, its start
    /// and then its end, as [`Inflated`](instar_guest::Reply::Inflated).
    Ends,
    /// `Map` fills all memory and registers with [`SECRET`], any other request
    /// counts how often it is found, as the `len` of one extent; 1 is added, for
    /// an extent of nothing is not allowed.
    Remember {
        /// The addresses to search beside the stack: first and end.
        scan: (u64, u64),
    },
}

/// An image that exists in the script only.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Image {
    /// The answers to `Open`, in order; the last is repeated.
    pub opens: Vec<Facts>,
    /// The whole mapping, in order and without gaps; `Map` answers the part that
    /// it asks for.
    pub extents: Vec<Extent>,
    /// The answer to `Resize`.
    pub resize: PlanReply,
    /// Ranges of files that are read before each `Open` is answered.
    pub reads: Vec<(FileNo, u64, u32)>,
}

/// One misdeed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Act {
    /// Computes for ever.
    Loop,
    /// Executes an undefined instruction.
    Undefined,
    /// Panics.
    Panic,
    /// Panics with a text of control characters.
    PanicWithEscapes,
    /// Allocates until nothing is left.
    Exhaust,
    /// Calls itself for ever.
    Recurse,
    /// Reads a byte at an address.
    Load(u64),
    /// Writes a byte to an address.
    Store(u64),
    /// Writes into its own code.
    StoreToCode,
    /// Writes into its constants.
    StoreToConstants,
    /// Jumps to its statics.
    ExecuteStatics,
    /// Jumps to its heap.
    ExecuteHeap,
    /// Jumps to its stack.
    ExecuteStack,
    /// Writes 1 byte to the doorbell port.
    OutByte,
    /// Writes 4 bytes to an I/O port.
    Out(u16),
    /// Reads an I/O port.
    In(u16),
    /// Halts the processor.
    Halt,
    /// Reads the time-stamp counter.
    ReadClock,
    /// The Linux system call with this number; all arguments are 0.
    SystemCall(u64),
    /// Waits for the host without ringing (process sandbox).
    Wait,
    /// Rings twice at once with a refusal (process sandbox).
    RingTwice,
    /// Rings with a value and names a message.
    Ring {
        /// The value.
        code: u32,
        /// Address of the message.
        addr: u64,
        /// Length of the message.
        len: u64,
    },
    /// Claims to come from another build.
    ForgeBuild,
}

/// What [`Script::Remember`] leaves behind, xored with a mask so that the word
/// itself is in no program.
pub const SECRET: u64 = 0x5ec2_e75e_c2e7_5ec2;
