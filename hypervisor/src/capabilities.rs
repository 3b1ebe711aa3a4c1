//! What the host's KVM can do.

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP,
    KVM_CAP_EXT_CPUID, KVM_CAP_IOEVENTFD_ANY_LENGTH, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_CLOCK_REALTIME, KVM_DIRTY_LOG_INITIALLY_SET,
};
use kvm_ioctls::{Cap, Kvm};

use crate::Error;

/// The largest number of vCPUs with 8-bit APIC IDs (255 is the broadcast).
const MAX_APIC_IDS: u32 = 255;
/// `KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE` of linux/kvm.h, bit 0 of what
/// KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 offers. (An x86 KVM that has bit 1 has bit 0.)
pub(crate) const KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE: u32 = 1;
/// Bytes of `struct kvm_dirty_gfn` (linux/kvm.h).
pub(crate) const RING_ENTRY_BYTES: u32 = 16;

/// Capabilities of the host's KVM, read once.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Capabilities {
    /// Most vCPUs a VM can have here.
    pub max_vcpus: u32,
    /// Most vCPUs that make sense here (usually the host's CPUs).
    pub recommended_vcpus: u32,
    /// Number of memory slots.
    pub memory_slots: u32,
    /// Bytes of a vCPU's extended state (FPU and vector registers).
    pub xsave_bytes: usize,
    /// Whether an i8254 timer with saveable state is offered.
    pub timer: bool,
    /// Bytes of nested virtualisation state, 0 without nesting.
    pub nested_state_bytes: usize,
    /// The guest's TSC rate can be set.
    pub tsc_control: bool,
    /// The guest's TSC rate can be read.
    pub tsc_frequency: bool,
    /// The local APIC's timer has the TSC deadline mode.
    pub tsc_deadline: bool,
    /// The guest's clock can be set relative to real time.
    pub clock_realtime: bool,
    /// The guest can be told that its clock was stopped.
    pub clock_pause: bool,
    /// Memory slots can be read-only.
    pub read_only_memory: bool,
    /// Doorbells can match accesses of any length.
    pub doorbell_any_length: bool,
    /// Which ways of keeping a dirty log there are.
    pub dirty_log: DirtyLogCapabilities,
}

/// Ways of keeping a dirty log, besides the bitmap cleared at the read, which every KVM has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DirtyLogCapabilities {
    /// The bitmap can be cleared piece by piece (KVM_CLEAR_DIRTY_LOG).
    pub manual_clear: bool,
    /// It can be all set when logging starts, with nothing write-protected.
    pub initially_set: bool,
    /// Most entries of a vCPU's dirty ring; 0 without rings.
    pub ring_entries: u32,
    /// With rings, some of KVM's own writes are in a bitmap only.
    pub ring_with_bitmap: bool,
    /// The capability that enables rings.
    pub(crate) ring_cap: u32,
}

impl DirtyLogCapabilities {
    fn probe(kvm: &Kvm) -> Self {
        let manual = raw(kvm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);
        // The older of the two is for hosts which, like x86, order stores by themselves.
        let rings = [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING];
        let (ring_cap, ring_bytes) = rings
            .map(|cap| (cap, raw(kvm, cap)))
            .into_iter()
            .find(|(_, bytes)| *bytes > 0)
            .unwrap_or((KVM_CAP_DIRTY_LOG_RING_ACQ_REL, 0));
        Self {
            manual_clear: manual & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE != 0,
            initially_set: manual & KVM_DIRTY_LOG_INITIALLY_SET != 0,
            ring_entries: ring_bytes / RING_ENTRY_BYTES,
            ring_with_bitmap: raw(kvm, KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP) != 0,
            ring_cap,
        }
    }
}

/// What no VM of ours can do without.
const REQUIRED: [(Cap, &str); 14] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
];

/// Bytes of the area of KVM_GET_XSAVE, where KVM_GET_XSAVE2 is not offered.
pub(crate) const XSAVE_LEGACY_BYTES: usize = 4096;
/// Upper bound we accept for extended state; today's largest (AMX) is below 11 KiB.
pub(crate) const XSAVE_MAX_BYTES: usize = 64 * 1024;

impl Capabilities {
    /// Asks `kvm`.
    ///
    /// # Errors
    /// [`Error::MissingCapability`] for what no VM can do without.
    pub(crate) fn probe(kvm: &Kvm) -> Result<Self, Error> {
        for (cap, capability) in REQUIRED {
            if !kvm.check_extension(cap) {
                return Err(Error::MissingCapability { capability });
            }
        }
        if raw(kvm, KVM_CAP_EXT_CPUID) == 0 {
            let capability = "KVM_CAP_EXT_CPUID";
            return Err(Error::MissingCapability { capability });
        }
        let limit = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let clock_flags = int(kvm, Cap::AdjustClock);
        Ok(Self {
            max_vcpus: limit(kvm.get_max_vcpus()).min(MAX_APIC_IDS),
            recommended_vcpus: limit(kvm.get_nr_vcpus()),
            memory_slots: limit(kvm.get_nr_memslots()),
            xsave_bytes: xsave_bytes(kvm.check_extension_int(Cap::Xsave2)),
            timer: kvm.check_extension(Cap::Pit2) && kvm.check_extension(Cap::PitState2),
            nested_state_bytes: usize::try_from(int(kvm, Cap::NestedState)).unwrap_or(0),
            tsc_control: kvm.check_extension(Cap::TscControl),
            tsc_frequency: kvm.check_extension(Cap::GetTscKhz),
            tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
            clock_realtime: clock_flags & KVM_CLOCK_REALTIME != 0,
            clock_pause: kvm.check_extension(Cap::KvmclockCtrl),
            read_only_memory: kvm.check_extension(Cap::ReadonlyMem),
            doorbell_any_length: raw(kvm, KVM_CAP_IOEVENTFD_ANY_LENGTH) != 0,
            dirty_log: DirtyLogCapabilities::probe(kvm),
        })
    }
}

/// The size KVM_CAP_XSAVE2 names; 0 or less means that only KVM_GET_XSAVE is offered.
pub(crate) fn xsave_bytes(answer: i32) -> usize {
    usize::try_from(answer).unwrap_or(0).max(XSAVE_LEGACY_BYTES)
}

fn int(kvm: &Kvm, cap: Cap) -> u32 {
    u32::try_from(kvm.check_extension_int(cap)).unwrap_or(0)
}

fn raw(kvm: &Kvm, cap: u32) -> u32 {
    u32::try_from(kvm.check_extension_raw(cap.into())).unwrap_or(0)
}
