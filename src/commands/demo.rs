//! `instar demo`: the main job, for real, on sample images in a temporary
//! directory that is gone afterwards.

use super::{Error, Global, doctor, in_words, say};
use instar::compat::size::Human;
use instar::image::{self, Access, OpenOptions};
use instar::sandbox::{Isolation, Pool};
use instar_guest::Format;
use instar_guest::proto::Create;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Arguments of `demo`: none.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// The sample images: name, format, size of the disk in bytes.
const SAMPLES: [(&str, Format, u64); 2] = [
    ("server.qcow2", Format::Qcow2, 64 << 20),
    ("backup.raw", Format::Raw, 16 << 20),
];
/// By how much every disk grows.
const GROWTH: u64 = 4 << 20;
/// Where the sample content lies in a disk.
const CONTENT_AT: u64 = 1 << 20;
/// Length of the sample content.
const CONTENT_LEN: usize = 1 << 20;
/// How long a mount may take to appear or to go.
const PATIENCE: Duration = Duration::from_secs(10);

/// Runs `demo`.
pub fn run(_args: &Args, global: &Global) -> Result<(), Error> {
    if !Path::new("/dev/fuse").exists() {
        return Err(Error::refused(
            "the demo mounts a filesystem, and this machine has no /dev/fuse: load the module \
             with 'modprobe fuse', or pass the device into the container",
        ));
    }
    let stage = Stage::set(global)?;
    let mount = Mount::start(&stage, global)?;
    let story = tell(&stage);
    let why = stage.last_log_line();
    mount.stop()?;
    story.map_err(|error| Error::Refused(format!("{error}\n{why}")))?;
    opinion(&stage)?;
    let folder = stage.folder.path().display().to_string();
    stage
        .folder
        .close()
        .map_err(Error::system(format!("Could not remove {folder}")))?;
    say(&format!("\n{folder} is gone.\n"))
}

/// The temporary directory with the images.
struct Stage {
    folder: tempfile::TempDir,
    pool: Arc<Pool>,
}

impl Stage {
    fn set(global: &Global) -> Result<Self, Error> {
        let folder = tempfile::Builder::new()
            .prefix("instar-demo-")
            .tempdir()
            .map_err(Error::system("Could not make a temporary directory"))?;
        let stage = Self {
            folder,
            pool: global.pool()?,
        };
        for path in [stage.images(), stage.disks()] {
            fs::create_dir(path).map_err(Error::system("Could not make a directory"))?;
        }
        say(&format!("In {}:\n\n", stage.folder.path().display()))?;
        for (name, format, size) in SAMPLES {
            let request = Create {
                format,
                size,
                options: Vec::new(),
                backing: None,
                backing_size: None,
                backing_identity: None,
            };
            image::create(&stage.pool, &stage.images().join(name), &request)?;
            let size = size >> 20;
            say(&format!(
                "$ instar create -f {} images/{name} {size}M\n",
                format.name()
            ))?;
        }
        Ok(stage)
    }

    fn images(&self) -> PathBuf {
        self.folder.path().join("images")
    }

    fn disks(&self) -> PathBuf {
        self.folder.path().join("disks")
    }

    fn log(&self) -> PathBuf {
        self.folder.path().join("log")
    }

    /// What the daemon said last.
    fn last_log_line(&self) -> String {
        let text = fs::read_to_string(self.log()).unwrap_or_default();
        text.lines().last().unwrap_or_default().to_owned()
    }
}

/// A running `instar mount -f`.
struct Mount {
    daemon: Child,
    at: PathBuf,
}

impl Mount {
    fn start(stage: &Stage, global: &Global) -> Result<Self, Error> {
        let program = std::env::current_exe().map_err(Error::system("Could not find instar"))?;
        let isolation: Isolation = global.isolation;
        let log = File::create(stage.log()).map_err(Error::system("Could not make a log"))?;
        let daemon = Command::new(program)
            .arg(format!("--isolation={isolation}"))
            .args(["mount", "-f"])
            .args([stage.images(), stage.disks()])
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(Error::system("Could not start 'instar mount'"))?;
        let mut mount = Self {
            daemon,
            at: stage.disks(),
        };
        mount.wait_for_files().map_err(|_| {
            Error::Refused(format!(
                "the images could not be mounted: {}\n'instar doctor' says what is missing",
                stage.last_log_line()
            ))
        })?;
        say(&format!(
            "$ instar mount images disks      # metadata is read in {}\n\n",
            in_words(stage.pool.isolation())
        ))?;
        Ok(mount)
    }

    fn wait_for_files(&mut self) -> io::Result<()> {
        let start = Instant::now();
        while !self.is_mounted() {
            if self.daemon.try_wait()?.is_some() || start.elapsed() > PATIENCE {
                return Err(io::ErrorKind::TimedOut.into());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// Unmounts and waits until the daemon has released everything.
    fn stop(mut self) -> Result<(), Error> {
        let program = std::env::current_exe().map_err(Error::system("Could not find instar"))?;
        let unmounted = Command::new(program)
            .arg("umount")
            .arg(&self.at)
            .status()
            .map_err(Error::system("Could not start 'instar umount'"))?;
        if !unmounted.success() {
            return Err(Error::refused("'instar umount' failed"));
        }
        say("$ instar umount disks\n")?;
        match self.wait() {
            Some(status) if status.success() => Ok(()),
            Some(status) => Err(Error::Refused(format!(
                "'instar mount' ended with {status}"
            ))),
            None => Err(Error::refused("'instar mount' did not end")),
        }
    }

    fn is_mounted(&self) -> bool {
        self.at.join(SAMPLES[0].0).exists()
    }

    /// Waits for the daemon to end.
    fn wait(&mut self) -> Option<ExitStatus> {
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            match self.daemon.try_wait() {
                Ok(Some(status)) => return Some(status),
                Ok(None) => std::thread::sleep(Duration::from_millis(2)),
                Err(_) => break,
            }
        }
        None
    }
}

impl Drop for Mount {
    /// After a failure: the daemon must not outlive the demo.
    fn drop(&mut self) {
        if !matches!(self.daemon.try_wait(), Ok(None)) {
            return;
        }
        if let Ok(id) = i32::try_from(self.daemon.id()) {
            // It may have ended in this moment.
            let _ = kill(Pid::from_raw(id), Signal::SIGTERM);
        }
        if self.wait().is_none() {
            let _ = self.daemon.kill();
            let _ = self.daemon.wait();
        }
    }
}

/// What happens on the mount.
fn tell(stage: &Stage) -> Result<(), Error> {
    let failed = || Error::system("The mounted disks did not work");
    for (name, ..) in SAMPLES {
        let disk = File::options().write(true).open(stage.disks().join(name));
        let disk = disk.map_err(failed())?;
        disk.write_all_at(&content(name), CONTENT_AT)
            .and_then(|()| disk.sync_all())
            .map_err(failed())?;
    }
    say("Before\n")?;
    say(&table(stage)?)?;
    let start = Instant::now();
    for (name, ..) in SAMPLES {
        grow(&stage.disks().join(name)).map_err(failed())?;
        let growth = GROWTH >> 20;
        say(&format!("\n$ truncate -s +{growth}M disks/{name}"))?;
    }
    let took = start.elapsed().as_secs_f64() * 1000.0;
    say(&format!("      # {took:.1} ms, durable\n\nAfter\n"))?;
    say(&table(stage)?)?;
    for (name, _, size) in SAMPLES {
        verify(&stage.disks().join(name), name, size).map_err(failed())?;
    }
    say("\nOld content unchanged, the new space reads as zeroes.\n\n")
}

/// What truncate(1) does.
fn grow(disk: &Path) -> io::Result<()> {
    let disk = File::options().write(true).open(disk)?;
    disk.set_len(disk.metadata()?.len() + GROWTH)
}

/// Bytes that tell at which place of which disk they stand.
fn content(name: &str) -> Vec<u8> {
    let line = format!("{name}: this was here before the disk grew. ");
    line.bytes().cycle().take(CONTENT_LEN).collect()
}

fn verify(disk: &Path, name: &str, old_size: u64) -> io::Result<()> {
    let disk = File::open(disk)?;
    let mut kept = vec![0; CONTENT_LEN];
    disk.read_exact_at(&mut kept, CONTENT_AT)?;
    let mut added = vec![1; usize::try_from(GROWTH).unwrap_or(0)];
    disk.read_exact_at(&mut added, old_size)?;
    if kept != content(name) || added.iter().any(|&byte| byte != 0) {
        return Err(io::Error::other(format!("{name} lost its content")));
    }
    Ok(())
}

/// The files of the mount, and what the images behind them say.
fn table(stage: &Stage) -> Result<String, Error> {
    let mut text = format!(
        "  {:<20} {:>12}   {:<20} {:>10} {:>12}\n",
        "file in disks/", "bytes", "image in images/", "disk", "takes"
    );
    for (name, format, _) in SAMPLES {
        let mounted = fs::metadata(stage.disks().join(name));
        let mounted = mounted.map_err(Error::system("The mounted disks did not work"))?;
        let options = OpenOptions {
            format: Some(format),
            force_share: true,
            ..OpenOptions::new(Access::Info)
        };
        let path = stage.images().join(name);
        let image = options.open(&stage.pool, &path)?;
        let file = fs::metadata(&path).map_err(Error::system("The images are gone"))?;
        text.push_str(&format!(
            "  {name:<20} {:>12}   {name:<20} {:>10} {:>12}\n",
            mounted.len(),
            Human(image.virtual_size()).to_string(),
            Human(file.blocks() * 512).to_string(),
        ));
    }
    Ok(text)
}

/// What qemu-img, if it is there, says about the result.
fn opinion(stage: &Stage) -> Result<(), Error> {
    let Some(program) = doctor::program("qemu-img") else {
        return Ok(());
    };
    let (name, format, _) = SAMPLES[0];
    let check = Command::new(program)
        .args(["check", "-f", format.name()])
        .arg(stage.images().join(name))
        .output()
        .map_err(Error::system("Could not run qemu-img"))?;
    let text = String::from_utf8_lossy(&check.stdout);
    let verdict = text.lines().next().unwrap_or("nothing");
    say(&format!("$ qemu-img check images/{name}\n{verdict}\n"))
}
