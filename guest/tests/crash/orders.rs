//! The explorer proves itself: every part of every plan is needed. For each
//! case, each durability barrier and each zeroing is taken away, one at a time,
//! and that has to leave a bad state. What can go without one is needless: it
//! leaves the engine, or the case says why it stays.

use crate::explorer::case::{Case, Part};
use crate::explorer::disk::Files;
use crate::explorer::engine::{Planned, Session};
use crate::explorer::explore::{states, states_without_barrier};
use crate::explorer::judge::{Content, Depth, Judge, Shown};
use crate::explorer::setup::Setup;
use instar_guest::FileNo;
use instar_guest::plan::{Plan, Purpose, SECTOR, Stage, Step};
use std::ops::{ControlFlow, Range};

/// What lies where nothing is in use.
const GARBAGE: u8 = 0xa5;

/// Sectors of a step that are spoiled one by one.
const SPOILED: usize = 8;

/// Asks the engine for the case's plan.
pub fn plan(case: &Case, setup: &Setup) -> Result<Planned, String> {
    let mut session = Session::open(&setup.files, setup.image_name(), case.format)?;
    session.plan(&setup.change, &setup.old_disk)
}

/// Without any one of its parts the change leaves a bad state, but for those of
/// which the case says why they stay.
pub fn each_part_is_needed(case: &'static Case, seed: u64) -> Result<(), String> {
    let mut setup = Setup::build(case)?;
    let mut planned = plan(case, &setup)?;
    if let Some((dirty, replanned)) = with_garbage(case, &setup, &planned)? {
        (setup.files, planned) = (dirty, replanned);
    }
    let judge = Judge::new(case, &setup)?;
    let parts = parts(&judge, &planned)?;
    let mut wrong = Vec::new();
    for &part in &parts {
        let declared = case.harmless.iter().any(|harmless| harmless.part == part);
        match (is_needed(&judge, &planned, part, seed)?, declared) {
            (true, true) => wrong.push(format!("{part:?} is declared harmless and is not")),
            (false, false) => wrong.push(format!("{part:?} can go without a bad state")),
            _ => {}
        }
    }
    for harmless in case.harmless {
        if !parts.contains(&harmless.part) {
            wrong.push(format!(
                "{:?} is declared harmless and not there",
                harmless.part
            ));
        }
    }
    match wrong.len() {
        0 => Ok(()),
        _ => Err(format!("{}\n{}", wrong.join("\n"), outline(&planned.plan))),
    }
}

/// The case's files with garbage in all places that the plan writes before its
/// end, where that makes no difference to the disk or to the plan and is not
/// counted as space in use. What such steps are for shows only there.
fn with_garbage(
    case: &'static Case,
    setup: &Setup,
    planned: &Planned,
) -> Result<Option<(Files, Planned)>, String> {
    let mut judge = Judge::new(case, setup)?;
    judge.announced = false;
    let shape =
        |plan: &Plan| -> Vec<usize> { plan.stages.iter().map(|stage| stage.steps.len()).collect() };
    let mut found = None;
    let mut dirty = setup.files.clone();
    let mut spoil = |range: &Range<u64>, file: FileNo| -> Result<bool, String> {
        let Some(tried) = spoiled(&dirty, planned, file, range)? else {
            return Ok(true);
        };
        judge.shown.set(Shown::Never);
        let mut verdict = judge.verdict(&tried, Depth::Present)?;
        if verdict.faults.is_empty() {
            judge.shown.set(Shown::Always);
            verdict = judge.verdict(&tried, Depth::Present)?;
        }
        let replanned = Session::open(&tried, setup.image_name(), case.format)
            .and_then(|mut session| session.plan(&setup.change, &setup.old_disk));
        let Ok(replanned) = replanned else {
            return Ok(false);
        };
        let same = verdict.faults.is_empty()
            && !verdict.leaks
            && matches!(verdict.content, Some(Content::Old | Content::New))
            && shape(&replanned.plan) == shape(&planned.plan);
        if same {
            dirty = tried;
            found = Some((dirty.clone(), replanned));
        }
        Ok(same)
    };
    let stages = planned.plan.stages.iter();
    let before = stages.filter(|stage| stage.purpose != Purpose::Commit);
    for step in before.flat_map(|stage| &stage.steps) {
        let Some(range) = written(step) else {
            continue;
        };
        if !spoil(&range, step.file())? {
            // What is in use may be a part of it.
            for part in sectors(&range).take(SPOILED) {
                spoil(&part, step.file())?;
            }
        }
    }
    Ok(found)
}

/// The sectors of a range of bytes, cut where it ends.
fn sectors(range: &Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let (start, end) = (range.start, range.end);
    let numbers = start / SECTOR..end.div_ceil(SECTOR);
    numbers.map(move |number| (number * SECTOR).max(start)..((number + 1) * SECTOR).min(end))
}

/// The files with garbage in a range, as far as it is inside one that is there
/// before the plan; `None` where nothing is.
fn spoiled(
    files: &Files,
    planned: &Planned,
    file: FileNo,
    range: &Range<u64>,
) -> Result<Option<Files>, String> {
    let file = planned.numbers.file(file);
    let Some(file) = file.ok().filter(|&file| file < files.count()) else {
        return Ok(None);
    };
    let len = files
        .bytes(file)
        .len()
        .min(range.end)
        .saturating_sub(range.start);
    let mut spoiled = files.clone();
    let bytes = spoiled.bytes_mut(file);
    bytes.write(range.start, &vec![GARBAGE; len as usize]);
    Ok((len > 0).then_some(spoiled))
}

/// Where a step writes.
fn written(step: &Step) -> Option<Range<u64>> {
    let (offset, len) = match *step {
        Step::Write {
            offset, ref data, ..
        } => (offset, data.len() as u64),
        Step::Zero { offset, len, .. }
        | Step::Fill { offset, len, .. }
        | Step::Punch { offset, len, .. } => (offset, len),
        Step::Copy { to, len, .. } | Step::CopyFrom { to, len, .. } => (to, len),
        _ => return None,
    };
    Some(offset..offset + len)
}

/// Whether a bad state is left without a part of a plan. Only states that the
/// whole plan cannot leave are judged: first what they are, then what becomes
/// of them; first without qemu-img, which takes long.
fn is_needed(judge: &Judge<'_>, planned: &Planned, part: Part, seed: u64) -> Result<bool, String> {
    let states = match part {
        Part::Barrier(at) => without_barrier(judge, planned, at, seed),
        Part::Zero(stage, step) => without_step(judge, planned, stage, step, seed)?,
    };
    for shown in [Shown::Never, Shown::Always] {
        for depth in [Depth::Present, Depth::AndFuture] {
            judge.shown.set(shown);
            for (files, is_end) in &states {
                let mut faults = judge.verdict(files, depth)?.faults;
                if *is_end && depth == Depth::AndFuture {
                    faults.extend(judge.verdict_on_end(files)?);
                }
                if !faults.is_empty() {
                    return Ok(true);
                }
            }
        }
    }
    Ok(false)
}

/// What a crash can leave only where a barrier is missing.
fn without_barrier(
    judge: &Judge<'_>,
    planned: &Planned,
    at: usize,
    seed: u64,
) -> Vec<(Files, bool)> {
    let mut start = judge.setup.files.clone();
    start.apply_all(&planned.epochs[..at]);
    let around = [&planned.epochs[at], &planned.epochs[at + 1]];
    let mut found = Vec::new();
    states_without_barrier(&start, around, seed, |state| {
        found.push((state.files, false));
        ControlFlow::Continue(())
    });
    found
}

/// What a change without a step leaves, the end first, and what a crash can leave
/// of it from there on.
fn without_step(
    judge: &Judge<'_>,
    planned: &Planned,
    stage: usize,
    step: usize,
    seed: u64,
) -> Result<Vec<(Files, bool)>, String> {
    let mut plan = planned.plan.clone();
    plan.stages[stage].steps.remove(step);
    let epochs = planned.epochs_of(&plan, &judge.setup.files)?;
    let mut start = judge.setup.files.clone();
    start.apply_all(&epochs[..stage]);
    let mut end = start.clone();
    end.apply_all(&epochs[stage..]);
    let mut found = vec![(end, true)];
    states(&start, &epochs[stage..], seed, |state| {
        if state.telling {
            found.push((state.files, false));
        }
        ControlFlow::Continue(())
    });
    Ok(found)
}

/// The parts of a plan that are to be taken out: barriers between stages that
/// leave a trace, and zeroing of what may not be zero. The barrier between two
/// flushes is what a flush is for.
fn parts(judge: &Judge<'_>, planned: &Planned) -> Result<Vec<Part>, String> {
    let ends_flush = |at: usize| planned.data.iter().any(|&(stage, _)| stage == at + 1);
    let epochs = planned.epochs.windows(2).enumerate();
    let between = epochs.filter(|(_, pair)| pair.iter().all(|epoch| !epoch.is_empty()));
    let between = between.filter(|&(at, _)| !ends_flush(at));
    let mut parts: Vec<Part> = between.map(|(at, _)| Part::Barrier(at)).collect();
    for (stage, step) in zeroing(&planned.plan) {
        if zeroes_for_content(judge, planned, stage, step)? {
            parts.push(Part::Zero(stage, step));
        }
    }
    Ok(parts)
}

/// Whether zeroing is for what is read, and not for disk space alone: zeroes that
/// are written over zeroes take some, and a punched range that nothing refers to
/// in the end gives some back.
fn zeroes_for_content(
    judge: &Judge<'_>,
    planned: &Planned,
    stage: usize,
    step: usize,
) -> Result<bool, String> {
    let step = &planned.plan.stages[stage].steps[step];
    let takes_or_gives = matches!(step, Step::Fill { .. } | Step::Punch { .. });
    let Some(range) = written(step).filter(|_| takes_or_gives) else {
        return Ok(true);
    };
    // A file that the plan makes is empty before.
    let Ok(file) = planned.numbers.file(step.file()) else {
        return Ok(false);
    };
    let mut files = judge.setup.files.clone();
    files.apply_all(&planned.epochs[..stage]);
    let inside = |files: &Files| files.bytes(file).len().min(range.end).max(range.start);
    let before = files
        .bytes(file)
        .read(range.start, inside(&files) - range.start);
    if before.iter().all(|&byte| byte == 0) {
        return Ok(false);
    }
    files.apply_all(&planned.epochs[stage..]);
    let len = inside(&files) - range.start;
    let bytes = files.bytes_mut(file);
    bytes.write(range.start, &vec![GARBAGE; len as usize]);
    judge.shown.set(Shown::Never);
    Ok(len > 0 && !judge.verdict_on_end(&files)?.is_empty())
}

/// The steps of a plan that write nothing but zeroes: stage and step.
fn zeroing(plan: &Plan) -> impl Iterator<Item = (usize, usize)> {
    let zeroes = |step: &Step| match step {
        Step::Zero { .. } | Step::Fill { .. } | Step::Punch { .. } => true,
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
            Step::Remove { ref name } => format!("remove {name:?}"),
        };
        let steps: Vec<String> = stage.steps.iter().map(place).collect();
        format!("{number} {:?}: {}", stage.purpose, steps.join(", "))
    };
    let stages: Vec<String> = plan.stages.iter().enumerate().map(stage).collect();
    stages.join("\n")
}
