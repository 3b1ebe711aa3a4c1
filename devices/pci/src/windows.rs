//! The guest's two ways to configuration space: memory mapped, and ports 0xCF8/0xCFC.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use devices::BusDevice;

use crate::bus::PciBus;
use crate::config::LEGACY_CONFIG_SIZE;

/// The enhanced configuration access mechanism of bus 0 (PCI Express Base, §7.2.2): 4 KiB per
/// function, 8 functions per device.
pub struct EcamWindow {
    bus: Arc<PciBus>,
}

impl EcamWindow {
    /// Bytes of the window.
    pub const BYTES: u64 = 1 << 20;

    /// The window of `bus`.
    pub fn new(bus: Arc<PciBus>) -> Self {
        Self { bus }
    }
}

/// A place in configuration space.
struct Place {
    slot: u8,
    offset: u16,
}

/// The place an offset of the window is at; `None` for functions other than 0 and past the end.
fn ecam_place(offset: u64) -> Option<Place> {
    let function = (offset >> 12) & 7;
    if function != 0 || offset >= EcamWindow::BYTES {
        return None;
    }
    Some(Place {
        slot: u8::try_from(offset >> 15).ok()?,
        offset: u16::try_from(offset & 0xfff).ok()?,
    })
}

/// How many bytes from `offset` on are in the same dword.
fn to_dword_end(offset: u64) -> usize {
    match offset % 4 {
        0 => 4,
        1 => 3,
        2 => 2,
        _ => 1,
    }
}

impl BusDevice for EcamWindow {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut at = offset;
        let mut rest = data;
        while !rest.is_empty() {
            let length = to_dword_end(at).min(rest.len());
            let (piece, tail) = rest.split_at_mut(length);
            match ecam_place(at) {
                Some(place) => self.bus.read_config(place.slot, place.offset, piece),
                None => piece.fill(0xff),
            }
            rest = tail;
            at = at.saturating_add(u64::try_from(length).unwrap_or(0));
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut at = offset;
        let mut rest = data;
        while !rest.is_empty() {
            let length = to_dword_end(at).min(rest.len());
            let (piece, tail) = rest.split_at(length);
            if let Some(place) = ecam_place(at) {
                self.bus.write_config(place.slot, place.offset, piece);
            }
            rest = tail;
            at = at.saturating_add(u64::try_from(length).unwrap_or(0));
        }
    }
}

/// Ports 0xCF8 (address latch) and 0xCFC (data) of configuration mechanism 1 (PCI Local Bus 3.0,
/// §3.2.2.3.2). The latch is part of the bus's state.
pub struct ConfigPorts {
    bus: Arc<PciBus>,
}

/// Offset of the data port from the address port.
const DATA: u64 = 4;
/// Latch bit: data accesses are configuration accesses.
const ENABLE: u32 = 1 << 31;

impl ConfigPorts {
    /// First port.
    pub const BASE: u64 = 0xcf8;
    /// Number of ports.
    pub const PORTS: u64 = 8;

    /// The ports of `bus`.
    pub fn new(bus: Arc<PciBus>) -> Self {
        Self { bus }
    }

    /// The place a data access at `offset` of the ports means, if it stays in the dword.
    fn place(&self, offset: u64, length: usize) -> Option<Place> {
        let byte = offset.checked_sub(DATA).filter(|byte| *byte < 4)?;
        if length > to_dword_end(byte) {
            return None;
        }
        let address = self.bus.address.load(Ordering::Relaxed);
        let [register, device, bus, _] = address.to_le_bytes();
        if address & ENABLE == 0 || bus != 0 || device & 7 != 0 {
            return None;
        }
        let offset = u16::from(register & !3).checked_add(u16::try_from(byte).ok()?)?;
        (offset < LEGACY_CONFIG_SIZE).then_some(Place {
            slot: device >> 3,
            offset,
        })
    }
}

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let (0, Ok(latch)) = (offset, <&mut [u8; 4]>::try_from(&mut *data)) {
            *latch = self.bus.address.load(Ordering::Relaxed).to_le_bytes();
            return;
        }
        match self.place(offset, data.len()) {
            Some(place) => self.bus.read_config(place.slot, place.offset, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        // Only a whole dword reaches the latch; narrower ones are other devices' on a real PC.
        if let (0, Ok(latch)) = (offset, <[u8; 4]>::try_from(data)) {
            let address = u32::from_le_bytes(latch) & !3;
            self.bus.address.store(address, Ordering::Relaxed);
        } else if let Some(place) = self.place(offset, data.len()) {
            self.bus.write_config(place.slot, place.offset, data);
        }
    }
}
