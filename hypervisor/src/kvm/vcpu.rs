//! A vCPU of KVM.

use std::sync::atomic::AtomicU8;

use kvm_ioctls::VcpuFd;

use crate::kick::Bound;
use crate::{CpuId, GuestAddr, HypervisorError, Regs, Result, Sregs, Vcpu, VcpuExit};

/// A vCPU of KVM.
#[derive(Debug)]
pub(super) struct KvmVcpu {
    pub(super) fd: VcpuFd,
}

impl KvmVcpu {
    pub(super) fn new(fd: VcpuFd) -> Self {
        Self { fd }
    }
}

impl Vcpu for KvmVcpu {
    fn run(&mut self) -> Result<VcpuExit<'_>> {
        use kvm_ioctls::VcpuExit as Exit;
        match self.fd.run() {
            Ok(Exit::IoIn(port, data)) => Ok(VcpuExit::IoIn(port, data)),
            Ok(Exit::IoOut(port, data)) => Ok(VcpuExit::IoOut(port, data)),
            Ok(Exit::MmioRead(address, data)) => Ok(VcpuExit::MmioRead(GuestAddr(address), data)),
            Ok(Exit::MmioWrite(address, data)) => Ok(VcpuExit::MmioWrite(GuestAddr(address), data)),
            Ok(Exit::Hlt) => Ok(VcpuExit::Hlt),
            Ok(Exit::Shutdown) => Ok(VcpuExit::Shutdown),
            Ok(Exit::SystemEvent(kind, _)) => Ok(VcpuExit::SystemEvent(kind)),
            Ok(Exit::InternalError) => Ok(VcpuExit::InternalError),
            Ok(Exit::FailEntry(reason, _)) => Ok(VcpuExit::FailEntry { reason }),
            Ok(Exit::Intr) => Ok(VcpuExit::Interrupted),
            Ok(other) => Ok(VcpuExit::Other(format!("{other:?}"))),
            Err(errno) => match errno.errno() {
                libc::EINTR | libc::EAGAIN => Ok(VcpuExit::Interrupted),
                _ => Err(HypervisorError::ioctl("KVM_RUN")(errno)),
            },
        }
    }

    fn complete_pending_io(&mut self) -> Result<()> {
        self.fd.set_kvm_immediate_exit(1);
        let result = match self.fd.run() {
            // With immediate_exit KVM finishes what the last exit began and comes back (EINTR).
            Ok(_) => Ok(()),
            Err(errno) if matches!(errno.errno(), libc::EINTR | libc::EAGAIN) => Ok(()),
            Err(errno) => Err(HypervisorError::ioctl("KVM_RUN (immediate exit)")(errno)),
        };
        self.fd.set_kvm_immediate_exit(0);
        result
    }

    fn internal_error(&mut self) -> (u32, Vec<u64>) {
        let run = self.fd.get_kvm_run();
        // SAFETY: the union was filled in by KVM on an exit of this kind; every bit pattern of
        // these integers is valid in any case.
        let internal = unsafe { run.__bindgen_anon_1.internal };
        let count = usize::try_from(internal.ndata)
            .unwrap_or(0)
            .min(internal.data.len());
        (
            internal.suberror,
            internal.data.iter().take(count).copied().collect(),
        )
    }

    fn bind_to_thread(&mut self) -> Bound {
        let flag = &raw mut self.fd.get_kvm_run().immediate_exit;
        // SAFETY: the kvm_run page stays mapped as long as the vCPU; callers keep it on the thread
        // until after the guard is gone. A byte is read and written whole.
        unsafe { Bound::new(flag.cast::<AtomicU8>()) }
    }

    fn clear_kick(&mut self) {
        self.fd.set_kvm_immediate_exit(0);
    }

    fn set_cpuid(&self, cpuid: &CpuId) -> Result<()> {
        self.fd
            .set_cpuid2(cpuid)
            .map_err(HypervisorError::ioctl("KVM_SET_CPUID2"))
    }

    fn regs(&self) -> Result<Regs> {
        self.fd
            .get_regs()
            .map_err(HypervisorError::ioctl("KVM_GET_REGS"))
    }

    fn set_regs(&self, regs: &Regs) -> Result<()> {
        self.fd
            .set_regs(regs)
            .map_err(HypervisorError::ioctl("KVM_SET_REGS"))
    }

    fn sregs(&self) -> Result<Sregs> {
        self.fd
            .get_sregs()
            .map_err(HypervisorError::ioctl("KVM_GET_SREGS"))
    }

    fn set_sregs(&self, sregs: &Sregs) -> Result<()> {
        self.fd
            .set_sregs(sregs)
            .map_err(HypervisorError::ioctl("KVM_SET_SREGS"))
    }
}
