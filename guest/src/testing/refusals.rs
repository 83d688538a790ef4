//! Where in the source refusals were made: what tells a test which of the
//! checks of an engine a damaged image came upon.

use alloc::vec::Vec;
use core::cell::RefCell;
use core::panic::Location;

/// A place in the source.
pub type Place = &'static Location<'static>;

std::thread_local! {
    static NOTED: RefCell<Vec<Place>> = const { RefCell::new(Vec::new()) };
}

/// Takes note of a refusal.
pub fn note(place: Place) {
    NOTED.with_borrow_mut(|noted| noted.push(place));
}

/// The refusals of this thread since the last call.
pub fn noted() -> Vec<Place> {
    NOTED.take()
}
