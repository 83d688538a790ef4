//! `instar check`.

use super::look::Look;
use super::{Error, Global, Output, program, say, warn};
use clap::ValueEnum;
use instar::compat::check::{self, Warnings};
use instar::compat::messages;
use instar::image::{Access, CheckEvent};
use instar_guest::Format;
use instar_guest::findings::{Repair, Report};
use std::io::{BufWriter, Stderr, Write as _};

/// Arguments of `check`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Exit codes: 0 nothing is wrong, 1 the check failed, 2 corruptions, 3 leaks \
    only, 63 the format has nothing to check."
)]
pub struct Args {
    /// Repair what is found
    #[arg(short, long, value_enum, value_name = "WHAT")]
    repair: Option<What>,
    /// Print nothing but findings, warnings and errors
    #[arg(short, long)]
    quiet: bool,
    /// Exit with code 2 also where there are only warnings
    #[arg(long)]
    strict: bool,
    /// Read for qemu-img's sake: how the image is cached changes nothing here
    #[arg(short = 'T', long, hide = true, value_name = "CACHE")]
    cache: Option<String>,
    #[command(flatten)]
    look: Look,
}

/// Values of `--cache`.
const CACHE_MODES: [&str; 6] = [
    "directsync",
    "none",
    "off",
    "unsafe",
    "writeback",
    "writethrough",
];

/// Values of `--repair`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum What {
    /// Space that is lost
    Leaks,
    /// Whatever can be repaired
    All,
}

impl From<What> for Repair {
    fn from(what: What) -> Self {
        match what {
            What::Leaks => Self::Leaks,
            What::All => Self::All,
        }
    }
}

/// Runs `check`; answers the exit code.
pub fn run(args: &Args, global: &Global) -> Result<u8, Error> {
    let modes = args.cache.as_deref();
    if let Some(mode) = modes.filter(|mode| !CACHE_MODES.contains(mode)) {
        return Err(Error::Refused(format!(
            "Invalid source cache option: {mode}"
        )));
    }
    let access = match args.repair {
        Some(_) => Access::Write,
        None => Access::Read,
    };
    let image = args.look.open(access, global, |options| options)?;
    let format = image.facts().format;
    let speaks = !args.quiet && args.look.output == Output::Human;
    let mut hearing = Hearing {
        format,
        speaks,
        settled: false,
        repaired: Ok(false),
        warnings: Warnings::default(),
        told: BufWriter::new(std::io::stderr()),
    };
    let repair = args.repair.map(Repair::from);
    let checked = image.check(repair, &mut |event| hearing.hear(event));
    let Hearing {
        warnings, repaired, ..
    } = hearing;
    let checked = checked?;
    checked.warnings.iter().for_each(|warning| warn(warning));
    let report = checked.report;
    let fixed = report.corruptions_fixed + report.leaks_fixed;
    if !repaired? && fixed > 0 && speaks {
        say(&check::repaired(&report))?;
    }
    match args.look.output {
        Output::Json => say(&check::to_json(
            &args.look.file(),
            format,
            &report,
            &warnings,
        ))?,
        Output::Human if speaks => say(&check::human(&report))?,
        Output::Human => {}
    }
    if report.check_errors > 0 {
        return Err(Error::refused(messages::CHECK_FAILED));
    }
    Ok(check::exit_code(&report, &warnings, args.strict))
}

/// Says what is found while the check goes on.
struct Hearing {
    format: Format,
    /// Whether the standard output is for people.
    speaks: bool,
    /// Whether the image was put in order first, which counts as one repair.
    settled: bool,
    /// Whether a repair has been told.
    repaired: Result<bool, Error>,
    /// Those of the last check.
    warnings: Warnings,
    /// There may be a million findings. Nobody is left to tell where they
    /// cannot be written.
    told: BufWriter<Stderr>,
}

impl Hearing {
    fn hear(&mut self, event: CheckEvent<'_>) {
        match event {
            CheckEvent::Settled(why) => {
                self.settled = true;
                let name = program::name();
                let _ = writeln!(self.told, "{name}: the image is in order now: {why}");
            }
            CheckEvent::Finding(finding) => {
                self.warnings.note(finding);
                let line = check::finding_line(program::name(), self.format, finding);
                let _ = self.told.write_all(line.as_bytes());
            }
            CheckEvent::Repaired(report) => {
                self.warnings = Warnings::default();
                let _ = self.told.flush();
                if self.speaks {
                    let all = Report {
                        corruptions_fixed: report.corruptions_fixed + u64::from(self.settled),
                        ..*report
                    };
                    self.repaired = say(&check::repaired(&all)).map(|()| true);
                }
            }
        }
    }
}
