//! Address spaces (port I/O, MMIO) and their dispatch.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::RwLock;

/// A device that answers accesses in an address space.
///
/// Calls come from several vCPU threads at once; a device locks for itself. Offsets are from the
/// start of the range it was registered with. `data` is 1, 2, 4 or 8 bytes.
pub trait BusDevice: Send + Sync {
    /// Fills `data` with what the device has at `offset`. What it has not reads as all ones.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Takes `data`. A write the device does not know is dropped.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Why a range could not be registered.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    /// The range is empty or runs past the end of the space.
    #[error("range of {len:#x} bytes at {base:#x} is empty or runs past the end")]
    BadRange {
        /// Start.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Another device is there.
    #[error("range of {len:#x} bytes at {base:#x} overlaps the device at {other:#x}")]
    Overlap {
        /// Start.
        base: u64,
        /// Length in bytes.
        len: u64,
        /// Start of the range that is in the way.
        other: u64,
    },
}

struct Range {
    last: u64,
    device: Arc<dyn BusDevice>,
}

/// An address space and the devices in it.
///
/// A device is called with no lock of the bus held, so it may change the bus (a PCI device whose
/// BAR moves does).
#[derive(Default)]
pub struct Bus {
    ranges: RwLock<BTreeMap<u64, Range>>,
}

impl Bus {
    /// An empty space.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts `device` at `base`, `len` bytes long.
    ///
    /// # Errors
    /// [`BusError`] if the range is bad or taken.
    pub fn insert(&self, base: u64, len: u64, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
        let last = len
            .checked_sub(1)
            .and_then(|rest| base.checked_add(rest))
            .ok_or(BusError::BadRange { base, len })?;
        let mut ranges = self.ranges.write();
        if let Some((&other, range)) = ranges.range(..=last).next_back()
            && range.last >= base
        {
            return Err(BusError::Overlap { base, len, other });
        }
        ranges.insert(base, Range { last, device });
        Ok(())
    }

    /// Takes away the device whose range starts at `base`. An access that is under way ends.
    pub fn remove(&self, base: u64) -> Option<Arc<dyn BusDevice>> {
        self.ranges.write().remove(&base).map(|range| range.device)
    }

    /// Takes all devices away. A machine does so in its end: a device that answers here and also
    /// moves others about (a PCI root) holds the bus that holds it.
    pub fn clear(&self) {
        let ranges = std::mem::take(&mut *self.ranges.write());
        // Not under the lock: nobody knows what a device does when it is dropped.
        drop(ranges);
    }

    /// The device at `address` and the offset in its range. An access that starts in a device and
    /// runs past its end is the device's to judge.
    fn find(&self, address: u64) -> Option<(Arc<dyn BusDevice>, u64)> {
        let ranges = self.ranges.read();
        let (&base, range) = ranges.range(..=address).next_back()?;
        (address <= range.last).then(|| (Arc::clone(&range.device), address - base))
    }

    /// Reads; where there is no device, all ones.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((device, offset)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes; where there is no device, nothing happens.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(address) {
            device.write(offset, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parking_lot::Mutex;
    use proptest::prelude::*;

    #[derive(Default)]
    struct Echo {
        tag: u8,
        written: Mutex<Vec<(u64, Vec<u8>)>>,
    }

    impl BusDevice for Echo {
        fn read(&self, _: u64, data: &mut [u8]) {
            data.fill(self.tag);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.written.lock().push((offset, data.to_vec()));
        }
    }

    fn echo(tag: u8) -> Arc<Echo> {
        Arc::new(Echo {
            tag,
            ..Default::default()
        })
    }

    fn byte(bus: &Bus, address: u64) -> u8 {
        let mut data = [0];
        bus.read(address, &mut data);
        data[0]
    }

    #[test]
    fn accesses_reach_the_device_of_their_range() {
        let bus = Bus::new();
        let device = echo(1);
        bus.insert(0x100, 0x10, device.clone()).unwrap();
        bus.insert(0x110, 0x10, echo(2)).unwrap();
        let seen: Vec<u8> = [0xff, 0x100, 0x10f, 0x110, 0x11f, 0x120]
            .map(|a| byte(&bus, a))
            .into();
        assert_eq!(seen, [0xff, 1, 1, 2, 2, 0xff]);
        bus.write(0x104, &[9, 8]);
        assert_eq!(*device.written.lock(), [(4, vec![9, 8])]);
        bus.remove(0x100).unwrap();
        assert_eq!([byte(&bus, 0x100), byte(&bus, 0x110)], [0xff, 2]);
        bus.clear();
        assert_eq!(byte(&bus, 0x110), 0xff);
        assert_eq!(Arc::strong_count(&device), 1);
    }

    #[test]
    fn bad_ranges_are_refused() {
        let bus = Bus::new();
        assert_eq!(
            bus.insert(0, 0, echo(0)),
            Err(BusError::BadRange { base: 0, len: 0 })
        );
        assert_eq!(
            bus.insert(u64::MAX, 2, echo(0)),
            Err(BusError::BadRange {
                base: u64::MAX,
                len: 2
            })
        );
        bus.insert(u64::MAX, 1, echo(3)).unwrap();
        assert_eq!(byte(&bus, u64::MAX), 3);
    }

    proptest! {
        #[test]
        fn no_two_ranges_overlap(ranges in proptest::collection::vec((0u64..200, 1u64..40), 1..20)) {
            let bus = Bus::new();
            let mut taken: Vec<Option<u8>> = vec![None; 256];
            for (tag, (base, len)) in ranges.into_iter().enumerate() {
                let tag = u8::try_from(tag).unwrap();
                let cells = &mut taken[usize::try_from(base).unwrap()..usize::try_from(base + len).unwrap()];
                let free = cells.iter().all(Option::is_none);
                prop_assert_eq!(bus.insert(base, len, echo(tag)).is_ok(), free);
                if free {
                    cells.fill(Some(tag));
                }
            }
            for (address, tag) in taken.into_iter().enumerate() {
                prop_assert_eq!(byte(&bus, u64::try_from(address).unwrap()), tag.unwrap_or(0xff));
            }
        }
    }
}
