//! The one way out: put a message into the window, ring, and continue when the
//! host has answered.
#![allow(unsafe_code)]

use super::linux;
use core::sync::atomic::{AtomicBool, Ordering};
use instar_guest::layout::{self, Mailbox, ring};

/// The build that host and guest must share.
const BUILD_ID: u64 = parse_hex(env!("INSTAR_BUILD_ID"));

static IN_PROCESS: AtomicBool = AtomicBool::new(false);

/// Notes that the program runs in a process, not in the VM.
pub(super) fn in_process() {
    IN_PROCESS.store(true, Ordering::Relaxed);
}

/// Tells the host which build this is.
pub(super) fn introduce() {
    set(layout::mailbox::BUILD_ID, BUILD_ID);
}

/// Sets a field of the mailbox, by its offset.
fn set(field: usize, value: u64) {
    let address = (layout::MAILBOX + field as u64) as *mut u64;
    // SAFETY: the mailbox lies in the window, which is mapped read-write, its
    // fields are aligned, and no reference to it exists.
    unsafe { address.write_volatile(value) };
}

/// Where things are, as the host left it.
pub fn mailbox() -> Mailbox {
    // SAFETY: the mailbox lies in the window, which is mapped, is aligned to a
    // page, and any bit pattern is a valid value.
    unsafe { (layout::MAILBOX as *const Mailbox).read_volatile() }
}

/// The message that the host placed.
pub fn request() -> &'static [u8] {
    area(layout::REQUEST, mailbox().request_len, layout::HEAD_AREA)
}

/// The first bytes of the file; empty but for an open.
pub fn head() -> &'static [u8] {
    area(layout::HEAD_AREA, mailbox().head_len, layout::TAIL_AREA)
}

/// The last bytes of the file; empty but for an open.
pub fn tail() -> &'static [u8] {
    area(layout::TAIL_AREA, mailbox().tail_len, layout::HEAP)
}

/// A host-written area of the window. The host changes it only while the
/// program waits in [`send`], across which no caller keeps the slice.
fn area(start: u64, len: u64, end: u64) -> &'static [u8] {
    let len = len.min(end - start) as usize;
    // SAFETY: `start..end` is a part of the window that only the host writes,
    // and only while this program is stopped at the doorbell.
    unsafe { core::slice::from_raw_parts(start as *const u8, len) }
}

/// Sends an encoded message, which must lie on the heap, and returns when the
/// host has answered.
pub fn send(message: &[u8]) {
    ring(ring::MESSAGE, message.as_ptr() as u64, message.len() as u64);
}

/// Ends the program with a text that explains why.
pub(super) fn last_words(code: u32, text: &[u8]) -> ! {
    // The text may lie anywhere, so it goes through the request area: nothing
    // will read a request any more.
    let len = text
        .len()
        .min((layout::HEAD_AREA - layout::REQUEST) as usize);
    let area = layout::REQUEST as *mut u8;
    // SAFETY: the request area is writable and `len` long at least; `text` is
    // not in it, because no request outlives its decoding.
    unsafe { core::ptr::copy(text.as_ptr(), area, len) };
    ring(code, layout::REQUEST, len as u64);
    stop()
}

/// Ends the program. Never returns: the host does not answer.
pub fn stop() -> ! {
    // SAFETY: an undefined instruction ends the program in either sandbox.
    unsafe { core::arch::asm!("ud2", options(noreturn)) }
}

/// Names a message and leaves the sandbox.
pub fn ring(code: u32, message_addr: u64, message_len: u64) {
    set(layout::mailbox::MESSAGE_ADDR, message_addr);
    set(layout::mailbox::MESSAGE_LEN, message_len);
    if IN_PROCESS.load(Ordering::Relaxed) {
        linux::ring(code as u8);
    } else {
        // SAFETY: the port write leaves the VM; the host resumes behind it. It
        // may change any memory of the window, which the missing `nomem` says.
        unsafe {
            core::arch::asm!(
                "out dx, eax",
                in("dx") layout::DOORBELL,
                in("eax") code,
                options(nostack, preserves_flags)
            );
        }
    }
}

/// The build script hands the id over in hexadecimal.
const fn parse_hex(text: &str) -> u64 {
    match u64::from_str_radix(text, 16) {
        Ok(id) => id,
        Err(_) => panic!("INSTAR_BUILD_ID is not a hexadecimal number"),
    }
}
