//! What can go wrong between the VMM and the hypervisor.

/// Why the hypervisor did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum HypervisorError {
    /// The device cannot be opened.
    #[error(
        "cannot open /dev/kvm: is KVM loaded (modprobe kvm_intel or kvm_amd), and may this user open it?"
    )]
    Open(#[source] std::io::Error),
    /// The kernel speaks another KVM API.
    #[error("KVM API version {found} found, version {wanted} is needed")]
    ApiVersion {
        /// What the kernel has.
        found: i32,
        /// What Ferry speaks.
        wanted: u32,
    },
    /// A capability that Ferry cannot do without is missing.
    #[error("this host's KVM lacks {0}, which Ferry needs")]
    Missing(&'static str),
    /// An ioctl failed.
    #[error("KVM: {operation} failed")]
    Ioctl {
        /// What was asked of KVM.
        operation: &'static str,
        /// What it said.
        #[source]
        cause: std::io::Error,
    },
    /// The buffer for a dirty log is too small for the slot.
    #[error("dirty log of slot {slot} takes {needed} words, the buffer holds {given}")]
    DirtyBuffer {
        /// The memory slot.
        slot: u32,
        /// Words the slot's log has.
        needed: usize,
        /// Words in the buffer.
        given: usize,
    },
    /// There is no such memory slot.
    #[error("there is no memory slot {0}")]
    NoSlot(u32),
    /// A table for KVM could not be built.
    #[error("too many entries for {0}")]
    TooManyEntries(&'static str),
    /// A memory slot that KVM cannot take.
    #[error("memory slot {slot}: {reason}")]
    BadSlot {
        /// The memory slot.
        slot: u32,
        /// What is wrong with it.
        reason: &'static str,
    },
}

impl HypervisorError {
    /// An error of `operation` from kvm-ioctls' errno.
    pub(crate) fn ioctl(operation: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |errno| Self::Ioctl {
            operation,
            cause: std::io::Error::from_raw_os_error(errno.errno()),
        }
    }

    /// An error of `operation` from the thread's errno.
    pub(crate) fn last(operation: &'static str) -> Self {
        Self::Ioctl {
            operation,
            cause: std::io::Error::last_os_error(),
        }
    }
}
