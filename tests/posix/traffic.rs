//! Several programs at one image at a time, and programs that dig holes.

use crate::images::DISK;
use crate::rig::{Mount, Rig};
use crate::tools::{noise, run};
use crate::{Claim, claim};
use std::fs::File;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::SystemTime;

/// What is proven here of every image.
pub const CLAIMS: &[Claim] = &[
    claim(
        "takes_writes_after_each_resize_while_others_read",
        &[],
        takes_writes_after_each_resize,
    ),
    claim(
        "loses_nothing_where_holes_are_dug",
        &["fallocate"],
        loses_nothing_where_holes_are_dug,
    ),
];

/// For one image of each format.
pub const USUAL: &[Claim] = &[claim(
    "who_opens_a_changed_image_with_others_sees_what_they_write",
    &[],
    who_opens_a_changed_image_sees_what_others_write,
)
.in_one_sandbox()];

const PAGE: usize = 4096;
/// Resizes, each with a write behind it.
const RESIZES: u64 = 12;
/// How often an image is changed and opened by many.
const ROUNDS: u64 = 60;
const READERS: usize = 4;
const PAGES: u64 = 64;

/// Page aligned memory for direct access.
#[repr(align(4096))]
struct Page([u8; PAGE]);

fn direct(path: &Path) -> File {
    let mut options = File::options();
    let options = options.read(true).write(true);
    options.custom_flags(libc::O_DIRECT).open(path).unwrap()
}

fn takes_writes_after_each_resize(rig: &Rig) {
    let mount = rig.mount();
    let over = AtomicBool::new(false);
    let page = Page([7; PAGE]);
    thread::scope(|scope| {
        for reader in 0..2 {
            let (over, mount) = (&over, &mount);
            scope.spawn(move || {
                let (disk, mut page) = (direct(&mount.disk), Page([0; PAGE]));
                for turn in 0.. {
                    if over.load(Ordering::Acquire) {
                        break;
                    }
                    let at = (turn * 37 + reader) % 256 * PAGE as u64;
                    disk.read_exact_at(&mut page.0, at).unwrap();
                }
            });
        }
        let written = || -> std::io::Result<()> {
            let disk = direct(&mount.disk);
            for turn in 0..RESIZES {
                disk.write_all_at(&page.0, turn * 5 * PAGE as u64)?;
                disk.set_len(DISK + (turn + 1) * (1 << 20))?;
            }
            Ok(())
        }();
        over.store(true, Ordering::Release);
        written.unwrap();
    });
    let disk = direct(&mount.disk);
    for turn in 0..RESIZES {
        let mut read = Page([0; PAGE]);
        disk.read_exact_at(&mut read.0, turn * 5 * PAGE as u64)
            .unwrap();
        assert!(read.0 == page.0, "{turn}");
    }
    drop(disk);
    mount.unmount();
    rig.check();
}

fn loses_nothing_where_holes_are_dug(rig: &Rig) {
    const START: u64 = 1 << 20;
    let mount = rig.mount();
    let disk = File::options().write(true).open(&mount.disk).unwrap();
    // Zeroes that take space, and data at sectors behind them.
    for (at, bytes) in [
        (0, vec![0; PAGE]),
        (8192, noise(1, 512)),
        (36 << 10, vec![0; 3 * PAGE]),
        ((52 << 10) + 1536, noise(2, 512)),
        (256 << 10, vec![0; 64 << 10]),
        ((320 << 10) + 512, noise(3, 100)),
    ] {
        disk.write_all_at(&bytes, START + at).unwrap();
    }
    drop(disk);
    let model = rig.path("model");
    run("cp", &[&mount.disk, &model]);
    mount.unmount();
    let mount = rig.mount();
    run("fallocate", &[Path::new("-d"), &mount.disk]);
    run("cmp", &[&mount.disk, &model]);
    mount.unmount();
    rig.check();
    rig.compare(&model);
}

fn who_opens_a_changed_image_sees_what_others_write(rig: &Rig) {
    let mount = rig.mount();
    for round in 0..ROUNDS {
        let image = File::options().write(true).open(&rig.image).unwrap();
        image.set_modified(SystemTime::now()).unwrap();
        drop(image);
        let disk = written_among_readers(&mount, round);
        for page in 0..PAGES {
            let mut read = [0; PAGE];
            disk.read_exact_at(&mut read, page * PAGE as u64).unwrap();
            assert!(read == content(round, page), "round {round}, page {page}");
        }
    }
    mount.unmount();
    rig.check();
}

fn content(round: u64, page: u64) -> [u8; PAGE] {
    [(1 + (round * 7 + page) % 250) as u8; PAGE]
}

/// Opens the disk and writes to it while others open and read it.
fn written_among_readers(mount: &Mount, round: u64) -> File {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..READERS {
            scope.spawn(|| {
                let disk = File::open(&mount.disk).unwrap();
                let mut buffer = vec![0; PAGES as usize * PAGE];
                while !over.load(Ordering::Acquire) {
                    disk.read_exact_at(&mut buffer, 0).unwrap();
                }
            });
        }
        let disk = File::options().read(true).write(true).open(&mount.disk);
        let disk = disk.unwrap();
        let written = (0..PAGES)
            .try_for_each(|page| disk.write_all_at(&content(round, page), page * PAGE as u64));
        over.store(true, Ordering::Release);
        written.unwrap();
        disk
    })
}
