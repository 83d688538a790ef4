//! Putting an image in order that was not closed in order, before it is
//! changed.

use super::Access;
use super::change::Change;
use super::disk::{Image, Link, exclusive, hold, shared};
use super::error::{ErrorKind, Fault};
use super::resize::plan_in;
use instar_guest::Request;

impl Image {
    /// Puts the image in order where it must be before a change; answers whether
    /// it had to be. The caller holds none of the locks.
    pub(super) fn put_in_order(&self) -> Result<bool, Fault> {
        if !self.is_unsettled() || self.access != Access::Write {
            return Ok(false);
        }
        let _flushing = hold(&self.flushing);
        let mut link = hold(&self.session);
        let _traffic = exclusive(&self.traffic);
        self.settle_held(&mut link).map(|why| why.is_some())
    }

    fn is_unsettled(&self) -> bool {
        shared(&self.facts).unsettled.is_some()
    }

    /// The same as the holder of everything; answers why it had to be done, if
    /// it had to.
    pub(super) fn settle_held(&self, link: &mut Link) -> Result<Option<String>, Fault> {
        let Some(why) = shared(&self.facts).unsettled.clone() else {
            return Ok(None);
        };
        self.settle(link)?;
        // After a change of names it has been read again already.
        if link.stale {
            self.reopen(link)?;
        }
        match self.is_unsettled() {
            false => Ok(Some(why)),
            true => Err(Fault::new(
                ErrorKind::BadGuest,
                "The sandbox's plan did not put the image in order",
            )),
        }
    }

    /// Gives back what an interrupted change left, which the guest wants done
    /// first. As the holder of the session and not of `traffic`.
    pub(super) fn settle_first(&self, link: &mut Link) -> Result<(), Fault> {
        let _traffic = exclusive(&self.traffic);
        self.settle(link)
    }

    fn settle(&self, link: &mut Link) -> Result<(), Fault> {
        self.writable()?;
        let change = Change {
            request: Request::Settle,
            limits: self.mending(),
            done: "is in order",
            telling: None,
        };
        self.change(link, change, |reply| plan_in(reply, "Settle"))
            .map(drop)
    }
}
