//! An empty file that is to become an image: locked like one for as long as it
//! is kept, and written in place.

use super::create::{Created, create_over};
use super::error::{Error, Fault, Operation};
use super::home::Home;
use super::lock::{self, LockSet};
use super::open::{Location, check_regular, replaced};
use super::{Access, Image, OpenOptions};
use crate::sandbox::Pool;
use instar_guest::Format;
use instar_guest::proto::Create;
use std::fs::File;
use std::io;
use std::sync::Arc;

/// See the module. Dropping it releases its lock, unless another descriptor of
/// the same opening is kept.
#[derive(Debug)]
pub struct Blank {
    file: File,
    at: Location,
    format: Format,
    access: Access,
}

impl Blank {
    /// Locks an empty file. The descriptor must allow writing if `access` does.
    pub fn open(file: File, at: Location, format: Format, access: Access) -> Result<Self, Error> {
        let path = at.path.clone();
        let blank = Self {
            file,
            at,
            format,
            access,
        };
        blank
            .take_lock()
            .map(|()| blank)
            .map_err(|fault| fault.at(Operation::Open, &path))
    }

    /// The format that the image is to have.
    pub fn format(&self) -> Format {
        self.format
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Gives up the lock.
    pub fn unlock(&self) -> Result<(), Error> {
        lock::release(&self.file).map_err(|error| self.failed(Operation::Lock, error.into()))
    }

    /// Takes the lock again. [`Locked`](super::ErrorKind::Locked) if another process holds the
    /// file, [`Stale`](super::ErrorKind::Stale) if it is not empty any more or has lost its
    /// name.
    pub fn lock(&self) -> Result<(), Error> {
        self.take_lock()
            .map_err(|fault| self.failed(Operation::Lock, fault))
    }

    /// Makes it an image and opens that. The lock is held all the time. After a
    /// failure the file is empty, or the error says that it is not.
    pub fn create(
        &self,
        pool: &Arc<Pool>,
        create: &Create,
        options: &OpenOptions,
    ) -> Result<(Image, Created), Error> {
        let created = self
            .create_image(pool, create)
            .map_err(|fault| self.failed(Operation::Create, fault))?;
        let file = self.file.try_clone();
        let opened = file
            .map_err(|error| self.failed(Operation::Open, error.into()))
            .and_then(|file| options.open_file(pool, file, self.at.clone()));
        match opened {
            Ok(image) => Ok((image, created)),
            Err(error) => Err(self.take_back(error)),
        }
    }

    /// Empties the file of an image that could not be opened. That has taken the
    /// lock with it.
    fn take_back(&self, error: Error) -> Error {
        let emptied = self.file.set_len(0).and_then(|()| self.file.sync_all());
        match emptied.map_err(Fault::from).and_then(|()| self.take_lock()) {
            Ok(()) => error,
            Err(fault) => self.failed(Operation::Create, fault.and("the file is not empty")),
        }
    }

    fn create_image(&self, pool: &Arc<Pool>, create: &Create) -> Result<Created, Fault> {
        self.take_lock()?;
        let mut session = pool.session()?;
        let file = self.file.try_clone()?;
        create_over(&mut session, file, &self.home(), &self.at.path, create)
    }

    /// Makes an image's file empty, durably: one change of its length. The lock is
    /// left as it is.
    pub fn empty(file: File, at: Location, format: Format) -> io::Result<Self> {
        file.set_len(0)?;
        file.sync_all()?;
        Ok(Self {
            file,
            at,
            format,
            access: Access::Write,
        })
    }

    fn take_lock(&self) -> Result<(), Fault> {
        check_regular(&self.file, &self.at.path)?;
        LockSet::of(self.access).take(&self.file, &self.at.path)?;
        let same = self.home().holds(&self.file)? && self.file.metadata()?.len() == 0;
        match same {
            true => Ok(()),
            false => {
                // That it is not what it was is the news.
                let _ = lock::release(&self.file);
                Err(replaced())
            }
        }
    }

    fn home(&self) -> Home {
        Home::Below(Arc::clone(&self.at.tree), self.at.inside.clone())
    }

    fn failed(&self, operation: Operation, fault: Fault) -> Error {
        fault.at(operation, &self.at.path)
    }
}
