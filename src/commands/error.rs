//! Why a command failed, in qemu-img's words where qemu-img has them.

use instar::compat::check::exit;
use instar::compat::messages;
use instar::image::{self, ErrorKind, Operation};
use instar::sandbox::SandboxError;
use std::fmt;
use std::io;
use std::path::Path;

/// Why a command failed. Its text is what stands behind `instar: `, and may
/// have a second line.
#[derive(Debug)]
pub enum Error {
    /// Refused, with this text.
    Refused(String),
    /// An image could not be opened, by the name that the user gave.
    Open {
        /// That name.
        file: String,
        /// Why.
        source: Box<image::Error>,
    },
    /// An open image refused, or failed.
    Image(Box<image::Error>),
    /// No sandbox.
    Sandbox(SandboxError),
    /// The output could not be written.
    Output(io::Error),
    /// Something of the operating system failed.
    System {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
}

impl Error {
    /// A refusal with a fixed text.
    pub fn refused(text: &str) -> Self {
        Self::Refused(text.to_owned())
    }

    /// For `map_err`: names the image as the user did.
    pub fn opening(file: &Path) -> impl FnOnce(image::Error) -> Self {
        let file = file.to_string_lossy().into_owned();
        move |source| Self::Open {
            file,
            source: Box::new(source),
        }
    }

    /// For `map_err`: names what was tried.
    pub fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::System { what, source }
    }

    /// The exit code of the program.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Image(error) if has_no_checks(error) => exit::UNSUPPORTED,
            _ => exit::FAILED,
        }
    }

    /// Whether only the reader of the output went away, which nobody wants to
    /// read about.
    pub fn is_closed_pipe(&self) -> bool {
        matches!(self, Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe)
    }
}

impl From<SandboxError> for Error {
    fn from(error: SandboxError) -> Self {
        Self::Sandbox(error)
    }
}

impl From<image::Error> for Error {
    fn from(error: image::Error) -> Self {
        Self::Image(Box::new(error))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(message) => f.write_str(message),
            Self::Open { file, source } => write_open(f, file, source),
            Self::Image(error) => write_image(f, error),
            Self::Sandbox(error) => write!(f, "{error}"),
            Self::Output(error) => write!(f, "the output could not be written: {error}"),
            Self::System { what, source } => write!(f, "{what}: {source}"),
        }
    }
}

/// qemu-img names the image, then, for a file that the system does not open,
/// that file.
fn write_open(f: &mut fmt::Formatter<'_>, file: &str, error: &image::Error) -> fmt::Result {
    write!(f, "Could not open '{file}': ")?;
    let names_a_file = error.message().starts_with("Could not open");
    match error.kind() {
        ErrorKind::Os(_) if !names_a_file => write!(
            f,
            "Could not open '{}': {}",
            error.path().display(),
            error.message()
        )?,
        _ => f.write_str(error.message())?,
    }
    write_hint(f, error)
}

/// A refusal by an open image stands alone; the others say where they happened.
fn write_image(f: &mut fmt::Formatter<'_>, error: &image::Error) -> fmt::Result {
    match error.operation() {
        Operation::Resize => f.write_str(error.message())?,
        Operation::Check if has_no_checks(error) => f.write_str(error.message())?,
        Operation::Check if error.message().starts_with(messages::CHECK_FAILED) => {
            f.write_str(error.message())?;
        }
        Operation::Check => write!(f, "{}: {}", messages::CHECK_FAILED, error.message())?,
        Operation::Create if is_bare(error) => {
            let path = error.path().display();
            write!(f, "{path}: Could not create '{path}': {}", error.message())?;
        }
        _ => write!(f, "{error}")?,
    }
    write_hint(f, error)
}

/// Whether it is a check of what cannot be checked or repaired.
fn has_no_checks(error: &image::Error) -> bool {
    error.operation() == Operation::Check && error.kind() == ErrorKind::Unsupported
}

/// Whether the system refused the file itself, and not some step after it.
fn is_bare(error: &image::Error) -> bool {
    matches!(error.kind(), ErrorKind::Os(_)) && !error.message().contains(": ")
}

fn write_hint(f: &mut fmt::Formatter<'_>, error: &image::Error) -> fmt::Result {
    match error.hint() {
        Some(hint) => write!(f, "\n{hint}"),
        None => Ok(()),
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Refused(_) => None,
            Self::Open { source, .. } | Self::Image(source) => Some(source),
            Self::Sandbox(error) => Some(error),
            Self::Output(error) | Self::System { source: error, .. } => Some(error),
        }
    }
}
