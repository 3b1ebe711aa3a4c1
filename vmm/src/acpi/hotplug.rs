//! How the guest learns of devices that come and go, in AML.
//!
//! ```text
//! Scope (\_SB.PCI0)
//!   OperationRegion, Field     the registers of pci::HotPlug
//!   Device (S003)              one per slot whose device may be ejected
//!     _ADR, _SUN               where it is; its number for people
//!     _EJ0                     writes the slot's bit into the register of ejects
//!   Method (HPEV)              takes note of both registers, and notifies the slots in them
//! Device (\_SB.GED)            the interrupt, and _EVT, which calls HPEV (ACPI 6.5, 5.6.9)
//! ```
//!
//! Slots have no `_STA`: whether there is a device is what configuration space says, and a second
//! answer could only differ from it. Linux (`acpiphp`) looks there for slots without one.

use acpi_tables::aml::{
    And, Arg, Device, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule,
    If, Interrupt, Local, Method, MethodCall, Name, Notify, OpRegion, OpRegionSpace, Path,
    ResourceTemplate, Scope, Store, ZERO,
};
use acpi_tables::{Aml, aml::AmlStr};
use pci::HotPlug;

use crate::layout;

/// What `Notify` says to a slot (ACPI 6.5, 5.6.6, "Device Object Notifications"): look whether a
/// device came; eject the device.
const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;

/// The slot's object.
fn slot_path(slot: u8) -> Path {
    Path::new(&format!("S{slot:03}"))
}

/// Appends the registers, the slots and the interrupt.
pub(super) fn describe(aml: &mut Vec<u8>, ejectable: &[u8]) {
    let (base, len) = (layout::HOTPLUG_PORT, HotPlug::BYTES);
    let registers = OpRegion::new("HPRG".into(), OpRegionSpace::SystemIO, &base, &len);
    let fields = Field::new(
        "HPRG".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![
            FieldEntry::Named(*b"CAME", 32),
            FieldEntry::Named(*b"GOES", 32),
            FieldEntry::Named(*b"EJCT", 32),
        ],
    );
    let mut scope = Vec::new();
    registers.to_aml_bytes(&mut scope);
    fields.to_aml_bytes(&mut scope);
    for slot in ejectable {
        describe_slot(&mut scope, *slot);
    }
    events(&mut scope, ejectable);
    aml.extend(Scope::raw(Path::new("\\_SB_.PCI0"), scope));
    interrupt(aml);
}

fn bit(slot: u8) -> u32 {
    1_u32.checked_shl(slot.into()).unwrap_or(0)
}

fn describe_slot(aml: &mut Vec<u8>, slot: u8) {
    // Device number in the upper half, function 0 (ACPI 6.5, 6.1.1).
    let address = u32::from(slot) << 16;
    let adr = Name::new("_ADR".into(), &address);
    let sun = Name::new("_SUN".into(), &slot);
    let register = Path::new("EJCT");
    let own = bit(slot);
    let write = Store::new(&register, &own);
    let eject = Method::new("_EJ0".into(), 1, true, vec![&write]);
    Device::new(slot_path(slot), vec![&adr, &sun, &eject]).to_aml_bytes(aml);
}

/// The method that reads each register once, clears what it read, and notifies the slots.
fn events(aml: &mut Vec<u8>, ejectable: &[u8]) {
    let mut body = Vec::new();
    for (register, local, what) in [
        ("CAME", Local(0), DEVICE_CHECK),
        ("GOES", Local(1), EJECT_REQUEST),
    ] {
        let register = Path::new(register);
        Store::new(&local, &register).to_aml_bytes(&mut body);
        Store::new(&register, &local).to_aml_bytes(&mut body);
        for slot in ejectable {
            let (own, object) = (bit(*slot), slot_path(*slot));
            let named = And::new(&ZERO, &local, &own);
            let notify = Notify::new(&object, &what);
            If::new(&named, vec![&notify]).to_aml_bytes(&mut body);
        }
    }
    let body = Raw(body);
    Method::new("HPEV".into(), 0, true, vec![&body]).to_aml_bytes(aml);
}

/// The generic event device with the one interrupt.
fn interrupt(aml: &mut Vec<u8>) {
    let hid: AmlStr = "ACPI0013";
    let hid = Name::new("_HID".into(), &hid);
    let uid = Name::new("_UID".into(), &ZERO);
    let line = Interrupt::new(true, true, false, false, layout::HOTPLUG_IRQ);
    let resources = ResourceTemplate::new(vec![&line]);
    let crs = Name::new("_CRS".into(), &resources);
    let handle = MethodCall::new("\\_SB_.PCI0.HPEV".into(), vec![]);
    let ours = Equal::new(&Arg(0), &layout::HOTPLUG_IRQ);
    let event = If::new(&ours, vec![&handle]);
    let evt = Method::new("_EVT".into(), 1, true, vec![&event]);
    let device = Device::new("GED_".into(), vec![&hid, &uid, &crs, &evt]);
    Scope::new(Path::new("\\_SB_"), vec![&device]).to_aml_bytes(aml);
}

/// AML that is made already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}
