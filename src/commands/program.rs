//! The name that this program was called by. As `qemu-img` it answers like
//! qemu-img: its messages begin with that name, and `--version` has the text that
//! scripts look for.

use instar::compat::version::QemuVersion;
use std::ffi::OsStr;
use std::path::Path;
use std::sync::OnceLock;

const OWN: &str = "instar";
const QEMU_IMG: &str = "qemu-img";
/// The environment variable behind `--qemu-version`.
pub const VERSION_VARIABLE: &str = "INSTAR_QEMU_VERSION";

/// The commands of qemu-img that instar does not have.
const NOT_PROVIDED: [&str; 10] = [
    "amend", "bench", "bitmap", "commit", "compare", "convert", "dd", "measure", "rebase",
    "snapshot",
];

/// What messages begin with.
pub fn name() -> &'static str {
    static NAME: OnceLock<&str> = OnceLock::new();
    NAME.get_or_init(|| called(std::env::args_os().next().as_deref()))
}

fn called(path: Option<&OsStr>) -> &'static str {
    let name = path.and_then(|path| Path::new(path).file_name());
    match name.is_some_and(|name| name == QEMU_IMG) {
        true => QEMU_IMG,
        false => OWN,
    }
}

/// What `--version` prints behind the name.
pub fn version(followed: QemuVersion) -> String {
    let own = env!("CARGO_PKG_VERSION");
    match name() {
        QEMU_IMG => format!("version {followed} ({OWN} {own})"),
        _ => own.to_owned(),
    }
}

/// The version of qemu-img that these arguments or the environment name, also
/// where the command line is wrong.
pub fn followed(args: &[String]) -> QemuVersion {
    let option = "--qemu-version";
    let apart = args.windows(2).find(|pair| pair[0] == option);
    let joined = |arg: &String| Some(arg.strip_prefix(option)?.strip_prefix('=')?.to_owned());
    apart
        .map(|pair| pair[1].clone())
        .or_else(|| args.iter().find_map(joined))
        .or_else(|| std::env::var(VERSION_VARIABLE).ok())
        .and_then(|text| text.parse().ok())
        .unwrap_or_default()
}

/// The line after a mistake that names the help.
pub fn hint(command: Option<&str>, followed: QemuVersion) -> String {
    let name = name();
    let command = command.filter(|_| followed.explains_commands());
    let command = command.map(|command| format!("{command} "));
    let more = if followed.has_words_of_10() {
        "info"
    } else {
        "information"
    };
    format!(
        "Try '{name} {}--help' for more {more}",
        command.unwrap_or_default()
    )
}

/// What is said to a command that only qemu-img has.
pub fn not_provided(command: &str) -> Option<String> {
    NOT_PROVIDED.contains(&command).then(|| {
        format!(
            "'{command}' is not provided: it is a command of QEMU's qemu-img, which has to be \
             called by its path, such as /usr/bin/qemu-img"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_part_of_the_path_counts() {
        for (path, expected) in [
            ("qemu-img", QEMU_IMG),
            ("/opt/bin/qemu-img", QEMU_IMG),
            ("instar", OWN),
            ("/qemu-img/instar", OWN),
            ("qemu-img-10", OWN),
        ] {
            assert_eq!(called(Some(OsStr::new(path))), expected, "{path}");
        }
        assert_eq!(called(None), OWN);
    }

    #[test]
    fn the_version_to_follow_is_read_in_both_spellings() {
        let args = |args: &[&str]| args.iter().map(|arg| (*arg).to_owned()).collect::<Vec<_>>();
        for given in [
            args(&["--qemu-version", "7.2", "--version"]),
            args(&["--version", "--qemu-version=7.2"]),
        ] {
            assert_eq!(followed(&given).to_string(), "7.2.0");
        }
    }
}
