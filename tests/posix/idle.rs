//! What many images cost that nobody asks anything of.

use crate::names::listing;
use crate::rig::{Mount, Rig};
use crate::tools::{eventually, run};
use crate::{Claim, claim};
use instar::fs::Options;
use nix::unistd::Pid;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

/// What is proven here.
pub const CLAIMS: &[Claim] = &[
    claim(
        "a_thousand_images_are_listed_in_little_memory",
        &[],
        a_thousand_images_are_listed,
    ),
    claim(
        "open_images_that_are_idle_have_no_sandbox",
        &["qemu-io"],
        open_images_that_are_idle,
    ),
];

/// What an image that is listed, or open and idle, may take of the daemon's
/// memory, in bytes.
const EACH: u64 = 64 << 10;
/// Images that are listed.
const LISTED: u64 = 1000;
/// Images that are open.
const OPEN: usize = 200;
/// Sandboxes that may wait for the next image.
const WAITING: usize = 4;

/// Memory of a process, in bytes.
fn resident(pid: Pid) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kibibytes = line.unwrap().trim().trim_end_matches(" kB");
    kibibytes.parse::<u64>().unwrap() << 10
}

/// Makes copies of a small image with some data in SOURCE.
fn copies(rig: &Rig, count: u64) -> Vec<PathBuf> {
    let first = rig.source().join("n-0000.qcow2");
    let path = first.to_str().unwrap();
    run("qemu-img", &["create", "-q", "-f", "qcow2", path, "1M"]);
    let names = (0..count).map(|number| rig.source().join(format!("n-{number:04}.qcow2")));
    let names: Vec<PathBuf> = names.collect();
    for name in &names[1..] {
        fs::copy(&first, name).unwrap();
    }
    names
}

fn a_thousand_images_are_listed(rig: &Rig) {
    copies(rig, LISTED);
    let mount = rig.mount();
    fs::metadata(&mount.disk).unwrap();
    let one = resident(mount.pid);
    let listed = listing(&mount.at);
    assert_eq!(listed.len() as u64, LISTED + 1);
    let each = resident(mount.pid).saturating_sub(one) / LISTED;
    assert!(each <= EACH, "{each} bytes for each image");
    let is_whole = |(name, size): (&String, &u64)| *size == 1 << 20 || name == "disk.qcow2";
    assert!(listed.iter().all(is_whole));
}

/// Sandboxes of a daemon: its VMs, or its child processes.
fn sandboxes(rig: &Rig, pid: Pid) -> usize {
    if rig.sandbox == "kvm" {
        let files = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
        let links = files.filter_map(|file| fs::read_link(file.ok()?.path()).ok());
        return links
            .filter(|link| link == Path::new("anon_inode:kvm-vm"))
            .count();
    }
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    threads
        .filter_map(|thread| fs::read_to_string(thread.ok()?.path().join("children")).ok())
        .map(|children| children.split_whitespace().count())
        .sum()
}

fn let_go(rig: &Rig, mount: &Mount) {
    eventually("the sandboxes are given back", || {
        sandboxes(rig, mount.pid) <= WAITING
    });
}

fn open_images_that_are_idle(rig: &Rig) {
    let images = copies(rig, OPEN as u64);
    let mount = rig.mount();
    let shown = |image: &PathBuf| mount.at.join(image.file_name().unwrap());
    listing(&mount.at);
    let open = |image: &PathBuf| {
        let both = File::options().read(true).write(true).open(shown(image));
        let disk = both.unwrap();
        disk.read_exact_at(&mut [0; 4096], 0).unwrap();
        disk
    };
    // As many sandboxes as ever wait for the next image wait from here on.
    let few: Vec<File> = images[..2 * WAITING].iter().map(open).collect();
    assert!(sandboxes(rig, mount.pid) >= few.len());
    drop(few);
    let_go(rig, &mount);
    let before = resident(mount.pid);
    let disks: Vec<File> = images.iter().map(open).collect();
    std::thread::sleep(Options::IDLE);
    let_go(rig, &mount);
    let each = resident(mount.pid).saturating_sub(before) / OPEN as u64;
    assert!(each <= EACH, "{each} bytes for each image");
    // What needs a sandbox starts one, for those images alone.
    for disk in &disks[..10] {
        disk.write_all_at(&[7; 4096], 512 << 10).unwrap();
        disk.sync_all().unwrap();
    }
    assert!(sandboxes(rig, mount.pid) <= WAITING + 10);
    drop(disks);
    mount.unmount();
    for image in &images[..10] {
        let reads = ["-r", "-f", "qcow2", "-c", "read -q -P 7 512k 4k"];
        run(
            "qemu-io",
            &[&reads[..], &[image.to_str().unwrap()][..]].concat(),
        );
        run("qemu-img", &["check", "-q", image.to_str().unwrap()]);
    }
}
