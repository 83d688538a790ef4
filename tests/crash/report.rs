//! Explores a case from its first to its last state and counts what was found.

use crate::cases::Case;
use crate::disk::Epoch;
use crate::explore::{State, states};
use crate::judge::{Content, Depth, Judge, Verdict};
use crate::setup::Setup;
use std::fmt;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, sync_channel};

/// States judged at the same time within one case.
const JUDGES: usize = 2;
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
    /// States of guest writes that hold some sectors of each.
    pub mixed: usize,
    /// States with leaked clusters.
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
            Some(Content::Mixed) => self.mixed += 1,
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

    /// The table's heading.
    pub fn heading() -> String {
        format!(
            "{:<44} {:>5} {:>6} {:>5} {:>5} {:>5} {:>5} {:>4}",
            "case", "syncs", "states", "old", "new", "mixed", "leaks", "bad"
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

/// Judges every state that a crash during `epochs` can leave. With
/// [`Depth::Present`], stops after the first bad one.
pub fn explore(
    case: &Case,
    setup: &Setup,
    epochs: &[Epoch],
    seed: u64,
    depth: Depth,
) -> Result<Row, String> {
    let row = Mutex::new(Row {
        name: case.name.to_owned(),
        barriers: epochs.len(),
        ..Row::default()
    });
    let (send, receive) = sync_channel::<State>(JUDGES);
    let receive = Mutex::new(receive);
    std::thread::scope(|scope| {
        let judges: Vec<_> = (0..JUDGES)
            .map(|_| scope.spawn(|| judge(case, setup, depth, &receive, &row)))
            .collect();
        let enough = || depth == Depth::Present && row.lock().is_ok_and(|row| row.bad > 0);
        states(&setup.files, epochs, seed, |state| {
            if !enough() {
                let _ = send.send(state);
            }
        });
        drop(send);
        judges.into_iter().try_for_each(|judge| match judge.join() {
            Ok(result) => result,
            Err(_) => Err("a judge panicked".to_owned()),
        })
    })?;
    row.into_inner().map_err(|_| "a judge panicked".to_owned())
}

fn judge(
    case: &Case,
    setup: &Setup,
    depth: Depth,
    states: &Mutex<Receiver<State>>,
    row: &Mutex<Row>,
) -> Result<(), String> {
    let judge = Judge::new(case, setup, depth)?;
    loop {
        let next = states.lock().map_err(|_| "poisoned")?.recv();
        let Ok(state) = next else { return Ok(()) };
        let verdict = judge.verdict(&state);
        let verdict = match verdict {
            Ok(verdict) => verdict,
            // Keep receiving, so that the explorer is not left waiting.
            Err(text) => Verdict {
                content: None,
                leaks: false,
                faults: vec![format!("cannot be judged: {text}")],
            },
        };
        row.lock()
            .map_err(|_| "poisoned")?
            .count(&state.cause, &verdict);
    }
}
