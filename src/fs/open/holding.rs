//! When the image behind an open file is opened, locked and closed, and how it
//! is told that somebody else has changed it in between.

use super::{Context, Left, OpenFile, Opened, State, needed};
use crate::fs::disk::{At, Disk};
use crate::fs::error::{Error, Result};
use crate::fs::memory::Stale;
use crate::fs::source::Stat;
use crate::fs::sync::{lock, try_write, write};
use crate::fs::tail::Tailed;
use crate::image::Access;
use instar_guest::proto::Format;
use nix::errno::Errno;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::{Arc, RwLockWriteGuard};

/// Held while the name of an image changes: nobody can open it meanwhile.
pub struct Paused<'a>(
    #[expect(dead_code, reason = "held, not looked at")] RwLockWriteGuard<'a, State>,
);

impl OpenFile {
    /// Closes the image, everything durable, and keeps it closed while its name
    /// changes. Its next user opens it under the name that it has then.
    pub fn pause(&self, context: Context<'_>) -> Result<Paused<'_>> {
        let mut state = write(&self.state);
        self.put_down(context, &mut state)?;
        state.open = None;
        *lock(&self.size) = None;
        Ok(Paused(state))
    }

    /// Waits for whoever works with the image, and makes it durable, so that
    /// whoever pauses or pins it next has little to wait for. Why that fails
    /// they will see.
    pub fn calm(&self) {
        let _ = self.flush();
        drop(write(&self.state));
    }

    /// Makes the image durable and takes note of what it is like, before it is
    /// closed to be opened again.
    fn put_down(&self, context: Context<'_>, state: &mut State) -> Result<()> {
        if let Some(open) = state.open.as_ref().filter(|open| open.locked) {
            if open.access == Access::Write {
                open.disk.flush()?;
            }
            state.left = self.note_version(context, open.disk.as_ref());
        }
        Ok(())
    }

    /// Opens and locks the image for good, as its name is going to be removed:
    /// from now on nothing could find it again. `writable` says whether any of
    /// the handles may write.
    pub fn pin(&self, context: Context<'_>, writable: bool) -> Result<()> {
        let mut state = write(&self.state);
        let secured = self.secure(context, &mut state, needed(writable));
        state.pinned = true;
        secured
    }

    /// The name is still there.
    pub fn unpin(&self) {
        write(&self.state).pinned = false;
    }

    /// Gives up the locks unless a handle in use needs them.
    pub(super) fn let_go(
        &self,
        context: Context<'_>,
        mut state: RwLockWriteGuard<'_, State>,
    ) -> Result<()> {
        if state.pinned {
            return Ok(());
        }
        let Some(open) = state.open.as_mut().filter(|open| open.locked) else {
            return Ok(());
        };
        if open.disk.is_dirty() {
            return Ok(());
        }
        let uses = lock(&self.uses);
        if uses.busy_writers > 0 {
            return Ok(());
        }
        if uses.busy == 0 {
            let left = self.note_version(context, open.disk.as_ref());
            open.disk.unlock()?;
            open.locked = false;
            state.left = left;
            *lock(&self.size) = None;
        } else if open.access == Access::Write {
            let left = self.note_version(context, open.disk.as_ref());
            state.left = left;
            state.open = None;
            *lock(&self.size) = None;
        }
        Ok(())
    }

    /// Notices that an image that is open without a lock has changed. One that
    /// is in use is left alone: its users notice it themselves.
    pub fn refresh(&self, context: Context<'_>) {
        let Some(mut state) = try_write(&self.state) else {
            return;
        };
        if self.passage().is_some() {
            return;
        }
        let Some(open) = state.open.as_ref().filter(|open| !open.locked) else {
            return;
        };
        let Ok(stat) = self.whole(context, open.disk.as_ref()) else {
            return;
        };
        if !context.memory.is_current(self.node.id, &stat) {
            state.open = None;
            state.left = Left::As(stat);
            self.note_change(context, &mut state);
            context.memory.leave(self.node.id, &stat);
        }
    }

    /// What the kernel has cached of the content is still right: nobody has
    /// changed it since the locks were given up.
    pub(super) fn is_current(&self, context: Context<'_>, state: &State) -> bool {
        state.open.as_ref().is_some_and(|open| {
            let stat = self.whole(context, open.disk.as_ref());
            stat.is_ok_and(|stat| context.memory.is_current(self.node.id, &stat))
        })
    }

    /// Attributes of the image file that change with every file of the image.
    fn whole(&self, context: Context<'_>, disk: &dyn Disk) -> Result<Stat> {
        let image = context.source.stat(&self.node.path())?;
        self.fingerprint(image, disk)
    }

    fn fingerprint(&self, image: Stat, disk: &dyn Disk) -> Result<Stat> {
        let parts = disk.parts()?;
        if parts.is_empty() {
            return Ok(image);
        }
        // A fingerprint: it serves no other purpose than to be compared.
        let mut hasher = DefaultHasher::new();
        (image.size, parts).hash(&mut hasher);
        Ok(Stat {
            size: hasher.finish(),
            ..image
        })
    }

    /// Remembers what the file is like while it is still locked.
    fn note_version(&self, context: Context<'_>, disk: &dyn Disk) -> Left {
        let image = context.source.stat(&self.node.path());
        let whole = image.and_then(|image| {
            self.node.note(&image);
            self.fingerprint(image, disk)
        });
        match whole {
            Ok(stat) if self.passage().is_some() => Left::As(stat),
            Ok(stat) => {
                context.memory.leave(self.node.id, &stat);
                Left::As(stat)
            }
            Err(_) => {
                context.memory.forget(self.node.id);
                Left::Unknown
            }
        }
    }

    /// Somebody else has changed the image: nobody may go on with what they
    /// know of it.
    pub(super) fn note_change(&self, context: Context<'_>, state: &mut State) {
        state.generation += 1;
        *lock(&self.size) = None;
        context.memory.invalidate(self.node.id, Stale::Content);
    }

    /// Opens or locks the image for at least that access.
    pub(super) fn secure(
        &self,
        context: Context<'_>,
        state: &mut State,
        access: Access,
    ) -> Result<()> {
        if state.serves(access) {
            return Ok(());
        }
        if state.pinned {
            return Err(Error::new(
                Errno::ESTALE,
                format!(
                    "{}: the image has no name any more, and was not open for this",
                    context.source.display(&self.node.path()).display()
                ),
            ));
        }
        let wanted = if lock(&self.uses).busy_writers > 0 {
            Access::Write
        } else {
            access
        };
        if let Some(open) = &mut state.open
            && open.access == wanted
        {
            match open.disk.lock() {
                Ok(()) => {
                    open.locked = true;
                    self.note_size(open.disk.virtual_size());
                    state.left = Left::Not;
                    return Ok(());
                }
                Err(error) if error.errno == Errno::ESTALE => {
                    state.open = None;
                    state.left = Left::Not;
                    self.note_change(context, state);
                }
                Err(error) => return Err(error),
            }
        }
        self.reopen(context, state, wanted)
            .inspect_err(|_| *lock(&self.size) = None)
    }

    /// Opens the image anew: our own locks stand in the way of a change from
    /// reading to writing, so they go first.
    fn reopen(&self, context: Context<'_>, state: &mut State, access: Access) -> Result<()> {
        let path = &*self.node.path();
        self.put_down(context, state)?;
        state.open = None;
        let write = access == Access::Write;
        let (file, stat) = context.source.open_file(path, write)?;
        if stat.id != self.node.file() {
            return Err(Errno::ESTALE.into());
        }
        let at = At {
            source: context.source,
            path,
            format: context.catalog.format_for(path),
        };
        let opened = context.catalog.library().open(at, file, access);
        let disk = opened.map_err(Error::of_opening)?;
        let disk: Arc<dyn Disk> = match write {
            true => Arc::new(Tailed::new(disk, context.source.display(path))),
            false => disk,
        };
        if at.format.is_none() && disk.format() == Format::Raw {
            return Err(Error::new(
                Errno::EIO,
                format!(
                    "{}: no image any more; a raw image needs a name that says so, as .raw, \
                     or -o format=GLOB:raw",
                    context.source.display(path).display()
                ),
            ));
        }
        let changed = match &state.left {
            Left::Not => false,
            Left::As(before) => !same_content(before, &self.whole(context, disk.as_ref())?),
            Left::Unknown => true,
        };
        if changed {
            self.note_change(context, state);
        }
        state.left = Left::Not;
        self.note_size(disk.virtual_size());
        state.open = Some(Opened {
            disk,
            access,
            locked: true,
        });
        Ok(())
    }
}

/// Whether nobody has written in between.
fn same_content(before: &Stat, after: &Stat) -> bool {
    (before.id, before.size, before.mtime) == (after.id, after.size, after.mtime)
}
