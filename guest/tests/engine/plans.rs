//! The bounds of a plan, and its execution in more than one order.

use instar_guest::facts::Facts;
use instar_guest::plan::{MAX_COMMITS, Plan, Purpose, SECTOR, Stage, Step};
use instar_guest::proto::Preallocation;
use instar_guest::testing::MemHost;

const M: u64 = 1 << 20;
/// Room for tables, whatever the size, in bytes.
const SLACK: u64 = 64 * M;
/// The most bytes of a plan in one message.
const MAX_MESSAGE: u64 = 8 * M;

/// What the plan of a resize may do.
pub struct Bounds {
    /// Lengths of the files before it.
    lens: Vec<u64>,
    /// How much longer a file may get.
    room: u64,
    /// The most bytes that the steps may fill.
    fill: u64,
    /// The files before it.
    before: MemHost,
}

impl Bounds {
    /// Those of a resize of a disk with these files.
    pub fn new(host: &MemHost, facts: &Facts, size: u64, preallocation: Preallocation) -> Self {
        let others = host.others.iter().flatten();
        let mut lens = vec![host.image.len() as u64];
        lens.extend(others.map(|file| file.len() as u64));
        let delta = size.abs_diff(facts.virtual_size);
        let metadata = SLACK + 8 * facts.cluster_size.unwrap_or(0) + delta / 8;
        let added = size.saturating_sub(facts.virtual_size);
        let moved = match added {
            0 => lens.iter().sum(),
            _ => 0,
        };
        let space = match preallocation {
            Preallocation::Off => 0,
            _ => 2 * added,
        };
        Self {
            room: metadata + added,
            fill: metadata + moved + space,
            lens,
            before: host.clone(),
        }
    }

    /// Executes a plan whose parts the host may have streamed, forwards; and
    /// with the steps of every stage backwards, which has to be the same.
    pub fn apply(mut self, host: &mut MemHost, plan: &Plan) -> Result<(), String> {
        let streamed: Vec<&Stage> = host.streamed.iter().flat_map(|it| &it.stages).collect();
        self.check_streamed(&streamed)?;
        let stages: Vec<&Stage> = streamed.into_iter().chain(&plan.stages).collect();
        self.check_steps(&stages)?;
        check_message(plan)?;
        let commits = plan.stages.iter();
        let commits = commits.filter(|it| it.purpose == Purpose::Commit);
        let commits: Vec<&Stage> = commits.collect();
        if commits.len() > MAX_COMMITS || (commits.is_empty() && !plan.is_empty()) {
            return Err(format!("{} commits", commits.len()));
        }
        for commit in commits {
            check_commit(commit)?;
        }
        for stage in stages {
            let (made, rest): (Vec<&Step>, Vec<&Step>) = stage
                .steps
                .iter()
                .partition(|step| matches!(step, Step::Create { .. }));
            for step in made.into_iter().chain(rest.into_iter().rev()) {
                self.before.step(step);
            }
        }
        host.apply(plan);
        let same = self.before.image == host.image && self.before.others == host.others;
        match same {
            true => Ok(()),
            false => Err("the order of the steps of a stage makes a difference".to_string()),
        }
    }

    /// Parts are streamed before the first commit, past the ends of the files.
    fn check_streamed(&self, stages: &[&Stage]) -> Result<(), String> {
        for stage in stages {
            if stage.purpose == Purpose::Commit {
                return Err("a commit is streamed".to_string());
            }
            for step in &stage.steps {
                let end = self.lens.get(step.file().0 as usize).copied().unwrap_or(0);
                let fine = match target(step) {
                    Some((offset, _)) => offset >= end,
                    None => matches!(step, Step::SetLength { len, .. } if *len >= end),
                };
                if !fine {
                    return Err(format!("{step:?} is streamed, the file ends at {end:#x}"));
                }
            }
        }
        Ok(())
    }

    fn check_steps(&self, stages: &[&Stage]) -> Result<(), String> {
        let mut lens = self.lens.clone();
        let mut filled = 0u64;
        for step in stages.iter().flat_map(|stage| &stage.steps) {
            let file = step.file().0 as usize;
            if matches!(step, Step::Create { .. }) {
                lens.push(0);
                continue;
            }
            let len = *lens.get(file).ok_or(format!("no file for {step:?}"))?;
            let cap = self.lens.iter().max().unwrap_or(&0) + self.room;
            let end = match (target(step), step) {
                (Some((offset, bytes)), _) => offset.checked_add(bytes).ok_or("an overflow")?,
                (None, Step::SetLength { len, .. }) => *len,
                _ => 0,
            };
            if end > cap {
                return Err(format!("{end:#x} is past the bound {cap:#x}"));
            }
            filled += match (step, target(step)) {
                (Step::Punch { .. }, _) | (_, None) => 0,
                (_, Some((_, bytes))) => bytes,
            };
            if filled > self.fill {
                return Err(format!("{filled} bytes are filled, not {}", self.fill));
            }
            check_source(step, len)?;
            lens[file] = match step {
                Step::SetLength { len, .. } => *len,
                Step::Reserve { .. } | Step::Punch { .. } => len,
                _ => len.max(end),
            };
        }
        Ok(())
    }
}

/// The range that a step changes.
fn target(step: &Step) -> Option<(u64, u64)> {
    match step {
        Step::Write { offset, data, .. } => Some((*offset, data.len() as u64)),
        Step::Copy { to, len, .. } => Some((*to, *len)),
        Step::Zero { offset, len, .. }
        | Step::Fill { offset, len, .. }
        | Step::Reserve { offset, len, .. }
        | Step::Punch { offset, len, .. } => Some((*offset, *len)),
        _ => None,
    }
}

/// What is copied or punched is in the file; a copy does not overlap itself.
fn check_source(step: &Step, file_len: u64) -> Result<(), String> {
    let fine = match step {
        Step::Copy { from, to, len, .. } => {
            from + len <= file_len && (from + len <= *to || to + len <= *from)
        }
        Step::Punch { offset, len, .. } => offset + len <= file_len,
        _ => true,
    };
    match fine {
        true => Ok(()),
        false => Err(format!("{step:?} in a file of {file_len:#x} bytes")),
    }
}

fn check_commit(stage: &Stage) -> Result<(), String> {
    let fine = |step: &Step| match step {
        Step::Write { offset, data, .. } => {
            !data.is_empty() && offset % SECTOR + data.len() as u64 <= SECTOR
        }
        _ => false,
    };
    match stage.steps.as_slice() {
        [Step::SetLength { .. } | Step::Rename { .. }] => Ok(()),
        [step] if fine(step) => Ok(()),
        [
            one @ Step::Write { data, .. },
            copy @ Step::Write { data: same, .. },
        ] if fine(one) && fine(copy) && data == same => Ok(()),
        steps => Err(format!("not a commit: {} steps", steps.len())),
    }
}

fn check_message(plan: &Plan) -> Result<(), String> {
    let steps = plan.stages.iter().flat_map(|stage| &stage.steps);
    let bytes: u64 = steps
        .map(|step| match step {
            Step::Write { data, .. } => data.len() as u64 + 16,
            _ => 32,
        })
        .sum();
    match bytes <= MAX_MESSAGE {
        true => Ok(()),
        false => Err(format!("a plan of {bytes} bytes")),
    }
}
