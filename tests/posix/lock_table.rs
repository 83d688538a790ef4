//! Every way in which instar opens an image beside every way in which QEMU does,
//! in both orders. What is expected is computed from the bytes that each of them
//! locks and looks at.

use crate::locks::Writer;
use crate::rig::{INSTAR, Mount, Rig, is_running};
use crate::tools::{eventually, xattr};
use crate::{Claim, claim};
use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// What is proven here.
pub const CLAIMS: &[Claim] = &[
    claim(
        "instar_and_qemu_respect_each_others_locks",
        &["qemu-io", "qemu-storage-daemon"],
        each_respects_the_other,
    )
    .in_one_sandbox(),
    claim(
        "nothing_is_locked_after_unmounting",
        &["qemu-io", "umount"],
        nothing_is_locked_after_unmounting,
    )
    .in_one_sandbox(),
];

/// Bytes that an opener locks, and those that it looks at, in its order.
struct Locks {
    holds: &'static [u8],
    probes: &'static [u8],
}

const WRITE: Locks = Locks {
    holds: &[100, 101, 103, 201, 203],
    probes: &[200, 201, 203, 101, 103],
};
const READ: Locks = Locks {
    holds: &[100, 201, 203],
    probes: &[200, 101, 103],
};
const INFO: Locks = Locks {
    holds: &[201, 203],
    probes: &[101, 103],
};
const CREATE: Locks = Locks {
    holds: &[101, 103, 203],
    probes: &[201, 203, 103],
};

/// One way to open an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Opener {
    /// A program that reads, or writes, the disk on the mount.
    Reads,
    Writes,
    /// A handle on the mount that is open for writing, idle and clean.
    Idle,
    /// A program that opens the image, does its work and ends.
    Runs(&'static str, &'static [&'static str]),
    /// The same, which can also be kept with the image open.
    Io(&'static [&'static str]),
    Daemon,
}

const OURS: &[Opener] = &[
    Opener::Reads,
    Opener::Writes,
    Opener::Idle,
    Opener::Runs(INSTAR, &["info", "-f", "qcow2"]),
    Opener::Runs(INSTAR, &["check", "-f", "qcow2"]),
    Opener::Runs(INSTAR, &["resize", "-f", "qcow2", "IMAGE", "+1M"]),
    Opener::Runs(INSTAR, &["create", "-f", "qcow2", "IMAGE", "4M"]),
];

const THEIRS: &[Opener] = &[
    Opener::Io(&[]),
    Opener::Io(&["-r"]),
    Opener::Daemon,
    Opener::Runs("qemu-img", &["info", "-f", "qcow2"]),
    Opener::Runs("qemu-img", &["check", "-f", "qcow2"]),
    Opener::Runs("qemu-img", &["resize", "-f", "qcow2", "IMAGE", "+1M"]),
];

/// Whoever has the image open, until it is dropped.
enum Holding {
    Process(Child),
    Writer(#[expect(dead_code, reason = "held, not looked at")] Writer),
    Idle(File),
    Nobody,
}

impl Drop for Holding {
    fn drop(&mut self) {
        if let Self::Process(child) = self {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Opener {
    fn locks(self) -> Locks {
        match self {
            Self::Reads | Self::Io(["-r"]) => READ,
            Self::Writes | Self::Idle | Self::Io(_) | Self::Daemon => WRITE,
            Self::Runs(_, arguments) => match arguments[0] {
                "info" => INFO,
                "check" => READ,
                "create" => CREATE,
                _ => WRITE,
            },
        }
    }

    /// What stays locked once it has opened the image.
    fn holds(self) -> &'static [u8] {
        match self {
            Self::Idle | Self::Runs(..) => &[],
            _ => self.locks().holds,
        }
    }
}

/// QEMU's words for the first conflict, if there is one.
fn expected(first: Opener, second: Opener) -> Option<String> {
    let names = ["consistent read", "write", "write unchanged", "resize"];
    let probes = second.locks().probes.iter();
    let byte = *probes.clone().find(|byte| first.holds().contains(byte))?;
    let shared = if byte < 200 { "shared " } else { "" };
    let name = names[usize::from(byte % 100)];
    Some(format!("Failed to get {shared}\"{name}\" lock"))
}

/// One image on a mount.
struct Cell<'a> {
    rig: &'a Rig,
    image: PathBuf,
    disk: PathBuf,
}

impl<'a> Cell<'a> {
    fn new(rig: &'a Rig, mount: &Mount, original: &[u8], number: usize) -> Self {
        let name = format!("cell-{number}.qcow2");
        let image = rig.source().join(&name);
        fs::write(&image, original).unwrap();
        let disk = mount.at.join(name);
        Self { rig, image, disk }
    }

    fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(program);
        if program == INSTAR {
            command.args(["--isolation", self.rig.sandbox]);
        }
        let mut named = false;
        for &argument in arguments {
            let image = argument == "IMAGE";
            named |= image;
            match image {
                true => command.arg(&self.image),
                false => command.arg(argument),
            };
        }
        if !named {
            command.arg(&self.image);
        }
        command
    }

    /// Opens the image and keeps it.
    fn hold(&self, opener: Opener) -> Holding {
        match opener {
            Opener::Reads => {
                let mut command = Command::new("cat");
                Holding::Process(answering(command.arg(&self.disk)))
            }
            Opener::Writes => Holding::Writer(Writer::hold(&self.disk)),
            Opener::Idle => {
                let disk = File::options().write(true).open(&self.disk).unwrap();
                disk.write_all_at(&[1; 512], 0).unwrap();
                drop(disk.try_clone().unwrap());
                Holding::Idle(disk)
            }
            Opener::Runs(..) => {
                assert_eq!(self.try_open(opener), None);
                Holding::Nobody
            }
            Opener::Io(how) => {
                let arguments = [how, &["-f", "qcow2"]].concat();
                let mut command = self.command("qemu-io", &arguments);
                Holding::Process(answering(command.stdin(Stdio::piped())))
            }
            Opener::Daemon => match self.start_daemon() {
                Ok(daemon) => Holding::Process(daemon),
                Err(said) => panic!("qemu-storage-daemon: {said}"),
            },
        }
    }

    /// Opens the image; answers what is said where that fails.
    fn try_open(&self, opener: Opener) -> Option<String> {
        match opener {
            Opener::Reads => self.why_not(File::open(&self.disk).map(drop)),
            Opener::Writes => {
                let opened = File::options().write(true).open(&self.disk);
                self.why_not(opened.map(drop))
            }
            Opener::Idle => unreachable!("it is open before"),
            Opener::Runs(program, arguments) => said(&mut self.command(program, arguments)),
            Opener::Io(how) => {
                let arguments = [how, &["-f", "qcow2", "-c", "read -q 0 512"]].concat();
                said(&mut self.command("qemu-io", &arguments))
            }
            Opener::Daemon => match self.start_daemon() {
                Ok(daemon) => {
                    drop(Holding::Process(daemon));
                    None
                }
                Err(said) => Some(said),
            },
        }
    }

    /// A failure on the mount is EBUSY; its reason is an attribute of the disk,
    /// and in the log.
    fn why_not(&self, opened: std::io::Result<()>) -> Option<String> {
        let error = opened.err()?;
        assert_eq!(error.raw_os_error(), Some(libc::EBUSY), "{error}");
        let reason = xattr(&self.disk, "user.instar.error").unwrap();
        assert!(self.rig.log().contains(&reason), "{reason}");
        Some(reason)
    }

    /// A qemu-storage-daemon that exports the image for writing.
    fn start_daemon(&self) -> Result<Child, String> {
        let (ready, socket) = (self.rig.path("ready"), self.rig.path("socket"));
        let _ = fs::remove_file(&ready);
        let image = self.image.display();
        let node = format!(
            "driver=qcow2,node-name=disk,file.driver=file,file.filename={image},read-only=off"
        );
        let mut daemon = Command::new("qemu-storage-daemon")
            .args(["--blockdev", &node, "--nbd-server"])
            .arg(format!("addr.type=unix,addr.path={}", socket.display()))
            .args(["--export", "nbd,id=disk,node-name=disk,writable=on"])
            .arg("--pidfile")
            .arg(&ready)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        eventually("qemu-storage-daemon is ready", || {
            ready.exists() || daemon.try_wait().unwrap().is_some()
        });
        if ready.exists() {
            return Ok(daemon);
        }
        let mut said = String::new();
        let mut errors = daemon.stderr.take().unwrap();
        errors.read_to_string(&mut said).unwrap();
        Err(said)
    }
}

/// Starts a program and waits for the first byte that it says; the rest stays
/// unread.
fn answering(command: &mut Command) -> Child {
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut first = [0];
    child
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut first)
        .unwrap();
    child
}

/// Runs a program; what it says if it fails.
fn said(command: &mut Command) -> Option<String> {
    let output = command.output().unwrap();
    let failed = !output.status.success();
    failed.then(|| String::from_utf8_lossy(&output.stderr).into_owned())
}

#[track_caller]
fn compare(first: Opener, second: Opener, said: Option<&str>) {
    let expected = expected(first, second);
    match (&expected, said) {
        (None, None) => {}
        (Some(words), Some(said)) if said.contains(words) => {}
        _ => panic!("{first:?}, then {second:?}: {said:?}, not {expected:?}"),
    }
}

fn each_respects_the_other(rig: &Rig) {
    let small = rig.path("small");
    let path = small.to_str().unwrap();
    crate::tools::run("qemu-img", &["create", "-q", "-f", "qcow2", path, "2M"]);
    let original = fs::read(&small).unwrap();
    let mount = rig.mount();
    let pairs = |one: &'static [Opener], other: &'static [Opener]| {
        one.iter()
            .flat_map(move |first| other.iter().map(move |second| (*first, *second)))
    };
    for (number, (first, second)) in pairs(OURS, THEIRS).chain(pairs(THEIRS, OURS)).enumerate() {
        let cell = Cell::new(rig, &mount, &original, number);
        match second {
            Opener::Idle => use_again(&cell, first),
            _ => {
                let _held = cell.hold(first);
                compare(first, second, cell.try_open(second).as_deref());
            }
        }
    }
    mount.unmount();
}

/// A handle that was idle while somebody else opened the image.
fn use_again(cell: &Cell<'_>, first: Opener) {
    let Holding::Idle(ref disk) = cell.hold(Opener::Idle) else {
        unreachable!("that is what it holds");
    };
    let held = cell.hold(first);
    let write = || disk.write_all_at(&[2; 512], 512);
    if matches!(first, Opener::Runs(_, ["resize", ..])) {
        let error = write().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ESTALE), "{error}");
        return;
    }
    compare(first, Opener::Idle, cell.why_not(write()).as_deref());
    drop(held);
    // It was locked, and not changed.
    write().unwrap();
}

fn nothing_is_locked_after_unmounting(rig: &Rig) {
    for round in 0..20 {
        let mount = rig.mount();
        let disk = File::options().write(true).open(&mount.disk).unwrap();
        disk.write_all_at(&[round; 4096], u64::from(round) << 16)
            .unwrap();
        drop(disk);
        let pid = mount.pid;
        let program: &[&str] = match round % 2 {
            0 => &["umount"],
            _ => &[INSTAR, "umount"],
        };
        unmount(program, &mount.at);
        crate::tools::run("qemu-img", &["check", "-q", rig.image.to_str().unwrap()]);
        let open = ["-f", "qcow2", "-c", "write -q 0 512"];
        let image = [rig.image.to_str().unwrap()];
        crate::tools::run("qemu-io", &[&open[..], &image[..]].concat());
        // `umount` does not wait for it.
        eventually("the daemon has ended", || !is_running(pid));
    }
}

/// Unmounts; another test may be starting a process, which has a copy of every
/// descriptor until it runs its program.
fn unmount(words: &[&str], at: &Path) {
    eventually("the mount is not in use", || {
        let output = Command::new(words[0]).args(&words[1..]).arg(at).output();
        let output = output.unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let in_use = said.contains("in use") || said.contains("busy");
        assert!(output.status.success() || in_use, "{said}");
        !in_use
    });
}
