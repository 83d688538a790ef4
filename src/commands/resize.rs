//! `instar resize`.

use super::preallocation::Mode;
use super::{
    Elsewhere, Error, Global, Output, complain, format_to_open, plan, program, say, say_done, warn,
};
use instar::compat::messages;
use instar::compat::size::NewSize;
use instar::image::{Access, Image, ResizeOptions};
use instar_guest::Format;
use instar_guest::proto::Preallocation;
use std::path::PathBuf;

/// Arguments of `resize`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "SIZE is a number of bytes with an optional suffix b, k, M, G, T, P or E \
    (powers of 1024). With + or - it is relative to the current size."
)]
pub struct Args {
    /// Format of the image, instead of probing for it
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Allow a smaller size: what lies behind it is lost
    #[arg(long)]
    shrink: bool,
    /// How much of the added range is allocated at once
    #[arg(long, value_enum, value_name = "MODE", default_value_t)]
    preallocation: Mode,
    /// Print nothing but errors and warnings
    #[arg(short, long)]
    quiet: bool,
    /// Show progress
    #[arg(short, long)]
    progress: bool,
    /// Print the plan - every write, every barrier and the one that commits -
    /// and change nothing
    #[arg(long)]
    dry_run: bool,
    /// How to show the plan
    #[arg(long, value_enum, default_value_t)]
    output: Output,
    #[command(flatten)]
    elsewhere: Elsewhere,
    /// Image file
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// New size, or +SIZE or -SIZE to change it by so much
    #[arg(value_name = "[+|-]SIZE")]
    size: String,
}

/// Runs `resize`.
pub fn run(args: &Args, global: &Global) -> Result<(), Error> {
    args.elsewhere.refuse()?;
    let wanted = NewSize::parse(&args.size).map_err(|error| {
        let text = args.size.strip_prefix(['+', '-']).unwrap_or(&args.size);
        Error::Refused(messages::bad_new_size(text, error))
    })?;
    let file = args.file.to_string_lossy();
    let format = format_to_open(args.format.as_deref(), &file)?;
    let image = global
        .opening(Access::Write, format)
        .open(&global.pool()?, &args.file)
        .map_err(Error::opening(&args.file))?;
    if image.facts().probed && image.facts().format == Format::Raw {
        complain(&messages::probed_raw(&file));
    }
    let how = ResizeOptions {
        preallocation: args.preallocation.into(),
        shrink: args.shrink,
    };
    let size = new_size(wanted, &image, &how)?;
    match args.dry_run {
        true => show_plan(args, &image, size, &how),
        false => resize(args, &image, size, &how),
    }
}

/// The size in bytes, once it is clear that it may be asked for.
fn new_size(wanted: NewSize, image: &Image, how: &ResizeOptions) -> Result<u64, Error> {
    let current = image.virtual_size();
    // Relative sizes count from whole sectors, as the size that is shown does.
    let shown = current.checked_next_multiple_of(512).unwrap_or(current);
    let size = wanted
        .from(shown)
        .ok_or_else(|| Error::refused(messages::SIZE_NOT_POSITIVE))?;
    if size <= current && how.preallocation != Preallocation::Off {
        return Err(Error::refused(messages::PREALLOCATION_GROWS));
    }
    if size < current && !how.shrink {
        return Err(Error::Refused(format!(
            "{}\n{}: warning: {}",
            messages::USE_SHRINK,
            program::name(),
            messages::SHRINK_WARNING
        )));
    }
    match size {
        ..=messages::MAX_SIZE => Ok(size),
        _ => Err(Error::Refused(messages::size_too_large(size))),
    }
}

fn show_plan(args: &Args, image: &Image, size: u64, how: &ResizeOptions) -> Result<(), Error> {
    let reply = image.plan_resize(size, how)?;
    let shown = plan::Shown {
        file: &args.file.to_string_lossy(),
        facts: &image.facts(),
        from: image.virtual_size(),
        to: size,
        reply: &reply,
    };
    match args.output {
        Output::Human => {
            reply.warnings.iter().for_each(|warning| warn(warning));
            say(&shown.human())
        }
        Output::Json => say(&shown.json()),
    }
}

fn resize(args: &Args, image: &Image, size: u64, how: &ResizeOptions) -> Result<(), Error> {
    let warnings = image.resize(size, how)?;
    warnings.iter().for_each(|warning| warn(warning));
    if args.quiet {
        return Ok(());
    }
    if args.progress {
        say_done("    (100.00/100%)\r\n");
    }
    say_done(messages::RESIZED);
    Ok(())
}
