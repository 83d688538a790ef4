//! A plan as `resize --dry-run` shows it.

use instar::compat::json;
use instar::compat::size::Human;
use instar::image::printable_name;
use instar_guest::plan::{NewName, Purpose, Stage, Step};
use instar_guest::proto::PlanReply;
use instar_guest::{Facts, FileNo};
use serde_json::{Value, json};
use std::fmt::Write as _;

/// A plan and what it is for. Sizes are bytes.
pub struct Shown<'a> {
    /// The image as the user named it.
    pub file: &'a str,
    /// What it says about itself.
    pub facts: &'a Facts,
    /// The size of its disk.
    pub from: u64,
    /// The size that the plan gives it.
    pub to: u64,
    /// The plan.
    pub reply: &'a PlanReply,
}

impl Shown<'_> {
    /// One line per step, one per barrier, the commits marked.
    pub fn human(&self) -> String {
        let mut out = format!(
            "{}: {}, {} to {} ({} to {} bytes)\n",
            self.file,
            self.facts.format.name(),
            Human(self.from),
            Human(self.to),
            self.from,
            self.to
        );
        let names = self.names();
        let commits = self.stages().filter(|stage| is_commit(stage)).count();
        let mut commit = 0;
        for stage in self.stages() {
            commit += usize::from(is_commit(stage));
            for step in &stage.steps {
                // Writing to a string cannot fail.
                let _ = write!(out, "{}", step_line(stage, step, &names));
                out.push_str(&match (is_commit(stage), commits) {
                    (false, _) => "\n".to_owned(),
                    (true, 1) => "  <- the new size takes effect\n".to_owned(),
                    (true, _) => format!("  <- takes effect, {commit} of {commits}\n"),
                });
            }
            out.push_str("  ---------  fdatasync\n");
        }
        out.push_str(&self.summary());
        out
    }

    fn summary(&self) -> String {
        if self.reply.plan.is_empty() {
            return "Nothing has to change.\n".to_owned();
        }
        let steps: usize = self.stages().map(|stage| stage.steps.len()).sum();
        let barriers = self.stages().count();
        format!("{steps} steps, {barriers} barriers. Nothing was written.\n")
    }

    /// The same for programs.
    pub fn json(&self) -> String {
        let stages = self.stages().map(|stage| stage_json(stage, self.file));
        let stages: Vec<Value> = stages.collect();
        let value = json!({
            "filename": self.file,
            "format": self.facts.format.name(),
            "old-size": self.from,
            "new-size": self.to,
            "files": self.names(),
            "stages": stages,
            "warnings": self.reply.warnings,
        });
        json::pretty(&value) + "\n"
    }

    /// Stages that do something.
    fn stages(&self) -> impl Iterator<Item = &Stage> {
        let stages = self.reply.plan.stages.iter();
        stages.filter(|stage| !stage.steps.is_empty())
    }

    /// The names of all files by number: the image, those that it names, and
    /// those that the plan creates.
    fn names(&self) -> Vec<String> {
        let named = self.facts.files.iter().map(|named| named.name.clone());
        let steps = self.stages().flat_map(|stage| &stage.steps);
        let created = steps.filter_map(|step| match step {
            Step::Create { name, .. } => Some(new_name(name, self.file)),
            _ => None,
        });
        std::iter::once(self.file.to_owned())
            .chain(named)
            .chain(created)
            .collect()
    }
}

/// What a name is beside an image of that name.
fn new_name(name: &NewName, image: &str) -> String {
    match name {
        NewName::Replacement => format!("{image}.instar-new"),
        NewName::Plain(name) => name.clone(),
    }
}

fn is_commit(stage: &Stage) -> bool {
    stage.purpose == Purpose::Commit
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

/// What a step is called, and the numbers that it has.
struct Parts {
    name: &'static str,
    offset: Option<u64>,
    len: Option<u64>,
}

fn parts(step: &Step) -> Parts {
    let part = |name, offset, len| Parts { name, offset, len };
    let range = |name, offset, len| part(name, Some(offset), Some(len));
    match *step {
        Step::Write {
            offset, ref data, ..
        } => range("write", offset, data.len() as u64),
        Step::Zero { offset, len, .. } => range("zero", offset, len),
        Step::Fill { offset, len, .. } => range("fill", offset, len),
        Step::Copy { to, len, .. } | Step::CopyFrom { to, len, .. } => range("copy", to, len),
        Step::Reserve { offset, len, .. } => range("reserve", offset, len),
        Step::SetLength { len, .. } => part("set-length", None, Some(len)),
        Step::Punch { offset, len, .. } => range("punch", offset, len),
        Step::Create { .. } => part("create", None, None),
        Step::Rename { .. } => part("rename", None, None),
        Step::Unlink { .. } => part("unlink", None, None),
        Step::Remove { .. } => part("remove", None, None),
    }
}

fn step_line(stage: &Stage, step: &Step, names: &[String]) -> String {
    let Parts { name, offset, len } = parts(step);
    let place = offset.map_or_else(String::new, |offset| format!("{offset:#x}"));
    let len = len.map_or_else(String::new, |len| len.to_string());
    let mut line = format!(
        "  {:<9}  {name:<10}  {place:>14}  {len:>12}",
        purpose(stage.purpose)
    );
    if let Step::Copy { from, .. } | Step::CopyFrom { from, .. } = step {
        line.push_str(&format!("  from {from:#x}"));
    }
    if let Step::CopyFrom { source, .. } = step {
        line.push_str(&format!(" of {}", name_of(*source, names)));
    }
    match step {
        Step::CopyFrom { file, .. } => {
            line.push_str(&format!("  into {}", name_of(*file, names)));
        }
        Step::Create { file, .. } | Step::Unlink { file } => {
            line.push_str(&format!("  {}", name_of(*file, names)));
        }
        Step::Remove { name } => {
            let image = names.first().map_or("", String::as_str);
            let name = new_name(name, image);
            line.push_str(&format!("  {}, if it is there", printable_name(&name)));
        }
        Step::Rename { file, over } => line.push_str(&format!(
            "  {} over {}",
            name_of(*file, names),
            name_of(*over, names)
        )),
        step if step.file() != FileNo::IMAGE => {
            line.push_str(&format!("  of {}", name_of(step.file(), names)));
        }
        _ => {}
    }
    line
}

/// The name of a file, fit for a terminal.
fn name_of(file: FileNo, names: &[String]) -> String {
    let name = usize::try_from(file.0).ok().and_then(|at| names.get(at));
    name.map_or_else(|| format!("file {}", file.0), |name| printable_name(name))
}

fn stage_json(stage: &Stage, image: &str) -> Value {
    let steps = stage.steps.iter().map(|step| step_json(step, image));
    let steps: Vec<Value> = steps.collect();
    json!({
        "purpose": purpose(stage.purpose),
        "commit": is_commit(stage),
        "steps": steps,
    })
}

fn step_json(step: &Step, image: &str) -> Value {
    let Parts { name, offset, len } = parts(step);
    let mut value = json!({"step": name, "file": step.file().0});
    let numbers = [("offset", offset), ("length", len)];
    for (key, number) in numbers {
        if let Some(number) = number {
            value[key] = number.into();
        }
    }
    match *step {
        Step::Copy { from, .. } => value["from"] = from.into(),
        Step::CopyFrom { source, from, .. } => {
            value["source"] = source.0.into();
            value["from"] = from.into();
        }
        Step::Rename { over, .. } => value["over"] = over.0.into(),
        Step::Remove { ref name } => value["name"] = new_name(name, image).into(),
        _ => {}
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use instar_guest::Format;
    use instar_guest::facts::NamedFile;
    use instar_guest::plan::Plan;

    const PART: FileNo = FileNo(1);
    const NEW: FileNo = FileNo(2);

    fn facts() -> Facts {
        Facts {
            format: Format::Vmdk,
            probed: true,
            virtual_size: 1 << 20,
            cluster_size: None,
            write_unit: 1,
            size_unit: 512,
            backing: None,
            identity: None,
            files: vec![NamedFile {
                name: "a-flat.vmdk".to_owned(),
                format: None,
            }],
            files_first: true,
            encrypted: false,
            dirty: false,
            corrupt: false,
            unsettled: None,
            no_write: None,
            no_resize: None,
            snapshots: vec![],
            specific: vec![],
        }
    }

    fn write(offset: u64, len: usize) -> Step {
        Step::Write {
            file: FileNo::IMAGE,
            offset,
            data: vec![0; len],
        }
    }

    fn reply(stages: &[(Purpose, &[Step])]) -> PlanReply {
        let stage = |(purpose, steps): &(Purpose, &[Step])| Stage {
            purpose: *purpose,
            steps: steps.to_vec(),
        };
        PlanReply {
            plan: Plan {
                stages: stages.iter().map(stage).collect(),
            },
            ..PlanReply::default()
        }
    }

    /// A plan with one commit, and one with two and all that concerns names.
    fn plans() -> [PlanReply; 2] {
        let grown = Step::SetLength {
            file: PART,
            len: 4096,
        };
        let create = Step::Create {
            file: NEW,
            name: NewName::Replacement,
        };
        let rename = Step::Rename {
            file: NEW,
            over: FileNo::IMAGE,
        };
        [
            reply(&[
                (Purpose::Prepare, &[write(0x50000, 65536), grown]),
                (Purpose::Link, &[]),
                (Purpose::Commit, &[write(24, 16)]),
            ]),
            reply(&[
                (Purpose::Prepare, &[create]),
                (Purpose::Commit, &[rename]),
                (Purpose::Commit, &[write(24, 16)]),
                (Purpose::Release, &[Step::Unlink { file: PART }]),
            ]),
        ]
    }

    fn shown<'a>(facts: &'a Facts, reply: &'a PlanReply) -> Shown<'a> {
        Shown {
            file: "a.vmdk",
            facts,
            from: 1 << 20,
            to: 4 << 20,
            reply,
        }
    }

    #[test]
    fn every_step_has_a_line_and_the_commits_are_marked() {
        let expected = [
            "\
a.vmdk: vmdk, 1 MiB to 4 MiB (1048576 to 4194304 bytes)
  prepare    write              0x50000         65536
  prepare    set-length                          4096  of a-flat.vmdk
  ---------  fdatasync
  commit     write                 0x18            16  <- the new size takes effect
  ---------  fdatasync
3 steps, 2 barriers. Nothing was written.
",
            "\
a.vmdk: vmdk, 1 MiB to 4 MiB (1048576 to 4194304 bytes)
  prepare    create                                    a.vmdk.instar-new
  ---------  fdatasync
  commit     rename                                    a.vmdk.instar-new over a.vmdk  <- takes effect, 1 of 2
  ---------  fdatasync
  commit     write                 0x18            16  <- takes effect, 2 of 2
  ---------  fdatasync
  release    unlink                                    a-flat.vmdk
  ---------  fdatasync
4 steps, 4 barriers. Nothing was written.
",
        ];
        for (reply, expected) in plans().iter().zip(expected) {
            assert_eq!(shown(&facts(), reply).human(), expected);
        }
    }

    #[test]
    fn the_json_has_every_step_and_tells_the_commits() {
        let stages = |reply: &PlanReply| {
            let text = shown(&facts(), reply).json();
            let value: Value = serde_json::from_str(&text).unwrap();
            value["stages"].clone()
        };
        let [one, two] = plans();
        assert_eq!(
            stages(&one),
            json!([
                {"purpose": "prepare", "commit": false, "steps": [
                    {"step": "write", "file": 0, "offset": 0x50000, "length": 65536},
                    {"step": "set-length", "file": 1, "length": 4096}]},
                {"purpose": "commit", "commit": true, "steps": [
                    {"step": "write", "file": 0, "offset": 24, "length": 16}]}
            ])
        );
        assert_eq!(
            stages(&two),
            json!([
                {"purpose": "prepare", "commit": false, "steps": [{"step": "create", "file": 2}]},
                {"purpose": "commit", "commit": true, "steps": [
                    {"step": "rename", "file": 2, "over": 0}]},
                {"purpose": "commit", "commit": true, "steps": [
                    {"step": "write", "file": 0, "offset": 24, "length": 16}]},
                {"purpose": "release", "commit": false, "steps": [{"step": "unlink", "file": 1}]}
            ])
        );
    }

    #[test]
    fn the_json_names_every_file_by_its_number() {
        let text = shown(&facts(), &plans()[1]).json();
        let value: Value = serde_json::from_str(&text).unwrap();
        let names = ["a.vmdk", "a-flat.vmdk", "a.vmdk.instar-new"];
        assert_eq!(value["files"], json!(names));
    }
}
