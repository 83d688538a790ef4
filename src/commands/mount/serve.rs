//! The daemon: mounts, serves until the mount is gone, and leaves every image
//! flushed and unlocked.

use super::daemon::Word;
use super::{Job, logging};
use crate::commands::Error;
use fuser::{INodeNo, Notifier, Session, SessionACL};
use instar::fs::device::{self, Mounted};
use instar::fs::fuse::Adapter;
use instar::fs::{Filesystem, Images, NodeId, Stale};
use instar::image::Tree;
use instar::sandbox::{Config, Pool};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

/// How long what was written may wait to become durable.
const FLUSH_EVERY: Duration = Duration::from_secs(1);
/// How far the kernel reads ahead: one request.
const READAHEAD_KB: u32 = 1024;
/// Threads that answer requests: opening an image takes milliseconds and must
/// not hold up the others.
const THREADS: std::ops::RangeInclusive<usize> = 4..=16;

/// Whom to tell that the mount answers.
pub enum Ready {
    /// Nobody: the daemon stays in the foreground.
    Foreground,
    /// The process that went before.
    Background(Word),
}

/// Mounts and serves. Returns when the mount is gone and everything is
/// released.
pub fn serve(job: Job, ready: Ready) -> Result<(), Error> {
    let foreground = matches!(ready, Ready::Foreground);
    logging::start(foreground, job.settings.log.as_deref())?;
    raise_open_files();
    let signals = block_signals().map_err(Error::system("Could not block signals"))?;
    let filesystem = Arc::new(make_filesystem(&job)?);
    let mountpoint = job.mountpoint;
    let session = open_session(&filesystem, &mountpoint, &job.settings.kernel)
        .map_err(Error::system(format!("{}", mountpoint.display())))?;
    let mounted = device::mounted_at(&mountpoint).ok().flatten();
    if let Some(mounted) = &mounted {
        device::raise_readahead(mounted, READAHEAD_KB);
    }
    let notifier = session.notifier();
    let (tell, told) = channel();
    filesystem.set_invalidate(Box::new(move |node, what| {
        // Nobody listens any more at the very end.
        let _ = tell.send((node, what));
    }));
    thread::spawn(move || invalidate_forever(&notifier, &told));
    let watcher = Arc::clone(&filesystem);
    let watched = mountpoint.clone();
    thread::spawn(move || await_signals(&signals, &watcher, &watched, mounted.as_ref()));
    let ticker = Arc::clone(&filesystem);
    thread::spawn(move || flush_forever(&ticker));
    log::info!(
        "{} is mounted on {}",
        filesystem.source().display(),
        mountpoint.display()
    );
    if let Ready::Background(word) = ready
        && let Err(error) = word.ready()
    {
        // Whoever asked for the mount is gone; nobody is going to serve it.
        let _ = device::detach(&mountpoint, true);
        return Err(Error::system("Could not go to the background")(error));
    }
    let served = session.run();
    let flushed = filesystem.flush_all();
    served.map_err(Error::system(format!("{}", mountpoint.display())))?;
    if !flushed {
        return Err(Error::refused(
            "not everything that was written could be made durable",
        ));
    }
    log::info!("{} is unmounted", mountpoint.display());
    Ok(())
}

fn make_filesystem(job: &Job) -> Result<Filesystem, Error> {
    let settings = &job.settings;
    let pool = Pool::new(Config {
        isolation: settings.isolation,
        ..Config::default()
    })?;
    log::info!("image metadata is read in {}", pool.isolation());
    let path = job.source.path();
    let fail = || Error::system(format!("{}", path.display()));
    let root = job.source.root().try_clone_to_owned().map_err(fail())?;
    let images = Images {
        pool,
        tree: Arc::new(Tree::new(root, path)),
        allow_paths: settings.allow_paths.clone(),
        backing: settings.backing,
    };
    let source = job.source.try_clone().map_err(fail())?;
    Filesystem::new(source, Box::new(images), settings.behaviour.clone())
        .map_err(|error| Error::Refused(format!("{}: {error}", path.display())))
}

fn open_session(
    filesystem: &Arc<Filesystem>,
    mountpoint: &Path,
    options: &device::KernelOptions,
) -> io::Result<Session<Adapter>> {
    let device = device::attach(filesystem.source(), mountpoint, options)?;
    let mut config = fuser::Config::default();
    let threads = thread::available_parallelism().map_or(1, usize::from);
    config.n_threads = Some(threads.clamp(*THREADS.start(), *THREADS.end()));
    // A user without access to the device can still mount, through the helper,
    // but not open the device once more.
    config.clone_fd = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .is_ok();
    // Whom the kernel lets through was decided when it was mounted.
    let adapter = Adapter::new(Arc::clone(filesystem));
    Session::from_fd(adapter, device, SessionACL::All, config).inspect_err(|_| {
        let _ = device::detach(mountpoint, true);
    })
}

/// Every open image takes some descriptors.
fn raise_open_files() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// Keeps the signals that end the daemon for the thread that waits for them.
fn block_signals() -> io::Result<SigSet> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        signals.add(signal);
    }
    signals.thread_block()?;
    Ok(signals)
}

/// The first signal unmounts, the second one ends the process at once.
fn await_signals(
    signals: &SigSet,
    filesystem: &Filesystem,
    mountpoint: &Path,
    mounted: Option<&Mounted>,
) {
    let mut stopping = false;
    while let Ok(signal) = signals.wait() {
        if signal == Signal::SIGHUP {
            continue;
        }
        if stopping {
            log::warn!("{signal} again: stopping at once");
            std::process::exit(1);
        }
        stopping = true;
        log::info!("{signal}: unmounting {}", mountpoint.display());
        filesystem.flush_all();
        if let Err(error) = unmount(mountpoint, mounted) {
            log::error!("{}: could not be unmounted: {error}", mountpoint.display());
            stopping = false;
        }
    }
}

fn unmount(mountpoint: &Path, mounted: Option<&Mounted>) -> io::Result<()> {
    if device::mounted_at(mountpoint)?.as_ref() != mounted {
        return Err(io::Error::other("something else is mounted over it"));
    }
    match device::detach(mountpoint, false) {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            log::warn!(
                "{} is in use: it is gone for new users, and served until the last one is done",
                mountpoint.display()
            );
            device::detach(mountpoint, true)
        }
        other => other,
    }
}

/// A thread of its own: the kernel may let the notice wait until a request on
/// the same pages has been answered.
fn invalidate_forever(notifier: &Notifier, told: &Receiver<(NodeId, Stale)>) {
    while let Ok((node, what)) = told.recv() {
        let offset = match what {
            Stale::Attributes => -1,
            Stale::Content => 0,
        };
        if let Err(error) = notifier.inval_inode(INodeNo(node.0), offset, 0) {
            log::debug!("{what:?} of {} could not be invalidated: {error}", node.0);
        }
    }
}

fn flush_forever(filesystem: &Filesystem) {
    let mut failing = Vec::new();
    loop {
        thread::sleep(FLUSH_EVERY);
        filesystem.tick(&mut failing);
    }
}
