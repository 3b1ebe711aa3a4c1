//! The dirty log of a VM: which method, and what each operation is in it.

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET, kvm_enable_cap,
};
use kvm_ioctls::VmFd;

use super::dirty_ring::Rings;
use super::ioctls;
use super::vm::KvmVm;
use crate::capabilities::{
    DirtyLogCapabilities, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, RING_ENTRY_BYTES,
};
use crate::dirty_log::DEFAULT_RING_ENTRIES;
use crate::{DirtyLog, DirtyLogChoice, DirtyLogMethod, Error, MemorySlot};

/// The record of a VM's writes.
pub(super) enum Record {
    /// KVM's own, one bit per page.
    Bitmap(DirtyLogMethod),
    /// Rings, one per vCPU.
    Rings {
        /// Entries of each.
        entries: u32,
        /// The rings.
        rings: Rings,
    },
}

impl Record {
    /// Has the new VM `fd`, which has no vCPU yet, keep its dirty log as `choice` says and `offered`
    /// allows.
    pub(super) fn new(
        fd: &VmFd,
        offered: &DirtyLogCapabilities,
        choice: DirtyLogChoice,
    ) -> Result<Self, Error> {
        match choice {
            DirtyLogChoice::Bitmap if offered.manual_clear => manual_clear(fd, offered),
            DirtyLogChoice::Bitmap | DirtyLogChoice::BitmapAutoClear => {
                Ok(Self::Bitmap(DirtyLogMethod::BitmapAutoClear))
            }
            DirtyLogChoice::Ring { entries } => rings(fd, offered, entries),
        }
    }

    /// The rings, if that is the method.
    pub(super) fn rings(&self) -> Option<&Rings> {
        match self {
            Self::Bitmap(_) => None,
            Self::Rings { rings, .. } => Some(rings),
        }
    }
}

fn manual_clear(fd: &VmFd, offered: &DirtyLogCapabilities) -> Result<Record, Error> {
    let mut flags = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE;
    if offered.initially_set {
        flags |= KVM_DIRTY_LOG_INITIALLY_SET;
    }
    let mut cap = kvm_enable_cap {
        cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
        ..Default::default()
    };
    cap.args[0] = u64::from(flags);
    fd.enable_cap(&cap).map_err(Error::ioctl(
        "KVM_ENABLE_CAP of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2",
    ))?;
    Ok(Record::Bitmap(DirtyLogMethod::BitmapManualClear {
        initially_set: offered.initially_set,
    }))
}

/// Without the bitmap's manual clearing: its INITIALLY_SET would leave pages unprotected of which
/// no ring says that they are dirty.
fn rings(fd: &VmFd, offered: &DirtyLogCapabilities, entries: Option<u32>) -> Result<Record, Error> {
    let limit = offered.ring_entries;
    if limit == 0 {
        return Err(Error::Unsupported {
            operation: "a dirty log in rings",
            capability: "KVM_CAP_DIRTY_LOG_RING_ACQ_REL",
        });
    }
    if offered.ring_with_bitmap {
        return Err(Error::DirtyRingNotEnough);
    }
    let entries = entries.unwrap_or(DEFAULT_RING_ENTRIES.min(limit));
    if !entries.is_power_of_two() || entries > limit {
        return Err(Error::DirtyRingEntries { entries, limit });
    }
    let mut cap = kvm_enable_cap {
        cap: offered.ring_cap,
        ..Default::default()
    };
    cap.args[0] = u64::from(entries) * u64::from(RING_ENTRY_BYTES);
    fd.enable_cap(&cap)
        .map_err(|cause| Error::DirtyRingRefused {
            entries,
            cause: std::io::Error::from_raw_os_error(cause.errno()),
        })?;
    Ok(Record::Rings {
        entries,
        rings: Rings::new(entries),
    })
}

impl DirtyLog for KvmVm {
    fn dirty_log_method(&self) -> DirtyLogMethod {
        match self.inner.record {
            Record::Bitmap(method) => method,
            Record::Rings { entries, .. } => DirtyLogMethod::Ring { entries },
        }
    }

    fn set_dirty_logging(&self, slot: MemorySlot, on: bool) -> Result<(), Error> {
        let inner = &*self.inner;
        let mut slots = inner.slots.write();
        let held = slots
            .get_mut(&slot.0)
            .ok_or(Error::UnknownSlot { slot: slot.0 })?;
        // Off first, so that what was recorded is gone.
        if held.log_dirty {
            held.log_dirty = false;
            inner.set_region(held.region(slot.0)).inspect_err(|_| {
                held.log_dirty = true;
            })?;
        }
        let rings = inner.record.rings();
        if let Some(rings) = rings {
            rings.close_log(&inner.fd, slot.0)?;
        }
        if !on {
            return Ok(());
        }
        if let Some(rings) = rings {
            rings.open_log(slot.0, held.pages());
        }
        held.log_dirty = true;
        inner.set_region(held.region(slot.0)).inspect_err(|_| {
            held.log_dirty = false;
        })
    }

    fn dirty_log_words(&self, slot: MemorySlot) -> Result<usize, Error> {
        self.inner
            .pages_of(slot, |pages| Ok(ioctls::words_of(pages)))
    }

    fn read_dirty_log(&self, slot: MemorySlot, words: &mut [u64]) -> Result<(), Error> {
        let inner = &*self.inner;
        inner.pages_of(slot, |pages| match &inner.record {
            Record::Bitmap(_) => ioctls::get_dirty_log(&inner.fd, slot.0, pages, words),
            Record::Rings { rings, .. } => rings.take(&inner.fd, slot.0, words),
        })
    }

    fn clear_dirty_log(
        &self,
        slot: MemorySlot,
        first_page: u64,
        words: &[u64],
    ) -> Result<(), Error> {
        let inner = &*self.inner;
        match self.dirty_log_method() {
            DirtyLogMethod::BitmapManualClear { .. } => inner.pages_of(slot, |pages| {
                ioctls::clear_dirty_log(&inner.fd, slot.0, pages, first_page, words)
            }),
            DirtyLogMethod::BitmapAutoClear | DirtyLogMethod::Ring { .. } => {
                Err(Error::Unsupported {
                    operation: "clearing a dirty log piece by piece",
                    capability: "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2",
                })
            }
        }
    }

    fn dirty_ring_full_exits(&self) -> u64 {
        self.inner.record.rings().map_or(0, Rings::full_exits)
    }
}
