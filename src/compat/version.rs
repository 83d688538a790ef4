//! What qemu-img's versions say differently, and which of them is followed.

use std::fmt;
use std::str::FromStr;

/// A version of qemu-img, `X.Y` or `X.Y.Z`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct QemuVersion {
    major: u16,
    minor: u16,
    micro: u16,
}

impl QemuVersion {
    /// The version that is followed unless another one is asked for.
    pub const CURRENT: Self = Self::new(10, 0);

    const fn new(major: u16, minor: u16) -> Self {
        Self {
            major,
            minor,
            micro: 0,
        }
    }

    /// Whether `info` shows the files below an image: `children`, `Child node`.
    pub fn shows_children(self) -> bool {
        self >= Self::new(8, 0)
    }

    /// Whether `info` says where a LUKS header lies.
    pub fn shows_detached_header(self) -> bool {
        self >= Self::new(9, 0)
    }

    /// Whether `map` tells whether a layer says anything about a range.
    pub fn shows_present(self) -> bool {
        self >= Self::new(6, 1)
    }

    /// Whether `map` tells what is compressed.
    pub fn shows_compressed(self) -> bool {
        self >= Self::new(8, 2)
    }

    /// Whether the list of snapshots has its wider columns.
    pub fn widens_snapshots(self) -> bool {
        self >= Self::new(9, 0)
    }

    /// Whether mistakes are told in the words that only 10.x has.
    pub fn has_words_of_10(self) -> bool {
        self.major == 10
    }

    /// Whether mistakes on the command line are told by the command, and in the
    /// words that came with that.
    pub fn explains_commands(self) -> bool {
        self >= Self::new(10, 0)
    }
}

impl Default for QemuVersion {
    fn default() -> Self {
        Self::CURRENT
    }
}

impl fmt::Display for QemuVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// Why a text is not a version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoVersion;

impl fmt::Display for NoVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a version is X.Y or X.Y.Z, as in 7.2")
    }
}

impl std::error::Error for NoVersion {}

impl FromStr for QemuVersion {
    type Err = NoVersion;

    fn from_str(text: &str) -> Result<Self, NoVersion> {
        let mut numbers = text.split('.').map(|part| part.parse::<u16>().ok());
        let mut next = || numbers.next();
        match (next(), next(), next(), next()) {
            (Some(Some(major)), Some(Some(minor)), micro, None) => Ok(Self {
                major,
                minor,
                micro: micro.unwrap_or(Some(0)).ok_or(NoVersion)?,
            }),
            _ => Err(NoVersion),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_two_or_three_numbers() {
        for (text, shown) in [("7.2", "7.2.0"), ("11.1.3", "11.1.3"), ("8.2.0", "8.2.0")] {
            let version: QemuVersion = text.parse().unwrap();
            assert_eq!(version.to_string(), shown);
        }
        for text in ["", "7", "7.", "7.2.", "7.2.1.1", "v7.2", "7.2-rc1"] {
            assert_eq!(text.parse::<QemuVersion>(), Err(NoVersion), "{text:?}");
        }
    }

    #[test]
    fn what_is_said_depends_on_the_version() {
        let shown = |text: &str| {
            let version: QemuVersion = text.parse().unwrap();
            [
                version.shows_present(),
                version.shows_children(),
                version.shows_compressed(),
                version.shows_detached_header(),
                version.explains_commands(),
            ]
        };
        assert_eq!(shown("5.2"), [false; 5]);
        assert_eq!(shown("7.2.22"), [true, false, false, false, false]);
        assert_eq!(shown("10.0.2"), [true; 5]);
        assert_eq!(QemuVersion::CURRENT, "10.0".parse().unwrap());
    }
}
