//! ELF files that are wrong in one place each, made by patching the shipped one.

use super::*;

const EHDR_TYPE: usize = 0x10;
const EHDR_MACHINE: usize = 0x12;
const EHDR_ENTRY: usize = 0x18;
const EHDR_PHOFF: usize = 0x20;
const PHDRS: usize = 64;
const PHDR_SIZE: usize = 56;
const P_TYPE: usize = 0;
const P_FLAGS: usize = 4;
const P_OFFSET: usize = 8;
const P_VADDR: usize = 16;
const P_FILESZ: usize = 32;
const P_MEMSZ: usize = 40;

/// Program headers of the shipped guest, in the order of its linker script.
const CODE: usize = 0;
const CONSTANTS: usize = 1;
const THE_STACK: usize = 2;
const STATICS: usize = 3;

const READ_EXECUTE: u64 = 5;
const READ_WRITE_EXECUTE: u64 = 7;

/// Loads the shipped guest with some bytes of it replaced.
fn patched(patches: &[(usize, &[u8])]) -> Result<GuestProgram, ProgramError> {
    let mut elf = SHIPPED.to_vec();
    for (at, bytes) in patches {
        elf[*at..at + bytes.len()].copy_from_slice(bytes);
    }
    GuestProgram::load(Cow::Owned(elf))
}

/// Loads it with one field of a program header replaced.
fn with_header(header: usize, field: usize, value: u64) -> Result<GuestProgram, ProgramError> {
    let at = PHDRS + header * PHDR_SIZE + field;
    let width = if field < P_OFFSET { 4 } else { 8 };
    patched(&[(at, &value.to_le_bytes()[..width])])
}

fn refused(result: Result<GuestProgram, ProgramError>) -> ProgramError {
    result.expect_err("the program is wrong")
}

#[test]
fn the_shipped_guest_is_laid_out_as_the_linker_script_says() {
    let program = GuestProgram::shipped();
    let starts: Vec<(u64, Access)> = program
        .segments()
        .iter()
        .map(|segment| (segment.range.start, segment.access))
        .collect();
    assert_eq!(
        starts,
        [
            (PROGRAM, Access::Execute),
            (0x40_0000, Access::Read),
            (STACK, Access::Write),
            (STACK + STACK_SIZE, Access::Write),
        ]
    );
}

#[test]
fn a_file_that_is_no_elf_file_is_refused() {
    for bytes in [&[][..], b"#!/bin/sh\n", &SHIPPED[..40], &[0; 4096]] {
        let error = refused(GuestProgram::load(Cow::Borrowed(bytes)));
        assert!(matches!(error, ProgramError::NotElf(_)), "{error:?}");
    }
}

#[test]
fn a_truncated_program_is_refused() {
    let cut = Cow::Borrowed(&SHIPPED[..0x1100]);
    let text = "a segment ends after the file".to_owned();
    assert_eq!(refused(GuestProgram::load(cut)), ProgramError::NotElf(text));
}

#[test]
fn headers_outside_the_file_are_refused() {
    let far = (SHIPPED.len() as u64).to_le_bytes();
    let error = refused(patched(&[(EHDR_PHOFF, &far)]));
    assert!(matches!(error, ProgramError::NotElf(_)), "{error:?}");
}

#[test]
fn a_program_for_another_processor_is_refused() {
    const EM_AARCH64: u8 = 183;
    let error = refused(patched(&[(EHDR_MACHINE, &[EM_AARCH64, 0])]));
    assert_eq!(
        error,
        ProgramError::NotElf("for another processor".to_owned())
    );
}

#[test]
fn a_relocatable_or_dynamic_program_is_refused() {
    const ET_DYN: u8 = 3;
    let relocatable = patched(&[(EHDR_TYPE, &[ET_DYN, 0])]);
    assert_eq!(refused(relocatable), ProgramError::NotStatic);
    for kind in [PT_DYNAMIC, PT_INTERP] {
        let dynamic = with_header(CONSTANTS, P_TYPE, kind.0.into());
        assert_eq!(refused(dynamic), ProgramError::NotStatic);
    }
}

#[test]
fn a_segment_outside_the_programs_part_is_refused() {
    let len = GuestProgram::shipped().segments()[CONSTANTS].range.clone();
    let len = len.end - len.start;
    for addr in [0, PROGRAM - 1, WINDOW - 1, WINDOW, u64::MAX - 1] {
        let error = refused(with_header(CONSTANTS, P_VADDR, addr));
        assert_eq!(error, ProgramError::SegmentOutside { addr, len });
    }
    let error = refused(with_header(STATICS, P_MEMSZ, u64::MAX));
    let addr = STACK + STACK_SIZE;
    let len = u64::MAX;
    assert_eq!(error, ProgramError::SegmentOutside { addr, len });
}

#[test]
fn a_segment_with_more_bytes_than_memory_is_refused() {
    let segment = GuestProgram::shipped().segments()[CONSTANTS].clone();
    let len = segment.range.end - segment.range.start;
    let error = refused(with_header(CONSTANTS, P_FILESZ, len + 1));
    let addr = segment.range.start;
    assert_eq!(error, ProgramError::SegmentOutside { addr, len });
}

#[test]
fn writable_code_is_refused() {
    let error = refused(with_header(CODE, P_FLAGS, READ_WRITE_EXECUTE));
    assert_eq!(error, ProgramError::WritableCode(PROGRAM));
}

#[test]
fn two_permissions_in_one_page_are_refused() {
    let error = refused(with_header(CONSTANTS, P_VADDR, PROGRAM + 0x10_0000));
    assert_eq!(error, ProgramError::MixedPage(PROGRAM));
}

#[test]
fn code_in_the_page_of_the_window_is_refused() {
    let error = refused(with_header(STATICS, P_FLAGS, READ_EXECUTE));
    assert_eq!(error, ProgramError::MixedPage(STACK));
}

#[test]
fn a_program_without_a_guarded_stack_is_refused() {
    const PT_NULL: u64 = 0;
    let without = with_header(THE_STACK, P_TYPE, PT_NULL);
    assert_eq!(refused(without), ProgramError::NoStack);
    let elsewhere = with_header(THE_STACK, P_MEMSZ, STACK_SIZE / 2);
    assert_eq!(refused(elsewhere), ProgramError::NoStack);
    let below = with_header(CONSTANTS, P_VADDR, STACK - PAGE);
    assert_eq!(refused(below), ProgramError::NoStack);
}

#[test]
fn an_entry_point_outside_code_is_refused() {
    for entry in [0, 0x40_0000, STACK, u64::MAX] {
        let error = refused(patched(&[(EHDR_ENTRY, &entry.to_le_bytes())]));
        assert_eq!(error, ProgramError::Entry(entry));
    }
}
