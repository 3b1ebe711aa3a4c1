//! What can go wrong with a device of the kernel's VFIO.

use std::path::PathBuf;

use rustix::io::Errno;
use vfio_user::Malformed;
use vm_migration::Gpa;

use crate::backend::BackendError;

/// Why the kernel does not give a device, or the device does not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The path is no device with an IOMMU group.
    #[error(
        "{path} has no IOMMU group: give a device's folder such as \
         /sys/bus/pci/devices/0000:01:00.0, on a host whose IOMMU is on"
    )]
    NoGroup {
        /// The path that was given.
        path: PathBuf,
        /// What the system said.
        #[source]
        cause: std::io::Error,
    },
    /// The device's name or group cannot be used.
    #[error("{path} does not name a device")]
    BadName {
        /// The path that was given.
        path: PathBuf,
    },
    /// A file of VFIO cannot be opened.
    #[error("cannot open {path}: {remedy}")]
    Open {
        /// The file.
        path: PathBuf,
        /// What to do.
        remedy: &'static str,
        /// What the kernel said.
        #[source]
        cause: Errno,
    },
    /// The device has no file of its own.
    #[error(
        "{path} has no file in /dev/vfio/devices: bind the device to vfio-pci, on a kernel with \
         CONFIG_VFIO_DEVICE_CDEV; or use groups (--platform iommufd=off)"
    )]
    NoFile {
        /// The path that was given.
        path: PathBuf,
        /// What the system said.
        #[source]
        cause: std::io::Error,
    },
    /// A device's file was given, and iommufd is not to be used.
    #[error("a device given by its descriptor needs iommufd: leave out --platform iommufd=off")]
    NeedsIommufd,
    /// The kernel does not give a device to an iommufd.
    #[error("the device cannot be used with iommufd: {remedy}")]
    Bind {
        /// What to do.
        remedy: &'static str,
        /// What the kernel said.
        #[source]
        cause: Errno,
    },
    /// Guest RAM that is mapped already lies where the device's IOMMU has something else.
    #[error(
        "guest RAM lies where the device's IOMMU reserves addresses \
         (/sys/kernel/iommu_groups/*/reserved_regions): give the guest less memory"
    )]
    Reserved {
        /// What the kernel said.
        #[source]
        cause: Errno,
    },
    /// The hypervisor does not take note of a file.
    #[error("the hypervisor does not take the device's file")]
    Registry(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Another interface than the one known here.
    #[error("VFIO of this kernel has version {found}, this build knows version 0 with type 1 v2")]
    Version {
        /// What the kernel has.
        found: i32,
    },
    /// Other devices of the group have drivers of the host.
    #[error(
        "IOMMU group {group} is not free: bind every device in \
         /sys/kernel/iommu_groups/{group}/devices to vfio-pci"
    )]
    NotViable {
        /// The group.
        group: u32,
    },
    /// It is no PCI device.
    #[error("it is not a PCI device")]
    NotPci,
    /// An answer of the kernel does not hold together.
    #[error("the kernel's answer about {what} is malformed")]
    Malformed {
        /// What it is about.
        what: &'static str,
        /// What is wrong with it.
        #[source]
        cause: Malformed,
    },
    /// Guest RAM lies where the IOMMU cannot reach, or where it has something else.
    #[error(
        "guest RAM at {gpa} ({len:#x} bytes) is not within the addresses that the IOMMU gives \
         to devices: give the guest less memory"
    )]
    OutOfReach {
        /// Where the RAM is.
        gpa: Gpa,
        /// How much.
        len: u64,
    },
    /// Memory cannot be pinned.
    #[error(
        "the host does not let {len:#x} bytes of guest RAM be locked: raise the limit of locked \
         memory (ulimit -l, LimitMEMLOCK=) to more than the guest's RAM"
    )]
    Locked {
        /// How much.
        len: u64,
        /// What the kernel said.
        #[source]
        cause: Errno,
    },
    /// The region is mapped otherwise, or not at all.
    #[error("guest RAM at {gpa} is not mapped as it was said to be")]
    NotMapped {
        /// Where the RAM is.
        gpa: Gpa,
    },
    /// The device has no such region, or it ends before the access does.
    #[error("region {region} has no {len} bytes at {offset:#x}")]
    OutsideRegion {
        /// The region.
        region: u32,
        /// Offset of the access.
        offset: u64,
        /// Bytes of the access.
        len: usize,
    },
    /// The device took or gave less than was asked.
    #[error("{done} of {wanted} bytes were transferred")]
    Short {
        /// Bytes that were.
        done: usize,
        /// Bytes that were to be.
        wanted: usize,
    },
    /// The host has fewer interrupt vectors for it.
    #[error("the host has {available} interrupt vectors for the device, which needs {wanted}")]
    Vectors {
        /// Vectors to be had.
        available: i32,
        /// Vectors asked for.
        wanted: usize,
    },
    /// There is no migration data session in the device's state.
    #[error("the device has no migration data session")]
    NoSession,
    /// A migration state of a number that is not known.
    #[error("the device tells migration state {0}, which is not known")]
    UnknownState(u32),
    /// The device neither took nor gave migration data for a long time.
    #[error("the device was not ready for {seconds} s")]
    Stalled {
        /// How long it was waited for.
        seconds: u64,
    },
    /// A page size that is no power of two.
    #[error("the device chose pages of {0} bytes, which is not a power of two")]
    PageSize(u64),
    /// A range of all 2^64 addresses.
    #[error("a range of all 2^64 addresses cannot be logged")]
    WholeSpace,
    /// No eventfd or thread is to be had.
    #[error("out of host resources for the device's news")]
    Resources(#[source] std::io::Error),
    /// The kernel refused.
    #[error("the kernel cannot {operation}")]
    Refused {
        /// What was asked.
        operation: &'static str,
        /// What it said.
        #[source]
        cause: Errno,
    },
}

impl KernelError {
    /// An errno of `operation`.
    pub(crate) fn refused(operation: &'static str) -> impl Fn(Errno) -> Self + Copy {
        move |cause| Self::Refused { operation, cause }
    }

    /// Whether it says that the device is not there any more.
    pub(crate) fn is_gone(&self) -> bool {
        matches!(
            self,
            Self::Refused {
                cause: Errno::NODEV,
                ..
            }
        )
    }
}

/// Puts an error into the seam's terms.
pub(crate) fn failed(operation: &'static str) -> impl Fn(KernelError) -> BackendError {
    move |error| match error.is_gone() {
        true => BackendError::Gone(Box::new(error)),
        false => BackendError::Failed {
            operation,
            cause: Box::new(error),
        },
    }
}
