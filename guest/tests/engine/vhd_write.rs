//! Writing to VHD images: random writes as the host makes them, against a model
//! of the disk, qemu and the specification.

use crate::disk::Random;
use crate::lab::{Check, Lab, purposes};
use crate::vhd_lab::{M, opened, qemu_io, qemu_reads, scatter, specification_reads};
use instar_guest::plan::Purpose;
use instar_guest::proto::{Content, Place, Preallocation};
use instar_guest::testing::Session;
use instar_guest::{ExtentKind, FailureKind, Host, Read, Reply, Request};

/// All checks by name.
pub fn trials() -> Vec<(String, Check)> {
    let cases: [(&str, &str, bool); 4] = [
        ("dynamic", "force_size=on", false),
        ("fixed", "subformat=fixed,force_size=on", false),
        ("taken_back", "force_size=on", true),
        ("sparse_bitmaps", "force_size=on", false),
    ];
    cases
        .into_iter()
        .map(|(name, options, undo)| {
            let check: Check = Box::new(move || check(name, options, undo));
            (format!("vhd_writes::{name}"), check)
        })
        .collect()
}

const SIZE: u64 = 30 * M + 512;

struct Disk {
    session: Session,
    content: Vec<u8>,
}

fn check(name: &str, options: &str, undo: bool) {
    let lab = Lab::new();
    lab.qemu_img(&format!("create -q -f vpc -o {options} disk.vhd {SIZE}"));
    qemu_io(&lab, &scatter(SIZE, 4, 11));
    let mut image = lab.bytes("disk.vhd");
    if name == "sparse_bitmaps" {
        let content = qemu_reads(&lab, &image);
        clear_bits_of_zeroes(&mut image);
        assert!(specification_reads(&image) == content);
    }
    let mut disk = Disk {
        content: qemu_reads(&lab, &image),
        session: opened(image),
    };
    assert_eq!(disk.session.open(None).unwrap().no_write, None);
    let mut random = Random(name.len() as u64 * 77 + 5);
    for round in 0..30 {
        let at = random.below(SIZE / 512) * 512;
        let len = (random.below(300) * 512 + 512).min(SIZE - at);
        let data = vec![random.below(256) as u8; len as usize];
        disk.write(at, &data, undo && random.below(3) == 0);
        disk.check_mapping(&mut random);
        if random.below(8) == 0 || round == 29 {
            disk.flush();
            disk.judge(&lab);
        }
    }
    disk.session.open(None).unwrap();
    let grow = Request::Resize {
        size: SIZE + 260 * M,
        preallocation: Preallocation::Off,
        shrink: false,
        backing_size: None,
    };
    let Ok(Reply::Plan(reply)) = disk.session.call(grow) else {
        panic!("no plan");
    };
    disk.session.host.apply(&reply.plan);
    disk.content.resize((SIZE + 260 * M) as usize, 0);
    disk.judge(&lab);
}

/// Clears the bits of all sectors that are zero, as programs leave them that go
/// by the specification.
fn clear_bits_of_zeroes(image: &mut [u8]) {
    for entry in 0..16 {
        let at = 1536 + 4 * entry;
        let sector = u32::from_be_bytes(image[at..at + 4].try_into().unwrap());
        if sector == u32::MAX {
            continue;
        }
        let (bitmap, data) = image[sector as usize * 512..].split_at_mut(512);
        for (number, sector) in data.chunks(512).take(4096).enumerate() {
            if sector.iter().all(|&byte| byte == 0) {
                bitmap[number / 8] &= !(0x80 >> (number % 8));
            }
        }
    }
}

impl Disk {
    fn write(&mut self, at: u64, data: &[u8], undo: bool) {
        let len = data.len() as u64;
        let request = || Request::Allocate { offset: at, len };
        let mut reply = self.session.call(request());
        if let Err(FailureKind::FlushFirst) = reply.as_ref().map_err(|failure| failure.kind) {
            self.flush();
            self.assert_footer();
            reply = self.session.call(request());
        }
        let places = match reply {
            Ok(Reply::Placed(places)) => places,
            other => panic!("not an answer to Allocate: {other:?}"),
        };
        let footer = self.session.host.image.len() as u64 - 512;
        let inside = |place: &Place| place.at + place.len <= footer;
        assert!(places.iter().all(inside), "{places:?} reach the footer");
        let range = at as usize..(at + len) as usize;
        let old = self.content[range.clone()].to_vec();
        self.content[range.clone()].copy_from_slice(data);
        let mut next = at;
        for place in &places {
            assert_eq!(place.offset, next, "a gap between places");
            next += place.len;
            self.fill(place, undo);
        }
        assert_eq!(next, at + len);
        if undo {
            self.content[range].copy_from_slice(&old);
            for place in places.iter().filter(|p| p.content == Content::Current) {
                self.fill(place, false);
            }
            assert_eq!(self.session.call(Request::Undo), Ok(Reply::Done));
        }
    }

    /// Writes what differs from the place's content; or garbage.
    fn fill(&mut self, place: &Place, garbage: bool) {
        let wanted = &self.content[place.offset as usize..][..place.len as usize];
        let file = &mut self.session.host.image;
        let (at, len) = (place.at as usize, place.len as usize);
        file.resize(file.len().max(at + len), 0);
        let target = &mut file[at..at + len];
        if garbage {
            return target.fill(0xee);
        }
        match place.content {
            Content::Zero => assert!(target.iter().all(|&byte| byte == 0), "{place:?}"),
            Content::Current => {}
            Content::Stale => panic!("{place:?}"),
        }
        target.copy_from_slice(wanted);
    }

    /// The file ends with the footer that it begins with, or has no other.
    fn assert_footer(&self) {
        let image = &self.session.host.image;
        let end = &image[image.len() - 512..];
        assert!(end.starts_with(b"conectix"));
    }

    fn flush(&mut self) {
        let Ok(Reply::Plan(reply)) = self.session.call(Request::Flush) else {
            panic!("no plan");
        };
        let purposes = purposes(&reply.plan);
        assert!(!purposes.contains(&Purpose::Commit), "{purposes:?}");
        assert!(
            purposes
                .first()
                .is_none_or(|&first| first == Purpose::Prepare)
        );
        self.session.host.apply(&reply.plan);
    }

    /// The engine reads what was written, flushed or not.
    fn check_mapping(&mut self, random: &mut Random) {
        let from = random.below(SIZE / 512) * 512;
        let len = (random.below(9000) * 512 + 512).min(SIZE - from);
        for extent in self.session.map(from, len).expect("a mapping") {
            let wanted = &self.content[extent.offset as usize..][..extent.len as usize];
            let mut found = vec![0; wanted.len()];
            if let ExtentKind::Data { file, at, .. } = extent.kind {
                let read = Read {
                    file,
                    offset: at,
                    buf: &mut found,
                };
                self.session.host.read(&mut [read]).unwrap();
            }
            assert!(found == wanted, "{extent:?} reads something else");
        }
    }

    fn judge(&self, lab: &Lab) {
        let image = &self.session.host.image;
        assert!(qemu_reads(lab, image) == self.content, "qemu");
        assert!(specification_reads(image) == self.content, "specification");
        let mut fresh = opened(image.clone());
        assert_eq!(fresh.open(None).unwrap().unsettled, None);
        let check = Request::Check { repair: None };
        let Ok(Reply::Checked { report, .. }) = fresh.call(check) else {
            panic!("no report");
        };
        assert_eq!((report.corruptions, report.check_errors), (0, 0));
    }
}
