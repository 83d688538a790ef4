//! Nothing of one image is visible to the guest of the next.

use crate::{Image, Test, open, pool, scripted};
use instar::sandbox::{Isolation, Limits, Session};
use instar_guest::Request;
use instar_guest::layout::{STACK_TOP, WINDOW};
use instar_guest::proto::Reply;
use instar_test_guest::{SECRET, Script};
use libtest_mimic::Failed;

pub fn tests() -> Vec<(String, Test)> {
    vec![
        (
            "a_scan_finds_what_its_own_session_left".to_owned(),
            Box::new(a_scan_finds_what_its_own_session_left) as Test,
        ),
        (
            "a_scan_finds_nothing_of_the_session_before".to_owned(),
            Box::new(a_scan_finds_nothing_of_the_session_before),
        ),
    ]
}

/// Enough to reach every part of the heap.
const FILL: u64 = 40 << 20;

fn program(isolation: Isolation) -> std::sync::Arc<instar::sandbox::Pool> {
    let limits = Limits::default();
    // In a process nothing is mapped between statics and window.
    let start = match isolation {
        Isolation::Process => WINDOW,
        _ => STACK_TOP,
    };
    let script = Script::Remember {
        scan: (start, limits.memory),
    };
    pool(isolation, scripted::program(&script), limits)
}

/// The test's own proof: the scan can find something.
fn a_scan_finds_what_its_own_session_left(isolation: Isolation) -> Result<(), Failed> {
    let mut session = program(isolation).session()?;
    leave_secrets(&mut session)?;
    let found = scan(&mut session)?;
    let least = FILL / 8 + (8 << 10);
    if found >= least {
        Ok(())
    } else {
        Err(format!("only {found} of at least {least} words were found").into())
    }
}

fn a_scan_finds_nothing_of_the_session_before(isolation: Isolation) -> Result<(), Failed> {
    let pool = program(isolation);
    for _ in 0..3 {
        leave_secrets(&mut pool.session()?)?;
        let found = scan(&mut pool.session()?)?;
        if found != 0 {
            return Err(format!("{found} words of the image before are still there").into());
        }
    }
    Ok(())
}

/// Opens an image full of secrets and has the guest spread them.
fn leave_secrets(session: &mut Session) -> Result<(), Failed> {
    let image: Vec<u8> = SECRET.to_le_bytes().repeat(100_000 / 8);
    let request = Request::Map {
        offset: 0,
        len: FILL,
    };
    session.call(&open(&image), &mut Image(image.clone()))?;
    session.call(&request, &mut Image(image))?;
    Ok(())
}

/// How many words of the guest's memory and registers are the secret.
fn scan(session: &mut Session) -> Result<u64, Failed> {
    match session.call(&Request::Undo, &mut Image(vec![]))? {
        Reply::Extents(extents) => Ok(extents[0].len - 1),
        other => Err(format!("{other:?}").into()),
    }
}
