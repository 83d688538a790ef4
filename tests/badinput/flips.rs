//! Random damage to a pool of sound images: whatever it hits, commands end as
//! documented, and an image that is not changed successfully is not changed.

use crate::bytes::{l1, l2, reftable};
use crate::pool::{self, Kind};
use crate::program::instar;
use crate::random::Random;
use crate::tools::{qemu_img, read, scratch, write};
use std::path::Path;

/// Damaged images per kind.
const ROUNDS: u64 = 12;
/// The damaged file.
const IMAGE: &str = "image.qcow2";

/// Damages one kind of image many times. Answers where qemu-img and instar
/// disagree about whether an image can be used: for review, since instar may
/// be stricter.
pub fn check(kind: &'static Kind, isolation: &str, seed: u64) -> Result<Vec<String>, String> {
    let dir = scratch()?;
    let sound = pool::make(kind, dir.path())?;
    let mut notes = Vec::new();
    for round in 0..ROUNDS {
        let mut image = sound.clone();
        let hits = hurt(&mut image, &mut kind.random(seed, round));
        let round = format!("{}, round {round}: {hits}", kind.name);
        let note = commands(dir.path(), isolation, &image)
            .map_err(|fault| format!("{round} (seed {seed}): {fault}"))?;
        notes.extend(note.map(|note| format!("{round}: {note}")));
    }
    Ok(notes)
}

/// Flips one to eight bits, most of them in metadata, or cuts the file short.
pub fn hurt(image: &mut Vec<u8>, random: &mut Random) -> String {
    if random.below(12) == 0 {
        let len = random.below(image.len());
        image.truncate(len);
        return format!("cut to {len} bytes");
    }
    let mut hits = Vec::new();
    let places = [
        (0, 112),
        (l1(image), 16),
        (l2(image), 128),
        (reftable(image), 16),
    ];
    for _ in 0..=random.below(8) {
        let at = match random.below(10) {
            0..5 => random.below(112),
            5..9 => {
                let (start, len) = places[random.below(places.len())];
                start + random.below(len)
            }
            _ => random.below(image.len()),
        };
        let bit = random.below(8);
        image[at] ^= 1 << bit;
        hits.push(format!("{at:#x}.{bit}"));
    }
    hits.join(" ")
}

fn commands(dir: &Path, isolation: &str, image: &[u8]) -> Result<Option<String>, String> {
    let path = dir.join(IMAGE);
    write(&path, image)?;
    let qemu_info = qemu_img(dir, &["info", "-f", "qcow2", IMAGE])?;
    let was_sound = matches!(qemu_img(dir, &["check", "-f", "qcow2", IMAGE])?.code, 0 | 3);
    let info = instar(dir, isolation, &["info", "-f", "qcow2", IMAGE])?;
    instar(dir, isolation, &["map", "-f", "qcow2", IMAGE])?;
    let resize = instar(dir, isolation, &["resize", "-f", "qcow2", IMAGE, "+1M"])?;
    if resize.code != 0 && read(&path)? != image {
        return Err(format!(
            "a refused resize changed the image: {}",
            resize.brief()
        ));
    }
    if resize.code == 0 && was_sound {
        let after = qemu_img(dir, &["check", "-f", "qcow2", IMAGE])?;
        if !matches!(after.code, 0 | 3) {
            return Err(format!(
                "a resize made a sound image unsound: {}",
                after.brief()
            ));
        }
    }
    let info_differs = (info.code == 0) != (qemu_info.code == 0);
    if info_differs {
        let (ours, theirs) = (info.brief(), qemu_info.brief());
        return Ok(Some(format!("info: instar {ours}; qemu-img {theirs}")));
    }
    let stricter = was_sound && resize.code != 0;
    Ok(stricter.then(|| format!("resize of a sound image: {}", resize.brief())))
}
