//! How often each host cluster is referred to: a byte per cluster, in pages
//! that come into being when they are needed.
//!
//! Where the pages would take more memory than they may, the highest ones go
//! and the range that is counted ends before them: the rest takes another pass
//! over the tables. What the counts mean is not known here.

use alloc::collections::BTreeSet;
use alloc::vec::Vec;

/// log2 of the clusters that a page counts.
pub const PAGE_BITS: u32 = 14;
/// Clusters that a page counts. A multiple of 8, so that the counts of a page
/// fill whole bytes of a refcount block at every width.
pub const PAGE: u64 = 1 << PAGE_BITS;
/// The largest count that fits into a byte; one value has another meaning.
const NARROW_MAX: u64 = 254;
/// In place of a count: the count on disk cannot be read.
const UNKNOWN: u8 = 255;

/// Counts of [`PAGE`] clusters.
#[derive(Debug)]
pub enum Page {
    /// Each at most 254.
    Narrow(Vec<u8>),
    /// Each at most 2^32 - 2.
    Wide(Vec<u32>),
}

impl Page {
    fn len(&self) -> usize {
        match self {
            Self::Narrow(_) => PAGE as usize,
            Self::Wide(_) => PAGE as usize * 4,
        }
    }

    /// A count by its place in the page.
    pub fn get(&self, at: usize) -> u64 {
        match self {
            Self::Narrow(counts) => counts.get(at).map_or(0, |&count| count.into()),
            Self::Wide(counts) => counts.get(at).map_or(0, |&count| count.into()),
        }
    }

    fn set(&mut self, at: usize, to: u8) {
        match self {
            Self::Narrow(counts) => {
                if let Some(count) = counts.get_mut(at) {
                    *count = to;
                }
            }
            Self::Wide(counts) => {
                if let Some(count) = counts.get_mut(at) {
                    *count = match to {
                        UNKNOWN => u32::MAX,
                        to => to.into(),
                    };
                }
            }
        }
    }
}

/// What is known about the count of a cluster on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// Nothing counts it.
    None,
    /// It is exactly one.
    One,
    /// It is more than one.
    More,
    /// It cannot be read.
    Unknown,
}

/// Counts of a range of clusters.
#[derive(Debug)]
pub struct Counters {
    /// The largest count that the image can store.
    most: u64,
    /// The largest count that is added in place: neither too much for a byte
    /// nor for the image.
    quick_most: u8,
    /// The first cluster that is counted, a multiple of [`PAGE`].
    first: u64,
    /// The first behind it that is not.
    end: u64,
    /// Bytes that pages may take.
    budget: usize,
    /// Bytes that they take.
    held: usize,
    pages: Vec<Option<Page>>,
    /// Pages with a count that would have been too large, which has been told.
    overflowed: BTreeSet<usize>,
}

impl Counters {
    /// Counters up to `most` that take at most about `budget` bytes.
    pub fn new(most: u64, budget: usize) -> Self {
        Self {
            most,
            quick_most: most.min(NARROW_MAX) as u8,
            first: 0,
            end: u64::MAX,
            budget,
            held: 0,
            pages: Vec::new(),
            overflowed: BTreeSet::new(),
        }
    }

    /// Starts over, from cluster `first` on, a multiple of [`PAGE`].
    pub fn restart(&mut self, first: u64) {
        self.pages.clear();
        self.held = 0;
        self.first = first;
        self.end = u64::MAX;
    }

    /// The first cluster that is counted.
    pub fn first(&self) -> u64 {
        self.first
    }

    /// The first behind those that are counted, which may have become lower.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Whether a cluster is counted.
    pub fn holds(&self, cluster: u64) -> bool {
        (self.first..self.end).contains(&cluster)
    }

    /// Adds one reference. Whether the count can hold it.
    #[inline]
    pub fn add_one(&mut self, cluster: u64) -> bool {
        if cluster >= self.first
            && let Some(Some(Page::Narrow(counts))) =
                self.pages.get_mut((cluster >> PAGE_BITS) as usize)
            && let Some(count) = counts.get_mut((cluster % PAGE) as usize)
            && *count < self.quick_most
        {
            *count += 1;
            return true;
        }
        self.add(cluster, 1) == 0
    }

    /// Adds references. How many of them the count cannot hold, as far as that
    /// is not known yet.
    pub fn add(&mut self, cluster: u64, references: u64) -> u64 {
        if !self.holds(cluster) || !self.make(cluster) {
            return 0;
        }
        let (index, at) = ((cluster >> PAGE_BITS) as usize, (cluster % PAGE) as usize);
        let Some(Some(page)) = self.pages.get_mut(index) else {
            return 0;
        };
        let wanted = page.get(at).saturating_add(references);
        let most = self.most.min(u64::from(u32::MAX - 1));
        let count = wanted.min(most);
        let needs_width = count > NARROW_MAX && matches!(page, Page::Narrow(_));
        if needs_width && !self.widen(index) {
            return 0;
        }
        match self.pages.get_mut(index) {
            Some(Some(Page::Narrow(counts))) => {
                if let Some(place) = counts.get_mut(at) {
                    *place = count as u8;
                }
            }
            Some(Some(Page::Wide(counts))) => {
                if let Some(place) = counts.get_mut(at) {
                    *place = count as u32;
                }
            }
            _ => return 0,
        }
        match wanted > self.most {
            true => {
                self.overflowed.insert(index);
                wanted - self.most
            }
            false => 0,
        }
    }

    /// Whether an earlier pass has told that counts of a cluster's page are too
    /// large.
    pub fn told(&self, cluster: u64, pass: u64) -> bool {
        pass > 0 && self.overflowed.contains(&((cluster >> PAGE_BITS) as usize))
    }

    /// The page that holds a cluster's count, where anything in it was counted.
    pub fn page(&self, cluster: u64) -> Option<&Page> {
        let page = self.pages.get((cluster >> PAGE_BITS) as usize)?;
        page.as_ref()
    }

    /// The first cluster behind `cluster`'s page that may have been counted.
    pub fn next_page(&self, cluster: u64) -> u64 {
        let index = (cluster >> PAGE_BITS) as usize + 1;
        let mut behind = self.pages.iter().enumerate().skip(index);
        let next = behind.find(|(_, page)| page.is_some());
        next.map_or(u64::MAX, |(index, _)| (index as u64) << PAGE_BITS)
    }

    /// A cluster's count.
    pub fn get(&self, cluster: u64) -> u64 {
        self.page(cluster)
            .map_or(0, |page| page.get((cluster % PAGE) as usize))
    }

    /// Puts what is known about the stored count in place of the own one, where
    /// there is one.
    pub fn store(&mut self, cluster: u64, stored: Stored) {
        if let Some(Some(page)) = self.pages.get_mut((cluster >> PAGE_BITS) as usize) {
            let to = match stored {
                Stored::None => 0,
                Stored::One => 1,
                Stored::More => 2,
                Stored::Unknown => UNKNOWN,
            };
            page.set((cluster % PAGE) as usize, to);
        }
    }

    /// What is known about the stored count of a cluster: what was
    /// [stored](Self::store), the own count elsewhere. `None` where nothing was
    /// counted anywhere near.
    #[inline]
    pub fn stored(&self, cluster: u64) -> Option<Stored> {
        let page = self.page(cluster)?;
        let at = (cluster % PAGE) as usize;
        Some(match page {
            Page::Narrow(counts) => match counts.get(at)? {
                0 => Stored::None,
                1 => Stored::One,
                &UNKNOWN => Stored::Unknown,
                _ => Stored::More,
            },
            Page::Wide(counts) => match counts.get(at)? {
                0 => Stored::None,
                1 => Stored::One,
                &u32::MAX => Stored::Unknown,
                _ => Stored::More,
            },
        })
    }

    /// Makes sure that there is a page for a cluster. Whether there is: it may
    /// be one too many.
    fn make(&mut self, cluster: u64) -> bool {
        let index = (cluster >> PAGE_BITS) as usize;
        if let Some(Some(_)) = self.pages.get(index) {
            return true;
        }
        while self.held + PAGE as usize > self.budget {
            if !self.drop_highest(index) {
                break;
            }
        }
        if !self.holds(cluster) {
            return false;
        }
        let Some(counts) = zeroes(PAGE as usize, 0u8) else {
            self.drop_from(index);
            return false;
        };
        if self.pages.len() <= index {
            self.pages.resize_with(index + 1, || None);
        }
        if let Some(slot) = self.pages.get_mut(index) {
            *slot = Some(Page::Narrow(counts));
            self.held += PAGE as usize;
        }
        true
    }

    /// Gives every count of a page more room. Whether the page is still there.
    fn widen(&mut self, index: usize) -> bool {
        while self.held + 3 * PAGE as usize > self.budget {
            if self.drop_highest(index + 1) {
                continue;
            }
            if index > (self.first >> PAGE_BITS) as usize {
                self.drop_from(index);
                return false;
            }
            break;
        }
        let Some(mut wide) = zeroes(PAGE as usize, 0u32) else {
            self.drop_from(index);
            return false;
        };
        let Some(Some(page)) = self.pages.get_mut(index) else {
            return false;
        };
        if let Page::Narrow(counts) = page {
            for (to, from) in wide.iter_mut().zip(counts.iter()) {
                *to = u32::from(*from);
            }
            *page = Page::Wide(wide);
            self.held += 3 * PAGE as usize;
        }
        true
    }

    /// Drops the highest page, or gives up page `index` where it would be the
    /// highest: the counted range ends before it. `false` where nothing can be
    /// given up: the first page of the range always stays.
    fn drop_highest(&mut self, index: usize) -> bool {
        let highest = self.pages.iter().rposition(Option::is_some);
        let victim = highest.map_or(index, |highest| highest.max(index));
        if victim <= (self.first >> PAGE_BITS) as usize || !self.holds((victim as u64) << PAGE_BITS)
        {
            return false;
        }
        self.drop_from(victim);
        victim != index
    }

    /// Drops page `index` and all behind it.
    fn drop_from(&mut self, index: usize) {
        let gone = self.pages.iter().skip(index).flatten();
        self.held -= gone.map(Page::len).sum::<usize>();
        self.pages.truncate(index);
        self.end = (index as u64) << PAGE_BITS;
    }
}

/// Zeroes, where memory is left for them.
fn zeroes<T: Clone>(len: usize, zero: T) -> Option<Vec<T>> {
    let mut list = Vec::new();
    list.try_reserve_exact(len).ok()?;
    list.resize(len, zero);
    Some(list)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_count_outgrows_its_byte() {
        let mut counters = Counters::new(u64::from(u16::MAX), 1 << 20);
        for _ in 0..300 {
            assert!(counters.add_one(5));
        }
        assert_eq!(counters.get(5), 300);
        assert_eq!(counters.get(4), 0);
        assert_eq!(counters.add(5, u64::from(u16::MAX)), 300);
    }

    #[test]
    fn what_the_image_cannot_store_is_not_counted() {
        let mut counters = Counters::new(1, 1 << 20);
        assert!(counters.add_one(7));
        assert!(!counters.add_one(7));
        assert_eq!(counters.add(8, 4), 3);
        assert_eq!((counters.get(7), counters.get(8)), (1, 1));
    }

    proptest! {
        /// Whatever the order of references and however little memory there
        /// is, the passes together count each of them once.
        #[test]
        fn passes_under_any_budget_add_up(
            references in prop::collection::vec((0u64..6, 0u64..40, 1u64..200), 0..60),
            pages in 4usize..9,
        ) {
            let clusters = references
                .iter()
                .map(|&(page, at, count)| (page * PAGE + at, count));
            let mut expected = alloc::collections::BTreeMap::new();
            for (cluster, count) in clusters.clone() {
                *expected.entry(cluster).or_insert(0) += count;
            }
            let mut counters = Counters::new(u64::MAX, pages * PAGE as usize);
            let mut found = alloc::collections::BTreeMap::new();
            let mut passes = 0;
            while counters.first() < 6 * PAGE {
                for (cluster, count) in clusters.clone() {
                    prop_assert_eq!(counters.add(cluster, count), 0);
                }
                let end = counters.end().min(6 * PAGE);
                prop_assert!(counters.held <= counters.budget);
                for cluster in counters.first()..end {
                    if counters.get(cluster) > 0 {
                        found.insert(cluster, counters.get(cluster));
                    }
                }
                counters.restart(end);
                passes += 1;
                prop_assert!(passes <= 6);
            }
            prop_assert_eq!(found, expected);
        }
    }
}
