//! `instar mount`: checks what can be checked before anything is mounted, then
//! hands over to the daemon.

mod daemon;
mod logging;
mod options;
mod serve;

use super::{Error, Global};
use instar::fs::Source;
use instar::fs::device;
use options::Settings;
use std::io;
use std::path::{Path, PathBuf};

/// Arguments of `mount`. Every long option but `--foreground` exists as `-o`
/// too, with underscores.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Stay in the foreground and log to the standard error
    #[arg(short, long)]
    foreground: bool,
    /// Options, separated by commas: the long ones with underscores (all but
    /// 'foreground'), 'rw', and the generic ones of mount(8). What is said here
    /// wins over a long option, the last over the first
    #[arg(short = 'o', value_name = "OPTIONS")]
    options: Vec<String>,
    /// Allow no change
    #[arg(long)]
    ro: bool,
    /// Let other users use the mount, within the permissions of the images
    #[arg(long)]
    allow_other: bool,
    /// What a truncate to a larger size allocates: 'off' (nothing), 'metadata'
    /// (the mapping), 'falloc' (disk space too) or 'full' (and writes zeroes)
    #[arg(long, value_name = "MODE")]
    preallocation: Option<String>,
    /// Let a truncate make a disk smaller: what lies behind the new end is lost
    #[arg(long)]
    shrink: bool,
    /// Refuse writes past the end of a disk instead of growing it
    #[arg(long)]
    nogrow: bool,
    /// Let instar read and write raw images too, and not the kernel by itself
    #[arg(long)]
    nopassthrough: bool,
    /// Let the kernel gather what is written in its cache: fast, and errors of
    /// writes are told by fsync and close
    #[arg(long)]
    writeback: bool,
    /// Allow changes of images that other images use as backing files
    #[arg(long)]
    rw_backing: bool,
    /// 'none' refuses images that name a backing file
    #[arg(long, value_name = "POLICY")]
    backing: Option<String>,
    /// Read files whose names match GLOB as FMT (raw, qcow2, vmdk, vpc or vhdx)
    #[arg(long, value_name = "GLOB:FMT")]
    format: Vec<String>,
    /// Log to FILE instead of syslog
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// Directory with images, or one image
    #[arg(value_name = "SOURCE")]
    source: PathBuf,
    /// Directory where the disks appear
    #[arg(value_name = "MOUNTPOINT")]
    mountpoint: PathBuf,
}

/// Everything that the daemon needs.
struct Job {
    settings: Settings,
    source: Source,
    mountpoint: PathBuf,
}

/// Runs `mount`.
pub fn run(args: &Args, global: &Global) -> Result<(), Error> {
    let settings = Settings::new(args, global)?;
    let mountpoint = free_mountpoint(&args.mountpoint)?;
    let source =
        Source::open(&args.source).map_err(Error::system(format!("{}", args.source.display())))?;
    refuse_inside(&source, &mountpoint)?;
    let job = Job {
        settings,
        source,
        mountpoint,
    };
    if args.foreground {
        return serve::serve(job, serve::Ready::Foreground);
    }
    daemon::detach(|ready| serve::serve(job, ready))
}

/// The absolute path of the mountpoint, where nothing of ours is mounted. A
/// mount whose daemon is dead is cleaned away.
fn free_mountpoint(path: &Path) -> Result<PathBuf, Error> {
    let name = path.display();
    let fail = || Error::system(format!("{name}"));
    let mountpoint = device::absolute_mountpoint(path).map_err(fail())?;
    let ours = device::mounted_at(&mountpoint)
        .map_err(fail())?
        .is_some_and(|mounted| mounted.kind == device::TYPE);
    match mountpoint.metadata() {
        Err(error) if device::is_dead(&error) && ours => {
            device::detach(&mountpoint, true).map_err(Error::system(format!(
                "{name}: the mount of a dead instar could not be cleaned away"
            )))?;
            free_mountpoint(path)
        }
        Err(error) => Err(fail()(error)),
        Ok(_) if ours => Err(Error::Refused(format!(
            "{name}: images are mounted there already; unmount with 'instar umount {name}'"
        ))),
        Ok(metadata) if metadata.is_dir() => Ok(mountpoint),
        Ok(_) => Err(fail()(io::Error::from_raw_os_error(libc::ENOTDIR))),
    }
}

/// A mount inside the tree that it shows would show itself.
fn refuse_inside(source: &Source, mountpoint: &Path) -> Result<(), Error> {
    let inside = mountpoint
        .strip_prefix(source.path())
        .is_ok_and(|rest| !rest.as_os_str().is_empty());
    if inside && source.is_directory() {
        return Err(Error::Refused(format!(
            "{}: the mountpoint lies inside {}; choose one outside, or that directory itself",
            mountpoint.display(),
            source.path().display()
        )));
    }
    Ok(())
}
