//! Which of the threads that answer requests listen for the next one.
//!
//! The kernel wakes whoever has listened longest. If all threads listened, each
//! request would go to another one, whose memory no processor has at hand. So only
//! as many listen as can run at a time, and the others rest until whoever is to do
//! something that may take long finds that nobody listens any more.

use crate::fs::sync::lock;
use std::cell::RefCell;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// See the module.
pub struct Crew(Arc<Shared>);

struct Shared {
    /// How many threads there are.
    total: usize,
    /// How many are to listen.
    wanted: usize,
    /// How many do. Those that nobody has heard of yet are among them.
    listening: AtomicUsize,
    rest: Mutex<Rest>,
    called: Condvar,
}

#[derive(Default)]
struct Rest {
    /// Threads that have answered a request.
    known: usize,
    resting: usize,
    /// How many of these have been called and have not noticed yet.
    called: usize,
    /// Whether a thread has ended: then all do.
    over: bool,
}

/// A request that is being answered. Dropped by the thread that had it once
/// the answer is sent; it may return only when somebody has to listen.
pub struct Turn<'a>(&'a Shared);

/// Tells the others when the thread ends.
struct Member(Arc<Shared>);

thread_local! {
    static MEMBER: RefCell<Option<Member>> = const { RefCell::new(None) };
}

impl Crew {
    /// A crew of `total` threads, all of them listening, of which `wanted` go on.
    pub fn new(total: usize, wanted: usize) -> Self {
        Self(Arc::new(Shared {
            total,
            wanted: wanted.clamp(1, total.max(1)),
            listening: AtomicUsize::new(total),
            rest: Mutex::default(),
            called: Condvar::new(),
        }))
    }

    /// The calling thread has got a request.
    pub fn turn(&self) -> Turn<'_> {
        self.0.listening.fetch_sub(1, Ordering::AcqRel);
        MEMBER.with_borrow_mut(|member| {
            member.get_or_insert_with(|| {
                lock(&self.0.rest).known += 1;
                Member(Arc::clone(&self.0))
            });
        });
        Turn(&self.0)
    }
}

impl Turn<'_> {
    /// To be said before anything that may take long, for others or for a disk.
    pub fn may_wait(&self) {
        let shared = self.0;
        if shared.listening.load(Ordering::Acquire) > 0 {
            return;
        }
        let mut rest = lock(&shared.rest);
        if shared.listening.load(Ordering::Acquire) == 0 && rest.resting > rest.called {
            rest.called += 1;
            shared.listening.fetch_add(1, Ordering::AcqRel);
            shared.called.notify_one();
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if !self.0.listen() {
            self.0.rest();
        }
    }
}

impl Shared {
    /// Counts one more listener, unless there are enough.
    fn listen(&self) -> bool {
        let more = |now| (now < self.wanted).then_some(now + 1);
        let counted = self
            .listening
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, more);
        counted.is_ok()
    }

    /// Waits until there are not. Not before each thread is known: one that is
    /// not could not tell the others of its end.
    fn rest(&self) {
        let mut rest = lock(&self.rest);
        if rest.over || rest.known < self.total {
            self.listening.fetch_add(1, Ordering::AcqRel);
            return;
        }
        // Whoever looks for somebody to call holds the lock, too.
        if self.listen() {
            return;
        }
        rest.resting += 1;
        while rest.called == 0 && !rest.over {
            let woken = self.called.wait(rest);
            rest = woken.unwrap_or_else(PoisonError::into_inner);
        }
        rest.resting -= 1;
        match rest.called.checked_sub(1) {
            // Counted by whoever called.
            Some(left) => rest.called = left,
            None => drop(self.listening.fetch_add(1, Ordering::AcqRel)),
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        lock(&self.0.rest).over = true;
        self.0.called.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::thread::{JoinHandle, spawn, yield_now};
    use std::time::Duration;

    /// What a thread does with a request.
    enum Work {
        /// Answers it.
        Quick,
        /// Says that it may wait, and waits for the word.
        Slow(Receiver<()>),
    }

    /// One queue of requests, as the kernel has it.
    struct Queue {
        send: Sender<Work>,
        answered: Receiver<()>,
        threads: Vec<JoinHandle<()>>,
        crew: Arc<Crew>,
    }

    fn queue(total: usize, wanted: usize) -> Queue {
        let crew = Arc::new(Crew::new(total, wanted));
        let (send, requests) = channel::<Work>();
        let (answer, answered) = channel();
        let requests = Arc::new(Mutex::new(requests));
        let threads = (0..total).map(|_| {
            let (crew, requests) = (Arc::clone(&crew), Arc::clone(&requests));
            let answer = answer.clone();
            spawn(move || {
                while let Ok(work) = { lock(&requests).recv() } {
                    let turn = crew.turn();
                    if let Work::Slow(word) = work {
                        turn.may_wait();
                        let _ = word.recv();
                    }
                    let _ = answer.send(());
                }
            })
        });
        let threads = threads.collect();
        Queue {
            send,
            answered,
            threads,
            crew,
        }
    }

    impl Queue {
        /// Makes every thread known and lets those rest that are not wanted.
        fn settle(&self) {
            let shared = &self.crew.0;
            let (words, waits): (Vec<_>, Vec<_>) = (0..shared.total).map(|_| channel()).unzip();
            for wait in waits {
                self.send.send(Work::Slow(wait)).unwrap();
            }
            while lock(&shared.rest).known < shared.total {
                yield_now();
            }
            for word in words {
                word.send(()).unwrap();
                self.answered.recv().unwrap();
            }
            while lock(&shared.rest).resting < shared.total - shared.wanted {
                yield_now();
            }
        }

        fn end(self) {
            drop(self.send);
            for thread in self.threads {
                thread.join().unwrap();
            }
        }
    }

    #[test]
    fn slow_requests_up_to_the_last_thread_hold_up_no_other_one() {
        let queue = queue(4, 2);
        queue.settle();
        let words: Vec<Sender<()>> = (0..3)
            .map(|_| {
                let (word, wait) = channel();
                queue.send.send(Work::Slow(wait)).unwrap();
                word
            })
            .collect();
        queue.send.send(Work::Quick).unwrap();
        let quick = queue.answered.recv_timeout(Duration::from_secs(20));
        assert_eq!(quick, Ok(()));
        for word in words {
            word.send(()).unwrap();
            queue.answered.recv().unwrap();
        }
        queue.end();
    }

    #[test]
    fn no_more_than_wanted_listen_once_all_are_known() {
        let queue = queue(6, 2);
        queue.settle();
        for _ in 0..100 {
            queue.send.send(Work::Quick).unwrap();
            queue.answered.recv().unwrap();
            assert!(queue.crew.0.listening.load(Ordering::Acquire) <= 2);
        }
        assert_eq!(lock(&queue.crew.0.rest).resting, 4);
        queue.end();
    }

    #[test]
    fn nobody_rests_while_a_thread_is_unknown() {
        let crew = Crew::new(3, 1);
        drop(crew.turn());
        drop(crew.turn());
        assert_eq!(crew.0.listening.load(Ordering::Acquire), 3);
    }
}
