//! What a check has to say, told in pieces and summed up.

use crate::engine::Host;
use crate::error::Failure;
use crate::findings::{Finding, Report, Severity};
use crate::proto::MAX_FINDINGS;
use alloc::string::String;
use alloc::vec::Vec;

/// The most findings that one check tells: a terminal is no place for more, and
/// the sums count all of them.
const MAX_TOLD: usize = 1 << 20;

/// Collects findings and hands them to the host.
#[derive(Debug, Default)]
pub struct Tell {
    /// The sums. Counters of corruptions, leaks and errors count as findings
    /// come in; the others are the checker's to fill.
    pub report: Report,
    waiting: Vec<Finding>,
    told: usize,
    silent: bool,
}

impl Tell {
    /// Counts and tells nothing.
    pub fn silent() -> Self {
        Self {
            silent: true,
            ..Self::default()
        }
    }

    /// One finding.
    pub fn add(
        &mut self,
        host: &mut dyn Host,
        severity: Severity,
        text: impl Into<String>,
    ) -> Result<(), Failure> {
        match severity {
            Severity::Corruption => self.report.corruptions += 1,
            Severity::Leak => self.report.leaks += 1,
            Severity::Error => self.report.check_errors += 1,
            Severity::Repaired | Severity::Warning => {}
        }
        if self.silent || self.told == MAX_TOLD {
            return Ok(());
        }
        self.told += 1;
        self.waiting.push(Finding {
            severity,
            text: text.into(),
        });
        match self.waiting.len() < MAX_FINDINGS {
            true => Ok(()),
            false => self.flush(host),
        }
    }

    /// Hands over what waits.
    pub fn flush(&mut self, host: &mut dyn Host) -> Result<(), Failure> {
        match self.waiting.is_empty() {
            true => Ok(()),
            false => host.tell(core::mem::take(&mut self.waiting)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::MemHost;

    #[test]
    fn findings_arrive_in_order_and_are_counted() {
        let mut host = MemHost::default();
        let mut tell = Tell::default();
        let count = MAX_FINDINGS + 3;
        for at in 0..count {
            let text = alloc::format!("{at}");
            tell.add(&mut host, Severity::Leak, text).unwrap();
        }
        assert_eq!(host.findings.len(), MAX_FINDINGS);
        tell.flush(&mut host).unwrap();
        let told = host.findings.iter().map(|finding| finding.text.as_str());
        assert!(told.eq((0..count).map(|at| alloc::format!("{at}"))));
        assert_eq!(tell.report.leaks, count as u64);
    }

    #[test]
    fn a_silent_one_counts() {
        let mut host = MemHost::default();
        let mut tell = Tell::silent();
        tell.add(&mut host, Severity::Corruption, "it").unwrap();
        tell.flush(&mut host).unwrap();
        assert_eq!((host.findings.len(), tell.report.corruptions), (0, 1));
    }
}
