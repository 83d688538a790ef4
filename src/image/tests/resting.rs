//! When an image gives its sandbox back, and what becomes of the requests after
//! that.

use super::toy::{State, Toy, UNIT, Unit};
use super::{Fixture, for_writing, told};
use crate::image::error::Fault;
use crate::image::guest::Guest;
use crate::image::open::Guests;
use crate::image::{ErrorKind, Image, Operation, ResizeOptions};
use std::io;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const FOR_LONG: Duration = Duration::from_secs(3600);

/// An image whose guests are counted, and may fail to start.
struct Run {
    fixture: Fixture,
    image: Image,
    toy: Arc<Mutex<State>>,
    started: Arc<AtomicUsize>,
    /// What keeps the next one from starting, or 0.
    errno: Arc<AtomicI32>,
}

impl Run {
    /// Two units of data, of which the second is shared, a compressed one, and
    /// one that is not there.
    fn new() -> Self {
        let units = vec![
            Unit::At(UNIT, false),
            Unit::At(2 * UNIT, true),
            Unit::Compressed(vec![7; UNIT as usize]),
            Unit::Absent,
        ];
        let fixture = Fixture::new(&[1; 3 * UNIT as usize]);
        let toy = Toy::new(units, 3 * UNIT);
        let started = Arc::new(AtomicUsize::new(0));
        let errno = Arc::new(AtomicI32::new(0));
        let guests: Guests = {
            let (toy, started, errno) = (Mutex::new(toy.clone()), started.clone(), errno.clone());
            Arc::new(move || match errno.swap(0, Ordering::Relaxed) {
                0 => {
                    started.fetch_add(1, Ordering::Relaxed);
                    let guest = toy.lock().unwrap().clone();
                    Ok(Box::new(guest) as Box<dyn Guest>)
                }
                errno => {
                    let error = io::Error::from_raw_os_error(errno);
                    Err(Fault::os("start a guest", error))
                }
            })
        };
        let opened = for_writing().open_path(&guests, &fixture.path);
        let image = opened.map_err(|fault| fault.at(Operation::Open, &fixture.path));
        Self {
            image: image.unwrap(),
            fixture,
            toy: toy.0,
            started,
            errno,
        }
    }

    fn rest(&self) {
        self.image.rest(Duration::ZERO);
    }

    fn started(&self) -> usize {
        self.started.load(Ordering::Relaxed)
    }

    fn unit(&self, index: u64) -> Vec<u8> {
        let mut unit = vec![0xaa; UNIT as usize];
        self.image.read_at(&mut unit, index * UNIT).unwrap();
        unit
    }
}

#[test]
fn what_was_asked_lately_keeps_the_sandbox() {
    let run = Run::new();
    run.image.rest(FOR_LONG);
    assert!(!run.image.is_resting());
    run.rest();
    assert!(run.image.is_resting());
}

#[test]
fn what_is_known_of_the_mapping_needs_no_sandbox() {
    let run = Run::new();
    run.unit(0);
    run.rest();
    run.image.write_at(&[9; 512], 0).unwrap();
    run.image.flush().unwrap();
    assert_eq!(run.unit(0)[..512], [9; 512]);
    assert_eq!(run.unit(1), [1; UNIT as usize]);
    assert!(run.image.is_resting());
    assert_eq!(run.started(), 1);
}

#[test]
fn every_request_that_needs_a_sandbox_starts_one() {
    let run = Run::new();
    run.rest();
    assert_eq!(run.unit(1), [1; UNIT as usize]);
    run.rest();
    assert_eq!(run.unit(2), [7; UNIT as usize]);
    run.rest();
    run.image.write_at(&[5; 512], 3 * UNIT).unwrap();
    run.image.flush().unwrap();
    run.rest();
    run.image
        .resize(5 * UNIT, &ResizeOptions::default())
        .unwrap();
    run.rest();
    run.image.map(4 * UNIT, UNIT).unwrap();
    assert_eq!(run.started(), 6);
    assert_eq!(run.unit(3)[..512], [5; 512]);
    assert_eq!(run.image.virtual_size(), 5 * UNIT);
}

#[test]
fn changes_that_only_the_guest_knows_keep_the_sandbox() {
    let run = Run::new();
    run.image.write_at(&[5; 512], 3 * UNIT).unwrap();
    run.rest();
    assert!(!run.image.is_resting());
    run.image.flush().unwrap();
    run.rest();
    assert!(run.image.is_resting());
}

#[test]
fn a_flush_that_had_no_space_keeps_the_sandbox() {
    let run = Run::new();
    run.image.write_at(&[5; 512], 3 * UNIT).unwrap();
    hold_postponed(&run.image);
    run.image.unflushed.store(false, Ordering::Release);
    run.rest();
    assert!(!run.image.is_resting());
}

fn hold_postponed(image: &Image) {
    image.session.lock().unwrap().postponed = Some(Default::default());
}

#[test]
fn whoever_is_asking_is_not_waited_for() {
    let run = Run::new();
    let asking = run.image.session.lock().unwrap();
    run.rest();
    drop(asking);
    assert!(!run.image.is_resting());
}

#[test]
fn a_sandbox_that_does_not_start_fails_that_request_alone() {
    let run = Run::new();
    run.unit(0);
    run.rest();
    for errno in [libc::ENOMEM, libc::EMFILE] {
        run.errno.store(errno, Ordering::Relaxed);
        let error = run.image.write_at(&[5; 512], 3 * UNIT).unwrap_err();
        assert_eq!(error.errno(), errno);
    }
    assert_eq!(run.unit(0), [1; UNIT as usize]);
    run.image.write_at(&[5; 512], 3 * UNIT).unwrap();
    run.image.flush().unwrap();
    assert_eq!(run.unit(3)[..512], [5; 512]);
}

#[test]
fn an_image_that_is_another_by_now_is_stale() {
    let run = Run::new();
    run.unit(0);
    run.image.write_at(&[9; 512], 0).unwrap();
    run.image.flush().unwrap();
    run.rest();
    run.toy.lock().unwrap().size += UNIT;
    let stale = (
        ErrorKind::Stale,
        "The file was changed or replaced by another program".to_owned(),
    );
    // Nor is anything done any more by what was known of it.
    for offset in [3 * UNIT, 0] {
        let error = run.image.write_at(&[5; 512], offset).unwrap_err();
        assert_eq!(told(&error), stale);
        assert_eq!(error.errno(), libc::ESTALE);
        assert!(run.image.is_resting());
    }
    assert_eq!(run.fixture.content()[UNIT as usize..][..512], [9; 512]);
    run.toy.lock().unwrap().size -= UNIT;
    run.image.write_at(&[5; 512], 3 * UNIT).unwrap();
}

#[test]
fn exits_of_earlier_sandboxes_count() {
    let run = Run::new();
    let before = run.image.counters().exits;
    run.rest();
    assert_eq!(run.image.counters().exits, before);
}
