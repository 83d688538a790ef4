//! The guest's page tables: identity-mapped 2 MiB pages, all of them for ring 3,
//! each with the permissions that its contents need.
//!
//! Format: AMD64 Architecture Programmer's Manual, volume 2, section 5.3
//! (long-mode page translation).

use crate::sandbox::program::{Access, GuestProgram, pages};
use instar_guest::layout::{PAGE, PD, PDPT, WINDOW};

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;

/// Entries of one table page.
const ENTRIES: usize = 512;

/// The single entries of the two upper tables.
pub(super) const PML4_ENTRY: u64 = PDPT | PRESENT | WRITABLE | USER;
/// See [`PML4_ENTRY`].
pub(super) const PDPT_ENTRY: u64 = PD | PRESENT | WRITABLE | USER;

/// The page directory for a guest with `memory` bytes. Pages of the program
/// have its segments' permissions; the window is writable; the rest is not
/// mapped for ring 3.
pub(super) fn page_directory(program: &GuestProgram, memory: u64) -> [u64; ENTRIES] {
    let mut directory = [0; ENTRIES];
    // Page tables and task segment: for the processor itself, read-only.
    directory[0] = PRESENT | LARGE | ACCESSED | NO_EXECUTE;
    let segments = program
        .segments()
        .iter()
        .map(|segment| (pages(&segment.range), segment.access));
    let window = (pages(&(WINDOW..memory)), Access::Write);
    for (range, access) in segments.chain([window]) {
        for addr in range.step_by(PAGE as usize) {
            if let Some(entry) = directory.get_mut((addr / PAGE) as usize) {
                *entry = addr | PRESENT | USER | LARGE | ACCESSED | bits(access);
            }
        }
    }
    directory
}

fn bits(access: Access) -> u64 {
    match access {
        Access::Read => NO_EXECUTE,
        Access::Write => WRITABLE | NO_EXECUTE,
        Access::Execute => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use instar_guest::layout::STACK;

    fn permissions(entry: u64) -> (bool, bool) {
        (entry & WRITABLE != 0, entry & NO_EXECUTE == 0)
    }

    #[test]
    fn each_page_of_the_shipped_guest_has_its_own_permissions() {
        let directory = page_directory(&GuestProgram::shipped(), 64 << 20);
        let at = |addr: u64| directory[(addr / PAGE) as usize];
        assert_eq!(at(0) & (USER | WRITABLE), 0, "page tables and address 0");
        assert_eq!(permissions(at(0x20_0000)), (false, true), "code");
        assert_eq!(permissions(at(0x40_0000)), (false, false), "constants");
        assert_eq!(at(STACK - 1), 0, "below the stack");
        assert_eq!(permissions(at(STACK)), (true, false), "stack and statics");
        assert_eq!(permissions(at(WINDOW)), (true, false), "window");
        assert_eq!(permissions(at((64 << 20) - 1)), (true, false), "last page");
        assert_eq!(at(64 << 20), 0, "after the memory");
    }

    #[test]
    fn every_mapped_page_is_identity_mapped_for_ring_3() {
        let directory = page_directory(&GuestProgram::shipped(), 1 << 30);
        let mapped = directory.iter().enumerate().skip(1);
        for (number, entry) in mapped.filter(|(_, entry)| **entry != 0) {
            assert_eq!(entry & 0x000f_ffff_ffe0_0000, number as u64 * PAGE);
            assert_eq!(entry & (PRESENT | USER | LARGE), PRESENT | USER | LARGE);
        }
    }
}
