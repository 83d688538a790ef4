//! Guests that misbehave, and what the host makes of each: its own error, and a
//! pool that goes on. Everything runs in both sandboxes; `INSTAR_ISOLATION`
//! restricts it to one.

#[allow(dead_code)] // Shared: not every test binary needs all of it.
#[path = "../support/machine.rs"]
mod machine;
#[path = "../support/scripted.rs"]
mod scripted;

mod cases;
mod memory;
mod probes;
mod session;

use instar::sandbox::{Config, Files, GuestProgram, Isolation, Limits, Pool};
use instar_guest::proto::{FileNo, Fresh};
use instar_guest::{Plan, Request};
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use std::io;
use std::process::ExitCode;
use std::sync::Arc;
use vm_memory::VolatileSlice;

fn main() -> ExitCode {
    if let Some(probe) = std::env::var_os(probes::VARIABLE) {
        return probes::run(&probe.to_string_lossy());
    }
    let arguments = Arguments::from_args();
    let mut trials = Vec::new();
    for (name, missing) in machine::sandboxes() {
        let isolation = match name {
            "kvm" => Isolation::Kvm,
            _ => Isolation::Process,
        };
        trials.extend(trials_for(isolation, &missing));
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}

type Test = Box<dyn FnOnce(Isolation) -> Result<(), Failed> + Send>;

fn trials_for(isolation: Isolation, missing: &Option<String>) -> Vec<Trial> {
    let mut tests: Vec<(String, Test)> = Vec::new();
    tests.extend(cases::tests(isolation));
    tests.extend(memory::tests());
    tests.extend(session::tests());
    if isolation == Isolation::Process {
        tests.extend(probes::tests());
    }
    let trial = |(name, test): (String, Test)| {
        let missing = missing.clone();
        Trial::ignorable_test(format!("{isolation}::{name}"), move || match missing {
            Some(reason) => Ok(Completion::ignored_with(reason)),
            None => test(isolation).map(|()| Completion::Completed),
        })
    };
    tests.into_iter().map(trial).collect()
}

/// A pool for a program.
fn pool(isolation: Isolation, program: GuestProgram, limits: Limits) -> Arc<Pool> {
    let config = Config {
        program,
        isolation,
        limits,
        idle: 1,
    };
    Pool::new(config).expect("the sandbox works on this machine")
}

/// Opens the image that [`Image`] is.
fn open(image: &[u8]) -> Request {
    Request::Open {
        format: None,
        file_len: image.len() as u64,
        write: false,
        fresh: Fresh::default(),
    }
}

/// An image file in memory.
struct Image(Vec<u8>);

impl Files for Image {
    fn len(&mut self, file: FileNo) -> io::Result<u64> {
        match file {
            FileNo::IMAGE => Ok(self.0.len() as u64),
            _ => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn read_at(&mut self, _: FileNo, offset: u64, dst: VolatileSlice<'_>) -> io::Result<()> {
        let mut bytes = vec![0; dst.len()];
        let start = usize::try_from(offset).map_or(self.0.len(), |at| at.min(self.0.len()));
        let inside = &self.0[start..];
        let len = inside.len().min(bytes.len());
        bytes[..len].copy_from_slice(&inside[..len]);
        dst.copy_from(&bytes);
        Ok(())
    }

    fn stream(&mut self, _: Plan) -> io::Result<()> {
        Err(io::Error::other("the disk is full"))
    }
}
