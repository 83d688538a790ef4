//! Each field that is checked, damaged: its own refusal, nothing else.

use super::format::{header, marker};
use crate::error::{Failure, FailureKind};
use crate::field_tests::{self, Variant};
use crate::findings::Repair;
use crate::proto::{Create, Format, Preallocation, Reply, Request};
use crate::testing::{FRESH, Session};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;

pub const GRAIN: usize = 65536;

/// A session that has made a new image.
fn created(options: &[(&str, &str)]) -> Session {
    let owned = |&(key, value): &(&str, &str)| (key.to_string(), value.to_string());
    let mut session = Session::default();
    let reply = session.call(Request::Create {
        create: Create {
            format: Format::Vmdk,
            size: 40 << 20,
            options: options.iter().map(owned).collect(),
            backing: None,
            backing_size: None,
            backing_identity: None,
        },
        name: "disk.vmdk".to_string(),
        fresh: FRESH,
    });
    let Ok(Reply::Plan(reply)) = reply else {
        panic!("not a plan: {reply:?}");
    };
    session.host.apply(&reply.plan);
    session
}

/// A new image with data in its first grain.
pub fn image() -> Vec<u8> {
    let session = created(&[]);
    let mut image = session.host.image;
    let sector = (image.len() / 512) as u32;
    for directory in [48, 56] {
        let table = table(&image, directory);
        put(&mut image, table, &sector.to_le_bytes());
    }
    let len = image.len() + GRAIN;
    image.resize(len, 7);
    image
}

/// Host offset of the first table of the directory that a header field names.
pub fn table(image: &[u8], field: usize) -> usize {
    let directory = le32(image, field) * 512;
    le32(image, directory) * 512
}

pub fn le32(image: &[u8], at: usize) -> usize {
    u32::from_le_bytes(image[at..at + 4].try_into().unwrap()) as usize
}

pub fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

/// Opens, reads and grows. The first refusal.
pub fn exercise(image: Vec<u8>) -> Result<(), Failure> {
    let before = image.clone();
    let mut session = Session::new(image);
    let answer = session.open(Some(Format::Vmdk)).and_then(|facts| {
        session.read(0, facts.virtual_size.min(4 << 20))?;
        let _ = session.call(Request::Check {
            repair: Some(Repair::All),
        });
        if facts.unsettled.is_some() {
            session.call(Request::Settle)?;
        }
        if facts.virtual_size > 512 {
            session.call(resize(512))?;
        }
        session.call(resize(600 << 20)).map(|_| ())
    });
    assert!(session.host.image == before, "the image has changed");
    answer
}

pub fn resize(size: u64) -> Request {
    Request::Resize {
        size,
        preallocation: Preallocation::Off,
        shrink: true,
        backing_size: None,
    }
}

/// What every image of these tests is refused with.
#[track_caller]
pub fn refused(image: Vec<u8>, words: &str) {
    let variant = Variant::new(words, image.clone());
    field_tests::exercise(&variant, Format::Vmdk);
    let failure = exercise(image).expect_err(words);
    assert!(failure.message.contains(words), "{words}: {failure}");
    assert!(
        matches!(
            failure.kind,
            FailureKind::Damaged | FailureKind::Unsupported
        ),
        "{failure:?}"
    );
}

#[test]
fn each_damaged_field_of_the_header_is_refused_by_name() {
    let u64s = |value: u64| value.to_le_bytes().to_vec();
    let u32s = |value: u32| value.to_le_bytes().to_vec();
    let far = u64s(1 << 40);
    let cases = [
        (header::VERSION, u32s(4), "Unsupported VMDK version 4"),
        (header::VERSION, u32s(0), "Unsupported VMDK version 0"),
        (header::CAPACITY, u64s(1 << 60), "capacity of"),
        (header::CAPACITY, u64s(1 << 50), "grain directory of"),
        (header::GRAIN_SIZE, u64s(0), "grainSize is 0"),
        (header::GRAIN_SIZE, u64s(100), "grainSize is 100"),
        (header::GRAIN_SIZE, u64s(1 << 30), "grainSize is 1073741824"),
        (header::DESCRIPTOR_OFFSET, far.clone(), "descriptorOffset"),
        (header::DESCRIPTOR_SIZE, far.clone(), "descriptorSize"),
        (header::TABLE_ENTRIES, u32s(0), "numGTEsPerGT is 0"),
        (header::TABLE_ENTRIES, u32s(513), "numGTEsPerGT is 513"),
        (header::REDUNDANT_DIRECTORY, far.clone(), "rgdOffset"),
        (header::REDUNDANT_DIRECTORY, u64s(0), "rgdOffset"),
        (header::DIRECTORY, far.clone(), "gdOffset"),
        (header::DIRECTORY, u64s(u64::MAX - 1), "gdOffset"),
        (header::DIRECTORY, u64s(u64::MAX), "Invalid footer"),
        (header::OVERHEAD, far, "File truncated, expecting"),
        (header::NEWLINES, vec![b'\n'; 4], "newline bytes"),
        (header::COMPRESSION, vec![2, 0], "compressAlgorithm is 2"),
    ];
    for (at, bytes, words) in cases {
        let mut image = image();
        put(&mut image, at, &bytes);
        refused(image, words);
    }
    refused(image()[..60].to_vec(), "header is cut short");
    refused(image()[..500].to_vec(), "File truncated");
}

#[test]
fn each_damaged_entry_is_refused_by_number() {
    let mut damaged = image();
    let directory = le32(&damaged, header::DIRECTORY) * 512;
    put(&mut damaged, directory, &[0xff; 4]);
    refused(damaged, "grain directory entry 0");
    let mut damaged = image();
    let at = table(&damaged, header::DIRECTORY);
    put(&mut damaged, at + 4, &[0xff; 4]);
    refused(damaged, "grain table entry of grain 1: the grain at sector");
    let mut damaged = image();
    put(&mut damaged, at + 4, &[2, 0, 0, 0]);
    refused(damaged, "grain table entry of grain 1: sector 2 lies in");
    let mut damaged = image();
    let first = damaged[directory..directory + 4].to_vec();
    put(&mut damaged, directory + 4, &first);
    refused(damaged, "is that of another entry, too");
    let mut unclean = image();
    put(&mut unclean, header::UNCLEAN, &[1]);
    put(&mut unclean, at + 4, &[0x81, 0, 0, 0]);
    refused(unclean, "grain table 0 differs from its redundant copy");
}

/// Replaces a text in the descriptor of the image with one of the same length.
pub fn edited(from: &str, to: &str) -> Vec<u8> {
    let mut image = image();
    let text = String::from_utf8(image[512..21 * 512].to_vec()).unwrap();
    assert!(text.contains(from), "{text}");
    let mut text = text.replacen(from, to, 1).into_bytes();
    text.resize(20 * 512, 0);
    put(&mut image, 512, &text);
    image
}

#[test]
fn each_damaged_line_of_the_descriptor_is_refused() {
    let line = "RW 81920 SPARSE \"disk.vmdk\"";
    let cases = [
        ("createType=", "kind=", "createType is missing"),
        ("\nCID=", "\nCAD=", "CID is missing"),
        ("parentCID=", "parent=", "parentCID is missing"),
        (
            "parentCID=ffffffff",
            "parentCID=none",
            "parentCID is 'none'",
        ),
        (line, "RW many SPARSE \"x\"", "no number of sectors"),
        (line, "RW 0 SPARSE \"x\"", "impossible number of sectors"),
        (line, "RW 81920 STRANGE \"x\"", "unknown type"),
        (line, "RW 81920 VMFSSPARSE \"x\"", "of type VMFSSPARSE"),
        (line, "RW 81920 SESPARSE \"x\"", "of type SESPARSE"),
        (line, "RW 81920 VMFSRDM \"x\"", "of type VMFSRDM"),
        (line, "RW 81920 SPARSE x", "no file name"),
        (line, "RW 81920 SPARSE \"\"", "empty or too long"),
        (line, "RW 81920 SPARSE \"x\" 7", "where none is possible"),
        (line, "RW 81920 FLAT \"x\"", "no offset"),
        (line, "RW 81920 FLAT \"x\" -1", "impossible offset"),
        (line, "NOACCESS 81920 SPARSE \"x\"", "says NOACCESS"),
        (line, "", "has 0 extents instead of one"),
        (
            "parentCID=ffffffff",
            "parentCID=01234567",
            "the child of another",
        ),
        (
            "# The",
            "parentFileNameHint=\"x\"\n#",
            "the child of another",
        ),
        ("# The", "changeTrackPath=\"x\"\n#", "changeTrackPath"),
    ];
    for (from, to, words) in cases {
        refused(edited(from, to), words);
    }
}

#[test]
fn kinds_of_images_that_are_not_handled_are_refused_by_name() {
    let text = |kind: &str| {
        format!(
            "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"{kind}\"\n"
        )
        .into_bytes()
    };
    for kind in ["custom", "fullDevice", "vmfsSparse", "seSparse", "vmfsRDM"] {
        refused(text(kind), &format!("Unsupported image type '{kind}'"));
    }
    refused(vec![b'#'; 2 << 20], "at most 1048576 are possible");
    refused(b"COWD and so on".to_vec(), "(COWD)");
    let mut version_3 = image();
    put(&mut version_3, header::VERSION, &[3]);
    refused(version_3, "VMDK version 3 must be read only");
}

#[test]
fn a_compressed_grain_is_refused_where_its_marker_or_its_data_is_wrong() {
    let with = |len: u32, data: &[u8]| {
        let mut image = image();
        put(&mut image, header::FLAGS, &0x30003u32.to_le_bytes());
        put(&mut image, header::COMPRESSION, &[1, 0]);
        let grain = image.len() - GRAIN;
        put(&mut image, grain + marker::SIZE, &len.to_le_bytes());
        put(&mut image, grain + marker::GRAIN_LEN, data);
        image
    };
    let full = miniz_oxide::deflate::compress_to_vec_zlib(&[5; GRAIN], 6);
    let short = miniz_oxide::deflate::compress_to_vec_zlib(&[5; GRAIN - 1], 6);
    let long = miniz_oxide::deflate::compress_to_vec_zlib(&[5; GRAIN + 1], 6);
    let mut wrong = full.clone();
    *wrong.last_mut().unwrap() ^= 1;
    let len = full.len() as u32;
    refused(with(0, &full), "its marker says 0 bytes");
    refused(with(u32::MAX, &full), "its marker says 4294967295 bytes");
    refused(with(len - 5, &full), "its data is cut short");
    refused(with(short.len() as u32, &short), "ends before the grain");
    refused(with(long.len() as u32, &long), "longer than a grain");
    refused(with(len, &wrong), "the checksum of its data is wrong");
    refused(with(len, &[0xff; 64]), "its data is no zlib stream");
    refused(with(len, &full), "cannot be changed");
}

/// An image of one sparse extent in a file of its own.
pub fn split() -> (Vec<u8>, Vec<u8>) {
    let mut session = created(&[("subformat", "twoGbMaxExtentSparse")]);
    let extent = session.host.others.remove(0).expect("an extent");
    (session.host.image, extent)
}

/// The refusals of an image of several files.
#[track_caller]
fn files_refused(image: Vec<u8>, others: Vec<Vec<u8>>, words: &str) {
    let variant = Variant {
        name: words.to_string(),
        image,
        others,
    };
    let refusals = field_tests::exercise(&variant, Format::Vmdk);
    let found = refusals.iter().any(|it| it.message.contains(words));
    assert!(found, "{words}: {refusals:?}");
}

#[test]
fn each_damaged_extent_in_a_file_of_its_own_is_refused_by_name() {
    let u64s = |value: u64| value.to_le_bytes().to_vec();
    let cases = [
        (0, b"KDMW".to_vec(), "does not begin with KDMV"),
        (0, b"COWD".to_vec(), "it is an ESX sparse extent (COWD)"),
        (header::COMPRESSION, vec![1, 0], "its grains are compressed"),
        (header::CAPACITY, u64s(0), "its capacity is 0"),
        (
            header::CAPACITY,
            u64s(81919),
            "the descriptor says 81920 sectors, the extent's header 81919",
        ),
        (header::VERSION, vec![3], "VMDK version 3 must be read only"),
    ];
    let (image, extent) = split();
    for (at, bytes, words) in cases {
        let mut extent = extent.clone();
        put(&mut extent, at, &bytes);
        files_refused(image.clone(), vec![extent], words);
    }
}

#[test]
fn extents_that_do_not_go_together_are_refused() {
    let (image, extent) = split();
    let text = String::from_utf8(image).unwrap();
    let line = text
        .lines()
        .find(|line| line.starts_with("RW"))
        .unwrap()
        .to_string();
    let flat = "RW 81920 FLAT \"disk-f001.vmdk\" 0";
    let later = "RW 81920 FLAT \"disk-f001.vmdk\" 81920";
    let huge = "RW 18014398509481983 ZERO\nRW 18014398509481983 ZERO";
    let cases = [
        (format!("{line}\n{line}"), 1, "names the sparse extent"),
        (format!("{line}\n{flat}"), 2, "are not of one kind"),
        (format!("{flat}\n{later}"), 1, "lie in one file"),
        (line.replace("RW", "RDONLY"), 1, "says RDONLY"),
        (String::new(), 0, "no extents whose kind"),
        (
            line.replace("-s001", ""),
            1,
            "does not end with a number that could go on",
        ),
        (huge.to_string(), 0, "are too long together"),
        ("RW 1 ZERO\n".repeat(5000), 0, "extents"),
    ];
    for (lines, files, words) in cases {
        let image = text.replacen(&line, &lines, 1).into_bytes();
        files_refused(image, vec![extent.clone(); files], words);
    }
}

#[test]
fn files_that_a_resize_left_go_before_the_next() {
    let (mut image, extent) = split();
    image.extend(b"# instar: leftover files 1 \"disk-s002.vmdk\"\n");
    let words = "a resize was interrupted, and files that it left";
    files_refused(image, vec![extent], words);
}

#[test]
fn extents_that_begin_between_grains_take_no_new_data() {
    let (image, extent) = split();
    let text = String::from_utf8(image).unwrap();
    let lines = "RW 7 FLAT \"f\" 0\nRW 81920 SPARSE";
    let image = text.replacen("RW 81920 SPARSE", lines, 1).into_bytes();
    let mut session = Session::new(image);
    session.host.others = vec![Some(vec![0; 4096]), Some(extent)];
    let facts = session.open(Some(Format::Vmdk)).unwrap();
    let words = "writing into extents that differ in their grains";
    assert!(facts.no_write.unwrap().message.starts_with(words));
}

#[test]
fn new_data_is_refused_where_the_tables_are_damaged() {
    let mut damaged = image();
    let at = table(&damaged, header::DIRECTORY);
    put(&mut damaged, at, &[2, 0, 0, 0]);
    let words = "grain table entry of grain 0: sector 2 lies in the metadata";
    let ends = |refusals: &[Failure], end: &str| {
        refusals
            .iter()
            .any(|it| it.message.starts_with(&format!("{words}{end}")))
    };
    let refusals = field_tests::exercise(&Variant::new(words, damaged), Format::Vmdk);
    assert!(ends(&refusals, ";"), "{refusals:?}");
    assert!(ends(&refusals, ", which ends with sector"), "{refusals:?}");
    let mut damaged = image();
    for field in [header::DIRECTORY, header::REDUNDANT_DIRECTORY] {
        let directory = le32(&damaged, field) * 512;
        put(&mut damaged, directory, &[0; 4]);
    }
    let words = "grain directory entry 0 has no grain table for new data";
    files_refused(damaged, Vec::new(), words);
}

#[test]
fn headers_that_are_not_handled_are_refused_by_name() {
    let mut narrow = image();
    put(&mut narrow, header::TABLE_ENTRIES, &256u32.to_le_bytes());
    let words = "the header's numGTEsPerGT is 256; only images with 512 are resized";
    files_refused(narrow, Vec::new(), words);
    let mut large = image();
    put(&mut large, header::COMPRESSION, &[1, 0]);
    put(&mut large, header::GRAIN_SIZE, &16384u64.to_le_bytes());
    let words = "grainSize makes compressed grains of 8388608 bytes";
    refused(large, words);
    let mut empty = edited("monolithicSparse", "monolithicFlat");
    put(&mut empty, header::CAPACITY, &[0; 8]);
    let words = "Unsupported image type 'monolithicFlat' in a descriptor";
    refused(empty, words);
}

#[test]
fn each_damaged_footer_is_refused() {
    let stream = |end: &[u8]| {
        let mut image = image();
        image.extend(end);
        put(&mut image, header::DIRECTORY, &[0xff; 8]);
        image
    };
    let mut end = vec![0; 3 * 512];
    end[marker::TYPE] = marker::FOOTER as u8;
    refused(stream(&end), "it does not begin with KDMV");
    put(&mut end, 512, b"KDMV");
    end[1024 + marker::TYPE] = 9;
    refused(stream(&end), "no end-of-stream marker follows it");
    let mut short = image()[..512].to_vec();
    put(&mut short, header::DIRECTORY, &[0xff; 8]);
    refused(short, "the file ends before it");
}

#[test]
fn every_check_has_a_damaged_image() {
    let tests: &[fn()] = &[
        each_damaged_field_of_the_header_is_refused_by_name,
        each_damaged_entry_is_refused_by_number,
        each_damaged_line_of_the_descriptor_is_refused,
        each_damaged_extent_in_a_file_of_its_own_is_refused_by_name,
        each_damaged_footer_is_refused,
        extents_that_do_not_go_together_are_refused,
        files_that_a_resize_left_go_before_the_next,
        extents_that_begin_between_grains_take_no_new_data,
        new_data_is_refused_where_the_tables_are_damaged,
        headers_that_are_not_handled_are_refused_by_name,
        kinds_of_images_that_are_not_handled_are_refused_by_name,
        a_compressed_grain_is_refused_where_its_marker_or_its_data_is_wrong,
    ];
    let exceptions = [
        (
            "open.rs",
            "the file ends inside the header's sector",
            "what the header names lies behind that sector, and inside the file",
        ),
        (
            "edit.rs",
            "neither extents nor a place for them",
            "an image without extents has been refused before",
        ),
        (
            "scan.rs",
            "the grain tables are in no order",
            "it takes 65536 of them",
        ),
        (
            "files.rs",
            "the image has no descriptor of its own",
            "only images of several files get there",
        ),
        (
            "files.rs",
            "let name = next_name(last, 1)",
            "an image without extents has been refused before",
        ),
        ("options.rs", "creating streamOptimized", "the request"),
        (
            "descriptor.rs",
            "the descriptor is {} bytes long",
            "no longer text is read",
        ),
    ];
    field_tests::every_check_refuses("vmdk", tests, &exceptions);
}

#[test]
fn random_damage_is_answered_or_refused() {
    let image = image();
    let hot: Vec<usize> = (0..image.len() - GRAIN)
        .filter(|&at| at < 80 || image[at] != 0)
        .collect();
    let mut state = 99u64;
    let mut random = |below: usize| {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 33) as usize % below
    };
    let mut failures = 0;
    for _ in 0..600 {
        let mut damaged = image.clone();
        for _ in 0..1 + random(3) {
            damaged[hot[random(hot.len())]] ^= 1 << random(8);
        }
        if let Err(failure) = exercise(damaged) {
            let about_us = matches!(failure.kind, FailureKind::Internal | FailureKind::Io);
            assert!(!about_us && !failure.message.is_empty(), "{failure:?}");
            failures += 1;
        }
    }
    assert!((60..580).contains(&failures), "{failures} refused");
}

#[test]
fn a_directory_without_entries_has_to_lie_inside_the_file_all_the_same() {
    for (field, name) in [(header::DIRECTORY, "gdOffset"), (48, "rgdOffset")] {
        let mut empty = image();
        put(&mut empty, header::CAPACITY, &[0; 8]);
        put(&mut empty, field, &(u64::MAX / 512).to_le_bytes());
        refused(empty, &format!("the header's {name} is sector"));
    }
}

#[test]
fn tables_of_another_length_are_neither_settled_nor_resized() {
    let mut foreign = image();
    put(&mut foreign, header::TABLE_ENTRIES, &256u32.to_le_bytes());
    put(&mut foreign, header::CAPACITY, &40960u64.to_le_bytes());
    put(&mut foreign, header::OVERHEAD, &22u64.to_le_bytes());
    let mut session = Session::new(foreign.clone());
    let facts = session.open(Some(Format::Vmdk)).unwrap();
    assert_eq!(facts.unsettled, None);
    assert!(facts.no_resize.is_some());
    refused(foreign, "the header's numGTEsPerGT is 256");
}
