//! Configuration space of one function: a byte image with a write mask.
//!
//! Every rule of the header is expressed by the mask. BAR sizing in particular needs no code of
//! its own: the address bits below the size are read-only zeros, so a guest that writes all ones
//! reads back the size (PCI Local Bus 3.0, §6.2.5.1).

use crate::device::{BarInfo, BarKind};

mod error;
mod registers;

pub use error::{BarError, ConfigError};
pub use registers::{Capability, command, offset};

/// Bytes of configuration space of a PCI Express function.
pub const CONFIG_SPACE_SIZE: usize = 4096;
/// Bytes of the part that ports 0xCF8/0xCFC reach and in which capabilities live.
pub const LEGACY_CONFIG_SIZE: u16 = 256;

/// Status register bit: there is a capability list.
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// Number of BARs of a type 0 header.
const BARS: u8 = 6;
/// BAR bits that are not address bits: space, type and prefetchability.
const MEMORY_BAR_FLAGS: u32 = 0xf;
/// The same for port I/O BARs.
const IO_BAR_FLAGS: u32 = 0x3;
/// The longest capability chain that fits: 4-byte aligned entries between header and 256.
const MAX_CAPABILITIES: usize = 48;

/// What identifies a function to drivers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Base class, subclass, programming interface.
    pub class: [u8; 3],
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// Saved configuration space. Untrusted when it comes back.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
pub struct ConfigState {
    version: u16,
    /// The image; trailing zeros are left out.
    bytes: Vec<u8>,
}

const STATE_VERSION: u16 = 1;

#[derive(Clone, Copy, Debug)]
struct Bar {
    kind: BarKind,
    size: u64,
}

/// Configuration space of one function.
///
/// [`read`](Self::read) and [`write`](Self::write) serve the guest and obey the write mask; the
/// `set_*` methods are the device's own and do not.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: Box<[u8; CONFIG_SPACE_SIZE]>,
    writable: Box<[u8; CONFIG_SPACE_SIZE]>,
    bars: [Option<Bar>; 6],
    /// Where the next capability goes.
    free: u16,
    /// Byte that points to the next capability to be added.
    tail: u16,
    msix: Option<u16>,
}

impl ConfigSpace {
    /// A type 0 header with no BARs and no capabilities.
    pub fn new(identity: &Identity) -> Self {
        let mut config = Self::blank();
        config.put(offset::VENDOR, &identity.vendor.to_le_bytes());
        config.put(offset::DEVICE, &identity.device.to_le_bytes());
        let [base, sub, interface] = identity.class;
        config.put(offset::REVISION, &[identity.revision, interface, sub, base]);
        config.put(
            offset::SUBSYSTEM_VENDOR,
            &identity.subsystem_vendor.to_le_bytes(),
        );
        config.put(offset::SUBSYSTEM, &identity.subsystem.to_le_bytes());
        config
    }

    /// Takes over the image of a real device (64 to 4096 bytes), for passthrough.
    ///
    /// All of it is read-only but for the header's usual registers and the MSI-X control bits;
    /// BARs, expansion ROM and interrupt pin are cleared. The caller adds the BARs it implements
    /// and removes capabilities it does not serve with
    /// [`hide_capability`](Self::hide_capability).
    ///
    /// # Errors
    /// If the image is not an endpoint's or its capability list is malformed.
    pub fn from_image(image: &[u8]) -> Result<Self, ConfigError> {
        let length = image.len();
        if !(usize::from(offset::HEADER_END)..=CONFIG_SPACE_SIZE).contains(&length) {
            return Err(ConfigError::ImageLength { length });
        }
        let mut config = Self::blank();
        config.put(0, image);
        let header_type = config.u8(offset::HEADER_TYPE) & 0x7f;
        if header_type != 0 {
            return Err(ConfigError::HeaderType { header_type });
        }
        config.put(offset::HEADER_TYPE, &[0]);
        config.put(offset::COMMAND, &[0; 2]);
        config.put(offset::BAR0, &[0; 24]);
        config.put(offset::ROM, &[0; 4]);
        config.put(offset::INTERRUPT_LINE, &[0, 0]);
        if config.u16(offset::STATUS) & STATUS_CAPABILITIES == 0 {
            config.put(offset::CAPABILITIES, &[0]);
        }
        // Capabilities of the image cannot be moved, so nothing is added behind them.
        config.free = LEGACY_CONFIG_SIZE;
        let (offsets, tail) = config.walk()?;
        config.tail = tail;
        config.msix = offsets
            .into_iter()
            .find(|at| config.u8(*at) == Capability::MSIX.0);
        if let Some(at) = config.msix {
            config.mask(at.saturating_add(2), &MSIX_CONTROL_WRITABLE.to_le_bytes());
        }
        Ok(config)
    }

    fn blank() -> Self {
        let mut config = Self {
            bytes: Box::new([0; CONFIG_SPACE_SIZE]),
            writable: Box::new([0; CONFIG_SPACE_SIZE]),
            bars: [None; 6],
            free: offset::HEADER_END,
            tail: offset::CAPABILITIES,
            msix: None,
        };
        config.mask(offset::COMMAND, &command::WRITABLE.to_le_bytes());
        config.mask(offset::CACHE_LINE, &[0xff]);
        config.mask(offset::INTERRUPT_LINE, &[0xff]);
        config
    }

    /// Implements BAR `index` with `size` bytes, at address 0 until it is programmed.
    ///
    /// # Errors
    /// See [`BarError`].
    pub fn add_bar(&mut self, index: u8, kind: BarKind, size: u64) -> Result<(), BarError> {
        let (least, most) = match kind {
            BarKind::Memory32 => (16, 1 << 31),
            BarKind::Memory64 { .. } => (16, 1 << 63),
            BarKind::Io => (4, 256),
        };
        if !size.is_power_of_two() || !(least..=most).contains(&size) {
            return Err(BarError::Size { index, size });
        }
        let wide = matches!(kind, BarKind::Memory64 { .. });
        let last = index.checked_add(u8::from(wide));
        if last.is_none_or(|last| last >= BARS) {
            return Err(BarError::Index { index });
        }
        if self.bar_covers(index) || (wide && self.bar_covers(index.saturating_add(1))) {
            return Err(BarError::InUse { index });
        }
        let Some(slot) = self.bars.get_mut(usize::from(index)) else {
            return Err(BarError::Index { index });
        };
        *slot = Some(Bar { kind, size });
        let address_bits = !(size - 1);
        let at = bar_offset(index);
        let (flags, keep) = match kind {
            BarKind::Memory32 => (0, MEMORY_BAR_FLAGS),
            BarKind::Memory64 { prefetchable } => {
                (0b100 | (u32::from(prefetchable) << 3), MEMORY_BAR_FLAGS)
            }
            BarKind::Io => (0b01, IO_BAR_FLAGS),
        };
        self.put(at, &flags.to_le_bytes());
        let mask = (address_bits & !u64::from(keep)).to_le_bytes();
        let width = if wide { 8 } else { 4 };
        self.mask(at, mask.get(..width).unwrap_or_default());
        Ok(())
    }

    /// Appends a capability and returns its offset. `body` is what follows the ID and the next
    /// pointer; set bits of `writable` (as long as `body`) are the guest's to write.
    ///
    /// # Errors
    /// If it does not fit below offset 256 or the lengths differ.
    pub fn add_capability(
        &mut self,
        id: Capability,
        body: &[u8],
        writable: &[u8],
    ) -> Result<u16, ConfigError> {
        if body.len() != writable.len() {
            return Err(ConfigError::CapabilityMask {
                id: id.0,
                body: body.len(),
                mask: writable.len(),
            });
        }
        let length = body.len().saturating_add(2);
        let room = ConfigError::CapabilityRoom { id: id.0, length };
        let at = self.free;
        let end = match u16::try_from(length).ok().and_then(|l| at.checked_add(l)) {
            Some(end) if end <= LEGACY_CONFIG_SIZE => end,
            _ => return Err(room),
        };
        let Ok(pointer) = u8::try_from(at) else {
            return Err(room);
        };
        self.put(at, &[id.0, 0]);
        self.put(at + 2, body);
        self.mask(at + 2, writable);
        self.put(self.tail, &[pointer]);
        self.tail = at + 1;
        self.free = end.next_multiple_of(4);
        let status = self.u16(offset::STATUS) | STATUS_CAPABILITIES;
        self.put(offset::STATUS, &status.to_le_bytes());
        if id == Capability::MSIX {
            self.msix = Some(at);
        }
        Ok(at)
    }

    /// Appends a vendor-specific capability; the length byte that such capabilities start with
    /// is written here, `body` follows it.
    ///
    /// # Errors
    /// As [`add_capability`](Self::add_capability).
    pub fn add_vendor_capability(
        &mut self,
        body: &[u8],
        writable: &[u8],
    ) -> Result<u16, ConfigError> {
        let length = body.len().saturating_add(3);
        let Ok(byte) = u8::try_from(length) else {
            let id = Capability::VENDOR.0;
            return Err(ConfigError::CapabilityRoom { id, length });
        };
        self.add_capability(
            Capability::VENDOR,
            &[&[byte], body].concat(),
            &[&[0], writable].concat(),
        )
    }

    /// Appends an MSI-X capability of `vectors` (1 to 2048), with the table and the pending bit
    /// array at `(BAR, offset)`, offsets multiples of 8.
    ///
    /// # Errors
    /// As [`add_capability`](Self::add_capability).
    pub fn add_msix_capability(
        &mut self,
        vectors: u16,
        table: (u8, u32),
        pending: (u8, u32),
    ) -> Result<u16, ConfigError> {
        let control = vectors.saturating_sub(1) & MSIX_TABLE_SIZE;
        let place = |(bar, at): (u8, u32)| ((at & !7) | u32::from(bar & 7)).to_le_bytes();
        let mut body = [0; 10];
        let mut writable = [0; 10];
        copy(&mut body, 0, &control.to_le_bytes());
        copy(&mut body, 2, &place(table));
        copy(&mut body, 6, &place(pending));
        copy(&mut writable, 0, &MSIX_CONTROL_WRITABLE.to_le_bytes());
        self.add_capability(Capability::MSIX, &body, &writable)
    }

    /// Unlinks the capability at `at` from the list and hides its bytes of ID. True if it was in
    /// the list.
    pub fn hide_capability(&mut self, at: u16) -> bool {
        let Ok((offsets, _)) = self.walk() else {
            return false;
        };
        let mut pointer = offset::CAPABILITIES;
        for found in offsets {
            if found == at {
                let next = self.u8(at.saturating_add(1));
                self.put(pointer, &[next]);
                self.put(at, &[0, 0]);
                if self.msix == Some(at) {
                    self.msix = None;
                }
                if self.tail == at.saturating_add(1) {
                    self.tail = pointer;
                }
                return true;
            }
            pointer = found.saturating_add(1);
        }
        false
    }

    /// Offset of the first capability `id`.
    pub fn find_capability(&self, id: Capability) -> Option<u16> {
        let (offsets, _) = self.walk().ok()?;
        offsets.into_iter().find(|at| self.u8(*at) == id.0)
    }

    /// Offsets of all capabilities `(offset, id)` in list order.
    pub fn capabilities(&self) -> Vec<(u16, Capability)> {
        let offsets = self.walk().map(|(offsets, _)| offsets).unwrap_or_default();
        offsets
            .into_iter()
            .map(|at| (at, Capability(self.u8(at))))
            .collect()
    }

    /// The MSI-X message control register, for [`crate::Msix::set_control`] after each write.
    pub fn msix_control(&self) -> Option<u16> {
        self.msix.map(|at| self.u16(at.saturating_add(2)))
    }

    /// Serves a guest read. Bytes past the end read as all ones.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        for (to, from) in data
            .iter_mut()
            .zip(self.bytes.iter().skip(usize::from(offset)))
        {
            *to = *from;
        }
    }

    /// Serves a guest write: only writable bits change.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        let start = usize::from(offset);
        let bytes = self.bytes.iter_mut().skip(start);
        let writable = self.writable.iter().skip(start);
        for ((byte, mask), new) in bytes.zip(writable).zip(data) {
            *byte = (*byte & !mask) | (new & mask);
        }
    }

    /// The implemented BARs with their present addresses.
    pub fn bars(&self) -> Vec<BarInfo> {
        (0..BARS).filter_map(|index| self.bar(index)).collect()
    }

    /// BAR `index`, if implemented.
    pub fn bar(&self, index: u8) -> Option<BarInfo> {
        let bar = (*self.bars.get(usize::from(index))?)?;
        let at = bar_offset(index);
        let low = self.u32(at);
        let address = match bar.kind {
            BarKind::Io => u64::from(low & !IO_BAR_FLAGS),
            BarKind::Memory32 => u64::from(low & !MEMORY_BAR_FLAGS),
            BarKind::Memory64 { .. } => {
                u64::from(low & !MEMORY_BAR_FLAGS) | (u64::from(self.u32(at + 4)) << 32)
            }
        };
        Some(BarInfo {
            index,
            kind: bar.kind,
            size: bar.size,
            address,
        })
    }

    /// Programs BAR `index` as the guest would: address bits below the size are dropped. An
    /// index that is not implemented is ignored.
    pub fn set_bar_address(&mut self, index: u8, address: u64) {
        let Some(Some(bar)) = self.bars.get(usize::from(index)) else {
            return;
        };
        let bytes = address.to_le_bytes();
        let width = match bar.kind {
            BarKind::Memory64 { .. } => 8,
            BarKind::Memory32 | BarKind::Io => 4,
        };
        self.write(bar_offset(index), bytes.get(..width).unwrap_or_default());
    }

    /// Command register.
    pub fn command(&self) -> u16 {
        self.u16(offset::COMMAND)
    }

    /// Whether memory BARs are decoded.
    pub fn memory_enabled(&self) -> bool {
        self.command() & command::MEMORY != 0
    }

    /// A byte; all ones past the end.
    pub fn u8(&self, offset: u16) -> u8 {
        let [byte] = self.get(offset);
        byte
    }

    /// A little-endian 16-bit register.
    pub fn u16(&self, offset: u16) -> u16 {
        u16::from_le_bytes(self.get(offset))
    }

    /// A little-endian 32-bit register.
    pub fn u32(&self, offset: u16) -> u32 {
        u32::from_le_bytes(self.get(offset))
    }

    /// Sets bytes whatever the mask says.
    ///
    /// # Errors
    /// If they do not lie in configuration space.
    pub fn set_bytes(&mut self, offset: u16, bytes: &[u8]) -> Result<(), ConfigError> {
        self.check(offset, bytes.len())?;
        self.put(offset, bytes);
        Ok(())
    }

    /// Makes the set bits of `mask` at `offset` the guest's to write.
    ///
    /// # Errors
    /// If they do not lie in configuration space.
    pub fn set_writable(&mut self, offset: u16, mask: &[u8]) -> Result<(), ConfigError> {
        self.check(offset, mask.len())?;
        self.mask(offset, mask);
        Ok(())
    }

    /// Back to power-on: every writable bit is cleared (BAR addresses included).
    pub fn reset(&mut self) {
        for (byte, mask) in self.bytes.iter_mut().zip(self.writable.iter()) {
            *byte &= !mask;
        }
    }

    /// The state for a migration.
    pub fn save(&self) -> ConfigState {
        let length = self
            .bytes
            .iter()
            .rposition(|b| *b != 0)
            .map_or(0, |p| p + 1);
        ConfigState {
            version: STATE_VERSION,
            bytes: self.bytes.get(..length).unwrap_or_default().to_vec(),
        }
    }

    /// Takes over the writable bits of saved state after checking that every read-only bit is
    /// the same here. Nothing changes on error. The owner then hands
    /// [`msix_control`](Self::msix_control) to its MSI-X table, and the bus maps the BARs.
    ///
    /// # Errors
    /// Version, length or device mismatch.
    pub fn restore(&mut self, state: &ConfigState) -> Result<(), ConfigError> {
        if state.version != STATE_VERSION {
            return Err(ConfigError::Version {
                found: state.version,
                wanted: STATE_VERSION,
            });
        }
        self.check(0, state.bytes.len())?;
        let mut image = [0; CONFIG_SPACE_SIZE];
        copy(&mut image, 0, &state.bytes);
        let read_only = self.bytes.iter().zip(self.writable.iter()).zip(&image);
        for (offset, ((here, mask), saved)) in (0_u16..).zip(read_only) {
            let (here, saved) = (here & !mask, saved & !mask);
            if here != saved {
                return Err(ConfigError::Mismatch {
                    offset,
                    saved,
                    here,
                });
            }
        }
        self.write(0, &image);
        Ok(())
    }

    /// Offsets of the capability list, and the byte that holds its final null pointer.
    fn walk(&self) -> Result<(Vec<u16>, u16), ConfigError> {
        let mut offsets = Vec::new();
        let mut pointer = offset::CAPABILITIES;
        loop {
            let at = u16::from(self.u8(pointer));
            if at == 0 {
                return Ok((offsets, pointer));
            }
            let sound = at >= offset::HEADER_END && at.is_multiple_of(4);
            if !sound || offsets.len() >= MAX_CAPABILITIES {
                return Err(ConfigError::CapabilityChain { offset: at });
            }
            offsets.push(at);
            pointer = at + 1;
        }
    }

    fn bar_covers(&self, index: u8) -> bool {
        let implemented = |i: u8| self.bars.get(usize::from(i)).copied().flatten();
        let below = index.checked_sub(1).and_then(implemented);
        implemented(index).is_some()
            || below.is_some_and(|bar| matches!(bar.kind, BarKind::Memory64 { .. }))
    }

    fn check(&self, offset: u16, length: usize) -> Result<(), ConfigError> {
        match usize::from(offset).checked_add(length) {
            Some(end) if end <= CONFIG_SPACE_SIZE => Ok(()),
            _ => Err(ConfigError::Range { offset, length }),
        }
    }

    fn get<const N: usize>(&self, offset: u16) -> [u8; N] {
        let mut out = [0xff; N];
        self.read(offset, &mut out);
        out
    }

    fn put(&mut self, offset: u16, bytes: &[u8]) {
        copy(self.bytes.as_mut_slice(), offset, bytes);
    }

    fn mask(&mut self, offset: u16, bits: &[u8]) {
        copy(self.writable.as_mut_slice(), offset, bits);
    }
}

/// Message control: function mask and enable are the guest's.
const MSIX_CONTROL_WRITABLE: u16 = 0xc000;
/// Message control: number of vectors less one.
const MSIX_TABLE_SIZE: u16 = 0x07ff;

fn bar_offset(index: u8) -> u16 {
    offset::BAR0.saturating_add(u16::from(index).saturating_mul(4))
}

/// Copies as much of `from` as fits at `offset`.
fn copy(to: &mut [u8], offset: u16, from: &[u8]) {
    for (to, from) in to.iter_mut().skip(usize::from(offset)).zip(from) {
        *to = *from;
    }
}

#[cfg(test)]
mod tests;
