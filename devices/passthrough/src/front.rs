//! What of the function the VMM itself answers: header, BAR addresses, MSI-X.
//!
//! The guest must not move the real device's BARs or see its interrupt routing, so these are
//! emulated; everything else in configuration space is read from and written to the device.

use std::sync::Arc;

use devices::{InterruptError, MsiFabric, MsiLine};
use pci::config::{CONFIG_SPACE_SIZE, offset};
use pci::{
    BarError, BarKind, Capability, ConfigError, ConfigSpace, ConfigState, Msix, MsixError,
    MsixState,
};
use serde::{Deserialize, Serialize};
use vfio_user::wire::PCI_CONFIG_REGION;

use crate::backend::{Backend, BackendError};

/// Why a device's function cannot be shown to the guest.
#[derive(Debug, thiserror::Error)]
pub enum FrontError {
    /// The device did not answer.
    #[error("reading the device's configuration")]
    Backend(#[from] BackendError),
    /// Its configuration space is malformed.
    #[error("the device's configuration space is not usable")]
    Config(#[from] ConfigError),
    /// A BAR is malformed.
    #[error("the device's BARs are not usable")]
    Bar(#[from] BarError),
    /// Its MSI-X table lies outside of its BAR.
    #[error("the device's MSI-X table or pending bits do not lie in one of its BARs")]
    MsixPlace,
    /// There are no vectors for it.
    #[error("no interrupt vectors for the device")]
    Vectors(#[from] InterruptError),
    /// The table could not be made.
    #[error("MSI-X table of the device")]
    Msix(#[from] MsixError),
}

/// A part of a BAR.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Place {
    pub(crate) bar: u8,
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

impl Place {
    /// Where in the place `offset` of `bar` is.
    pub(crate) fn within(&self, bar: u8, offset: u64) -> Option<u64> {
        let at = offset.checked_sub(self.offset)?;
        (bar == self.bar && at < self.len).then_some(at)
    }
}

/// Where the MSI-X structures are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MsixLayout {
    /// Offset of the capability.
    pub(crate) capability: u16,
    /// How many vectors there are.
    pub(crate) vectors: u16,
    pub(crate) table: Place,
    pub(crate) pending: Place,
}

/// Which bytes of configuration space are the VMM's.
pub(crate) struct Emulated(Box<[bool; CONFIG_SPACE_SIZE]>);

impl Emulated {
    fn mark(&mut self, at: u16, len: usize) {
        for byte in self.0.iter_mut().skip(usize::from(at)).take(len) {
            *byte = true;
        }
    }

    /// Whether any, and whether all of `len` bytes at `at` are.
    pub(crate) fn any_all(&self, at: u16, len: usize) -> (bool, bool) {
        let bytes = || self.0.iter().skip(usize::from(at)).take(len);
        (bytes().any(|byte| *byte), bytes().all(|byte| *byte))
    }

    /// Whether byte `at` is.
    pub(crate) fn has(&self, at: usize) -> bool {
        self.0.get(at).copied().unwrap_or(true)
    }
}

/// Saved front.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct FrontState {
    version: u16,
    config: ConfigState,
    msix: Option<MsixState>,
}

const STATE_VERSION: u16 = 1;

/// The emulated parts that change.
pub(crate) struct Front {
    pub(crate) config: ConfigSpace,
    pub(crate) msix: Option<Msix>,
}

/// The parts that do not.
pub(crate) struct Layout {
    pub(crate) msix: Option<MsixLayout>,
    pub(crate) emulated: Emulated,
}

impl Front {
    /// Reads the device's configuration space and sets up what the guest is to see, with the
    /// device's interrupts signalling vectors of `fabric`.
    pub(crate) fn new(
        backend: &dyn Backend,
        fabric: &dyn MsiFabric,
    ) -> Result<(Self, Layout), FrontError> {
        let size = backend.region(PCI_CONFIG_REGION)?.size;
        let len = usize::try_from(size).map_or(CONFIG_SPACE_SIZE, |n| n.min(CONFIG_SPACE_SIZE));
        let mut image = vec![0; len];
        backend.region_read(PCI_CONFIG_REGION, 0, &mut image)?;
        let mut config = ConfigSpace::from_image(&image)?;
        add_bars(&mut config, &image, backend)?;
        let mut emulated = Emulated(Box::new([false; CONFIG_SPACE_SIZE]));
        emulated.mark(0, usize::from(offset::HEADER_END));
        // The device's own MSI would need its message address: guests use MSI-X.
        for (at, id) in config.capabilities() {
            if id == Capability::MSI {
                config.hide_capability(at);
            }
            emulated.mark(at, 2);
        }
        let (msix, layout) = match config.find_capability(Capability::MSIX) {
            Some(at) => {
                let layout = msix_layout(&config, at)?;
                emulated.mark(at, 12);
                let vectors = (config.u16(at.saturating_add(2)) & 0x7ff) + 1;
                let lines = fabric.allocate(vectors)?;
                let eventfds: Vec<_> = lines
                    .iter()
                    .map(|line: &Arc<dyn MsiLine>| crate::fd::borrow(line.eventfd()))
                    .collect();
                backend.set_msix(&eventfds)?;
                (Some(Msix::new(lines.clone())?), Some(layout))
            }
            None => (None, None),
        };
        let layout = Layout {
            msix: layout,
            emulated,
        };
        Ok((Self { config, msix }, layout))
    }

    /// Lets the vectors follow the MSI-X control register.
    pub(crate) fn follow_msix_control(&mut self) {
        if let (Some(msix), Some(control)) = (&mut self.msix, self.config.msix_control()) {
            msix.set_control(control);
        }
    }

    pub(crate) fn reset(&mut self) {
        self.config.reset();
        if let Some(msix) = &mut self.msix {
            msix.reset();
        }
    }

    pub(crate) fn save(&self) -> FrontState {
        FrontState {
            version: STATE_VERSION,
            config: self.config.save(),
            msix: self.msix.as_ref().map(Msix::save),
        }
    }

    pub(crate) fn restore(&mut self, state: &FrontState) -> Result<(), String> {
        if state.version != STATE_VERSION {
            return Err(format!(
                "its PCI front has version {}, this build reads {STATE_VERSION}",
                state.version
            ));
        }
        self.config
            .restore(&state.config)
            .map_err(|error| error.to_string())?;
        match (&mut self.msix, &state.msix) {
            (Some(msix), Some(saved)) => msix.restore(saved).map_err(|error| error.to_string()),
            (None, None) => Ok(()),
            _ => Err("one of the devices has MSI-X and the other has not".to_owned()),
        }
    }
}

/// Adds the BARs by the device's registers and region sizes.
fn add_bars(
    config: &mut ConfigSpace,
    image: &[u8],
    backend: &dyn Backend,
) -> Result<(), FrontError> {
    let mut index = 0_u8;
    while index < 6 {
        let at = usize::from(offset::BAR0) + usize::from(index) * 4;
        // The type bits of a BAR all are in its lowest byte.
        let low = image.get(at).copied().unwrap_or(0);
        let size = backend.region(u32::from(index))?.size;
        let kind = match low {
            low if low & 1 != 0 => BarKind::Io,
            low if low & 0b110 == 0b100 => BarKind::Memory64 {
                prefetchable: low & 0b1000 != 0,
            },
            _ => BarKind::Memory32,
        };
        if size != 0 {
            config.add_bar(index, kind, size)?;
        }
        index += match kind {
            BarKind::Memory64 { .. } if size != 0 => 2,
            _ => 1,
        };
    }
    Ok(())
}

fn msix_layout(config: &ConfigSpace, at: u16) -> Result<MsixLayout, FrontError> {
    let vectors = (config.u16(at.saturating_add(2)) & 0x7ff) + 1;
    let place = |register: u16, len: u64| -> Result<Place, FrontError> {
        let value = config.u32(at.saturating_add(register));
        let bar = u8::try_from(value & 7).map_err(|_| FrontError::MsixPlace)?;
        let offset = u64::from(value & !7);
        let size = config.bar(bar).ok_or(FrontError::MsixPlace)?.size;
        if offset + len > size {
            return Err(FrontError::MsixPlace);
        }
        Ok(Place { bar, offset, len })
    };
    Ok(MsixLayout {
        capability: at,
        vectors,
        table: place(4, Msix::table_bytes(vectors))?,
        pending: place(8, Msix::pending_bytes(vectors))?,
    })
}
