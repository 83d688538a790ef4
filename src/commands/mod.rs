//! The subcommands: one file each, and what they share.
//!
//! A command turns its arguments into calls of the library and the results into
//! the texts of [`instar::compat`]. It decides nothing about images itself.

pub mod check;
pub mod create;
pub mod demo;
pub mod doctor;
pub mod generate;
pub mod info;
pub mod map;
pub mod mount;
pub mod plan;
pub mod program;
pub mod resize;
pub mod umount;

mod error;
mod look;
mod preallocation;
mod usage;

pub use error::Error;
pub use usage::{parse, report};

use clap::{Args, Parser, Subcommand, ValueEnum};
use instar::compat::info::OnDisk;
use instar::compat::messages;
use instar::compat::size::SizeError;
use instar::compat::version::QemuVersion;
use instar::image::{Access, Image, OpenOptions};
use instar::sandbox::{ChosenIsolation, Config, Isolation, Pool};
use instar_guest::Format;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Arc;

/// Resizes virtual-machine disk images, with their parser in a sandbox.
#[derive(Debug, Parser)]
#[command(name = "instar", version)]
#[command(infer_long_args = true, args_override_self = true)]
#[command(
    after_help = "'instar COMMAND --help' explains a command. The options, the output and \
    the exit codes are those of qemu-img where qemu-img has the same."
)]
pub struct Cli {
    /// What every command takes.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Sandbox")]
pub struct Global {
    /// Where image metadata is read: 'kvm' (a micro-VM), 'process' (a process
    /// without system calls), or 'auto' (the first that works)
    #[arg(long, global = true, env = "INSTAR_ISOLATION", default_value = "auto")]
    #[arg(value_name = "KIND", hide_env_values = true)]
    pub isolation: Isolation,
    /// Let images name backing and data files below DIR, besides their own
    /// directory
    #[arg(long = "allow-path", global = true, value_name = "DIR")]
    pub allow_paths: Vec<PathBuf>,
    /// Follow this version of qemu-img in what versions of it show differently
    #[arg(long, global = true, env = program::VERSION_VARIABLE, default_value_t)]
    #[arg(value_name = "X.Y", hide_env_values = true, help_heading = "Output")]
    pub qemu_version: QemuVersion,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Change the size of a disk image
    Resize(resize::Args),
    /// Make a new disk image
    Create(create::Args),
    /// Show what a disk image says about itself
    Info(info::Args),
    /// Look for faults in a disk image, and repair them
    Check(check::Args),
    /// Show where the data of a disk image lies
    Map(map::Args),
    /// Show the images of a directory as files that hold their disks
    Mount(mount::Args),
    /// Unmount, and wait until everything is on disk and released
    Umount(umount::Args),
    /// Show what this machine offers, and how to get what is missing
    Doctor(doctor::Args),
    /// Show the main job on sample images in a temporary directory
    Demo(demo::Args),
    /// Print the completions of a shell
    #[command(hide = true)]
    Completions(generate::CompletionsArgs),
    /// Print the manual page of instar, or of one command
    #[command(hide = true)]
    Man(generate::ManArgs),
}

/// Runs a command; answers the exit code.
pub fn run(cli: Cli) -> Result<u8, Error> {
    let global = &cli.global;
    match cli.command {
        Command::Check(args) => return check::run(&args, global),
        Command::Resize(args) => resize::run(&args, global),
        Command::Create(args) => create::run(&args, global),
        Command::Info(args) => info::run(&args, global),
        Command::Map(args) => map::run(&args, global),
        Command::Mount(args) => mount::run(&args, global),
        Command::Umount(args) => umount::run(&args),
        Command::Doctor(args) => doctor::run(&args, global),
        Command::Demo(args) => demo::run(&args, global),
        Command::Completions(args) => generate::completions(&args),
        Command::Man(args) => generate::man(&args),
    }
    .map(|()| 0)
}

/// How results are shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// Text for people.
    #[default]
    Human,
    /// JSON for programs.
    Json,
}

/// Options of qemu-img that name more than a file. They are read so that the
/// refusal can say what to do instead.
#[derive(Clone, Debug, Args)]
pub struct Elsewhere {
    /// Not available: name a file instead
    #[arg(long, hide = true)]
    image_opts: bool,
    /// Not available: encrypted images are resized without their key
    #[arg(long, hide = true, value_name = "OBJDEF")]
    object: Vec<String>,
}

impl Elsewhere {
    /// Refuses what is not available.
    pub fn refuse(&self) -> Result<(), Error> {
        if self.image_opts {
            return Err(Error::refused(
                "--image-opts is not available: name an image file, and its format with -f",
            ));
        }
        if !self.object.is_empty() {
            return Err(Error::refused(
                "--object is not available: instar needs no secrets, it resizes encrypted \
                 images without their key",
            ));
        }
        Ok(())
    }
}

impl Global {
    /// The refusal of a number argument.
    pub fn bad_number(&self, what: &str, text: &str, error: SizeError) -> Error {
        let name = program::name();
        Error::Refused(messages::bad_number(
            what,
            text,
            error,
            self.qemu_version,
            name,
        ))
    }

    /// A sandbox as the options ask for it.
    pub fn pool(&self) -> Result<Arc<Pool>, Error> {
        Ok(Pool::new(Config {
            isolation: self.isolation,
            // A command opens few images, and waits for none.
            idle: 0,
            ..Config::default()
        })?)
    }

    /// Options for opening an image as the user asked.
    pub fn opening(&self, access: Access, format: Option<Format>) -> OpenOptions {
        OpenOptions {
            format,
            allow_paths: self.allow_paths.clone(),
            ..OpenOptions::new(access)
        }
    }
}

/// Formats that qemu-img has and instar does not.
const OTHER_FORMATS: [&str; 10] = [
    "bochs",
    "cloop",
    "dmg",
    "luks",
    "parallels",
    "qcow",
    "qed",
    "vdi",
    "vvfat",
    "host_device",
];

/// Why a format's name is none that instar handles.
pub enum FormatError {
    /// Nobody knows it.
    Unknown,
    /// qemu-img knows it.
    Unsupported,
}

/// The format that a name stands for.
pub fn format_named(name: &str) -> Result<Format, FormatError> {
    match Format::of_name(name) {
        Some(format) => Ok(format),
        None if OTHER_FORMATS.contains(&name) => Err(FormatError::Unsupported),
        None => Err(FormatError::Unknown),
    }
}

/// The format that `-f` names for an image that is to be opened.
pub fn format_to_open(name: Option<&str>, file: &str) -> Result<Option<Format>, Error> {
    let Some(name) = name else { return Ok(None) };
    match format_named(name) {
        Ok(format) => Ok(Some(format)),
        Err(FormatError::Unknown) => Err(Error::Refused(format!(
            "Could not open '{file}': Unknown driver '{name}'"
        ))),
        Err(FormatError::Unsupported) => Err(Error::Refused(format!(
            "Could not open '{file}': images of the format '{name}' are not \
             supported; convert the image with 'qemu-img convert -O qcow2'"
        ))),
    }
}

/// What the host's filesystem says about the open files of an image.
pub fn on_disk(image: &Image) -> Result<Vec<OnDisk>, Error> {
    let found = image.on_disk().map_err(Error::system(format!(
        "Could not read the size of '{}'",
        image.path().display()
    )))?;
    Ok(found.iter().map(OnDisk::from).collect())
}

/// A sandbox in words for people.
pub fn in_words(sandbox: &ChosenIsolation) -> &'static str {
    match sandbox {
        ChosenIsolation::Kvm => "a micro-VM",
        ChosenIsolation::Process { .. } => "a process without system calls",
    }
}

/// Writes to the standard output.
pub fn say(text: &str) -> Result<(), Error> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(Error::Output)
}

/// Says that a change is made. It is, whatever becomes of the words: a failure
/// would have scripts make it once more.
pub fn say_done(text: &str) {
    match say(text) {
        Err(error) if !error.is_closed_pipe() => warn(&error.to_string()),
        _ => {}
    }
}

/// Writes a warning to the standard error.
pub fn warn(text: &str) {
    complain(&format!("{}: warning: {text}\n", program::name()));
}

/// Writes to the standard error. Nobody is left to tell where that fails.
pub fn complain(text: &str) {
    let _ = std::io::stderr().lock().write_all(text.as_bytes());
}
