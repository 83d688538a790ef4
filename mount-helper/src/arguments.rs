//! mount(8)'s calling convention: `SOURCE MOUNTPOINT [-sfnv] [-N namespace]
//! [-o options] [-t type.subtype]`.

use crate::known::KNOWN;
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};

/// What is to be mounted, and how.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Call {
    /// Directory with images, or one image.
    pub source: OsString,
    /// Where.
    pub mountpoint: OsString,
    /// What `instar mount -o` gets.
    pub options: OsString,
    /// `-f`: everything but the mount.
    pub fake: bool,
    /// `-v`: say what is done.
    pub verbose: bool,
}

/// Options for mount(8), fstab and systemd themselves.
const FOR_OTHERS: [&str; 13] = [
    "auto", "noauto", "user", "nouser", "users", "owner", "noowner", "group", "nogroup", "nofail",
    "fail", "_netdev", "defaults",
];

/// Reads the arguments. Options may stand anywhere.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Call, String> {
    let mut call = Call::default();
    let mut names = Vec::new();
    let mut lists = Vec::new();
    let mut sloppy = false;
    let mut arguments = arguments.into_iter();
    while let Some(argument) = arguments.next() {
        let mut flags = match argument.as_bytes() {
            b"--" => {
                names.extend(arguments.by_ref());
                break;
            }
            [b'-', flags @ ..] if !flags.is_empty() => flags,
            _ => {
                names.push(argument);
                continue;
            }
        };
        while let Some((&flag, rest)) = flags.split_first() {
            flags = rest;
            match flag {
                b's' => sloppy = true,
                b'f' => call.fake = true,
                b'v' => call.verbose = true,
                b'n' => {}
                b'o' => lists.push(value(flag, &mut flags, &mut arguments)?),
                b't' => drop(value(flag, &mut flags, &mut arguments)?),
                b'N' => return Err("-N: mount from inside that namespace".to_string()),
                other => return Err(format!("unknown option -{}", char::from(other))),
            }
        }
    }
    call.options = filter(&lists, sloppy);
    match <[OsString; 2]>::try_from(names) {
        Ok([source, mountpoint]) => Ok(Call {
            source,
            mountpoint,
            ..call
        }),
        Err(_) => Err("expected SOURCE and MOUNTPOINT".to_string()),
    }
}

/// The value of an option: the rest of its word, or the next one.
fn value(
    flag: u8,
    flags: &mut &[u8],
    arguments: &mut impl Iterator<Item = OsString>,
) -> Result<OsString, String> {
    let attached = std::mem::take(flags);
    if !attached.is_empty() {
        return Ok(OsString::from_vec(attached.to_vec()));
    }
    arguments
        .next()
        .ok_or_else(|| format!("-{} needs a value", char::from(flag)))
}

/// One list of the options that concern `instar mount`.
fn filter(lists: &[OsString], sloppy: bool) -> OsString {
    let kept: Vec<&[u8]> = lists
        .iter()
        .flat_map(|list| list.as_bytes().split(|&byte| byte == b','))
        .filter(|option| concerns_instar(option) && (!sloppy || is_known(option)))
        .collect();
    OsString::from_vec(kept.join(&b','))
}

fn concerns_instar(option: &[u8]) -> bool {
    let name = name_of(option);
    !option.is_empty()
        && !name.starts_with(b"x-")
        && !name.starts_with(b"X-")
        && name != b"comment"
        && !FOR_OTHERS.iter().any(|other| other.as_bytes() == name)
}

fn is_known(option: &[u8]) -> bool {
    KNOWN
        .iter()
        .any(|known| known.as_bytes() == name_of(option))
}

fn name_of(option: &[u8]) -> &[u8] {
    let end = option.iter().position(|&byte| byte == b'=');
    &option[..end.unwrap_or(option.len())]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(words: &str) -> Result<Call, String> {
        parse(words.split_whitespace().map(OsString::from))
    }

    #[test]
    fn what_mount_passes_is_understood() {
        let expected = Call {
            source: "/images".into(),
            mountpoint: "/mnt".into(),
            options: "rw,ro,format=*.d:raw".into(),
            fake: false,
            verbose: true,
        };
        let words = "/images /mnt -n -v -o rw,ro,nofail,x-systemd.automount,format=*.d:raw -t x.y";
        assert_eq!(call(words), Ok(expected.clone()));
        let words = "-nvo rw,ro,_netdev,comment=z /images /mnt -oformat=*.d:raw";
        assert_eq!(call(words), Ok(expected));
    }

    #[test]
    fn sloppy_drops_what_instar_does_not_know() {
        assert_eq!(call("a b -o ro,bogus=1").unwrap().options, "ro,bogus=1");
        assert_eq!(call("a b -s -o ro,bogus=1").unwrap().options, "ro");
    }

    #[test]
    fn a_wrong_call_says_what_is_wrong() {
        assert_eq!(call("a").unwrap_err(), "expected SOURCE and MOUNTPOINT");
        assert_eq!(call("a b -o").unwrap_err(), "-o needs a value");
        assert_eq!(call("a b -q").unwrap_err(), "unknown option -q");
        assert_eq!(
            call("a b -N 1").unwrap_err(),
            "-N: mount from inside that namespace"
        );
    }

    #[test]
    fn after_two_dashes_everything_is_a_name() {
        assert_eq!(call("-- -a b").unwrap().source, "-a");
    }
}
