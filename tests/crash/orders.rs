//! The explorer proves itself: it reports orders that are known to be wrong.
//!
//! For every case: the commit before what it makes visible, references before
//! the counts that they rely on, and each durability barrier taken away.

use crate::cases::Case;
use crate::disk::{Epoch, epochs_of};
use crate::engine::{Change, Planned, Session};
use crate::judge::Depth;
use crate::report::explore;
use crate::setup::Setup;
use crate::with_oracle;
use instar_guest::plan::{Plan, Purpose};
use libtest_mimic::Trial;

/// Asks the engine for the case's plan.
pub fn plan(case: &Case, setup: &Setup) -> Result<Planned, String> {
    let mut session = Session::open(&setup.files, case.format)?;
    session.plan(&setup.change, &setup.old_disk)
}

/// The trials of one case.
pub fn trials(case: &'static Case, seed: u64) -> Vec<Trial> {
    let mut trials = vec![with_oracle(
        format!("wrong order/each barrier removed/{}", case.name),
        move || each_barrier_matters(case, seed),
    )];
    if case.moves_tables {
        trials.push(with_oracle(
            format!("wrong order/commit first/{}", case.name),
            move || is_reported(case, seed, commit_first),
        ));
    }
    if case.hooks {
        trials.push(with_oracle(
            format!("wrong order/hooks before counts/{}", case.name),
            move || is_reported(case, seed, hooks_first),
        ));
    }
    trials
}

/// Without any one of its barriers the change leaves a bad state, but for those
/// barriers that the case lists as only ordering what is harmless.
fn each_barrier_matters(case: &'static Case, seed: u64) -> Result<(), String> {
    let setup = Setup::build(case)?;
    let epochs = plan(case, &setup)?.epochs;
    let mut harmless = Vec::new();
    for barrier in 0..epochs.len().saturating_sub(1) {
        let merged = without_barrier(&epochs, barrier);
        if explore(case, &setup, &merged, seed, Depth::Present)?.bad == 0 {
            harmless.push(barrier);
        }
    }
    if harmless == case.harmless_barriers {
        return Ok(());
    }
    Err(format!(
        "of {} barriers, {harmless:?} can go without a bad state; known as harmless: {:?}",
        epochs.len(),
        case.harmless_barriers
    ))
}

fn without_barrier(epochs: &[Epoch], barrier: usize) -> Vec<Epoch> {
    let mut merged = epochs.to_vec();
    let second = merged.remove(barrier + 1);
    merged[barrier].extend(second);
    merged
}

fn is_reported(
    case: &'static Case,
    seed: u64,
    reorder: fn(&Plan) -> Option<Plan>,
) -> Result<(), String> {
    let setup = Setup::build(case)?;
    let planned = plan(case, &setup)?;
    let wrong = reorder(&planned.plan).ok_or("the plan has no stage to move")?;
    let mut epochs = epochs_of(&wrong, &setup.files)?;
    if let (Change::Write(_), Some(first)) = (&setup.change, epochs.first_mut()) {
        first.splice(0..0, planned.data);
    }
    let row = explore(case, &setup, &epochs, seed, Depth::Present)?;
    match row.bad {
        0 => Err(format!("{} states and none is bad", row.states)),
        _ => Ok(()),
    }
}

/// The commit, and then what it makes visible.
fn commit_first(plan: &Plan) -> Option<Plan> {
    let at = position(plan, Purpose::Commit)?;
    moved(plan, at, 0)
}

/// The references, and then the counts of what they refer to.
fn hooks_first(plan: &Plan) -> Option<Plan> {
    let at = position(plan, Purpose::Link)?;
    moved(plan, at, 0)
}

fn position(plan: &Plan, purpose: Purpose) -> Option<usize> {
    plan.stages
        .iter()
        .position(|stage| stage.purpose == purpose)
}

fn moved(plan: &Plan, from: usize, to: usize) -> Option<Plan> {
    let mut plan = plan.clone();
    let stage = (from != to).then(|| plan.stages.remove(from))?;
    plan.stages.insert(to, stage);
    Some(plan)
}
