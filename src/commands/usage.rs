//! Reading the command line, and saying what is wrong with it.

use super::{Cli, complain, program, say};
use clap::Parser;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use instar::compat::version::QemuVersion;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

/// Reads the command line of this process.
pub fn parse() -> Result<Cli, clap::Error> {
    Cli::try_parse_from(sizes_last(std::env::args_os().collect()))
}

/// Moves an argument such as `-32M` behind `--`: no option is a digit, so it is
/// a size, which is the last argument anyway.
fn sizes_last(mut args: Vec<OsString>) -> Vec<OsString> {
    let known = <Cli as clap::CommandFactory>::command();
    let is_command = |arg: &&OsString| known.find_subcommand(arg).is_some();
    let is_resize = args.iter().skip(1).find(is_command);
    let is_resize = is_resize.is_some_and(|arg| arg == "resize");
    let only_arguments = args.iter().position(|arg| arg == "--");
    let options = ..only_arguments.unwrap_or(args.len());
    if let Some(size) = args[options].iter().position(|arg| is_negative(arg))
        && is_resize
        && only_arguments.is_none()
    {
        let size = args.remove(size);
        args.push("--".into());
        args.push(size);
    }
    args
}

fn is_negative(arg: &OsStr) -> bool {
    matches!(arg.as_bytes(), [b'-', next, ..] if next.is_ascii_digit() || *next == b'.')
}

/// Prints the help that was asked for, or what is wrong; answers the exit code.
pub fn report(error: &clap::Error) -> u8 {
    let mistake = Mistake::read(error);
    match error.kind() {
        // Nobody is left to tell where this cannot be printed.
        ErrorKind::DisplayHelp => {
            let _ = error.print();
            0
        }
        ErrorKind::DisplayVersion => {
            let version = program::version(mistake.followed);
            let _ = say(&format!("{} {version}\n", program::name()));
            0
        }
        _ => {
            complain(&format!("{}\n", mistake.text()));
            1
        }
    }
}

/// What is wrong with the command line.
struct Mistake<'a> {
    error: &'a clap::Error,
    /// The arguments of this process, without the program.
    args: Vec<String>,
    /// The subcommand among them.
    command: Option<String>,
    /// The version of qemu-img whose words are used.
    followed: QemuVersion,
}

impl<'a> Mistake<'a> {
    fn read(error: &'a clap::Error) -> Self {
        let args = std::env::args_os().skip(1);
        let args: Vec<String> = args.map(|arg| arg.to_string_lossy().into_owned()).collect();
        let known = <Cli as clap::CommandFactory>::command();
        let command = args.iter().find(|arg| known.find_subcommand(arg).is_some());
        Self {
            error,
            command: command.cloned(),
            followed: program::followed(&args),
            args,
        }
    }

    /// The argument that is wrong, as the parser names it.
    fn argument(&self) -> &str {
        self.context(ContextKind::InvalidArg).unwrap_or_default()
    }

    /// The value that is wrong, empty where there is none.
    fn value(&self) -> &str {
        self.context(ContextKind::InvalidValue).unwrap_or_default()
    }

    fn context(&self, kind: ContextKind) -> Option<&str> {
        match self.error.get(kind) {
            Some(ContextValue::String(text)) => Some(text),
            Some(ContextValue::Strings(texts)) => texts.first().map(String::as_str),
            _ => None,
        }
    }

    /// The name of the option that is wrong.
    fn option(&self) -> &str {
        let name = self.argument().split([' ', '=']).next();
        name.unwrap_or_default()
    }

    /// Everything that is printed.
    fn text(&self) -> String {
        let name = program::name();
        let text = match self.in_qemus_words() {
            Some(text) => text,
            None => format!("{name}: {}", own_words(self.error)),
        };
        match self.hints_at_help() {
            true => {
                let hint = program::hint(self.command.as_deref(), self.followed);
                format!("{text}\n{hint}")
            }
            false => text,
        }
    }

    /// Some mistakes are told without naming the help.
    fn hints_at_help(&self) -> bool {
        let wrong_value = self.error.kind() == ErrorKind::InvalidValue && !self.lacks_value();
        let is_told_alone = match self.option() {
            "--preallocation" => true,
            "--output" => !self.followed.explains_commands(),
            argument => argument.starts_with(['<', '[']),
        };
        let is_elsewhere = self.error.kind() == ErrorKind::InvalidSubcommand
            && program::not_provided(self.unknown_command()).is_some();
        !(wrong_value && is_told_alone || is_elsewhere)
    }

    /// Whether an option stands there without the value that it wants.
    fn lacks_value(&self) -> bool {
        let option = self.option();
        let is_empty = |pair: &[String]| pair[0] == option && pair[1].is_empty();
        self.value().is_empty()
            && option.starts_with('-')
            && !self.args.contains(&format!("{option}="))
            && !self.args.windows(2).any(is_empty)
    }

    fn unknown_command(&self) -> &str {
        self.context(ContextKind::InvalidSubcommand)
            .unwrap_or_default()
    }

    /// What qemu-img says to the same mistake.
    fn in_qemus_words(&self) -> Option<String> {
        let name = program::name();
        let text = match self.error.kind() {
            ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand | ErrorKind::MissingSubcommand => {
                "Not enough arguments".to_owned()
            }
            ErrorKind::InvalidSubcommand => {
                let command = self.unknown_command();
                program::not_provided(command)
                    .unwrap_or_else(|| format!("Command not found: {command}"))
            }
            ErrorKind::UnknownArgument if self.argument().starts_with('-') => {
                return Some(self.unknown_option());
            }
            ErrorKind::UnknownArgument => self.surplus()?,
            ErrorKind::MissingRequiredArgument => self.missing()?,
            ErrorKind::InvalidValue if self.lacks_value() => return Some(self.no_value()),
            ErrorKind::InvalidValue => self.bad_value()?,
            _ => return None,
        };
        Some(format!("{name}: {text}"))
    }

    /// `NAME COMMAND: `, or what older versions have there.
    fn prefix(&self) -> String {
        match &self.command {
            Some(command) if self.followed.explains_commands() => {
                format!("{} {command}: ", program::name())
            }
            _ => format!("{}: ", program::name()),
        }
    }

    fn unknown_option(&self) -> String {
        let unknown = self.argument();
        let is_it = |arg: &&String| arg.split('=').next() == Some(unknown);
        let shown = self.args.iter().find(is_it).map_or(unknown, String::as_str);
        let prefix = self.prefix();
        match unknown.strip_prefix("--") {
            Some(_) => match self.candidates(unknown) {
                Some(candidates) => {
                    format!("{prefix}option '{unknown}' is ambiguous; possibilities:{candidates}")
                }
                None => format!("{prefix}unrecognized option '{shown}'"),
            },
            None if self.followed.explains_commands() => {
                let letter = unknown.chars().nth(1).unwrap_or_default();
                format!("{prefix}invalid option -- '{letter}'")
            }
            None => format!("{prefix}unrecognized option '{unknown}'"),
        }
    }

    /// The options that an abbreviation may stand for, where there are several.
    fn candidates(&self, beginning: &str) -> Option<String> {
        let beginning = beginning.strip_prefix("--")?;
        let known = <Cli as clap::CommandFactory>::command();
        let command = known.find_subcommand(self.command.as_deref()?)?;
        let names = command.get_arguments().filter_map(clap::Arg::get_long);
        let names: Vec<&str> = names.filter(|name| name.starts_with(beginning)).collect();
        let list = |names: Vec<&str>| names.iter().map(|name| format!(" '--{name}'")).collect();
        (names.len() > 1 && self.followed.explains_commands()).then(|| list(names))
    }

    fn missing(&self) -> Option<String> {
        let text = match self.command.as_deref()? {
            "resize" if !self.followed.explains_commands() => "Not enough arguments",
            "resize" => "Expecting image file name and size",
            "info" | "map" | "check" => "Expecting one image file name",
            _ => return None,
        };
        Some(text.to_owned())
    }

    fn surplus(&self) -> Option<String> {
        let text = match self.command.as_deref()? {
            "resize" if !self.followed.explains_commands() => "Expecting image file name and size",
            "resize" => "Extra argument(s) in command line",
            "create" => return Some(format!("Unexpected argument: {}", self.argument())),
            "info" | "map" | "check" => "Expecting one image file name",
            _ => return None,
        };
        Some(text.to_owned())
    }

    fn no_value(&self) -> String {
        let last = self.args.last().map(String::as_str).unwrap_or_default();
        let letter = last.strip_prefix('-').filter(|letter| letter.len() == 1);
        let prefix = self.prefix();
        match (letter, self.followed.explains_commands()) {
            (_, false) => format!("{prefix}missing argument for option '{last}'"),
            (Some(letter), true) => format!("{prefix}option requires an argument -- '{letter}'"),
            (None, true) => format!("{prefix}option '{}' requires an argument", self.option()),
        }
    }

    fn bad_value(&self) -> Option<String> {
        let value = self.value();
        let new = self.followed.explains_commands();
        let comma = if self.followed.has_words_of_10() {
            ""
        } else {
            ","
        };
        Some(match self.option() {
            "--output" if new => format!("--output expects 'human' or 'json'{comma} not '{value}'"),
            "--output" => "--output must be used with human or json as argument.".to_owned(),
            "--preallocation" => format!("Invalid preallocation mode '{value}'"),
            "--repair" if new => {
                format!("--repair (-r) expects 'leaks' or 'all'{comma} not '{value}'")
            }
            "--repair" => {
                format!("Unknown option value for -r (expecting 'leaks' or 'all'): {value}")
            }
            argument if argument.starts_with(['<', '[']) && value.is_empty() => {
                match self.command.as_deref()? {
                    "create" => ": Could not create '': No such file or directory".to_owned(),
                    _ => {
                        "Could not open '': The 'file' block driver requires a file name".to_owned()
                    }
                }
            }
            _ => return None,
        })
    }
}

/// The parser's own text: its first paragraph, without its prefix.
fn own_words(error: &clap::Error) -> String {
    let text = error.to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    text.split("\n\n").next().unwrap_or(text).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reordered(args: &[&str]) -> Vec<String> {
        sizes_last(args.iter().map(OsString::from).collect())
            .into_iter()
            .map(|arg| arg.to_string_lossy().into_owned())
            .collect()
    }

    #[test]
    fn a_negative_size_is_no_option() {
        assert_eq!(
            reordered(&["instar", "resize", "-32M", "a", "-q"]),
            ["instar", "resize", "a", "-q", "--", "-32M"]
        );
        assert_eq!(
            reordered(&["instar", "resize", "a", "--", "-1"]),
            ["instar", "resize", "a", "--", "-1"]
        );
        assert_eq!(
            reordered(&["instar", "--qemu-version", "7.2", "resize", "a", "-1"]),
            ["instar", "--qemu-version", "7.2", "resize", "a", "--", "-1"]
        );
        assert_eq!(
            reordered(&["instar", "info", "-1"]),
            ["instar", "info", "-1"]
        );
    }

    #[test]
    fn the_definitions_are_consistent() {
        <Cli as clap::CommandFactory>::command().debug_assert();
    }
}
