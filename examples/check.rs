//! Checks a disk image with the library, and repairs it where that is asked for:
//! `cargo run --example check -- disk.qcow2 [repair]`.
//!
//! Findings are told as they come: there may be a million of them.

use instar::image::{Access, CheckEvent, OpenOptions};
use instar::sandbox::{Config, Pool};
use instar_guest::findings::Repair;
use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let Some(path) = arguments.next() else {
        return Err("usage: check FILE [repair]".into());
    };
    let (access, repair) = match arguments.next().as_deref() {
        None => (Access::Read, None),
        Some("repair") => (Access::Write, Some(Repair::All)),
        Some(other) => return Err(format!("unknown argument: {other}").into()),
    };

    let pool = Pool::new(Config::default())?;
    let image = OpenOptions::new(access).open(&pool, path.as_ref())?;
    let checked = image.check(repair, &mut |event| match event {
        CheckEvent::Settled(why) => println!("put in order: {why}"),
        CheckEvent::Finding(finding) => println!("{:?}: {}", finding.severity, finding.text),
        CheckEvent::Repaired(report) => println!(
            "repaired: {} corruptions, {} leaks",
            report.corruptions_fixed, report.leaks_fixed
        ),
    })?;
    let report = checked.report;
    println!(
        "remaining: {} corruptions, {} leaks",
        report.corruptions, report.leaks
    );
    Ok(())
}
