//! Explores a case from its first to its last state and counts what was found.

use super::disk::{Epoch, Files};
use super::explore::{State, states};
use super::judge::{Content, Depth, Judge, Shown, Verdict};
use std::fmt;
use std::ops::ControlFlow;

/// Bad states that a report spells out.
const SPELLED_OUT: usize = 3;

/// What the states of one case came to.
#[derive(Clone, Debug, Default)]
pub struct Row {
    /// The case.
    pub name: String,
    /// Durability barriers of the change.
    pub barriers: usize,
    /// States with different content.
    pub states: usize,
    /// States that hold the old disk.
    pub old: usize,
    /// States that hold the new disk.
    pub new: usize,
    /// States that hold some of each: of guest writes some sectors, or the old
    /// disk for one reader and the new one for another.
    pub mixed: usize,
    /// States with leaked space.
    pub leaks: usize,
    /// States that no reader may ever see.
    pub bad: usize,
    /// The first of them, spelled out.
    pub examples: Vec<String>,
}

impl Row {
    fn count(&mut self, cause: &str, verdict: &Verdict) {
        self.states += 1;
        match verdict.content {
            Some(Content::Old) => self.old += 1,
            Some(Content::New) => self.new += 1,
            Some(Content::Mixed | Content::Differs) => self.mixed += 1,
            None => {}
        }
        self.leaks += usize::from(verdict.leaks);
        if !verdict.faults.is_empty() {
            self.bad += 1;
            if self.examples.len() < SPELLED_OUT {
                self.examples
                    .push(format!("{cause}: {}", verdict.faults.join("; ")));
            }
        }
    }

    /// Adds the counts of another row.
    pub fn add(&mut self, other: &Self) {
        self.barriers += other.barriers;
        self.states += other.states;
        self.old += other.old;
        self.new += other.new;
        self.mixed += other.mixed;
        self.leaks += other.leaks;
        self.bad += other.bad;
    }

    /// The table's heading.
    pub fn heading() -> String {
        format!(
            "{:<44} {:>5} {:>6} {:>5} {:>5} {:>5} {:>5} {:>4}",
            "", "syncs", "states", "old", "new", "mixed", "leaks", "bad"
        )
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:<44} {:>5} {:>6} {:>5} {:>5} {:>5} {:>5} {:>4}",
            self.name,
            self.barriers,
            self.states,
            self.old,
            self.new,
            self.mixed,
            self.leaks,
            self.bad
        )
    }
}

/// What is explored.
pub struct Exploration<'a> {
    /// Who judges the states.
    pub judge: &'a Judge<'a>,
    /// The files before the epochs.
    pub start: &'a Files,
    /// What happens to them.
    pub epochs: &'a [Epoch],
    /// What the random subsets are drawn from.
    pub seed: u64,
    /// How much of each state is judged.
    pub depth: Depth,
}

impl Exploration<'_> {
    /// Judges every state that a crash during the epochs can leave.
    pub fn run(&self) -> Row {
        let mut row = Row {
            name: super::full_name(self.judge.case),
            barriers: self.epochs.len(),
            ..Row::default()
        };
        states(
            self.start,
            self.epochs,
            self.seed,
            |State {
                 cause,
                 telling,
                 files,
             }| {
                self.judge.shown.set(match telling || super::shows_all() {
                    true => Shown::Always,
                    false => Shown::Some,
                });
                let verdict = self.judge.verdict(&files, self.depth);
                let verdict = verdict.unwrap_or_else(|text| Verdict {
                    faults: vec![format!("cannot be judged: {text}")],
                    ..Verdict::default()
                });
                row.count(&cause, &verdict);
                ControlFlow::Continue(())
            },
        );
        row
    }

    /// And what the whole change leaves.
    pub fn run_to_end(&self) -> Row {
        let mut row = self.run();
        let mut end = self.start.clone();
        end.apply_all(self.epochs);
        self.judge.shown.set(Shown::Always);
        let faults = self.judge.verdict_on_end(&end);
        let faults = faults.unwrap_or_else(|text| vec![format!("cannot be judged: {text}")]);
        if !faults.is_empty() {
            row.bad += 1;
            row.examples.push(format!("the end: {}", faults.join("; ")));
        }
        row
    }
}
