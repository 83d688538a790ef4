//! Where sessions come from: VMs that wait for the next image, or processes.

use super::error::SandboxError;
use super::kvm::Vm;
use super::limits::Limits;
use super::machine::Machine;
use super::process::Process;
use super::program::GuestProgram;
use super::session::Session;
use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

/// Which sandbox to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Isolation {
    /// KVM where it works, else a process.
    #[default]
    Auto,
    /// A micro-VM or nothing.
    Kvm,
    /// A process without system calls.
    Process,
}

impl fmt::Display for Isolation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Kvm => "kvm",
            Self::Process => "process",
        })
    }
}

impl FromStr for Isolation {
    type Err = UnknownIsolation;

    fn from_str(name: &str) -> Result<Self, UnknownIsolation> {
        match name {
            "auto" => Ok(Self::Auto),
            "kvm" => Ok(Self::Kvm),
            "process" => Ok(Self::Process),
            _ => Err(UnknownIsolation),
        }
    }
}

/// A name that is not an [`Isolation`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownIsolation;

impl fmt::Display for UnknownIsolation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("expected auto, kvm or process")
    }
}

impl std::error::Error for UnknownIsolation {}

/// The sandbox that a pool uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChosenIsolation {
    /// Micro-VMs.
    Kvm,
    /// Processes.
    Process {
        /// Why not KVM, if [`Isolation::Auto`] would have preferred it.
        instead_of_kvm: Option<SandboxError>,
    },
}

impl fmt::Display for ChosenIsolation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kvm => f.write_str("kvm"),
            Self::Process { .. } => f.write_str("process"),
        }
    }
}

/// How a pool is to be.
#[derive(Clone, Debug)]
pub struct Config {
    /// What runs in the sandbox.
    pub program: GuestProgram,
    /// Which sandbox.
    pub isolation: Isolation,
    /// What a guest may use up.
    pub limits: Limits,
    /// The most VMs that wait for the next image. Each keeps the few MiB that
    /// every image needs.
    pub idle: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            program: GuestProgram::shipped(),
            isolation: Isolation::Auto,
            limits: Limits::default(),
            idle: 4,
        }
    }
}

/// The source of sessions.
pub struct Pool {
    config: Config,
    chosen: ChosenIsolation,
    idle: Mutex<Vec<Vm>>,
}

impl Pool {
    /// Chooses the sandbox. For [`Isolation::Auto`] and [`Isolation::Kvm`] a
    /// first VM is made, so that a machine without KVM is noticed now.
    ///
    /// # Errors
    /// [`Isolation::Kvm`] never falls back: it fails with KVM's reason.
    pub fn new(config: Config) -> Result<Arc<Self>, SandboxError> {
        let config = Config {
            limits: config.limits.clamped(),
            ..config
        };
        let make = || Vm::new(&config.program, config.limits.memory);
        let (chosen, first) = choose(config.isolation, make)?;
        log_choice(config.isolation, &chosen);
        Ok(Arc::new(Self {
            config,
            chosen,
            idle: Mutex::new(first.into_iter().collect()),
        }))
    }

    /// Which sandbox the pool uses, and why.
    pub fn isolation(&self) -> &ChosenIsolation {
        &self.chosen
    }

    /// What its guests may use up.
    pub fn limits(&self) -> Limits {
        self.config.limits
    }

    /// A session for one image, in a sandbox that has seen no other, or nothing
    /// of it any more.
    pub fn session(self: &Arc<Self>) -> Result<Session, SandboxError> {
        let machine: Box<dyn Machine> = match self.chosen {
            ChosenIsolation::Kvm => Box::new(self.vm()?),
            ChosenIsolation::Process { .. } => Box::new(Process::new(
                &self.config.program,
                self.config.limits.memory,
            )?),
        };
        let pool = Some(Arc::clone(self));
        Ok(Session::new(machine, self.config.limits, pool))
    }

    /// A clean VM: a waiting one, or a new one where there is none or where it
    /// cannot be cleaned.
    fn vm(&self) -> Result<Vm, SandboxError> {
        while let Some(mut vm) = self.lock().pop() {
            match vm.make_clean() {
                Ok(()) => return Ok(vm),
                Err(error) => log::warn!("a VM is thrown away: {error}"),
            }
        }
        Vm::new(&self.config.program, self.config.limits.memory)
    }

    /// Takes back what a session has used, if it can serve another.
    pub(super) fn give_back(&self, machine: Box<dyn Machine>) {
        if self.config.idle == 0 {
            return;
        }
        let Some(vm) = machine.into_vm() else { return };
        if let Err(error) = vm.park() {
            return log::warn!("a VM is thrown away: {error}");
        }
        let mut idle = self.lock();
        if idle.len() < self.config.idle {
            idle.push(vm);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Vm>> {
        // A list of VMs is whole at any time, so a panic elsewhere is no reason
        // to stop.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Decides by trying to make a VM, where one is wanted.
fn choose<T>(
    wanted: Isolation,
    make: impl FnOnce() -> Result<T, SandboxError>,
) -> Result<(ChosenIsolation, Option<T>), SandboxError> {
    let process = |instead_of_kvm| (ChosenIsolation::Process { instead_of_kvm }, None);
    match wanted {
        Isolation::Process => Ok(process(None)),
        Isolation::Kvm => Ok((ChosenIsolation::Kvm, Some(make()?))),
        Isolation::Auto => Ok(match make() {
            Ok(vm) => (ChosenIsolation::Kvm, Some(vm)),
            Err(reason) => process(Some(reason)),
        }),
    }
}

fn log_choice(wanted: Isolation, chosen: &ChosenIsolation) {
    match chosen {
        ChosenIsolation::Process {
            instead_of_kvm: Some(reason),
        } => log::info!("sandbox: process, because {reason}"),
        chosen => log::debug!("sandbox: {chosen} (asked for {wanted})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::errno::Errno;

    const MISSING: SandboxError = SandboxError::KvmMissing(Errno::ENOENT);

    #[test]
    fn kvm_is_taken_where_it_works() {
        for wanted in [Isolation::Auto, Isolation::Kvm] {
            let chosen = choose(wanted, || Ok("vm"));
            assert_eq!(chosen, Ok((ChosenIsolation::Kvm, Some("vm"))));
        }
    }

    #[test]
    fn auto_falls_back_and_keeps_the_reason() {
        let chosen = choose::<()>(Isolation::Auto, || Err(MISSING));
        let instead_of_kvm = Some(MISSING);
        let process = ChosenIsolation::Process { instead_of_kvm };
        assert_eq!(chosen, Ok((process, None)));
    }

    #[test]
    fn kvm_never_falls_back() {
        let chosen = choose::<()>(Isolation::Kvm, || Err(MISSING));
        assert_eq!(chosen, Err(MISSING));
    }

    #[test]
    fn a_process_needs_no_vm() {
        let chosen = choose::<()>(Isolation::Process, || unreachable!("no VM is wanted"));
        let instead_of_kvm = None;
        let process = ChosenIsolation::Process { instead_of_kvm };
        assert_eq!(chosen, Ok((process, None)));
    }

    #[test]
    fn a_missing_kvm_is_explained_with_the_way_out() {
        assert_eq!(
            MISSING.to_string(),
            "/dev/kvm does not exist; load the kvm module or choose --isolation=process"
        );
    }

    #[test]
    fn names_are_read_as_they_are_written() {
        for isolation in [Isolation::Auto, Isolation::Kvm, Isolation::Process] {
            assert_eq!(isolation.to_string().parse(), Ok(isolation));
        }
        assert_eq!("KVM".parse::<Isolation>(), Err(UnknownIsolation));
    }
}
