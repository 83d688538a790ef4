//! `mount.instar`: what mount(8) runs for `mount -t instar SOURCE MOUNTPOINT`,
//! and with it fstab and systemd.
//!
//! It translates mount(8)'s calling convention into `instar mount`, which goes
//! to the background once the mount answers, and its exit status into
//! mount(8)'s. It knows nothing of images.

mod arguments;
mod known;

use arguments::{Call, parse};
use std::env;
use std::ffi::OsString;
use std::io::{self, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{Command, ExitCode, ExitStatus};

/// Incorrect invocation or permissions.
const USAGE: u8 = 1;
/// System error.
const SYSTEM: u8 = 2;
/// User interrupt.
const INTERRUPT: u8 = 8;
/// Mount failure.
const FAILURE: u8 = 32;

/// The exit status of `instar` for a command line that makes no sense.
const INSTAR_USAGE: i32 = 2;

/// Where programs are, for callers whose PATH says nothing.
const PROGRAM_DIRECTORIES: [&str; 6] = [
    "/usr/local/sbin",
    "/usr/local/bin",
    "/usr/sbin",
    "/usr/bin",
    "/sbin",
    "/bin",
];

fn main() -> ExitCode {
    let call = match parse(env::args_os().skip(1)) {
        Ok(call) => call,
        Err(message) => {
            complain(&format!(
                "{message}\nUsage: mount.instar SOURCE MOUNTPOINT [-sfnv] [-o OPTIONS]"
            ));
            return ExitCode::from(USAGE);
        }
    };
    let arguments = instar_arguments(&call);
    if call.verbose || call.fake {
        let words: Vec<_> = arguments
            .iter()
            .map(|word| word.to_string_lossy())
            .collect();
        println!("instar {}", words.join(" "));
    }
    if call.fake {
        return ExitCode::SUCCESS;
    }
    match Command::new(program()).args(arguments).status() {
        Ok(status) => ExitCode::from(exit_bits(status)),
        Err(error) => {
            complain(&format!("instar could not be started: {error}"));
            ExitCode::from(SYSTEM)
        }
    }
}

/// Writes to the standard error. Nobody is left to tell where that fails.
fn complain(message: &str) {
    let _ = writeln!(io::stderr(), "mount.instar: {message}");
}

fn instar_arguments(call: &Call) -> Vec<OsString> {
    let mut arguments = vec![OsString::from("mount")];
    if !call.options.is_empty() {
        arguments.push("-o".into());
        arguments.push(call.options.clone());
    }
    arguments.push("--".into());
    arguments.push(call.source.clone());
    arguments.push(call.mountpoint.clone());
    arguments
}

/// `instar` from where this program is, else from the usual places.
fn program() -> PathBuf {
    let own = env::current_exe().ok();
    let beside = own
        .iter()
        .filter_map(|path| path.parent())
        .map(PathBuf::from);
    let search = env::var_os("PATH").unwrap_or_default();
    let candidates = beside
        .chain(env::split_paths(&search).filter(|path| path.is_absolute()))
        .chain(PROGRAM_DIRECTORIES.iter().map(PathBuf::from));
    candidates
        .map(|directory| directory.join("instar"))
        .find(|path| path.is_file())
        .unwrap_or_else(|| PathBuf::from("instar"))
}

fn exit_bits(status: ExitStatus) -> u8 {
    match (status.code(), status.signal()) {
        (Some(0), _) => 0,
        (Some(INSTAR_USAGE), _) => USAGE,
        (Some(_), _) => FAILURE,
        (None, Some(_)) => INTERRUPT,
        (None, None) => SYSTEM,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_end_of_instar_has_its_exit_bit() {
        let exited = |code: i32| ExitStatus::from_raw(code << 8);
        assert_eq!(exit_bits(exited(0)), 0);
        assert_eq!(exit_bits(exited(1)), FAILURE);
        assert_eq!(exit_bits(exited(2)), USAGE);
        assert_eq!(exit_bits(ExitStatus::from_raw(2)), INTERRUPT);
    }

    #[test]
    fn a_source_that_looks_like_an_option_stays_a_source() {
        let call = Call {
            source: "-x".into(),
            mountpoint: "/mnt".into(),
            ..Call::default()
        };
        assert_eq!(instar_arguments(&call), ["mount", "--", "-x", "/mnt"]);
    }
}
