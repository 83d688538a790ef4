//! What is left of processes: tests that count descriptors and children, each in
//! a process of its own, where nothing else makes any.

use crate::{Image, Test, open, pool, scripted};
use instar::sandbox::{GuestProgram, Isolation, Limits, Session};
use instar_guest::Request;
use instar_test_guest::{Act, Script};
use libtest_mimic::Failed;
use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

/// Names the probe that this process is to be.
pub const VARIABLE: &str = "INSTAR_HOSTILE_PROBE";

pub fn tests() -> Vec<(String, Test)> {
    let probe = |name: &'static str| {
        let test: Test = Box::new(move |_| succeeds(name));
        (name.to_owned(), test)
    };
    vec![
        probe("no_descriptor_and_no_child_is_left_behind"),
        probe("the_child_has_one_descriptor_and_strict_seccomp"),
        (
            "a_waiting_child_dies_with_its_parent".to_owned(),
            Box::new(|_| dies_with_parent("wait")),
        ),
        (
            "a_looping_child_dies_after_its_parent".to_owned(),
            Box::new(|_| dies_with_parent("loop")),
        ),
    ]
}

pub fn run(probe: &str) -> ExitCode {
    let result = match probe {
        "no_descriptor_and_no_child_is_left_behind" => nothing_is_left(),
        "the_child_has_one_descriptor_and_strict_seccomp" => is_confined(),
        "wait" => announce_waiting(),
        "loop" => announce_looping(),
        other => Err(format!("no such probe: {other}").into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}", error.message().unwrap_or_default());
            ExitCode::FAILURE
        }
    }
}

fn start(probe: &str) -> Result<Child, Failed> {
    Ok(Command::new(std::env::current_exe()?)
        .env(VARIABLE, probe)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?)
}

fn succeeds(probe: &str) -> Result<(), Failed> {
    let output = start(probe)?.wait_with_output()?;
    if output.status.success() {
        Ok(())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned().into())
    }
}

fn nothing_is_left() -> Result<(), Failed> {
    // What the first use opens for good does not count.
    use_and_crash()?;
    let before = descriptors("self")?;
    for _ in 0..5 {
        use_and_crash()?;
    }
    let after = descriptors("self")?;
    if after != before {
        return Err(format!("descriptors {after:?} instead of {before:?}").into());
    }
    match children()?.as_slice() {
        [] => Ok(()),
        some => Err(format!("children {some:?}").into()),
    }
}

/// One session that ends well and some that do not.
fn use_and_crash() -> Result<(), Failed> {
    drop(waiting_session(Script::Ends)?);
    for act in [Act::Undefined, Act::SystemCall(2), Act::Loop] {
        let mut session = session(Script::Act(act))?;
        if session.call(&open(&[]), &mut Image(vec![])).is_ok() {
            return Err(format!("{act:?} went well").into());
        }
    }
    Ok(())
}

fn session(script: Script) -> Result<Session, Failed> {
    let limits = Limits {
        cpu: Duration::from_millis(50),
        ..Limits::default()
    };
    let pool = pool(Isolation::Process, scripted::program(&script), limits);
    Ok(pool.session()?)
}

/// A session whose guest waits for the next request.
fn waiting_session(script: Script) -> Result<Session, Failed> {
    let mut session = session(script)?;
    session.call(&open(&[]), &mut Image(vec![]))?;
    Ok(session)
}

fn is_confined() -> Result<(), Failed> {
    let pool = pool(
        Isolation::Process,
        GuestProgram::shipped(),
        Limits::default(),
    );
    let mut session = pool.session()?;
    // A refusal: the guest runs and is confined.
    session.call(&Request::Flush, &mut Image(vec![])).ok();
    let [child] = children()?[..] else {
        return Err("not one child".into());
    };
    let open = descriptors(&child.to_string())?;
    if open != BTreeSet::from(["0".to_owned()]) {
        return Err(format!("the child has descriptors {open:?}").into());
    }
    let status = fs::read_to_string(format!("/proc/{child}/status"))?;
    for line in ["Seccomp:\t1", "NoNewPrivs:\t1", "Threads:\t1"] {
        if !status.lines().any(|found| found == line) {
            return Err(format!("no {line:?} in {status}").into());
        }
    }
    Ok(())
}

/// Prints the guest's process id while it waits for a request, and stays.
fn announce_waiting() -> Result<(), Failed> {
    let _session = waiting_session(Script::Ends)?;
    println!("{}", children()?[0]);
    stay()
}

/// Prints the guest's process id while it computes, and stays.
fn announce_looping() -> Result<(), Failed> {
    let limits = Limits {
        cpu: Duration::from_millis(900),
        ..Limits::default()
    };
    let program = scripted::program(&Script::Act(Act::Loop));
    let mut session = pool(Isolation::Process, program, limits).session()?;
    let child = children()?[0];
    std::thread::spawn(move || {
        while clock_ticks(child).is_some_and(|ticks| ticks == 0) {
            std::thread::yield_now();
        }
        println!("{child}");
    });
    session.call(&open(&[]), &mut Image(vec![])).ok();
    stay()
}

fn stay() -> ! {
    loop {
        std::thread::sleep(Duration::from_secs(60));
    }
}

/// User time that a process has used, in clock ticks.
fn clock_ticks(pid: u32) -> Option<u64> {
    const FIELDS_BEFORE: usize = 11;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(") ")?;
    fields.split(' ').nth(FIELDS_BEFORE)?.parse().ok()
}

fn dies_with_parent(probe: &str) -> Result<(), Failed> {
    let mut parent = start(probe)?;
    let mut lines = BufReader::new(parent.stdout.take().expect("piped")).lines();
    let child = lines.next().ok_or("no process id")??;
    parent.kill()?;
    parent.wait()?;
    // Not a race: however long it takes, it ends; the test's runner has the
    // last word.
    while is_alive(&child) {
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Whether the process is there and not merely waiting to be reaped.
fn is_alive(pid: &str) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .ok()
        .and_then(|stat| Some(!stat.rsplit_once(") ")?.1.starts_with('Z')))
        .unwrap_or(false)
}

fn descriptors(process: &str) -> Result<BTreeSet<String>, Failed> {
    let names = fs::read_dir(format!("/proc/{process}/fd"))?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    Ok(names.collect::<std::io::Result<_>>()?)
}

fn children() -> Result<Vec<u32>, Failed> {
    let mut children = Vec::new();
    for task in fs::read_dir("/proc/self/task")? {
        let list = fs::read_to_string(task?.path().join("children"))?;
        for pid in list.split_whitespace() {
            children.push(pid.parse()?);
        }
    }
    Ok(children)
}
