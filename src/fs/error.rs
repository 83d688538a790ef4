//! Why a call failed: the errno that the caller sees and the text that the log
//! and `user.instar.error` show.

use nix::errno::Errno;
use std::fmt;

/// The result of a filesystem call.
pub type Result<T> = std::result::Result<T, Error>;

/// A failed call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// What the caller's system call returns.
    pub errno: Errno,
    /// The reason for people, where the errno alone does not say it.
    pub message: Option<String>,
    /// Whether a file below could not be read or written: that says nothing
    /// about what it holds, and the next attempt may succeed.
    pub below: bool,
}

impl Error {
    /// A failure whose reason is worth a line in the log.
    pub fn new(errno: Errno, message: impl Into<String>) -> Self {
        Self {
            errno,
            message: Some(message.into()),
            below: false,
        }
    }

    /// What opening an image that cannot be used answers: it is the image, or a
    /// file that it names, that is wrong, and not the call. What has to do with
    /// permission, locks and the machine stays what it is.
    pub fn of_opening(self) -> Self {
        let errno = match self.errno {
            Errno::EOPNOTSUPP
            | Errno::EINVAL
            | Errno::EFBIG
            | Errno::ENOENT
            | Errno::ENOTDIR
            | Errno::EISDIR
            | Errno::ELOOP
            | Errno::ENAMETOOLONG => Errno::EIO,
            other => other,
        };
        Self { errno, ..self }
    }

    /// Whether it says nothing about the image: this machine lacks something
    /// for the moment.
    pub fn is_passing(&self) -> bool {
        matches!(
            self.errno,
            Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM | Errno::EAGAIN | Errno::EINTR
        )
    }

    /// Whether the image may be sound for all that.
    pub fn is_of_the_machine(&self) -> bool {
        self.below || self.is_passing()
    }

    /// The level at which the failure is logged. What a caller provokes by an
    /// ordinary mistake is quiet, so that nobody fills the log on purpose;
    /// what an administrator has to know is not.
    pub fn level(&self) -> log::Level {
        match self.errno {
            Errno::EIO | Errno::ESTALE | Errno::ENOSPC | Errno::EDQUOT => log::Level::Error,
            Errno::EBUSY | Errno::EROFS => log::Level::Warn,
            _ if self.message.is_some() => log::Level::Info,
            _ => log::Level::Debug,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.message {
            Some(message) => f.write_str(message),
            None => f.write_str(self.errno.desc()),
        }
    }
}

impl std::error::Error for Error {}

impl From<Errno> for Error {
    fn from(errno: Errno) -> Self {
        Self {
            errno,
            message: None,
            below: false,
        }
    }
}

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Self {
        let errno = error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
        Self::from(errno)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_errno_without_a_text_is_quiet_and_describes_itself() {
        let error = Error::from(Errno::ENOENT);
        assert_eq!(error.level(), log::Level::Debug);
        assert_eq!(error.to_string(), "No such file or directory");
    }

    #[test]
    fn an_image_that_cannot_be_opened_is_an_io_error() {
        let opening = |errno| Error::from(errno).of_opening().errno;
        for errno in [Errno::EOPNOTSUPP, Errno::EINVAL, Errno::ENOENT, Errno::EIO] {
            assert_eq!(opening(errno), Errno::EIO, "{errno}");
        }
        for errno in [Errno::EPERM, Errno::EBUSY, Errno::EROFS, Errno::ENOMEM] {
            assert_eq!(opening(errno), errno);
        }
    }

    #[test]
    fn a_damaged_image_is_an_error_in_the_log() {
        let error = Error::new(Errno::EIO, "the header is damaged");
        assert_eq!(error.level(), log::Level::Error);
        assert_eq!(error.to_string(), "the header is damaged");
    }
}
