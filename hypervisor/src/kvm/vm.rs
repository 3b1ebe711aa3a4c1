//! One VM.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use kvm_bindings::{
    KVM_CLOCK_REALTIME, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_IRQ_ROUTES, KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY, KVM_PIT_SPEAKER_DUMMY, KvmIrqRouting, kvm_clock_data, kvm_irq_routing_entry,
    kvm_irqchip, kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use parking_lot::RwLock;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::dirty_log::Record;
use super::ioctls::{self, Doorbell};
use super::vcpu::KvmVcpu;
use super::vfio::VfioDevice;
use crate::capabilities::{XSAVE_MAX_BYTES, xsave_bytes};
use crate::state::{VM_STATE_VERSION, VmState};
use crate::{
    Capabilities, Error, HostMapping, IoAddress, IrqChip, MemorySlot, MsiRoute, SlotFlags, Vcpu,
    Vm, VmOptions,
};

/// Granularity of memory slots and the dirty log on x86.
pub(super) const PAGE_SIZE: u64 = 4096;
/// Pins of the I/O APIC, hence GSIs that are not messages.
const IOAPIC_PINS: u32 = 24;
/// Pins of the two i8259s.
const PIC_PINS: u32 = 16;

pub(super) struct Slot {
    gpa: GuestAddress,
    mapping: Arc<dyn HostMapping>,
    flags: SlotFlags,
    /// Whether writes are recorded.
    pub(super) log_dirty: bool,
}

impl Slot {
    /// Its pages, by which the dirty log counts.
    pub(super) fn pages(&self) -> u64 {
        self.mapping.len() / PAGE_SIZE
    }

    pub(super) fn region(&self, slot: u32) -> kvm_userspace_memory_region {
        let mut flags = 0;
        if self.log_dirty {
            flags |= KVM_MEM_LOG_DIRTY_PAGES;
        }
        if self.flags.read_only {
            flags |= KVM_MEM_READONLY;
        }
        kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: self.gpa.0,
            memory_size: self.mapping.len(),
            userspace_addr: self.mapping.hva().0,
        }
    }
}

/// What a VM and its vCPUs share; vCPUs keep it, and with it the guest's memory, alive.
pub(super) struct Inner {
    pub(super) fd: VmFd,
    pub(super) capabilities: Capabilities,
    pub(super) msrs: Arc<[u32]>,
    /// Bytes of extended state of this VM's vCPUs.
    pub(super) xsave_bytes: usize,
    /// Whether KVM_GET_XSAVE2 is offered.
    pub(super) xsave2: bool,
    timer: bool,
    /// Held for reading over calls that rely on a slot's size.
    pub(super) slots: RwLock<BTreeMap<u32, Slot>>,
    /// Rings are unmapped with it, after the memory went.
    pub(super) record: Record,
    vfio: VfioDevice,
}

/// A VM on KVM.
pub(super) struct KvmVm {
    pub(super) inner: Arc<Inner>,
}

impl KvmVm {
    pub(super) fn new(
        kvm: &Kvm,
        capabilities: Capabilities,
        msrs: Arc<[u32]>,
        options: &VmOptions,
    ) -> Result<Self, Error> {
        if options.timer && !capabilities.timer {
            return Err(Error::Unsupported {
                operation: "the i8254 timer",
                capability: "KVM_CAP_PIT2 with KVM_CAP_PIT_STATE2",
            });
        }
        let fd = kvm.create_vm().map_err(Error::ioctl("KVM_CREATE_VM"))?;
        let tss = usize::try_from(options.tss.0).unwrap_or(usize::MAX);
        fd.set_tss_address(tss)
            .map_err(Error::ioctl("KVM_SET_TSS_ADDR"))?;
        fd.set_identity_map_address(options.identity_map.0)
            .map_err(Error::ioctl("KVM_SET_IDENTITY_MAP_ADDR"))?;
        fd.create_irq_chip()
            .map_err(Error::ioctl("KVM_CREATE_IRQCHIP"))?;
        if options.timer {
            let config = kvm_pit_config {
                flags: KVM_PIT_SPEAKER_DUMMY,
                ..Default::default()
            };
            fd.create_pit2(config)
                .map_err(Error::ioctl("KVM_CREATE_PIT2"))?;
        }
        let record = Record::new(&fd, &capabilities.dirty_log, options.dirty_log)?;
        let xsave2 = fd.check_extension_int(Cap::Xsave2);
        let bytes = xsave_bytes(xsave2);
        if bytes > XSAVE_MAX_BYTES {
            return Err(Error::TooMany {
                what: "bytes of XSAVE state",
                given: bytes,
                limit: XSAVE_MAX_BYTES,
            });
        }
        Ok(Self {
            inner: Arc::new(Inner {
                fd,
                capabilities,
                msrs,
                xsave_bytes: bytes,
                xsave2: xsave2 > 0,
                timer: options.timer,
                slots: RwLock::new(BTreeMap::new()),
                record,
                vfio: VfioDevice::default(),
            }),
        })
    }
}

impl Inner {
    /// Does `action` with the number of pages of `slot`, which stays as it is meanwhile.
    pub(super) fn pages_of<T>(
        &self,
        slot: MemorySlot,
        action: impl FnOnce(u64) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let slots = self.slots.read();
        let held = slots
            .get(&slot.0)
            .ok_or(Error::UnknownSlot { slot: slot.0 })?;
        action(held.pages())
    }

    pub(super) fn set_region(&self, region: kvm_userspace_memory_region) -> Result<(), Error> {
        // SAFETY: the mapping stays valid while the slot is in the table (`HostMapping`'s
        // contract), the table lives as long as the VM and its vCPUs, and a slot is taken from
        // KVM before it leaves the table.
        unsafe { self.fd.set_user_memory_region(region) }
            .map_err(Error::ioctl("KVM_SET_USER_MEMORY_REGION"))
    }
}

impl Drop for Inner {
    /// Takes the memory from KVM before the mappings go: the kernel's VM can outlive its file
    /// descriptor here (vfio holds one, for instance).
    fn drop(&mut self) {
        for (number, slot) in self.slots.get_mut().iter() {
            let mut region = slot.region(*number);
            region.memory_size = 0;
            // SAFETY: a slot of size 0 refers to no memory.
            if let Err(error) = unsafe { self.fd.set_user_memory_region(region) } {
                tracing::error!(slot = number, %error, "memory slot could not be removed");
            }
        }
    }
}

impl Vm for KvmVm {
    fn capabilities(&self) -> &Capabilities {
        &self.inner.capabilities
    }

    fn add_memory(
        &self,
        gpa: GuestAddress,
        mapping: Arc<dyn HostMapping>,
        flags: SlotFlags,
    ) -> Result<MemorySlot, Error> {
        let (hva, length) = (mapping.hva().0, mapping.len());
        let whole = [gpa.0, hva, length].iter().all(|n| n % PAGE_SIZE == 0);
        if !whole || length == 0 || gpa.0.checked_add(length).is_none() {
            return Err(Error::Unaligned {
                gpa: gpa.0,
                hva,
                length,
            });
        }
        if flags.read_only && !self.inner.capabilities.read_only_memory {
            return Err(Error::Unsupported {
                operation: "read-only memory",
                capability: "KVM_CAP_READONLY_MEM",
            });
        }
        let limit = self.inner.capabilities.memory_slots;
        let mut slots = self.inner.slots.write();
        let number = (0..limit)
            .find(|number| !slots.contains_key(number))
            .ok_or(Error::NoMemorySlot { limit })?;
        let slot = Slot {
            gpa,
            mapping,
            flags,
            log_dirty: false,
        };
        self.inner.set_region(slot.region(number))?;
        slots.insert(number, slot);
        Ok(MemorySlot(number))
    }

    fn remove_memory(&self, slot: MemorySlot) -> Result<(), Error> {
        let mut slots = self.inner.slots.write();
        let held = slots
            .get(&slot.0)
            .ok_or(Error::UnknownSlot { slot: slot.0 })?;
        let mut region = held.region(slot.0);
        region.memory_size = 0;
        self.inner.set_region(region)?;
        let removed = slots.remove(&slot.0);
        // Its number may be given to another slot, of which nothing is dirty.
        match self.inner.record.rings() {
            Some(rings) if removed.is_some_and(|slot| slot.log_dirty) => {
                rings.close_log(&self.inner.fd, slot.0)
            }
            Some(_) | None => Ok(()),
        }
    }

    fn add_vfio_file(&self, file: BorrowedFd<'_>) -> Result<(), Error> {
        self.inner.vfio.add(&self.inner.fd, file)
    }

    fn remove_vfio_file(&self, file: BorrowedFd<'_>) -> Result<(), Error> {
        self.inner.vfio.remove(file)
    }

    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, Error> {
        let limit = self.inner.capabilities.max_vcpus;
        if index >= limit {
            return Err(Error::VcpuIndex { index, limit });
        }
        Ok(Box::new(KvmVcpu::new(Arc::clone(&self.inner), index)?))
    }

    fn save(&self) -> Result<VmState, Error> {
        let fd = &self.inner.fd;
        let mut chips = Vec::with_capacity(CHIPS.len());
        for chip_id in CHIPS {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            fd.get_irqchip(&mut chip)
                .map_err(Error::ioctl("KVM_GET_IRQCHIP"))?;
            chips.push(chip);
        }
        let timer = match self.inner.timer {
            true => Some(fd.get_pit2().map_err(Error::ioctl("KVM_GET_PIT2"))?),
            false => None,
        };
        let clock = fd.get_clock().map_err(Error::ioctl("KVM_GET_CLOCK"))?;
        Ok(VmState {
            version: VM_STATE_VERSION,
            chips,
            timer,
            clock,
        })
    }

    fn restore(&self, state: &VmState) -> Result<(), Error> {
        if state.version != VM_STATE_VERSION {
            return Err(Error::StateVersion {
                what: "VM",
                found: state.version,
                wanted: VM_STATE_VERSION,
            });
        }
        let malformed = |reason: &str| Error::StateFormat {
            what: "VM",
            reason: reason.to_owned(),
        };
        if !state.chips.iter().map(|chip| chip.chip_id).eq(CHIPS) {
            return Err(malformed("it does not have the three interrupt chips"));
        }
        if state.timer.is_some() != self.inner.timer {
            return Err(malformed("one VM has an i8254 timer, the other has not"));
        }
        let fd = &self.inner.fd;
        for chip in &state.chips {
            fd.set_irqchip(chip)
                .map_err(Error::ioctl("KVM_SET_IRQCHIP"))?;
        }
        if let Some(timer) = &state.timer {
            fd.set_pit2(timer).map_err(Error::ioctl("KVM_SET_PIT2"))?;
        }
        // With the flag KVM lets the guest's clock go on by the real time that has passed since
        // the save; without it the clock goes on from where it stood.
        let realtime = self.inner.capabilities.clock_realtime;
        let flags = match realtime {
            true => state.clock.flags & KVM_CLOCK_REALTIME,
            false => 0,
        };
        let clock = kvm_clock_data {
            clock: state.clock.clock,
            realtime: state.clock.realtime,
            flags,
            ..Default::default()
        };
        fd.set_clock(&clock).map_err(Error::ioctl("KVM_SET_CLOCK"))
    }
}

const CHIPS: [u32; 3] = [
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_IRQCHIP_IOAPIC,
];

impl IrqChip for KvmVm {
    fn register_irqfd(&self, eventfd: &EventFd, gsi: u32) -> Result<(), Error> {
        let register = self.inner.fd.register_irqfd(eventfd, gsi);
        register.map_err(Error::ioctl("KVM_IRQFD"))
    }

    fn unregister_irqfd(&self, eventfd: &EventFd, gsi: u32) -> Result<(), Error> {
        let unregister = self.inner.fd.unregister_irqfd(eventfd, gsi);
        unregister.map_err(Error::ioctl("KVM_IRQFD (deassign)"))
    }

    fn register_ioeventfd(
        &self,
        eventfd: &EventFd,
        address: IoAddress,
        length: u8,
        datamatch: Option<u64>,
    ) -> Result<(), Error> {
        if length == 0 && !self.inner.capabilities.doorbell_any_length {
            return Err(Error::Unsupported {
                operation: "a doorbell of any length",
                capability: "KVM_CAP_IOEVENTFD_ANY_LENGTH",
            });
        }
        let doorbell = Doorbell {
            eventfd,
            address,
            length,
            datamatch,
        };
        ioctls::ioeventfd(&self.inner.fd, &doorbell, true)
    }

    fn unregister_ioeventfd(
        &self,
        eventfd: &EventFd,
        address: IoAddress,
        length: u8,
        datamatch: Option<u64>,
    ) -> Result<(), Error> {
        let doorbell = Doorbell {
            eventfd,
            address,
            length,
            datamatch,
        };
        ioctls::ioeventfd(&self.inner.fd, &doorbell, false)
    }

    fn set_msi_routes(&self, routes: &[MsiRoute]) -> Result<(), Error> {
        let pins = pin_routes();
        let limit = KVM_MAX_IRQ_ROUTES.saturating_sub(pins.len());
        let too_many = Error::TooMany {
            what: "interrupt routes",
            given: routes.len(),
            limit,
        };
        if routes.len() > limit {
            return Err(too_many);
        }
        let messages = routes.iter().map(message_route);
        let entries: Vec<_> = pins.into_iter().chain(messages).collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(|_| too_many)?;
        self.inner
            .fd
            .set_gsi_routing(&table)
            .map_err(Error::ioctl("KVM_SET_GSI_ROUTING"))
    }
}

/// KVM's own default table: each of the lower 16 GSIs at an i8259 and the I/O APIC.
fn pin_routes() -> Vec<kvm_irq_routing_entry> {
    let mut routes = Vec::new();
    for gsi in 0..PIC_PINS {
        let (chip, first) = match gsi {
            0..8 => (KVM_IRQCHIP_PIC_MASTER, 0),
            _ => (KVM_IRQCHIP_PIC_SLAVE, 8),
        };
        routes.push(pin_route(gsi, chip, gsi.saturating_sub(first)));
    }
    routes.extend((0..IOAPIC_PINS).map(|gsi| pin_route(gsi, KVM_IRQCHIP_IOAPIC, gsi)));
    routes
}

fn pin_route(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        ..Default::default()
    };
    entry.u.irqchip.irqchip = irqchip;
    entry.u.irqchip.pin = pin;
    entry
}

fn message_route(route: &MsiRoute) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi: route.gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    let [a0, a1, a2, a3, a4, a5, a6, a7] = route.address.to_le_bytes();
    entry.u.msi.address_lo = u32::from_le_bytes([a0, a1, a2, a3]);
    entry.u.msi.address_hi = u32::from_le_bytes([a4, a5, a6, a7]);
    entry.u.msi.data = route.data;
    entry
}
