//! Damaged images through the command line.

use crate::damage::{Damage, Refused};
use crate::pool;
use crate::program::instar;
use crate::tools::{read, scratch, write};
use std::path::Path;

/// The damaged file.
pub const IMAGE: &str = "image.qcow2";

/// One damaged image: the uses that it spoils are refused with exit status 1
/// and a text that says what is wrong, and no command changes a byte of it
/// unless it succeeds.
pub fn damaged(damage: &Damage, isolation: &str) -> Result<(), String> {
    let dir = scratch()?;
    let mut image = pool::named(damage.kind, dir.path())?;
    (damage.edit)(&mut image);
    let larger = pool::LARGE.to_string();
    let commands: [(&[&str], bool); 4] = [
        (
            &["info", "-f", "qcow2", IMAGE],
            damage.refused == Refused::Everything,
        ),
        (
            &["map", "-f", "qcow2", IMAGE],
            matches!(damage.refused, Refused::Everything | Refused::Mapping),
        ),
        (
            &["resize", "--dry-run", "-f", "qcow2", IMAGE, &larger],
            matches!(damage.refused, Refused::Everything | Refused::Resizing),
        ),
        (
            &["resize", "-f", "qcow2", IMAGE, &larger],
            matches!(damage.refused, Refused::Everything | Refused::Resizing),
        ),
    ];
    for (arguments, refused) in commands {
        write(&dir.path().join(IMAGE), &image)?;
        let outcome = instar(dir.path(), isolation, arguments)?;
        let unchanged = read(&dir.path().join(IMAGE))? == image;
        let told = outcome.text.to_lowercase().contains(damage.says);
        let what = format!("{arguments:?}: {}", outcome.brief());
        if refused && outcome.code != 1 {
            return Err(format!("{what}; exit 1 was expected"));
        }
        if refused && !told {
            return Err(format!("{what}; the text has to name {:?}", damage.says));
        }
        if !unchanged && (outcome.code != 0 || arguments.contains(&"--dry-run")) {
            return Err(format!("{what}; the image has changed"));
        }
        if arguments[0] == "info" && !refused && outcome.code != 0 {
            return Err(format!("{what}; the facts are sound"));
        }
    }
    Ok(())
}

/// Commands on an image that names what it may not have: refused with exit
/// status 1 and a text that says so, byte-identical.
pub fn refused_name(
    dir: &Path,
    isolation: &str,
    commands: &[&[&str]],
    says: &str,
) -> Result<(), String> {
    let before = read(&dir.join(IMAGE))?;
    for command in commands {
        let mut arguments = command.to_vec();
        arguments.splice(1..1, ["-f", "qcow2", IMAGE]);
        let outcome = instar(dir, isolation, &arguments)?;
        let what = format!("{arguments:?}: {}", outcome.brief());
        if outcome.code != 1 {
            return Err(format!("{what}; exit 1 was expected"));
        }
        if !outcome.text.contains(says) {
            return Err(format!("{what}; the text has to say {says:?}"));
        }
        if read(&dir.join(IMAGE))? != before {
            return Err(format!("{what}; the image has changed"));
        }
    }
    Ok(())
}
