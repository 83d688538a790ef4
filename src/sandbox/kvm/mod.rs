//! The micro-VM: memory, one vCPU in ring 3, one doorbell port, nothing else.
//!
//! There is no firmware, no kernel, no interrupt controller, no device. The
//! vCPU begins in 64-bit user mode at the program's entry; any fault shuts the
//! VM down, because there is no handler; any exit but a ring of the doorbell is
//! the end.

mod cpu;
mod exit;
mod memory;
mod paging;
mod timer;

use super::error::SandboxError;
use super::machine::Machine;
use super::program::GuestProgram;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use memory::Memory;
use nix::errno::Errno;
use std::time::Duration;
use vm_memory::VolatileSlice;

/// A VM with a program in it.
pub(super) struct Vm {
    // Dropped in this order: nothing may run when the memory goes.
    vcpu: VcpuFd,
    _vm: VmFd,
    memory: Memory,
    program: GuestProgram,
    cpu: cpu::State,
    used: bool,
}

impl Vm {
    /// Makes a VM with `memory` bytes, loads the program and sets the vCPU to
    /// its entry.
    pub(super) fn new(program: &GuestProgram, memory: u64) -> Result<Self, SandboxError> {
        let kvm = Kvm::new().map_err(|error| SandboxError::KvmMissing(errno(error)))?;
        let vm = kvm.create_vm().map_err(failed("create a VM"))?;
        let memory = Memory::new(memory)?;
        memory.load(program)?;
        memory.register(&vm)?;
        let vcpu = vm.create_vcpu(0).map_err(failed("create a vCPU"))?;
        let cpu = cpu::State::new(&vcpu, program.entry(), memory.len())?;
        cpu.apply(&vcpu)?;
        Ok(Self {
            vcpu,
            _vm: vm,
            memory,
            program: program.clone(),
            cpu,
            used: false,
        })
    }

    /// Makes the VM as new: memory, registers, everything. The guest must be
    /// stopped at its doorbell.
    pub(super) fn make_clean(&mut self) -> Result<(), SandboxError> {
        if self.used {
            self.settle()?;
            self.memory.reset(&self.program)?;
            self.cpu.apply(&self.vcpu)?;
            self.used = false;
        }
        Ok(())
    }

    /// Makes the VM small while it waits for its next image.
    pub(super) fn park(&self) -> Result<(), SandboxError> {
        self.memory.release()
    }

    /// Completes the port write that the vCPU stopped in, so that nothing of it
    /// is left to happen after a reset.
    fn settle(&mut self) -> Result<(), SandboxError> {
        self.vcpu.set_kvm_immediate_exit(1);
        let settled = match self.vcpu.run() {
            Err(error) if error.errno() == libc::EINTR => Ok(()),
            Err(error) => Err(failed("complete an exit")(error)),
            Ok(_) => Err(SandboxError::Kvm("complete an exit", Errno::EINVAL)),
        };
        self.vcpu.set_kvm_immediate_exit(0);
        settled
    }
}

impl Machine for Vm {
    fn window(&self) -> VolatileSlice<'_> {
        self.memory.window()
    }

    fn run(&mut self, cpu: Duration) -> Result<u32, SandboxError> {
        self.used = true;
        let budget = timer::Budget::start(cpu, self.vcpu.get_kvm_run())?;
        loop {
            match self.vcpu.run() {
                Ok(exit) => return exit::ring(exit).map_err(SandboxError::Crashed),
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                    budget.check()?;
                    self.vcpu.set_kvm_immediate_exit(0);
                }
                Err(error) => return Err(failed("run the vCPU")(error)),
            }
        }
    }

    fn into_vm(self: Box<Self>) -> Option<Vm> {
        Some(*self)
    }
}

fn errno(error: kvm_ioctls::Error) -> Errno {
    Errno::from_raw(error.errno())
}

fn failed(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> SandboxError {
    move |error| SandboxError::Kvm(what, errno(error))
}
