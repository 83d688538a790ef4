//! The guest program: an ELF file, checked against the layout that host and
//! guest share.

use super::error::{ProgramError, SandboxError};
use super::process;
use instar_guest::layout::{PAGE, PROGRAM, STACK, STACK_SIZE, WINDOW};
use object::Endianness;
use object::elf::{EM_X86_64, ET_EXEC, FileHeader64, PF_W, PF_X, PT_DYNAMIC, PT_INTERP, PT_LOAD};
use object::read::elf::{FileHeader, ProgramHeader};
use std::borrow::Cow;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, OnceLock};

/// The guest that this build ships, as its build script made it.
static SHIPPED: &[u8] = include_bytes!(env!("INSTAR_GUEST_ELF"));

/// A program for the sandbox, checked and ready to be loaded.
#[derive(Clone, Debug)]
pub struct GuestProgram(Arc<Image>);

#[derive(Debug)]
struct Image {
    elf: Cow<'static, [u8]>,
    segments: Vec<Segment>,
    entry: u64,
    /// The program as something that can be executed, made at its first use.
    executable: OnceLock<OwnedFd>,
}

/// A loadable part of the program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    /// Guest addresses that it takes up.
    pub(super) range: Range<u64>,
    /// Where its bytes are in the ELF file. What the range has more is zeroes.
    pub(super) file: Range<usize>,
    /// What the guest may do there.
    pub(super) access: Access,
}

/// Permissions of memory; readable always.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// Constants.
    Read,
    /// Stack, statics, heap.
    Write,
    /// Code.
    Execute,
}

impl GuestProgram {
    /// The guest that this build ships.
    pub fn shipped() -> Self {
        // Built and linked by our own build script; a test loads it.
        Self::load(Cow::Borrowed(SHIPPED)).expect("the shipped guest is a valid program")
    }

    /// A program from an ELF file that is linked as the shipped one is.
    pub fn from_elf(elf: &[u8]) -> Result<Self, SandboxError> {
        Ok(Self::load(Cow::Owned(elf.to_vec()))?)
    }

    fn load(elf: Cow<'static, [u8]>) -> Result<Self, ProgramError> {
        let (segments, entry) = parse(&elf).map_err(|error| match error {
            ParseError::Object(error) => ProgramError::NotElf(error.to_string()),
            ParseError::Program(error) => error,
        })?;
        check_pages(&segments)?;
        check_stack(&segments)?;
        let in_code = |s: &&Segment| s.access == Access::Execute && s.range.contains(&entry);
        segments
            .iter()
            .find(in_code)
            .ok_or(ProgramError::Entry(entry))?;
        Ok(Self(Arc::new(Image {
            elf,
            segments,
            entry,
            executable: OnceLock::new(),
        })))
    }

    /// The program as a file that can be executed.
    pub(super) fn executable(&self) -> Result<BorrowedFd<'_>, SandboxError> {
        if let Some(file) = self.0.executable.get() {
            return Ok(file.as_fd());
        }
        let file = process::executable(&self.0.elf)?;
        Ok(self.0.executable.get_or_init(|| file).as_fd())
    }

    /// The parts to load.
    pub(super) fn segments(&self) -> &[Segment] {
        &self.0.segments
    }

    /// A part's bytes.
    pub(super) fn bytes(&self, segment: &Segment) -> &[u8] {
        self.0.elf.get(segment.file.clone()).unwrap_or_default()
    }

    /// Address of the first instruction.
    pub(super) fn entry(&self) -> u64 {
        self.0.entry
    }
}

enum ParseError {
    Object(object::read::Error),
    Program(ProgramError),
}

impl From<object::read::Error> for ParseError {
    fn from(error: object::read::Error) -> Self {
        Self::Object(error)
    }
}

impl From<ProgramError> for ParseError {
    fn from(error: ProgramError) -> Self {
        Self::Program(error)
    }
}

fn parse(elf: &[u8]) -> Result<(Vec<Segment>, u64), ParseError> {
    let header = FileHeader64::<Endianness>::parse(elf)?;
    let endian = header.endian()?;
    if header.e_machine(endian) != EM_X86_64 || endian != Endianness::Little {
        return Err(ProgramError::NotElf("for another processor".to_owned()).into());
    }
    let mut segments = Vec::new();
    if header.e_type(endian) != ET_EXEC {
        return Err(ProgramError::NotStatic.into());
    }
    for entry in header.program_headers(endian, elf)? {
        match entry.p_type(endian) {
            PT_LOAD => segments.extend(segment(entry, endian, elf)?),
            PT_INTERP | PT_DYNAMIC => return Err(ProgramError::NotStatic.into()),
            _ => {}
        }
    }
    Ok((segments, header.e_entry(endian)))
}

/// A loadable segment, or none if it is empty.
fn segment(
    entry: &object::elf::ProgramHeader64<Endianness>,
    endian: Endianness,
    elf: &[u8],
) -> Result<Option<Segment>, ProgramError> {
    let (addr, len) = (entry.p_vaddr(endian), entry.p_memsz(endian));
    let outside = ProgramError::SegmentOutside { addr, len };
    let end = addr.checked_add(len).ok_or(outside.clone())?;
    let (offset, file_len) = entry.file_range(endian);
    if len == 0 {
        return Ok(None);
    }
    if addr < PROGRAM || end > WINDOW || file_len > len {
        return Err(outside);
    }
    let file = usize::try_from(offset)
        .ok()
        .zip(usize::try_from(file_len).ok())
        .and_then(|(start, len)| Some(start..start.checked_add(len)?))
        .filter(|file| file.end <= elf.len())
        .ok_or_else(|| ProgramError::NotElf("a segment ends after the file".to_owned()))?;
    let flags = entry.p_flags(endian).0;
    let access = match (flags & PF_W.0 != 0, flags & PF_X.0 != 0) {
        (true, true) => return Err(ProgramError::WritableCode(addr)),
        (true, false) => Access::Write,
        (false, true) => Access::Execute,
        (false, false) => Access::Read,
    };
    Ok(Some(Segment {
        range: addr..end,
        file,
        access,
    }))
}

/// Permissions are per 2 MiB page, so no page may need two. (The window begins in
/// the stack's page, so it is covered, too.)
fn check_pages(segments: &[Segment]) -> Result<(), ProgramError> {
    for (at, a) in segments.iter().enumerate() {
        for b in segments.iter().skip(at + 1) {
            let shared = pages(&a.range).start.max(pages(&b.range).start);
            let overlaps = a.range.start < b.range.end && b.range.start < a.range.end;
            let meets = shared < pages(&a.range).end.min(pages(&b.range).end);
            if overlaps || (meets && a.access != b.access) {
                return Err(ProgramError::MixedPage(shared));
            }
        }
    }
    Ok(())
}

/// The stack is where the start-up code expects it, above an unmapped page.
fn check_stack(segments: &[Segment]) -> Result<(), ProgramError> {
    let stack = STACK..STACK + STACK_SIZE;
    let has_stack = segments
        .iter()
        .any(|s| s.access == Access::Write && s.range == stack);
    let guard = STACK - PAGE..STACK;
    let guarded = segments
        .iter()
        .all(|s| s.range.end <= guard.start || s.range.start >= guard.end);
    if has_stack && guarded {
        Ok(())
    } else {
        Err(ProgramError::NoStack)
    }
}

/// The whole 2 MiB pages around a range of addresses.
pub(super) fn pages(range: &Range<u64>) -> Range<u64> {
    range.start / PAGE * PAGE..range.end.next_multiple_of(PAGE)
}

#[cfg(test)]
mod tests;
