//! The first instructions.
//!
//! The VM's host enters with `rdi` = 1 and `rsi` = end of memory. Linux enters a
//! process with all registers zero. Either way the program moves to its own
//! stack, which has an unmapped page below it.
#![allow(unsafe_code)]

use super::{doorbell, heap, linux};
use instar_guest::layout::{STACK_TOP, WINDOW};

core::arch::global_asm!(
    ".global _start",
    "_start:",
    "mov esp, {stack_top}",
    "xor ebp, ebp",
    "cld",
    "call {start}",
    "ud2",
    stack_top = const STACK_TOP,
    start = sym start,
);

/// Closes the sandbox where that is our task, then runs the program.
extern "C" fn start(mode: u64, memory_end: u64) -> ! {
    let window_end = if mode == 0 {
        let end = linux::confine();
        doorbell::in_process();
        end
    } else {
        memory_end
    };
    debug_assert!(window_end > WINDOW);
    // SAFETY: called once, before anything allocates; the window up to
    // `window_end` is mapped read-write, by the host's page tables in the VM and
    // by `confine` in a process, and nothing but the heap lies behind its start.
    unsafe { heap::init(window_end) };
    doorbell::introduce();
    crate::main()
}
