//! KVM.

mod vcpu;
mod vm;

use std::sync::Arc;

use kvm_bindings::{KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::Cap;

use crate::{Capabilities, CpuId, Hypervisor, HypervisorError, Result, Vm};

/// The host's KVM.
#[derive(Debug)]
pub struct Kvm {
    fd: kvm_ioctls::Kvm,
    capabilities: Capabilities,
}

impl Kvm {
    /// Opens `/dev/kvm` and checks that it has all that Ferry cannot do without.
    ///
    /// # Errors
    /// When it cannot be opened, speaks another API, or lacks something.
    pub fn new() -> Result<Self> {
        let fd = kvm_ioctls::Kvm::new().map_err(|errno| {
            HypervisorError::Open(std::io::Error::from_raw_os_error(errno.errno()))
        })?;
        let found = fd.get_api_version();
        if u32::try_from(found) != Ok(KVM_API_VERSION) {
            return Err(HypervisorError::ApiVersion {
                found,
                wanted: KVM_API_VERSION,
            });
        }
        let needed = [
            (Cap::Irqchip, "an in-kernel interrupt controller"),
            (Cap::Irqfd, "irqfd"),
            (Cap::Ioeventfd, "ioeventfd"),
            (Cap::IrqRouting, "interrupt routing"),
            (Cap::UserMemory, "user memory slots"),
            (Cap::ImmediateExit, "immediate_exit"),
            (Cap::SignalMsi, "MSI"),
            (Cap::ExtCpuid, "KVM_SET_CPUID2"),
        ];
        for (cap, name) in needed {
            if !fd.check_extension(cap) {
                return Err(HypervisorError::Missing(name));
            }
        }
        let capabilities = probe(&fd);
        Ok(Self { fd, capabilities })
    }
}

fn probe(fd: &kvm_ioctls::Kvm) -> Capabilities {
    // A negative answer means that KVM does not know the question.
    let size = |cap| usize::try_from(fd.check_extension_int(cap)).unwrap_or(0);
    let flags = |cap| u32::try_from(fd.check_extension_int(cap)).unwrap_or(0);
    let has = |cap| fd.check_extension(cap);
    Capabilities {
        max_vcpus: fd.get_max_vcpus(),
        max_memory_slots: fd.get_nr_memslots(),
        max_irq_routes: flags(Cap::IrqRouting),
        xsave2_size: size(Cap::Xsave2),
        nested_state_size: size(Cap::NestedState),
        tsc_control: has(Cap::TscControl),
        get_tsc_khz: has(Cap::GetTscKhz),
        xcrs: has(Cap::Xcrs),
        debug_regs: has(Cap::Debugregs),
        vcpu_events: has(Cap::VcpuEvents),
        mp_state: has(Cap::MpState),
        clock_flags: flags(Cap::AdjustClock),
        kvmclock_ctrl: has(Cap::KvmclockCtrl),
        pit2: has(Cap::Pit2) && has(Cap::PitState2),
        x2apic_api: has(Cap::X2ApicApi),
    }
}

impl Hypervisor for Kvm {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn create_vm(&self) -> Result<Arc<dyn Vm>> {
        Ok(Arc::new(vm::KvmVm::new(&self.fd, self.capabilities)?))
    }

    fn supported_cpuid(&self) -> Result<CpuId> {
        self.fd
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(HypervisorError::ioctl("KVM_GET_SUPPORTED_CPUID"))
    }

    fn msr_indices(&self) -> Result<Vec<u32>> {
        let list = self
            .fd
            .get_msr_index_list()
            .map_err(HypervisorError::ioctl("KVM_GET_MSR_INDEX_LIST"))?;
        Ok(list.as_slice().to_vec())
    }
}
