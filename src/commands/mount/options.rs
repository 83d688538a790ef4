//! The options of `instar mount`: long ones and `-o`, brought together.

use super::Args;
use crate::commands::{Error, Global};
use instar::fs::device::{KernelOptions, is_generic};
use instar::fs::{FormatRules, Options};
use instar::image::BackingPolicy;
use instar::sandbox::Isolation;
use instar_guest::proto::Preallocation;
use std::path::PathBuf;

/// What the user asked for. Paths are absolute.
#[derive(Debug)]
pub struct Settings {
    /// How the filesystem behaves.
    pub behaviour: Options,
    /// How it is mounted.
    pub kernel: KernelOptions,
    /// What happens with images that name a backing file.
    pub backing: BackingPolicy,
    /// Directories besides SOURCE whose files images may name.
    pub allow_paths: Vec<PathBuf>,
    /// Where image metadata is read.
    pub isolation: Isolation,
    /// Where the log goes, if not to syslog or the terminal.
    pub log: Option<PathBuf>,
}

impl Settings {
    /// Brings the arguments together. Among contradicting ones the last of `-o`
    /// wins, as mount(8) has it.
    pub fn new(args: &Args, global: &Global) -> Result<Self, Error> {
        let mut settings = Self {
            behaviour: Options {
                read_only: args.ro,
                grow: !args.nogrow,
                rw_backing: args.rw_backing,
                preallocation: Preallocation::Off,
                formats: FormatRules::default(),
            },
            kernel: KernelOptions {
                allow_other: args.allow_other,
                ..KernelOptions::default()
            },
            backing: BackingPolicy::Open,
            allow_paths: global.allow_paths.clone(),
            isolation: global.isolation,
            log: args.log.clone(),
        };
        let values = [
            ("preallocation", &args.preallocation),
            ("backing", &args.backing),
        ];
        for (name, value) in values {
            if let Some(value) = value {
                settings.apply(name, Some(value)).map_err(Error::Refused)?;
            }
        }
        for rule in &args.format {
            settings
                .behaviour
                .formats
                .add(rule)
                .map_err(Error::Refused)?;
        }
        for option in args.options.iter().flat_map(|list| list.split(',')) {
            let (name, value) = match option.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (option, None),
            };
            settings.apply(name, value).map_err(Error::Refused)?;
        }
        settings.kernel.read_only = settings.behaviour.read_only;
        settings.make_paths_absolute()?;
        Ok(settings)
    }

    fn apply(&mut self, name: &str, value: Option<&str>) -> Result<(), String> {
        match (name, value) {
            ("", None) => {}
            ("ro", None) => self.behaviour.read_only = true,
            ("rw", None) => self.behaviour.read_only = false,
            ("allow_other", None) => self.kernel.allow_other = true,
            ("nogrow", None) => self.behaviour.grow = false,
            ("rw_backing", None) => self.behaviour.rw_backing = true,
            ("preallocation", Some(mode)) => {
                self.behaviour.preallocation = preallocation(mode)?;
            }
            ("backing", Some("none")) => self.backing = BackingPolicy::Refuse,
            ("backing", Some(other)) => {
                return Err(format!("backing={other}: the only value is 'none'"));
            }
            ("allow_path", Some(path)) => self.allow_paths.push(PathBuf::from(path)),
            ("format", Some(rule)) => self.behaviour.formats.add(rule)?,
            ("log", Some(path)) => self.log = Some(PathBuf::from(path)),
            ("isolation", Some(kind)) => {
                self.isolation = kind
                    .parse()
                    .map_err(|error| format!("isolation={kind}: {error}"))?;
            }
            (generic, None) if is_generic(generic) => {
                self.kernel.generic.push(generic.to_string());
            }
            (name, value) => return Err(unknown(name, value)),
        }
        Ok(())
    }

    fn make_paths_absolute(&mut self) -> Result<(), Error> {
        for path in self.allow_paths.iter_mut().chain(&mut self.log) {
            *path = std::path::absolute(&*path)
                .map_err(Error::system(format!("{}", path.display())))?;
        }
        Ok(())
    }
}

fn preallocation(mode: &str) -> Result<Preallocation, String> {
    match mode {
        "off" => Ok(Preallocation::Off),
        "falloc" => Ok(Preallocation::Falloc),
        "metadata" | "full" => Err(format!(
            "preallocation={mode}: not available on a mount in this version; use 'falloc'"
        )),
        other => Err(format!("preallocation={other}: expected 'off' or 'falloc'")),
    }
}

fn unknown(name: &str, value: Option<&str>) -> String {
    const WITH_VALUE: [&str; 6] = [
        "preallocation",
        "backing",
        "allow_path",
        "format",
        "log",
        "isolation",
    ];
    match value {
        None if WITH_VALUE.contains(&name) => format!("mount option '{name}' needs a value"),
        _ => format!("unknown mount option '{name}'; 'instar mount --help' lists them"),
    }
}
