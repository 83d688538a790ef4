//! The vCPU's registers at the program's entry: 64-bit mode, ring 3, and a task
//! segment that permits one I/O port, the doorbell.
//!
//! Bits: AMD64 Architecture Programmer's Manual, volume 2, chapter 3 (system
//! registers), section 4.8 (long-mode segment descriptors) and section 12.2.5
//! (64-bit task-state segment).

use super::failed;
use crate::sandbox::error::SandboxError;
use instar_guest::layout::{DOORBELL, PML4, TSS};
use kvm_bindings::{CpuId, kvm_cpuid_entry2, kvm_fpu, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;

/// Protection, coprocessor monitoring and type, numeric errors, write protection,
/// paging.
const CR0: u64 = 1 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 31;
/// Time-stamp reads are privileged (the guest has no clock, where the hypervisor
/// honours that), physical-address extension, SSE with its exceptions.
const CR4: u64 = 1 << 2 | 1 << 5 | 1 << 9 | 1 << 10;
/// Long mode enabled and active, no-execute pages. No SYSCALL: it faults.
const EFER: u64 = 1 << 8 | 1 << 10 | 1 << 11;
/// The bit that is always one. No I/O privilege: the task segment decides.
const RFLAGS: u64 = 1 << 1;
/// x87 control word and MXCSR as the System V ABI wants them at entry.
const FPU_CONTROL: u16 = 0x37f;
const MXCSR: u32 = 0x1f80;

/// What every run of the program begins with.
pub(super) struct State {
    sregs: kvm_sregs,
    regs: kvm_regs,
    fpu: kvm_fpu,
}

impl State {
    /// Tells the vCPU what it can do and works out its first state. The program
    /// finds 1 in `rdi` (it runs in a VM) and the end of memory in `rsi`.
    pub(super) fn new(vcpu: &VcpuFd, entry: u64, memory: u64) -> Result<Self, SandboxError> {
        vcpu.set_cpuid2(&cpuid()?)
            .map_err(failed("set the vCPU's features"))?;
        let reset = vcpu
            .get_sregs()
            .map_err(failed("read the vCPU's registers"))?;
        Ok(Self {
            sregs: user_mode(reset),
            regs: kvm_regs {
                rip: entry,
                rflags: RFLAGS,
                rdi: 1,
                rsi: memory,
                ..kvm_regs::default()
            },
            fpu: kvm_fpu {
                fcw: FPU_CONTROL,
                mxcsr: MXCSR,
                ..kvm_fpu::default()
            },
        })
    }

    /// Puts the vCPU at the program's entry, whatever it did before.
    pub(super) fn apply(&self, vcpu: &VcpuFd) -> Result<(), SandboxError> {
        let set = failed("set the vCPU's registers");
        vcpu.set_sregs(&self.sregs).map_err(&set)?;
        vcpu.set_regs(&self.regs).map_err(&set)?;
        vcpu.set_fpu(&self.fpu).map_err(&set)
    }
}

/// 64-bit ring 3 on our page tables; no descriptor tables, so that every fault
/// shuts the VM down.
fn user_mode(reset: kvm_sregs) -> kvm_sregs {
    let mut sregs = reset;
    let data = kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: 0x1b,
        type_: 0b0011,
        present: 1,
        dpl: 3,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        ..kvm_segment::default()
    };
    sregs.cs = kvm_segment {
        selector: 0x23,
        type_: 0b1011,
        db: 0,
        l: 1,
        ..data
    };
    sregs.ss = data;
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.tr.base = TSS;
    sregs.tr.limit = task_segment().len() as u32 - 1;
    sregs.gdt.base = 0;
    sregs.gdt.limit = 0;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = CR0;
    sregs.cr3 = PML4;
    sregs.cr4 = CR4;
    sregs.efer = EFER;
    sregs
}

/// A 64-bit task-state segment whose only use is its I/O permission bitmap: it
/// ends behind the four bytes of the doorbell's port, and only these are clear.
pub(super) fn task_segment() -> Vec<u8> {
    const BITMAP_OFFSET_FIELD: usize = 0x66;
    const BITMAP: usize = 0x68;
    let (byte, bit) = (BITMAP + usize::from(DOORBELL / 8), DOORBELL % 8);
    // Processors read two bytes of the bitmap, so one more must follow.
    let mut tss = vec![0; byte + 2];
    tss[BITMAP..].fill(0xff);
    tss[BITMAP_OFFSET_FIELD..BITMAP].copy_from_slice(&(BITMAP as u16).to_le_bytes());
    tss[byte] &= !(0xf << bit);
    tss
}

/// A processor with what the guest's target needs (the x86-64 baseline) and
/// nothing more, whatever the host has.
fn cpuid() -> Result<CpuId, SandboxError> {
    // FPU, TSC, MSR, PAE, CX8, CMOV, MMX, FXSR, SSE, SSE2.
    const BASE: u32 =
        1 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 15 | 1 << 23 | 1 << 24 | 1 << 25 | 1 << 26;
    const NO_EXECUTE: u32 = 1 << 20;
    const LONG_MODE: u32 = 1 << 29;
    // 36 bits of physical, 48 bits of linear address.
    const ADDRESS_BITS: u32 = 36 | 48 << 8;
    let leaf = |function, eax, edx| kvm_cpuid_entry2 {
        function,
        eax,
        edx,
        ..kvm_cpuid_entry2::default()
    };
    let leaves = [
        leaf(0, 1, 0),
        leaf(1, 0, BASE),
        leaf(0x8000_0000, 0x8000_0008, 0),
        leaf(0x8000_0001, 0, NO_EXECUTE | LONG_MODE),
        leaf(0x8000_0008, ADDRESS_BITS, 0),
    ];
    CpuId::from_entries(&leaves)
        .map_err(|_| SandboxError::Kvm("describe the vCPU", nix::errno::Errno::E2BIG))
}
