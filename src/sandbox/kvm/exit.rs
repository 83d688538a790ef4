//! What an exit of the VM means: a function over the exit, without effects.

use crate::sandbox::error::Crash;
use instar_guest::layout::DOORBELL;
use kvm_ioctls::VcpuExit;

/// The value that the guest rang with; anything but a ring is a crash.
pub(super) fn ring(exit: VcpuExit<'_>) -> Result<u32, Crash> {
    match exit {
        VcpuExit::IoOut(port, data) => match (port, <[u8; 4]>::try_from(data)) {
            (DOORBELL, Ok(value)) => Ok(u32::from_le_bytes(value)),
            _ => Err(Crash::WrongPort {
                port,
                size: data.len(),
            }),
        },
        VcpuExit::IoIn(port, _) => Err(Crash::PortRead(port)),
        VcpuExit::MmioRead(addr, _) | VcpuExit::MmioWrite(addr, _) => {
            Err(Crash::OutsideMemory(addr))
        }
        VcpuExit::MemoryFault { gpa, .. } => Err(Crash::OutsideMemory(gpa)),
        VcpuExit::Shutdown => Err(Crash::Fault),
        VcpuExit::Hlt => Err(Crash::Halted),
        VcpuExit::Exception => Err(Crash::Exit("an exception")),
        VcpuExit::Hypercall(_) => Err(Crash::Exit("a hypercall")),
        VcpuExit::Debug(_) => Err(Crash::Exit("a debug event")),
        VcpuExit::FailEntry(..) => Err(Crash::Exit("a failed entry")),
        VcpuExit::InternalError => Err(Crash::Exit("an instruction that KVM cannot emulate")),
        VcpuExit::SystemEvent(..) => Err(Crash::Exit("a system event")),
        _ => Err(Crash::Exit("an unknown exit")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_four_byte_write_to_the_doorbell_is_a_ring_with_its_value() {
        let exit = VcpuExit::IoOut(DOORBELL, &[1, 2, 3, 4]);
        assert_eq!(ring(exit), Ok(0x0403_0201));
    }

    #[test]
    fn a_write_of_another_width_or_to_another_port_is_a_crash() {
        for (port, data) in [
            (DOORBELL, &[1][..]),
            (DOORBELL, &[1, 0]),
            (DOORBELL, &[1; 8]),
            (DOORBELL + 1, &[1, 0, 0, 0]),
            (0x3f8, &[1, 0, 0, 0]),
        ] {
            let size = data.len();
            let exit = VcpuExit::IoOut(port, data);
            assert_eq!(ring(exit), Err(Crash::WrongPort { port, size }));
        }
    }

    #[test]
    fn every_other_exit_is_a_crash_of_its_own_kind() {
        let mut data = [0; 4];
        assert_eq!(
            ring(VcpuExit::IoIn(DOORBELL, &mut data)),
            Err(Crash::PortRead(DOORBELL))
        );
        assert_eq!(
            ring(VcpuExit::MmioWrite(0xdead_0000, &[0])),
            Err(Crash::OutsideMemory(0xdead_0000))
        );
        assert_eq!(ring(VcpuExit::Shutdown), Err(Crash::Fault));
        assert_eq!(ring(VcpuExit::Hlt), Err(Crash::Halted));
        assert_eq!(
            ring(VcpuExit::InternalError),
            Err(Crash::Exit("an instruction that KVM cannot emulate"))
        );
        assert_eq!(
            ring(VcpuExit::Unsupported(99)),
            Err(Crash::Exit("an unknown exit"))
        );
    }
}
