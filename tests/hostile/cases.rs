//! One guest per way to fail, with the exact error that each must end in.

use crate::{Image, Test, open, pool, scripted};
use instar::sandbox::{Allowance, CallError, Crash, Isolation, Limits, SandboxError};
use instar_guest::layout::{HEAP, MAILBOX, STACK, WINDOW, ring};
use instar_guest::proto::{MAX_MESSAGE, MAX_READS, ReadOp, ToHost};
use instar_guest::{Failure, FailureKind, FileNo};
use instar_test_guest::{Act, Script};
use libtest_mimic::Failed;
use std::time::Duration;

const MEMORY: u64 = 32 << 20;
const LITTLE: Duration = Duration::from_millis(100);

pub fn tests(isolation: Isolation) -> Vec<(String, Test)> {
    let case = |(name, script, error): (&str, Script, SandboxError)| {
        let test: Test = Box::new(move |isolation| ends_in(isolation, &script, &error));
        (name.to_owned(), test)
    };
    let specific = match isolation {
        Isolation::Process => process_only(),
        _ => vm_only(),
    };
    let all = crashes(isolation)
        .into_iter()
        .chain(budgets())
        .chain(messages())
        .chain(reads())
        .chain(specific);
    all.map(case).collect()
}

type Case = (&'static str, Script, SandboxError);

/// The image that the guests are given: what it holds does not matter to them.
fn image() -> Vec<u8> {
    vec![0x5a; 100_000]
}

/// Little CPU time for those that are to use it up; enough for all others,
/// however slow the machine.
fn limits(script: &Script) -> Limits {
    let cpu = match script {
        Script::Act(Act::Loop | Act::Wait) => LITTLE,
        _ => Limits::default().cpu,
    };
    let linear = |base, per_mib| Allowance { base, per_mib };
    Limits {
        memory: MEMORY,
        cpu,
        exits: linear(50, 1),
        bytes_read: linear(4 << 20, 1 << 20),
        ..Limits::default()
    }
}

/// The session ends in exactly this error and repeats it; the pool goes on.
fn ends_in(isolation: Isolation, script: &Script, error: &SandboxError) -> Result<(), Failed> {
    let expected = Err(CallError::Sandbox(error.clone()));
    let pool = pool(isolation, scripted::program(script), limits(script));
    for _ in 0..2 {
        let mut session = pool.session()?;
        for _ in 0..2 {
            let found = session.call(&open(&image()), &mut Image(image()));
            if found != expected {
                return Err(format!("{found:?} instead of {expected:?}").into());
            }
        }
    }
    Ok(())
}

fn act(act: Act) -> Script {
    Script::Act(act)
}

fn crashes(isolation: Isolation) -> Vec<Case> {
    // A VM has no handler for any fault; a process learns which one it was.
    let stopped = |signal| match isolation {
        Isolation::Process => SandboxError::Crashed(Crash::Signal(signal)),
        _ => SandboxError::Crashed(Crash::Fault),
    };
    let faults = |name, what| (name, act(what), stopped(libc::SIGSEGV));
    let panicked = |text: &str| SandboxError::Panicked(text.to_owned());
    vec![
        (
            "an_undefined_instruction_is_a_crash",
            act(Act::Undefined),
            stopped(libc::SIGILL),
        ),
        faults("a_null_pointer_is_a_crash", Act::Load(0)),
        faults("a_write_to_address_0_is_a_crash", Act::Store(0)),
        faults("the_page_tables_are_out_of_reach", Act::Load(0x3000)),
        faults("the_page_tables_cannot_be_written", Act::Store(0x3000)),
        faults("an_address_after_the_memory_is_a_crash", Act::Load(MEMORY)),
        faults(
            "an_address_of_the_kernel_is_a_crash",
            Act::Load(0xffff_8000_0000_0000),
        ),
        faults("code_cannot_be_written", Act::StoreToCode),
        faults("constants_cannot_be_written", Act::StoreToConstants),
        faults("statics_cannot_be_executed", Act::ExecuteStatics),
        faults("the_heap_cannot_be_executed", Act::ExecuteHeap),
        faults("the_stack_cannot_be_executed", Act::ExecuteStack),
        faults("a_stack_overflow_is_a_crash", Act::Recurse),
        faults(
            "the_page_below_the_stack_is_not_mapped",
            Act::Store(STACK - 1),
        ),
        faults("another_port_is_a_crash", Act::Out(0x3f8)),
        faults("the_port_after_the_doorbell_is_a_crash", Act::Out(0x1ac)),
        faults("reading_a_port_is_a_crash", Act::In(0x60)),
        faults("halting_is_a_crash", Act::Halt),
        (
            "a_panic_says_where",
            act(Act::Panic),
            panicked("a panic of the test guest (tests/guests/src/panics.rs:4)"),
        ),
        (
            "a_panic_text_is_escaped",
            act(Act::PanicWithEscapes),
            panicked(r"\u{1b}[2Jbefore\nafter (tests/guests/src/panics.rs:8)"),
        ),
    ]
}

fn vm_only() -> Vec<Case> {
    let crashed = SandboxError::Crashed;
    vec![
        (
            "a_byte_to_the_doorbell_is_a_crash",
            act(Act::OutByte),
            crashed(Crash::WrongPort {
                port: 0x1a8,
                size: 1,
            }),
        ),
        (
            "a_system_call_is_a_crash",
            act(Act::SystemCall(2)),
            crashed(Crash::Fault),
        ),
        (
            "an_unknown_ring_is_refused",
            act(Act::Ring {
                code: 0x1_0001,
                addr: HEAP,
                len: 1,
            }),
            SandboxError::UnknownRing(0x1_0001),
        ),
    ]
}

fn process_only() -> Vec<Case> {
    let call = |name, number| {
        let killed = SandboxError::Crashed(Crash::Killed);
        (name, act(Act::SystemCall(number)), killed)
    };
    vec![
        call("open_is_killed", 2),
        call("fork_is_killed", 57),
        call("execve_is_killed", 59),
        call("socket_is_killed", 41),
        call("mmap_is_killed", 9),
        call("exit_group_is_killed", 231),
        (
            "an_exit_is_a_crash",
            act(Act::SystemCall(60)),
            SandboxError::Crashed(Crash::Exited(0)),
        ),
        (
            "there_is_no_clock",
            act(Act::ReadClock),
            SandboxError::Crashed(Crash::Signal(libc::SIGSEGV)),
        ),
        (
            "waiting_for_nothing_is_noticed",
            act(Act::Wait),
            SandboxError::Stalled,
        ),
        (
            "an_unknown_ring_is_refused",
            act(Act::Ring {
                code: 200,
                addr: HEAP,
                len: 1,
            }),
            SandboxError::UnknownRing(200),
        ),
    ]
}

fn budgets() -> Vec<Case> {
    // 100,000 bytes are one started MiB.
    let flood = encode(&ToHost::Read(vec![]));
    let read = encode(&ToHost::Read(vec![read_at(MEMORY - (1 << 20), 1 << 20)]));
    vec![
        (
            "a_loop_ends_with_the_cpu_budget",
            act(Act::Loop),
            SandboxError::CpuBudget(LITTLE),
        ),
        (
            "a_flood_of_exits_ends_with_its_budget",
            Script::Replay(vec![flood]),
            SandboxError::ExitBudget(51),
        ),
        (
            "a_flood_of_reads_ends_with_its_budget",
            Script::Replay(vec![read]),
            SandboxError::ReadBudget(5 << 20),
        ),
        (
            "exhausted_memory_is_told_from_a_panic",
            act(Act::Exhaust),
            SandboxError::OutOfMemory(MEMORY),
        ),
    ]
}

fn messages() -> Vec<Case> {
    let rings = |addr, len| {
        act(Act::Ring {
            code: ring::MESSAGE,
            addr,
            len,
        })
    };
    let outside = |addr, len| SandboxError::MessageOutside { addr, len };
    let refusal = Failure::new(FailureKind::Unsupported, "x");
    let mut trailing = encode(&ToHost::Reply(Err(refusal)));
    trailing.extend([0, 0, 0]);
    let endless_list = vec![0x00, 0xff, 0xff, 0xff, 0xff, 0x7f];
    vec![
        (
            "another_build_is_refused",
            act(Act::ForgeBuild),
            SandboxError::WrongBuild,
        ),
        (
            "a_message_over_the_cap_is_refused",
            rings(HEAP, MAX_MESSAGE as u64 + 1),
            SandboxError::MessageTooLong {
                len: MAX_MESSAGE as u64 + 1,
                max: MAX_MESSAGE as u64,
            },
        ),
        (
            "a_message_of_all_lengths_is_refused",
            rings(HEAP, u64::MAX),
            SandboxError::MessageTooLong {
                len: u64::MAX,
                max: MAX_MESSAGE as u64,
            },
        ),
        (
            "a_message_before_the_window_is_refused",
            rings(WINDOW - 1, 16),
            outside(WINDOW - 1, 16),
        ),
        (
            "a_message_over_the_end_of_memory_is_refused",
            rings(MEMORY - 8, 9),
            outside(MEMORY - 8, 9),
        ),
        (
            "a_message_at_the_end_of_addresses_is_refused",
            rings(u64::MAX, 2),
            outside(u64::MAX, 2),
        ),
        (
            "an_empty_message_is_refused",
            rings(MAILBOX, 0),
            SandboxError::Undecodable,
        ),
        (
            "an_unknown_tag_is_refused",
            Script::Replay(vec![vec![0x7f, 1, 2, 3]]),
            SandboxError::Undecodable,
        ),
        (
            "a_list_that_is_longer_than_its_message_is_refused",
            Script::Replay(vec![endless_list]),
            SandboxError::Undecodable,
        ),
        (
            "bytes_after_a_message_are_refused",
            Script::Replay(vec![trailing]),
            SandboxError::TrailingBytes(3),
        ),
    ]
}

fn reads() -> Vec<Case> {
    let outside = |addr, len| SandboxError::ReadOutside { addr, len };
    let asks = |op| Script::Replay(vec![encode(&ToHost::Read(vec![op]))]);
    let to = |addr, len| asks(read_at(addr, len));
    let good = read_at(HEAP, 1);
    let beyond = |offset, len| {
        let error = SandboxError::ReadBeyond { offset, len };
        let op = ReadOp {
            offset,
            len,
            ..good
        };
        (asks(op), error)
    };
    let (last, last_error) = beyond(u64::MAX, 2);
    let (far, far_error) = beyond(i64::MAX as u64, 1);
    let many = vec![ReadOp { len: 0, ..good }; MAX_READS + 1];
    let unknown = ReadOp {
        file: FileNo(7),
        ..good
    };
    // Nothing of a message is done if a part of it is wrong.
    let mixed = ToHost::Read(vec![good, read_at(0, 1)]);
    vec![
        ("a_read_to_address_0_is_refused", to(0, 8), outside(0, 8)),
        (
            "a_read_to_code_is_refused",
            to(0x20_0000, 8),
            outside(0x20_0000, 8),
        ),
        (
            "a_read_to_the_stack_is_refused",
            to(STACK, 8),
            outside(STACK, 8),
        ),
        (
            "a_read_to_the_mailbox_is_refused",
            to(MAILBOX, 8),
            outside(MAILBOX, 8),
        ),
        (
            "a_read_to_before_the_heap_is_refused",
            to(HEAP - 1, 8),
            outside(HEAP - 1, 8),
        ),
        (
            "a_read_over_the_end_is_refused",
            to(MEMORY - 7, 8),
            outside(MEMORY - 7, 8),
        ),
        (
            "a_read_to_no_address_is_refused",
            to(u64::MAX - 3, 8),
            outside(u64::MAX - 3, 8),
        ),
        (
            "a_read_of_4_gib_is_refused",
            to(HEAP, u32::MAX),
            outside(HEAP, u32::MAX),
        ),
        ("a_read_whose_end_overflows_is_refused", last, last_error),
        ("a_read_after_every_file_is_refused", far, far_error),
        (
            "a_read_of_an_unknown_file_is_refused",
            asks(unknown),
            SandboxError::UnknownFile(FileNo(7)),
        ),
        (
            "too_many_reads_in_one_message_are_refused",
            Script::Replay(vec![encode(&ToHost::Read(many))]),
            SandboxError::TooManyReads(MAX_READS + 1),
        ),
        (
            "a_message_with_one_wrong_read_is_refused",
            Script::Replay(vec![encode(&mixed)]),
            outside(0, 1),
        ),
    ]
}

fn read_at(addr: u64, len: u32) -> ReadOp {
    ReadOp {
        file: FileNo::IMAGE,
        offset: 0,
        addr,
        len,
    }
}

fn encode(message: &ToHost) -> Vec<u8> {
    postcard::to_allocvec(message).expect("a message can be encoded")
}
