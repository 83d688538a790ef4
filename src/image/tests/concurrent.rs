//! Many threads on one image: whatever the order, nobody reads another unit's
//! bytes and no write is lost.

use super::toy::{Toy, UNIT, Unit};
use super::{Fixture, for_writing};
use crate::image::Image;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

const UNITS: u64 = 256;

/// A disk whose units are all shared, so that each moves when it is written,
/// and whose old places are used again. Every word of a unit is its number.
fn shared_disk(pairs: bool) -> (Fixture, Image) {
    let words = |unit: u64| unit.to_le_bytes().repeat(UNIT as usize / 8);
    let header = vec![0; UNIT as usize];
    let content: Vec<u8> = header
        .into_iter()
        .chain((0..UNITS).flat_map(words))
        .collect();
    let units = (0..UNITS).map(|unit| Unit::At((unit + 1) * UNIT, true));
    let toy = Toy::new(units.collect(), (UNITS + 1) * UNIT);
    {
        let mut state = toy.0.lock().unwrap();
        (state.pairs, state.room) = (pairs, 8);
    }
    let fixture = Fixture::new(&content);
    let image = fixture.open(&for_writing(), toy);
    (fixture, image)
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
                if unit % 3 == 0 {
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
                    for unit in 0..UNITS {
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
