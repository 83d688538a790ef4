//! Tests of an open image over guests that tests control: the host's half must
//! hold whatever the guest says.

mod checking;
mod concurrent;
mod creating;
mod extents;
mod failing;
mod faulty;
mod hostile;
mod named;
mod plan_names;
mod plans;
mod renaming;
mod resting;
mod settling;
mod toy;
mod writing;

use super::error::Fault;
use super::guest::Guest;
use super::lock::LockSet;
use super::open::Guests;
use super::{Access, Error, ErrorKind, Image, OpenOptions, Operation};
use crate::sandbox::{CallError, Files};
use instar_guest::{Facts, Format, Reply, Request};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// A file in a directory of its own.
struct Fixture {
    _dir: tempfile::TempDir,
    path: PathBuf,
}

impl Fixture {
    fn new(content: &[u8]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        std::fs::write(&path, content).unwrap();
        Self { _dir: dir, path }
    }

    fn content(&self) -> Vec<u8> {
        std::fs::read(&self.path).unwrap()
    }

    /// Opens the file with a guest for it.
    fn open(&self, options: &OpenOptions, guest: impl Guest + Clone + 'static) -> Image {
        self.try_open(options, guest).unwrap()
    }

    fn try_open(
        &self,
        options: &OpenOptions,
        guest: impl Guest + Clone + 'static,
    ) -> Result<Image, Error> {
        let guest = Mutex::new(guest);
        let guests = move || -> Result<Box<dyn Guest>, Fault> {
            Ok(Box::new(guest.lock().unwrap().clone()))
        };
        options
            .open_path(&(Arc::new(guests) as Guests), &self.path)
            .map_err(|fault| fault.at(Operation::Open, &self.path))
    }
}

fn for_writing() -> OpenOptions {
    OpenOptions::new(Access::Write)
}

/// Facts of a disk of a made-up format, for guests that tests write.
fn facts(virtual_size: u64, unit: u64) -> Facts {
    Facts {
        format: Format::Qcow2,
        probed: true,
        virtual_size,
        cluster_size: Some(unit),
        write_unit: unit,
        size_unit: 512,
        backing: None,
        identity: None,
        files: Vec::new(),
        files_first: false,
        encrypted: false,
        dirty: false,
        corrupt: false,
        unsettled: None,
        no_write: None,
        no_resize: None,
        snapshots: Vec::new(),
        specific: Vec::new(),
    }
}

/// A guest that is a function.
#[derive(Clone)]
struct Script<F>(F);

impl<F> Guest for Script<F>
where
    F: FnMut(&Request, &mut dyn Files) -> Result<Reply, CallError> + Send,
{
    fn call(&mut self, request: &Request, files: &mut dyn Files) -> Result<Reply, CallError> {
        (self.0)(request, files)
    }

    fn exits(&self) -> u64 {
        0
    }
}

/// An error's kind and text, to compare.
fn told(error: &Error) -> (super::ErrorKind, String) {
    (error.kind(), error.message().to_string())
}

/// Another program's lock on a file, held as long as the file is open.
fn lock_elsewhere(path: &Path) -> Result<File, ErrorKind> {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let taken = LockSet::WRITE.take(&file, path);
    taken.map(|()| file).map_err(|fault| fault.kind)
}
