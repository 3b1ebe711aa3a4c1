//! One vCPU.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::ioctls;
use super::run_page::RunPage;
use super::vm::Inner;
use crate::{Cpuid, Error, Registers, SpecialRegisters, Vcpu, VcpuExit, VcpuKicker, VcpuState};

/// A vCPU on KVM.
pub(super) struct KvmVcpu {
    pub(super) fd: VcpuFd,
    /// Dropped after the vCPU: it owns the guest's memory.
    pub(super) vm: Arc<Inner>,
    pub(super) cpuid: Cpuid,
    index: u32,
    page: Arc<RunPage>,
    kicker: VcpuKicker,
}

/// How KVM_RUN came back.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Returned {
    /// With an exit in the shared page.
    Exit,
    /// For a kick or another signal.
    Interrupted,
}

impl KvmVcpu {
    pub(super) fn new(vm: Arc<Inner>, index: u32) -> Result<Self, Error> {
        let fd = vm
            .fd
            .create_vcpu(index.into())
            .map_err(Error::ioctl("KVM_CREATE_VCPU"))?;
        // SAFETY: `fd` is open for the whole borrow, which ends with this call.
        let borrowed = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
        let page = Arc::new(RunPage::map(borrowed, vm.fd.run_size())?);
        if let Some(rings) = vm.record.rings() {
            rings.add(borrowed)?;
        }
        Ok(Self {
            fd,
            vm,
            cpuid: Cpuid::default(),
            index,
            kicker: VcpuKicker::new(Arc::clone(&page)),
            page,
        })
    }

    fn enter(&mut self) -> Result<VcpuExit<'_>, Error> {
        loop {
            if self.run_once()? == Returned::Interrupted {
                self.page.immediate_exit().store(0, Ordering::SeqCst);
                return Ok(VcpuExit::Interrupted);
            }
            match self.vm.record.rings() {
                Some(rings) if self.page.is_dirty_ring_full() => rings.make_room(&self.vm.fd)?,
                Some(_) | None => break,
            }
        }
        // SAFETY: KVM_RUN has returned. The result borrows `self` exclusively, and both a further
        // KVM_RUN and a further decode of this page need that borrow.
        unsafe { self.page.decode() }
    }

    fn run_once(&mut self) -> Result<Returned, Error> {
        let Err(cause) = ioctls::run(&self.fd) else {
            return Ok(Returned::Exit);
        };
        // An uninitialised vCPU that is woken says EAGAIN.
        let interrupted = matches!(
            cause.kind(),
            io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
        );
        if interrupted {
            return Ok(Returned::Interrupted);
        }
        let fault = matches!(cause.raw_os_error(), Some(libc::EFAULT | libc::EHWPOISON));
        // The one exit that comes with an error (api.rst, KVM_EXIT_MEMORY_FAULT).
        if fault && self.page.is_memory_fault() {
            return Ok(Returned::Exit);
        }
        Err(Error::Ioctl {
            operation: "KVM_RUN",
            cause,
        })
    }

    /// Writes MSRs in batches; names the first that is refused.
    pub(super) fn write_msrs(&self, entries: &[kvm_msr_entry]) -> Result<(), Error> {
        for batch in entries.chunks(KVM_MAX_MSR_ENTRIES) {
            let msrs = Msrs::from_entries(batch).map_err(|_| Error::TooMany {
                what: "MSRs",
                given: batch.len(),
                limit: KVM_MAX_MSR_ENTRIES,
            })?;
            let written = self
                .fd
                .set_msrs(&msrs)
                .map_err(Error::ioctl("KVM_SET_MSRS"))?;
            if let Some(refused) = batch.get(written) {
                return Err(Error::Msr {
                    index: refused.index,
                    value: refused.data,
                });
            }
        }
        Ok(())
    }
}

impl Vcpu for KvmVcpu {
    fn index(&self) -> u32 {
        self.index
    }

    fn run(&mut self) -> Result<VcpuExit<'_>, Error> {
        self.enter()
    }

    fn complete_pending_io(&mut self) -> Result<VcpuExit<'_>, Error> {
        self.page.immediate_exit().store(1, Ordering::SeqCst);
        self.enter()
    }

    fn kicker(&self) -> VcpuKicker {
        self.kicker.clone()
    }

    fn registers(&self) -> Result<Registers, Error> {
        self.fd.get_regs().map_err(Error::ioctl("KVM_GET_REGS"))
    }

    fn set_registers(&mut self, registers: &Registers) -> Result<(), Error> {
        let set = self.fd.set_regs(registers);
        set.map_err(Error::ioctl("KVM_SET_REGS"))
    }

    fn special_registers(&self) -> Result<SpecialRegisters, Error> {
        self.fd.get_sregs().map_err(Error::ioctl("KVM_GET_SREGS"))
    }

    fn set_special_registers(&mut self, registers: &SpecialRegisters) -> Result<(), Error> {
        let set = self.fd.set_sregs(registers);
        set.map_err(Error::ioctl("KVM_SET_SREGS"))
    }

    fn set_cpuid(&mut self, cpuid: &Cpuid) -> Result<(), Error> {
        self.fd
            .set_cpuid2(&cpuid.to_kvm()?)
            .map_err(Error::ioctl("KVM_SET_CPUID2"))?;
        self.cpuid = cpuid.clone();
        Ok(())
    }

    fn set_msrs(&mut self, msrs: &[(u32, u64)]) -> Result<(), Error> {
        if msrs.len() > KVM_MAX_MSR_ENTRIES {
            return Err(Error::TooMany {
                what: "MSRs",
                given: msrs.len(),
                limit: KVM_MAX_MSR_ENTRIES,
            });
        }
        let entry = |(index, data): &(u32, u64)| kvm_msr_entry {
            index: *index,
            data: *data,
            ..Default::default()
        };
        let entries: Vec<_> = msrs.iter().map(entry).collect();
        self.write_msrs(&entries)
    }

    fn mark_paused(&self) -> Result<(), Error> {
        if !self.vm.capabilities.clock_pause {
            return Ok(());
        }
        match self.fd.kvmclock_ctrl() {
            // The guest has not switched its KVM clock on.
            Err(error) if error.errno() == libc::EINVAL => Ok(()),
            other => other.map_err(Error::ioctl("KVM_KVMCLOCK_CTRL")),
        }
    }

    fn save(&mut self) -> Result<VcpuState, Error> {
        self.save_state()
    }

    fn restore(&mut self, state: &VcpuState) -> Result<(), Error> {
        self.restore_state(state)
    }
}
