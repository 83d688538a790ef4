//! Reading the command line, and saying what is wrong with it.

use super::Cli;
use clap::Parser;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

/// Reads the command line of this process.
pub fn parse() -> Result<Cli, clap::Error> {
    Cli::try_parse_from(sizes_last(std::env::args_os().collect()))
}

/// Moves an argument such as `-32M` behind `--`: no option is a digit, so it is
/// a size, which is the last argument anyway.
fn sizes_last(mut args: Vec<OsString>) -> Vec<OsString> {
    let is_resize = args.get(1..).is_some_and(|args| {
        args.iter()
            .find(|arg| !arg.as_bytes().starts_with(b"-"))
            .is_some_and(|arg| arg == "resize")
    });
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
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            // Nobody is left to tell where this cannot be printed.
            let _ = error.print();
            0
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand | ErrorKind::MissingSubcommand => {
            eprintln!("instar: Not enough arguments\nTry 'instar --help' for more info");
            1
        }
        _ => {
            let command = command();
            match in_qemus_words(error, command.as_deref()) {
                Some(text) => eprintln!("{text}"),
                None => eprintln!("instar: {}", own_words(error)),
            }
            if hints_at_help(error) {
                let command = command.map(|name| name + " ").unwrap_or_default();
                eprintln!("Try 'instar {command}--help' for more info");
            }
            1
        }
    }
}

/// The subcommand on this process's command line.
fn command() -> Option<String> {
    let known = <Cli as clap::CommandFactory>::command();
    std::env::args()
        .skip(1)
        .find(|arg| known.find_subcommand(arg).is_some())
}

/// A bad preallocation mode is the one mistake after which qemu-img names no
/// help.
fn hints_at_help(error: &clap::Error) -> bool {
    let value = text(error, ContextKind::InvalidValue).unwrap_or_default();
    let is_mode = argument(error).is_some_and(|argument| argument.starts_with("--preallocation"));
    !is_mode || value.is_empty()
}

fn argument(error: &clap::Error) -> Option<&str> {
    text(error, ContextKind::InvalidArg)
}

fn text(error: &clap::Error, kind: ContextKind) -> Option<&str> {
    match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text),
        Some(ContextValue::Strings(texts)) => texts.first().map(String::as_str),
        _ => None,
    }
}

/// What qemu-img says to the same mistake.
fn in_qemus_words(error: &clap::Error, command: Option<&str>) -> Option<String> {
    let value = text(error, ContextKind::InvalidValue).unwrap_or_default();
    match (error.kind(), argument(error)) {
        (ErrorKind::InvalidValue, Some(argument))
            if value.is_empty() && argument.starts_with(['<', '[']) =>
        {
            Some("instar: The file name is empty".to_owned())
        }
        (ErrorKind::InvalidValue, Some(argument)) if value.is_empty() => {
            Some(format!("instar {}: {}", command?, needs_argument(argument)))
        }
        (ErrorKind::MissingRequiredArgument, _) => {
            let missing = match command? {
                "resize" => "Expecting image file name and size",
                "info" | "map" | "check" => "Expecting one image file name",
                _ => return None,
            };
            Some(format!("instar: {missing}"))
        }
        (ErrorKind::InvalidSubcommand, _) => Some(format!(
            "instar: Command not found: {}",
            text(error, ContextKind::InvalidSubcommand)?
        )),
        (ErrorKind::UnknownArgument, Some(unknown)) if unknown.starts_with("--") => Some(format!(
            "instar {}: unrecognized option '{unknown}'",
            command?
        )),
        (ErrorKind::UnknownArgument, Some(unknown)) if unknown.starts_with('-') => Some(format!(
            "instar {}: invalid option -- '{}'",
            command?,
            unknown.chars().nth(1)?
        )),
        (ErrorKind::UnknownArgument, Some(unknown)) => Some(match command? {
            "resize" => "instar: Extra argument(s) in command line".to_owned(),
            "create" => format!("instar: Unexpected argument: {unknown}"),
            "info" | "map" | "check" => "instar: Expecting one image file name".to_owned(),
            _ => return None,
        }),
        (ErrorKind::InvalidValue, Some(argument)) if argument.starts_with("--output") => Some(
            format!("instar: --output expects 'human' or 'json' not '{value}'"),
        ),
        (ErrorKind::InvalidValue, Some(argument)) if argument.starts_with("--preallocation") => {
            Some(format!("instar: Invalid preallocation mode '{value}'"))
        }
        (ErrorKind::InvalidValue, Some(argument)) if argument.starts_with("--repair") => Some(
            format!("instar: --repair (-r) expects 'leaks' or 'all' not '{value}'"),
        ),
        _ => None,
    }
}

/// The last argument on the command line is an option that wants one more.
fn needs_argument(argument: &str) -> String {
    let last = std::env::args().next_back().unwrap_or_default();
    match last.strip_prefix('-') {
        Some(letter) if letter.len() == 1 => {
            format!("option requires an argument -- '{letter}'")
        }
        _ => {
            let option = argument.split([' ', '=']).next().unwrap_or(argument);
            format!("option '{option}' requires an argument")
        }
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
            reordered(&["instar", "info", "-1"]),
            ["instar", "info", "-1"]
        );
    }

    #[test]
    fn the_definitions_are_consistent() {
        <Cli as clap::CommandFactory>::command().debug_assert();
    }
}
