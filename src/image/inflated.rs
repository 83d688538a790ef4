//! The most recently read compressed clusters, inflated: a bounded memory.
//!
//! A cluster that is written is compressed no more and never asked for here
//! again, so that nothing has to be forgotten before a resize does.

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::sync::Arc;

/// Bytes of inflated data that one image keeps.
const CAPACITY: usize = 16 << 20;

/// Inflated clusters by guest offset, the least recently used forgotten first.
#[derive(Debug, Default)]
pub(crate) struct Inflated {
    clusters: HashMap<u64, Entry>,
    /// Guest offsets by last use.
    by_use: BTreeMap<u64, u64>,
    uses: u64,
    bytes: usize,
}

#[derive(Debug)]
struct Entry {
    data: Arc<[u8]>,
    used: u64,
}

impl Inflated {
    /// The cluster at an offset.
    pub fn get(&mut self, offset: u64) -> Option<Arc<[u8]>> {
        self.uses += 1;
        let entry = self.clusters.get_mut(&offset)?;
        self.by_use.remove(&entry.used);
        entry.used = self.uses;
        self.by_use.insert(self.uses, offset);
        Some(Arc::clone(&entry.data))
    }

    /// Keeps a cluster; forgets others where there is no room.
    pub fn put(&mut self, offset: u64, data: Arc<[u8]>) {
        self.remove(offset);
        self.uses += 1;
        self.bytes += data.len();
        let used = self.uses;
        self.clusters.insert(offset, Entry { data, used });
        self.by_use.insert(used, offset);
        while self.bytes > CAPACITY && self.clusters.len() > 1 {
            match self.by_use.first_key_value() {
                Some((_, &oldest)) => self.remove(oldest),
                None => break,
            }
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    fn remove(&mut self, offset: u64) {
        if let Some(entry) = self.clusters.remove(&offset) {
            self.by_use.remove(&entry.used);
            self.bytes -= entry.data.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster(len: usize) -> Arc<[u8]> {
        vec![1; len].into()
    }

    #[test]
    fn the_least_recently_used_goes_first_and_memory_is_bounded() {
        let mut cache = Inflated::default();
        for offset in 0..16 {
            cache.put(offset, cluster(1 << 20));
        }
        assert!(cache.get(0).is_some());
        cache.put(16, cluster(1 << 20));
        assert!(cache.get(1).is_none());
        assert!(cache.get(0).is_some());
        assert_eq!(cache.bytes, CAPACITY);
        assert_eq!(cache.by_use.len(), cache.clusters.len());
    }

    #[test]
    fn putting_a_cluster_again_replaces_it() {
        let mut cache = Inflated::default();
        cache.put(0, cluster(10));
        cache.put(0, cluster(20));
        assert_eq!((cache.bytes, cache.get(0).unwrap().len()), (20, 20));
    }
}
