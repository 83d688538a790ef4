//! The address space of the guest program: the same in the micro-VM, where these
//! are guest-physical addresses too, and in a process.
//!
//! ```text
//!   0x000000  page tables, task segment (VM only; not for ring 3, so that
//!             address 0 faults)
//!   0x200000  code                   read, execute
//!   0x400000  constants              read
//!   0x600000  nothing: a stack that overflows faults here
//!   0x800000  stack                  read, write  ┐ one page. What every session writes
//!   0x910000  statics                read, write  │ to fills its end: top of the stack,
//!   0x920000  window: mailbox, request, head,     │ statics, mailbox and the beginning
//!             tail, heap             read, write  ┘ of the heap
//!   memory    end of the window and of the VM's memory
//! ```
//!
//! `guest.ld` places the program accordingly and the host's loader checks that
//! it did. The *window* is what host and guest share; the host reads and writes
//! nothing else.

use crate::proto::{HEAD, MAX_REQUEST, TAIL};

/// Granularity of permissions: the VM's page tables hold 2 MiB pages only.
pub const PAGE: u64 = 2 << 20;

/// Guest-physical addresses of the VM's three page-table pages. They lie in a
/// page that the guest, in ring 3, can neither read nor write.
pub const PML4: u64 = 0x1000;
/// See [`PML4`].
pub const PDPT: u64 = 0x2000;
/// See [`PML4`]. One page directory covers the first GiB, the most memory that
/// a guest can have.
pub const PD: u64 = 0x3000;
/// The task-state segment, in the same page: the processor looks up there which
/// I/O ports the guest may use.
pub const TSS: u64 = 0x4000;

/// Where a program may be loaded: from here to [`WINDOW`].
pub const PROGRAM: u64 = 0x20_0000;
/// The lowest address of the stack. The page below it is never mapped.
pub const STACK: u64 = 0x80_0000;
/// Stack size: more than enough, as the engine does not recurse on what an image
/// says. It costs nothing where it is not touched, and pushes what is touched to
/// the end of the page.
pub const STACK_SIZE: u64 = 1088 << 10;
/// Initial stack pointer.
pub const STACK_TOP: u64 = STACK + STACK_SIZE;

/// Start of the window. In a process it is mapped here by the start-up code.
pub const WINDOW: u64 = 0x92_0000;
/// The [`Mailbox`].
pub const MAILBOX: u64 = WINDOW;
/// Messages from the host, at most [`MAX_REQUEST`] bytes.
pub const REQUEST: u64 = MAILBOX + 4096;
/// The first bytes of the file, placed before an open.
pub const HEAD_AREA: u64 = REQUEST + MAX_REQUEST as u64;
/// The last bytes of the file, placed before an open.
pub const TAIL_AREA: u64 = HEAD_AREA + HEAD as u64;
/// The heap, to the end of the window.
pub const HEAP: u64 = TAIL_AREA + TAIL as u64;

/// The least memory that a guest can have, counted from address 0.
pub const MIN_MEMORY: u64 = 16 << 20;
/// The most memory that a guest can have: what one page directory maps.
pub const MAX_MEMORY: u64 = 1 << 30;

/// The doorbell's I/O port in the VM: a 4-byte `out` of a [`ring`] value to it
/// is the only way out. In a process the low byte goes to descriptor 0.
pub const DOORBELL: u16 = 0x1a8;

/// What the guest says by ringing.
pub mod ring {
    /// The mailbox names an encoded [`ToHost`](crate::proto::ToHost).
    pub const MESSAGE: u32 = 1;
    /// The program stopped on a defect; the mailbox names a text.
    pub const PANIC: u32 = 2;
    /// An allocation failed; the mailbox names a text.
    pub const OUT_OF_MEMORY: u32 = 3;
}

/// The fixed structure at [`MAILBOX`]: where messages are. All numbers are
/// little-endian; the host reads each field once and trusts none.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mailbox {
    /// Host: length of the message at [`REQUEST`].
    pub request_len: u64,
    /// Host: valid bytes at [`HEAD_AREA`], from the file's start. 0 but for an
    /// open.
    pub head_len: u64,
    /// Host: valid bytes at [`TAIL_AREA`], up to the file's end.
    pub tail_len: u64,
    /// Host: length of the file at the time of the copy.
    pub file_len: u64,
    /// Guest: address of its message, inside the window.
    pub message_addr: u64,
    /// Guest: length of its message.
    pub message_len: u64,
    /// Guest: the build that it comes from, checked with the first message.
    pub build_id: u64,
}

/// Offsets of the fields, in bytes from [`MAILBOX`], for the host, which does
/// not map the structure but copies numbers.
pub mod mailbox {
    use super::Mailbox;
    use core::mem::offset_of;

    /// [`Mailbox::request_len`].
    pub const REQUEST_LEN: usize = offset_of!(Mailbox, request_len);
    /// [`Mailbox::head_len`].
    pub const HEAD_LEN: usize = offset_of!(Mailbox, head_len);
    /// [`Mailbox::tail_len`].
    pub const TAIL_LEN: usize = offset_of!(Mailbox, tail_len);
    /// [`Mailbox::file_len`].
    pub const FILE_LEN: usize = offset_of!(Mailbox, file_len);
    /// [`Mailbox::message_addr`].
    pub const MESSAGE_ADDR: usize = offset_of!(Mailbox, message_addr);
    /// [`Mailbox::message_len`].
    pub const MESSAGE_LEN: usize = offset_of!(Mailbox, message_len);
    /// [`Mailbox::build_id`].
    pub const BUILD_ID: usize = offset_of!(Mailbox, build_id);
}

const _: () = {
    assert!(PD + 4096 <= TSS && TSS + 4096 <= PROGRAM);
    // The four bytes of the port share one byte of a permission bitmap.
    assert!(DOORBELL.is_multiple_of(8));
    assert!(STACK.is_multiple_of(PAGE) && STACK_TOP < WINDOW && WINDOW < STACK + PAGE);
    // What an `info` touches lies in one page: stack, statics, mailbox and the
    // beginning of the heap.
    assert!(HEAP + (736 << 10) < STACK + PAGE);
    assert!(size_of::<Mailbox>() <= 4096);
    assert!(HEAP + PAGE <= MIN_MEMORY);
};
