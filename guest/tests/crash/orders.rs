//! The explorer proves itself: every part of every plan is needed. For each
//! case, each durability barrier and each zeroing is taken away, one at a time,
//! and that has to leave a bad state. What can go without one is needless: it
//! leaves the engine, or the case says why it stays.

use crate::explorer::case::{Case, Part};
use crate::explorer::disk::{Epoch, Files};
use crate::explorer::engine::{Planned, Session};
use crate::explorer::judge::{Depth, Judge};
use crate::explorer::report::{Until, explore};
use crate::explorer::setup::Setup;
use instar_guest::plan::{Plan, Stage, Step};

/// Asks the engine for the case's plan.
pub fn plan(case: &Case, setup: &Setup) -> Result<Planned, String> {
    let mut session = Session::open(&setup.files, setup.image_name(), case.format)?;
    session.plan(&setup.change, &setup.old_disk)
}

/// Without any one of its parts the change leaves a bad state.
pub fn each_part_is_needed(case: &'static Case, seed: u64) -> Result<(), String> {
    let setup = Setup::build(case)?;
    let planned = plan(case, &setup)?;
    let judge = Judge::new(case, &setup)?;
    let mut wrong = Vec::new();
    for part in parts(&planned.plan) {
        let epochs = without(&planned, part, &setup.files)?;
        let needed = [Depth::Present, Depth::AndFuture]
            .into_iter()
            .any(|depth| explore(case, &setup, &judge, &epochs, seed, (depth, Until::Bad)).bad > 0);
        let declared = case.harmless.iter().any(|harmless| harmless.part == part);
        match (needed, declared) {
            (true, true) => wrong.push(format!("{part:?} is declared harmless and is not")),
            (false, false) => wrong.push(format!("{part:?} can go without a bad state")),
            _ => {}
        }
    }
    match wrong.len() {
        0 => Ok(()),
        _ => Err(format!("{}\n{}", wrong.join("\n"), outline(&planned.plan))),
    }
}

/// The parts of a plan that are to be taken out.
fn parts(plan: &Plan) -> Vec<Part> {
    let barriers = (0..plan.stages.len().saturating_sub(1)).map(Part::Barrier);
    let zeroes = plan.stages.iter().enumerate().flat_map(|(number, stage)| {
        let steps = stage.steps.iter().enumerate();
        let zeroes = steps.filter(|(_, step)| zeroes(step));
        zeroes.map(move |(step, _)| Part::Zero(number, step))
    });
    barriers.chain(zeroes).collect()
}

fn zeroes(step: &Step) -> bool {
    match step {
        Step::Zero { .. } | Step::Fill { .. } => true,
        Step::Write { data, .. } => data.iter().all(|&byte| byte == 0),
        _ => false,
    }
}

/// The plan's epochs without a part.
fn without(planned: &Planned, part: Part, files: &Files) -> Result<Vec<Epoch>, String> {
    match part {
        Part::Barrier(at) => {
            let mut merged = planned.epochs.clone();
            let second = merged.remove(at + 1);
            merged[at].extend(second);
            Ok(merged)
        }
        Part::Zero(stage, step) => {
            let mut plan = planned.plan.clone();
            plan.stages[stage].steps.remove(step);
            planned.epochs_of(&plan, files)
        }
    }
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
