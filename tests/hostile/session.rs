//! What a session does for a guest that behaves.

use crate::{Image, Test, open, pool, scripted};
use instar::sandbox::{CallError, Counters, Crash, GuestProgram, Isolation, Limits, SandboxError};
use instar_guest::layout::{MAX_MEMORY, MIN_MEMORY};
use instar_guest::proto::{FileNo, Fresh, HEAD, ReadOp, Reply, TAIL, ToHost};
use instar_guest::{Failure, FailureKind, Plan, Request};
use instar_test_guest::{Act, Script};
use libtest_mimic::Failed;
use nix::sys::signal::SigSet;
use std::time::Duration;

pub fn tests() -> Vec<(String, Test)> {
    let test = |name: &str, test: fn(Isolation) -> Result<(), Failed>| {
        (name.to_owned(), Box::new(test) as Test)
    };
    vec![
        test(
            "the_shipped_guest_answers_in_one_exit",
            the_shipped_guest_answers_in_one_exit,
        ),
        test("a_short_file_is_placed_whole", a_short_file_is_placed_whole),
        test(
            "a_long_file_is_placed_by_its_ends",
            a_long_file_is_placed_by_its_ends,
        ),
        test("only_an_open_places_the_file", only_an_open_places_the_file),
        test(
            "a_failed_stream_is_told_to_the_guest",
            a_failed_stream_is_told_to_the_guest,
        ),
        test("reads_are_counted", reads_are_counted),
        test(
            "sessions_of_many_threads_do_not_mix",
            sessions_of_many_threads_do_not_mix,
        ),
        test(
            "a_thread_that_blocks_all_signals_has_its_budget_too",
            a_thread_that_blocks_all_signals_has_its_budget_too,
        ),
        test(
            "the_last_bytes_of_the_smallest_and_the_largest_memory_are_there",
            the_last_bytes_of_the_smallest_and_the_largest_memory_are_there,
        ),
        test(
            "a_second_ring_is_the_end_of_a_process",
            a_second_ring_is_the_end_of_a_process,
        ),
        test(
            "a_request_that_is_too_long_is_refused",
            a_request_that_is_too_long_is_refused,
        ),
    ]
}

fn equal<T: PartialEq + std::fmt::Debug>(found: T, expected: T) -> Result<(), Failed> {
    if found == expected {
        Ok(())
    } else {
        Err(format!("{found:?} instead of {expected:?}").into())
    }
}

fn the_shipped_guest_answers_in_one_exit(isolation: Isolation) -> Result<(), Failed> {
    let pool = pool(isolation, GuestProgram::shipped(), Limits::default());
    let mut session = pool.session()?;
    let nothing_open = session.call(&Request::Flush, &mut Image(vec![]));
    if !matches!(nothing_open, Err(CallError::Refused(_))) {
        return Err(format!("{nothing_open:?} instead of a refusal").into());
    }
    let one = Counters {
        exits: 1,
        messages: 1,
        ..Counters::default()
    };
    equal(session.counters(), one)
}

/// A file whose bytes all differ from their neighbours.
fn numbered(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at % 251) as u8).collect()
}

fn placed(isolation: Isolation, file: &[u8], request: &Request) -> Result<Reply, Failed> {
    let pool = pool(
        isolation,
        scripted::program(&Script::Ends),
        Limits::default(),
    );
    let mut session = pool.session()?;
    session.call(&open(file), &mut Image(file.to_vec()))?;
    Ok(session.call(request, &mut Image(file.to_vec()))?)
}

fn a_short_file_is_placed_whole(isolation: Isolation) -> Result<(), Failed> {
    for len in [0, 1, HEAD - 1, HEAD] {
        let file = numbered(len);
        equal(
            placed(isolation, &file, &open(&file))?,
            Reply::Inflated(file),
        )?;
    }
    Ok(())
}

fn a_long_file_is_placed_by_its_ends(isolation: Isolation) -> Result<(), Failed> {
    for len in [HEAD + 1, HEAD + TAIL, 3 * HEAD + 17] {
        let file = numbered(len);
        let ends = [&file[..HEAD], &file[len - TAIL..]].concat();
        equal(
            placed(isolation, &file, &open(&file))?,
            Reply::Inflated(ends),
        )?;
    }
    Ok(())
}

fn only_an_open_places_the_file(isolation: Isolation) -> Result<(), Failed> {
    let file = numbered(1000);
    equal(
        placed(isolation, &file, &Request::Flush)?,
        Reply::Inflated(vec![]),
    )
}

fn a_failed_stream_is_told_to_the_guest(isolation: Isolation) -> Result<(), Failed> {
    // The guest says what it is told by the host; here it only must be asked on.
    let refusal = Failure::new(FailureKind::Io, "the guest saw it");
    let messages = [
        ToHost::Stream(Plan::default()),
        ToHost::Reply(Err(refusal.clone())),
    ];
    let script = Script::Replay(messages.iter().map(encode).collect());
    let pool = pool(isolation, scripted::program(&script), Limits::default());
    let found = pool.session()?.call(&Request::Flush, &mut Image(vec![]));
    equal(found, Err(CallError::Refused(refusal)))
}

fn reads_are_counted(isolation: Isolation) -> Result<(), Failed> {
    let op = |len| ReadOp {
        file: FileNo::IMAGE,
        offset: 10,
        addr: 12 << 20,
        len,
    };
    let messages = [
        ToHost::Read(vec![op(5), op(0), op(1000)]),
        ToHost::Reply(Ok(Reply::Done)),
    ];
    let script = Script::Replay(messages.iter().map(encode).collect());
    let pool = pool(isolation, scripted::program(&script), Limits::default());
    let mut session = pool.session()?;
    let file = numbered(100);
    equal(
        session.call(&open(&file), &mut Image(file)),
        Ok(Reply::Done),
    )?;
    let expected = Counters {
        exits: 2,
        reads: 3,
        bytes_read: 1005,
        messages: 2,
    };
    equal(session.counters(), expected)
}

fn the_last_bytes_of_the_smallest_and_the_largest_memory_are_there(
    isolation: Isolation,
) -> Result<(), Failed> {
    for memory in [MIN_MEMORY, MAX_MEMORY] {
        let last = ReadOp {
            file: FileNo::IMAGE,
            offset: 0,
            addr: memory - 100,
            len: 100,
        };
        let messages = [ToHost::Read(vec![last]), ToHost::Reply(Ok(Reply::Done))];
        let script = Script::Replay(messages.iter().map(encode).collect());
        let limits = Limits {
            memory,
            ..Limits::default()
        };
        let pool = pool(isolation, scripted::program(&script), limits);
        let found = pool
            .session()?
            .call(&Request::Flush, &mut Image(numbered(100)));
        equal(found, Ok(Reply::Done))?;
    }
    Ok(())
}

fn sessions_of_many_threads_do_not_mix(isolation: Isolation) -> Result<(), Failed> {
    let pool = pool(
        isolation,
        scripted::program(&Script::Ends),
        Limits::default(),
    );
    let work = &|number: u8| -> Result<(), Failed> {
        for round in 0..4 {
            let file = vec![16 * number + round; 5000];
            let mut session = pool.session()?;
            let found = session.call(&open(&file), &mut Image(file.clone()))?;
            equal(found, Reply::Inflated(file))?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|n| scope.spawn(move || work(n))).collect();
        let mut results = threads.into_iter().map(|thread| thread.join());
        results.try_for_each(|one| one.unwrap_or_else(|_| Err("a thread panicked".into())))
    })
}

fn a_thread_that_blocks_all_signals_has_its_budget_too(isolation: Isolation) -> Result<(), Failed> {
    let cpu = Duration::from_millis(50);
    let limits = Limits {
        cpu,
        ..Limits::default()
    };
    let pool = pool(
        isolation,
        scripted::program(&Script::Act(Act::Loop)),
        limits,
    );
    let thread = std::thread::spawn(move || -> Result<(), Failed> {
        SigSet::all().thread_block()?;
        let found = pool.session()?.call(&Request::Flush, &mut Image(vec![]));
        equal(found, Err(CallError::Sandbox(SandboxError::CpuBudget(cpu))))
    });
    thread.join().map_err(|_| "the thread panicked")?
}

fn a_request_that_is_too_long_is_refused(isolation: Isolation) -> Result<(), Failed> {
    let pool = pool(
        isolation,
        scripted::program(&Script::Ends),
        Limits::default(),
    );
    let mut session = pool.session()?;
    let create = instar_guest::proto::Create {
        format: instar_guest::Format::Raw,
        size: 0,
        options: vec![("x".repeat(70_000), String::new())],
        backing: None,
        backing_size: None,
        backing_identity: None,
    };
    let request = Request::Create {
        create,
        name: String::new(),
        fresh: Fresh::default(),
    };
    let refusal = Failure::new(
        FailureKind::InvalidRequest,
        "names and options are longer than 65536 bytes together",
    );
    let found = session.call(&request, &mut Image(vec![]));
    equal(found, Err(CallError::Refused(refusal)))?;
    equal(
        session.call(&Request::Flush, &mut Image(vec![])),
        Ok(Reply::Inflated(vec![])),
    )
}

fn a_second_ring_is_the_end_of_a_process(isolation: Isolation) -> Result<(), Failed> {
    let script = scripted::program(&Script::Act(Act::RingTwice));
    let pool = pool(isolation, script, Limits::default());
    let mut session = pool.session()?;
    let mut call = || session.call(&Request::Flush, &mut Image(vec![]));
    if isolation == Isolation::Kvm {
        // It tries by a system call, and there is no second ring without a stop.
        let crashed = SandboxError::Crashed(Crash::Fault);
        return equal(call(), Err(CallError::Sandbox(crashed)));
    }
    let refusal = Failure::new(FailureKind::Unsupported, "not in the script");
    equal(call(), Err(CallError::Refused(refusal)))?;
    equal(call(), Err(CallError::Sandbox(SandboxError::RangUnasked)))
}

fn encode(message: &ToHost) -> Vec<u8> {
    postcard::to_allocvec(message).expect("a message can be encoded")
}
