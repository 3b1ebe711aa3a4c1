//! A built VM: memory, vCPUs, buses and devices, wired together.

mod areas;
mod devices;
mod error;
mod hotplug;
mod net;
mod parts;
mod passthrough;
mod pci;

use std::sync::Arc;

use ::devices::bus::Bus;
use ::devices::thread::ThreadSpawner;
use ::passthrough::kernel::Iommufd;
use event_monitor::EventMonitor;
use hypervisor::{Cpuid, DirtyLogMethod, Hypervisor, MemorySlot, SlotFlags, Vm, VmOptions};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vm_migration::ErrorChain;

use crate::acpi;
use crate::api::Counters;
use crate::boot::{self, Payload};
use crate::config::VmConfig;
use crate::interrupts::InterruptManager;
use crate::memory::Ram;
use crate::notice::ExitSender;
use crate::vcpu::{Surroundings, Vcpus};

pub use devices::{Devices, VirtioFunction};
pub use error::MachineError;
pub use net::{NetFunction, NetOffer, TAP as NET_ON_TAP};
pub use parts::{BusState, CpuState, CpuSwitch, PlugState, VmChips};
pub(crate) use parts::{CHIPS_ID, CPUS_ID, HOTPLUG_ID, PCI_ID};
pub use passthrough::{Origin, PassthroughFunction};

/// What all machines of a process share.
#[derive(Clone)]
pub struct Host {
    /// The host's hypervisor.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// Where threads come from.
    pub spawner: ThreadSpawner,
    /// Where events go.
    pub events: EventMonitor,
    /// Where guests' requests and failures go.
    pub exits: ExitSender,
    /// The iommufd of devices of the host, once there is one.
    pub iommufd: Arc<Iommufd>,
}

/// A built VM whose vCPUs stand still until [`resume`](Self::resume).
///
/// The fields are dropped in this order: vCPUs first, so that nobody calls a device that is gone.
pub struct Machine {
    vcpus: Arc<Vcpus>,
    spaces: Spaces,
    devices: Devices,
    interrupts: Arc<InterruptManager>,
    vm: Arc<dyn Vm>,
    slots: Vec<MemorySlot>,
    ram: Ram,
    cpuid: Cpuid,
}

/// The address spaces. The PCI root on them maps BARs on them, so that they would hold each other
/// for ever, and with them all devices and memory.
struct Spaces {
    pio: Arc<Bus>,
    mmio: Arc<Bus>,
}

impl Drop for Spaces {
    fn drop(&mut self) {
        self.pio.clear();
        self.mmio.clear();
    }
}

impl Machine {
    /// Builds what `config` describes. Nothing is loaded into its memory, and its vCPUs are as
    /// they come out of the hypervisor.
    ///
    /// # Errors
    /// See [`MachineError`].
    pub fn new(config: &VmConfig, host: &Host) -> Result<Self, MachineError> {
        let vm = host
            .hypervisor
            .create_vm(&VmOptions {
                dirty_log: config.memory.dirty_log_choice(),
                ..VmOptions::default()
            })
            .map_err(MachineError::hypervisor("create a VM"))?;
        let ram = Ram::new(&config.memory).map_err(MachineError::Memory)?;
        let slots = add_memory(&*vm, &ram)?;
        let interrupts =
            InterruptManager::new(Arc::clone(&vm)).map_err(MachineError::Interrupts)?;
        let spaces = Spaces {
            pio: Arc::new(Bus::new()),
            mmio: Arc::new(Bus::new()),
        };
        let devices = Devices::new(
            config,
            host,
            &devices::Board {
                vm: &vm,
                ram: &ram,
                interrupts: &interrupts,
                pio: &spaces.pio,
                mmio: &spaces.mmio,
            },
        )?;
        let cpus = (0..config.cpus.boot_vcpus)
            .map(|id| vm.create_vcpu(id))
            .collect::<Result<Vec<_>, _>>()
            .map_err(MachineError::hypervisor("create a vCPU"))?;
        let around = Surroundings {
            pio: Arc::clone(&spaces.pio),
            mmio: Arc::clone(&spaces.mmio),
            exits: host.exits.clone(),
        };
        let vcpus = Vcpus::start(cpus, around, &host.spawner).map_err(MachineError::Vcpu)?;
        let cpuid = host
            .hypervisor
            .supported_cpuid()
            .map_err(MachineError::hypervisor("tell the CPU features"))?;
        Ok(Self {
            vcpus: Arc::new(vcpus),
            spaces,
            devices,
            interrupts,
            vm,
            slots,
            ram,
            cpuid,
        })
    }

    /// Loads the kernel and its tables and puts the vCPUs at their start.
    ///
    /// # Errors
    /// See [`MachineError`].
    pub fn load(&self, config: &VmConfig) -> Result<(), MachineError> {
        let memory = self.ram.memory();
        let count = config.cpus.boot_vcpus;
        let ejectable = self.devices.ejectable_slots();
        let rsdp = acpi::write_tables(&memory, count, &ejectable).map_err(MachineError::Acpi)?;
        let kernel = config
            .payload
            .kernel
            .as_deref()
            .ok_or(MachineError::NoKernel)?;
        let payload = Payload {
            kernel,
            initramfs: config.payload.initramfs.as_deref(),
            cmdline: config.payload.cmdline.as_deref().unwrap_or_default(),
            rsdp,
        };
        let entry = boot::load(&memory, &payload).map_err(MachineError::Boot)?;
        for (id, cpu) in (0..count).zip(self.vcpus.cpus()) {
            let mut cpu = cpu.lock();
            cpu.set_cpuid(&self.cpuid.for_vcpu(id, count))
                .map_err(MachineError::hypervisor("set CPU features"))?;
            // The others wait for the first to start them (INIT, SIPI).
            if id == 0 {
                let mut special = cpu
                    .special_registers()
                    .map_err(MachineError::hypervisor("read registers"))?;
                entry.apply_sregs(&mut special);
                cpu.set_special_registers(&special)
                    .map_err(MachineError::hypervisor("set registers"))?;
                cpu.set_registers(&entry.regs())
                    .map_err(MachineError::hypervisor("set registers"))?;
            }
        }
        Ok(())
    }

    /// Lets devices and vCPUs run.
    ///
    /// # Errors
    /// When a device or a vCPU cannot.
    pub fn resume(&self) -> Result<(), MachineError> {
        self.devices.resume()?;
        self.vcpus.resume().map_err(MachineError::Vcpu)
    }

    /// Stops vCPUs, then devices; on return guest memory is still. One that fails leaves the VM
    /// running.
    ///
    /// # Errors
    /// When a vCPU has ended or a device cannot stop.
    pub fn pause(&self) -> Result<(), MachineError> {
        let paused = self
            .vcpus
            .pause()
            .map_err(MachineError::Vcpu)
            .and_then(|()| self.devices.pause());
        if paused.is_err()
            && let Err(error) = self.resume()
        {
            tracing::error!(error = %ErrorChain(&error), "after a failed pause");
        }
        paused
    }

    /// The vCPUs.
    pub fn vcpus(&self) -> &Arc<Vcpus> {
        &self.vcpus
    }

    /// The devices.
    pub fn devices(&self) -> &Devices {
        &self.devices
    }

    /// The RAM.
    pub fn ram(&self) -> &Ram {
        &self.ram
    }

    /// The hypervisor's side.
    pub fn vm(&self) -> &Arc<dyn Vm> {
        &self.vm
    }

    /// Memory slots, one per RAM region, in the order of the regions.
    pub fn slots(&self) -> &[MemorySlot] {
        &self.slots
    }

    /// The counters of devices and vCPUs, by their ids.
    pub fn counters(&self) -> Counters {
        let mut counters = self.devices.counters();
        if let DirtyLogMethod::Ring { .. } = self.vm.dirty_log_method() {
            let vcpus = counters.entry(CPUS_ID.to_owned()).or_default();
            let exits = self.vm.dirty_ring_full_exits();
            vcpus.insert("dirty_ring_full".to_owned(), exits);
        }
        counters
    }

    /// What the hypervisor offers guests here.
    pub fn cpuid(&self) -> &Cpuid {
        &self.cpuid
    }
}

fn add_memory(vm: &dyn Vm, ram: &Ram) -> Result<Vec<MemorySlot>, MachineError> {
    ram.memory()
        .iter()
        .map(|region| {
            vm.add_memory(region.start_addr(), region.get_mmap(), SlotFlags::default())
                .map_err(MachineError::hypervisor("add guest RAM"))
        })
        .collect()
}
