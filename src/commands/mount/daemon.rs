//! Going to the background: the child does everything, the parent waits for
//! its word and passes it on.
//!
//! The fork comes first, before any thread and any KVM descriptor, because
//! neither survives one.
#![allow(unsafe_code)]

use super::serve::Ready;
use crate::commands::Error;
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, dup2_stderr, dup2_stdin, dup2_stdout, fork, pipe2, setsid};
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;

/// The way to say that the mount answers, or why it does not.
pub struct Word(File);

/// Runs `job` in the background; returns when it has said that it is ready, or
/// with the reason why it is not.
pub fn detach(job: impl FnOnce(Ready) -> Result<(), Error>) -> Result<(), Error> {
    let fail = || Error::system("Could not start the daemon");
    let (reader, writer) =
        pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(|errno| fail()(errno.into()))?;
    // SAFETY: the process has one thread only so far, so nothing can be left
    // locked or half done in the child.
    match unsafe { fork() }.map_err(|errno| fail()(errno.into()))? {
        ForkResult::Parent { child } => {
            drop(writer);
            let word = listen(reader);
            if word.is_err() {
                // It is about to end; without this its mount might still be
                // seen.
                let _ = waitpid(child, None);
            }
            word
        }
        ForkResult::Child => {
            drop(reader);
            let code = run_child(writer, job);
            std::process::exit(code)
        }
    }
}

/// What the child says: a zero byte if all is well, else the reason.
fn listen(reader: OwnedFd) -> Result<(), Error> {
    let mut reader = File::from(reader);
    let mut first = [0];
    let heard = reader.read(&mut first);
    match heard.map_err(Error::system("Could not hear from the daemon"))? {
        0 => Err(Error::refused(
            "the daemon died before the mount was ready; 'instar mount -f' shows more",
        )),
        _ if first == [0] => Ok(()),
        _ => {
            let mut reason = first.to_vec();
            let _ = reader.read_to_end(&mut reason);
            Err(Error::Refused(
                String::from_utf8_lossy(&reason).into_owned(),
            ))
        }
    }
}

fn run_child(writer: OwnedFd, job: impl FnOnce(Ready) -> Result<(), Error>) -> i32 {
    let word = match writer.try_clone() {
        Ok(word) => Word(File::from(word)),
        Err(_) => return 1,
    };
    let _ = setsid();
    let _ = nix::unistd::chdir("/");
    match job(Ready::Background(word)) {
        Ok(()) => 0,
        Err(error) => {
            log::error!("{error}");
            // Nobody listens any more if the mount was ready once.
            let _ = File::from(writer).write_all(error.to_string().as_bytes());
            1
        }
    }
}

impl Word {
    /// Lets go of the terminal and of whoever started us.
    pub fn ready(mut self) -> io::Result<()> {
        let null = File::options().read(true).write(true).open("/dev/null")?;
        dup2_stdin(&null)?;
        dup2_stdout(&null)?;
        dup2_stderr(&null)?;
        self.0.write_all(&[0])
    }
}
