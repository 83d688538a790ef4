//! An image without a sandbox: while nothing is asked of it, its session goes
//! back, and the next request that needs one starts another.
//!
//! The mapping that is known stays, so data is still read and written in place.
//! A session that holds changes of the mapping stays, too: only its guest knows
//! them. The file does not change meanwhile: it is locked, or, if the lock was
//! given up, found unchanged before it is used again; the new session has to
//! find the facts that the last one found all the same.

use super::disk::{Image, Link, hold};
use super::error::Fault;
use super::guest::Guest;
use super::open::Guests;
use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

/// Where the guest of an image is, if it has one.
pub(super) struct Seat {
    guest: Option<Box<dyn Guest>>,
    guests: Guests,
    /// Exits of the guests that have left.
    exits: u64,
    /// When something was asked last.
    used: Instant,
}

impl Seat {
    pub fn new(guest: Box<dyn Guest>, guests: Guests) -> Self {
        Self {
            guest: Some(guest),
            guests,
            exits: 0,
            used: Instant::now(),
        }
    }

    /// The guest, to ask it something: a new one, which knows nothing, where
    /// there is none.
    pub fn guest(&mut self) -> Result<&mut dyn Guest, Fault> {
        self.used = Instant::now();
        let guest = match self.guest.take() {
            Some(guest) => guest,
            None => (self.guests)()?,
        };
        Ok(self.guest.insert(guest).as_mut())
    }

    pub fn is_empty(&self) -> bool {
        self.guest.is_none()
    }

    /// Gives the guest's sandbox back.
    pub fn leave(&mut self) {
        self.exits = self.exits();
        self.guest = None;
    }

    /// Exits from the sandbox so far.
    pub fn exits(&self) -> u64 {
        self.exits + self.guest.as_ref().map_or(0, |guest| guest.exits())
    }
}

impl Image {
    /// Gives the sandbox back, and those of the backing chain, where nothing
    /// has been asked of it for `after` and no change waits in it for a flush.
    /// Does not wait for whoever is asking. What was inflated goes, too.
    pub fn rest(&self, after: Duration) {
        if let Some(backing) = &self.backing {
            backing.rest(after);
        }
        let Some(mut link) = self.try_session() else {
            return;
        };
        let holds_changes = self.unflushed.load(Ordering::Acquire) || link.postponed.is_some();
        if !holds_changes && !link.seat.is_empty() && link.seat.used.elapsed() >= after {
            link.seat.leave();
            hold(&self.inflated).clear();
        }
    }

    /// Whether the image has no sandbox at the moment, its backing chain left
    /// aside.
    pub fn is_resting(&self) -> bool {
        hold(&self.session).seat.is_empty()
    }

    fn try_session(&self) -> Option<MutexGuard<'_, Link>> {
        match self.session.try_lock() {
            Ok(link) => Some(link),
            Err(TryLockError::Poisoned(error)) => Some(PoisonError::into_inner(error)),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Sees to it that there is a guest that knows the image as it is. A session
    /// that cannot be started is a failure of this request alone: nothing waits
    /// to be flushed.
    pub(super) fn make_ready(&self, link: &mut Link) -> Result<(), Fault> {
        let is_new = link.seat.is_empty();
        if is_new {
            link.seat.guest()?;
        }
        match (link.stale, is_new) {
            (true, _) => self.reopen(link),
            (false, true) => self.recognise(link),
            (false, false) => Ok(()),
        }
    }
}
