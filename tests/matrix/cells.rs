//! The cells of the matrix, and what each has to come to.

use crate::kinds::{CUT, DATA_END, Kind};

/// What is asked of the size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    GrowInside,
    GrowRelocating,
    Same,
    ShrinkEmpty,
    ShrinkData,
}

/// How much of what is added is allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Off,
    Metadata,
    Falloc,
    Full,
}

/// How it is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Surface {
    /// `instar resize`.
    Command,
    /// `truncate` of the mounted file, with `-o preallocation` and `-o shrink`.
    Truncate,
    /// `fallocate` on the mounted file.
    Fallocate,
}

/// What has to come of a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outlook {
    /// The disk has the new size.
    Done,
    /// This text is in the error, and the image is as it was.
    Refused(&'static str),
}

/// One cell.
#[derive(Clone, Copy)]
pub struct Cell {
    pub kind: &'static Kind,
    pub change: Change,
    pub mode: Mode,
    pub surface: Surface,
}

pub const CHANGES: [Change; 5] = [
    Change::GrowInside,
    Change::GrowRelocating,
    Change::Same,
    Change::ShrinkEmpty,
    Change::ShrinkData,
];
pub const MODES: [Mode; 4] = [Mode::Off, Mode::Metadata, Mode::Falloc, Mode::Full];
pub const SURFACES: [Surface; 3] = [Surface::Command, Surface::Truncate, Surface::Fallocate];

impl Change {
    pub fn name(self) -> &'static str {
        match self {
            Self::GrowInside => "grow inside the tables",
            Self::GrowRelocating => "grow that moves tables",
            Self::Same => "no change",
            Self::ShrinkEmpty => "shrink to empty space",
            Self::ShrinkData => "shrink through data",
        }
    }

    pub fn is_shrink(self) -> bool {
        matches!(self, Self::ShrinkEmpty | Self::ShrinkData)
    }

    pub fn is_growth(self) -> bool {
        matches!(self, Self::GrowInside | Self::GrowRelocating)
    }
}

impl Mode {
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Metadata => "metadata",
            Self::Falloc => "falloc",
            Self::Full => "full",
        }
    }
}

impl Surface {
    pub fn name(self) -> &'static str {
        match self {
            Self::Command => "command",
            Self::Truncate => "truncate",
            Self::Fallocate => "fallocate",
        }
    }
}

impl Cell {
    /// Every cell that can be asked for: no call of `fallocate` makes a file
    /// smaller.
    pub fn all(kinds: &'static [Kind]) -> Vec<Self> {
        let mut cells = Vec::new();
        for kind in kinds {
            for surface in SURFACES {
                for mode in MODES {
                    for change in CHANGES {
                        let cell = Self {
                            kind,
                            change,
                            mode,
                            surface,
                        };
                        if surface != Surface::Fallocate || change.is_growth() {
                            cells.push(cell);
                        }
                    }
                }
            }
        }
        cells
    }

    pub fn name(&self) -> String {
        format!(
            "{}/{}/{}/{}",
            self.kind.name,
            self.change.name(),
            self.mode.name(),
            self.surface.name()
        )
    }

    /// The size asked for, in bytes.
    pub fn size(&self) -> u64 {
        match self.change {
            Change::GrowInside => self.kind.inside,
            Change::GrowRelocating => self.kind.relocating,
            Change::Same => self.kind.size,
            Change::ShrinkEmpty => DATA_END,
            Change::ShrinkData => CUT,
        }
    }

    /// What is allocated of the added range: `fallocate` means what it says
    /// whatever the mount was told.
    pub fn allocation(&self) -> Mode {
        match self.surface {
            Surface::Fallocate => Mode::Falloc,
            Surface::Command | Surface::Truncate => self.mode,
        }
    }

    /// What has to come of it.
    pub fn outlook(&self) -> Outlook {
        let allocates = self.mode != Mode::Off;
        match self.surface {
            Surface::Command if allocates && !self.change.is_growth() => {
                Outlook::Refused("Preallocation can only be used for growing images")
            }
            Surface::Command if self.kind.format == "raw" && self.mode == Mode::Metadata => {
                Outlook::Refused("Unsupported preallocation mode: metadata")
            }
            Surface::Truncate
                if self.kind.format == "raw"
                    && self.mode == Mode::Metadata
                    && self.change.is_growth() =>
            {
                Outlook::Refused("Invalid argument")
            }
            _ => Outlook::Done,
        }
    }
}
