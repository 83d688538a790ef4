//! Which states a crash can leave behind.
//!
//! For each epoch, on top of everything before it: none of its pieces, every
//! single one, every prefix, all but one, each whole event alone and missing,
//! and random subsets. Where an epoch sets a length, that happens before or
//! after the writes. Names change in their order: one that is missing takes
//! those after it along. Long epochs are sampled; the seed is printed and can be
//! given again.

use super::disk::{Epoch, Event, Files};
use super::random::Random;
use std::collections::{BTreeSet, HashSet};
use std::ops::ControlFlow;

/// Pieces of one epoch up to which every single, prefix and all-but-one is
/// explored; longer epochs get this many of each, at random.
const EXHAUSTIVE: usize = 24;
/// Random subsets per epoch.
const RANDOM_SUBSETS: usize = 12;

/// A state that a crash can leave behind.
#[derive(Clone, Debug)]
pub struct State {
    /// How the state came about, for a report.
    pub cause: String,
    /// What is on the disk.
    pub files: Files,
}

/// `count` different numbers below `bound`, in order, the first and the last
/// among them; all if there are no more.
fn sample(random: &mut Random, bound: usize, count: usize) -> BTreeSet<usize> {
    if bound <= count {
        return (0..bound).collect();
    }
    let mut picked = BTreeSet::from([0, bound - 1]);
    while picked.len() < count {
        picked.insert(random.below(bound));
    }
    picked
}

/// Every state to judge, each content once, the untouched and the finished one
/// among them, until `visit` has seen enough.
pub fn states(
    start: &Files,
    epochs: &[Epoch],
    seed: u64,
    mut visit: impl FnMut(State) -> ControlFlow<()>,
) {
    let mut seen = HashSet::new();
    let mut emit = |cause: String, files: Files| match seen.insert(files.digest()) {
        true => visit(State { cause, files }),
        false => ControlFlow::Continue(()),
    };
    // That the visitor has seen enough is all that can be said about it here.
    let _ = walk(start, epochs, seed, &mut emit);
}

fn walk(
    start: &Files,
    epochs: &[Epoch],
    seed: u64,
    emit: &mut impl FnMut(String, Files) -> ControlFlow<()>,
) -> ControlFlow<()> {
    let mut random = Random(seed);
    let mut base = start.clone();
    emit("nothing happened".into(), base.clone())?;
    for (number, epoch) in epochs.iter().enumerate() {
        let pieces: Vec<(usize, Event)> = epoch
            .iter()
            .enumerate()
            .flat_map(|(event, whole)| whole.split().into_iter().map(move |p| (event, p)))
            .collect();
        for subset in subsets(&pieces, epoch.len(), &mut random) {
            for (order, files) in orders(&base, &pieces, &subset) {
                let cause = describe(number, &pieces, &subset, order);
                emit(cause, files)?;
            }
        }
        for event in epoch {
            base.apply(event);
        }
        emit(format!("after epoch {number}"), base.clone())?;
    }
    ControlFlow::Continue(())
}

/// The subsets of an epoch's pieces to explore, as sorted indexes.
fn subsets(pieces: &[(usize, Event)], events: usize, random: &mut Random) -> BTreeSet<Vec<usize>> {
    let count = pieces.len();
    let mut subsets = BTreeSet::new();
    for pick in sample(random, count, EXHAUSTIVE) {
        subsets.insert(vec![pick]);
        subsets.insert((0..=pick).collect());
        subsets.insert((pick..count).collect());
        subsets.insert((0..count).filter(|&index| index != pick).collect());
    }
    for event in sample(random, events, EXHAUSTIVE) {
        let of_event = |index: &usize| pieces[*index].0 == event;
        subsets.insert((0..count).filter(of_event).collect());
        subsets.insert((0..count).filter(|index| !of_event(index)).collect());
    }
    for _ in 0..if count > 2 { RANDOM_SUBSETS } else { 0 } {
        let share = [20, 50, 80][random.below(3)];
        subsets.insert((0..count).filter(|_| random.below(100) < share).collect());
    }
    let names: Vec<usize> = (0..count).filter(|&at| pieces[at].1.names()).collect();
    subsets
        .into_iter()
        .map(|subset| names_in_order(subset, &names))
        .collect()
}

/// The subset without the changes of names that come after a missing one.
fn names_in_order(mut subset: Vec<usize>, names: &[usize]) -> Vec<usize> {
    let missing = names
        .iter()
        .find(|name| subset.binary_search(name).is_err());
    if let Some(missing) = missing {
        subset.retain(|at| at <= missing || names.binary_search(at).is_err());
    }
    subset
}

/// A subset performed in program order, and with its set-lengths last and first.
fn orders(base: &Files, pieces: &[(usize, Event)], subset: &[usize]) -> Vec<(&'static str, Files)> {
    let is_length = |index: &&usize| matches!(pieces[**index].1, Event::SetLength { .. });
    let (lengths, writes): (Vec<&usize>, Vec<&usize>) = subset.iter().partition(is_length);
    let run = |order: &mut dyn Iterator<Item = &usize>| {
        let mut files = base.clone();
        for &index in order {
            files.apply(&pieces[index].1);
        }
        files
    };
    let mut results = vec![("", run(&mut subset.iter()))];
    if !lengths.is_empty() && !writes.is_empty() {
        let (lengths, writes) = (|| lengths.iter().copied(), || writes.iter().copied());
        results.push((", length first", run(&mut lengths().chain(writes()))));
        results.push((", length last", run(&mut writes().chain(lengths()))));
    }
    results
}

fn describe(epoch: usize, pieces: &[(usize, Event)], subset: &[usize], order: &str) -> String {
    let name = |index: &usize| match &pieces[*index].1 {
        Event::Write { file, offset, data } => format!("{file}:{offset:#x}+{}", data.len()),
        Event::SetLength { file, len } => format!("{file}:length {len}"),
        Event::Create { name, .. } => format!("create {name}"),
        Event::Rename { from, to } => format!("rename {from} to {to}"),
        Event::Unlink { name } => format!("unlink {name}"),
    };
    let (total, done) = (pieces.len(), subset.len());
    let missing = || (0..total).filter(|index| !subset.contains(index));
    let detail = if done <= 4 {
        let names: Vec<String> = subset.iter().map(name).collect();
        format!("only [{}]", names.join(", "))
    } else if total - done <= 4 {
        let names: Vec<String> = missing().map(|index| name(&index)).collect();
        format!("all but [{}]", names.join(", "))
    } else if subset.iter().copied().eq(0..done) {
        "a prefix".to_owned()
    } else {
        "a subset".to_owned()
    };
    format!("epoch {epoch}: {done} of {total} pieces, {detail}{order}")
}
