//! `instar create`.

use super::{Elsewhere, Error, FormatError, Global, format_named, program, say, say_done, warn};
use instar::compat::{messages, names, options, size};
use instar::image::{self, Access, ErrorKind};
use instar::sandbox::Pool;
use instar_guest::Format;
use instar_guest::facts::NamedFile;
use instar_guest::proto::Create;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Disks have whole sectors of this many bytes.
const SECTOR: u64 = 512;

/// Arguments of `create`.
#[derive(Debug, clap::Args)]
#[command(override_usage = "instar create [OPTIONS] <FILE> [SIZE]")]
#[command(after_help = "'instar create -f FMT -o help' lists the options of a format.")]
pub struct Args {
    /// Format of the new image
    #[arg(short, long, value_name = "FMT", default_value = "raw")]
    format: String,
    /// Options of the format, as in cluster_size=4k,lazy_refcounts=on
    #[arg(short, long, value_name = "OPTS")]
    options: Vec<String>,
    /// Image that holds what the new one does not
    #[arg(short, long, value_name = "BACKING")]
    backing: Option<String>,
    /// Format of the backing image
    #[arg(short = 'F', long, value_name = "FMT")]
    backing_format: Option<String>,
    /// Do not look at the backing image
    #[arg(short = 'u', long)]
    backing_unsafe: bool,
    /// Print nothing but errors and warnings
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    elsewhere: Elsewhere,
    /// Image file; what it held before is lost
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
    /// Size of the disk; that of the backing image if left out
    #[arg(value_name = "SIZE", allow_hyphen_values = true)]
    size: Option<String>,
}

/// Runs `create`.
pub fn run(args: &Args, global: &Global) -> Result<(), Error> {
    args.elsewhere.refuse()?;
    if let Some(bad) = args.options.iter().find(|text| !options::is_list(text)) {
        return Err(Error::Refused(format!("Invalid option list: {bad}")));
    }
    let given = args.options.iter().flat_map(|text| options::parse(text));
    let given: Vec<(String, String)> = given.collect();
    if args.options.iter().any(|text| options::wants_help(text)) {
        let format = new_format(&args.format).map_err(Error::Refused)?;
        return say(&options::help(format));
    }
    let Some(path) = &args.file else {
        let hint = program::hint(Some("create"), global.qemu_version);
        return Err(Error::Refused(format!("Expecting image file name\n{hint}")));
    };
    let size = args.size.as_deref().map(|text| image_size(text, global));
    let size = size.transpose()?;
    let file = path.to_string_lossy();
    // Every refusal from here on begins with the file's name.
    let refuse = |text: String| Error::Refused(format!("{file}: {text}"));
    let wanted = Wanted::read(args, given, size).map_err(refuse)?;
    let pool = global.pool()?;
    let backing = Backing {
        pool: &pool,
        global,
    };
    let below = match (&wanted.backing, args.backing_unsafe) {
        (Some(named), false) => backing.look(named, &file).map_err(refuse)?,
        _ => Below::default(),
    };
    let size = wanted
        .size
        .or(below.size)
        .ok_or_else(|| refuse("Image creation needs a size parameter".to_owned()))?;
    let request = Create {
        format: wanted.format,
        size: size.checked_next_multiple_of(SECTOR).unwrap_or(size),
        options: wanted.options,
        backing: wanted.backing,
        backing_size: below.size,
        backing_identity: below.identity,
    };
    let created = image::create(&pool, path, &request)
        .map_err(|error| too_large(error, &file, wanted.format))?;
    created.warnings.iter().for_each(|warning| warn(warning));
    if !args.quiet {
        say_done(&options::formatting(
            &file,
            wanted.format.name(),
            &with_size(created.options, size),
        ));
    }
    Ok(())
}

/// What is said where the filesystem has no files of that size.
fn too_large(error: image::Error, file: &str, format: Format) -> Error {
    match error.kind() {
        ErrorKind::Os(libc::EFBIG) => Error::Refused(format!(
            "{file}: The image size is too large for file format '{}'",
            format.name()
        )),
        _ => error.into(),
    }
}

/// The options as they are shown: the size is the one that was asked for, not
/// the whole sectors that it becomes.
fn with_size(mut options: Vec<(String, String)>, size: u64) -> Vec<(String, String)> {
    for (_, value) in options.iter_mut().filter(|(key, _)| key == "size") {
        *value = size.to_string();
    }
    options
}

/// The SIZE argument.
fn image_size(text: &str, global: &Global) -> Result<u64, Error> {
    let refuse = |error| global.bad_number("image size", text, error);
    let bytes = size::parse(text).map_err(refuse)?;
    match i64::try_from(bytes) {
        Ok(_) => Ok(bytes),
        Err(_) => Err(refuse(size::SizeError::Range)),
    }
}

/// What the arguments say together.
struct Wanted {
    format: Format,
    size: Option<u64>,
    options: Vec<(String, String)>,
    backing: Option<NamedFile>,
}

impl Wanted {
    /// Puts arguments and `-o` options together. The error is the text behind
    /// the file's name.
    fn read(
        args: &Args,
        mut given: Vec<(String, String)>,
        size: Option<u64>,
    ) -> Result<Self, String> {
        let format = new_format(&args.format)?;
        let size = match (size, options::take(&mut given, "size")) {
            (Some(_), Some(_)) => {
                return Err("The image size must be specified only once".to_owned());
            }
            (None, Some(text)) => Some(option_size(&text)?),
            (size, None) => size,
        };
        let name = options::take(&mut given, "backing_file");
        let name = args.backing.clone().or(name);
        let backing_format = options::take(&mut given, "backing_fmt");
        let backing_format = args.backing_format.clone().or(backing_format);
        Ok(Self {
            format,
            size,
            options: given,
            backing: backing(format, name, backing_format, !args.backing_unsafe)?,
        })
    }
}

fn new_format(name: &str) -> Result<Format, String> {
    format_named(name).map_err(|error| match error {
        FormatError::Unknown => format!("Unknown file format '{name}'"),
        FormatError::Unsupported => format!(
            "images of the format '{name}' are not supported: make a qcow2 image and convert it \
             with 'qemu-img convert'"
        ),
    })
}

fn option_size(text: &str) -> Result<u64, String> {
    size::parse(text).map_err(|error| messages::bad_new_size(text, error))
}

/// The backing file that the arguments name. If it is looked at, a missing
/// format is told with the one that it has.
fn backing(
    format: Format,
    name: Option<String>,
    backing_format: Option<String>,
    looked_at: bool,
) -> Result<Option<NamedFile>, String> {
    match (name, backing_format) {
        (None, None) => Ok(None),
        (name, _) if !has_backing(format) => Err(format!(
            "Backing file{} not supported for file format '{}'",
            if name.is_some() { "" } else { " format" },
            format.name()
        )),
        // VMDK images do not store it.
        (None, Some(named)) if format == Format::Vmdk => match named == format.name() {
            true => Ok(None),
            false => Err("backing_file must be a vmdk image".to_owned()),
        },
        (None, Some(_)) => Err("Backing format cannot be used without backing file".to_owned()),
        (Some(name), _) if name.is_empty() => {
            Err("Expected backing file name, got empty string".to_owned())
        }
        (Some(_), None) if !looked_at => {
            Err("Backing file specified without backing format".to_owned())
        }
        (Some(name), format) => Ok(Some(NamedFile { name, format })),
    }
}

/// Whether new images of a format can have a backing file.
fn has_backing(format: Format) -> bool {
    matches!(format, Format::Qcow2 | Format::Vmdk)
}

/// What is known of a backing image.
#[derive(Default)]
struct Below {
    /// Size of its disk in bytes.
    size: Option<u64>,
    /// What tells it from others.
    identity: Option<String>,
}

/// Looks at backing images.
struct Backing<'a> {
    pool: &'a Arc<Pool>,
    global: &'a Global,
}

impl Backing<'_> {
    /// The backing image.
    fn look(&self, named: &NamedFile, file: &str) -> Result<Below, String> {
        let path = names::combine(file, &named.name);
        if Path::new(&path) == Path::new(file) {
            return Err(
                "Error: Trying to create an image with the same filename as the backing file"
                    .to_owned(),
            );
        }
        let format = match &named.format {
            Some(name) => Some(format_named(name).map_err(|error| match error {
                FormatError::Unknown => format!("Unknown driver '{name}'\n{BACKING_FAILED}"),
                FormatError::Unsupported => {
                    format!("The backing file format '{name}' is not supported")
                }
            })?),
            None => None,
        };
        let opened = self
            .global
            .opening(Access::Info, format)
            .open(self.pool, Path::new(&path));
        match opened {
            Ok(image) if format.is_none() => Err(format!(
                "Backing file specified without backing format\nDetected format of {}.",
                image.facts().format.name()
            )),
            Ok(image) => Ok(Below {
                size: image.virtual_size().checked_next_multiple_of(SECTOR),
                identity: image.facts().identity.clone(),
            }),
            Err(error) => Err(format!("{}\n{BACKING_FAILED}", unopened(&error, &path))),
        }
    }
}

/// What is said behind the reason why a backing image cannot be used.
const BACKING_FAILED: &str = "Could not open backing image.";

/// Why the backing image cannot be opened. Only where the system refuses it,
/// qemu-img names it first.
fn unopened(error: &image::Error, path: &str) -> String {
    match error.kind() {
        ErrorKind::Os(_) => error.to_string(),
        _ => format!("{} (in '{path}')", error.message()),
    }
}
