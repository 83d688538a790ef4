//! Looking at many files at a time: each may need a sandbox, and a machine has
//! more than one processor.

use super::sync::lock;
use std::panic::resume_unwind;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

/// The most threads: as many sandboxes wait to be used again.
const MOST: usize = 4;
/// Fewer items than this for each thread are not worth starting one.
const WORTH: usize = 8;

/// Does the same with every item; answers in their order.
pub fn together<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let threads = threads.min(MOST).min(items.len() / WORTH);
    if threads < 2 {
        return items.iter().map(work).collect();
    }
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Vec::with_capacity(items.len()));
    let part = || {
        let mut own = Vec::new();
        while let Some((index, item)) = take(&next, items) {
            own.push((index, work(item)));
        }
        lock(&done).extend(own);
    };
    thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(part)).collect();
        part();
        for other in others {
            other.join().unwrap_or_else(|panic| resume_unwind(panic));
        }
    });
    let mut done = done.into_inner().unwrap_or_default();
    done.sort_unstable_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, answer)| answer).collect()
}

fn take<'a, T>(next: &AtomicUsize, items: &'a [T]) -> Option<(usize, &'a T)> {
    let index = next.fetch_add(1, Ordering::Relaxed);
    items.get(index).map(|item| (index, item))
}

#[cfg(test)]
mod tests {
    use super::together;

    #[test]
    fn every_item_is_done_once_and_answers_come_in_order() {
        for count in [0, 1, 15, 16, 1000] {
            let items: Vec<usize> = (0..count).collect();
            let doubled: Vec<usize> = (0..count).map(|item| 2 * item).collect();
            assert_eq!(together(&items, |item| 2 * item), doubled);
        }
    }
}
