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
use instar_guest::plan::{Plan, Purpose, Stage, Step};
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
    if case.commit_depends {
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
    let Planned { plan, epochs, .. } = plan(case, &setup)?;
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
        "{harmless:?} can go without a bad state; known as harmless: {:?}; the stages:\n{}",
        case.harmless_barriers,
        outline(&plan)
    ))
}

/// A plan in a few lines.
fn outline(plan: &Plan) -> String {
    let stage = |(number, stage): (usize, &Stage)| {
        let place = |step: &Step| match *step {
            Step::Write {
                offset, ref data, ..
            } => format!("write {offset:#x}+{:#x}", data.len()),
            Step::Zero { offset, len, .. } => format!("zero {offset:#x}+{len:#x}"),
            Step::Fill { offset, len, .. } => format!("fill {offset:#x}+{len:#x}"),
            Step::Copy { from, to, len, .. } => format!("copy {from:#x} to {to:#x}+{len:#x}"),
            Step::Reserve { offset, len, .. } => format!("reserve {offset:#x}+{len:#x}"),
            Step::SetLength { len, .. } => format!("length {len:#x}"),
            Step::Punch { offset, len, .. } => format!("punch {offset:#x}+{len:#x}"),
            Step::Create { file, .. } => format!("create {}", file.0),
            Step::Rename { file, over } => format!("rename {} to {}", file.0, over.0),
            Step::Unlink { file } => format!("unlink {}", file.0),
        };
        let steps: Vec<String> = stage.steps.iter().map(place).collect();
        format!("{number} {:?}: {}", stage.purpose, steps.join(", "))
    };
    let stages: Vec<String> = plan.stages.iter().enumerate().map(stage).collect();
    stages.join("\n")
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
