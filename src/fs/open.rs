//! An image that is open on the mount: shared by all its handles, and locked
//! only while one of them may need it.
//!
//! The kernel waits neither for RELEASE nor for umount, and a loop device may
//! write after its opener's FLUSH. So a handle counts as idle from its FLUSH
//! until it is used again, and when all are idle and nothing waits for a flush
//! the locks are given up. The next use takes them again, after checking that
//! the file is still what it was.

mod holding;

use super::catalog::Catalog;
use super::disk::Disk;
use super::error::{Error, Result};
use super::memory::Memory;
use super::nodes::Node;
use super::passage::{Passage, Version};
use super::source::{FileId, Source, Stat};
use super::sync::{lock, read, try_read, try_write, write};
use crate::image::Access;
use nix::errno::Errno;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, RwLock, RwLockWriteGuard};
use std::time::Duration;

/// See the module.
pub struct OpenFile {
    /// The file.
    pub node: Arc<Node>,
    state: RwLock<State>,
    /// The size of the disk, for as long as the image is open and locked. Noted
    /// where it changes and nowhere else: whoever merely asks for the size may
    /// be slow to note it, and bring an old one back.
    size: Mutex<Option<u64>>,
    uses: Mutex<Uses>,
    sizing: Mutex<()>,
    opening: Mutex<()>,
    /// The kernel's own way to the content, or that it has none: decided with
    /// the first handle.
    passage: OnceLock<Option<Arc<Passage>>>,
    /// Ticks since the lock was given up, as far as the kernel may be using the
    /// content without it.
    unlocked: AtomicU32,
}

/// One open file description of the kernel.
pub struct Handle {
    /// What it is a handle of.
    pub file: Arc<OpenFile>,
    writable: bool,
    used: AtomicBool,
    generation: u64,
    /// What it found, where the kernel uses the content by itself.
    pub found: Option<Version>,
    /// Whether what the kernel may have cached is right.
    pub cache_is_right: bool,
}

#[derive(Default)]
struct State {
    open: Option<Opened>,
    left: Left,
    /// Whether it must stay open and locked until it has no user any more.
    pinned: bool,
    /// Counts the times at which the content changed behind our back.
    generation: u64,
}

/// What the file was like when the lock was given up, to tell whether somebody
/// has changed it when the lock is taken again.
#[derive(Default)]
enum Left {
    /// The lock has not been given up since it was taken, or was never taken.
    #[default]
    Not,
    /// It was like this.
    As(Stat),
    /// It could not be asked for.
    Unknown,
}

struct Opened {
    disk: Arc<dyn Disk>,
    access: Access,
    locked: bool,
}

#[derive(Default)]
struct Uses {
    users: usize,
    busy: usize,
    busy_writers: usize,
}

/// What is needed to open an image again.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// The tree.
    pub source: &'a Source,
    /// What is known of its files, and the library that opens them.
    pub catalog: &'a Catalog,
    /// What the kernel believes of them.
    pub memory: &'a Memory,
}

impl OpenFile {
    /// An image that nothing has been done with yet.
    pub fn new(node: Arc<Node>) -> Arc<Self> {
        Arc::new(Self {
            node,
            state: RwLock::default(),
            size: Mutex::default(),
            uses: Mutex::default(),
            sizing: Mutex::default(),
            opening: Mutex::default(),
            passage: OnceLock::new(),
            unlocked: AtomicU32::new(0),
        })
    }

    /// Opens a handle. The image is opened and locked for what the handle may
    /// do, so that an image that cannot be used fails here.
    pub fn handle(self: &Arc<Self>, context: Context<'_>, writable: bool) -> Result<Handle> {
        lock(&self.uses).begin(writable);
        let mut handle = Handle {
            file: Arc::clone(self),
            writable,
            used: AtomicBool::new(true),
            generation: 0,
            found: None,
            cache_is_right: false,
        };
        let secured = {
            let mut state = write(&self.state);
            // Somebody is using it here: all changes come from us.
            let joined = state.serves(Access::Read);
            let secured = self.secure(context, &mut state, needed(writable));
            handle.generation = state.generation;
            // Before anybody changes it here.
            handle.cache_is_right =
                joined || !self.node.may_be_cached() || self.is_current(context, &state);
            secured
        };
        match secured {
            Ok(()) => Ok(handle),
            Err(error) => {
                handle.rest();
                Err(error)
            }
        }
    }

    /// The kernel's own way to the content, opened by `open` if this is the
    /// first handle.
    pub fn passage_or(&self, open: impl FnOnce() -> Option<Passage>) -> Option<Arc<Passage>> {
        self.passage.get_or_init(|| open().map(Arc::new)).clone()
    }

    /// The kernel's own way to the content, if it has one.
    pub fn passage(&self) -> Option<&Passage> {
        self.passage.get()?.as_deref()
    }

    /// Whether the kernel may have used the content without a lock for a whole
    /// tick; to be asked once per tick.
    pub fn lacks_its_lock(&self) -> bool {
        let locked = self.passage().is_none() || self.is_locked();
        match locked {
            true => self.unlocked.store(0, Ordering::Release),
            false => return self.unlocked.fetch_add(1, Ordering::AcqRel) > 0,
        }
        false
    }

    /// Counts one more user: a handle, or a call that needs none.
    pub fn join(&self) {
        lock(&self.uses).users += 1;
    }

    /// Counts one user less; whether it was the last one.
    pub fn leave(&self) -> bool {
        let mut uses = lock(&self.uses);
        uses.users -= 1;
        uses.users == 0
    }

    /// Held by whoever opens a handle, until it is known whether the kernel's
    /// cache is right.
    pub fn opening(&self) -> MutexGuard<'_, ()> {
        lock(&self.opening)
    }

    /// Whether nobody uses it.
    pub fn is_unused(&self) -> bool {
        lock(&self.uses).users == 0
    }

    /// Closes the image, and with it its locks, unless it has a user again.
    /// What could not be made durable is gone then, and the kernel must not
    /// show it.
    pub fn close_unused(&self, context: Context<'_>) {
        let mut state = write(&self.state);
        if !self.is_unused() {
            return;
        }
        let Some(open) = state.open.take() else {
            return;
        };
        if open.disk.is_dirty() {
            self.note_change(context, &mut state);
            context.memory.forget(self.node.id);
        }
        *lock(&self.size) = None;
    }

    /// Works with the image outside of any handle.
    pub fn with<R>(
        &self,
        context: Context<'_>,
        access: Access,
        work: impl FnOnce(&dyn Disk) -> Result<R>,
    ) -> Result<R> {
        self.run(context, access, None, work)
    }

    /// Whether the image is open and locked.
    pub fn is_locked(&self) -> bool {
        read(&self.state).serves(Access::Read)
    }

    /// The size of the disk, while the image is open and locked. Does not wait
    /// for whoever is opening or closing it: the last size known is right then.
    pub fn virtual_size(&self) -> Option<u64> {
        match try_read(&self.state) {
            Some(state) => {
                let locked = state.open.as_ref().filter(|open| open.locked);
                locked.map(|open| open.disk.virtual_size())
            }
            None => *lock(&self.size),
        }
    }

    /// The image file, while the image is open. Does not wait for whoever is
    /// opening or closing it.
    pub fn file(&self) -> Option<FileId> {
        try_read(&self.state)?.open.as_ref()?.disk.file()
    }

    /// Takes note of the size after a change.
    pub fn note_size(&self, size: u64) {
        *lock(&self.size) = Some(size);
    }

    /// Held by whoever changes the size, from looking at it until it is
    /// changed.
    pub fn sizing(&self) -> MutexGuard<'_, ()> {
        lock(&self.sizing)
    }

    /// Makes everything durable. Also an image that seems clean is asked: it
    /// may be in the middle of a flush, to be waited for, whose error the
    /// caller has to see.
    pub fn flush(&self) -> Result<()> {
        match &read(&self.state).open {
            Some(open) if open.access == Access::Write => open.disk.flush(),
            _ => Ok(()),
        }
    }

    /// Has long runs of data that were written go to disk, unless somebody is
    /// opening or closing the image.
    pub fn begin_flush(&self) {
        let state = try_read(&self.state);
        if let Some(open) = state.as_ref().and_then(|state| state.open.as_ref()) {
            open.disk.begin_flush();
        }
    }

    /// Makes everything durable and gives up the locks that no handle in use
    /// needs.
    pub fn settle(&self, context: Context<'_>) -> Result<()> {
        self.flush()?;
        if lock(&self.uses).busy_writers > 0 {
            return Ok(());
        }
        self.let_go(context, write(&self.state))
    }

    /// The same, as far as it needs no waiting for whoever works with the
    /// image: a slow image must not hold up the others.
    pub fn tick(&self, context: Context<'_>) -> Result<()> {
        match try_read(&self.state).as_deref() {
            Some(State {
                open: Some(open), ..
            }) if open.disk.is_dirty() => open.disk.flush()?,
            _ => {}
        }
        match try_write(&self.state) {
            Some(state) => self.let_go(context, state),
            None => Ok(()),
        }
    }

    /// Lets the image do without a sandbox, if nothing was asked of that for
    /// `after`.
    pub fn rest(&self, after: Duration) {
        if let Some(State {
            open: Some(open), ..
        }) = try_read(&self.state).as_deref()
        {
            open.disk.rest(after);
        }
    }

    fn run<R>(
        &self,
        context: Context<'_>,
        access: Access,
        generation: Option<u64>,
        work: impl FnOnce(&dyn Disk) -> Result<R>,
    ) -> Result<R> {
        let state = {
            let state = read(&self.state);
            if state.serves(access) {
                state
            } else {
                drop(state);
                let mut state = write(&self.state);
                self.secure(context, &mut state, access)?;
                RwLockWriteGuard::downgrade(state)
            }
        };
        if generation.is_some_and(|generation| generation != state.generation) {
            return Err(Error::new(
                Errno::ESTALE,
                format!(
                    "{}: the image changed while it was not locked: open it again",
                    context.source.display(&self.node.path()).display()
                ),
            ));
        }
        match &state.open {
            Some(open) => {
                if self.passage().is_some() {
                    open.disk.follow()?;
                }
                work(open.disk.as_ref())
            }
            None => Err(Errno::EIO.into()),
        }
    }
}

impl Handle {
    /// Works with the image as a reader.
    pub fn read<R>(
        &self,
        context: Context<'_>,
        work: impl FnOnce(&dyn Disk) -> Result<R>,
    ) -> Result<R> {
        self.touch();
        self.file.run(context, Access::Read, None, work)
    }

    /// Works with the image as a reader if it is open, locked, and not about to be
    /// anything else.
    pub fn try_read<R>(&self, work: impl FnOnce(&dyn Disk) -> Option<R>) -> Option<R> {
        self.touch();
        let state = try_read(&self.file.state)?;
        let open = state.open.as_ref().filter(|_| state.serves(Access::Read));
        work(open?.disk.as_ref())
    }

    /// Works with the image as a writer.
    pub fn write<R>(
        &self,
        context: Context<'_>,
        work: impl FnOnce(&dyn Disk) -> Result<R>,
    ) -> Result<R> {
        if !self.writable {
            return Err(Errno::EBADF.into());
        }
        self.touch();
        // With a way of its own the kernel remembers nothing that could be
        // outdated.
        let generation = self.file.passage().is_none().then_some(self.generation);
        self.file.run(context, Access::Write, generation, work)
    }

    /// Whether it may write.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// Whether it was opened to write, and nothing was written since: what has
    /// closed a copy of its descriptor then (a shell that redirects, dd, losetup)
    /// mostly is about to begin.
    pub fn is_about_to_write(&self) -> bool {
        let passage = self.file.passage().filter(|_| self.writable);
        passage.is_some_and(|passage| self.found.is_some() && self.found == passage.version())
    }

    /// Counts the handle as idle until its next use.
    pub fn rest(&self) {
        let mut uses = lock(&self.file.uses);
        if self.used.swap(false, Ordering::AcqRel) {
            uses.end(self.writable);
        }
    }

    /// Counts the handle as in use.
    pub fn touch(&self) {
        if self.used.load(Ordering::Acquire) {
            return;
        }
        let mut uses = lock(&self.file.uses);
        if !self.used.swap(true, Ordering::AcqRel) {
            uses.begin(self.writable);
        }
    }
}

impl State {
    /// Whether the image is open and locked for at least that access.
    fn serves(&self, access: Access) -> bool {
        self.open.as_ref().is_some_and(|open| {
            open.locked && (open.access == Access::Write || access != Access::Write)
        })
    }
}

impl Uses {
    fn begin(&mut self, writable: bool) {
        self.busy += 1;
        self.busy_writers += usize::from(writable);
    }

    fn end(&mut self, writable: bool) {
        self.busy -= 1;
        self.busy_writers -= usize::from(writable);
    }
}

/// What a handle needs the image for.
pub fn needed(writable: bool) -> Access {
    if writable {
        Access::Write
    } else {
        Access::Read
    }
}
