//! Effects that are written down, and fail on demand.

use crate::image::disk::EffectsHook;
use crate::image::effects::Effects;
use instar_guest::FileNo;
use instar_guest::plan::NewName;
use std::io;
use std::sync::{Arc, Mutex};

/// What was done, and which call is to fail with which errno.
#[derive(Debug, Default)]
pub struct Log {
    pub done: Vec<String>,
    pub fail: Option<(usize, i32)>,
}

/// The log that effects share with their test.
#[derive(Clone, Debug, Default)]
pub struct Faulty(pub Arc<Mutex<Log>>);

impl Faulty {
    /// Lets the call after the next `after` ones fail.
    pub fn fail(&self, after: usize, errno: i32) {
        let mut log = self.0.lock().unwrap();
        log.fail = Some((log.done.len() + after, errno));
    }

    /// What was done since this was last asked.
    pub fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap().done)
    }

    /// Puts the log around an image's effects.
    pub fn hook(&self) -> EffectsHook {
        let log = self.clone();
        EffectsHook(Some(Arc::new(move |real| {
            let log = log.clone();
            Box::new(Logged { real, log })
        })))
    }

    fn note(&self, file: FileNo, what: String) -> io::Result<()> {
        let what = match file {
            FileNo::IMAGE => what,
            FileNo(other) => format!("{what} of {other}"),
        };
        let mut log = self.0.lock().unwrap();
        let now = log.done.len();
        log.done.push(what);
        match log.fail {
            Some((at, errno)) if at == now => {
                log.fail = None;
                Err(io::Error::from_raw_os_error(errno))
            }
            _ => Ok(()),
        }
    }
}

struct Logged {
    real: Box<dyn Effects>,
    log: Faulty,
}

impl Effects for Logged {
    fn write(&self, file: FileNo, offset: u64, data: &[u8]) -> io::Result<()> {
        self.log
            .note(file, format!("write {offset}+{}", data.len()))?;
        self.real.write(file, offset, data)
    }

    fn zero(&self, file: FileNo, offset: u64, len: u64) -> io::Result<()> {
        self.log.note(file, format!("zero {offset}+{len}"))?;
        self.real.zero(file, offset, len)
    }

    fn copy(&self, file: FileNo, from: u64, to: u64, len: u64) -> io::Result<()> {
        self.log.note(file, format!("copy {from}+{len} to {to}"))?;
        self.real.copy(file, from, to, len)
    }

    fn copy_from(
        &self,
        file: FileNo,
        source: FileNo,
        from: u64,
        to: u64,
        len: u64,
    ) -> io::Result<()> {
        self.log
            .note(file, format!("copy {from}+{len} of {} to {to}", source.0))?;
        self.real.copy_from(file, source, from, to, len)
    }

    fn reserve(&self, file: FileNo, offset: u64, len: u64) -> io::Result<()> {
        self.log.note(file, format!("reserve {offset}+{len}"))?;
        self.real.reserve(file, offset, len)
    }

    fn punch(&self, file: FileNo, offset: u64, len: u64) -> io::Result<()> {
        self.log.note(file, format!("punch {offset}+{len}"))?;
        self.real.punch(file, offset, len)
    }

    fn set_len(&self, file: FileNo, len: u64) -> io::Result<()> {
        self.log.note(file, format!("set_len {len}"))?;
        self.real.set_len(file, len)
    }

    fn sync(&self, file: FileNo) -> io::Result<()> {
        self.log.note(file, "sync".to_string())?;
        self.real.sync(file)
    }

    fn create(&self, file: FileNo, name: &NewName) -> io::Result<()> {
        self.log.note(file, format!("create {}", shown(name)))?;
        self.real.create(file, name)
    }

    fn rename(&self, file: FileNo, over: FileNo) -> io::Result<()> {
        self.log.note(file, format!("rename over {}", over.0))?;
        self.real.rename(file, over)
    }

    fn unlink(&self, file: FileNo) -> io::Result<()> {
        self.log.note(file, "unlink".to_string())?;
        self.real.unlink(file)
    }

    fn remove(&self, name: &NewName) -> io::Result<()> {
        let what = format!("remove {}", shown(name));
        self.log.note(FileNo::IMAGE, what)?;
        self.real.remove(name)
    }

    fn sync_names(&self) -> io::Result<()> {
        self.log.note(FileNo::IMAGE, "sync names".to_string())?;
        self.real.sync_names()
    }
}

fn shown(name: &NewName) -> &str {
    match name {
        NewName::Replacement => "replacement",
        NewName::Plain(name) => name,
    }
}
