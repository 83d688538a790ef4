//! What the guest said about the disk's ranges: checked, and kept in a bounded
//! cache, so that data is read and written without asking again.

use super::error::{ErrorKind, Fault};
use instar_guest::proto::Place;
use instar_guest::{Extent, ExtentKind, FileNo};
use std::collections::{BTreeMap, VecDeque};
use std::fmt;

/// The most extents that a cache holds: some 8 MiB of memory.
const MAX_EXTENTS: usize = 128 << 10;
/// The most regions that it remembers having loaded.
const MAX_REGIONS: usize = 64 << 10;

/// Why extents or places are refused. Offsets and lengths are bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ExtentError {
    Nothing { offset: u64 },
    Gap { expected: u64, found: u64 },
    Empty { offset: u64 },
    PastRange { end: u64, limit: u64 },
    EndsEarly { end: u64, expected: u64 },
    Overflow { at: u64, len: u64 },
    UnknownFile(FileNo),
    ReadOnlyFile(FileNo),
    PastFile { end: u64, limit: u64 },
}

impl fmt::Display for ExtentError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Nothing { offset } => write!(f, "no extent for offset {offset:#x}"),
            Self::Gap { expected, found } => {
                write!(f, "an extent at {found:#x} where {expected:#x} was next")
            }
            Self::Empty { offset } => write!(f, "an empty extent at {offset:#x}"),
            Self::PastRange { end, limit } => {
                write!(f, "an extent up to {end:#x}, the range ends at {limit:#x}")
            }
            Self::EndsEarly { end, expected } => {
                write!(
                    f,
                    "places up to {end:#x} only, the range ends at {expected:#x}"
                )
            }
            Self::Overflow { at, len } => {
                write!(f, "{len} bytes at file offset {at:#x} overflow")
            }
            Self::UnknownFile(FileNo(n)) => write!(f, "file {n}, which is not open"),
            Self::ReadOnlyFile(FileNo(n)) => write!(f, "file {n}, which may not be written"),
            Self::PastFile { end, limit } => {
                write!(
                    f,
                    "bytes up to {end:#x} of a file that may reach {limit:#x}"
                )
            }
        }
    }
}

impl From<ExtentError> for Fault {
    fn from(error: ExtentError) -> Self {
        Self::new(
            ErrorKind::BadGuest,
            format!("The sandbox's mapping is refused: {error}"),
        )
    }
}

/// Checks the answer to a request for the mapping of a range: extents without
/// gaps from `offset` on, at least one, none past `offset + len`, and every
/// byte of data inside a file that is open. `len_of` answers files' lengths.
pub(crate) fn check_extents(
    extents: &[Extent],
    offset: u64,
    len: u64,
    len_of: impl Fn(FileNo) -> Option<u64>,
) -> Result<(), ExtentError> {
    let limit = offset + len;
    let mut next = offset;
    for extent in extents {
        next = follow(next, extent.offset, extent.len, limit)?;
        match extent.kind {
            ExtentKind::Data { file, at, .. } => {
                let limit = len_of(file).ok_or(ExtentError::UnknownFile(file))?;
                check_host(at, extent.len, limit)?;
            }
            ExtentKind::Zero { at: Some(at) } | ExtentKind::Unallocated { at: Some(at) } => {
                check_host(at, extent.len, i64::MAX as u64)?;
            }
            ExtentKind::Zero { at: None }
            | ExtentKind::Unallocated { at: None }
            | ExtentKind::Compressed => {}
        }
    }
    match next > offset {
        true => Ok(()),
        false => Err(ExtentError::Nothing { offset }),
    }
}

/// Checks the answer to an allocation: places without gaps for exactly the
/// range, in files that may be written. `cap_of` answers how far a file may
/// reach afterwards.
pub(crate) fn check_places(
    places: &[Place],
    offset: u64,
    len: u64,
    cap_of: impl Fn(FileNo) -> Option<u64>,
) -> Result<(), ExtentError> {
    let expected = offset + len;
    let mut end = offset;
    for place in places {
        end = follow(end, place.offset, place.len, expected)?;
        let cap = cap_of(place.file).ok_or(ExtentError::ReadOnlyFile(place.file))?;
        check_host(place.at, place.len, cap)?;
    }
    match end == expected {
        true => Ok(()),
        false => Err(ExtentError::EndsEarly { end, expected }),
    }
}

fn follow(expected: u64, offset: u64, len: u64, limit: u64) -> Result<u64, ExtentError> {
    if offset != expected {
        let found = offset;
        return Err(ExtentError::Gap { expected, found });
    }
    if len == 0 {
        return Err(ExtentError::Empty { offset });
    }
    match offset.checked_add(len) {
        Some(end) if end <= limit => Ok(end),
        end => Err(ExtentError::PastRange {
            end: end.unwrap_or(u64::MAX),
            limit,
        }),
    }
}

fn check_host(at: u64, len: u64, limit: u64) -> Result<(), ExtentError> {
    match at.checked_add(len) {
        None => Err(ExtentError::Overflow { at, len }),
        Some(end) if end > limit => Err(ExtentError::PastFile { end, limit }),
        Some(_) => Ok(()),
    }
}

/// The mapping that places have once their data is written.
pub(crate) fn placed(place: &Place) -> Extent {
    Extent {
        offset: place.offset,
        len: place.len,
        kind: ExtentKind::Data {
            file: place.file,
            at: place.at,
            in_place: true,
        },
    }
}

/// Part of an extent, from `skip` bytes after its start, at most `len` long.
pub(crate) fn slice(extent: Extent, skip: u64, len: u64) -> Extent {
    let kind = match extent.kind {
        ExtentKind::Data { file, at, in_place } => ExtentKind::Data {
            file,
            at: at + skip,
            in_place,
        },
        ExtentKind::Zero { at } => ExtentKind::Zero {
            at: at.map(|at| at + skip),
        },
        ExtentKind::Unallocated { at } => ExtentKind::Unallocated {
            at: at.map(|at| at + skip),
        },
        other => other,
    };
    Extent {
        offset: extent.offset + skip,
        len: len.min(extent.len - skip),
        kind,
    }
}

/// Checked extents by guest offset, none overlapping, neighbours joined.
#[derive(Debug, Default)]
pub(crate) struct ExtentCache {
    extents: BTreeMap<u64, (u64, ExtentKind)>,
    /// What was loaded, oldest first, to be forgotten in that order.
    regions: VecDeque<(u64, u64)>,
}

impl ExtentCache {
    /// What lies at an offset, from there on.
    pub fn find(&self, offset: u64) -> Option<Extent> {
        let (&start, &(len, kind)) = self.extents.range(..=offset).next_back()?;
        let skip = offset - start;
        let extent = Extent {
            offset: start,
            len,
            kind,
        };
        (skip < len).then(|| slice(extent, skip, len))
    }

    /// Adds what the guest said about a region.
    pub fn load(&mut self, extents: &[Extent]) {
        let (Some(first), Some(last)) = (extents.first(), extents.last()) else {
            return;
        };
        self.regions
            .push_back((first.offset, last.offset + last.len));
        self.replace(extents);
        while self.extents.len() > MAX_EXTENTS || self.regions.len() > MAX_REGIONS {
            match self.regions.pop_front() {
                Some((start, end)) => self.forget(start, end),
                None => break,
            }
        }
    }

    /// Puts extents without gaps in the place of what was there.
    pub fn replace(&mut self, extents: &[Extent]) {
        if let (Some(first), Some(last)) = (extents.first(), extents.last()) {
            self.forget(first.offset, last.offset + last.len);
            extents.iter().for_each(|&extent| self.append(extent));
            self.join(last.offset + last.len);
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    fn forget(&mut self, start: u64, end: u64) {
        self.split(start);
        self.split(end);
        let inside: Vec<u64> = self.extents.range(start..end).map(|(&at, _)| at).collect();
        for at in inside {
            self.extents.remove(&at);
        }
    }

    /// Makes an extent that crosses `at` two.
    fn split(&mut self, at: u64) {
        let Some((&start, &(len, kind))) = self.extents.range(..at).next_back() else {
            return;
        };
        let skip = at - start;
        if skip < len {
            let whole = Extent {
                offset: start,
                len,
                kind,
            };
            let rest = slice(whole, skip, len);
            self.extents.insert(start, (skip, kind));
            self.extents.insert(at, (rest.len, rest.kind));
        }
    }

    /// Adds an extent where nothing is, joined with its left neighbour.
    fn append(&mut self, extent: Extent) {
        self.extents
            .insert(extent.offset, (extent.len, extent.kind));
        self.join(extent.offset);
    }

    /// Makes the two extents that meet at an offset one, if they are of a kind.
    fn join(&mut self, at: u64) {
        let Some(&(right_len, right)) = self.extents.get(&at) else {
            return;
        };
        let Some((&start, &(len, left))) = self.extents.range(..at).next_back() else {
            return;
        };
        let whole = Extent {
            offset: start,
            len: len + right_len,
            kind: left,
        };
        if start + len == at && slice(whole, len, right_len).kind == right {
            self.extents.remove(&at);
            self.extents.insert(start, (len + right_len, left));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use instar_guest::proto::Content;
    use proptest::prelude::*;

    const IMAGE: FileNo = FileNo::IMAGE;

    fn data(offset: u64, len: u64, at: u64) -> Extent {
        let kind = ExtentKind::Data {
            file: IMAGE,
            at,
            in_place: true,
        };
        Extent { offset, len, kind }
    }

    fn zero(offset: u64, len: u64) -> Extent {
        let kind = ExtentKind::Zero { at: None };
        Extent { offset, len, kind }
    }

    /// The verdict on the mapping of 1000..2000 in a file of 4096 bytes.
    fn verdict(extents: &[Extent]) -> Result<(), ExtentError> {
        check_extents(extents, 1000, 1000, |file| (file == IMAGE).then_some(4096))
    }

    #[test]
    fn sound_extents_pass_also_if_they_end_early() {
        assert_eq!(verdict(&[data(1000, 500, 3596), zero(1500, 500)]), Ok(()));
        assert_eq!(verdict(&[zero(1000, 1)]), Ok(()));
    }

    #[test]
    fn extents_follow_each_other_from_the_offset_asked_for() {
        let gap = |expected, found| Err(ExtentError::Gap { expected, found });
        assert_eq!(verdict(&[zero(999, 10)]), gap(1000, 999));
        assert_eq!(verdict(&[zero(1001, 10)]), gap(1000, 1001));
        assert_eq!(verdict(&[zero(1000, 10), zero(1020, 10)]), gap(1010, 1020));
        assert_eq!(verdict(&[zero(1000, 10), zero(1005, 10)]), gap(1010, 1005));
        assert_eq!(verdict(&[]), Err(ExtentError::Nothing { offset: 1000 }));
        assert_eq!(
            verdict(&[zero(1000, 0)]),
            Err(ExtentError::Empty { offset: 1000 })
        );
    }

    #[test]
    fn extents_end_inside_the_range() {
        let past = |end| Err(ExtentError::PastRange { end, limit: 2000 });
        assert_eq!(verdict(&[zero(1000, 1001)]), past(2001));
        assert_eq!(verdict(&[zero(1000, u64::MAX)]), past(u64::MAX));
    }

    #[test]
    fn data_lies_inside_an_open_file() {
        let (end, limit) = (4097, 4096);
        assert_eq!(
            verdict(&[data(1000, 500, 3597)]),
            Err(ExtentError::PastFile { end, limit })
        );
        let (at, len) = (u64::MAX, 500);
        assert_eq!(
            verdict(&[data(1000, 500, at)]),
            Err(ExtentError::Overflow { at, len })
        );
        let mut elsewhere = data(1000, 500, 0);
        elsewhere.kind = ExtentKind::Data {
            file: FileNo(7),
            at: 0,
            in_place: true,
        };
        assert_eq!(
            verdict(&[elsewhere]),
            Err(ExtentError::UnknownFile(FileNo(7)))
        );
        let kind = ExtentKind::Zero { at: Some(u64::MAX) };
        let reserved = Extent {
            kind,
            ..zero(1000, 500)
        };
        assert_eq!(verdict(&[reserved]), Err(ExtentError::Overflow { at, len }));
    }

    fn place(offset: u64, len: u64, at: u64) -> Place {
        let content = Content::Stale;
        Place {
            offset,
            len,
            file: IMAGE,
            at,
            content,
        }
    }

    #[test]
    fn places_cover_exactly_the_range_inside_a_writable_file() {
        let verdict = |places: &[Place]| {
            check_places(places, 1000, 1000, |file| (file == IMAGE).then_some(4096))
        };
        assert_eq!(
            verdict(&[place(1000, 400, 0), place(1400, 600, 3496)]),
            Ok(())
        );
        let early = ExtentError::EndsEarly {
            end: 1400,
            expected: 2000,
        };
        assert_eq!(verdict(&[place(1000, 400, 0)]), Err(early));
        let past = ExtentError::PastFile {
            end: 4097,
            limit: 4096,
        };
        assert_eq!(verdict(&[place(1000, 1000, 3097)]), Err(past));
        let past = ExtentError::PastRange {
            end: 2001,
            limit: 2000,
        };
        assert_eq!(verdict(&[place(1000, 1001, 0)]), Err(past));
        let mut elsewhere = place(1000, 1000, 0);
        elsewhere.file = FileNo::DATA;
        let refusal = ExtentError::ReadOnlyFile(FileNo::DATA);
        assert_eq!(verdict(&[elsewhere]), Err(refusal));
    }

    #[test]
    fn neighbours_that_continue_each_other_are_joined() {
        let mut cache = ExtentCache::default();
        cache.load(&[
            data(0, 100, 1000),
            data(100, 100, 1100),
            data(200, 100, 5000),
        ]);
        assert_eq!(cache.find(0), Some(data(0, 200, 1000)));
        assert_eq!(cache.find(150), Some(data(150, 50, 1150)));
        cache.load(&[data(300, 50, 5100)]);
        assert_eq!(cache.find(200), Some(data(200, 150, 5000)));
        assert_eq!(cache.find(350), None);
    }

    #[test]
    fn the_oldest_region_is_forgotten_first() {
        let mut cache = ExtentCache::default();
        let region = |start: u64| -> Vec<Extent> {
            let extent = |i| data(start + i, 1, (start + i) * 2);
            (0..MAX_EXTENTS as u64 / 2).map(extent).collect()
        };
        let (first, second, third) = (region(0), region(1 << 20), region(1 << 21));
        cache.load(&first);
        cache.load(&second);
        assert!(cache.find(0).is_some());
        cache.load(&third);
        assert_eq!(cache.find(0), None);
        assert!(cache.find(1 << 20).is_some() && cache.find(1 << 21).is_some());
        assert_eq!(cache.extents.len(), MAX_EXTENTS);
    }

    proptest! {
        /// Whatever is loaded and replaced, each byte is known as it was last
        /// said, and neighbours of a kind are one extent.
        #[test]
        fn the_cache_remembers_the_last_word_on_every_byte(
            changes in prop::collection::vec((0u64..200, 1u64..60, 0u64..3), 1..40)
        ) {
            let mut cache = ExtentCache::default();
            let mut model = [None; 300];
            for (offset, len, what) in changes {
                let extent = match what {
                    0 => data(offset, len, offset + 1000),
                    1 => data(offset, len, 5000 - offset),
                    _ => zero(offset, len),
                };
                cache.replace(&[extent]);
                for byte in offset..offset + len {
                    model[byte as usize] = Some(slice(extent, byte - offset, 1).kind);
                }
            }
            for (byte, expected) in model.iter().enumerate() {
                let found = cache.find(byte as u64).map(|extent| extent.kind);
                prop_assert_eq!(found, *expected, "byte {}", byte);
            }
            let all: Vec<_> = cache.extents.iter().collect();
            for pair in all.windows(2) {
                let (&start, &(len, kind)) = pair[0];
                let (&next, &(next_len, next_kind)) = pair[1];
                prop_assert!(start + len <= next);
                let whole = Extent { offset: start, len: len + next_len, kind };
                prop_assert!(start + len < next || slice(whole, len, next_len).kind != next_kind);
            }
        }
    }
}
