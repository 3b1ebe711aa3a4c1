//! Calls that kvm-ioctls has not, or only with an allocation.

use std::os::fd::AsRawFd;

use kvm_bindings::{
    kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_dirty_log,
    kvm_dirty_log__bindgen_ty_1, kvm_ioeventfd, kvm_ioeventfd_flag_nr_datamatch,
    kvm_ioeventfd_flag_nr_deassign, kvm_ioeventfd_flag_nr_pio, kvm_xsave,
};
use kvm_ioctls::{VcpuFd, VmFd};
use libc::{c_uint, c_ulong};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::{
    _IOC_NONE, _IOC_READ, _IOC_WRITE, ioctl, ioctl_expr, ioctl_with_mut_ptr, ioctl_with_ptr,
    ioctl_with_ref,
};

use super::undisturbed::undisturbed;
use crate::{Error, IoAddress};

/// KVM's ioctl type (`KVMIO` in linux/kvm.h).
const KVMIO: c_uint = 0xae;

/// Numbers from linux/kvm.h.
const KVM_RUN: c_ulong = ioctl_expr(_IOC_NONE, KVMIO, 0x80, 0);
const KVM_GET_DIRTY_LOG: c_ulong = write_of::<kvm_dirty_log>(0x42);
const KVM_IOEVENTFD: c_ulong = write_of::<kvm_ioeventfd>(0x79);
const KVM_GET_XSAVE: c_ulong = read_of::<kvm_xsave>(0xa4);
const KVM_SET_XSAVE: c_ulong = write_of::<kvm_xsave>(0xa5);
const KVM_CLEAR_DIRTY_LOG: c_ulong = ioctl_expr(
    _IOC_READ | _IOC_WRITE,
    KVMIO,
    0xc0,
    size::<kvm_clear_dirty_log>(),
);
const KVM_RESET_DIRTY_RINGS: c_ulong = ioctl_expr(_IOC_NONE, KVMIO, 0xc7, 0);
const KVM_GET_XSAVE2: c_ulong = read_of::<kvm_xsave>(0xcf);

/// Most words of one KVM_CLEAR_DIRTY_LOG, whose number of pages is an `u32` and a multiple of 64.
const CLEAR_WORDS: usize = 1 << 25;

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

/// Words that hold one bit for each of `pages` pages.
pub(super) fn words_of(pages: u64) -> usize {
    usize::try_from(pages.div_ceil(64)).unwrap_or(usize::MAX)
}

/// Checks that `words` is the buffer for the dirty log of a slot of `pages` pages.
pub(super) fn check_dirty_log_buffer(slot: u32, pages: u64, words: &[u64]) -> Result<(), Error> {
    let wanted = words_of(pages);
    if words.len() == wanted {
        return Ok(());
    }
    Err(Error::DirtyLogBuffer {
        slot,
        wanted,
        given: words.len(),
    })
}

/// Reads the dirty log of a slot of `pages` pages into `words`, and clears it unless the VM has
/// manual clearing.
pub(super) fn get_dirty_log(
    vm: &VmFd,
    slot: u32,
    pages: u64,
    words: &mut [u64],
) -> Result<(), Error> {
    check_dirty_log_buffer(slot, pages, words)?;
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
        _ => Err(dirty_log_error("KVM_GET_DIRTY_LOG", slot)),
    }
}

/// Clears, in the dirty log of a slot of `pages` pages, those that are set in `words`, the first of
/// which is page `first_page`.
pub(super) fn clear_dirty_log(
    vm: &VmFd,
    slot: u32,
    pages: u64,
    first_page: u64,
    words: &[u64],
) -> Result<(), Error> {
    let piece = || Error::DirtyLogPiece {
        slot,
        first_page,
        words: words.len(),
        pages,
    };
    let left = pages.checked_sub(first_page).ok_or_else(piece)?;
    if !first_page.is_multiple_of(64) || words.len() > words_of(left) {
        return Err(piece());
    }
    let mut first_page = first_page;
    for words in words.chunks(CLEAR_WORDS) {
        let covered = u64::try_from(words.len())
            .unwrap_or(u64::MAX)
            .saturating_mul(64);
        let covered = covered.min(pages.saturating_sub(first_page));
        let log = kvm_clear_dirty_log {
            slot,
            num_pages: u32::try_from(covered).map_err(|_| piece())?,
            first_page,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
                dirty_bitmap: words.as_ptr().cast_mut().cast(),
            },
        };
        // SAFETY: KVM reads one bit per page, in whole words, which `words` has, and does not write
        // them.
        if unsafe { ioctl_with_ref(vm, KVM_CLEAR_DIRTY_LOG, &log) } != 0 {
            return Err(dirty_log_error("KVM_CLEAR_DIRTY_LOG", slot));
        }
        first_page = first_page.saturating_add(covered);
    }
    Ok(())
}

/// The last error of a call on a slot's dirty log: KVM says ENOENT when there is none.
fn dirty_log_error(operation: &'static str, slot: u32) -> Error {
    let cause = std::io::Error::last_os_error();
    match cause.raw_os_error() {
        Some(libc::ENOENT) => Error::DirtyLogOff { slot },
        _ => Error::Ioctl { operation, cause },
    }
}

/// What one KVM_RESET_DIRTY_RINGS did.
pub(super) struct RingReset {
    /// Entries that were taken from the rings.
    pub(super) done: u64,
    /// Whether a signal may have cut it short, even if that does not show in `done`.
    pub(super) disturbed: bool,
}

/// Write-protects again the pages of entries that were harvested from the dirty rings.
pub(super) fn reset_dirty_rings(vm: &VmFd) -> Result<RingReset, Error> {
    let failed = |cause| Error::Ioctl {
        operation: "KVM_RESET_DIRTY_RINGS",
        cause,
    };
    let reset = || {
        // SAFETY: no argument; what KVM writes are the rings, which are accessed through atomics
        // and raw pointers only.
        match u64::try_from(unsafe { ioctl(vm, KVM_RESET_DIRTY_RINGS) }) {
            Ok(done) => Ok(done),
            Err(_) => Err(std::io::Error::last_os_error()),
        }
    };
    let (answer, disturbed) = undisturbed(reset).map_err(failed)?;
    let done = match answer {
        Err(cause) if cause.kind() == std::io::ErrorKind::Interrupted => 0,
        answer => answer.map_err(failed)?,
    };
    Ok(RingReset { done, disturbed })
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
