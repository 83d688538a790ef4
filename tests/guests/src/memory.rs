//! What one image leaves behind for the next, if anything.

use crate::{reply, request};
use alloc::vec;
use core::arch::asm;
use core::hint::black_box;
use instar_guest::layout::STACK;
use instar_guest::proto::{Extent, ExtentKind, Reply, Request};
use instar_test_guest::SECRET;

/// Keeps the secret itself out of the program's own code and data.
const MASK: u64 = 0xa5a5_a5a5_a5a5_a5a5;

pub fn remember(registers: [u64; 4], scan: (u64, u64)) -> ! {
    loop {
        let found = if let Some(Request::Map { len, .. }) = request() {
            fill(len);
            0
        } else {
            registers.iter().filter(|word| is_secret(**word)).count() as u64 + count(scan)
        };
        reply(Ok(Reply::Extents(vec![Extent {
            offset: 0,
            len: found + 1,
            kind: ExtentKind::Unallocated { at: None },
        }])));
    }
}

/// Four registers that the start-up code does not use.
pub fn registers() -> [u64; 4] {
    let (a, b, c, d): (u64, u64, u64, u64);
    // SAFETY: registers are only read.
    unsafe {
        asm!(
            "movq {a}, xmm12", "movq {b}, xmm13", "movq {c}, xmm14", "movq {d}, xmm15",
            a = out(reg) a, b = out(reg) b, c = out(reg) c, d = out(reg) d,
            options(nomem, nostack, preserves_flags)
        );
    }
    [a, b, c, d]
}

fn secret() -> u64 {
    black_box(SECRET ^ MASK) ^ black_box(MASK)
}

fn is_secret(word: u64) -> bool {
    word ^ MASK == black_box(SECRET ^ MASK)
}

/// Fills the stack below this function, `len` bytes of heap and registers.
fn fill(len: u64) {
    let words = vec![secret(); len as usize / 8];
    black_box(&words);
    let free_stack = STACK..black_box(&words) as *const _ as u64 - 4096;
    for address in free_stack.step_by(8) {
        // SAFETY: below this function's frame nothing is in use.
        unsafe { (address as *mut u64).write_volatile(secret()) };
    }
    // SAFETY: the registers are clobbered, and declared so.
    unsafe {
        asm!(
            "movq xmm12, {s}", "movq xmm13, {s}", "movq xmm14, {s}", "movq xmm15, {s}",
            s = in(reg) secret(),
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
        );
    }
}

/// How often the secret is in the unused stack and in a range of addresses.
fn count(scan: (u64, u64)) -> u64 {
    let live = 0_u64;
    let frame = black_box(&raw const live) as u64;
    let free_stack = STACK..frame - 4096;
    let rest = scan.0..scan.1;
    free_stack
        .step_by(8)
        .chain(rest.step_by(8))
        // SAFETY: all of this memory is mapped, and any value is a number.
        .filter(|address| is_secret(unsafe { (*address as *const u64).read_volatile() }))
        .count() as u64
}
