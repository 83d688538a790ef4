//! The process sandbox, from the inside: what the program gives up before it
//! sees the first byte that an image could have influenced.
//!
//! The host starts it with a socket as descriptor 0, the window's memory as
//! descriptor 1 and an empty environment. [`confine`] maps the window, closes
//! everything but the socket, sets limits and enters strict seccomp; from then
//! on the kernel kills the process for any system call but `read`, `write` and
//! `exit`.
#![allow(unsafe_code)]

use core::arch::asm;
use instar_guest::layout::{MAX_MEMORY, MIN_MEMORY, WINDOW};

const SOCKET: u64 = 0;
const MEMORY: u64 = 1;

/// System calls, by their x86-64 numbers.
mod nr {
    pub const READ: u64 = 0;
    pub const WRITE: u64 = 1;
    pub const LSEEK: u64 = 8;
    pub const MMAP: u64 = 9;
    pub const EXIT: u64 = 60;
    pub const PRCTL: u64 = 157;
    pub const SETRLIMIT: u64 = 160;
    pub const CLOSE_RANGE: u64 = 436;
}

/// Exit statuses, for the host: which step of [`confine`] failed.
mod status {
    pub const HOST_GONE: u64 = 0;
    pub const WINDOW: u64 = 101;
    pub const CLOSE: u64 = 102;
    pub const LIMITS: u64 = 103;
    pub const PRIVILEGES: u64 = 104;
    pub const SECCOMP: u64 = 105;
}

/// Maps the window, drops every other power and waits for the first ring.
/// Returns the end of the window.
pub(super) fn confine() -> u64 {
    let end = map_window();
    require(
        call(nr::CLOSE_RANGE, [MEMORY, u32::MAX.into(), 0, 0, 0, 0]),
        status::CLOSE,
    );
    limit_resources();
    give_up_privileges();
    await_host();
    end
}

fn map_window() -> u64 {
    const SEEK_END: u64 = 2;
    const PROT_READ_WRITE: u64 = 1 | 2;
    const MAP_SHARED_FIXED_NOREPLACE: u64 = 0x01 | 0x10_0000;
    let len = call(nr::LSEEK, [MEMORY, 0, SEEK_END, 0, 0, 0]);
    let valid = (MIN_MEMORY - WINDOW) as i64..=(MAX_MEMORY - WINDOW) as i64;
    if !valid.contains(&len) {
        exit(status::WINDOW);
    }
    let len = len as u64;
    let at = call(
        nr::MMAP,
        [
            WINDOW,
            len,
            PROT_READ_WRITE,
            MAP_SHARED_FIXED_NOREPLACE,
            MEMORY,
            0,
        ],
    );
    if at != WINDOW as i64 {
        exit(status::WINDOW);
    }
    WINDOW + len
}

fn limit_resources() {
    const RLIMIT_FSIZE: u64 = 1;
    const RLIMIT_CORE: u64 = 4;
    const RLIMIT_NPROC: u64 = 6;
    const RLIMIT_NOFILE: u64 = 7;
    const RLIMIT_MEMLOCK: u64 = 8;
    for resource in [RLIMIT_FSIZE, RLIMIT_CORE, RLIMIT_NPROC, RLIMIT_MEMLOCK] {
        require(set_limit(resource, 0), status::LIMITS);
    }
    // Descriptor 0 stays.
    require(set_limit(RLIMIT_NOFILE, 1), status::LIMITS);
}

fn set_limit(resource: u64, value: u64) -> i64 {
    let limit = [value, value];
    call(nr::SETRLIMIT, [resource, limit.as_ptr() as u64, 0, 0, 0, 0])
}

fn give_up_privileges() {
    const PR_SET_DUMPABLE: u64 = 4;
    const PR_SET_SECCOMP: u64 = 22;
    const PR_SET_TSC: u64 = 26;
    const PR_TSC_SIGSEGV: u64 = 2;
    const PR_SET_NO_NEW_PRIVS: u64 = 38;
    const SECCOMP_MODE_STRICT: u64 = 1;
    let prctl = |option, value| call(nr::PRCTL, [option, value, 0, 0, 0, 0]);
    require(prctl(PR_SET_DUMPABLE, 0), status::PRIVILEGES);
    require(prctl(PR_SET_NO_NEW_PRIVS, 1), status::PRIVILEGES);
    require(prctl(PR_SET_TSC, PR_TSC_SIGSEGV), status::PRIVILEGES);
    require(prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT), status::SECCOMP);
}

/// Rings with one byte and waits for the host's byte.
pub(super) fn ring(code: u8) {
    if call(nr::WRITE, [SOCKET, (&raw const code) as u64, 1, 0, 0, 0]) != 1 {
        exit(status::HOST_GONE);
    }
    await_host();
}

/// Waits for the host's byte; its end of the socket closing is the end.
fn await_host() {
    let mut byte = 0_u8;
    if call(nr::READ, [SOCKET, (&raw mut byte) as u64, 1, 0, 0, 0]) != 1 {
        exit(status::HOST_GONE);
    }
}

fn require(result: i64, status: u64) {
    if result < 0 {
        exit(status);
    }
}

fn exit(status: u64) -> ! {
    call(nr::EXIT, [status, 0, 0, 0, 0, 0]);
    super::doorbell::stop()
}

/// One system call. The callers pass numbers, or pointers to locals that
/// outlive the call.
fn call(number: u64, args: [u64; 6]) -> i64 {
    let [a, b, c, d, e, f] = args;
    let result;
    // SAFETY: the system calls used here (see `nr`) write to no memory but the
    // byte that `await_host` names and the window that `map_window` creates,
    // which is at an address where nothing else is mapped.
    unsafe {
        asm!(
            "syscall",
            inout("rax") number => result,
            in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d, in("r8") e, in("r9") f,
            lateout("rcx") _, lateout("r11") _,
            options(nostack)
        );
    }
    result
}
