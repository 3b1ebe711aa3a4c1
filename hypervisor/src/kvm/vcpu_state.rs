//! Saving and restoring a vCPU, in the order KVM's side effects ask for.

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::KvmNestedStateBuffer;

use super::ioctls;
use super::vcpu::KvmVcpu;
use crate::state::{VCPU_STATE_VERSION, VcpuState};
use crate::{Error, Vcpu};

/// IA32_TIME_STAMP_COUNTER.
const MSR_TSC: u32 = 0x10;
/// IA32_TSC_DEADLINE.
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// How far apart two TSC rates may be and still be taken as one, in parts per million; KVM's own
/// default tolerance.
const TSC_TOLERANCE_PPM: u64 = 250;

impl KvmVcpu {
    /// Reading has side effects: MP_STATE makes the local APIC accept pending INIT and SIPI, so
    /// it is first; the events are what is left after all others were read, so they are last.
    pub(super) fn save_state(&mut self) -> Result<VcpuState, Error> {
        let mp_state = self
            .fd
            .get_mp_state()
            .map_err(Error::ioctl("KVM_GET_MP_STATE"))?;
        let registers = self.registers()?;
        let special_registers = self.special_registers()?;
        let mut xsave = vec![0; self.vm.xsave_bytes];
        ioctls::get_xsave(&self.fd, self.vm.xsave2, &mut xsave)?;
        let xcrs = self.fd.get_xcrs().map_err(Error::ioctl("KVM_GET_XCRS"))?;
        let debug_registers = self
            .fd
            .get_debug_regs()
            .map_err(Error::ioctl("KVM_GET_DEBUGREGS"))?;
        let local_apic = self.fd.get_lapic().map_err(Error::ioctl("KVM_GET_LAPIC"))?;
        let msrs = self.read_msrs()?;
        let nested = self.read_nested()?;
        let tsc_khz = match self.vm.capabilities.tsc_frequency {
            true => Some(self.tsc_khz()?),
            false => None,
        };
        let events = self
            .fd
            .get_vcpu_events()
            .map_err(Error::ioctl("KVM_GET_VCPU_EVENTS"))?;
        Ok(VcpuState {
            version: VCPU_STATE_VERSION,
            cpuid: self.cpuid.clone(),
            tsc_khz,
            mp_state,
            registers,
            special_registers,
            xcrs,
            xsave,
            debug_registers,
            local_apic,
            msrs,
            nested,
            events,
        })
    }

    /// * CPUID first: it decides which registers exist and which bits they take.
    /// * TSC rate before the TSC.
    /// * XCRs before the extended state they enable.
    /// * Special registers (APIC base) before the local APIC, that before the MSRs (the TSC
    ///   deadline arms the APIC's timer); within the MSRs the TSC first and the deadline last.
    /// * Nested state after the MSRs that enable it; events after all that may raise one; the
    ///   run state last.
    pub(super) fn restore_state(&mut self, state: &VcpuState) -> Result<(), Error> {
        self.check(state)?;
        self.set_cpuid(&state.cpuid)?;
        self.restore_tsc_rate(state.tsc_khz)?;
        self.set_special_registers(&state.special_registers)?;
        self.fd
            .set_xcrs(&state.xcrs)
            .map_err(Error::ioctl("KVM_SET_XCRS"))?;
        ioctls::set_xsave(&self.fd, &state.xsave)?;
        self.set_registers(&state.registers)?;
        self.fd
            .set_debug_regs(&state.debug_registers)
            .map_err(Error::ioctl("KVM_SET_DEBUGREGS"))?;
        self.fd
            .set_lapic(&state.local_apic)
            .map_err(Error::ioctl("KVM_SET_LAPIC"))?;
        self.write_msrs(&in_restore_order(&state.msrs))?;
        if let Some(nested) = &state.nested {
            self.fd
                .set_nested_state(nested)
                .map_err(Error::ioctl("KVM_SET_NESTED_STATE"))?;
        }
        self.fd
            .set_vcpu_events(&state.events)
            .map_err(Error::ioctl("KVM_SET_VCPU_EVENTS"))?;
        self.fd
            .set_mp_state(state.mp_state)
            .map_err(Error::ioctl("KVM_SET_MP_STATE"))?;
        self.mark_paused()
    }

    /// What can be refused before anything changes.
    fn check(&self, state: &VcpuState) -> Result<(), Error> {
        if state.version != VCPU_STATE_VERSION {
            return Err(Error::StateVersion {
                what: "vCPU",
                found: state.version,
                wanted: VCPU_STATE_VERSION,
            });
        }
        if state.xsave.len() != self.vm.xsave_bytes {
            return Err(Error::XsaveSize {
                saved: state.xsave.len(),
                here: self.vm.xsave_bytes,
            });
        }
        if let Some(nested) = &state.nested {
            if self.vm.capabilities.nested_state_bytes == 0 {
                return Err(Error::Unsupported {
                    operation: "taking over nested virtualisation state",
                    capability: "KVM_CAP_NESTED_STATE",
                });
            }
            let size = usize::try_from(nested.size).unwrap_or(usize::MAX);
            if size > size_of::<KvmNestedStateBuffer>() {
                return Err(Error::StateFormat {
                    what: "vCPU",
                    reason: format!("nested state claims {size} bytes"),
                });
            }
        }
        Ok(())
    }

    fn tsc_khz(&self) -> Result<u32, Error> {
        let khz = self.fd.get_tsc_khz();
        khz.map_err(Error::ioctl("KVM_GET_TSC_KHZ"))
    }

    fn restore_tsc_rate(&self, saved: Option<u32>) -> Result<(), Error> {
        let capabilities = &self.vm.capabilities;
        let Some(saved) = saved.filter(|_| capabilities.tsc_frequency) else {
            return Ok(());
        };
        let here = self.tsc_khz()?;
        if here == saved {
            return Ok(());
        }
        if capabilities.tsc_control {
            let set = self.fd.set_tsc_khz(saved);
            return set.map_err(Error::ioctl("KVM_SET_TSC_KHZ"));
        }
        let apart = u64::from(here.abs_diff(saved));
        if apart.saturating_mul(1_000_000) > u64::from(saved).saturating_mul(TSC_TOLERANCE_PPM) {
            return Err(Error::TscFrequency { saved, here });
        }
        Ok(())
    }

    /// The registers KVM lists, but for those it then does not give. KVM_GET_MSRS stops at the
    /// first it refuses, so reading goes on behind that one.
    fn read_msrs(&self) -> Result<Vec<kvm_msr_entry>, Error> {
        let mut found = Vec::with_capacity(self.vm.msrs.len());
        let mut rest: &[u32] = &self.vm.msrs;
        while !rest.is_empty() {
            let batch = rest.get(..KVM_MAX_MSR_ENTRIES).unwrap_or(rest);
            let wanted: Vec<_> = batch
                .iter()
                .map(|index| kvm_msr_entry {
                    index: *index,
                    ..Default::default()
                })
                .collect();
            let mut msrs = Msrs::from_entries(&wanted).map_err(|_| Error::TooMany {
                what: "MSRs",
                given: wanted.len(),
                limit: KVM_MAX_MSR_ENTRIES,
            })?;
            let count = self
                .fd
                .get_msrs(&mut msrs)
                .map_err(Error::ioctl("KVM_GET_MSRS"))?;
            found.extend(msrs.as_slice().iter().take(count).copied());
            let done = match batch.get(count) {
                Some(index) => {
                    tracing::debug!(msr = index, "KVM lists this MSR but does not give it");
                    count.saturating_add(1)
                }
                None => batch.len(),
            };
            rest = rest.get(done..).unwrap_or_default();
        }
        Ok(found)
    }

    fn read_nested(&self) -> Result<Option<Box<KvmNestedStateBuffer>>, Error> {
        if self.vm.capabilities.nested_state_bytes == 0 {
            return Ok(None);
        }
        let mut buffer = Box::new(KvmNestedStateBuffer::empty());
        let size = self
            .fd
            .nested_state(&mut buffer)
            .map_err(Error::ioctl("KVM_GET_NESTED_STATE"))?;
        // A header alone says that the vCPU does not use virtualisation itself.
        Ok(size.map(|_| buffer))
    }
}

/// The TSC first, its deadline last.
fn in_restore_order(msrs: &[kvm_msr_entry]) -> Vec<kvm_msr_entry> {
    let mut ordered = msrs.to_vec();
    ordered.sort_by_key(|msr| match msr.index {
        MSR_TSC => 0,
        MSR_TSC_DEADLINE => 2,
        _ => 1,
    });
    ordered
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tsc_first_deadline_last_others_as_they_were() {
        let entry = |index| kvm_msr_entry {
            index,
            ..Default::default()
        };
        let ordered = in_restore_order(&[0x6e0, 0x174, 0x10, 0xc000_0080].map(entry));
        let indices: Vec<_> = ordered.iter().map(|msr| msr.index).collect();
        assert_eq!(indices, [0x10, 0x174, 0xc000_0080, 0x6e0]);
    }
}
