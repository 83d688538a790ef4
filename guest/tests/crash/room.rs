//! Crash after crash, each followed by the same request, which is cut off again:
//! the image's file gets no longer than one run makes it.

use crate::explorer::case::Case;
use crate::explorer::disk::{Epoch, Event, Files};
use crate::explorer::engine::{Change, Planned, Session};
use crate::explorer::setup::Setup;
use instar_guest::plan::Purpose;

/// How often the request is cut off.
const ROUNDS: usize = 5;

/// Whether an event of an epoch, given by its number, reached the disk.
type Reached = fn(epoch: usize, event: &Event) -> bool;

/// The request is cut off with nothing done but files being longer, then with what
/// the first stage writes, then right before its commit.
pub fn does_not_add_up(case: &Case, setup: &Setup) -> Result<(), String> {
    if !case.judges.length || !matches!(setup.change, Change::Resize { .. }) {
        return Ok(());
    }
    let ways: [(&str, Reached); 3] = [
        ("lengths alone", |_, event| {
            matches!(event, Event::SetLength { .. })
        }),
        ("the first stage", |epoch, _| epoch == 0),
        ("all before the commit", |_, _| true),
    ];
    let len = |files: &Files| files.get(setup.image_name()).map(|bytes| bytes.len());
    let mut most = setup.files.clone();
    most.apply_all(&before_commit(&plan(case, setup, &most)?));
    let most = len(&most)?;
    for (way, reached) in ways {
        let mut files = setup.files.clone();
        for round in 1..=ROUNDS {
            let planned = settled(case, setup, &mut files)?;
            for (number, epoch) in before_commit(&planned).iter().enumerate() {
                for event in epoch.iter().filter(|event| reached(number, event)) {
                    files.apply(event);
                }
            }
            let now = len(&files)?;
            if now > most {
                return Err(format!(
                    "cut off {round} times after {way}, the file has {now} bytes instead of {most}"
                ));
            }
        }
    }
    Ok(())
}

fn before_commit(planned: &Planned) -> Vec<Epoch> {
    let stages = planned.plan.stages.iter().zip(&planned.epochs);
    let before = stages.take_while(|(stage, _)| stage.purpose != Purpose::Commit);
    before.map(|(_, epoch)| epoch.clone()).collect()
}

fn plan(case: &Case, setup: &Setup, files: &Files) -> Result<Planned, String> {
    let mut session = Session::open(files, setup.image_name(), case.format)?;
    session.plan(&setup.change, &setup.old_disk)
}

/// The plan of the request on files that are put in order first, if they have to.
fn settled(case: &Case, setup: &Setup, files: &mut Files) -> Result<Planned, String> {
    let first = {
        let mut session = Session::open(files, setup.image_name(), case.format)?;
        match session.plan(&setup.change, &setup.old_disk) {
            Err(_) if session.settles_first => {
                let mut session = Session::open(files, setup.image_name(), case.format)?;
                session.plan(&Change::Settle, &setup.old_disk)?
            }
            planned => return planned,
        }
    };
    files.apply_all(&first.epochs);
    plan(case, setup, files)
}
