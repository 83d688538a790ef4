//! `--preallocation`, for resizes and for mounts.

use clap::ValueEnum;
use instar_guest::proto::Preallocation;

/// Its values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// Nothing
    #[default]
    Off,
    /// The mapping
    Metadata,
    /// The mapping, and disk space
    Falloc,
    /// The mapping, and zeroes
    Full,
}

impl From<Mode> for Preallocation {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Off => Self::Off,
            Mode::Metadata => Self::Metadata,
            Mode::Falloc => Self::Falloc,
            Mode::Full => Self::Full,
        }
    }
}
