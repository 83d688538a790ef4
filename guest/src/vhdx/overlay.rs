//! What replaying the log writes, as disjoint ranges.
//!
//! Readers see it over the file, and settling the image writes it to the file.

use crate::plan::Step;
use crate::proto::FileNo;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;

/// Disjoint changes to a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overlay {
    pieces: BTreeMap<u64, Piece>,
}

/// One change.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Piece {
    len: u64,
    /// The new bytes; zeroes where there are none.
    data: Option<Vec<u8>>,
}

impl Overlay {
    /// How many ranges are changed.
    pub fn ranges(&self) -> usize {
        self.pieces.len()
    }

    /// Adds new bytes below what is there already: that was written later.
    /// Answers whether any of it was needed. A range that is there in part does
    /// not occur: everything is in whole pages.
    pub fn add_data(&mut self, offset: u64, data: Vec<u8>) -> bool {
        let len = data.len() as u64;
        if self.first_in(offset, len).is_some() {
            return false;
        }
        let data = Some(data);
        self.pieces.insert(offset, Piece { len, data });
        true
    }

    /// Adds zeroes below what is there already.
    pub fn add_zeroes(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len);
        let mut at = offset;
        while at < end {
            match self.first_in(at, end - at) {
                Some((start, len)) if start <= at => at = start.saturating_add(len),
                found => {
                    let next = found.map_or(end, |(start, _)| start);
                    let len = next - at;
                    self.pieces.insert(at, Piece { len, data: None });
                    at = next;
                }
            }
        }
    }

    /// The first changed range that overlaps the given one.
    pub fn first_in(&self, offset: u64, len: u64) -> Option<(u64, u64)> {
        let end = offset.saturating_add(len);
        let before = self.pieces.range(..=offset).next_back();
        let before = before.filter(|(start, piece)| start.saturating_add(piece.len) > offset);
        before
            .or_else(|| self.pieces.range(offset..end).next())
            .map(|(&start, piece)| (start, piece.len))
            .filter(|_| len > 0)
    }

    /// Changes the bytes of a buffer that was read at `offset`.
    pub fn apply(&self, offset: u64, buf: &mut [u8]) {
        let end = offset.saturating_add(buf.len() as u64);
        let first = self.first_in(offset, buf.len() as u64);
        let Some((first, _)) = first else {
            return;
        };
        for (&start, piece) in self.pieces.range(first..end) {
            let from = start.max(offset);
            let len = start.saturating_add(piece.len).min(end) - from;
            let (to, skip, len) = (
                (from - offset) as usize,
                (from - start) as usize,
                len as usize,
            );
            let Some(target) = buf.get_mut(to..to + len) else {
                continue;
            };
            let new = piece.data.as_deref();
            match new.and_then(|data| data.get(skip..skip + len)) {
                Some(data) => target.copy_from_slice(data),
                None => target.fill(0),
            }
        }
    }

    /// The steps that change the file.
    pub fn steps(&self) -> Vec<Step> {
        let step = |(&offset, piece): (&u64, &Piece)| match &piece.data {
            Some(data) => Step::Write {
                file: FileNo::IMAGE,
                offset,
                data: data.clone(),
            },
            None => Step::Zero {
                file: FileNo::IMAGE,
                offset,
                len: piece.len,
            },
        };
        self.pieces.iter().map(step).collect()
    }

    /// Host offset of the first byte behind all changes.
    pub fn end(&self) -> u64 {
        let last = self.pieces.last_key_value();
        last.map_or(0, |(start, piece)| start.saturating_add(piece.len))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    #[test]
    fn what_is_added_first_stays_on_top() {
        let mut overlay = Overlay::default();
        assert!(overlay.add_data(8, vec![1; 4]));
        overlay.add_zeroes(0, 20);
        assert!(!overlay.add_data(8, vec![2; 4]));
        assert!(overlay.add_data(20, vec![3; 4]));
        let mut buf = [9; 26];
        overlay.apply(0, &mut buf);
        let mut expected = [0; 26];
        expected[8..12].fill(1);
        expected[20..24].fill(3);
        expected[24..].fill(9);
        assert_eq!(buf, expected);
        let mut inside = [9; 3];
        overlay.apply(11, &mut inside);
        assert_eq!(inside, [1, 0, 0]);
        assert_eq!(overlay.ranges(), 4);
        assert_eq!(overlay.end(), 24);
    }

    #[test]
    fn a_range_that_is_not_touched_is_left_alone() {
        let mut overlay = Overlay::default();
        overlay.add_zeroes(100, 10);
        assert_eq!(overlay.first_in(0, 100), None);
        assert_eq!(overlay.first_in(110, 5), None);
        assert_eq!(overlay.first_in(109, 5), Some((100, 10)));
        let mut buf = [7; 4];
        overlay.apply(110, &mut buf);
        assert_eq!(buf, [7; 4]);
    }
}
