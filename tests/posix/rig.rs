//! A directory with an image, and mounts of it.

use crate::images::{Originals, Variant};
use crate::tools::{eventually, run, xattr};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;
use tempfile::TempDir;

/// The program under test.
pub const INSTAR: &str = env!("CARGO_BIN_EXE_instar");
/// After this a daemon that is still there has hung, and is killed so that the
/// test fails instead of hanging with it.
const PATIENCE: Duration = Duration::from_secs(120);

/// A temporary directory with one image of a variant in SOURCE.
pub struct Rig {
    /// What it is an image of.
    pub originals: Arc<Originals>,
    /// How it was made.
    pub variant: &'static Variant,
    /// The image file.
    pub image: PathBuf,
    /// Where its metadata is read.
    pub sandbox: &'static str,
    directory: Arc<TempDir>,
}

/// A mount by a daemon in the background, unmounted at the end.
pub struct Mount {
    /// Where.
    pub at: PathBuf,
    /// The disk that the rig's image holds.
    pub disk: PathBuf,
    /// The daemon.
    pub pid: Pid,
    _watchdog: Sender<()>,
}

impl Rig {
    /// Makes the directories and the image.
    pub fn new(
        sandbox: &'static str,
        variant: &'static Variant,
        originals: Arc<Originals>,
    ) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let source = directory.path().join("source");
        fs::create_dir(&source).unwrap();
        fs::create_dir(directory.path().join("mnt")).unwrap();
        let image = originals.place(variant, &source);
        Self {
            originals,
            variant,
            image,
            sandbox,
            directory: Arc::new(directory),
        }
    }

    /// The same directory, to look at another image in it.
    pub fn with_image(&self, image: PathBuf) -> Self {
        Self {
            originals: Arc::clone(&self.originals),
            variant: self.variant,
            image,
            sandbox: self.sandbox,
            directory: Arc::clone(&self.directory),
        }
    }

    /// SOURCE.
    pub fn source(&self) -> PathBuf {
        self.path("source")
    }

    /// MOUNTPOINT.
    pub fn mountpoint(&self) -> PathBuf {
        self.path("mnt")
    }

    /// The daemon's log.
    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// A path in the temporary directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// `instar mount` with these options and anything else.
    pub fn mount_command(&self, options: &str) -> Vec<OsString> {
        let log = format!("log={}", self.path("log").display());
        let mut words: Vec<OsString> = vec!["--isolation".into(), self.sandbox.into()];
        words.extend(["mount".into(), "-o".into(), log.into()]);
        for options in [self.variant.mounted, options] {
            if !options.is_empty() {
                words.extend(["-o".into(), options.into()]);
            }
        }
        words
    }

    /// Mounts SOURCE.
    pub fn mount(&self) -> Mount {
        self.mount_with("")
    }

    /// Mounts SOURCE with `-o options`.
    pub fn mount_with(&self, options: &str) -> Mount {
        self.mount_source(&self.source(), options)
    }

    /// Mounts another SOURCE.
    pub fn mount_source(&self, source: &Path, options: &str) -> Mount {
        let mut words = self.mount_command(options);
        words.push(source.into());
        words.push(self.mountpoint().into());
        run(INSTAR, &words);
        Mount::found(self.mountpoint(), self.variant.file)
    }

    /// `qemu-img check` finds nothing wrong: no corruption and no leak. Where it
    /// does not look, or not far, instar does.
    #[track_caller]
    pub fn check(&self) {
        let format = self.variant.format();
        let arguments = ["check", "-q", "-f", format].map(OsString::from);
        if ["qcow2", "vmdk", "vhdx"].contains(&format) {
            run("qemu-img", &with(&arguments, &self.image));
        }
        if ["vmdk", "vpc", "vhdx"].contains(&format) {
            run(INSTAR, &with(&arguments, &self.image));
        }
    }

    /// The size that `qemu-img info` shows.
    pub fn virtual_size(&self) -> u64 {
        let format = self.variant.format();
        let arguments = ["info", "--output=json", "-f", format].map(OsString::from);
        let json = run("qemu-img", &with(&arguments, &self.image));
        let value: serde_json::Value = serde_json::from_str(&json).unwrap();
        value["virtual-size"].as_u64().unwrap()
    }

    /// `qemu-img` finds exactly this content, of this size, in the image.
    #[track_caller]
    pub fn compare(&self, expected: &Path) {
        let size = fs::metadata(expected).unwrap().len();
        // qemu-img shows whole sectors.
        assert_eq!(self.virtual_size(), size.next_multiple_of(512));
        let arguments = ["compare", "-f", "raw", "-F", self.variant.format()].map(OsString::from);
        let mut words = with(&arguments, expected);
        words.push(self.image.clone().into());
        run("qemu-img", &words);
    }

    /// A copy of the original to change.
    pub fn expected(&self) -> PathBuf {
        let path = self.path("expected");
        fs::copy(self.originals.raw(), &path).unwrap();
        path
    }
}

fn with(arguments: &[OsString], path: &Path) -> Vec<OsString> {
    let mut words = arguments.to_vec();
    words.push(path.into());
    words
}

impl Mount {
    /// The mount that is there.
    pub fn found(at: PathBuf, file: &str) -> Self {
        let pid = xattr(&at, "user.instar.pid").expect("the mount answers");
        let pid = Pid::from_raw(pid.parse().unwrap());
        let (watchdog, ended) = channel::<()>();
        thread::spawn(move || {
            if ended.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                let _ = kill(pid, Signal::SIGKILL);
            }
        });
        Self {
            disk: at.join(file),
            at,
            pid,
            _watchdog: watchdog,
        }
    }

    /// Unmounts and waits until the daemon has released everything.
    #[track_caller]
    pub fn unmount(self) {
        // Another test may be starting a process, which has a copy of every
        // descriptor until it runs its program.
        eventually("the mount is not in use", || {
            let output = Command::new("timeout")
                .args(["60", INSTAR, "umount"])
                .arg(&self.at)
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            let in_use = said.contains("in use");
            assert!(output.status.success() || in_use, "{said}");
            !in_use
        });
    }

    /// Whether the daemon still runs.
    pub fn is_running(&self) -> bool {
        is_running(self.pid)
    }
}

/// Whether a process runs; one that only waits to be reaped does not.
pub fn is_running(pid: Pid) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        let state = stat
            .rsplit(')')
            .next()
            .and_then(|rest| rest.trim().chars().next());
        !matches!(state, Some('Z' | 'X') | None)
    })
}

impl Drop for Mount {
    fn drop(&mut self) {
        if !self.is_running() {
            return;
        }
        // After a failure there may be users left: go all the same.
        let unmounted = Command::new("timeout")
            .args(["20", INSTAR, "umount"])
            .arg(&self.at)
            .stderr(Stdio::null())
            .status();
        if !unmounted.is_ok_and(|status| status.success()) {
            let _ = kill(self.pid, Signal::SIGKILL);
            let _ = Command::new("umount").arg("-l").arg(&self.at).status();
        }
    }
}
