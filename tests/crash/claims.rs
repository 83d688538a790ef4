//! Claims about the explorer that need no image: which states it makes of
//! simple epochs.

use crate::disk::{Epoch, Event, Files, epochs_of};
use crate::explore::states;
use instar_guest::plan::{Plan, Purpose, Stage};
use instar_guest::{FileNo, Step};
use libtest_mimic::Trial;
use std::collections::HashSet;

/// Something about the explorer that holds, or why it does not.
type Claim = fn() -> Result<(), String>;

const FILE: FileNo = FileNo::IMAGE;

/// The trials.
pub fn trials() -> Vec<Trial> {
    let claims: [(&str, Claim); 7] = [
        ("a write is split at sectors", a_write_is_split_at_sectors),
        (
            "a write of two sectors can tear",
            a_write_of_two_sectors_can_tear,
        ),
        ("a barrier orders two writes", a_barrier_orders_two_writes),
        (
            "without a barrier writes swap",
            without_a_barrier_writes_swap,
        ),
        ("a length and a write swap", a_length_and_a_write_swap),
        (
            "overlapping steps are refused",
            overlapping_steps_are_refused,
        ),
        ("a seed repeats its states", a_seed_repeats_its_states),
    ];
    claims
        .into_iter()
        .map(|(name, claim)| {
            Trial::test(format!("explorer/{name}"), move || {
                claim().map_err(Into::into)
            })
        })
        .collect()
}

fn write(offset: u64, len: usize, value: u8) -> Event {
    Event::Write {
        file: FILE,
        offset,
        data: vec![value; len],
    }
}

/// The content of file 0 in every state, one character for each sector.
fn outcomes(start: &[u8], epochs: &[Epoch], seed: u64) -> Vec<String> {
    let mut found = Vec::new();
    let files = Files(vec![start.to_vec()]);
    states(&files, epochs, seed, |state| {
        let sector = |bytes: &[u8]| char::from(b'0' + bytes[bytes.len() - 1]);
        found.push(state.files.0[0].chunks(512).map(sector).collect());
    });
    found
}

fn expect(found: Vec<String>, wanted: &[&str]) -> Result<(), String> {
    let same = found.iter().map(String::as_str).collect::<HashSet<_>>()
        == wanted.iter().copied().collect::<HashSet<_>>();
    same.then_some(())
        .ok_or_else(|| format!("{found:?} instead of {wanted:?}"))
}

fn a_write_is_split_at_sectors() -> Result<(), String> {
    let pieces = write(500, 600, 1).split();
    let wanted = [write(500, 12, 1), write(512, 512, 1), write(1024, 76, 1)];
    (pieces == wanted)
        .then_some(())
        .ok_or_else(|| format!("{pieces:?}"))
}

fn a_write_of_two_sectors_can_tear() -> Result<(), String> {
    let found = outcomes(&[0; 1024], &[vec![write(0, 1024, 1)]], 1);
    expect(found, &["00", "10", "01", "11"])
}

fn a_barrier_orders_two_writes() -> Result<(), String> {
    let epochs = [vec![write(0, 512, 1)], vec![write(512, 512, 2)]];
    expect(outcomes(&[0; 1024], &epochs, 1), &["00", "10", "12"])
}

fn without_a_barrier_writes_swap() -> Result<(), String> {
    let epoch = vec![write(0, 512, 1), write(512, 512, 2)];
    let found = outcomes(&[0; 1024], &[epoch], 1);
    expect(found, &["00", "10", "02", "12"])
}

fn a_length_and_a_write_swap() -> Result<(), String> {
    let cut = Event::SetLength {
        file: FILE,
        len: 512,
    };
    let epoch = vec![cut, write(512, 512, 2)];
    expect(outcomes(&[1; 1024], &[epoch], 1), &["11", "1", "12"])
}

fn overlapping_steps_are_refused() -> Result<(), String> {
    let step = |offset| Step::Zero {
        file: FILE,
        offset,
        len: 512,
    };
    let plan = |second| Plan {
        stages: vec![Stage {
            purpose: Purpose::Prepare,
            steps: vec![step(0), step(second)],
        }],
    };
    let files = Files(vec![vec![1; 1024]]);
    match (epochs_of(&plan(511), &files), epochs_of(&plan(512), &files)) {
        (Err(_), Ok(_)) => Ok(()),
        other => Err(format!("{other:?}")),
    }
}

fn a_seed_repeats_its_states() -> Result<(), String> {
    let epochs = [vec![write(0, 512 * 100, 1)]];
    let run = |seed| outcomes(&[0; 512 * 100], &epochs, seed);
    if run(1) != run(1) {
        return Err("one seed, different states".into());
    }
    if run(1) == run(2) {
        return Err("two seeds, the same states".into());
    }
    Ok(())
}
