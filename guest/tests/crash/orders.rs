//! The explorer proves itself: every part of every plan is needed. For each
//! case, each durability barrier and each zeroing is taken away, one at a time,
//! and that has to leave a bad state. What can go without one is needless: it
//! leaves the engine, or the case says why it stays.

use crate::explorer::case::{Case, Part};
use crate::explorer::disk::{Epoch, Event, Files};
use crate::explorer::engine::{Planned, Session};
use crate::explorer::judge::{Content, Depth, Judge};
use crate::explorer::report::{Exploration, Until};
use crate::explorer::setup::Setup;
use instar_guest::plan::{Plan, Purpose, Stage, Step};
use std::collections::BTreeSet;

/// What lies where nothing is in use.
const GARBAGE: u8 = 0xa5;

/// Asks the engine for the case's plan.
pub fn plan(case: &Case, setup: &Setup) -> Result<Planned, String> {
    let mut session = Session::open(&setup.files, setup.image_name(), case.format)?;
    session.plan(&setup.change, &setup.old_disk)
}

/// Without any one of its parts the change leaves a bad state.
pub fn each_part_is_needed(case: &'static Case, seed: u64) -> Result<(), String> {
    let mut setup = Setup::build(case)?;
    let mut planned = plan(case, &setup)?;
    if let Some((dirty, replanned)) = with_garbage(case, &setup, &planned)? {
        (setup.files, planned) = (dirty, replanned);
    }
    let judge = Judge::new(case, &setup)?;
    let mut wrong = Vec::new();
    for part in parts(&planned) {
        let needed = is_needed(&judge, &planned, part, seed)?;
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

/// The case's files with garbage in all places that the plan writes before its
/// end and that already hold by chance what is written, where that makes no
/// difference to the disk or to the plan. What such steps are for shows only
/// there.
fn with_garbage(
    case: &'static Case,
    setup: &Setup,
    planned: &Planned,
) -> Result<Option<(Files, Planned)>, String> {
    let judge = Judge::new(case, setup)?;
    let shape =
        |plan: &Plan| -> Vec<usize> { plan.stages.iter().map(|stage| stage.steps.len()).collect() };
    let mut found = None;
    let mut dirty = setup.files.clone();
    let stages = planned.plan.stages.iter();
    let before = stages.filter(|stage| stage.purpose != Purpose::Commit);
    for step in before.flat_map(|stage| &stage.steps) {
        let mut tried = dirty.clone();
        if !spoil(&mut tried, planned, step)? {
            continue;
        }
        let verdict = judge.verdict(&tried, Depth::Present)?;
        let replanned = Session::open(&tried, setup.image_name(), case.format)
            .and_then(|mut session| session.plan(&setup.change, &setup.old_disk));
        if let Ok(replanned) = replanned
            && verdict.faults.is_empty()
            && matches!(verdict.content, Some(Content::Old | Content::New))
            && shape(&replanned.plan) == shape(&planned.plan)
        {
            dirty = tried;
            found = Some((dirty.clone(), replanned));
        }
    }
    Ok(found)
}

/// Puts garbage where a step writes what is there already, inside the file.
/// Answers whether there was room for any.
fn spoil(files: &mut Files, planned: &Planned, step: &Step) -> Result<bool, String> {
    let (offset, data) = match *step {
        Step::Zero { offset, len, .. } => (offset, vec![0; len as usize]),
        Step::Write {
            offset, ref data, ..
        } => (offset, data.clone()),
        _ => return Ok(false),
    };
    let file = planned.numbers.file(step.file());
    let Some(file) = file.ok().filter(|&file| file < files.count()) else {
        return Ok(false);
    };
    let bytes = files.bytes_mut(file);
    let len = bytes.len().saturating_sub(offset).min(data.len() as u64);
    let same = len > 0 && bytes.read(offset, len) == data[..len as usize];
    if same {
        bytes.write(offset, &vec![GARBAGE; len as usize]);
    }
    Ok(same)
}

/// Whether a bad state is left without a part of a plan. Only states that the
/// whole plan cannot leave are judged: first what they are, then what becomes
/// of them.
fn is_needed(judge: &Judge<'_>, planned: &Planned, part: Part, seed: u64) -> Result<bool, String> {
    let files = &judge.setup.files;
    let (first, runs) = match part {
        Part::Barrier(at) => (at, without_barrier(&planned.epochs, at)),
        Part::Zero(stage, step) => {
            let mut plan = planned.plan.clone();
            plan.stages[stage].steps.remove(step);
            let epochs = planned.epochs_of(&plan, files)?;
            (stage, vec![epochs[stage..].to_vec()])
        }
    };
    let mut start = files.clone();
    start.apply_all(&planned.epochs[..first]);
    let bad = |depth, epochs: &Vec<Epoch>| {
        let exploration = Exploration {
            judge,
            start: &start,
            epochs,
            seed,
            depth,
            until: Until::Bad,
        };
        let row = match part {
            Part::Barrier(_) => exploration.run(),
            Part::Zero(..) => exploration.run_to_end(),
        };
        row.bad > 0
    };
    let depths = [Depth::Present, Depth::AndFuture];
    Ok(depths
        .into_iter()
        .any(|depth| runs.iter().any(|epochs| bad(depth, epochs))))
}

/// The parts of a plan that are to be taken out: barriers between stages that
/// leave a trace, and zeroing of what may not be zero.
fn parts(planned: &Planned) -> Vec<Part> {
    let epochs = planned.epochs.windows(2).enumerate();
    let between = epochs.filter(|(_, pair)| pair.iter().all(|epoch| !epoch.is_empty()));
    let barriers = between.map(|(at, _)| Part::Barrier(at));
    let zeroes = zeroing(&planned.plan).map(|(stage, step)| Part::Zero(stage, step));
    barriers.chain(zeroes).collect()
}

/// The steps of a plan that write nothing but zeroes: stage and step.
fn zeroing(plan: &Plan) -> impl Iterator<Item = (usize, usize)> {
    let zeroes = |step: &Step| match step {
        Step::Zero { .. } | Step::Fill { .. } => true,
        Step::Write { data, .. } => data.iter().all(|&byte| byte == 0),
        _ => false,
    };
    plan.stages
        .iter()
        .enumerate()
        .flat_map(move |(number, stage)| {
            let steps = stage.steps.iter().enumerate();
            let steps = steps.filter(move |(_, step)| zeroes(step));
            steps.map(move |(step, _)| (number, step))
        })
}

/// What can happen in the two epochs around a barrier that is not there: their
/// events in any order, and in particular the second epoch before the first,
/// but for what would then end in another result.
fn without_barrier(epochs: &[Epoch], at: usize) -> Vec<Vec<Epoch>> {
    let (first, second) = (&epochs[at], &epochs[at + 1]);
    let sector = |event: &Event| match event {
        Event::Write { file, offset, .. } => Some((*file, offset / 512)),
        _ => None,
    };
    let split = |epoch: &Epoch| epoch.iter().flat_map(Event::split).collect::<Epoch>();
    let later: BTreeSet<_> = split(second).iter().filter_map(sector).collect();
    let early = split(first).into_iter();
    let early = early.filter(|event| sector(event).is_some_and(|at| !later.contains(&at)));
    vec![
        vec![[first.as_slice(), second].concat()],
        vec![second.clone(), early.collect()],
    ]
}

/// A plan in a few lines.
fn outline(plan: &Plan) -> String {
    let stage = |(number, stage): (usize, &Stage)| {
        let place = |step: &Step| match *step {
            Step::Write {
                offset, ref data, ..
            } => format!("write {offset:#x}+{:#x}", data.len()),
            Step::Fill { offset, len, .. } => format!("fill {offset:#x}+{len:#x}"),
            Step::Zero { offset, len, .. } => format!("zero {offset:#x}+{len:#x}"),
            Step::Copy { from, to, len, .. } => format!("copy {from:#x} to {to:#x}+{len:#x}"),
            Step::CopyFrom { from, to, len, .. } => {
                format!("copy {from:#x} of another to {to:#x}+{len:#x}")
            }
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
