//! The traits over `/dev/kvm`.

use std::sync::Arc;

use kvm_bindings::{KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::Kvm;

use crate::{Capabilities, Cpuid, Error, Hypervisor, Vm, VmOptions, kick};

mod dirty_log;
mod dirty_ring;
mod ioctls;
pub(crate) mod run_page;
mod undisturbed;
mod vcpu;
mod vcpu_mapping;
mod vcpu_state;
mod vfio;
mod vm;

/// KVM's device node.
const DEVICE: &std::ffi::CStr = c"/dev/kvm";

/// An open `/dev/kvm`.
#[derive(Debug)]
pub struct KvmHypervisor {
    kvm: Kvm,
    capabilities: Capabilities,
    /// Registers KVM names as part of a vCPU's state.
    msrs: Arc<[u32]>,
}

impl KvmHypervisor {
    /// Opens `/dev/kvm` and checks that it has what Ferry needs.
    ///
    /// Also installs the handler of the signal that takes vCPUs out of the guest.
    ///
    /// # Errors
    /// [`Error::Open`], [`Error::ApiVersion`], [`Error::MissingCapability`].
    pub fn open() -> Result<Self, Error> {
        let kvm = Kvm::new_with_path(DEVICE).map_err(|cause| Error::Open {
            path: DEVICE.to_string_lossy().into_owned(),
            cause: std::io::Error::from_raw_os_error(cause.errno()),
        })?;
        let found = kvm.get_api_version();
        let wanted = i32::try_from(KVM_API_VERSION).unwrap_or(i32::MAX);
        if found != wanted {
            return Err(Error::ApiVersion { found, wanted });
        }
        let capabilities = Capabilities::probe(&kvm)?;
        let msrs = kvm
            .get_msr_index_list()
            .map_err(Error::ioctl("KVM_GET_MSR_INDEX_LIST"))?
            .as_slice()
            .into();
        kick::install_handler()?;
        Ok(Self {
            kvm,
            capabilities,
            msrs,
        })
    }
}

impl Hypervisor for KvmHypervisor {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn supported_cpuid(&self) -> Result<Cpuid, Error> {
        let cpuid = self
            .kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(Error::ioctl("KVM_GET_SUPPORTED_CPUID"))?;
        let mut cpuid = Cpuid::from_kvm(&cpuid);
        // KVM does not report it, though it has it (Documentation/virt/kvm/api.rst,
        // KVM_GET_SUPPORTED_CPUID).
        cpuid.set_tsc_deadline(self.capabilities.tsc_deadline);
        Ok(cpuid)
    }

    fn create_vm(&self, options: &VmOptions) -> Result<Arc<dyn Vm>, Error> {
        let vm = vm::KvmVm::new(
            &self.kvm,
            self.capabilities.clone(),
            Arc::clone(&self.msrs),
            options,
        )?;
        Ok(Arc::new(vm))
    }
}

#[cfg(test)]
mod tests;
