//! VHD images of the tests: made by qemu or by hand, filled by qemu-io, and a
//! second reader that goes by the specification alone.

use crate::disk::Random;
use crate::lab::Lab;
use instar_guest::testing::Session;
use std::process::Command;

/// KiB, MiB, GiB.
pub const K: u64 = 1 << 10;
pub const M: u64 = 1 << 20;
pub const G: u64 = 1 << 30;

/// An image that another program made.
pub fn sample(lab: &Lab, name: &str) -> Vec<u8> {
    let packed = format!(
        "{}/tests/engine/data/{name}.bz2",
        env!("CARGO_MANIFEST_DIR")
    );
    let output = Command::new("bzip2").args(["-dc", &packed]).output();
    let output = output.expect("bzip2 is installed");
    assert!(output.status.success(), "{name} is not packed as expected");
    lab.write(name, &output.stdout);
    output.stdout
}

/// Runs `qemu-io` commands on `disk.vhd`.
pub fn qemu_io(lab: &Lab, commands: &[String]) {
    let mut words = vec!["-f", "vpc"];
    for command in commands {
        words.extend(["-c", command]);
    }
    words.push("disk.vhd");
    let output = lab.run("qemu-io", &words);
    assert!(!output.contains("failed"), "qemu-io {commands:?}: {output}");
}

/// Commands that write patterns all over a disk.
pub fn scatter(size: u64, count: u64, seed: u64) -> Vec<String> {
    let mut random = Random(seed);
    let write = |_| {
        let at = random.below(size / 512) * 512;
        let len = (random.below(400) * 512 + 512).min(size - at);
        format!("write -P {} {at} {len}", 1 + random.below(255))
    };
    (0..count).map(write).collect()
}

/// What qemu reads from an image.
pub fn qemu_reads(lab: &Lab, image: &[u8]) -> Vec<u8> {
    lab.write("judged.vhd", image);
    lab.qemu_img("convert -f vpc -O raw judged.vhd judged.raw");
    lab.bytes("judged.raw")
}

/// The image, opened for writing.
pub fn opened(image: Vec<u8>) -> Session {
    let mut session = Session::new(image);
    session
        .open(Some(instar_guest::Format::Vhd))
        .expect("the image opens");
    session
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// One's complement of the sum of all bytes but the checksum's.
pub fn sum(bytes: &[u8], at: usize) -> u32 {
    let others = bytes[..at].iter().chain(&bytes[at + 4..]);
    !others.map(|&byte| u32::from(byte)).sum::<u32>()
}

/// Seals what was changed in a footer or header.
pub fn seal(bytes: &mut [u8], at: usize) {
    let sum = sum(bytes, at);
    bytes[at..at + 4].copy_from_slice(&sum.to_be_bytes());
}

fn is_footer(sector: &[u8]) -> bool {
    sector.starts_with(b"conectix") && be32(sector, 64) == sum(sector, 64)
}

/// The disk as a reader sees it that goes by the specification: the footer at
/// the end counts, the copy at the start where that is damaged; the size is the
/// one that the footer names; a sector without its bit is zero.
pub fn specification_reads(image: &[u8]) -> Vec<u8> {
    let last = &image[image.len() - 512..];
    let footer = match is_footer(last) {
        true => last,
        false => &image[..512],
    };
    assert!(is_footer(footer), "no footer is valid");
    let size = be64(footer, 48) as usize;
    if be32(footer, 60) == 2 {
        return image[..size].to_vec();
    }
    let at = be64(footer, 16) as usize;
    let header = &image[at..at + 1024];
    assert!(header.starts_with(b"cxsparse"));
    assert_eq!(be32(header, 36), sum(header, 36));
    let (table, count) = (be64(header, 16) as usize, be32(header, 28) as usize);
    let block = be32(header, 32) as usize;
    assert!(count * block >= size, "{count} entries are too few");
    let bitmap = (block / 512).div_ceil(8).next_multiple_of(512);
    let mut disk = vec![0; size];
    for (index, target) in disk.chunks_mut(block).enumerate() {
        let entry = be32(image, table + 4 * index);
        if entry == u32::MAX {
            continue;
        }
        let at = entry as usize * 512;
        let data = at + bitmap..at + bitmap + target.len();
        if image[at..at + bitmap].iter().all(|&byte| byte == 0xff) {
            target.copy_from_slice(&image[data]);
            continue;
        }
        for (number, sector) in target.chunks_mut(512).enumerate() {
            let bit = image[at + number / 8] >> (7 - number % 8) & 1;
            if bit == 1 {
                let from = at + bitmap + number * 512;
                sector.copy_from_slice(&image[from..from + sector.len()]);
            }
        }
    }
    disk
}
