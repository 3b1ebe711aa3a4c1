//! Calls that kvm-ioctls has not, or only with an allocation.

use std::os::fd::AsRawFd;

use kvm_bindings::{
    kvm_dirty_log, kvm_dirty_log__bindgen_ty_1, kvm_ioeventfd, kvm_ioeventfd_flag_nr_datamatch,
    kvm_ioeventfd_flag_nr_deassign, kvm_ioeventfd_flag_nr_pio, kvm_xsave,
};
use kvm_ioctls::{VcpuFd, VmFd};
use libc::{c_uint, c_ulong};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::{
    _IOC_NONE, _IOC_READ, _IOC_WRITE, ioctl, ioctl_expr, ioctl_with_mut_ptr, ioctl_with_ptr,
    ioctl_with_ref,
};

use crate::{Error, IoAddress};

/// KVM's ioctl type (`KVMIO` in linux/kvm.h).
const KVMIO: c_uint = 0xae;

/// Numbers from linux/kvm.h.
const KVM_RUN: c_ulong = ioctl_expr(_IOC_NONE, KVMIO, 0x80, 0);
const KVM_GET_DIRTY_LOG: c_ulong = write_of::<kvm_dirty_log>(0x42);
const KVM_IOEVENTFD: c_ulong = write_of::<kvm_ioeventfd>(0x79);
const KVM_GET_XSAVE: c_ulong = read_of::<kvm_xsave>(0xa4);
const KVM_SET_XSAVE: c_ulong = write_of::<kvm_xsave>(0xa5);
const KVM_GET_XSAVE2: c_ulong = read_of::<kvm_xsave>(0xcf);

const fn write_of<T>(number: c_uint) -> c_ulong {
    ioctl_expr(_IOC_WRITE, KVMIO, number, size::<T>())
}

const fn read_of<T>(number: c_uint) -> c_ulong {
    ioctl_expr(_IOC_READ, KVMIO, number, size::<T>())
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "the argument structs of KVM have at most a few KiB"
)]
const fn size<T>() -> c_uint {
    size_of::<T>() as c_uint
}

/// Enters the guest. The exit is in the shared page.
pub(super) fn run(vcpu: &VcpuFd) -> std::io::Result<()> {
    // SAFETY: KVM_RUN takes no argument; what it writes is the shared page, to which the caller
    // holds no references (it has the vCPU exclusively).
    match unsafe { ioctl(vcpu, KVM_RUN) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Reads and clears the dirty log of a slot of `pages` pages into `words`.
pub(super) fn get_dirty_log(
    vm: &VmFd,
    slot: u32,
    pages: u64,
    words: &mut [u64],
) -> Result<(), Error> {
    let wanted = usize::try_from(pages.div_ceil(64)).unwrap_or(usize::MAX);
    if words.len() != wanted {
        return Err(Error::DirtyLogBuffer {
            slot,
            wanted,
            given: words.len(),
        });
    }
    let log = kvm_dirty_log {
        slot,
        padding1: 0,
        __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 {
            dirty_bitmap: words.as_mut_ptr().cast(),
        },
    };
    // SAFETY: KVM writes one bit per page of the slot, in whole words; `words` has just as many
    // (the caller holds the slot in place).
    match unsafe { ioctl_with_ref(vm, KVM_GET_DIRTY_LOG, &log) } {
        0 => Ok(()),
        _ => Err(Error::last("KVM_GET_DIRTY_LOG")),
    }
}

/// Extended state into `area`, which has the size KVM names for this VM. `xsave2` says whether
/// KVM names one at all.
pub(super) fn get_xsave(vcpu: &VcpuFd, xsave2: bool, area: &mut [u8]) -> Result<(), Error> {
    let (request, operation) = if xsave2 {
        (KVM_GET_XSAVE2, "KVM_GET_XSAVE2")
    } else {
        (KVM_GET_XSAVE, "KVM_GET_XSAVE")
    };
    // SAFETY: the first writes as many bytes as KVM_CAP_XSAVE2 said, the second 4096; `area` has
    // that size by the caller's contract with `KvmVm::xsave_bytes`.
    match unsafe { ioctl_with_mut_ptr(vcpu, request, area.as_mut_ptr()) } {
        0 => Ok(()),
        _ => Err(Error::last(operation)),
    }
}

/// Sets extended state; `area` has the size KVM names for this VM.
pub(super) fn set_xsave(vcpu: &VcpuFd, area: &[u8]) -> Result<(), Error> {
    // SAFETY: KVM reads as many bytes as KVM_CAP_XSAVE2 said, at least 4096; `area` has them by
    // the caller's check.
    match unsafe { ioctl_with_ptr(vcpu, KVM_SET_XSAVE, area.as_ptr()) } {
        0 => Ok(()),
        _ => Err(Error::last("KVM_SET_XSAVE")),
    }
}

/// A doorbell.
pub(super) struct Doorbell<'a> {
    pub(super) eventfd: &'a EventFd,
    pub(super) address: IoAddress,
    pub(super) length: u8,
    pub(super) datamatch: Option<u64>,
}

/// Adds or removes a doorbell.
pub(super) fn ioeventfd(vm: &VmFd, doorbell: &Doorbell<'_>, add: bool) -> Result<(), Error> {
    let length = doorbell.length;
    if !matches!(length, 0 | 1 | 2 | 4 | 8) || (length == 0 && doorbell.datamatch.is_some()) {
        return Err(Error::IoEventLength {
            length,
            datamatch: doorbell.datamatch.is_some(),
        });
    }
    let mut flags = 0;
    if doorbell.datamatch.is_some() {
        flags |= 1 << kvm_ioeventfd_flag_nr_datamatch;
    }
    if !add {
        flags |= 1 << kvm_ioeventfd_flag_nr_deassign;
    }
    let address = match doorbell.address {
        IoAddress::Mmio(address) => address.0,
        IoAddress::Pio(port) => {
            flags |= 1 << kvm_ioeventfd_flag_nr_pio;
            u64::from(port)
        }
    };
    let argument = kvm_ioeventfd {
        datamatch: doorbell.datamatch.unwrap_or(0),
        addr: address,
        len: u32::from(length),
        fd: doorbell.eventfd.as_raw_fd(),
        flags,
        ..Default::default()
    };
    // SAFETY: KVM reads the struct and takes its own reference to the eventfd.
    match unsafe { ioctl_with_ref(vm, KVM_IOEVENTFD, &argument) } {
        0 => Ok(()),
        _ => Err(Error::last("KVM_IOEVENTFD")),
    }
}
