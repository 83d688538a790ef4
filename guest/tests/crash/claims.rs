//! Claims about the explorer that need no image: which states it makes of
//! simple epochs.

use crate::explorer::bytes::Bytes;
use crate::explorer::disk::{Epoch, Event, Files, Inode, Numbers, epochs_of};
use crate::explorer::explore::states;
use instar_guest::plan::{NewName, Plan, Purpose, Stage};
use instar_guest::{FileNo, Step};
use libtest_mimic::Trial;
use std::collections::HashSet;
use std::ops::ControlFlow;

/// Something about the explorer that holds, or why it does not.
type Claim = fn() -> Result<(), String>;

const FILE: Inode = 0;

/// The trials.
pub fn trials() -> Vec<Trial> {
    let claims: [(&str, Claim); 10] = [
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
        ("names change in any order", names_change_in_any_order),
        ("a rename keeps both contents whole", a_rename_takes_over),
        ("a taken name is refused", a_taken_name_is_refused),
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

fn image(bytes: &[u8]) -> Files {
    Files::named([("image".to_owned(), Bytes::from(bytes))])
}

/// The image of every state, one character for each sector.
fn outcomes(start: &[u8], epochs: &[Epoch], seed: u64) -> Vec<String> {
    let mut found = Vec::new();
    states(&image(start), epochs, seed, |state| {
        let bytes = state.files.bytes(FILE);
        let sector = |bytes: &[u8]| char::from(b'0' + bytes[bytes.len() - 1]);
        let all = bytes.read(0, bytes.len());
        found.push(all.chunks(512).map(sector).collect());
        ControlFlow::Continue(())
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
        file: FileNo::IMAGE,
        offset,
        len: 512,
    };
    let plan = |second| Plan {
        stages: vec![Stage {
            purpose: Purpose::Prepare,
            steps: vec![step(0), step(second)],
        }],
    };
    let (files, numbers) = (image(&[1; 1024]), numbers());
    let epochs = |second| epochs_of(&plan(second), &files, &numbers);
    match (epochs(511), epochs(512)) {
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

fn numbers() -> Numbers {
    Numbers {
        files: vec![FILE],
        image: "image".to_owned(),
    }
}

/// The names of every state, and the first byte of each file.
fn listings(plan: &Plan) -> Result<Vec<String>, String> {
    let files = image(&[1; 512]);
    let epochs = epochs_of(plan, &files, &numbers())?;
    let mut found = Vec::new();
    states(&files, &epochs, 1, |state| {
        let entry = |name: &str| match state.files.get(name) {
            Ok(bytes) => format!("{name}={}", bytes.read(0, 1)[0]),
            Err(text) => text,
        };
        let entries: Vec<String> = state.files.names().map(entry).collect();
        found.push(entries.join(" "));
        ControlFlow::Continue(())
    });
    Ok(found)
}

fn stage(purpose: Purpose, steps: Vec<Step>) -> Stage {
    Stage { purpose, steps }
}

fn create(number: u32, name: NewName) -> Step {
    let file = FileNo(number);
    Step::Create { file, name }
}

fn names_change_in_any_order() -> Result<(), String> {
    let plain = |name: &str| NewName::Plain(name.to_owned());
    let steps = vec![create(1, plain("a")), create(2, plain("b"))];
    let plan = Plan {
        stages: vec![stage(Purpose::Prepare, steps)],
    };
    expect(
        listings(&plan)?,
        &["image=1", "a=0 image=1", "b=0 image=1", "a=0 b=0 image=1"],
    )
}

fn a_rename_takes_over() -> Result<(), String> {
    let file = FileNo(1);
    let write = Step::Write {
        file,
        offset: 0,
        data: vec![2; 512],
    };
    let over = FileNo::IMAGE;
    let plan = Plan {
        stages: vec![
            stage(
                Purpose::Prepare,
                vec![create(1, NewName::Replacement), write],
            ),
            stage(Purpose::Commit, vec![Step::Rename { file, over }]),
        ],
    };
    let new = |byte: u8| format!("image=1 image.instar-new={byte}");
    expect(listings(&plan)?, &["image=1", &new(0), &new(2), "image=2"])
}

fn a_taken_name_is_refused() -> Result<(), String> {
    let plan = Plan {
        stages: vec![stage(
            Purpose::Prepare,
            vec![create(1, NewName::Plain("image".to_owned()))],
        )],
    };
    match listings(&plan) {
        Err(text) if text.contains("image already") => Ok(()),
        other => Err(format!("{other:?}")),
    }
}
