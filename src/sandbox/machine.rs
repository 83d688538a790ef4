//! What a session needs of the thing that runs a guest program.

use super::SandboxError;
use super::kvm::Vm;
use std::time::Duration;
use vm_memory::VolatileSlice;

/// A guest program that is stopped at its doorbell, or has not begun.
pub(super) trait Machine: Send {
    /// The memory that host and guest share: from
    /// [`WINDOW`](instar_guest::layout::WINDOW) on.
    fn window(&self) -> VolatileSlice<'_>;

    /// Lets the program run until it rings, and returns the value that it rang
    /// with. `cpu` bounds its CPU time. After an error the machine is of no use.
    fn run(&mut self, cpu: Duration) -> Result<u32, SandboxError>;

    /// The VM in it, if it is one: a VM can serve another image after a reset.
    fn into_vm(self: Box<Self>) -> Option<Vm> {
        None
    }
}
