//! ACPI tables: RSDP, XSDT, FADT (hardware-reduced), DSDT, MADT, MCFG.
//!
//! The guest has no legacy power management, PIC or PIT as far as ACPI tells it (the
//! hardware-reduced model of ACPI 6.5, 4.1): sleep and reset are one register each.

mod hotplug;

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name, ONE,
    Package, Path, ResourceTemplate, Scope, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as GasSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml::AmlStr};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use vm_migration::memory::GuestMemory;

use crate::layout;

const OEM_ID: [u8; 6] = *b"FERRY ";
const OEM_TABLE_ID: [u8; 8] = *b"FERRYVMM";
const OEM_REVISION: u32 = 1;
/// The DSDT's header is 36 bytes (ACPI 6.5, 5.2.6).
const SDT_HEADER: u32 = 36;

/// Why the tables could not be written.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// More vCPUs than xAPIC identifiers.
    #[error("{vcpus} vCPUs: at most {max} are possible", max = u8::MAX)]
    TooManyVcpus {
        /// How many were asked for.
        vcpus: u32,
    },
    /// The tables are larger than the area for them.
    #[error("ACPI tables of {size} bytes do not fit in their area")]
    TooLarge {
        /// Their size.
        size: u64,
    },
    /// Guest memory could not be written.
    #[error("cannot write ACPI tables to guest memory")]
    Memory(#[source] GuestMemoryError),
}

/// Writes all tables for a guest with `vcpus` CPUs, whose devices in the PCI slots `ejectable` may
/// come and go; gives the address of the RSDP.
///
/// # Errors
/// See [`AcpiError`].
pub fn write_tables(
    memory: &GuestMemory,
    vcpus: u32,
    ejectable: &[u8],
) -> Result<GuestAddress, AcpiError> {
    let count = u8::try_from(vcpus).map_err(|_| AcpiError::TooManyVcpus { vcpus })?;
    let rsdp_address = layout::ACPI_START;
    let mut area = Area {
        next: rsdp_address + 64,
        bytes: vec![0; 64],
    };

    let dsdt = area.append(&bytes(&dsdt(ejectable)));
    let fadt = area.append(&bytes(&fadt(dsdt).finalize()));
    let madt = area.append(&bytes(&madt(count)));
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(layout::ECAM_START, 0, 0, 0);
    let mcfg = area.append(&bytes(&mcfg));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for table in [fadt, madt, mcfg] {
        xsdt.add_entry(table);
    }
    let xsdt = area.append(&bytes(&xsdt));
    let rsdp = bytes(&Rsdp::new(OEM_ID, xsdt));
    if let Some(head) = area.bytes.get_mut(..rsdp.len()) {
        head.copy_from_slice(&rsdp);
    }
    if area.next > layout::ACPI_END {
        return Err(AcpiError::TooLarge {
            size: area.next - layout::ACPI_START,
        });
    }
    memory
        .write_slice(&area.bytes, GuestAddress(rsdp_address))
        .map_err(AcpiError::Memory)?;
    Ok(GuestAddress(rsdp_address))
}

/// The area that tables are appended to, and the address of its end.
struct Area {
    next: u64,
    bytes: Vec<u8>,
}

impl Area {
    /// Appends a table, 16-byte aligned; gives its address.
    fn append(&mut self, table: &[u8]) -> u64 {
        let address = self.next;
        self.bytes.extend_from_slice(table);
        let padded = self.bytes.len().next_multiple_of(16);
        self.bytes.resize(padded, 0);
        self.next = layout::ACPI_START + u64::try_from(padded).unwrap_or(u64::MAX);
        address
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut out = Vec::new();
    table.to_aml_bytes(&mut out);
    out
}

fn io_register(port: u16) -> GAS {
    GAS::new(
        GasSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        u64::from(port),
    )
}

fn fadt(dsdt: u64) -> FADTBuilder {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.reset_reg = io_register(devices::acpi::RESET_PORT);
    fadt.reset_value = devices::acpi::RESET_VALUE;
    fadt.sleep_control_reg = io_register(devices::acpi::SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = io_register(devices::acpi::SLEEP_STATUS_PORT);
    fadt
}

fn madt(vcpus: u8) -> MADT {
    let lapic = LocalInterruptController::Address(layout::LAPIC_START);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, lapic);
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IOAPIC_START, 0));
    madt
}

fn dsdt(ejectable: &[u8]) -> Sdt {
    let mut aml = Vec::new();
    pci_root(&mut aml);
    hotplug::describe(&mut aml, ejectable);
    serial(&mut aml);
    real_time_clock(&mut aml);
    // \_S5: the sleep type that means off, as the sleep control register takes it.
    Name::new(
        "_S5_".into(),
        &Package::new(vec![
            &devices::acpi::S5_SLEEP_TYPE,
            &devices::acpi::S5_SLEEP_TYPE,
        ]),
    )
    .to_aml_bytes(&mut aml);
    let mut table = Sdt::new(*b"DSDT", SDT_HEADER, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(&aml);
    table
}

fn pci_root(aml: &mut Vec<u8>) {
    // All of these are 32-bit by the layout.
    let low = |address: u64| u32::try_from(address).unwrap_or(u32::MAX);
    let ecam = Memory32Fixed::new(true, low(layout::ECAM_START), low(layout::ECAM_SIZE));
    let last = layout::PCI_MMIO_START + layout::PCI_MMIO_SIZE - 1;
    let window = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        low(layout::PCI_MMIO_START),
        low(last),
        None,
    );
    let buses = AddressSpace::<u16>::new_bus_number(0, 0);
    let ports = IO::new(layout::PCI_CONFIG_PORT, layout::PCI_CONFIG_PORT, 1, 8);
    let resources = ResourceTemplate::new(vec![&buses, &ports, &window]);
    let crs = Name::new("_CRS".into(), &resources);
    let hid = Name::new("_HID".into(), &EISAName::new("PNP0A08"));
    let cid = Name::new("_CID".into(), &EISAName::new("PNP0A03"));
    let uid = Name::new("_UID".into(), &ZERO);
    let seg = Name::new("_SEG".into(), &ZERO);
    let bbn = Name::new("_BBN".into(), &ZERO);
    let cca = Name::new("_CCA".into(), &ONE);
    let root = Device::new(
        "PCI0".into(),
        vec![&hid, &cid, &uid, &seg, &bbn, &cca, &crs],
    );
    // Guests use ECAM only if a motherboard resource reserves it (PCI Firmware 3.3, 4.1.2).
    let board_resources = ResourceTemplate::new(vec![&ecam]);
    let board_crs = Name::new("_CRS".into(), &board_resources);
    let board_hid = Name::new("_HID".into(), &EISAName::new("PNP0C02"));
    let board_uid = Name::new("_UID".into(), &ZERO);
    let board = Device::new("MBRD".into(), vec![&board_hid, &board_uid, &board_crs]);
    Scope::new(Path::new("\\_SB_"), vec![&root, &board]).to_aml_bytes(aml);
}

fn serial(aml: &mut Vec<u8>) {
    let interrupt = Interrupt::new(true, true, false, false, layout::COM1_IRQ);
    let ports = IO::new(layout::COM1_PORT, layout::COM1_PORT, 1, 8);
    let resources = ResourceTemplate::new(vec![&interrupt, &ports]);
    let crs = Name::new("_CRS".into(), &resources);
    let hid = Name::new("_HID".into(), &EISAName::new("PNP0501"));
    let uid = Name::new("_UID".into(), &ZERO);
    let name: AmlStr = "COM1";
    let ddn = Name::new("_DDN".into(), &name);
    let port = Device::new("COM1".into(), vec![&hid, &uid, &ddn, &crs]);
    Scope::new(Path::new("\\_SB_"), vec![&port]).to_aml_bytes(aml);
}

/// The clock without its interrupt, which it never raises: a guest that takes the interrupt for
/// granted, as Linux does of a clock that no table tells of, gets none and gives the clock up.
fn real_time_clock(aml: &mut Vec<u8>) {
    // Two ports fit in a byte.
    let count = u8::try_from(devices::rtc::PORTS).unwrap_or(u8::MAX);
    let ports = IO::new(devices::rtc::BASE_PORT, devices::rtc::BASE_PORT, 1, count);
    let resources = ResourceTemplate::new(vec![&ports]);
    let crs = Name::new("_CRS".into(), &resources);
    let hid = Name::new("_HID".into(), &EISAName::new("PNP0B00"));
    let uid = Name::new("_UID".into(), &ZERO);
    let clock = Device::new("RTC0".into(), vec![&hid, &uid, &crs]);
    Scope::new(Path::new("\\_SB_"), vec![&clock]).to_aml_bytes(aml);
}
