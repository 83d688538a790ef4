//! What `check` prints, and the exit code that goes with it.

use super::json;
use instar_guest::Format;
use instar_guest::findings::{Finding, Report, Severity};
use serde_json::{Map, Value};
use std::fmt::Write as _;

/// Exit codes of `check`; with `-r`, of the state after the repair.
pub mod exit {
    /// Nothing is wrong.
    pub const CLEAN: u8 = 0;
    /// The check could not be carried out, or not completely.
    pub const FAILED: u8 = 1;
    /// There are corruptions.
    pub const CORRUPT: u8 = 2;
    /// There are leaks, and no corruptions.
    pub const LEAKS: u8 = 3;
    /// Images of this format cannot be checked.
    pub const UNSUPPORTED: u8 = 63;
}

/// The most warnings that the JSON lists.
const MOST_WARNINGS: usize = 1000;

/// The warnings of a check, as the JSON shows them: the first
/// [`MOST_WARNINGS`], and how many more there were.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Warnings {
    texts: Vec<String>,
    more: u64,
}

impl Warnings {
    /// Takes note of a finding that is a warning.
    pub fn note(&mut self, finding: &Finding) {
        if finding.severity != Severity::Warning {
            return;
        }
        match self.texts.len() < MOST_WARNINGS {
            true => self.texts.push(finding.text.clone()),
            false => self.more += 1,
        }
    }

    /// Whether there were none.
    pub fn is_empty(&self) -> bool {
        self.texts.is_empty()
    }

    fn to_json(&self) -> Value {
        let more = (self.more > 0).then(|| format!("{} more warnings", self.more));
        self.texts.iter().cloned().chain(more).collect()
    }
}

/// The line of the standard error for a finding whose text is fit for a
/// terminal. qemu-img puts its own name, `program`, before what it finds in a
/// VHDX image, and only there.
pub fn finding_line(program: &str, format: Format, finding: &Finding) -> String {
    let text = &finding.text;
    match (finding.severity, format) {
        (Severity::Warning, _) => format!("{program}: warning: {text}\n"),
        (_, Format::Vhdx) => format!("{program}: {text}\n"),
        _ => format!("{text}\n"),
    }
}

/// What is said between a repair and the check of what it has left behind.
pub fn repaired(report: &Report) -> String {
    format!(
        "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    \
         {} corruptions\n\nDouble checking the fixed image now...\n",
        report.leaks_fixed, report.corruptions_fixed
    )
}

/// The text for people.
pub fn human(report: &Report) -> String {
    let mut out = String::new();
    if report.corruptions == 0 && report.leaks == 0 && report.check_errors == 0 {
        out.push_str("No errors were found on the image.\n");
    }
    let faults = [
        (
            report.corruptions,
            "errors were found on the image.\nData may be corrupted, or further writes to the \
             image may corrupt it.\n",
        ),
        (
            report.leaks,
            "leaked clusters were found on the image.\nThis means waste of disk space, but no \
             harm to data.\n",
        ),
        (
            report.check_errors,
            "internal errors have occurred during the check.\n",
        ),
    ];
    // Writing to a string cannot fail.
    for (number, text) in faults.iter().filter(|(number, _)| *number > 0) {
        let _ = write!(out, "\n{number} {text}");
    }
    if report.total_clusters > 0 && report.allocated_clusters > 0 {
        let _ = writeln!(
            out,
            "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
            report.allocated_clusters,
            report.total_clusters,
            percent(report.allocated_clusters, report.total_clusters),
            percent(report.fragmented_clusters, report.allocated_clusters),
            percent(report.compressed_clusters, report.allocated_clusters),
        );
    }
    if let Some(end) = report.image_end_offset.filter(|&end| end > 0) {
        let _ = writeln!(out, "Image end offset: {end}");
    }
    out
}

fn percent(part: u64, whole: u64) -> f64 {
    part as f64 * 100.0 / whole as f64
}

/// The same for programs: qemu's members in its order, which is that of a hash
/// table, without those that are zero; then the warnings, if there are any.
pub fn to_json(file: &str, format: Format, report: &Report, warnings: &Warnings) -> String {
    let mut all = Map::new();
    let mut put = |key: &str, value: Option<Value>| {
        if let Some(value) = value {
            all.insert(key.to_owned(), value);
        }
    };
    let unless_zero = |number: u64| (number > 0).then(|| number.into());
    let end = report.image_end_offset.unwrap_or(0);
    put("image-end-offset", unless_zero(end));
    put(
        "compressed-clusters",
        unless_zero(report.compressed_clusters),
    );
    put("total-clusters", unless_zero(report.total_clusters));
    put("corruptions", unless_zero(report.corruptions));
    put("corruptions-fixed", unless_zero(report.corruptions_fixed));
    put("check-errors", Some(report.check_errors.into()));
    put("leaks", unless_zero(report.leaks));
    put("leaks-fixed", unless_zero(report.leaks_fixed));
    put("allocated-clusters", unless_zero(report.allocated_clusters));
    put("filename", Some(file.into()));
    put("format", Some(format.name().into()));
    put(
        "fragmented-clusters",
        unless_zero(report.fragmented_clusters),
    );
    put(
        "warnings",
        (!warnings.is_empty()).then(|| warnings.to_json()),
    );
    json::pretty(&Value::Object(all)) + "\n"
}

/// The exit code for a report. Warnings count only where the user asked for
/// that, as corruptions.
pub fn exit_code(report: &Report, warnings: &Warnings, strict: bool) -> u8 {
    match report {
        Report { check_errors, .. } if *check_errors > 0 => exit::FAILED,
        Report { corruptions, .. } if *corruptions > 0 => exit::CORRUPT,
        _ if strict && !warnings.is_empty() => exit::CORRUPT,
        Report { leaks, .. } if *leaks > 0 => exit::LEAKS,
        _ => exit::CLEAN,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLEAN: Report = Report {
        check_errors: 0,
        image_end_offset: Some(786_432),
        total_clusters: 16,
        allocated_clusters: 7,
        fragmented_clusters: 3,
        compressed_clusters: 1,
        corruptions: 0,
        leaks: 0,
        corruptions_fixed: 0,
        leaks_fixed: 0,
    };

    const NOTHING: Report = Report {
        image_end_offset: None,
        total_clusters: 0,
        allocated_clusters: 0,
        fragmented_clusters: 0,
        compressed_clusters: 0,
        ..CLEAN
    };

    fn finding(severity: Severity, text: &str) -> Finding {
        Finding {
            severity,
            text: text.to_owned(),
        }
    }

    fn warnings(count: usize) -> Warnings {
        let mut warnings = Warnings::default();
        for number in 0..count {
            warnings.note(&finding(Severity::Warning, &format!("w{number}")));
        }
        warnings
    }

    #[test]
    fn a_clean_image_has_its_sums_and_its_end() {
        assert_eq!(
            human(&CLEAN),
            "No errors were found on the image.\n\
             7/16 = 43.75% allocated, 42.86% fragmented, 14.29% compressed clusters\n\
             Image end offset: 786432\n"
        );
        assert_eq!(human(&NOTHING), "No errors were found on the image.\n");
    }

    #[test]
    fn every_kind_of_fault_has_a_paragraph() {
        let report = Report {
            corruptions: 2,
            leaks: 1,
            check_errors: 3,
            ..NOTHING
        };
        assert_eq!(
            human(&report),
            "\n2 errors were found on the image.\n\
             Data may be corrupted, or further writes to the image may corrupt it.\n\
             \n1 leaked clusters were found on the image.\n\
             This means waste of disk space, but no harm to data.\n\
             \n3 internal errors have occurred during the check.\n"
        );
    }

    #[test]
    fn the_json_leaves_out_what_is_zero_and_keeps_the_order() {
        let shown = to_json("a.vmdk", Format::Vmdk, &NOTHING, &Warnings::default());
        assert_eq!(
            shown,
            "{\n    \"check-errors\": 0,\n    \"filename\": \"a.vmdk\",\n    \
             \"format\": \"vmdk\"\n}\n"
        );
        let all = Report {
            corruptions: 1,
            leaks: 2,
            corruptions_fixed: 3,
            leaks_fixed: 4,
            ..CLEAN
        };
        let shown = to_json("a", Format::Qcow2, &all, &warnings(1));
        let value: Value = serde_json::from_str(&shown).unwrap();
        let keys: Vec<&str> = value
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        assert_eq!(
            keys,
            [
                "image-end-offset",
                "compressed-clusters",
                "total-clusters",
                "corruptions",
                "corruptions-fixed",
                "check-errors",
                "leaks",
                "leaks-fixed",
                "allocated-clusters",
                "filename",
                "format",
                "fragmented-clusters",
                "warnings"
            ]
        );
    }

    #[test]
    fn warnings_are_bounded_and_counted() {
        let shown = to_json("a", Format::Vhd, &NOTHING, &warnings(MOST_WARNINGS + 5));
        let value: Value = serde_json::from_str(&shown).unwrap();
        let listed = value["warnings"].as_array().unwrap();
        assert_eq!(listed.len(), MOST_WARNINGS + 1);
        assert_eq!(listed[0], "w0");
        assert_eq!(listed[MOST_WARNINGS], "5 more warnings");
    }

    #[test]
    fn the_exit_code_is_that_of_the_worst() {
        let report = |corruptions, leaks, check_errors| Report {
            corruptions,
            leaks,
            check_errors,
            ..NOTHING
        };
        let none = Warnings::default();
        for (expected, report) in [
            (0, report(0, 0, 0)),
            (3, report(0, 1, 0)),
            (2, report(1, 1, 0)),
            (1, report(1, 1, 1)),
        ] {
            assert_eq!(exit_code(&report, &none, true), expected);
            assert_eq!(exit_code(&report, &warnings(1), false), expected);
        }
        assert_eq!(exit_code(&report(0, 1, 0), &warnings(1), true), 2);
    }

    #[test]
    fn the_repair_is_told_between_the_checks() {
        let repair = Report {
            leaks_fixed: 8,
            corruptions_fixed: 1,
            ..CLEAN
        };
        assert_eq!(
            repaired(&repair),
            "The following inconsistencies were found and repaired:\n\n    8 leaked clusters\n    \
             1 corruptions\n\nDouble checking the fixed image now...\n"
        );
    }

    #[test]
    fn findings_carry_the_name_that_qemu_img_gives_them() {
        let line = |format, severity| finding_line("instar", format, &finding(severity, "text"));
        assert_eq!(line(Format::Qcow2, Severity::Leak), "text\n");
        assert_eq!(line(Format::Vhdx, Severity::Corruption), "instar: text\n");
        assert_eq!(
            line(Format::Vhd, Severity::Warning),
            "instar: warning: text\n"
        );
    }
}
