//! The allocator: talc over the rest of the window, taken page by page so that
//! a small request touches few pages.
#![allow(unsafe_code)]

use core::alloc::{GlobalAlloc, Layout};
use core::cell::Cell;
use core::ptr::NonNull;
use instar_guest::layout::{HEAP, PAGE};
use talc::TalcCell;
use talc::base::{Talc, binning::Binning};
use talc::source::Source;

struct Heap {
    talc: TalcCell<Pages>,
    /// Whether the last allocation failed: what tells a panic for want of
    /// memory from any other.
    exhausted: Cell<bool>,
}

// SAFETY: the program has one thread and no signal handlers.
unsafe impl Sync for Heap {}

#[global_allocator]
static ALLOCATOR: Heap = Heap {
    talc: TalcCell::new(Pages::NONE),
    exhausted: Cell::new(false),
};

/// Gives the allocator the window from [`HEAP`] to `end`.
///
/// # Safety
/// Called once, before the first allocation, and `HEAP..end` is mapped
/// read-write and used by nothing else.
pub(super) unsafe fn init(end: u64) {
    ALLOCATOR.talc.replace_source(Pages { top: None, end });
}

/// Whether the last thing that happened was a failed allocation.
pub(super) fn exhausted() -> bool {
    ALLOCATOR.exhausted.get()
}

/// The window's pages, handed to talc in address order.
#[derive(Debug)]
struct Pages {
    /// End of what talc has.
    top: Option<NonNull<u8>>,
    /// End of the window.
    end: u64,
}

impl Pages {
    const NONE: Self = Self { top: None, end: 0 };
}

// SAFETY: `acquire` uses nothing but the `talc` that it is given.
unsafe impl Source for Pages {
    fn acquire<B: Binning>(talc: &mut Talc<Self, B>, layout: Layout) -> Result<(), ()> {
        let base = talc.source.top.map_or(HEAP, |top| top.as_ptr() as u64);
        let wanted = (layout.size() as u64)
            .checked_add(layout.align() as u64)
            .and_then(|len| base.checked_add(len))
            .and_then(|end| end.checked_add(SLACK))
            .and_then(|end| end.checked_next_multiple_of(PAGE))
            .ok_or(())?;
        let new_end = wanted.min(talc.source.end);
        if new_end <= base + SLACK {
            return Err(());
        }
        let top = match talc.source.top {
            // SAFETY: `init`'s caller says that the memory is free to use, and
            // `new_end` is at most its end.
            None => unsafe { talc.claim(HEAP as *mut u8, (new_end - HEAP) as usize) }.ok_or(())?,
            // SAFETY: as above; `top` is the end of the one heap that was
            // claimed, as its last `claim` or `extend` returned it.
            Some(top) => unsafe { talc.extend(top, new_end as *mut u8) },
        };
        talc.source.top = Some(top);
        Ok(())
    }
}

/// Room for talc's own tables and tags, so that what was asked for fits.
const SLACK: u64 = 4096;

// SAFETY: every method passes to talc, which upholds the contract.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's contract is talc's.
        self.note(unsafe { self.talc.alloc(layout) })
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract is talc's.
        unsafe { self.talc.dealloc(ptr, layout) };
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: the caller's contract is talc's.
        self.note(unsafe { self.talc.realloc(ptr, layout, new_size) })
    }
}

impl Heap {
    fn note(&self, allocated: *mut u8) -> *mut u8 {
        self.exhausted.set(allocated.is_null());
        allocated
    }
}
