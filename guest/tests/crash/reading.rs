//! The readers are right: they read what qemu wrote as qemu reads it, and
//! refuse what the specifications forbid. So they can judge.

use crate::explorer::bytes::Bytes;
use crate::explorer::case::{Ask, BASIC, Case, Judges, M, Reader};
use crate::explorer::disk::Files;
use crate::explorer::readers::{vhd, vhdx, vmdk};
use crate::explorer::setup::Setup;
use crate::with_oracle;
use instar_guest::Format;
use libtest_mimic::Trial;

const IMAGE: Case = Case {
    size: 3 * M,
    prepare: &["io write -P 1 0 64k", "io write -P 2 1900k 60k"],
    judges: &Judges::NONE,
    ask: Ask::Settle,
    ..BASIC
};

const VHD: Case = Case {
    format: Format::Vhd,
    ..IMAGE
};

const VHDX: Case = Case {
    format: Format::Vhdx,
    ..IMAGE
};

const VMDK: Case = Case {
    format: Format::Vmdk,
    ..IMAGE
};

/// Images that are read as qemu reads them.
const IMAGES: &[(Case, Reader)] = &[
    (
        Case {
            name: "vhd, dynamic",
            options: "force_size=on",
            ..VHD
        },
        vhd::by_last_footer,
    ),
    (
        Case {
            name: "vhd, fixed",
            options: "subformat=fixed,force_size=on",
            ..VHD
        },
        vhd::by_last_footer,
    ),
    (
        Case {
            name: "vhdx, dynamic",
            options: "block_size=1M",
            ..VHDX
        },
        vhdx::by_second_regions,
    ),
    (
        Case {
            name: "vhdx, fixed",
            options: "subformat=fixed,block_size=2M",
            ..VHDX
        },
        vhdx::by_second_regions,
    ),
    (
        Case {
            name: "vmdk, monolithicSparse",
            options: "subformat=monolithicSparse",
            ..VMDK
        },
        vmdk::strictly,
    ),
    (
        Case {
            name: "vmdk, zero grains",
            options: "zeroed_grain=on",
            prepare: &["io write -P 1 0 128k", "io write -z 0 64k"],
            ..VMDK
        },
        vmdk::strictly,
    ),
    (
        Case {
            name: "vmdk, monolithicFlat",
            options: "subformat=monolithicFlat",
            ..VMDK
        },
        vmdk::strictly,
    ),
    (
        Case {
            name: "vmdk, twoGbMaxExtentSparse",
            options: "subformat=twoGbMaxExtentSparse",
            size: 2050 * M,
            prepare: &["io write -P 1 0 64k", "io write -P 2 2049M 64k"],
            ..VMDK
        },
        vmdk::strictly,
    ),
    (
        Case {
            name: "vmdk, twoGbMaxExtentFlat",
            options: "subformat=twoGbMaxExtentFlat",
            size: 2050 * M,
            prepare: &["io write -P 1 0 64k", "io write -P 2 2049M 64k"],
            ..VMDK
        },
        vmdk::strictly,
    ),
];

/// What makes an image one that its reader refuses: the image by its number, an
/// offset from the start or (where negative) the end, other bytes there, and
/// what the refusal says.
type Damage = (usize, i64, &'static [u8], &'static str);

const DAMAGES: &[Damage] = &[
    (0, -512, b"x", "no footer at"),
    (0, -100, b"x", "checksum of the footer"),
    (0, 512 + 100, b"x", "checksum of the dynamic header"),
    (0, 1536, &[0, 0, 0, 2], "overlap"),
    (0, 1536, &[1, 0, 0, 0], "past the end"),
    (1, -512, b"x", "no footer at"),
    (2, 256 << 10, b"x", "second region table is damaged"),
    (
        2,
        (256 << 10) + 4000,
        b"x",
        "second region table is damaged",
    ),
    (2, 3 << 20, b"x", "no metadata table"),
    (2, 2 << 20, &[6, 0, 0x10], "overlap"),
    (2, 2 << 20, &[7], "has the state 7"),
    (4, 12, &[1], "sectors in the header"),
    (4, 72, &[1], "line ends and state"),
    (4, 48, &[22], "the directory at sector 22"),
    (4, 512, b"x", "no descriptor"),
];

/// The trials.
pub fn trials() -> Vec<Trial> {
    let alike = IMAGES.iter().map(|(case, reader)| {
        with_oracle(format!("reader/{} as qemu reads it", case.name), || {
            reads_as_qemu(case, *reader)
        })
    });
    let damages = DAMAGES.iter().map(|damage| {
        let (image, offset, _, text) = damage;
        let name = format!("reader/{}, {offset}: {text}", IMAGES[*image].0.name);
        with_oracle(name, || is_refused(damage))
    });
    alike.chain(damages).collect()
}

fn reads_as_qemu(case: &'static Case, reader: Reader) -> Result<(), String> {
    let setup = Setup::build(case)?;
    let disk = reader(&setup.files, setup.image_name())?;
    match disk.difference(&setup.old_disk) {
        None if disk.len() == setup.old_disk.len() => Ok(()),
        difference => Err(format!("{disk:?}, other at {difference:x?}")),
    }
}

fn is_refused(&(number, offset, bytes, text): &'static Damage) -> Result<(), String> {
    let (case, reader) = &IMAGES[number];
    let setup = Setup::build(case)?;
    let mut files: Files = setup.files.clone();
    let file = files.find(setup.image_name()).ok_or("no image")?;
    let image: &mut Bytes = files.bytes_mut(file);
    let from = if offset < 0 { image.len() } else { 0 };
    image.write(from.wrapping_add_signed(offset), bytes);
    match reader(&files, setup.image_name()) {
        Err(refusal) if refusal.contains(text) => Ok(()),
        other => Err(format!("{other:?}")),
    }
}
