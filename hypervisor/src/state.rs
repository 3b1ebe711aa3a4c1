//! Saved state of vCPUs and the VM, and its encoding.

use kvm_bindings::{
    kvm_clock_data, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::KvmNestedStateBuffer;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::{Cpuid, Error};

/// Version of [`VcpuState`].
pub(crate) const VCPU_STATE_VERSION: u16 = 1;
/// Version of [`VmState`].
pub(crate) const VM_STATE_VERSION: u16 = 1;

/// The whole state of a vCPU, CPUID included. Untrusted when it comes from elsewhere.
#[derive(Clone, Serialize, Deserialize)]
pub struct VcpuState {
    pub(crate) version: u16,
    pub(crate) cpuid: Cpuid,
    pub(crate) tsc_khz: Option<u32>,
    pub(crate) mp_state: kvm_mp_state,
    pub(crate) registers: kvm_regs,
    pub(crate) special_registers: kvm_sregs,
    pub(crate) xcrs: kvm_xcrs,
    /// Opaque: KVM may put more components there than the guest's CPUID names.
    pub(crate) xsave: Vec<u8>,
    pub(crate) debug_registers: kvm_debugregs,
    pub(crate) local_apic: kvm_lapic_state,
    pub(crate) msrs: Vec<kvm_msr_entry>,
    pub(crate) nested: Option<Box<KvmNestedStateBuffer>>,
    pub(crate) events: kvm_vcpu_events,
}

/// The state of a VM's interrupt chips, timer and clock. Untrusted when it comes from elsewhere.
#[derive(Clone, Serialize, Deserialize)]
pub struct VmState {
    pub(crate) version: u16,
    pub(crate) chips: Vec<kvm_irqchip>,
    pub(crate) timer: Option<kvm_pit_state2>,
    pub(crate) clock: kvm_clock_data,
}

impl VcpuState {
    /// Upper bound in bytes of the encoded state.
    pub const MAX_BYTES: usize = 256 * 1024;

    /// The CPUID the guest sees.
    pub fn cpuid(&self) -> &Cpuid {
        &self.cpuid
    }

    /// Encodes it.
    ///
    /// # Errors
    /// [`Error::StateFormat`] if it is larger than [`MAX_BYTES`](Self::MAX_BYTES).
    pub fn encode(&self) -> Result<Vec<u8>, Error> {
        encode("vCPU", self, Self::MAX_BYTES)
    }

    /// Decodes it.
    ///
    /// # Errors
    /// [`Error::StateVersion`], [`Error::StateFormat`].
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        decode("vCPU", bytes, Self::MAX_BYTES, VCPU_STATE_VERSION)
    }
}

impl VmState {
    /// Upper bound in bytes of the encoded state.
    pub const MAX_BYTES: usize = 16 * 1024;

    /// Encodes it.
    ///
    /// # Errors
    /// [`Error::StateFormat`] if it is larger than [`MAX_BYTES`](Self::MAX_BYTES).
    pub fn encode(&self) -> Result<Vec<u8>, Error> {
        encode("VM", self, Self::MAX_BYTES)
    }

    /// Decodes it.
    ///
    /// # Errors
    /// [`Error::StateVersion`], [`Error::StateFormat`].
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        decode("VM", bytes, Self::MAX_BYTES, VM_STATE_VERSION)
    }
}

fn encode<T: Serialize>(what: &'static str, state: &T, limit: usize) -> Result<Vec<u8>, Error> {
    let malformed = |reason: String| Error::StateFormat { what, reason };
    let bytes = postcard::to_stdvec(state).map_err(|error| malformed(error.to_string()))?;
    if bytes.len() > limit {
        return Err(malformed(format!("{} bytes, limit {limit}", bytes.len())));
    }
    Ok(bytes)
}

fn decode<T: DeserializeOwned>(
    what: &'static str,
    bytes: &[u8],
    limit: usize,
    wanted: u16,
) -> Result<T, Error> {
    let malformed = |reason: String| Error::StateFormat { what, reason };
    if bytes.len() > limit {
        return Err(malformed(format!("{} bytes, limit {limit}", bytes.len())));
    }
    // The version is the first field of every version.
    let (found, _) =
        postcard::take_from_bytes::<u16>(bytes).map_err(|error| malformed(error.to_string()))?;
    if found != wanted {
        return Err(Error::StateVersion {
            what,
            found,
            wanted,
        });
    }
    let (state, rest) =
        postcard::take_from_bytes(bytes).map_err(|error| malformed(error.to_string()))?;
    if !rest.is_empty() {
        return Err(malformed(format!("{} bytes too many", rest.len())));
    }
    Ok(state)
}
