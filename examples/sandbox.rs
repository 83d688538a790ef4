//! What the sandbox costs on this machine: `cargo run --release --example sandbox`.

use instar::sandbox::{CallError, Config, Files, Isolation, Pool};
use instar_guest::proto::{FileNo, Fresh, Request};
use instar_guest::{Plan, Reply};
use std::io;
use std::time::{Duration, Instant};
use vm_memory::VolatileSlice;

fn main() {
    for isolation in [Isolation::Kvm, Isolation::Process] {
        if let Err(error) = measure(isolation) {
            println!("{isolation}: {error}");
        }
    }
}

fn measure(isolation: Isolation) -> Result<(), Box<dyn std::error::Error>> {
    println!("{isolation}:");
    let config = || Config {
        isolation,
        ..Config::default()
    };
    report("pool with a first sandbox, cold", |_| {
        Pool::new(config()).map(drop)
    })?;
    report("pool, session, open, cold", |_| {
        let pool = Pool::new(config())?;
        open(&mut pool.session()?)
    })?;
    let pool = Pool::new(config())?;
    open(&mut pool.session()?)?;
    report("session and open from a warm pool", |_| {
        open(&mut pool.session()?)
    })?;
    let mut session = pool.session()?;
    open(&mut session)?;
    report("open again in the session", |_| open(&mut session))?;
    report("a request without effect", |_| {
        answered(session.call(&Request::Undo, &mut Zeroes)).map(drop)
    })?;
    println!("  {:?}", session.counters());
    Ok(())
}

/// Runs the same thing several times and prints the first and the median time.
fn report<E>(what: &str, mut run: impl FnMut(usize) -> Result<(), E>) -> Result<(), E> {
    let mut times = Vec::new();
    for round in 0..21 {
        let start = Instant::now();
        run(round)?;
        times.push(start.elapsed());
    }
    let first = times.first().copied().unwrap_or_default();
    times.sort();
    let median = times.get(times.len() / 2).copied().unwrap_or_default();
    let us = |time: Duration| time.as_secs_f64() * 1e6;
    println!(
        "  {what:<36} first {:>7.0} µs, median {:>7.0} µs",
        us(first),
        us(median)
    );
    Ok(())
}

fn open(session: &mut instar::sandbox::Session) -> Result<(), CallError> {
    let request = Request::Open {
        format: None,
        file_len: LENGTH,
        write: false,
        fresh: Fresh::default(),
    };
    answered(session.call(&request, &mut Zeroes)).map(drop)
}

/// A refusal is an answer too.
fn answered(reply: Result<Reply, CallError>) -> Result<Option<Reply>, CallError> {
    match reply {
        Err(CallError::Refused(_)) => Ok(None),
        other => other.map(Some),
    }
}

const LENGTH: u64 = 256 << 10;

struct Zeroes;

impl Files for Zeroes {
    fn len(&mut self, _: FileNo) -> io::Result<u64> {
        Ok(LENGTH)
    }

    fn read_at(&mut self, _: FileNo, _: u64, dst: VolatileSlice<'_>) -> io::Result<()> {
        dst.copy_from(&vec![0_u8; dst.len()]);
        Ok(())
    }

    fn stream(&mut self, _: Plan) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}
