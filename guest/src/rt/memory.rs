//! The memory functions that the compiler calls and a libc would bring.
//!
//! They are written with string instructions, which current processors execute
//! at full memory speed, and which the compiler cannot turn back into calls of
//! the function being defined.
#![allow(unsafe_code)]

use core::arch::asm;

/// Copies `n` bytes; the ranges do not overlap.
///
/// # Safety
/// As C's `memcpy`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, n: usize) -> *mut u8 {
    // SAFETY: the caller says that both ranges are valid; the direction flag is
    // clear by the calling convention.
    unsafe {
        asm!(
            "rep movsb",
            inout("rcx") n => _, inout("rdi") to => _, inout("rsi") from => _,
            options(nostack, preserves_flags)
        );
    }
    to
}

/// Copies `n` bytes; the ranges may overlap.
///
/// # Safety
/// As C's `memmove`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, n: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= n {
        // SAFETY: the destination does not begin inside the source, so copying
        // forwards reads every byte before it is overwritten.
        return unsafe { memcpy(to, from, n) };
    }
    // Backwards, by words while they last: string instructions are slow in this
    // direction.
    // SAFETY: both ranges are valid for `n` bytes; every address is below the
    // end by what has been copied, and each word is read before it is written.
    unsafe {
        asm!(
            "2:",
            "cmp {n}, 8",
            "jb 3f",
            "mov {word}, [{from} + {n} - 8]",
            "mov [{to} + {n} - 8], {word}",
            "sub {n}, 8",
            "jmp 2b",
            "3:",
            "test {n}, {n}",
            "je 4f",
            "mov {word:l}, [{from} + {n} - 1]",
            "mov [{to} + {n} - 1], {word:l}",
            "dec {n}",
            "jmp 3b",
            "4:",
            n = inout(reg) n => _, to = in(reg) to, from = in(reg) from, word = out(reg) _,
            options(nostack)
        );
    }
    to
}

/// Fills `n` bytes.
///
/// # Safety
/// As C's `memset`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memset(to: *mut u8, byte: i32, n: usize) -> *mut u8 {
    // SAFETY: the caller says that the range is valid.
    unsafe {
        asm!(
            "rep stosb",
            inout("rcx") n => _, inout("rdi") to => _, in("al") byte as u8,
            options(nostack, preserves_flags)
        );
    }
    to
}

/// Compares `n` bytes.
///
/// # Safety
/// As C's `memcmp`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    let mut at = 0;
    // Words first: equal ones need no look at their bytes.
    // SAFETY: both ranges are valid for `n` bytes, of which eight remain.
    while n - at >= 8 && unsafe { same_word(a.wrapping_add(at), b.wrapping_add(at)) } {
        at += 8;
    }
    while at < n {
        // SAFETY: `at` is below `n`.
        let x = unsafe { *a.wrapping_add(at) };
        // SAFETY: as above.
        let y = unsafe { *b.wrapping_add(at) };
        if x != y {
            return i32::from(x) - i32::from(y);
        }
        at += 1;
    }
    0
}

/// Whether eight bytes are the same.
///
/// # Safety
/// They are readable at both places; no alignment is needed.
unsafe fn same_word(a: *const u8, b: *const u8) -> bool {
    // SAFETY: the caller's contract.
    let x = unsafe { a.cast::<u64>().read_unaligned() };
    // SAFETY: the caller's contract.
    let y = unsafe { b.cast::<u64>().read_unaligned() };
    x == y
}

/// Compares `n` bytes for equality.
///
/// # Safety
/// As C's `bcmp`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    // SAFETY: the caller's contract is the same.
    unsafe { memcmp(a, b, n) }
}
