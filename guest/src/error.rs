//! Why a request could not be answered: a kind that the host maps to an errno
//! and an exit status, and a text for people.

use alloc::string::String;
use serde::{Deserialize, Serialize};

/// What went wrong, for programs. The host has one table from here to errno
/// and one to exit status, both exhaustive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureKind {
    /// The file does not hold the format that was asked for.
    NotThisFormat,
    /// The metadata contradicts itself or the format's specification.
    Damaged,
    /// A feature, or a whole format, that instar does not handle.
    Unsupported,
    /// The request itself makes no sense for this image (size, option).
    InvalidRequest,
    /// The result would be past what the format can express.
    TooLarge,
    /// Allowed only with an explicit option (shrinking).
    NotPermitted,
    /// The sandbox's memory is not enough for this image.
    OutOfMemory,
    /// Too much waits for a flush. The request changed nothing: flush, then ask
    /// again.
    FlushFirst,
    /// The host could not read the bytes that were asked for.
    Io,
    /// The engine contradicts itself: a defect of instar.
    Internal,
    /// The disk ends inside a unit that only the backing image holds, and the
    /// request would show more of it. The request changed nothing: give the
    /// image that unit for its own, then ask again.
    OwnUnitFirst,
    /// A change was interrupted and left something. The request changed nothing:
    /// have the image put in order ([`Settle`](crate::Request::Settle)), then
    /// ask again.
    SettleFirst,
}

/// A request that was refused. The text names the field, the value found and
/// the way out, and does not name the file: the host adds that.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What went wrong, for programs.
    pub kind: FailureKind,
    /// What went wrong, for people. May quote strings from the image, so the
    /// host escapes and cuts it before it reaches a terminal or a log.
    pub message: String,
}

impl Failure {
    /// A failure of the given kind.
    #[track_caller]
    pub fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        #[cfg(any(test, feature = "testing"))]
        crate::testing::note(core::panic::Location::caller());
        Self {
            kind,
            message: message.into(),
        }
    }
}

impl core::fmt::Display for Failure {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(&self.message)
    }
}

impl core::error::Error for Failure {}
