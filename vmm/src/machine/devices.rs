//! The devices of a machine and where they are.

use std::collections::BTreeMap;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use ::passthrough::HostVfio;
use devices::acpi::{self, AcpiPower, I8042, Sink};
use devices::bus::{Bus, BusDevice};
use devices::rtc::{self, Rtc};
use devices::serial::{self, Serial};
use devices::terminal::Terminal;
use hypervisor::Vm;
use parking_lot::Mutex;
use pci::{HotPlug, PciBus, SharedDevice};
use virtio_devices::{
    Console, EntropySource, NetCounters, Rng, VhostUserHandle, VirtioDevice, VirtioPciDevice,
    VirtioPciParts,
};
use vm_migration::Pause;

use super::net::NetFunction;
use super::passthrough::{self, PassthroughFunction};
use super::pci::PciRoot;
use super::{Host, MachineError, hotplug, net};
use crate::api::{Counters, Facts};
use crate::config::{ConsoleConfig, RngConfig, VmConfig};
use crate::interrupts::{Fabric, InterruptManager};
use crate::layout;
use crate::memory::Ram;
use crate::power::PowerButton;

/// What devices are plugged into.
pub(super) struct Board<'a> {
    pub(super) vm: &'a Arc<dyn Vm>,
    pub(super) ram: &'a Ram,
    pub(super) interrupts: &'a Arc<InterruptManager>,
    pub(super) pio: &'a Arc<Bus>,
    pub(super) mmio: &'a Arc<Bus>,
}

/// A virtio device on the bus.
pub struct VirtioFunction {
    /// Identifier.
    pub id: String,
    /// What it is, for a migration's manifest.
    pub kind: &'static str,
    /// The device.
    pub device: Arc<Mutex<VirtioPciDevice>>,
    /// What a network card counts.
    pub counters: Option<Arc<NetCounters>>,
    /// The process that serves its queues.
    pub vhost: Option<VhostUserHandle>,
    /// What is known of a network card on a tap.
    pub net: Option<NetFunction>,
}

impl VirtioFunction {
    /// Whether it is a network card; all others each machine has, and keeps.
    pub(super) fn is_card(&self) -> bool {
        [net::TAP, net::VHOST_USER].contains(&self.kind)
    }
}

/// The devices of a machine.
pub struct Devices {
    rtc: Arc<Mutex<Rtc>>,
    serial: Option<Arc<Mutex<Serial>>>,
    pub(super) virtio: Vec<VirtioFunction>,
    pub(super) passthrough: Vec<PassthroughFunction>,
    pub(super) root: PciRoot,
    pub(super) hotplug: Arc<HotPlug>,
    pub(super) vfio: HostVfio,
}

impl Devices {
    /// Makes the devices of `config` and puts them on the buses.
    pub(super) fn new(
        config: &VmConfig,
        host: &Host,
        board: &Board<'_>,
    ) -> Result<Self, MachineError> {
        legacy(host, board)?;
        let rtc = clock(board)?;
        let serial = serial_port(config, host, board)?;
        let mut root = PciRoot::new(board)?;
        // Console and entropy come first, so that adding a NIC moves no other device.
        let mut virtio = fixed(config, host, board)?;
        for function in &virtio {
            root.add(function.device.clone(), None)?;
        }
        let mut movable: Vec<(Option<u8>, SharedDevice)> = Vec::new();
        for net in &config.net {
            let card = net::card(net, host, board)?;
            movable.push((net.pci_device_id, card.device.clone()));
            virtio.push(card);
        }
        let vfio = passthrough::host_vfio(config, host, board)?;
        let passthrough = passthrough::functions(config, &vfio, host, board)?;
        let devices = config.devices.iter().map(|device| device.pci_device_id);
        let users = config
            .user_devices
            .iter()
            .map(|device| device.pci_device_id);
        for (function, slot) in passthrough.iter().zip(devices.chain(users)) {
            root.add_areas(&function.id, function.device.mappable_areas());
            movable.push((slot, Arc::new(Mutex::new(function.device.clone()))));
        }
        let hotplug = hotplug::registers(&root, host, board)?;
        // Those that are to be in a certain slot take it before it is found free.
        movable.sort_by_key(|(slot, _)| slot.is_none());
        for (slot, device) in movable {
            hotplug.manage(root.add(device, slot)?);
        }
        Ok(Self {
            rtc,
            serial,
            virtio,
            passthrough,
            root,
            hotplug,
            vfio,
        })
    }

    /// Lets all devices go on, in the order they were made.
    pub(super) fn resume(&self) -> Result<(), MachineError> {
        for function in &self.virtio {
            let resumed = function.device.lock().resume();
            resumed.map_err(|cause| MachineError::State {
                operation: "go on",
                cause,
            })?;
        }
        // No device does peer-to-peer DMA with one that stands still.
        for function in &self.passthrough {
            function.device.wake();
        }
        for function in &self.passthrough {
            let resumed = function.device.clone().resume();
            resumed.map_err(|cause| MachineError::State {
                operation: "go on",
                cause,
            })?;
        }
        Ok(())
    }

    /// Stops all devices, in the reverse order.
    pub(super) fn pause(&self) -> Result<(), MachineError> {
        let failed = |cause| MachineError::State {
            operation: "stop",
            cause,
        };
        for function in self.passthrough.iter().rev() {
            function.device.quiesce().map_err(failed)?;
        }
        for function in self.passthrough.iter().rev() {
            let paused = function.device.clone().pause();
            paused.map_err(failed)?;
        }
        for function in self.virtio.iter().rev() {
            let paused = function.device.lock().pause();
            paused.map_err(failed)?;
        }
        Ok(())
    }

    /// What each device counts.
    pub fn counters(&self) -> Counters {
        self.virtio
            .iter()
            .filter_map(|function| {
                let counters = function.counters.as_ref()?;
                Some((function.id.clone(), net::counters(counters.pairs())))
            })
            .collect()
    }

    /// What is worth knowing of each device besides its configuration.
    pub fn facts(&self) -> Facts {
        let mut all = BTreeMap::new();
        let pty = self.serial.as_ref().and_then(|serial| {
            serial
                .lock()
                .terminal()
                .pty_path()
                .map(|path| path.display().to_string())
        });
        if let Some(path) = pty {
            all.insert(
                serial::ID.to_owned(),
                BTreeMap::from([("pty".to_owned(), path)]),
            );
        }
        for function in &self.virtio {
            if let Some(facts) = function.net.as_ref().and_then(NetFunction::facts) {
                all.insert(function.id.clone(), facts);
            }
        }
        for function in &self.virtio {
            if let Some(vhost) = &function.vhost {
                all.insert(function.id.clone(), vhost.facts());
            }
        }
        for function in &self.passthrough {
            all.insert(function.id.clone(), function.facts());
        }
        self.add_places(&mut all);
        all
    }

    /// The real-time clock.
    pub fn rtc(&self) -> &Arc<Mutex<Rtc>> {
        &self.rtc
    }

    /// The serial port, if there is one.
    pub fn serial(&self) -> Option<&Arc<Mutex<Serial>>> {
        self.serial.as_ref()
    }

    /// The virtio devices, in the order of their slots.
    pub fn virtio(&self) -> &[VirtioFunction] {
        &self.virtio
    }

    /// The passthrough devices, in the order of their slots.
    pub fn passthrough(&self) -> &[PassthroughFunction] {
        &self.passthrough
    }

    /// The PCI bus.
    pub fn bus(&self) -> &Arc<PciBus> {
        self.root.bus()
    }

    /// The registers of hot plug.
    pub fn hotplug(&self) -> &Arc<HotPlug> {
        &self.hotplug
    }
}

/// The devices on the PCI bus that each machine has, and keeps.
fn fixed(
    config: &VmConfig,
    host: &Host,
    board: &Board<'_>,
) -> Result<Vec<VirtioFunction>, MachineError> {
    let mut all = Vec::new();
    if let Some(terminal) = terminal("the console", &config.console)? {
        let console = Box::new(Console::new("_console", Arc::new(terminal)));
        all.push(function("virtio-console", console, None, host, board)?);
    }
    let rng = Box::new(Rng::new("_rng", entropy(&config.rng)?));
    all.push(function("virtio-rng", rng, None, host, board)?);
    Ok(all)
}

/// Where the guest's random bytes come from. The kernel's generator is asked without its file.
fn entropy(config: &RngConfig) -> Result<EntropySource, MachineError> {
    if ["/dev/urandom", "/dev/random"]
        .iter()
        .any(|path| config.src == Path::new(path))
    {
        return Ok(EntropySource::Kernel);
    }
    let file = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed())
        .open(&config.src)
        .map_err(|error| format!("cannot open {}: {error}", config.src.display()))
        .map_err(MachineError::device("_rng"))?;
    Ok(EntropySource::File(Arc::new(file)))
}

pub(super) fn function(
    kind: &'static str,
    device: Box<dyn VirtioDevice>,
    counters: Option<Arc<NetCounters>>,
    host: &Host,
    board: &Board<'_>,
) -> Result<VirtioFunction, MachineError> {
    let id = device.id().to_owned();
    let parts = VirtioPciParts {
        device,
        memory: board.ram.handle().clone(),
        fabric: Arc::new(Fabric(Arc::clone(board.interrupts))),
        spawner: host.spawner.clone(),
    };
    let device = VirtioPciDevice::new(parts).map_err(MachineError::device(&id))?;
    Ok(VirtioFunction {
        id,
        kind,
        device: Arc::new(Mutex::new(device)),
        counters,
        vhost: None,
        net: None,
    })
}

pub(super) fn place(
    bus: &Bus,
    what: &str,
    base: u64,
    len: u64,
    device: Arc<dyn BusDevice>,
) -> Result<(), MachineError> {
    bus.insert(base, len, device)
        .map_err(|cause| MachineError::Bus {
            what: what.to_owned(),
            cause,
        })
}

fn legacy(host: &Host, board: &Board<'_>) -> Result<(), MachineError> {
    let requests = Arc::new(PowerButton(host.exits.clone()));
    let pio = board.pio;
    let port = |port: u16| u64::from(port);
    place(
        pio,
        "ACPI registers",
        port(acpi::BASE_PORT),
        port(acpi::PORTS),
        Arc::new(AcpiPower::new(requests.clone())),
    )?;
    let keyboard = Arc::new(I8042::new(requests));
    place(
        pio,
        "i8042",
        port(layout::I8042_PORT),
        port(acpi::I8042_PORTS),
        keyboard,
    )?;
    place(
        pio,
        "debug port",
        port(layout::DEBUG_PORT),
        1,
        Arc::new(Sink),
    )
}

fn clock(board: &Board<'_>) -> Result<Arc<Mutex<Rtc>>, MachineError> {
    let (mut below, mut above) = (0, 0);
    for region in board.ram.regions() {
        let side = if region.gpa.0 < layout::LOW_RAM_END {
            &mut below
        } else {
            &mut above
        };
        *side += region.len;
    }
    let rtc = Rtc::new(below, above);
    let ports = (u64::from(rtc::BASE_PORT), u64::from(rtc::PORTS));
    place(
        board.pio,
        "real-time clock",
        ports.0,
        ports.1,
        Arc::new(rtc.clone()),
    )?;
    Ok(Arc::new(Mutex::new(rtc)))
}

fn terminal(
    device: &'static str,
    config: &ConsoleConfig,
) -> Result<Option<Terminal>, MachineError> {
    let made = match config {
        ConsoleConfig::Off => return Ok(None),
        ConsoleConfig::Null => Ok(Terminal::null()),
        ConsoleConfig::Tty => Terminal::stdio(),
        ConsoleConfig::Pty => Terminal::pty(),
        ConsoleConfig::File(path) => Terminal::file(path),
        ConsoleConfig::Socket(path) => Terminal::socket(path),
    };
    made.map(Some)
        .map_err(|cause| MachineError::Terminal { device, cause })
}

fn serial_port(
    config: &VmConfig,
    host: &Host,
    board: &Board<'_>,
) -> Result<Option<Arc<Mutex<Serial>>>, MachineError> {
    let Some(terminal) = terminal("the serial port", &config.serial)? else {
        return Ok(None);
    };
    let line = board
        .interrupts
        .isa_line(layout::COM1_IRQ)
        .map_err(MachineError::Interrupts)?;
    let port =
        Serial::new(terminal, line, &host.spawner).map_err(|cause| MachineError::Resources {
            what: "the serial port",
            cause,
        })?;
    let base = u64::from(layout::COM1_PORT);
    place(
        board.pio,
        "serial port",
        base,
        u64::from(serial::PORTS),
        port.registers(),
    )?;
    Ok(Some(Arc::new(Mutex::new(port))))
}
