//! The crash explorer: every state that a crash can leave behind is the old
//! disk or the new one.
//!
//! The real engine plans a change to an image that qemu's tools made. The
//! explorer splits the plan at sectors, performs subsets of every epoch and has
//! each state judged by `qemu-img check`, by its content, and by asking for the
//! same change again. It proves itself on orders that are known to be wrong.
//!
//! `INSTAR_CRASH_SEED` repeats the random subsets of an earlier run.

mod cases;
mod claims;
mod disk;
mod engine;
mod explore;
mod judge;
mod orders;
#[path = "../support/random.rs"]
mod random;
mod recorded;
mod report;
mod setup;
#[path = "../support/tools.rs"]
mod tools;

use cases::Case;
use judge::Depth;
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use report::Row;
use setup::Setup;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};

/// The seed where the environment names none: runs are alike by default.
const SEED: u64 = 0x1257_a12c;

/// The rows of the table that is printed at the end.
type Table = Arc<Mutex<Vec<Row>>>;

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let seed = std::env::var("INSTAR_CRASH_SEED")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(SEED);
    let table = Table::default();
    let cases = [cases::GROWS, cases::ENDS, cases::WRITES, cases::RAW].concat_refs();
    let mut trials = claims::trials();
    for case in cases {
        let rows = Arc::clone(&table);
        trials.push(with_oracle(format!("state/{}", case.name), move || {
            every_state_is_old_or_new(case, seed, &rows)
        }));
        trials.push(with_oracle(format!("executor/{}", case.name), move || {
            recorded::is_as_good_as_the_plan(case, seed)
        }));
        trials.extend(orders::trials(case, seed));
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    if !arguments.list {
        print_table(&table, seed);
    }
    conclusion.exit_code()
}

/// Several lists of cases as one.
trait Concat {
    fn concat_refs(self) -> Vec<&'static Case>;
}

impl<const N: usize> Concat for [&'static [Case]; N] {
    fn concat_refs(self) -> Vec<&'static Case> {
        self.into_iter().flatten().collect()
    }
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
    let row = report::explore(case, &setup, &planned.epochs, seed, Depth::AndFuture)?;
    let examples = row.examples.join("\n");
    let (bad, old, new) = (row.bad, row.old, row.new);
    if let Ok(mut table) = table.lock() {
        table.push(row);
    }
    if bad > 0 {
        return Err(format!(
            "{bad} bad states (seed {seed}), such as\n{examples}"
        ));
    }
    if old == 0 || new == 0 {
        return Err(format!(
            "{old} old and {new} new states: nothing was explored"
        ));
    }
    Ok(())
}

fn print_table(table: &Table, seed: u64) {
    let Ok(mut rows) = table.lock() else { return };
    if rows.is_empty() {
        return;
    }
    rows.sort_by(|a, b| a.name.cmp(&b.name));
    println!("{}", Row::heading());
    for row in rows.iter() {
        println!("{row}");
    }
    let sum = |of: fn(&Row) -> usize| rows.iter().map(of).sum();
    let total = Row {
        name: format!("total (seed {seed})"),
        states: sum(|row| row.states),
        old: sum(|row| row.old),
        new: sum(|row| row.new),
        mixed: sum(|row| row.mixed),
        leaks: sum(|row| row.leaks),
        bad: sum(|row| row.bad),
        ..Row::default()
    };
    println!("{total}");
}
