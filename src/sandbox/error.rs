//! Every way in which a sandbox can fail, one variant each.

use super::text::escape;
use instar_guest::Failure;
use instar_guest::proto::FileNo;
use nix::errno::Errno;
use std::fmt;
use std::time::Duration;

/// Why a call has no reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CallError {
    /// The guest refused the request, and says why.
    Refused(Failure),
    /// The sandbox failed; the session is dead.
    Sandbox(SandboxError),
}

impl From<SandboxError> for CallError {
    fn from(error: SandboxError) -> Self {
        Self::Sandbox(error)
    }
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(failure) => f.write_str(&escape(&failure.message)),
            Self::Sandbox(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for CallError {}

/// A sandbox that could not be made, or that ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SandboxError {
    /// The guest program cannot be loaded.
    Program(ProgramError),
    /// `/dev/kvm` cannot be opened.
    KvmMissing(Errno),
    /// KVM is there, but one of its operations failed.
    Kvm(&'static str, Errno),
    /// The host's memory or another of its resources ran out, or is forbidden.
    Host(&'static str, Errno),
    /// The process sandbox could not close itself; the step that failed.
    Confine(&'static str),

    /// The guest program was stopped by the processor or the kernel.
    Crashed(Crash),
    /// The guest stopped on a defect of its own. The text is escaped.
    Panicked(String),
    /// The guest's memory, in bytes, was not enough.
    OutOfMemory(u64),
    /// The guest computed for longer than this between two exits.
    CpuBudget(Duration),
    /// The guest left the sandbox more often than this for one request.
    ExitBudget(u64),
    /// The guest asked to read more than this many bytes for one request.
    ReadBudget(u64),
    /// The guest waits for nothing that could come (process sandbox).
    Stalled,

    /// The guest comes from another build.
    WrongBuild,
    /// The doorbell was rung with a value that means nothing.
    UnknownRing(u32),
    /// The doorbell was rung while nothing was asked (process sandbox).
    RangUnasked,
    /// A message is longer than allowed.
    MessageTooLong {
        /// Its length in bytes.
        len: u64,
        /// The most that is allowed.
        max: u64,
    },
    /// A message does not lie in the memory that is shared with the host.
    MessageOutside {
        /// Guest address of its first byte.
        addr: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// A message means nothing.
    Undecodable,
    /// A message goes on after its end.
    TrailingBytes(usize),
    /// A read asks for more ranges than allowed.
    TooManyReads(usize),
    /// A read's buffer does not lie in the guest's heap.
    ReadOutside {
        /// Guest address of the buffer.
        addr: u64,
        /// Its length in bytes.
        len: u32,
    },
    /// A read names a file that the session does not have.
    UnknownFile(FileNo),
    /// A read begins or ends where no file can reach.
    ReadBeyond {
        /// Offset of its first byte.
        offset: u64,
        /// Its length in bytes.
        len: u32,
    },
}

impl fmt::Display for SandboxError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Program(error) => write!(f, "the sandbox's program cannot be loaded: {error}"),
            Self::KvmMissing(Errno::ENOENT) => write!(
                f,
                "/dev/kvm does not exist; load the kvm module or choose --isolation=process"
            ),
            Self::KvmMissing(Errno::EACCES) => write!(
                f,
                "/dev/kvm may not be opened; join the group that owns it (kvm) or choose --isolation=process"
            ),
            Self::KvmMissing(errno) => write!(
                f,
                "/dev/kvm cannot be opened ({}); choose --isolation=process to do without",
                errno.desc()
            ),
            Self::Kvm(what, errno) => write!(f, "KVM cannot {what}: {}", errno.desc()),
            Self::Host(what, errno) => {
                write!(f, "the sandbox cannot {what}: {}", errno.desc())
            }
            Self::Confine(step) => write!(f, "the sandbox's process cannot {step}"),
            Self::Crashed(crash) => write!(f, "the guest crashed on this image: {crash}"),
            Self::Panicked(text) => write!(f, "the guest stopped on a defect: {text}"),
            Self::OutOfMemory(memory) => write!(
                f,
                "the guest ran out of memory: this image needs more than {} MiB",
                memory >> 20
            ),
            Self::CpuBudget(budget) => write!(
                f,
                "the guest computed for more than {} s on this image without getting anywhere",
                budget.as_secs_f64()
            ),
            Self::ExitBudget(budget) => {
                write!(
                    f,
                    "the guest left the sandbox more than {budget} times for one request"
                )
            }
            Self::ReadBudget(budget) => {
                write!(
                    f,
                    "the guest asked for more than {budget} bytes for one request"
                )
            }
            Self::Stalled => write!(f, "the guest waits for an answer to nothing"),
            Self::WrongBuild => write!(
                f,
                "the guest comes from another build than this program; build again"
            ),
            Self::UnknownRing(value) => {
                write!(f, "the guest rang with {value:#x}, which means nothing")
            }
            Self::RangUnasked => write!(f, "the guest rang while nothing was asked"),
            Self::MessageTooLong { len, max } => {
                write!(
                    f,
                    "a message of the guest has {len} bytes; {max} are allowed"
                )
            }
            Self::MessageOutside { addr, len } => write!(
                f,
                "a message of the guest ({len} bytes at {addr:#x}) lies outside the shared memory"
            ),
            Self::Undecodable => write!(f, "a message of the guest cannot be decoded"),
            Self::TrailingBytes(len) => {
                write!(f, "a message of the guest has {len} bytes after its end")
            }
            Self::TooManyReads(count) => {
                write!(f, "the guest asked for {count} ranges in one message")
            }
            Self::ReadOutside { addr, len } => write!(
                f,
                "the guest asked to read {len} bytes to {addr:#x}, outside its heap"
            ),
            Self::UnknownFile(FileNo(number)) => {
                write!(
                    f,
                    "the guest asked to read file {number}, which it does not have"
                )
            }
            Self::ReadBeyond { offset, len } => write!(
                f,
                "the guest asked to read {len} bytes at offset {offset}, where no file reaches"
            ),
        }
    }
}

impl std::error::Error for SandboxError {}

/// How the processor or the kernel stopped a guest program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crash {
    /// A fault; the VM has no handler for any.
    Fault,
    /// It halted the processor.
    Halted,
    /// An `out` to another port than the doorbell, or of another width.
    WrongPort {
        /// The port.
        port: u16,
        /// The width in bytes.
        size: usize,
    },
    /// An `in` from any port.
    PortRead(u16),
    /// An access to a physical address without memory.
    OutsideMemory(u64),
    /// Another exit of the VM, by name.
    Exit(&'static str),
    /// Its process was ended by this signal.
    Signal(i32),
    /// Its process was killed: strict seccomp's answer to a system call, unless
    /// someone else sent the signal.
    Killed,
    /// Its process ended by itself with this status.
    Exited(i32),
}

impl fmt::Display for Crash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Fault => write!(f, "a fault"),
            Self::Halted => write!(f, "it halted the processor"),
            Self::WrongPort { port, size } => {
                write!(f, "it wrote {size} bytes to I/O port {port:#x}")
            }
            Self::PortRead(port) => write!(f, "it read I/O port {port:#x}"),
            Self::OutsideMemory(addr) => write!(f, "it reached outside its memory ({addr:#x})"),
            Self::Exit(name) => write!(f, "the VM stopped with {name}"),
            Self::Signal(signal) => match nix::sys::signal::Signal::try_from(signal) {
                Ok(signal) => write!(f, "{signal}"),
                Err(_) => write!(f, "signal {signal}"),
            },
            Self::Killed => write!(
                f,
                "its process was killed, as it is for any system call (or by the system for want of memory)"
            ),
            Self::Exited(status) => write!(f, "its process ended with status {status}"),
        }
    }
}

/// What is wrong with a guest program's ELF file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProgramError {
    /// It is not an ELF file for this machine, or its headers are damaged.
    NotElf(String),
    /// It is not a program with fixed addresses.
    NotStatic,
    /// A segment lies outside the program's part of the address space.
    SegmentOutside {
        /// Address of its first byte.
        addr: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// A segment is writable and executable.
    WritableCode(u64),
    /// Two segments with different permissions lie in one 2 MiB page.
    MixedPage(u64),
    /// There is no stack, or something lies where it would overflow to.
    NoStack,
    /// The entry point is not in executable memory.
    Entry(u64),
}

impl fmt::Display for ProgramError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotElf(why) => write!(f, "not an x86-64 ELF file ({why})"),
            Self::NotStatic => write!(f, "not a static program"),
            Self::SegmentOutside { addr, len } => {
                write!(f, "a segment of {len} bytes at {addr:#x} is out of place")
            }
            Self::WritableCode(addr) => {
                write!(f, "the segment at {addr:#x} is writable and executable")
            }
            Self::MixedPage(addr) => {
                write!(
                    f,
                    "segments of different permissions share the page at {addr:#x}"
                )
            }
            Self::NoStack => write!(f, "no stack with nothing below it"),
            Self::Entry(addr) => write!(f, "the entry point {addr:#x} is not in code"),
        }
    }
}

impl From<ProgramError> for SandboxError {
    fn from(error: ProgramError) -> Self {
        Self::Program(error)
    }
}
