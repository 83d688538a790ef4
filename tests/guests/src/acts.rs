//! Misdeeds, one function or one instruction each.

use crate::rt::doorbell;
use crate::{panics, refusal};
use alloc::vec;
use alloc::vec::Vec;
use core::arch::asm;
use core::hint::black_box;
use instar_guest::layout;
use instar_guest::proto::ToHost;
use instar_test_guest::Act;

/// System calls, by their x86-64 numbers.
const READ: u64 = 0;
const WRITE: u64 = 1;

/// A `ret`, for whoever can execute it.
static mut STATICS: [u8; 16] = [0xc3; 16];

static CONSTANTS: [u8; 16] = [1; 16];

pub fn act(act: Act) {
    match act {
        Act::Loop => spin(),
        Act::Undefined => doorbell::stop(),
        Act::Panic => panics::plain(),
        Act::PanicWithEscapes => panics::with_escapes(),
        Act::Exhaust => exhaust(),
        Act::Recurse => drop(black_box(recurse(black_box(1)))),
        Act::Load(address) => load(address),
        Act::Store(address) => store(address),
        Act::StoreToCode => store(act_address()),
        Act::StoreToConstants => store((&raw const CONSTANTS) as u64),
        Act::ExecuteStatics => jump((&raw const STATICS) as u64),
        Act::ExecuteHeap => jump(vec![0xc3_u8; 16].leak().as_ptr() as u64),
        Act::ExecuteStack => jump((&raw const *black_box(&[0xc3_u8; 16])) as u64),
        Act::OutByte => out_byte(),
        Act::Out(port) => out(port),
        Act::In(port) => read_port(port),
        Act::Halt => halt(),
        Act::ReadClock => read_clock(),
        Act::SystemCall(number) => system_call(number, 0, 0),
        Act::Wait => wait(),
        Act::RingTwice => ring_twice(),
        Act::Ring { code, addr, len } => ring(code, addr, len),
        Act::ForgeBuild => put(layout::mailbox::BUILD_ID, 0),
    }
}

fn act_address() -> u64 {
    act as fn(Act) as usize as u64
}

fn spin() {
    loop {
        core::hint::spin_loop();
    }
}

fn exhaust() {
    let mut hoard: Vec<Vec<u8>> = Vec::new();
    loop {
        hoard.push(vec![1; 1 << 20]);
    }
}

#[expect(unconditional_recursion, reason = "the point of it")]
fn recurse(depth: u64) -> u64 {
    let frame = black_box([depth; 64]);
    recurse(black_box(depth + 1)) + frame[(depth % 64) as usize]
}

fn load(address: u64) {
    // SAFETY: none; the sandbox must stop it.
    black_box(unsafe { (address as *const u8).read_volatile() });
}

fn store(address: u64) {
    // SAFETY: none; the sandbox must stop it.
    unsafe { (address as *mut u8).write_volatile(0xc3) };
}

fn jump(address: u64) {
    // SAFETY: none; the sandbox must stop it.
    unsafe { asm!("call {}", in(reg) address, clobber_abi("C")) };
}

fn out_byte() {
    // SAFETY: none; the sandbox must stop it.
    unsafe { asm!("out dx, al", in("dx") layout::DOORBELL, in("al") 1_u8) };
}

fn out(port: u16) {
    // SAFETY: none; the sandbox must stop it.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") 1) };
}

fn read_port(port: u16) {
    // SAFETY: none; the sandbox must stop it.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") _) };
}

fn halt() {
    // SAFETY: none; the sandbox must stop it.
    unsafe { asm!("hlt") };
}

fn read_clock() {
    // SAFETY: none; the sandbox must stop it.
    unsafe { asm!("rdtsc", out("eax") _, out("edx") _) };
}

/// A system call on descriptor 0.
fn system_call(number: u64, buffer: u64, len: u64) {
    // SAFETY: none; the sandbox must stop it, but for a `read` or `write` of a
    // local.
    unsafe {
        asm!(
            "syscall",
            inout("rax") number => _,
            in("rdi") 0, in("rsi") buffer, in("rdx") len,
            in("r10") 0, in("r8") 0, in("r9") 0,
            lateout("rcx") _, lateout("r11") _,
        );
    }
}

fn wait() {
    let mut byte = 0_u8;
    system_call(READ, (&raw mut byte) as u64, 1);
}

/// Two rings at once where one is the answer.
fn ring_twice() {
    let rings = [layout::ring::MESSAGE as u8; 2];
    let message = ToHost::Reply(Err(refusal()));
    let message = postcard::to_allocvec(&message).expect("memory for a message");
    let message = message.leak();
    put(layout::mailbox::MESSAGE_ADDR, message.as_ptr() as u64);
    put(layout::mailbox::MESSAGE_LEN, message.len() as u64);
    system_call(WRITE, (&raw const rings) as u64, 2);
    wait();
}

fn ring(code: u32, addr: u64, len: u64) {
    doorbell::ring(code, addr, len);
}

fn put(field: usize, value: u64) {
    // SAFETY: the mailbox is mapped read-write.
    unsafe { ((layout::MAILBOX + field as u64) as *mut u64).write_volatile(value) };
}
