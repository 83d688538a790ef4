//! The crash explorer: every state that a crash can leave behind is the old
//! disk or the new one.
//!
//! The real engine plans a change to an image that qemu's tools made. The
//! explorer splits the plan at sectors, performs subsets of every epoch and has
//! each state judged by `qemu-img check`, by its content for every reader, and
//! by asking for the same change again. It proves itself on orders that are
//! known to be wrong, and on every plan without each of its barriers and without
//! each of its zeroings.
//!
//! `INSTAR_CRASH_SEED` repeats the random subsets of an earlier run,
//! `INSTAR_CRASH_ALL` has qemu-img judge each state instead of the telling ones
//! and one in a few.

mod claims;
#[path = "explorer.rs"]
mod explorer;
mod known_bad;
mod orders;
mod reading;
mod room;

use explorer::case::Case;
use explorer::judge::{Depth, Judge};
use explorer::report::{Exploration, Row};
use explorer::setup::Setup;
use explorer::{cases, full_name, seed, tools};
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};

/// States that all cases together have at least.
const LEAST_STATES: usize = 5_000;

/// The rows of the table that is printed at the end.
type Table = Arc<Mutex<Vec<Row>>>;

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let seed = seed();
    let table = Table::default();
    let mut trials = claims::trials();
    trials.extend(reading::trials());
    trials.extend(known_bad::trials());
    for case in cases() {
        let rows = Arc::clone(&table);
        let name = full_name(case);
        trials.push(with_oracle(format!("state/{name}"), move || {
            every_state_is_old_or_new(case, seed, &rows)
        }));
        trials.push(with_oracle(format!("needed/{name}"), move || {
            orders::each_part_is_needed(case, seed)
        }));
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    let states = if arguments.list {
        0
    } else {
        print(&table, seed)
    };
    let all = arguments.filter.is_none() && arguments.skip.is_empty() && !arguments.list;
    if all && conclusion.num_ignored == 0 && states < LEAST_STATES {
        println!("{states} states were explored, at least {LEAST_STATES} have to be");
        return ExitCode::FAILURE;
    }
    conclusion.exit_code()
}

/// A trial that reports itself as ignored, with the reason, where qemu's tools
/// are missing.
fn with_oracle(name: String, body: impl FnOnce() -> Result<(), String> + Send + 'static) -> Trial {
    Trial::ignorable_test(name, move || match tools::missing_oracle() {
        Some(reason) => Ok(Completion::ignored_with(reason)),
        None => body().map(|()| Completion::Completed).map_err(Failed::from),
    })
}

fn every_state_is_old_or_new(case: &'static Case, seed: u64, table: &Table) -> Result<(), String> {
    let setup = Setup::build(case)?;
    let planned = orders::plan(case, &setup)?;
    room::does_not_add_up(case, &setup)?;
    let judge = Judge::new(case, &setup)?;
    let row = Exploration {
        judge: &judge,
        start: &setup.files,
        epochs: &planned.epochs,
        seed,
        depth: Depth::AndFuture,
    }
    .run_to_end();
    let examples = row.examples.join("\n");
    let (bad, states) = (row.bad, row.states);
    if let Ok(mut table) = table.lock() {
        table.push(row);
    }
    match bad {
        0 if states < 2 => Err("nothing was explored".to_owned()),
        0 => Ok(()),
        _ => Err(format!(
            "{bad} bad states (seed {seed}), such as\n{examples}"
        )),
    }
}

/// Prints the sums for each format and operation. Answers the states in all.
fn print(table: &Table, seed: u64) -> usize {
    let Ok(rows) = table.lock() else { return 0 };
    let mut sums = BTreeMap::<&str, Row>::new();
    let mut total = Row::default();
    for row in rows.iter() {
        let end = row.name.match_indices('/').nth(1).map(|(at, _)| at);
        let operation = &row.name[..end.unwrap_or(row.name.len())];
        sums.entry(operation).or_default().add(row);
        total.add(row);
    }
    if total.states > 0 {
        println!("{}", Row::heading());
    }
    for (name, mut sum) in sums {
        sum.name = name.to_owned();
        println!("{sum}");
    }
    if total.states > 0 {
        total.name = format!("total (seed {seed})");
        println!("{total}");
    }
    total.states
}
