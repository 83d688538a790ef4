//! Whole units that are placed together, and the pieces of what goes there.

use super::chain::MAX_UNIT;
use instar_guest::proto::Place;

/// How often a guest may want more placed together before it places any of it.
const MAX_WIDER: usize = 4;

/// Whole allocation units of the disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Units {
    pub start: u64,
    pub end: u64,
}

impl Units {
    pub fn len(self) -> u64 {
        self.end - self.start
    }
}

/// Units to be placed: those that were wanted, and those that the guest wants
/// placed together with them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Widening {
    wanted: Units,
    pub now: Units,
    left: usize,
}

impl Widening {
    pub fn new(wanted: Units) -> Self {
        Self {
            wanted,
            now: wanted,
            left: MAX_WIDER,
        }
    }

    /// Takes a range that the guest wants instead: more than was asked for, and
    /// all in all little more. `None` refuses it.
    pub fn widened(self, offset: u64, len: u64, size: u64) -> Option<Self> {
        let now = Units {
            start: offset,
            end: offset.checked_add(len)?,
        };
        let contains = now.start <= self.now.start && now.end >= self.now.end && now.end <= size;
        let fits = len > self.now.len() && len - self.wanted.len() <= 2 * MAX_UNIT;
        Some(Self {
            now,
            left: self.left.checked_sub(1)?,
            ..self
        })
        .filter(|_| contains && fits)
    }
}

/// The guest's answer to an allocation.
pub(super) enum Placement {
    /// Where the data goes.
    Places(Vec<Place>),
    /// Nothing has changed: these have to be placed together.
    Wider(Widening),
}

/// Part of what goes to newly placed units.
#[derive(Clone, Copy)]
pub(super) enum Piece<'a> {
    /// What the units hold already.
    Old(&'a [u8]),
    /// Zeroes that they hold already.
    OldZeroes(u64),
    /// What is written.
    New(&'a [u8]),
}

impl Piece<'_> {
    pub fn len(&self) -> u64 {
        match self {
            Self::Old(bytes) | Self::New(bytes) => bytes.len() as u64,
            Self::OldZeroes(len) => *len,
        }
    }

    pub fn cut(&self, from: u64, to: u64) -> Self {
        match *self {
            Self::Old(bytes) => Self::Old(&bytes[from as usize..to as usize]),
            Self::New(bytes) => Self::New(&bytes[from as usize..to as usize]),
            Self::OldZeroes(_) => Self::OldZeroes(to - from),
        }
    }
}

/// What a range holds, read before its mapping changes.
pub(super) enum Old {
    Bytes(Vec<u8>),
    Zeroes(u64),
}

impl Old {
    pub fn piece(&self) -> Piece<'_> {
        match self {
            Self::Bytes(bytes) => Piece::Old(bytes),
            Self::Zeroes(len) => Piece::OldZeroes(*len),
        }
    }
}

/// Whether there is nothing but zeroes.
pub(super) fn is_zero(bytes: &[u8]) -> bool {
    // In words, with the ends on their own.
    let (words, rest) = bytes.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|&byte| byte == 0)
}
