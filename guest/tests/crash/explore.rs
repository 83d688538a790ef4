//! Which states a crash can leave behind.
//!
//! For each epoch, on top of everything before it: none of its pieces, every
//! single one, every prefix, all but one, each whole event alone and missing,
//! and random subsets. Where an epoch sets a length, that happens before or
//! after the writes. Long epochs are sampled; the seed is printed and can be
//! given again.

use super::disk::{Epoch, Event, Files};
use super::random::Random;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::ops::{ControlFlow, Range};

/// Pieces of one epoch up to which every single, prefix and all-but-one is
/// explored; longer epochs get this many of each, at random.
const EXHAUSTIVE: usize = 24;
/// Events of one epoch whose whole presence or absence tells the most.
const TELLING: usize = 6;
/// Random subsets per epoch.
const RANDOM_SUBSETS: usize = 12;

/// A state that a crash can leave behind.
#[derive(Clone, Debug)]
pub struct State {
    /// How the state came about, for a report.
    pub cause: String,
    /// Whether it is one of few that tell the most: the first, the end of an
    /// epoch, a whole event alone or missing.
    pub telling: bool,
    /// What is on the disk.
    pub files: Files,
}

/// Subsets of an epoch's pieces, as sorted indexes, and which tell the most.
type Subsets = BTreeMap<Vec<usize>, bool>;

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
    let mut emit = |state: State| match seen.insert(state.files.digest()) {
        true => visit(state),
        false => ControlFlow::Continue(()),
    };
    // That the visitor has seen enough is all that can be said about it here.
    let _ = walk(start, epochs, seed, &mut emit);
}

/// What only a crash without the barrier between two epochs can leave: something
/// of the second, and not all of the first. The states that tell the most come
/// first.
pub fn states_without_barrier(
    start: &Files,
    [first, second]: [&Epoch; 2],
    seed: u64,
    mut visit: impl FnMut(State) -> ControlFlow<()>,
) {
    let mut random = Random(seed);
    let whole = [first.as_slice(), second].concat();
    let pieces = pieces_of(&whole);
    let border = pieces.partition_point(|&(event, _)| event < first.len());
    let (early, late) = (0..border, border..pieces.len());
    let mut list: Vec<Vec<usize>> = vec![late.clone().collect()];
    for missing in sample(&mut random, first.len(), EXHAUSTIVE) {
        list.push(pick(&early, &late, |at| pieces[at].0 != missing, |_| true));
    }
    for missing in sample(&mut random, border, EXHAUSTIVE) {
        list.push(pick(&early, &late, |at| at != missing, |_| true));
    }
    for event in sample(&mut random, second.len(), EXHAUSTIVE) {
        let event = event + first.len();
        list.push(pick(&early, &late, |_| false, |at| pieces[at].0 == event));
    }
    for piece in sample(&mut random, late.len(), RANDOM_SUBSETS) {
        list.push(pick(&early, &late, |_| false, |at| at == border + piece));
    }
    for _ in 0..RANDOM_SUBSETS {
        let share = [20, 50, 80][random.below(3)];
        let mut some = |_: usize| random.below(100) < share;
        let early: Vec<usize> = early.clone().filter(|&at| some(at)).collect();
        list.push(early.into_iter().chain(late.clone()).collect());
    }
    let mut seen = HashSet::new();
    for subset in list {
        for (order, files) in orders(start, &pieces, &subset) {
            let cause = describe(0, &pieces, &subset, order);
            let telling = true;
            if seen.insert(files.digest())
                && visit(State {
                    cause,
                    telling,
                    files,
                })
                .is_break()
            {
                return;
            }
        }
    }
}

/// Those of the early and those of the late pieces that are wanted.
fn pick(
    early: &Range<usize>,
    late: &Range<usize>,
    first: impl Fn(usize) -> bool,
    second: impl Fn(usize) -> bool,
) -> Vec<usize> {
    let early = early.clone().filter(|&at| first(at));
    early.chain(late.clone().filter(|&at| second(at))).collect()
}

/// The pieces of all events, each with the number of its event.
fn pieces_of(epoch: &Epoch) -> Vec<(usize, Event)> {
    let events = epoch.iter().enumerate();
    events
        .flat_map(|(event, whole)| whole.split().into_iter().map(move |piece| (event, piece)))
        .collect()
}

fn walk(
    start: &Files,
    epochs: &[Epoch],
    seed: u64,
    emit: &mut impl FnMut(State) -> ControlFlow<()>,
) -> ControlFlow<()> {
    let mut random = Random(seed);
    let mut base = start.clone();
    emit(State {
        cause: "nothing happened".into(),
        telling: true,
        files: base.clone(),
    })?;
    for (number, epoch) in epochs.iter().enumerate() {
        let pieces = pieces_of(epoch);
        for (subset, telling) in subsets(&pieces, epoch.len(), &mut random) {
            for (order, files) in orders(&base, &pieces, &subset) {
                let cause = describe(number, &pieces, &subset, order);
                emit(State {
                    cause,
                    telling,
                    files,
                })?;
            }
        }
        for event in epoch {
            base.apply(event);
        }
        emit(State {
            cause: format!("after epoch {number}"),
            telling: true,
            files: base.clone(),
        })?;
    }
    ControlFlow::Continue(())
}

/// The subsets of an epoch's pieces to explore.
fn subsets(pieces: &[(usize, Event)], events: usize, random: &mut Random) -> Subsets {
    let count = pieces.len();
    let mut subsets = Subsets::new();
    let mut add = |subset: Vec<usize>, telling: bool| {
        *subsets.entry(subset).or_default() |= telling;
    };
    for pick in sample(random, count, EXHAUSTIVE) {
        add(vec![pick], false);
        add((0..=pick).collect(), false);
        add((pick..count).collect(), false);
        add((0..count).filter(|&index| index != pick).collect(), false);
    }
    for (nth, event) in sample(random, events, EXHAUSTIVE).into_iter().enumerate() {
        let of_event = |index: &usize| pieces[*index].0 == event;
        let telling = nth < TELLING;
        add((0..count).filter(of_event).collect(), telling);
        add(
            (0..count).filter(|index| !of_event(index)).collect(),
            telling,
        );
    }
    for _ in 0..if count > 2 { RANDOM_SUBSETS } else { 0 } {
        let share = [20, 50, 80][random.below(3)];
        let some = (0..count).filter(|_| random.below(100) < share);
        add(some.collect(), false);
    }
    subsets
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
