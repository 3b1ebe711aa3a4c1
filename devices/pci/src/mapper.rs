//! Joining BARs to the guest's address spaces.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::Arc;

use devices::{Bus, BusDevice, BusError};
use parking_lot::Mutex;

use crate::SharedDevice;
use crate::device::{BarInfo, BarKind, Doorbell};

/// Why a BAR cannot be mapped where it is programmed to.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The root does not pass these addresses on. A BAR in the middle of being sized is such.
    #[error("BAR {index} at {address:#x} ({size:#x} bytes) is outside the windows of the PCI root")]
    OutsideWindows {
        /// BAR index.
        index: u8,
        /// Where it is programmed to.
        address: u64,
        /// Its size.
        size: u64,
    },
    /// Something else is there.
    #[error("BAR {index}")]
    Bus {
        /// BAR index.
        index: u8,
        /// Why.
        #[source]
        cause: BusError,
    },
    /// A mapper of the VMM's own could not do its part (a memory slot, for instance).
    #[error("BAR {index}")]
    Backend {
        /// BAR index.
        index: u8,
        /// Why.
        #[source]
        cause: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Maps and unmaps BARs. Called with no device's mutex held.
pub trait BarMapper: Send + Sync {
    /// Makes the guest's accesses to `bar` reach `device`.
    ///
    /// # Errors
    /// [`MapError`]; nothing is mapped then.
    fn map(&self, device: &SharedDevice, bar: &BarInfo) -> Result<(), MapError>;
    /// Undoes [`map`](Self::map) of the same BAR.
    fn unmap(&self, device: &SharedDevice, bar: &BarInfo);
}

/// An address space a doorbell is in.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum DoorbellSpace {
    /// Guest physical memory.
    Memory,
    /// Port I/O.
    Io,
}

/// Binds doorbells to eventfds in the kernel; implemented by the VMM over its hypervisor.
pub trait DoorbellBinder: Send + Sync {
    /// Has guest writes at `address` that match `doorbell` (size, value) signal its eventfd.
    ///
    /// # Errors
    /// The hypervisor's. The doorbell then works through exits to the VMM, slowly.
    fn bind(
        &self,
        space: DoorbellSpace,
        address: u64,
        doorbell: &Doorbell,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>>;
    /// Undoes [`bind`](Self::bind).
    ///
    /// # Errors
    /// The hypervisor's.
    fn unbind(
        &self,
        space: DoorbellSpace,
        address: u64,
        doorbell: &Doorbell,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>>;
}

/// The usual mapper: BARs become ranges of a [`Bus`], doorbells go to a [`DoorbellBinder`].
pub struct BusBarMapper {
    memory: Arc<Bus>,
    ports: Arc<Bus>,
    /// The addresses the root passes on, as its `_CRS` tells the guest.
    memory_windows: Vec<RangeInclusive<u64>>,
    port_windows: Vec<RangeInclusive<u64>>,
    binder: Arc<dyn DoorbellBinder>,
    /// The doorbells bound now, by the BAR they are in.
    bound: Mutex<BTreeMap<(DoorbellSpace, u64), Vec<Doorbell>>>,
}

impl BusBarMapper {
    /// A mapper onto `memory` and `ports`; only BARs wholly inside one of the windows are mapped.
    pub fn new(
        memory: Arc<Bus>,
        ports: Arc<Bus>,
        memory_windows: Vec<RangeInclusive<u64>>,
        port_windows: Vec<RangeInclusive<u64>>,
        binder: Arc<dyn DoorbellBinder>,
    ) -> Self {
        Self {
            memory,
            ports,
            memory_windows,
            port_windows,
            binder,
            bound: Mutex::default(),
        }
    }

    fn space(&self, kind: BarKind) -> (DoorbellSpace, &Bus, &[RangeInclusive<u64>]) {
        match kind {
            BarKind::Io => (DoorbellSpace::Io, &self.ports, &self.port_windows),
            BarKind::Memory32 | BarKind::Memory64 { .. } => {
                (DoorbellSpace::Memory, &self.memory, &self.memory_windows)
            }
        }
    }
}

impl BarMapper for BusBarMapper {
    fn map(&self, device: &SharedDevice, bar: &BarInfo) -> Result<(), MapError> {
        let (space, bus, windows) = self.space(bar.kind);
        let last = bar.address.checked_add(bar.size.saturating_sub(1));
        let inside = last.is_some_and(|last| {
            let holds = |w: &RangeInclusive<u64>| w.contains(&bar.address) && w.contains(&last);
            windows.iter().any(holds)
        });
        if !inside {
            return Err(MapError::OutsideWindows {
                index: bar.index,
                address: bar.address,
                size: bar.size,
            });
        }
        let window = Arc::new(BarWindow {
            device: Arc::clone(device),
            bar: bar.index,
            size: bar.size,
        });
        bus.insert(bar.address, bar.size, window)
            .map_err(|cause| MapError::Bus {
                index: bar.index,
                cause,
            })?;
        let mut doorbells = device.lock().doorbells();
        doorbells.retain(|doorbell| doorbell.bar == bar.index);
        doorbells.retain(|doorbell| {
            let address = bar.address.saturating_add(doorbell.offset);
            let bound = self.binder.bind(space, address, doorbell);
            if let Err(error) = &bound {
                tracing::error!(?doorbell, %error, "doorbell works through exits only");
            }
            bound.is_ok()
        });
        self.bound.lock().insert((space, bar.address), doorbells);
        Ok(())
    }

    fn unmap(&self, _: &SharedDevice, bar: &BarInfo) {
        let (space, bus, _) = self.space(bar.kind);
        let bound = self.bound.lock().remove(&(space, bar.address));
        for doorbell in bound.unwrap_or_default() {
            let address = bar.address.saturating_add(doorbell.offset);
            if let Err(error) = self.binder.unbind(space, address, &doorbell) {
                tracing::error!(?doorbell, %error, "doorbell could not be unbound");
            }
        }
        bus.remove(bar.address);
    }
}

/// A BAR as a device of the address space.
struct BarWindow {
    device: SharedDevice,
    bar: u8,
    size: u64,
}

impl BarWindow {
    fn holds(&self, offset: u64, length: usize) -> bool {
        let end = u64::try_from(length)
            .ok()
            .and_then(|l| offset.checked_add(l));
        end.is_some_and(|end| end <= self.size)
    }
}

impl BusDevice for BarWindow {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if self.holds(offset, data.len()) {
            self.device.lock().read_bar(self.bar, offset, data);
        } else {
            data.fill(0xff);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if self.holds(offset, data.len()) {
            self.device.lock().write_bar(self.bar, offset, data);
        }
    }
}
