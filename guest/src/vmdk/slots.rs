//! Which places for grains are taken, and how to close the gaps.

use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

/// Most places that are kept account of: more take more memory than the sandbox
/// has, and then nothing is moved together.
const MAX_SLOTS: u64 = 32 << 20;
/// Most ranges that are given back one by one.
const MAX_FREED: usize = 4 << 10;

/// Places for grains, one behind the other from a sector on.
#[derive(Debug)]
pub struct Slots {
    front: u64,
    grain: u64,
    taken: Vec<u64>,
    count: u64,
    /// Whether all grains lie in places that are known here.
    regular: bool,
}

/// How gaps are closed: grains at the end move to places in front of it.
#[derive(Clone, Debug, Default)]
pub struct Moves {
    /// From which sector to which, in order of the first.
    pub list: Vec<(u64, u64)>,
    /// The sector behind the last grain afterwards.
    pub end: u64,
    /// Ranges of sectors before it that hold nothing afterwards.
    pub freed: Vec<Range<u64>>,
}

impl Moves {
    /// Where the grain at a sector goes.
    pub fn target(&self, sector: u64) -> u64 {
        let found = self.list.binary_search_by_key(&sector, |&(from, _)| from);
        let found = found.ok().and_then(|index| self.list.get(index));
        found.map_or(sector, |&(_, to)| to)
    }
}

impl Slots {
    /// Places in a file of so many sectors, none of them taken.
    pub fn new(front: u64, grain: u64, sectors: u64) -> Self {
        let count = sectors.saturating_sub(front).div_ceil(grain);
        let regular = count <= MAX_SLOTS;
        let words = if regular { count.div_ceil(64) } else { 0 };
        Self {
            front,
            grain,
            taken: vec![0; words as usize],
            count,
            regular,
        }
    }

    /// The file is so many sectors long now, or longer.
    pub fn reach(&mut self, sectors: u64) {
        let count = sectors.saturating_sub(self.front).div_ceil(self.grain);
        if !self.regular || count <= self.count {
            return;
        }
        self.regular = count <= MAX_SLOTS;
        if self.regular {
            self.count = count;
            self.taken.resize(count.div_ceil(64) as usize, 0);
        }
    }

    /// The grain at a sector takes its place. Whether it was the first, as far as
    /// places are known.
    pub fn take(&mut self, sector: u64) -> bool {
        let distance = sector - self.front;
        let slot = distance / self.grain;
        match self.taken.get_mut((slot / 64) as usize) {
            Some(word) if distance.is_multiple_of(self.grain) => {
                let first = *word & 1 << (slot % 64) == 0;
                *word |= 1 << (slot % 64);
                first
            }
            _ => {
                self.regular = false;
                true
            }
        }
    }

    /// A grain wants the place at a sector. Whether it can have it: all places
    /// are known, this is one of them, and nobody has taken it.
    pub fn claim(&mut self, sector: u64) -> bool {
        let distance = sector.checked_sub(self.front);
        let is_place = distance.is_some_and(|distance| {
            distance.is_multiple_of(self.grain) && distance / self.grain < self.count
        });
        self.regular && is_place && self.take(sector)
    }

    fn is_taken(&self, slot: u64) -> bool {
        let word = self.taken.get((slot / 64) as usize);
        word.is_some_and(|word| word & 1 << (slot % 64) != 0)
    }

    fn sector(&self, slot: u64) -> u64 {
        self.front + slot * self.grain
    }

    /// How to close gaps with at most so many moves. `None` where the places are
    /// not known.
    pub fn close(&self, most: usize) -> Option<Moves> {
        if !self.regular {
            return None;
        }
        let taken: u64 = self
            .taken
            .iter()
            .map(|word| word.count_ones())
            .map(u64::from)
            .sum();
        let mut end = self.count;
        let mut gaps = self.count - taken.min(self.count);
        let mut moves = 0;
        while end > 0 {
            let (moves_then, gaps_then) = match self.is_taken(end - 1) {
                true => (moves + 1, gaps),
                false => (moves, gaps.saturating_sub(1)),
            };
            if moves_then > gaps_then || moves_then > most as u64 {
                break;
            }
            (moves, gaps) = (moves_then, gaps_then);
            end -= 1;
        }
        let mut free = (0..end).filter(|&slot| !self.is_taken(slot));
        let from = (end..self.count).filter(|&slot| self.is_taken(slot));
        let list: Vec<(u64, u64)> = from
            .zip(&mut free)
            .map(|(from, to)| (self.sector(from), self.sector(to)))
            .collect();
        let mut freed: Vec<Range<u64>> = Vec::new();
        for slot in free {
            let range = self.sector(slot)..self.sector(slot + 1);
            match freed.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => freed.push(range),
            }
            if freed.len() > MAX_FREED {
                freed.pop();
                break;
            }
        }
        Some(Moves {
            list,
            end: self.sector(end),
            freed,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slots(taken: &[u64]) -> Slots {
        let mut slots = Slots::new(100, 10, 200);
        for slot in taken {
            slots.take(100 + 10 * slot);
        }
        slots
    }

    #[test]
    fn the_last_grains_move_into_the_first_gaps() {
        let moves = slots(&[1, 3, 8, 9]).close(10).unwrap();
        assert_eq!(moves.list, [(180, 100), (190, 120)]);
        assert_eq!((moves.end, moves.freed.len()), (140, 0));
        assert_eq!((moves.target(190), moves.target(110)), (120, 110));
    }

    #[test]
    fn a_bound_on_moves_leaves_gaps_that_are_given_back() {
        let moves = slots(&[1, 3, 8, 9]).close(1).unwrap();
        assert_eq!(moves.list, [(190, 100)]);
        assert_eq!(moves.end, 190);
        assert_eq!(moves.freed, [120..130, 140..180]);
    }

    #[test]
    fn nothing_moves_where_there_are_no_gaps() {
        let moves = slots(&[0, 1, 2]).close(10).unwrap();
        assert!(moves.list.is_empty() && moves.freed.is_empty());
        assert_eq!(moves.end, 130);
        assert_eq!(slots(&[]).close(10).unwrap().end, 100);
    }

    #[test]
    fn grains_between_places_are_left_alone() {
        let mut odd = slots(&[9]);
        odd.take(105);
        assert!(odd.close(10).is_none());
    }
}
