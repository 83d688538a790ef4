//! Where the messages of a mount go: the standard error in the foreground, a
//! file, or syslog.
#![allow(unsafe_code)]

use crate::commands::Error;
use env_logger::{Builder, Env, Logger, Target};
use log::{Level, Log, Metadata, Record};
use std::ffi::CString;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

/// Starts logging. `INSTAR_LOG` chooses what is logged.
pub fn start(foreground: bool, file: Option<&Path>) -> Result<(), Error> {
    let mut builder = Builder::from_env(Env::new().filter_or("INSTAR_LOG", "info,fuser=off"));
    match file {
        Some(path) => {
            let file = OpenOptions::new()
                .append(true)
                .create(true)
                .mode(0o640)
                .open(path)
                .map_err(Error::system(format!(
                    "Could not open the log {}",
                    path.display()
                )))?;
            builder.target(Target::Pipe(Box::new(file))).init();
        }
        None if foreground => builder.init(),
        None => start_syslog(builder.build()),
    }
    Ok(())
}

fn start_syslog(filter: Logger) {
    // SAFETY: the identity is a static string, which syslog keeps.
    unsafe { libc::openlog(c"instar".as_ptr(), libc::LOG_PID, libc::LOG_DAEMON) };
    let level = filter.filter();
    if log::set_boxed_logger(Box::new(Syslog { filter })).is_ok() {
        log::set_max_level(level);
    }
}

struct Syslog {
    filter: Logger,
}

impl Log for Syslog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.filter.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if !self.filter.matches(record) {
            return;
        }
        let priority = match record.level() {
            Level::Error => libc::LOG_ERR,
            Level::Warn => libc::LOG_WARNING,
            Level::Info => libc::LOG_INFO,
            Level::Debug | Level::Trace => libc::LOG_DEBUG,
        };
        let text = record.args().to_string().replace('\0', "\\0");
        if let Ok(text) = CString::new(text) {
            // SAFETY: the format takes one string, and gets one.
            unsafe { libc::syslog(priority, c"%s".as_ptr(), text.as_ptr()) };
        }
    }

    fn flush(&self) {}
}
