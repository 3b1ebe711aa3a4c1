//! A VM of KVM.

use std::collections::HashMap;
use std::sync::Mutex;

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY,
    KVM_PIT_SPEAKER_DUMMY, KVMIO, KvmIrqRouting, kvm_dirty_log, kvm_irq_routing_entry,
    kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use super::vcpu::KvmVcpu;
use crate::{
    Capabilities, DirtyLog, HypervisorError, IoEventAddr, IoEventMatch, IrqRoute, MemorySlot,
    Result, Vcpu, Vm,
};

// linux/kvm.h: _IOW(KVMIO, 0x42, struct kvm_dirty_log). Our own, as kvm-ioctls' wrapper allocates.
ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);

/// Three pages below 4 GiB that no memory slot uses, for real mode on old Intel processors.
const TSS_ADDRESS: usize = 0xfffb_d000;
/// One page below 4 GiB, for the same.
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;
/// KVM's dirty log counts in pages of this size.
const LOG_PAGE: u64 = 4096;

/// A VM of KVM.
#[derive(Debug)]
pub(super) struct KvmVm {
    pub(super) fd: VmFd,
    /// Pages of each slot: the kernel writes a log as long as the slot into the caller's buffer.
    slots: Mutex<HashMap<u32, u64>>,
}

impl KvmVm {
    pub(super) fn new(kvm: &kvm_ioctls::Kvm, capabilities: Capabilities) -> Result<Self> {
        let fd = kvm
            .create_vm()
            .map_err(HypervisorError::ioctl("KVM_CREATE_VM"))?;
        fd.set_identity_map_address(IDENTITY_MAP_ADDRESS)
            .map_err(HypervisorError::ioctl("KVM_SET_IDENTITY_MAP_ADDR"))?;
        fd.set_tss_address(TSS_ADDRESS)
            .map_err(HypervisorError::ioctl("KVM_SET_TSS_ADDR"))?;
        fd.create_irq_chip()
            .map_err(HypervisorError::ioctl("KVM_CREATE_IRQCHIP"))?;
        if capabilities.pit2 {
            let config = kvm_pit_config {
                flags: KVM_PIT_SPEAKER_DUMMY,
                ..Default::default()
            };
            fd.create_pit2(config)
                .map_err(HypervisorError::ioctl("KVM_CREATE_PIT2"))?;
        }
        Ok(Self {
            fd,
            slots: Mutex::default(),
        })
    }

    fn slots(&self) -> std::sync::MutexGuard<'_, HashMap<u32, u64>> {
        // Nothing panics with the lock held, and the map is whole between any two statements.
        self.slots
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl DirtyLog for KvmVm {
    fn dirty_log(&self, slot: u32, words: &mut [u64]) -> Result<()> {
        let slots = self.slots();
        let pages = *slots.get(&slot).ok_or(HypervisorError::NoSlot(slot))?;
        let needed = usize::try_from(pages.div_ceil(64)).unwrap_or(usize::MAX);
        if words.len() < needed {
            return Err(HypervisorError::DirtyBuffer {
                slot,
                needed,
                given: words.len(),
            });
        }
        let mut log = kvm_dirty_log {
            slot,
            ..Default::default()
        };
        log.__bindgen_anon_1.dirty_bitmap = words.as_mut_ptr().cast();
        // SAFETY: the kernel writes the slot's pages rounded up to 64 bits into the buffer, which
        // was checked to be that long; the lock keeps the slot's size from changing.
        let result = unsafe { ioctl_with_ref(&self.fd, KVM_GET_DIRTY_LOG(), &log) };
        if result < 0 {
            return Err(HypervisorError::last("KVM_GET_DIRTY_LOG"));
        }
        Ok(())
    }
}

impl Vm for KvmVm {
    unsafe fn set_memory_slot(&self, slot: &MemorySlot) -> Result<()> {
        let bad = |reason| HypervisorError::BadSlot {
            slot: slot.slot,
            reason,
        };
        if !slot.size.is_multiple_of(LOG_PAGE) {
            return Err(bad("its size is not whole pages"));
        }
        let mut flags = 0;
        if slot.log_dirty {
            flags |= KVM_MEM_LOG_DIRTY_PAGES;
        }
        if slot.read_only {
            flags |= KVM_MEM_READONLY;
        }
        let region = kvm_userspace_memory_region {
            slot: slot.slot,
            flags,
            guest_phys_addr: slot.guest.0,
            memory_size: slot.size,
            userspace_addr: slot.host.0,
        };
        let mut slots = self.slots();
        // SAFETY: the caller promises that the host range is the guest's.
        unsafe { self.fd.set_user_memory_region(region) }
            .map_err(HypervisorError::ioctl("KVM_SET_USER_MEMORY_REGION"))?;
        if slot.size == 0 {
            slots.remove(&slot.slot);
        } else {
            slots.insert(slot.slot, slot.size / LOG_PAGE);
        }
        Ok(())
    }

    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>> {
        let fd = self
            .fd
            .create_vcpu(u64::from(id))
            .map_err(HypervisorError::ioctl("KVM_CREATE_VCPU"))?;
        Ok(Box::new(KvmVcpu::new(fd)))
    }

    fn set_irq_routes(&self, routes: &[IrqRoute]) -> Result<()> {
        let entries: Vec<kvm_irq_routing_entry> = routes.iter().map(route_entry).collect();
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| HypervisorError::TooManyEntries("the interrupt routing table"))?;
        self.fd
            .set_gsi_routing(&table)
            .map_err(HypervisorError::ioctl("KVM_SET_GSI_ROUTING"))
    }

    fn register_irqfd(&self, event: &EventFd, gsi: u32) -> Result<()> {
        self.fd
            .register_irqfd(event, gsi)
            .map_err(HypervisorError::ioctl("KVM_IRQFD"))
    }

    fn unregister_irqfd(&self, event: &EventFd, gsi: u32) -> Result<()> {
        self.fd
            .unregister_irqfd(event, gsi)
            .map_err(HypervisorError::ioctl("KVM_IRQFD (deassign)"))
    }

    fn register_ioeventfd(
        &self,
        event: &EventFd,
        address: IoEventAddr,
        matches: IoEventMatch,
    ) -> Result<()> {
        let at = io_event_address(address);
        match matches {
            IoEventMatch::Any => self.fd.register_ioevent(event, &at, NoDatamatch),
            IoEventMatch::Value { size, value } => match size {
                1 => self.fd.register_ioevent(event, &at, low::<u8>(value)),
                2 => self.fd.register_ioevent(event, &at, low::<u16>(value)),
                4 => self.fd.register_ioevent(event, &at, low::<u32>(value)),
                _ => self.fd.register_ioevent(event, &at, value),
            },
        }
        .map_err(HypervisorError::ioctl("KVM_IOEVENTFD"))
    }

    fn unregister_ioeventfd(
        &self,
        event: &EventFd,
        address: IoEventAddr,
        matches: IoEventMatch,
    ) -> Result<()> {
        let at = io_event_address(address);
        match matches {
            IoEventMatch::Any => self.fd.unregister_ioevent(event, &at, NoDatamatch),
            IoEventMatch::Value { size, value } => match size {
                1 => self.fd.unregister_ioevent(event, &at, low::<u8>(value)),
                2 => self.fd.unregister_ioevent(event, &at, low::<u16>(value)),
                4 => self.fd.unregister_ioevent(event, &at, low::<u32>(value)),
                _ => self.fd.unregister_ioevent(event, &at, value),
            },
        }
        .map_err(HypervisorError::ioctl("KVM_IOEVENTFD (deassign)"))
    }
}

/// The low bytes of a value that was given for an access of that size.
fn low<T: TryFrom<u64> + Default>(value: u64) -> T {
    T::try_from(value).unwrap_or_default()
}

fn io_event_address(address: IoEventAddr) -> IoEventAddress {
    match address {
        IoEventAddr::Port(port) => IoEventAddress::Pio(u64::from(port)),
        IoEventAddr::Mmio(guest) => IoEventAddress::Mmio(guest.0),
    }
}

fn route_entry(route: &IrqRoute) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry::default();
    match *route {
        IrqRoute::Pin { gsi, chip, pin } => {
            entry.gsi = gsi;
            entry.type_ = KVM_IRQ_ROUTING_IRQCHIP;
            entry.u.irqchip = kvm_bindings::kvm_irq_routing_irqchip { irqchip: chip, pin };
        }
        IrqRoute::Msi { gsi, address, data } => {
            entry.gsi = gsi;
            entry.type_ = KVM_IRQ_ROUTING_MSI;
            let [low, high] = halves(address);
            entry.u.msi = kvm_bindings::kvm_irq_routing_msi {
                address_lo: low,
                address_hi: high,
                data,
                ..Default::default()
            };
        }
    }
    entry
}

fn halves(value: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    [
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    ]
}
