//! A plan as `resize --dry-run` shows it.

use instar::compat::json;
use instar::compat::size::Human;
use instar_guest::plan::{Plan, Purpose, Stage, Step};
use instar_guest::proto::PlanReply;
use instar_guest::{FileNo, Format};
use serde_json::{Value, json};
use std::fmt::Write as _;

/// A plan and what it is for. Sizes are bytes.
pub struct Shown<'a> {
    /// The image.
    pub file: &'a str,
    /// Its format.
    pub format: Format,
    /// The size of its disk.
    pub from: u64,
    /// The size that the plan gives it.
    pub to: u64,
    /// The plan.
    pub reply: &'a PlanReply,
}

impl Shown<'_> {
    /// One line per step, one per barrier, the commit marked.
    pub fn human(&self) -> String {
        let plan = &self.reply.plan;
        let mut out = format!(
            "{}: {}, {} to {} ({} to {} bytes)\n",
            self.file,
            self.format.name(),
            Human(self.from),
            Human(self.to),
            self.from,
            self.to
        );
        for stage in stages(plan) {
            for step in &stage.steps {
                // Writing to a string cannot fail.
                let _ = writeln!(out, "{}", step_line(stage, step));
            }
            out.push_str("  ---------  fdatasync\n");
        }
        out.push_str(&self.summary());
        out
    }

    fn summary(&self) -> String {
        let plan = &self.reply.plan;
        if plan.is_empty() {
            return "Nothing has to change.\n".to_owned();
        }
        let steps: usize = stages(plan).map(|stage| stage.steps.len()).sum();
        let barriers = stages(plan).count();
        format!("{steps} steps, {barriers} barriers. Nothing was written.\n")
    }

    /// The same for programs.
    pub fn json(&self) -> String {
        let stages: Vec<Value> = stages(&self.reply.plan).map(stage_json).collect();
        let value = json!({
            "filename": self.file,
            "format": self.format.name(),
            "old-size": self.from,
            "new-size": self.to,
            "stages": stages,
            "warnings": self.reply.warnings,
        });
        json::pretty(&value) + "\n"
    }
}

/// Stages that do something.
fn stages(plan: &Plan) -> impl Iterator<Item = &Stage> {
    plan.stages.iter().filter(|stage| !stage.steps.is_empty())
}

fn purpose(purpose: Purpose) -> &'static str {
    match purpose {
        Purpose::Prepare => "prepare",
        Purpose::Count => "count",
        Purpose::Link => "link",
        Purpose::Commit => "commit",
        Purpose::Release => "release",
    }
}

/// A step's name, where it begins and how long it is.
fn parts(step: &Step) -> (&'static str, Option<u64>, u64) {
    match *step {
        Step::Write {
            offset, ref data, ..
        } => ("write", Some(offset), data.len() as u64),
        Step::Zero { offset, len, .. } => ("zero", Some(offset), len),
        Step::Fill { offset, len, .. } => ("fill", Some(offset), len),
        Step::Copy { to, len, .. } => ("copy", Some(to), len),
        Step::Reserve { offset, len, .. } => ("reserve", Some(offset), len),
        Step::SetLength { len, .. } => ("set-length", None, len),
        Step::Punch { offset, len, .. } => ("punch", Some(offset), len),
        Step::Create { .. } => ("create", None, 0),
        Step::Rename { .. } => ("rename", None, 0),
        Step::Unlink { .. } => ("unlink", None, 0),
    }
}

fn step_line(stage: &Stage, step: &Step) -> String {
    let (name, offset, len) = parts(step);
    let place = offset.map_or_else(String::new, |offset| format!("{offset:#x}"));
    let mut line = format!(
        "  {:<9}  {name:<10}  {place:>14}  {len:>12}",
        purpose(stage.purpose)
    );
    if let Step::Copy { from, .. } = step {
        line.push_str(&format!("  from {from:#x}"));
    }
    if step.file() == FileNo::DATA {
        line.push_str("  of the data file");
    }
    if stage.purpose == Purpose::Commit {
        line.push_str("  <- the new size takes effect");
    }
    line
}

fn stage_json(stage: &Stage) -> Value {
    let steps: Vec<Value> = stage.steps.iter().map(step_json).collect();
    json!({
        "purpose": purpose(stage.purpose),
        "commit": stage.purpose == Purpose::Commit,
        "steps": steps,
    })
}

fn step_json(step: &Step) -> Value {
    let (name, offset, len) = parts(step);
    let mut value = json!({"step": name, "file": step.file().0});
    if let Some(offset) = offset {
        value["offset"] = offset.into();
    }
    value["length"] = len.into();
    if let Step::Copy { from, .. } = *step {
        value["from"] = from.into();
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply() -> PlanReply {
        let step = |offset: u64, len: usize| Step::Write {
            file: FileNo::IMAGE,
            offset,
            data: vec![0; len],
        };
        PlanReply {
            plan: Plan {
                stages: vec![
                    Stage {
                        purpose: Purpose::Prepare,
                        steps: vec![
                            step(0x50000, 65536),
                            Step::SetLength {
                                file: FileNo::DATA,
                                len: 4096,
                            },
                        ],
                    },
                    Stage {
                        purpose: Purpose::Link,
                        steps: vec![],
                    },
                    Stage {
                        purpose: Purpose::Commit,
                        steps: vec![step(24, 16)],
                    },
                ],
            },
            options: vec![],
            warnings: vec![],
        }
    }

    fn shown(reply: &PlanReply) -> Shown<'_> {
        Shown {
            file: "a.qcow2",
            format: Format::Qcow2,
            from: 1 << 20,
            to: 4 << 20,
            reply,
        }
    }

    #[test]
    fn every_step_has_a_line_and_the_commit_is_marked() {
        let expected = "\
a.qcow2: qcow2, 1 MiB to 4 MiB (1048576 to 4194304 bytes)
  prepare    write              0x50000         65536
  prepare    set-length                          4096  of the data file
  ---------  fdatasync
  commit     write                 0x18            16  <- the new size takes effect
  ---------  fdatasync
3 steps, 2 barriers. Nothing was written.
";
        assert_eq!(shown(&reply()).human(), expected);
    }

    #[test]
    fn the_json_has_every_step_and_tells_the_commit() {
        let value: Value = serde_json::from_str(&shown(&reply()).json()).unwrap();
        assert_eq!(
            value["stages"],
            json!([
                {"purpose": "prepare", "commit": false, "steps": [
                    {"step": "write", "file": 0, "offset": 0x50000, "length": 65536},
                    {"step": "set-length", "file": 1, "length": 4096}]},
                {"purpose": "commit", "commit": true, "steps": [
                    {"step": "write", "file": 0, "offset": 24, "length": 16}]}
            ])
        );
    }
}
