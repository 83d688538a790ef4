//! Reading and writing what is on the disk.

use crate::images::DISK;
use crate::rig::Rig;
use crate::tools::{errno, fallocate, noise, run, seek};
use crate::{Claim, claim};
use nix::errno::Errno;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::thread;
use std::time::{Duration, SystemTime};

/// What is proven here, for every variant of image.
pub const CLAIMS: &[Claim] = &[
    claim(
        "holes_lead_around_all_data",
        &[],
        holes_lead_around_all_data,
    ),
    claim(
        "looks_like_a_file_of_the_disks_size",
        &[],
        looks_like_a_file,
    ),
];

/// The same where the kernel may gather what is written.
pub const WRITTEN: &[Claim] = &[
    claim("reads_as_the_original", &["e2fsck"], reads_as_the_original),
    claim("keeps_what_was_written", &[], keeps_what_was_written),
    claim(
        "shows_what_was_written_to_every_reader",
        &[],
        shows_it_to_every_reader,
    ),
    claim(
        "takes_writes_from_many_threads",
        &[],
        takes_writes_from_many_threads,
    ),
    claim("allocates_inside_the_disk", &[], allocates_inside_the_disk),
    claim("reads_and_writes_directly", &[], reads_and_writes_directly),
    claim(
        "lives_as_a_loop_device",
        &["/dev/loop-control", "losetup"],
        lives_as_a_loop_device,
    ),
];

/// What is proven here of the images of every format.
pub const TIMES: &[Claim] = &[claim(
    "keeps_the_times_that_it_is_given",
    &[],
    keeps_the_times_that_it_is_given,
)];

fn reads_as_the_original(rig: &Rig) {
    let mount = rig.mount();
    run("cmp", &[rig.originals.raw(), &mount.disk]);
    run("e2fsck", &[Path::new("-fn"), &mount.disk]);
    mount.unmount();
    rig.check();
    rig.compare(rig.originals.raw());
}

fn holes_lead_around_all_data(rig: &Rig) {
    let mount = rig.mount();
    let disk = File::open(&mount.disk).unwrap();
    let original = fs::read(rig.originals.raw()).unwrap();
    let mut copy = vec![0; original.len()];
    let mut at = 0;
    let mut data_bytes = 0;
    loop {
        let data = match seek(&disk, at, libc::SEEK_DATA) {
            Ok(data) => data,
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(libc::ENXIO));
                break;
            }
        };
        let hole = seek(&disk, data, libc::SEEK_HOLE).unwrap();
        assert!(hole > data && hole <= DISK, "{data}..{hole}");
        let range = usize::try_from(data).unwrap()..usize::try_from(hole).unwrap();
        disk.read_exact_at(&mut copy[range], data).unwrap();
        data_bytes += hole - data;
        at = hole;
    }
    assert!(copy == original, "a hole hides data");
    assert!(data_bytes < DISK, "no hole was found");
    assert_eq!(errno(seek(&disk, DISK, libc::SEEK_HOLE)), Errno::ENXIO);
}

/// Places that matter: edges of sectors, of clusters of every size, of the
/// disk, and the middle of nowhere.
const PLACES: [(u64, usize); 9] = [
    (0, 1),
    (511, 2),
    (65_000, 1000),
    (1 << 20, 65_536),
    ((2 << 20) - 3, 70_000),
    (5_000_001, 3),
    (DISK / 2, 1 << 20),
    (DISK - (3 << 20), (3 << 20) - 512),
    (DISK - 1, 1),
];

fn keeps_what_was_written(rig: &Rig) {
    let expected = rig.expected();
    let model = File::options().write(true).open(&expected).unwrap();
    let mount = rig.mount();
    let disk = File::options().write(true).open(&mount.disk).unwrap();
    for (seed, (offset, len)) in PLACES.into_iter().enumerate() {
        let bytes = noise(seed as u64, len);
        disk.write_all_at(&bytes, offset).unwrap();
        model.write_all_at(&bytes, offset).unwrap();
    }
    disk.sync_all().unwrap();
    run("cmp", &[&expected, &mount.disk]);
    drop(disk);
    mount.unmount();
    rig.check();
    rig.compare(&expected);
}

fn shows_it_to_every_reader(rig: &Rig) {
    let mount = rig.mount();
    let disk = File::options().write(true).open(&mount.disk).unwrap();
    let other = File::open(&mount.disk).unwrap();
    let bytes = noise(7, 10_000);
    disk.write_all_at(&bytes, 123_456).unwrap();
    let mut seen = vec![0; bytes.len()];
    other.read_exact_at(&mut seen, 123_456).unwrap();
    assert!(seen == bytes);
    assert_eq!(disk.metadata().unwrap().len(), DISK);
}

fn takes_writes_from_many_threads(rig: &Rig) {
    const THREADS: u64 = 8;
    const PIECE: usize = 20_000;
    let expected = rig.expected();
    let model = File::options().write(true).open(&expected).unwrap();
    let mount = rig.mount();
    let disk = File::options()
        .read(true)
        .write(true)
        .open(&mount.disk)
        .unwrap();
    thread::scope(|scope| {
        for thread in 0..THREADS {
            let (disk, model) = (&disk, &model);
            scope.spawn(move || {
                // Neighbours share sectors and clusters.
                for round in 0..12 {
                    let piece = round * THREADS + thread;
                    let offset = (1 << 20) + piece * PIECE as u64;
                    let bytes = noise(piece, PIECE);
                    disk.write_all_at(&bytes, offset).unwrap();
                    model.write_all_at(&bytes, offset).unwrap();
                    let mut seen = vec![0; PIECE];
                    disk.read_exact_at(&mut seen, offset).unwrap();
                    assert!(seen == bytes, "piece {piece}");
                }
            });
        }
    });
    drop(disk);
    mount.unmount();
    rig.check();
    rig.compare(&expected);
}

fn allocates_inside_the_disk(rig: &Rig) {
    let mount = rig.mount();
    let disk = File::options().write(true).open(&mount.disk).unwrap();
    fallocate(&disk, 0, DISK / 2 + 5, 3 << 20).unwrap();
    assert_eq!(disk.metadata().unwrap().len(), DISK);
    assert_eq!(
        errno(fallocate(&disk, libc::FALLOC_FL_KEEP_SIZE, DISK, 512)),
        Errno::EOPNOTSUPP
    );
    let collapse = libc::FALLOC_FL_COLLAPSE_RANGE;
    assert_eq!(errno(fallocate(&disk, collapse, 0, 512)), Errno::EOPNOTSUPP);
    drop(disk);
    mount.unmount();
    rig.check();
    rig.compare(rig.originals.raw());
    let allocated = fs::metadata(&rig.image).unwrap().blocks() * 512;
    assert!(allocated >= 3 << 20, "{allocated}");
}

fn reads_and_writes_directly(rig: &Rig) {
    let mount = rig.mount();
    let from = format!("if={}", mount.disk.display());
    let copy = rig.path("copy");
    let to = format!("of={}", copy.display());
    run("dd", &[&from, &to, "iflag=direct", "bs=1M", "status=none"]);
    run("cmp", &[rig.originals.raw(), &copy]);
    let disk = File::options()
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(&mount.disk)
        .unwrap();
    let expected = rig.expected();
    // The kernel wants an aligned buffer: let dd have one.
    drop(disk);
    let bytes = rig.path("bytes");
    fs::write(&bytes, noise(3, 1 << 20)).unwrap();
    for target in [&mount.disk, &expected] {
        let from = format!("if={}", bytes.display());
        let to = format!("of={}", target.display());
        let how = [
            "bs=64k",
            "seek=100",
            "conv=notrunc",
            "oflag=direct",
            "status=none",
        ];
        run(
            "dd",
            &[&[from.as_str(), to.as_str()][..], &how[..]].concat(),
        );
    }
    mount.unmount();
    rig.check();
    rig.compare(&expected);
}

fn lives_as_a_loop_device(rig: &Rig) {
    let expected = rig.expected();
    let model = File::options().write(true).open(&expected).unwrap();
    let mount = rig.mount();
    let device = crate::tools::LoopDevice::attach(&mount.disk);
    assert_eq!(device.size(), DISK);
    let block = File::options().write(true).open(&device.0).unwrap();
    let bytes = noise(11, 300_000);
    block.write_all_at(&bytes, 4 << 20).unwrap();
    model.write_all_at(&bytes, 4 << 20).unwrap();
    block.sync_all().unwrap();
    drop(block);
    device.detach();
    mount.unmount();
    rig.check();
    rig.compare(&expected);
}

fn keeps_the_times_that_it_is_given(rig: &Rig) {
    let then = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    let mount = rig.mount();
    let file = File::options().write(true).open(&mount.disk).unwrap();
    // In the disk, and behind its end as a copy does it.
    for offset in [0, DISK] {
        file.write_all_at(&noise(5, 4096), offset).unwrap();
        file.set_modified(then).unwrap();
        assert_eq!(file.metadata().unwrap().modified().unwrap(), then);
    }
    drop(file);
    let times = |path: &Path| fs::metadata(path).unwrap().modified().unwrap();
    assert_eq!(times(&mount.disk), then);
    mount.unmount();
    assert_eq!(times(&rig.image), then);
}

fn looks_like_a_file(rig: &Rig) {
    let mount = rig.mount();
    let shown = fs::metadata(&mount.disk).unwrap();
    let image = fs::metadata(&rig.image).unwrap();
    assert!(shown.is_file());
    assert_eq!(shown.len(), DISK);
    assert_eq!(shown.blocks(), image.blocks());
    assert!(shown.blksize() >= 4096, "{}", shown.blksize());
    assert_eq!(
        (shown.uid(), shown.gid(), shown.mode(), shown.mtime()),
        (image.uid(), image.gid(), image.mode(), image.mtime())
    );
}
