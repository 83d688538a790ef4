//! Checking an image, and repairing what the check finds.

use super::change::Change;
use super::disk::{Image, Link, exclusive, hold, shared};
use super::error::{Error, ErrorKind, Fault, Operation};
use super::guest::{Serving, Stream, Telling};
use super::read::unexpected;
use instar_guest::findings::{Finding, Repair, Report};
use instar_guest::proto::PlanReply;
use instar_guest::{Format, Reply, Request};

/// What a check tells while it runs, in this order: what put the image in
/// order, findings, the repair, findings of the check after it.
#[derive(Debug)]
pub enum CheckEvent<'a> {
    /// The image was not closed in order, for this reason, and is in order now.
    Settled(&'a str),
    /// Something was found. The text is fit for a terminal.
    Finding(&'a Finding),
    /// What this report says to be fixed is repaired, durably; the image is
    /// checked again.
    Repaired(&'a Report),
}

/// What a check has come to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checked {
    /// The sums of the last check, with what was repaired before it.
    pub report: Report,
    /// Warnings about the repair.
    pub warnings: Vec<String>,
}

/// What goes to whoever listens.
type Listener<'a> = &'a mut dyn FnMut(CheckEvent<'_>);

impl Image {
    /// Checks the image; repairs it, too, if it was opened for writing and that
    /// is asked for. Findings are told as they come, at most a million of each
    /// check: the sums count all of them.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] with qemu-img's words for a format that has
    /// nothing to check. The text of a failed repair says what state the image
    /// is in.
    pub fn check(
        &self,
        repair: Option<Repair>,
        listener: &mut dyn FnMut(CheckEvent<'_>),
    ) -> Result<Checked, Error> {
        let checked = match repair {
            None => self.check_only(listener),
            Some(repair) => self.check_and_repair(repair, listener),
        };
        checked.map_err(|fault| fault.at(Operation::Check, &self.path))
    }

    fn check_only(&self, listener: Listener<'_>) -> Result<Checked, Fault> {
        let _flushing = hold(&self.flushing);
        let mut link = hold(&self.session);
        self.flush_held(&mut link)?;
        let report = self.ask_check(&mut link, listener)?;
        let warnings = Vec::new();
        Ok(Checked { report, warnings })
    }

    fn ask_check(&self, link: &mut Link, listener: Listener<'_>) -> Result<Report, Fault> {
        let mut serving = Serving::new(&self.files, Stream::Refuse);
        let mut tell = telling(listener);
        serving.telling = Some(Telling::new(&mut tell));
        let request = Request::Check { repair: None };
        let (plan, report) = checked(self.ask_serving(link, &request, &mut serving)?)?;
        match plan.plan.is_empty() {
            true => Ok(report),
            false => Err(Fault::new(
                ErrorKind::BadGuest,
                "The sandbox sent a plan that nobody asked for",
            )),
        }
    }

    fn check_and_repair(&self, repair: Repair, listener: Listener<'_>) -> Result<Checked, Fault> {
        self.writable()?;
        let _flushing = hold(&self.flushing);
        let mut link = hold(&self.session);
        self.flush_held(&mut link)?;
        let _traffic = exclusive(&self.traffic);
        // A repair of qcow2 is all that a dirty one needs, and as qemu's does it
        // tells what it finds.
        let format = shared(&self.facts).format;
        let settled = match format {
            Format::Qcow2 => None,
            _ => self.settle_held(&mut link)?,
        };
        if let Some(why) = &settled {
            let why = crate::sandbox::escape(why);
            listener(CheckEvent::Settled(&why));
        }
        let (plan, first) = self.repair(&mut link, repair, listener)?;
        let mut report = first;
        if !plan.plan.is_empty() || fixes(&first) {
            self.reopen(&mut link)?;
            listener(CheckEvent::Repaired(&first));
            report = self.ask_check(&mut link, listener)?;
            report.corruptions_fixed = first.corruptions_fixed;
            report.leaks_fixed = first.leaks_fixed;
        }
        // As qemu counts the replay of a log.
        report.corruptions_fixed += u64::from(settled.is_some());
        let warnings = plan.warnings;
        Ok(Checked { report, warnings })
    }

    fn repair(
        &self,
        link: &mut Link,
        repair: Repair,
        listener: Listener<'_>,
    ) -> Result<(PlanReply, Report), Fault> {
        let mut tell = telling(listener);
        let change = Change {
            request: Request::Check {
                repair: Some(repair),
            },
            limits: self.mending(),
            done: "is repaired",
            telling: Some(Telling::new(&mut tell)),
        };
        self.change(link, change, checked)
    }
}

fn telling<'a>(listener: Listener<'a>) -> impl FnMut(&Finding) + 'a {
    |finding| listener(CheckEvent::Finding(finding))
}

fn fixes(report: &Report) -> bool {
    report.corruptions_fixed > 0 || report.leaks_fixed > 0
}

fn checked(reply: Reply) -> Result<(PlanReply, Report), Fault> {
    match reply {
        Reply::Checked { report, repair } => Ok((repair, report)),
        _ => Err(unexpected("Check")),
    }
}
