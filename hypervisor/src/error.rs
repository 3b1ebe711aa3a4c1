//! What can go wrong between the VMM and KVM.

use std::io;

/// Why an operation on the hypervisor failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The device node could not be opened.
    #[error("cannot open {path}: load the kvm module and check the file's permissions")]
    Open {
        /// Device node.
        path: String,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// The kernel speaks another KVM API.
    #[error("KVM API version is {found}, wanted {wanted}")]
    ApiVersion {
        /// What the kernel has.
        found: i32,
        /// What this build speaks.
        wanted: i32,
    },
    /// The kernel lacks something no VM can do without.
    #[error("this KVM lacks {capability}, which Ferry needs: use a newer kernel")]
    MissingCapability {
        /// Name in `linux/kvm.h`.
        capability: &'static str,
    },
    /// What was asked for needs a capability this KVM lacks.
    #[error("{operation} needs {capability}, which this KVM lacks")]
    Unsupported {
        /// What was asked for.
        operation: &'static str,
        /// Name in `linux/kvm.h`.
        capability: &'static str,
    },
    /// A call into KVM failed.
    #[error("{operation} failed")]
    Ioctl {
        /// Name in `linux/kvm.h`.
        operation: &'static str,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// All memory slots are taken.
    #[error("all {limit} memory slots are in use")]
    NoMemorySlot {
        /// How many there are.
        limit: u32,
    },
    /// The VM has no such memory slot.
    #[error("memory slot {slot} is not in use")]
    UnknownSlot {
        /// Asked for.
        slot: u32,
    },
    /// A mapping whose address or length is not whole pages.
    #[error("memory at GPA {gpa:#x}, HVA {hva:#x}, {length:#x} bytes is not whole 4 KiB pages")]
    Unaligned {
        /// Guest physical address.
        gpa: u64,
        /// Host virtual address.
        hva: u64,
        /// Bytes.
        length: u64,
    },
    /// The buffer for a dirty log must have one bit per page, in whole words.
    #[error("dirty log of slot {slot} takes {wanted} words, the buffer has {given}")]
    DirtyLogBuffer {
        /// Memory slot.
        slot: u32,
        /// Words KVM writes.
        wanted: usize,
        /// Words given.
        given: usize,
    },
    /// The slot's writes are not recorded.
    #[error("dirty logging of memory slot {slot} is off")]
    DirtyLogOff {
        /// Memory slot.
        slot: u32,
    },
    /// A dirty log is cleared in whole words of a slot's pages.
    #[error(
        "pages {first_page} and up, {words} words of 64, cannot be cleared in the dirty log of \
         slot {slot}, which has {pages} pages"
    )]
    DirtyLogPiece {
        /// Memory slot.
        slot: u32,
        /// First page of the piece.
        first_page: u64,
        /// Words of the piece.
        words: usize,
        /// Pages of the slot.
        pages: u64,
    },
    /// A ring has a power of two of entries, up to a limit.
    #[error("a dirty ring of {entries} entries is not possible: give a power of two up to {limit}")]
    DirtyRingEntries {
        /// Asked for.
        entries: u32,
        /// The kernel's limit.
        limit: u32,
    },
    /// The kernel does not take rings of that size.
    #[error(
        "this KVM does not take dirty rings of {entries} entries: give more (a CPU that logs \
         writes itself needs 1024)"
    )]
    DirtyRingRefused {
        /// Asked for.
        entries: u32,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// Rings of this KVM do not have all writes.
    #[error(
        "dirty rings of this KVM leave out writes that no vCPU made \
         (KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP): use a dirty bitmap"
    )]
    DirtyRingNotEnough,
    /// KVM does not write-protect again what was taken out of the dirty rings.
    #[error("KVM_RESET_DIRTY_RINGS does nothing, and {waiting} entries wait for it")]
    DirtyRingReset {
        /// Entries not reset.
        waiting: usize,
    },
    /// ioeventfds match 1, 2, 4 or 8 bytes, or any length without a value.
    #[error("an ioeventfd of {length} bytes (datamatch: {datamatch}) is not possible")]
    IoEventLength {
        /// Asked for.
        length: u8,
        /// Whether a value was to be matched.
        datamatch: bool,
    },
    /// Too many entries for one call.
    #[error("{what}: {given} entries, at most {limit} are possible")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many were given.
        given: usize,
        /// How many are possible.
        limit: usize,
    },
    /// The vCPU index is beyond what KVM (or 8-bit APIC IDs) can have.
    #[error("vCPU {index} is not possible: this host can have {limit}")]
    VcpuIndex {
        /// Asked for.
        index: u32,
        /// How many vCPUs are possible.
        limit: u32,
    },
    /// A model-specific register could not be written.
    #[error("MSR {index:#x} does not take {value:#x}: this host's CPU or KVM differs")]
    Msr {
        /// Which register.
        index: u32,
        /// What was to be written.
        value: u64,
    },
    /// Saved state of another format.
    #[error("saved {what} state has version {found}, this build reads {wanted}")]
    StateVersion {
        /// vCPU or VM.
        what: &'static str,
        /// In the state.
        found: u16,
        /// Understood here.
        wanted: u16,
    },
    /// Saved state that cannot be decoded or is too large.
    #[error("saved {what} state is malformed: {reason}")]
    StateFormat {
        /// vCPU or VM.
        what: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The extended (FPU, vector) state is of another size.
    #[error(
        "saved XSAVE area has {saved} bytes, this host's has {here}: the hosts' CPUs differ in \
         vector extensions"
    )]
    XsaveSize {
        /// Bytes in the state.
        saved: usize,
        /// Bytes here.
        here: usize,
    },
    /// The time stamp counter runs at another rate and cannot be scaled.
    #[error("the guest's TSC runs at {saved} kHz, this host's at {here} kHz without scaling")]
    TscFrequency {
        /// kHz in the state.
        saved: u32,
        /// kHz here.
        here: u32,
    },
    /// The kernel's report of an exit does not make sense.
    #[error("KVM reported an exit that lies outside its shared page")]
    MalformedExit,
    /// The kick signal could not be set up.
    #[error("signal that takes vCPUs out of the guest: {operation} failed")]
    Signal {
        /// What was tried.
        operation: &'static str,
        /// Why.
        #[source]
        cause: io::Error,
    },
}

impl Error {
    /// For `map_err` on calls of kvm-ioctls.
    pub(crate) fn ioctl(operation: &'static str) -> impl Fn(kvm_ioctls::Error) -> Self {
        move |cause| Self::Ioctl {
            operation,
            cause: io::Error::from_raw_os_error(cause.errno()),
        }
    }

    /// The last operating-system error, as failure of `operation`.
    pub(crate) fn last(operation: &'static str) -> Self {
        Self::Ioctl {
            operation,
            cause: io::Error::last_os_error(),
        }
    }
}
