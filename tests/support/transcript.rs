//! Commands and what they said, as text files that people can read:
//!
//! ```text
//! $ qemu-img resize disk 1000
//! ! qemu-img: The new size must be a multiple of 512
//! = 1
//! ```
//!
//! `$` is a command, `!` a line of its standard error, `=` its exit status where
//! that is not 0; everything else is its standard output.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

/// The program in recordings.
pub const QEMU_IMG: &str = "qemu-img";

/// One command and what it said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The arguments, without the program.
    pub args: Vec<String>,
    pub stdout: String,
    pub stderr: String,
    /// The exit status; -1 if a signal ended it.
    pub code: i32,
}

/// Runs a program in a folder, in a fixed time zone and language.
pub fn run(
    folder: &Path,
    program: &str,
    args: &[String],
    environment: &[(&str, &str)],
) -> Result<Step, String> {
    let output = Command::new("timeout")
        .args(["60", program])
        .args(args)
        .current_dir(folder)
        .env("TZ", "UTC0")
        .env("LC_ALL", "C")
        .envs(environment.iter().copied())
        .output()
        .map_err(|error| format!("{program}: {error}"))?;
    Ok(Step {
        args: args.to_vec(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        code: output.status.code().unwrap_or(-1),
    })
}

/// Splits a command line at blanks; `''` is an empty argument, `~` a blank.
pub fn words(line: &str) -> Vec<String> {
    line.split_whitespace()
        .map(|word| match word {
            "''" => String::new(),
            word => word.replace('~', " "),
        })
        .collect()
}

fn line(args: &[String]) -> String {
    let words: Vec<String> = args
        .iter()
        .map(|arg| match arg.as_str() {
            "" => "''".to_owned(),
            arg => arg.replace(' ', "~"),
        })
        .collect();
    words.join(" ")
}

/// Reads a recording.
pub fn parse(text: &str) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    for line in text.lines() {
        if let Some(command) = line.strip_prefix("$ qemu-img") {
            steps.push(Step {
                args: words(command),
                stdout: String::new(),
                stderr: String::new(),
                code: 0,
            });
            continue;
        }
        let Some(step) = steps.last_mut() else {
            continue;
        };
        if let Some(said) = line.strip_prefix("! ") {
            step.stderr.push_str(&format!("{said}\n"));
        } else if let Some(code) = line.strip_prefix("= ") {
            step.code = code.parse().unwrap_or(-1);
        } else {
            step.stdout.push_str(&format!("{line}\n"));
        }
    }
    steps
}

/// The text of a recording.
pub fn text(steps: &[Step]) -> String {
    let mut text = String::new();
    for step in steps {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "$ qemu-img {}", line(&step.args));
        text.push_str(&step.stdout);
        for said in step.stderr.lines() {
            let _ = writeln!(text, "! {said}");
        }
        if step.code != 0 {
            let _ = writeln!(text, "= {}", step.code);
        }
    }
    text
}

/// What has to be equal, whichever program said it: the program's name is
/// qemu-img's, and what depends on the filesystem below is blanked out.
pub fn comparable(step: &Step) -> Step {
    let mut step = step.clone();
    step.stderr = step
        .stderr
        .lines()
        .map(|line| match line.strip_prefix("instar") {
            Some(rest) => format!("{QEMU_IMG}{rest}\n"),
            None => format!("{line}\n"),
        })
        .collect::<String>()
        .replace("Try 'instar ", "Try 'qemu-img ");
    step.stdout = step.stdout.lines().map(without_chance).collect();
    // instar names the options once the image is there, qemu-img before.
    if step.code != 0 && step.stdout.starts_with("Formatting '") {
        step.stdout.clear();
    }
    step
}

/// What depends on the filesystem below, or is drawn anew each time, is no text
/// to compare.
fn without_chance(line: &str) -> String {
    let label = ["\"actual-size\": ", "disk size: ", "\"cid\": ", "    cid: "]
        .into_iter()
        .find_map(|label| line.find(label).map(|at| at + label.len()));
    match label {
        Some(end) => format!(
            "{}…{}\n",
            &line[..end],
            if line.ends_with(',') { "," } else { "" }
        ),
        None => format!("{line}\n"),
    }
}

/// Nothing, or a readable list of the lines in which two steps differ. Behind
/// qemu-img's message instar may name the field, the value and the way out.
pub fn same(expected: &Step, got: &Step) -> Result<(), String> {
    let expected = comparable(expected);
    let mut got = comparable(got);
    let is_help = |more: &str| {
        more.is_empty() || [" (", ": ", "; "].iter().any(|mark| more.starts_with(mark))
    };
    let lines = || expected.stderr.lines().zip(got.stderr.lines());
    let says_it = |(told, said): (&str, &str)| said.strip_prefix(told).is_some_and(is_help);
    let as_many = expected.stderr.lines().count() == got.stderr.lines().count();
    if as_many && lines().all(says_it) {
        got.stderr.clone_from(&expected.stderr);
    }
    let expected = text(&[expected]);
    let got = text(&[got]);
    match expected == got {
        true => Ok(()),
        false => Err(difference(&expected, &got)),
    }
}

/// The lines between the common beginning and the common end.
fn difference(expected: &str, got: &str) -> String {
    let expected: Vec<&str> = expected.lines().collect();
    let got: Vec<&str> = got.lines().collect();
    let pairs = || expected.iter().zip(&got);
    let start = pairs().take_while(|(a, b)| a == b).count();
    let shorter = expected.len().min(got.len());
    let ends = expected.iter().rev().zip(got.iter().rev());
    let end = ends
        .take(shorter - start)
        .take_while(|(a, b)| a == b)
        .count();
    let mut out = String::from("\n");
    for line in &expected[..start] {
        let _ = writeln!(out, "  {line}");
    }
    for line in &expected[start..expected.len() - end] {
        let _ = writeln!(out, "- {line}");
    }
    for line in &got[start..got.len() - end] {
        let _ = writeln!(out, "+ {line}");
    }
    out.push_str("(- expected, + instar)");
    out
}
