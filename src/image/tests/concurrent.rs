//! Many threads on one image: whatever the order, nobody reads another unit's
//! bytes and no write is lost.

use super::toy::{Toy, UNIT, Unit};
use super::{Fixture, for_writing};
use crate::image::disk::shared;
use crate::image::{Effects, EffectsHook, Image};
use instar_guest::FileNo;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

const UNITS: u64 = 256;

/// A disk whose units are shared, so that each moves when it is written, and
/// whose old places are used again; with `pairs` every second one is not
/// shared, and still moves with its neighbour. Every word of a unit is its
/// number.
fn shared_disk(pairs: bool) -> (Fixture, Image) {
    let words = |unit: u64| unit.to_le_bytes().repeat(UNIT as usize / 8);
    let header = vec![0; UNIT as usize];
    let content: Vec<u8> = header
        .into_iter()
        .chain((0..UNITS).flat_map(words))
        .collect();
    let shared = |unit: u64| !pairs || unit.is_multiple_of(2);
    let units = (0..UNITS).map(|unit| Unit::At((unit + 1) * UNIT, shared(unit)));
    let toy = Toy::new(units.collect(), (UNITS + 1) * UNIT);
    {
        let mut state = toy.0.lock().unwrap();
        (state.pairs, state.room) = (pairs, 8);
    }
    let fixture = Fixture::new(&content);
    let mut options = for_writing();
    // Slow effects leave room for what must not happen meanwhile.
    options.effects = EffectsHook(Some(Arc::new(|real| Box::new(Slow(real)))));
    let image = fixture.open(&options, toy);
    (fixture, image)
}

/// Effects that take their time to write.
struct Slow(Box<dyn Effects>);

impl Effects for Slow {
    fn write(&self, file: FileNo, offset: u64, data: &[u8]) -> io::Result<()> {
        thread::sleep(Duration::from_micros(50));
        self.0.write(file, offset, data)
    }

    fn zero(&self, file: FileNo, offset: u64, len: u64) -> io::Result<()> {
        self.0.zero(file, offset, len)
    }

    fn copy(&self, file: FileNo, from: u64, to: u64, len: u64) -> io::Result<()> {
        self.0.copy(file, from, to, len)
    }

    fn copy_from(
        &self,
        file: FileNo,
        source: FileNo,
        from: u64,
        to: u64,
        len: u64,
    ) -> io::Result<()> {
        self.0.copy_from(file, source, from, to, len)
    }

    fn reserve(&self, file: FileNo, offset: u64, len: u64) -> io::Result<()> {
        self.0.reserve(file, offset, len)
    }

    fn punch(&self, file: FileNo, offset: u64, len: u64) -> io::Result<()> {
        self.0.punch(file, offset, len)
    }

    fn set_len(&self, file: FileNo, len: u64) -> io::Result<()> {
        self.0.set_len(file, len)
    }

    fn sync(&self, file: FileNo) -> io::Result<()> {
        self.0.sync(file)
    }
}

/// Reads units until told to stop; each word must be the unit's own number.
fn watch(image: &Image, step: u64, stop: &AtomicBool) {
    let mut buf = vec![0; UNIT as usize];
    let mut unit = 0;
    while !stop.load(Ordering::Relaxed) {
        image.read_at(&mut buf, unit * UNIT).unwrap();
        for word in buf.chunks(8) {
            assert_eq!(word, unit.to_le_bytes(), "unit {unit}");
        }
        unit = (unit + step) % UNITS;
    }
}

#[test]
fn readers_never_see_another_units_bytes_while_units_move() {
    for pairs in [false, true] {
        let (_fixture, image) = shared_disk(pairs);
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            for step in [1, 7] {
                let (image, stop) = (&image, &stop);
                scope.spawn(move || watch(image, step, stop));
            }
            for unit in 0..UNITS {
                let word = unit.to_le_bytes();
                image
                    .write_at(&word, unit * UNIT + 8 * (unit % 512))
                    .unwrap();
                if unit.is_multiple_of(3) {
                    image.flush().unwrap();
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
}

#[test]
fn writers_of_one_unit_lose_no_byte() {
    for pairs in [false, true] {
        let (_fixture, image) = shared_disk(pairs);
        // Each thread writes its own bytes of every unit, so most units are
        // moved by one thread while others write beside it.
        const THREADS: u64 = 4;
        thread::scope(|scope| {
            for thread in 0..THREADS {
                let image = &image;
                scope.spawn(move || {
                    for unit in (0..UNITS).map(|unit| unit ^ (thread & 1)) {
                        let offset = unit * UNIT + 700 * thread + 3;
                        image.write_at(&[0xf0 + thread as u8; 500], offset).unwrap();
                        if unit % 16 == thread {
                            image.flush().unwrap();
                        }
                    }
                });
            }
        });
        let mut buf = vec![0; UNIT as usize];
        for unit in 0..UNITS {
            let mut expected = unit.to_le_bytes().repeat(UNIT as usize / 8);
            for thread in 0..THREADS {
                let from = (700 * thread + 3) as usize;
                expected[from..from + 500].fill(0xf0 + thread as u8);
            }
            image.read_at(&mut buf, unit * UNIT).unwrap();
            assert!(buf == expected, "unit {unit}, pairs {pairs}");
        }
    }
}

#[test]
fn a_resize_waits_for_nobody_forever_and_loses_nothing() {
    let (_fixture, image) = shared_disk(false);
    thread::scope(|scope| {
        let image = &image;
        scope.spawn(move || {
            for unit in 0..UNITS {
                let word = unit.to_le_bytes();
                image.write_at(&word, unit * UNIT).unwrap();
            }
        });
        for more in 1..=20 {
            let size = (UNITS + more) * UNIT;
            image.resize(size, &Default::default()).unwrap();
        }
    });
    assert_eq!(image.virtual_size(), (UNITS + 20) * UNIT);
    let mut buf = vec![0; UNIT as usize];
    for unit in 0..UNITS {
        image.read_at(&mut buf, unit * UNIT).unwrap();
        assert_eq!(buf, unit.to_le_bytes().repeat(UNIT as usize / 8));
    }
}

#[test]
fn a_flush_does_not_release_space_that_is_still_being_read() {
    let (_fixture, image) = shared_disk(false);
    image.write_at(&[0; 8], 0).unwrap();
    let (events, seen) = mpsc::channel();
    let reading = shared(&image.traffic);
    thread::scope(|scope| {
        let (image, flushed) = (&image, events.clone());
        scope.spawn(move || {
            image.flush().unwrap();
            flushed.send("flushed").unwrap();
        });
        // However long the reader takes, the flush ends after it.
        thread::sleep(Duration::from_millis(30));
        events.send("read").unwrap();
        drop(reading);
    });
    assert_eq!(
        [seen.recv().unwrap(), seen.recv().unwrap()],
        ["read", "flushed"]
    );
}

/// Effects whose syncs wait for a word, and say that they are waiting.
struct Gated {
    real: Box<dyn Effects>,
    waiting: mpsc::Sender<()>,
    go: Arc<Mutex<mpsc::Receiver<io::Result<()>>>>,
}

impl Effects for Gated {
    fn write(&self, file: FileNo, offset: u64, data: &[u8]) -> io::Result<()> {
        self.real.write(file, offset, data)
    }

    fn zero(&self, file: FileNo, offset: u64, len: u64) -> io::Result<()> {
        self.real.zero(file, offset, len)
    }

    fn copy(&self, file: FileNo, from: u64, to: u64, len: u64) -> io::Result<()> {
        self.real.copy(file, from, to, len)
    }

    fn copy_from(
        &self,
        file: FileNo,
        source: FileNo,
        from: u64,
        to: u64,
        len: u64,
    ) -> io::Result<()> {
        self.real.copy_from(file, source, from, to, len)
    }

    fn reserve(&self, file: FileNo, offset: u64, len: u64) -> io::Result<()> {
        self.real.reserve(file, offset, len)
    }

    fn punch(&self, file: FileNo, offset: u64, len: u64) -> io::Result<()> {
        self.real.punch(file, offset, len)
    }

    fn set_len(&self, file: FileNo, len: u64) -> io::Result<()> {
        self.real.set_len(file, len)
    }

    fn sync(&self, _: FileNo) -> io::Result<()> {
        self.waiting.send(()).unwrap();
        self.go.lock().unwrap().recv().unwrap()
    }
}

/// A disk that can be written in place, with a word to end each sync by.
fn gated() -> (
    Fixture,
    Image,
    mpsc::Receiver<()>,
    mpsc::Sender<io::Result<()>>,
) {
    let (waiting, seen) = mpsc::channel();
    let (word, go) = mpsc::channel();
    let go = Arc::new(Mutex::new(go));
    let fixture = Fixture::new(&[1; 2 * UNIT as usize]);
    let mut options = for_writing();
    options.effects = EffectsHook(Some(Arc::new(move |real| {
        Box::new(Gated {
            real,
            waiting: waiting.clone(),
            go: Arc::clone(&go),
        })
    })));
    let toy = Toy::new(vec![Unit::At(UNIT, false)], 2 * UNIT);
    let image = fixture.open(&options, toy);
    image.read_at(&mut [0], 0).unwrap();
    (fixture, image, seen, word)
}

#[test]
fn an_image_is_dirty_until_its_changes_are_durable() {
    let (_fixture, image, waiting, word) = gated();
    image.write_at(&[9], 0).unwrap();
    thread::scope(|scope| {
        let flush = scope.spawn(|| image.flush());
        waiting.recv().unwrap();
        let during = image.is_dirty();
        word.send(Ok(())).unwrap();
        flush.join().unwrap().unwrap();
        assert!(during);
    });
    assert!(!image.is_dirty());
}

#[test]
fn what_is_written_during_a_sync_waits_for_the_next() {
    let (_fixture, image, waiting, word) = gated();
    image.write_at(&[9], 0).unwrap();
    thread::scope(|scope| {
        let flush = scope.spawn(|| image.flush());
        waiting.recv().unwrap();
        image.write_at(&[8], 1).unwrap();
        word.send(Ok(())).unwrap();
        flush.join().unwrap().unwrap();
    });
    assert!(image.is_dirty());
}

#[test]
fn a_second_sync_waits_for_the_first_and_fails_with_it() {
    let (_fixture, image, waiting, word) = gated();
    image.write_at(&[9], 0).unwrap();
    thread::scope(|scope| {
        let first = scope.spawn(|| image.files.sync());
        waiting.recv().unwrap();
        let second = scope.spawn(|| image.files.sync());
        word.send(Err(io::Error::from_raw_os_error(libc::EIO)))
            .unwrap();
        // For a second sync that would succeed, as the kernel's does.
        word.send(Ok(())).unwrap();
        for sync in [first, second] {
            let error = sync.join().unwrap().unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EIO));
        }
    });
}
