//! The options of `instar mount`: long ones and `-o`, brought together.

use super::Args;
use crate::commands::preallocation::Mode;
use crate::commands::{Error, Global};
use clap::ValueEnum as _;
use instar::fs::device::{KernelOptions, generic_options};
use instar::fs::{FormatRules, Options};
use instar::image::BackingPolicy;
use instar::sandbox::Isolation;
use instar_guest::proto::Preallocation;
use std::path::PathBuf;

#[cfg(test)]
#[path = "../../../mount-helper/src/known.rs"]
mod known;

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
    /// Brings the arguments together. What `-o` says wins over a long option, and
    /// the last of `-o` over an earlier one, as mount(8) has it; directories and
    /// format rules add up.
    pub fn new(args: &Args, global: &Global) -> Result<Self, Error> {
        let mut settings = Self {
            behaviour: Options {
                read_only: args.ro,
                grow: !args.nogrow,
                shrink: args.shrink,
                rw_backing: args.rw_backing,
                preallocation: Preallocation::Off,
                formats: FormatRules::default(),
                idle: Options::IDLE,
                passthrough: !args.nopassthrough,
                writeback: args.writeback,
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
        settings.settle_the_cache()?;
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
            ("nopassthrough", None) => self.behaviour.passthrough = false,
            ("writeback", None) => self.behaviour.writeback = true,
            ("shrink", None) => self.behaviour.shrink = true,
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
            (name, value) => match generic_options().find(|generic| *generic == name) {
                Some(generic) if value.is_none() => self.kernel.generic.push(generic.to_string()),
                _ => return Err(unknown(name, value)),
            },
        }
        Ok(())
    }

    /// The kernel has one way with what is written, and it has to be sound.
    fn settle_the_cache(&mut self) -> Result<(), Error> {
        let chosen = &mut self.behaviour;
        if chosen.writeback && !chosen.grow {
            return Err(Error::Refused(
                "writeback and nogrow exclude each other: the kernel's cache takes writes past \
                 the end of a disk before instar sees them"
                    .to_string(),
            ));
        }
        // Of what it does by itself nothing can be refused.
        chosen.passthrough &= chosen.grow && !chosen.read_only && !chosen.writeback;
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
    match Mode::from_str(mode, false) {
        Ok(mode) => Ok(mode.into()),
        Err(_) => Err(format!(
            "preallocation={mode}: expected 'off', 'metadata', 'falloc' or 'full'"
        )),
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

#[cfg(test)]
mod tests {
    use super::known::KNOWN;
    use super::*;
    use clap::{CommandFactory as _, Parser};
    use std::collections::BTreeSet;

    /// The part of the command line that says how to mount.
    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        global: Global,
        #[command(flatten)]
        args: Args,
    }

    /// Every option, as a long one and for `-o`.
    const BOTH: [(&str, &str); 13] = [
        ("--ro", "ro"),
        ("--allow-other", "allow_other"),
        ("--preallocation=falloc", "preallocation=falloc"),
        ("--nogrow", "nogrow"),
        ("--shrink", "shrink"),
        ("--nopassthrough", "nopassthrough"),
        ("--writeback", "writeback"),
        ("--rw-backing", "rw_backing"),
        ("--backing=none", "backing=none"),
        ("--format=*.d:raw", "format=*.d:raw"),
        ("--log=/log", "log=/log"),
        ("--isolation=process", "isolation=process"),
        ("--allow-path=/images", "allow_path=/images"),
    ];

    fn settings(words: &[&str]) -> Result<Settings, String> {
        let words = ["mount"].iter().chain(words).chain(&["/source", "/mnt"]);
        let line = Line::try_parse_from(words).map_err(|error| error.to_string())?;
        Settings::new(&line.args, &line.global).map_err(|error| error.to_string())
    }

    /// All of them, as text to compare.
    fn shown(words: &[&str]) -> String {
        format!("{:?}", settings(words).unwrap())
    }

    /// Options that are not the mount's: what is done before it, and how commands
    /// word what they print.
    const OTHERS: [&str; 4] = ["foreground", "help", "version", "qemu-version"];

    /// The long options that concern the mount, with underscores.
    fn long_options() -> BTreeSet<String> {
        let command = Line::command();
        let longs = command
            .get_arguments()
            .filter_map(|argument| argument.get_long());
        let concerned = longs.filter(|long| !OTHERS.contains(long));
        concerned.map(|long| long.replace('-', "_")).collect()
    }

    #[test]
    fn every_option_says_the_same_as_a_long_one_and_after_o() {
        for (long, option) in BOTH {
            assert_eq!(shown(&[long]), shown(&["-o", option]), "{option}");
            // The environment may name a sandbox already.
            let other = ["--isolation=kvm"];
            let plain = if option.starts_with("isolation") {
                &other[..]
            } else {
                &[]
            };
            assert_ne!(shown(&[long]), shown(plain), "{option}");
        }
        let listed = BOTH.map(|(_, option)| option.split('=').next().unwrap().to_string());
        assert_eq!(BTreeSet::from(listed), long_options());
    }

    #[test]
    fn lists_after_o_add_up() {
        let apart = shown(&["-o", "ro", "-o", "noexec,nogrow"]);
        assert_eq!(apart, shown(&["-o", "ro,,noexec,nogrow"]));
        let paths = settings(&["--allow-path=/a", "-o", "allow_path=/b,allow_path=/c"]).unwrap();
        assert_eq!(paths.allow_paths, ["/a", "/b", "/c"].map(PathBuf::from));
    }

    #[test]
    fn the_last_of_o_wins_and_o_wins_over_long_options() {
        for (winner, words) in [
            ("ro", ["--foreground", "-o", "rw,ro"]),
            ("rw", ["--foreground", "-o", "ro,rw"]),
            ("rw", ["--ro", "-o", "rw"]),
            (
                "isolation=kvm",
                ["--isolation=process", "-o", "isolation=kvm"],
            ),
            ("log=/b", ["--log=/a", "-o", "log=/b"]),
            (
                "preallocation=off",
                ["--preallocation=falloc", "-o", "preallocation=off"],
            ),
        ] {
            assert_eq!(shown(&words), shown(&["-o", winner]), "{words:?}");
        }
        let read_only = settings(&["-o", "rw,ro"]).unwrap();
        assert!(read_only.behaviour.read_only && read_only.kernel.read_only);
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        for (option, says) in [
            ("foreground", "unknown mount option 'foreground'"),
            ("bogus=1", "unknown mount option 'bogus'"),
            ("noexec=1", "unknown mount option 'noexec'"),
            ("ro=1", "unknown mount option 'ro'"),
            ("log", "mount option 'log' needs a value"),
            ("backing=all", "backing=all: the only value is 'none'"),
            ("preallocation=all", "preallocation=all: expected 'off', "),
            ("isolation=none", "isolation=none: "),
            ("format=raw", "expected GLOB:FORMAT"),
        ] {
            let error = settings(&["-o", option]).unwrap_err();
            assert!(error.contains(says), "{option}: {error}");
        }
    }

    #[test]
    fn the_kernel_writes_by_itself_only_what_nobody_has_to_refuse() {
        assert!(settings(&[]).unwrap().behaviour.passthrough);
        for option in ["nopassthrough", "nogrow", "ro", "writeback"] {
            let settings = settings(&["-o", option]).unwrap();
            assert!(!settings.behaviour.passthrough, "{option}");
        }
        let both = settings(&["-o", "writeback,nogrow"]).unwrap_err();
        assert!(both.starts_with("writeback and nogrow exclude"), "{both}");
    }

    #[test]
    fn the_helper_of_mount_8_knows_the_same_options() {
        // It drops 'defaults' itself.
        let generic = generic_options().filter(|option| *option != "defaults");
        let mut ours = long_options();
        ours.extend(generic.chain(["rw"]).map(str::to_string));
        let known: BTreeSet<String> = KNOWN.map(str::to_string).into();
        assert_eq!(known, ours);
        let with_values = BOTH.map(|(_, option)| option);
        for name in KNOWN {
            let has_name = |option: &&&str| option.split('=').next() == Some(name);
            let option = with_values.iter().find(has_name).copied().unwrap_or(name);
            settings(&["-o", option]).unwrap();
        }
    }
}
