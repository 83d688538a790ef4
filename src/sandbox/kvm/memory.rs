//! The VM's memory: one anonymous mapping, aligned so that the host can back
//! the heap with the same 2 MiB pages as the guest's page tables.
//!
//! What a short session uses - program, stack, mailbox, the heap's beginning - is
//! in small pages. A huge page saves a few page faults where the host has one at
//! hand, but is cleared as a whole, and a host that is itself a virtual machine
//! may have given it back to its own: then its first touch takes longer than all
//! the rest of the session.
#![allow(unsafe_code)]

use super::{cpu, failed, paging};
use crate::sandbox::error::SandboxError;
use crate::sandbox::program::GuestProgram;
use instar_guest::layout::{PAGE, PD, PDPT, PML4, STACK, STACK_TOP, TSS, WINDOW};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use nix::errno::Errno;
use nix::sys::mman::{MmapAdvise, madvise};
use std::ops::Range;
use std::ptr::NonNull;
use vm_memory::{Bytes, MmapRegion, VolatileMemory, VolatileSlice};

/// What every session writes to: the top of the stack, the statics, the mailbox
/// and the beginning of the heap.
const WARM: Range<u64> = STACK_TOP - (16 << 10)..HUGE;

/// From here on the memory is heap alone, in huge pages if the host has them.
const HUGE: u64 = STACK + PAGE;

/// Guest-physical memory from address 0 on.
pub(super) struct Memory {
    region: MmapRegion,
    /// Offset of guest address 0 in the region.
    start: usize,
    len: u64,
}

impl Memory {
    /// `len` bytes of zeroes; nothing is allocated before it is touched.
    pub(super) fn new(len: u64) -> Result<Self, SandboxError> {
        let page = PAGE as usize;
        // One page more, to begin at a multiple of its size.
        let region = MmapRegion::new(len as usize + page).map_err(out_of_memory)?;
        let start = region.as_ptr().align_offset(page);
        let memory = Self { region, start, len };
        memory.hint(0..HUGE, MmapAdvise::MADV_NOHUGEPAGE);
        memory.hint(HUGE..len, MmapAdvise::MADV_HUGEPAGE);
        Ok(memory)
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// What host and guest share.
    pub(super) fn window(&self) -> VolatileSlice<'_> {
        self.slice(WINDOW, self.len - WINDOW)
    }

    /// Writes page tables and program into fresh memory.
    pub(super) fn load(&self, program: &GuestProgram) -> Result<(), SandboxError> {
        self.put(PML4, &paging::PML4_ENTRY.to_le_bytes())?;
        self.put(PDPT, &paging::PDPT_ENTRY.to_le_bytes())?;
        for (at, entry) in paging::page_directory(program, self.len).iter().enumerate() {
            self.put(PD + 8 * at as u64, &entry.to_le_bytes())?;
        }
        self.put(TSS, &cpu::task_segment())?;
        // Small pages come cheapest many at once.
        self.hint(WARM, MmapAdvise::MADV_POPULATE_WRITE);
        for segment in program.segments() {
            let bytes = program.bytes(segment);
            let start = segment.range.start;
            let end = start + bytes.len() as u64;
            self.hint(start..end, MmapAdvise::MADV_POPULATE_WRITE);
            self.put(start, bytes)?;
        }
        Ok(())
    }

    /// Makes all that the guest could write as it was after [`load`](Self::load).
    /// Code, constants and page tables it could not.
    ///
    /// Clearing what is warm costs less than giving it back and touching it
    /// anew. The rest goes back, which costs next to nothing where it was not
    /// touched.
    pub(super) fn reset(&self, program: &GuestProgram) -> Result<(), SandboxError> {
        let warm = self.slice(WARM.start, WARM.end - WARM.start);
        // SAFETY: the slice's bytes, of our mapping. The guest, their only other
        // user, is stopped, and no reference to them exists.
        unsafe { warm.ptr_guard_mut().as_ptr().write_bytes(0, warm.len()) };
        self.give_back(STACK..WARM.start)?;
        self.release()?;
        for segment in program.segments() {
            if segment.range.start >= STACK {
                self.put(segment.range.start, program.bytes(segment))?;
            }
        }
        Ok(())
    }

    /// Gives the host back what only some sessions use: all of the heap but its
    /// beginning.
    pub(super) fn release(&self) -> Result<(), SandboxError> {
        self.give_back(HUGE..self.len)
    }

    fn give_back(&self, range: Range<u64>) -> Result<(), SandboxError> {
        self.advise(range, MmapAdvise::MADV_DONTNEED)
            .map_err(|errno| SandboxError::Host("drop guest memory", errno))
    }

    /// Gives the memory to a VM.
    pub(super) fn register(&self, vm: &VmFd) -> Result<(), SandboxError> {
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: self.len,
            userspace_addr: self.host_address(0).as_ptr() as u64,
        };
        // SAFETY: the range is mapped as long as `self` lives, and `Vm` drops
        // the VM before the memory. Rust code reaches it through volatile
        // slices only.
        unsafe { vm.set_user_memory_region(region) }.map_err(failed("give memory to the VM"))
    }

    fn put(&self, addr: u64, bytes: &[u8]) -> Result<(), SandboxError> {
        self.slice(addr, bytes.len() as u64)
            .write_slice(bytes, 0)
            .map_err(|_| SandboxError::Host("load the program", Errno::EFAULT))
    }

    /// Guest addresses that the layout's constants and the checked program
    /// place inside the smallest memory.
    fn slice(&self, addr: u64, len: u64) -> VolatileSlice<'_> {
        assert!(addr.checked_add(len).is_some_and(|end| end <= self.len));
        self.region
            .get_slice(self.start + addr as usize, len as usize)
            .expect("the region holds all guest memory")
    }

    fn host_address(&self, addr: u64) -> NonNull<u8> {
        let first = self.slice(addr, 1).ptr_guard_mut().as_ptr();
        NonNull::new(first).expect("a mapping is not at address 0")
    }

    /// Advice for speed alone: where the kernel declines it, everything works with
    /// more page faults.
    fn hint(&self, range: Range<u64>, advice: MmapAdvise) {
        self.advise(range, advice).ok();
    }

    fn advise(&self, range: Range<u64>, advice: MmapAdvise) -> Result<(), Errno> {
        let len = (range.end - range.start) as usize;
        // SAFETY: the range is ours. The advice used here changes how it is
        // backed, or empties it; the content is plain bytes and no reference to
        // it exists.
        unsafe { madvise(self.host_address(range.start).cast(), len, advice) }
    }
}

fn out_of_memory(_: vm_memory::mmap::MmapRegionError) -> SandboxError {
    SandboxError::Host("reserve memory for the guest", Errno::ENOMEM)
}
