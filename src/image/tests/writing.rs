//! Reading and writing through a mapping that changes.

use super::faulty::Faulty;
use super::toy::{Toy, UNIT, Unit};
use super::{Fixture, for_writing, told};
use crate::image::syscalls::read_at_once;
use crate::image::{ErrorKind, Image, ResizeOptions, Segment, SegmentKind};
use proptest::prelude::*;

/// A disk of eight units, one or two of each kind, and what it reads as.
fn mixed() -> (Fixture, Toy, Vec<u8>) {
    let unit = UNIT as usize;
    let mut file = vec![0xee; 4 * unit];
    file[unit..2 * unit].fill(1);
    file[2 * unit..3 * unit].fill(2);
    file[3 * unit..].fill(3);
    let units = vec![
        Unit::At(UNIT, false),
        Unit::At(2 * UNIT, true),
        Unit::Absent,
        Unit::Zero,
        Unit::Compressed(vec![4; unit]),
        Unit::Compressed(vec![5; unit]),
        Unit::At(3 * UNIT, true),
        Unit::Absent,
    ];
    let model = [1, 2, 0, 0, 4, 5, 3, 0]
        .map(|byte| vec![byte; unit])
        .concat();
    (Fixture::new(&file), Toy::new(units, 4 * UNIT), model)
}

fn content(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0xaa; image.virtual_size() as usize];
    image.read_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn every_kind_of_extent_is_read() {
    let (fixture, toy, model) = mixed();
    let image = fixture.open(&for_writing(), toy);
    assert_eq!(content(&image), model);
    let mut part = vec![0; 5000];
    image.read_at(&mut part, 3000).unwrap();
    assert_eq!(part, model[3000..8000]);
}

#[test]
fn only_one_piece_that_is_known_is_read_at_once() {
    let (fixture, toy, model) = mixed();
    let image = fixture.open(&for_writing(), toy);
    let at_once = |offset: u64| {
        let mut part = [0xaa; 100];
        let done = image.try_read_at(&mut part, offset);
        done.then(|| part.to_vec())
    };
    assert_eq!(at_once(50), None, "the mapping is not known yet");
    assert_eq!(content(&image), model);
    // Some filesystems know no reads without waiting.
    let file = std::fs::File::open(&fixture.path).unwrap();
    let data = read_at_once(&file, 0, &mut [0]).is_ok();
    let units = [data, data, false, true, false, false, data, false];
    for (unit, known) in (0..).zip(units) {
        let offset = unit * UNIT + 50;
        let bytes = model[offset as usize..][..100].to_vec();
        assert_eq!(at_once(offset), known.then_some(bytes), "unit {unit}");
    }
    assert_eq!(at_once(UNIT - 50), None, "two units");
    assert_eq!(at_once(8 * UNIT - 50), None, "past the end");
}

#[test]
fn a_small_write_brings_the_rest_of_its_unit_along() {
    for index in 0..8 {
        let (fixture, toy, mut model) = mixed();
        let image = fixture.open(&for_writing(), toy);
        let offset = index * UNIT + 100;
        image.write_at(&[9; 7], offset).unwrap();
        model[offset as usize..][..7].fill(9);
        assert_eq!(content(&image), model, "unit {index}");
        image.flush().unwrap();
        assert_eq!(content(&image), model, "unit {index}");
    }
}

#[test]
fn zeroes_for_fresh_space_are_not_written() {
    let (fixture, toy, _) = mixed();
    let log = Faulty::default();
    let mut options = for_writing();
    options.effects = log.hook();
    let image = fixture.open(&options, toy);
    image.write_at(&[0; 2 * UNIT as usize], 2 * UNIT).unwrap();
    assert_eq!(log.take(), ["set_len 20480", "set_len 24576"]);
    image.write_at(&[9; 7], 7 * UNIT).unwrap();
    assert_eq!(log.take(), ["write 24576+7", "set_len 28672"]);
}

#[test]
fn what_is_there_already_is_not_written_again() {
    let (fixture, toy, _) = mixed();
    let log = Faulty::default();
    let mut options = for_writing();
    options.effects = log.hook();
    let image = fixture.open(&options, toy);
    image.write_at(&[9; 7], 10).unwrap();
    assert_eq!(log.take(), [format!("write {}+7", UNIT + 10)]);
    image.flush().unwrap();
    assert_eq!(log.take(), ["sync"]);
    image.flush().unwrap();
    assert_eq!(log.take(), [""; 0]);
}

#[test]
fn a_flush_makes_data_durable_with_its_first_barrier() {
    let (fixture, toy, _) = mixed();
    let log = Faulty::default();
    let mut options = for_writing();
    options.effects = log.hook();
    let image = fixture.open(&options, toy);
    image.write_at(&[9; UNIT as usize], 2 * UNIT).unwrap();
    log.take();
    image.flush().unwrap();
    assert_eq!(log.take(), ["write 0+1", "sync", "write 0+1", "sync"]);
    assert!(!image.is_dirty());
}

#[test]
fn released_space_is_written_whole_when_it_is_used_again() {
    let (fixture, toy, mut model) = mixed();
    let image = fixture.open(&for_writing(), toy.clone());
    // Unit 1 moves; its old place is free after the flush and goes to unit 2.
    for (index, len) in [(1, 5), (2, 5)] {
        let offset = (index * UNIT + 50) as usize;
        image.write_at(&vec![9; len], offset as u64).unwrap();
        model[offset..offset + len].fill(9);
        image.flush().unwrap();
    }
    assert_eq!(toy.0.lock().unwrap().units[2], Unit::At(2 * UNIT, false));
    assert_eq!(content(&image), model);
}

#[test]
fn units_that_must_be_placed_together_are() {
    let (fixture, toy, mut model) = mixed();
    toy.0.lock().unwrap().pairs = true;
    let image = fixture.open(&for_writing(), toy);
    image.write_at(&[9; 7], UNIT + 1).unwrap();
    model[UNIT as usize + 1..][..7].fill(9);
    image.write_at(&[8; 7], 6 * UNIT).unwrap();
    model[6 * UNIT as usize..][..7].fill(8);
    assert_eq!(content(&image), model);
}

#[test]
fn a_guest_without_room_is_flushed_and_asked_again() {
    let (fixture, toy, mut model) = mixed();
    toy.0.lock().unwrap().room = 1;
    let image = fixture.open(&for_writing(), toy.clone());
    for index in [1, 2, 3, 4] {
        image.write_at(&[9; 7], index * UNIT).unwrap();
        model[(index * UNIT) as usize..][..7].fill(9);
    }
    assert_eq!(content(&image), model);
    assert_eq!(toy.0.lock().unwrap().flushes, 3);
}

#[test]
fn a_guest_that_never_has_room_is_an_error() {
    let (fixture, toy, model) = mixed();
    toy.0.lock().unwrap().room = 0;
    let image = fixture.open(&for_writing(), toy);
    let error = image.write_at(&[9; 7], UNIT).unwrap_err();
    assert_eq!(told(&error), (ErrorKind::GuestMemory, "flush first".into()));
    assert_eq!(content(&image), model);
}

#[test]
fn preallocation_places_every_unit_and_keeps_the_content() {
    let (fixture, toy, model) = mixed();
    let image = fixture.open(&for_writing(), toy);
    image.preallocate(10, 7 * UNIT).unwrap();
    assert_eq!(content(&image), model);
    let kinds = image.segments(0, 8 * UNIT).unwrap();
    let placed = |kind| matches!(kind, SegmentKind::Data | SegmentKind::Hole);
    assert!(
        kinds.iter().all(|segment| placed(segment.kind)),
        "{kinds:?}"
    );
    assert!(!image.is_dirty());
}

#[test]
fn the_first_segments_lie_without_gaps_from_the_start() {
    let (fixture, toy, _) = mixed();
    let image = fixture.open(&for_writing(), toy);
    let all = image.segments(0, 8 * UNIT).unwrap();
    assert!(all.len() > 2, "{all:?}");
    for most in [1, 2] {
        let mut at = 0;
        while at < 8 * UNIT {
            let some = image.first_segments(at, 8 * UNIT - at, most).unwrap();
            assert!((1..=most).contains(&some.len()), "{some:?}");
            for segment in some {
                assert_eq!(segment.offset, at);
                let holds = |one: &&Segment| one.offset <= at && at < one.offset + one.len;
                assert_eq!(all.iter().find(holds).unwrap().kind, segment.kind);
                at += segment.len;
            }
        }
        assert_eq!(at, 8 * UNIT);
    }
}

#[test]
fn a_resize_shows_the_new_size_and_keeps_the_content() {
    let (fixture, toy, mut model) = mixed();
    let image = fixture.open(&for_writing(), toy);
    image.write_at(&[9; 7], 3 * UNIT).unwrap();
    model[3 * UNIT as usize..][..7].fill(9);
    image.resize(10 * UNIT, &ResizeOptions::default()).unwrap();
    model.resize(10 * UNIT as usize, 0);
    assert_eq!(image.facts().virtual_size, 10 * UNIT);
    assert_eq!(content(&image), model);
    image.write_at(&[7; 9], 9 * UNIT).unwrap();
    model[9 * UNIT as usize..][..9].fill(7);
    assert_eq!(content(&image), model);
}

#[test]
fn a_disk_that_became_smaller_refuses_what_had_been_inside() {
    let (fixture, toy, _) = mixed();
    let image = fixture.open(&for_writing(), toy);
    let how = ResizeOptions {
        shrink: true,
        ..ResizeOptions::default()
    };
    image.resize(2 * UNIT, &how).unwrap();
    // As by somebody who was let in before, and waited for the session.
    let offset = 7 * UNIT;
    let refusals = [
        image.fill(&mut [0; 8], offset, &mut None),
        image.store(&[1; 8], offset),
        image.store(&[1; 8], 2 * UNIT - 4),
    ];
    for refusal in refusals {
        let fault = refusal.unwrap_err();
        assert_eq!(fault.kind, ErrorKind::InvalidRequest);
        let text = "are not inside the disk of 8192 bytes";
        assert!(fault.message.ends_with(text), "{}", fault.message);
    }
}

#[test]
fn a_dry_run_changes_nothing() {
    let (fixture, toy, _) = mixed();
    let image = fixture.open(&for_writing(), toy);
    let before = fixture.content();
    let reply = image
        .plan_resize(10 * UNIT, &ResizeOptions::default())
        .unwrap();
    assert_eq!(reply.plan.stages.len(), 1);
    assert_eq!(fixture.content(), before);
    assert_eq!(image.counters().writes, 0);
}

#[test]
fn ranges_outside_the_disk_are_refused() {
    let (fixture, toy, _) = mixed();
    let image = fixture.open(&for_writing(), toy);
    let size = 8 * UNIT;
    for (offset, len) in [(size, 1), (size - 1, 2), (u64::MAX, 1)] {
        let text = format!("{len} bytes at {offset} are not inside the disk of {size} bytes");
        let expected = (ErrorKind::InvalidRequest, text);
        let mut buf = vec![0; len as usize];
        assert_eq!(
            told(&image.read_at(&mut buf, offset).unwrap_err()),
            expected
        );
        assert_eq!(told(&image.write_at(&buf, offset).unwrap_err()), expected);
        assert_eq!(told(&image.preallocate(offset, len).unwrap_err()), expected);
        assert_eq!(told(&image.map(offset, len).unwrap_err()), expected);
    }
    image.read_at(&mut [], size).unwrap();
}

#[derive(Clone, Debug)]
enum Action {
    Write { offset: u64, len: u64, byte: u8 },
    Preallocate { offset: u64, len: u64 },
    Flush,
    Read { offset: u64, len: u64 },
}

fn action() -> impl Strategy<Value = Action> {
    let range = (0..8 * UNIT).prop_flat_map(|offset| (Just(offset), 1..=8 * UNIT - offset));
    let write = (range.clone(), any::<u8>());
    prop_oneof![
        4 => write.prop_map(|((offset, len), byte)| Action::Write { offset, len, byte }),
        1 => range.clone().prop_map(|(offset, len)| Action::Preallocate { offset, len }),
        1 => Just(Action::Flush),
        2 => range.prop_map(|(offset, len)| Action::Read { offset, len }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_disk_holds_what_was_written(
        actions in prop::collection::vec(action(), 1..30),
        pairs in any::<bool>(),
        room in 1usize..4,
    ) {
        let (fixture, toy, mut model) = mixed();
        {
            let mut state = toy.0.lock().unwrap();
            (state.pairs, state.room) = (pairs, room);
        }
        let image = fixture.open(&for_writing(), toy);
        for action in actions {
            match action {
                Action::Write { offset, len, byte } => {
                    image.write_at(&vec![byte; len as usize], offset).unwrap();
                    model[offset as usize..(offset + len) as usize].fill(byte);
                }
                Action::Preallocate { offset, len } => image.preallocate(offset, len).unwrap(),
                Action::Flush => image.flush().unwrap(),
                Action::Read { offset, len } => {
                    let mut buf = vec![0xaa; len as usize];
                    image.read_at(&mut buf, offset).unwrap();
                    prop_assert!(buf == model[offset as usize..(offset + len) as usize]);
                }
            }
        }
        prop_assert!(content(&image) == model);
    }
}
