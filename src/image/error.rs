//! Why an operation on an image failed: a kind for programs, a text for people,
//! and the one table from kinds to errno.

use crate::sandbox::{CallError, SandboxError, escape_deceptive};
use instar_guest::{Failure, FailureKind};
use nix::errno::Errno;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// The longest text from a guest that reaches a terminal or a log, in bytes.
const MAX_MESSAGE: usize = 1024;
/// The longest name from an image that is quoted in a text, in bytes.
const MAX_NAME: usize = 256;

/// What went wrong, for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The file does not hold the format that was asked for.
    NotThisFormat,
    /// The image's metadata contradicts itself or the format's specification.
    Damaged,
    /// A feature, a format or a request that instar does not handle.
    Unsupported,
    /// The disk ends inside a unit that only the backing image holds, which
    /// goes on behind it.
    OwnUnitFirst,
    /// A change of the image was interrupted and left something.
    SettleFirst,
    /// The request makes no sense for this image.
    InvalidRequest,
    /// The result would be past what the format or the sandbox can express.
    TooLarge,
    /// Allowed only with an explicit option.
    NotPermitted,
    /// The image needs more memory than the sandbox has.
    GuestMemory,
    /// The guest program contradicts itself or breaks the protocol: what it
    /// asked for was not done.
    BadGuest,
    /// The sandbox ended the session.
    Sandbox,
    /// Changes that were never flushed went down with their session; the image
    /// has to be opened again.
    Lost,
    /// Another process holds the image.
    Locked,
    /// The file changed while it was not locked, or was replaced.
    Stale,
    /// The gate does not let this image name that file.
    Forbidden,
    /// The image was opened for reading only, or cannot be written at all.
    ReadOnly,
    /// Not a regular file.
    NotAFile,
    /// The operating system refused, with this errno.
    Os(i32),
}

impl ErrorKind {
    /// The errno that a system call on a mounted image answers.
    pub fn errno(self) -> i32 {
        match self {
            Self::NotThisFormat
            | Self::Damaged
            | Self::GuestMemory
            | Self::BadGuest
            | Self::Sandbox
            | Self::Lost => libc::EIO,
            Self::Unsupported | Self::OwnUnitFirst => libc::EOPNOTSUPP,
            Self::SettleFirst => libc::EIO,
            Self::InvalidRequest | Self::NotAFile => libc::EINVAL,
            Self::TooLarge => libc::EFBIG,
            Self::NotPermitted | Self::Forbidden => libc::EPERM,
            Self::Locked => libc::EBUSY,
            Self::Stale => libc::ESTALE,
            Self::ReadOnly => libc::EROFS,
            Self::Os(errno) => errno,
        }
    }
}

impl From<FailureKind> for ErrorKind {
    fn from(kind: FailureKind) -> Self {
        match kind {
            FailureKind::NotThisFormat => Self::NotThisFormat,
            FailureKind::Damaged => Self::Damaged,
            FailureKind::Unsupported => Self::Unsupported,
            FailureKind::OwnUnitFirst => Self::OwnUnitFirst,
            FailureKind::SettleFirst => Self::SettleFirst,
            FailureKind::InvalidRequest => Self::InvalidRequest,
            FailureKind::TooLarge => Self::TooLarge,
            FailureKind::NotPermitted => Self::NotPermitted,
            FailureKind::OutOfMemory | FailureKind::FlushFirst => Self::GuestMemory,
            FailureKind::Io => Self::Os(libc::EIO),
            FailureKind::Internal => Self::BadGuest,
        }
    }
}

/// What was being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Opening an image, its data file or its backing file.
    Open,
    /// Reading the disk.
    Read,
    /// Writing the disk.
    Write,
    /// Asking what is where.
    Map,
    /// Making changes durable.
    Flush,
    /// Changing the disk's size.
    Resize,
    /// Checking and repairing.
    Check,
    /// Making a new image.
    Create,
    /// Locking again what had been unlocked.
    Lock,
}

/// Why an operation failed.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    operation: Operation,
    path: PathBuf,
    message: String,
    hint: Option<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// What went wrong, for programs.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The errno that a system call on a mounted image answers.
    pub fn errno(&self) -> i32 {
        self.kind.errno()
    }

    /// What was being done.
    pub fn operation(&self) -> Operation {
        self.operation
    }

    /// The file that is concerned: the image, or a file that it names.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The text without the path and without what was being done.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// A second line that helps, where there is one.
    pub fn hint(&self) -> Option<&str> {
        self.hint.as_deref()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        match self.operation {
            Operation::Open => write!(f, "Could not open '{path}': {}", self.message),
            _ => write!(f, "{path}: {}", self.message),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|source| source.as_ref() as _)
    }
}

/// A failure that does not yet know its path and operation: what the inner
/// modules return.
#[derive(Debug)]
pub(crate) struct Fault {
    pub kind: ErrorKind,
    pub message: String,
    pub hint: Option<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Fault {
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            hint: None,
            source: None,
        }
    }

    /// An operating system's refusal, told with what was tried.
    pub fn os(what: impl fmt::Display, error: io::Error) -> Self {
        Self {
            kind: ErrorKind::Os(error.raw_os_error().unwrap_or(libc::EIO)),
            message: format!("{what}: {}", os_text(&error)),
            hint: None,
            source: Some(Box::new(error)),
        }
    }

    pub fn with_hint(mut self, hint: String) -> Self {
        self.hint = Some(hint);
        self
    }

    /// Puts what the failure means for the image before or after the cause.
    pub fn and(mut self, consequence: &str) -> Self {
        self.message = format!("{}; {consequence}", self.message);
        self
    }

    pub fn at(self, operation: Operation, path: &Path) -> Error {
        Error {
            kind: self.kind,
            operation,
            path: path.to_path_buf(),
            message: self.message,
            hint: self.hint,
            source: self.source,
        }
    }
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Self {
            kind: ErrorKind::Os(error.raw_os_error().unwrap_or(libc::EIO)),
            message: os_text(&error),
            hint: None,
            source: Some(Box::new(error)),
        }
    }
}

impl From<&Failure> for Fault {
    /// The first line is the message, a second and third one help.
    fn from(failure: &Failure) -> Self {
        let mut lines = failure
            .message
            .lines()
            .map(|line| escape_deceptive(line, MAX_MESSAGE));
        let message = lines.next().unwrap_or_default();
        let hint: Vec<String> = lines.take(2).collect();
        Self {
            hint: (!hint.is_empty()).then(|| hint.join("\n")),
            ..Self::new(failure.kind.into(), message)
        }
    }
}

impl From<SandboxError> for Fault {
    fn from(error: SandboxError) -> Self {
        Self {
            kind: kind_of(&error),
            message: escape_deceptive(&error.to_string(), MAX_MESSAGE),
            hint: None,
            source: Some(Box::new(error)),
        }
    }
}

/// A host that is short of something keeps its errno: that passes, and says
/// nothing about the image.
fn kind_of(error: &SandboxError) -> ErrorKind {
    let (SandboxError::KvmMissing(errno)
    | SandboxError::Kvm(_, errno)
    | SandboxError::Host(_, errno)) = error
    else {
        return ErrorKind::Sandbox;
    };
    match errno {
        Errno::ENOMEM | Errno::EMFILE | Errno::ENFILE | Errno::EAGAIN | Errno::EINTR => {
            ErrorKind::Os(*errno as i32)
        }
        _ => ErrorKind::Sandbox,
    }
}

impl From<CallError> for Fault {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Refused(failure) => Self::from(&failure),
            CallError::Sandbox(error) => Self::from(error),
        }
    }
}

/// The operating system's text without Rust's "(os error N)".
fn os_text(error: &io::Error) -> String {
    let text = error.to_string();
    match text.find(" (os error ") {
        Some(end) => text[..end].to_string(),
        None => text,
    }
}

/// A name from an image, fit for a terminal: control characters escaped, cut.
pub fn printable_name(name: &str) -> String {
    escape_deceptive(name, MAX_NAME)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_failure_of_the_guest_has_its_errno() {
        let table = [
            (FailureKind::NotThisFormat, libc::EIO),
            (FailureKind::Damaged, libc::EIO),
            (FailureKind::Unsupported, libc::EOPNOTSUPP),
            (FailureKind::InvalidRequest, libc::EINVAL),
            (FailureKind::TooLarge, libc::EFBIG),
            (FailureKind::NotPermitted, libc::EPERM),
            (FailureKind::OutOfMemory, libc::EIO),
            (FailureKind::FlushFirst, libc::EIO),
            (FailureKind::OwnUnitFirst, libc::EOPNOTSUPP),
            (FailureKind::SettleFirst, libc::EIO),
            (FailureKind::Io, libc::EIO),
            (FailureKind::Internal, libc::EIO),
        ];
        for (kind, errno) in table {
            assert_eq!(ErrorKind::from(kind).errno(), errno, "{kind:?}");
        }
    }

    #[test]
    fn the_systems_errno_and_text_are_kept() {
        let fault = Fault::os("writing", io::Error::from_raw_os_error(libc::ENOSPC));
        assert_eq!(fault.kind.errno(), libc::ENOSPC);
        assert_eq!(fault.message, "writing: No space left on device");
    }

    #[test]
    fn a_host_short_of_something_is_told_from_a_sandbox_that_failed() {
        let kind = |error| Fault::from(error).kind;
        let short = SandboxError::Host("map memory", Errno::ENOMEM);
        assert_eq!(kind(short), ErrorKind::Os(libc::ENOMEM));
        let short = SandboxError::Kvm("make a VM", Errno::EMFILE);
        assert_eq!(kind(short), ErrorKind::Os(libc::EMFILE));
        let short = SandboxError::KvmMissing(Errno::ENFILE);
        assert_eq!(kind(short), ErrorKind::Os(libc::ENFILE));
        let missing = SandboxError::KvmMissing(Errno::ENOENT);
        assert_eq!(kind(missing), ErrorKind::Sandbox);
        assert_eq!(kind(SandboxError::Stalled), ErrorKind::Sandbox);
    }

    #[test]
    fn what_a_guest_says_cannot_steer_a_terminal() {
        assert_eq!(escape_deceptive("a\x1b[2Jb\n", 100), "a\\u{1b}[2Jb\\n");
        assert_eq!(escape_deceptive("x\u{202e}y", 100), "x\\u{202e}y");
    }

    #[test]
    fn a_long_name_is_cut_at_256_bytes() {
        assert_eq!(printable_name(&"n".repeat(300)).len(), 256 + '…'.len_utf8());
    }

    #[test]
    fn opening_names_the_path_as_qemu_does() {
        let error = Fault::new(ErrorKind::Locked, "Failed to get \"write\" lock")
            .at(Operation::Open, Path::new("a.qcow2"));
        assert_eq!(
            error.to_string(),
            "Could not open 'a.qcow2': Failed to get \"write\" lock"
        );
    }
}
