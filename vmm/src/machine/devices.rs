//! The devices of a machine and where they are.

use std::sync::Arc;

use devices::acpi::{self, AcpiPower, I8042, Sink};
use devices::bus::{Bus, BusDevice};
use devices::serial::{self, Serial};
use devices::terminal::Terminal;
use hypervisor::Vm;
use parking_lot::Mutex;

use super::{Host, MachineError};
use crate::config::{ConsoleConfig, VmConfig};
use crate::interrupts::InterruptManager;
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

/// The devices of a machine.
pub struct Devices {
    serial: Option<Arc<Mutex<Serial>>>,
}

impl Devices {
    /// Makes the devices of `config` and puts them on the buses.
    pub(super) fn new(
        config: &VmConfig,
        host: &Host,
        board: &Board<'_>,
    ) -> Result<Self, MachineError> {
        legacy(host, board)?;
        let serial = serial_port(config, host, board)?;
        Ok(Self { serial })
    }

    /// Lets all devices go on, in the order they were made.
    pub(super) fn resume(&self) -> Result<(), MachineError> {
        Ok(())
    }

    /// Stops all devices, in the reverse order.
    pub(super) fn pause(&self) -> Result<(), MachineError> {
        Ok(())
    }
}

fn place(
    bus: &Bus,
    what: &str,
    base: u64,
    len: u64,
    device: Arc<dyn BusDevice>,
) -> Result<(), MachineError> {
    bus.insert(base, len, device)
        .map_err(|cause| MachineError::Bus { what: what.to_owned(), cause })
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
    place(pio, "i8042", port(layout::I8042_PORT), port(acpi::I8042_PORTS), keyboard)?;
    place(pio, "debug port", port(layout::DEBUG_PORT), 1, Arc::new(Sink))
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
    made.map(Some).map_err(|cause| MachineError::Terminal { device, cause })
}

fn serial_port(
    config: &VmConfig,
    host: &Host,
    board: &Board<'_>,
) -> Result<Option<Arc<Mutex<Serial>>>, MachineError> {
    let Some(terminal) = terminal("the serial port", &config.serial)? else { return Ok(None) };
    let line =
        board.interrupts.isa_line(layout::COM1_IRQ).map_err(MachineError::Interrupts)?;
    let port = Serial::new(terminal, line, &host.spawner)
        .map_err(|cause| MachineError::Resources { what: "the serial port", cause })?;
    let base = u64::from(layout::COM1_PORT);
    place(board.pio, "serial port", base, u64::from(serial::PORTS), port.registers())?;
    Ok(Some(Arc::new(Mutex::new(port))))
}
