//! `instar doctor`: what this machine offers, and how to get what is missing.
//! Every check tries the thing itself.

mod passthrough;

use super::{Error, Global, Output, say};
use instar::compat::json;
use instar::sandbox;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::unistd::Uid;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Arguments of `doctor`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// How to show it
    #[arg(long, value_enum, default_value_t)]
    output: Output,
}

/// One thing that was tried.
struct Check {
    /// Name for people and programs.
    name: &'static str,
    /// What it is for.
    purpose: &'static str,
    /// How to get it, where it does not work.
    problem: Option<Problem>,
}

struct Problem {
    found: String,
    advice: String,
}

impl Problem {
    fn new(found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            found: found.into(),
            advice: advice.into(),
        }
    }
}

/// Everything that was tried.
struct Report {
    kvm: Check,
    process: Check,
    fuse: Check,
    fusermount: Check,
    helper: Check,
    locks: Check,
    passthrough: Check,
}

/// Runs `doctor`.
pub fn run(args: &Args, _global: &Global) -> Result<(), Error> {
    let report = Report::make();
    say(&match args.output {
        Output::Human => report.human(),
        Output::Json => report.json(),
    })?;
    match report.main_job() {
        Ok(_) => Ok(()),
        Err(missing) => Err(Error::Refused(missing)),
    }
}

impl Report {
    fn make() -> Self {
        let check = |name, purpose, result: Result<(), Problem>| Check {
            name,
            purpose,
            problem: result.err(),
        };
        Self {
            kvm: check("kvm", "sandbox: a micro-VM", kvm()),
            process: check(
                "process",
                "sandbox: a process without system calls",
                process(),
            ),
            fuse: check("fuse", "mounting", fuse()),
            fusermount: check("fusermount3", "mounting without being root", fusermount()),
            helper: check("mount.instar", "mount(8), fstab and systemd", helper()),
            locks: check("locks", "keeping QEMU out while an image changes", locks()),
            passthrough: check(
                "passthrough",
                "raw images as fast as plain files",
                passthrough::check(),
            ),
        }
    }

    fn checks(&self) -> [&Check; 7] {
        [
            &self.kvm,
            &self.process,
            &self.fuse,
            &self.fusermount,
            &self.helper,
            &self.locks,
            &self.passthrough,
        ]
    }

    /// The sandbox that mounted images get, or what keeps them from being
    /// mounted.
    fn main_job(&self) -> Result<&'static str, String> {
        let missing = |what: &str| Err(format!("images cannot be mounted: no {what}"));
        let may_mount =
            self.fuse.works() && (self.fusermount.works() || Uid::effective().is_root());
        match (self.kvm.works(), self.process.works()) {
            (false, false) => missing("sandbox"),
            _ if !may_mount => missing("FUSE"),
            (true, _) => Ok("a micro-VM"),
            (false, true) => Ok("a process without system calls"),
        }
    }

    fn human(&self) -> String {
        let mut out = String::new();
        for check in self.checks() {
            // Writing to a string cannot fail.
            let _ = check.write(&mut out);
        }
        if let Ok(sandbox) = self.main_job() {
            let _ = writeln!(
                out,
                "Images can be mounted; their metadata is read in {sandbox}."
            );
        }
        out
    }

    fn json(&self) -> String {
        let checks: Vec<Value> = self.checks().map(Check::json).to_vec();
        let value = json!({"can-mount": self.main_job().is_ok(), "checks": checks});
        json::pretty(&value) + "\n"
    }
}

impl Check {
    fn works(&self) -> bool {
        self.problem.is_none()
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        let state = if self.works() { "ok" } else { "missing" };
        writeln!(out, "{state:<8} {:<13} {}", self.name, self.purpose)?;
        if let Some(problem) = &self.problem {
            writeln!(out, "         {}", problem.found)?;
            writeln!(out, "         -> {}", problem.advice)?;
        }
        Ok(())
    }

    fn json(&self) -> Value {
        let mut value = json!({"name": self.name, "purpose": self.purpose, "works": self.works()});
        if let Some(problem) = &self.problem {
            value["found"] = problem.found.as_str().into();
            value["advice"] = problem.advice.as_str().into();
        }
        value
    }
}

fn kvm() -> Result<(), Problem> {
    sandbox::probe_kvm().map_err(|found| {
        let device = OpenOptions::new().read(true).write(true).open("/dev/kvm");
        let advice = match device.map_err(|error| error.kind()) {
            Err(io::ErrorKind::NotFound) => {
                "load the module (modprobe kvm_intel or kvm_amd); in a virtual machine, have its \
                 host allow nested virtualisation; in a container, pass the device in"
            }
            Err(io::ErrorKind::PermissionDenied) => {
                "join the group that owns it: usermod -aG kvm USER, then log in again"
            }
            _ => "the process sandbox does the same job: --isolation=process",
        };
        Problem::new(found.to_string(), advice)
    })
}

fn process() -> Result<(), Problem> {
    sandbox::probe_process().map_err(|found| {
        Problem::new(
            found.to_string(),
            "allow seccomp and memfd_create, or use KVM",
        )
    })
}

fn fuse() -> Result<(), Problem> {
    let device = OpenOptions::new().read(true).write(true).open("/dev/fuse");
    device.map(|_| ()).map_err(|error| {
        let advice = match error.kind() {
            io::ErrorKind::NotFound => {
                "load the module (modprobe fuse); in a container, pass /dev/fuse in"
            }
            _ => "mount as root, or let users open it: chmod 666 /dev/fuse",
        };
        Problem::new(format!("/dev/fuse: {error}"), advice)
    })
}

/// The first of these folders that holds an executable file of this name.
fn find(name: &str, folders: impl IntoIterator<Item = PathBuf>) -> Option<PathBuf> {
    let is_program = |path: &PathBuf| {
        fs::metadata(path)
            .is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
    };
    folders
        .into_iter()
        .map(|folder| folder.join(name))
        .find(is_program)
}

/// A program on PATH.
pub fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    find(name, std::env::split_paths(&path))
}

fn fusermount() -> Result<(), Problem> {
    match program("fusermount3") {
        Some(_) => Ok(()),
        None => Err(Problem::new(
            "fusermount3 is not on PATH",
            "install the package fuse3",
        )),
    }
}

fn helper() -> Result<(), Problem> {
    let folders = ["/sbin", "/usr/sbin", "/usr/local/sbin"];
    match find("mount.instar", folders.map(PathBuf::from)) {
        Some(_) => Ok(()),
        None => Err(Problem::new(
            format!("mount.instar is not in {}", folders.join(", ")),
            "'cargo build --release -p mount-helper' makes it: install mount-instar as /sbin/mount.instar; 'instar mount' works without it",
        )),
    }
}

/// Whether two open file descriptions exclude each other, as two programs that
/// open one image must.
fn locks() -> Result<(), Problem> {
    let folder = std::env::temp_dir();
    let advice = "keep images on a filesystem that has open file description locks";
    match exclude_each_other(&folder) {
        Ok(true) => Ok(()),
        Ok(false) => Err(Problem::new(
            format!("locks in {} exclude nobody", folder.display()),
            advice,
        )),
        Err(error) => Err(Problem::new(
            format!("locks in {}: {error}", folder.display()),
            advice,
        )),
    }
}

fn exclude_each_other(folder: &Path) -> io::Result<bool> {
    let first = tempfile::NamedTempFile::new_in(folder)?;
    let second = first.reopen()?;
    lock(&first, libc::F_RDLCK)?;
    match lock(&second, libc::F_WRLCK) {
        Ok(()) => Ok(false),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

fn lock(file: &impl AsFd, kind: i32) -> nix::Result<()> {
    let byte = libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 100,
        l_len: 1,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_SETLK(&byte)).map(|_| ())
}
