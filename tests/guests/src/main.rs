//! The test guest: plays an image or misbehaves, as the script in its ELF file
//! says. It stands on the same runtime as the shipped guest.
#![no_std]
#![no_main]
#![allow(unsafe_code)]

extern crate alloc;

mod acts;
mod image;
mod memory;
mod panics;
#[path = "../../../guest/src/rt/mod.rs"]
mod rt;

use alloc::vec::Vec;
use instar_guest::proto::{Reply, Request, ToGuest, ToHost};
use instar_guest::{Failure, FailureKind};
use instar_test_guest::{SECTION_SIZE, Script};
use rt::doorbell;

#[used]
#[unsafe(link_section = ".script")]
static SCRIPT: [u8; SECTION_SIZE] = [0; SECTION_SIZE];

/// What the runtime calls once the sandbox is closed.
fn main() -> ! {
    let registers = memory::registers();
    match script() {
        Script::Replay(messages) => replay(&messages),
        Script::Image(script) => image::play(script),
        Script::Act(act) => {
            acts::act(act);
            refuse_everything()
        }
        Script::Ends => loop {
            reply(Ok(Reply::Inflated(
                [doorbell::head(), doorbell::tail()].concat(),
            )));
        },
        Script::Remember { scan } => memory::remember(registers, scan),
    }
}

fn script() -> Script {
    // Read as volatile: the compiler must not believe that it is still zero.
    let byte = |at: usize| {
        // SAFETY: the callers stay inside the array.
        unsafe {
            (&raw const SCRIPT)
                .cast::<u8>()
                .wrapping_add(at)
                .read_volatile()
        }
    };
    let len = u32::from_le_bytes([byte(0), byte(1), byte(2), byte(3)]) as usize;
    let bytes: Vec<u8> = (4..4 + len.min(SECTION_SIZE - 4)).map(byte).collect();
    postcard::from_bytes(&bytes).expect("the test wrote a script")
}

fn replay(messages: &[Vec<u8>]) -> ! {
    // On the heap, which is what the host may read.
    let (last, first) = messages.split_last().expect("a script has a message");
    first.iter().for_each(|message| doorbell::send(message));
    loop {
        doorbell::send(last);
    }
}

fn refuse_everything() -> ! {
    loop {
        reply(Err(refusal()));
    }
}

fn refusal() -> Failure {
    Failure::new(FailureKind::Unsupported, "not in the script")
}

/// Replies, and returns when the next request is there.
fn reply(reply: Result<Reply, Failure>) {
    tell(&ToHost::Reply(reply));
}

/// Sends a message, and returns when the host has answered.
fn tell(message: &ToHost) {
    let message = postcard::to_allocvec(message).expect("memory for a message");
    doorbell::send(&message);
}

/// The request that the host has placed.
fn request() -> Option<Request> {
    match postcard::from_bytes(doorbell::request()) {
        Ok(ToGuest::Request(request)) => Some(request),
        _ => None,
    }
}
