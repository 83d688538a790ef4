//! Whether the kernel of this machine can read and write raw images of a mount
//! by itself, and lets us ask it to. It says the first only to somebody who
//! mounts.

use super::Problem;
use fuser::{Config, InitFlags, KernelConfig, Request, Session, SessionACL};
use instar::fs::device::{self, KernelOptions};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::{fs, io};

/// The number of the capability that the kernel asks for, CAP_SYS_ADMIN.
const ADMIN: u32 = 21;
/// What the user namespace that the machine started with maps.
const ALL_USERS: [&str; 3] = ["0", "0", "4294967295"];

/// Tries it.
pub fn check() -> Result<(), Problem> {
    let problem = |found: String| Problem::new(found, "raw images are mounted without it, slower");
    if !is_admin().unwrap_or(false) {
        return Err(problem(
            "only root outside of user namespaces may have it".to_string(),
        ));
    }
    match is_offered() {
        Ok(true) => Ok(()),
        Ok(false) => Err(problem(
            "the kernel does not offer it: Linux 6.9 or newer does, with CONFIG_FUSE_PASSTHROUGH"
                .to_string(),
        )),
        Err(error) => Err(problem(format!("a mount to try it on: {error}"))),
    }
}

fn is_admin() -> io::Result<bool> {
    let users = fs::read_to_string("/proc/self/uid_map")?;
    let status = fs::read_to_string("/proc/self/status")?;
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|set| u64::from_str_radix(set.trim(), 16).ok());
    let has = effective.is_some_and(|set| set >> ADMIN & 1 == 1);
    Ok(has && users.split_whitespace().eq(ALL_USERS))
}

/// A filesystem without files, which hears what the kernel offers.
struct Probe(Arc<AtomicBool>);

impl fuser::Filesystem for Probe {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let offered = config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok();
        self.0.store(offered, Ordering::Release);
        Ok(())
    }
}

fn is_offered() -> io::Result<bool> {
    let offered = Arc::new(AtomicBool::new(false));
    let at = tempfile::tempdir()?;
    let device = device::attach(at.path(), at.path(), &KernelOptions::default())?;
    let probe = Probe(Arc::clone(&offered));
    let asked = Session::from_fd(probe, device, SessionACL::Owner, Config::default());
    device::detach(at.path(), true)?;
    asked.map(|_| offered.load(Ordering::Acquire))
}
