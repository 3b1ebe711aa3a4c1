//! What of the function the VMM itself answers: header, BAR addresses, MSI-X.
//!
//! The guest must not move the real device's BARs or see its interrupt routing, so these are
//! emulated; everything else in configuration space is read from and written to the device.

use devices::{InterruptError, MsiFabric};
use pci::config::{CONFIG_SPACE_SIZE, offset};
use pci::{
    BarError, BarKind, Capability, ConfigError, ConfigSpace, ConfigState, Msi, MsiRegisters, Msix,
    MsixError, MsixState,
};
use serde::{Deserialize, Serialize};
use vfio_user::wire::PCI_CONFIG_REGION;

use crate::backend::{Backend, BackendError, IrqKind};
use crate::irqs::{Irqs, Wanted};

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
    /// Vectors of MSI with a trigger that waits.
    msi: Vec<u16>,
}

const STATE_VERSION: u16 = 2;

/// The emulated parts that change.
pub(crate) struct Front {
    pub(crate) config: ConfigSpace,
    pub(crate) msix: Option<Msix>,
    /// Only of a device without MSI-X.
    pub(crate) msi: Option<Msi>,
}

/// Where the capability of MSI is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MsiLayout {
    /// Offset of the capability.
    pub(crate) capability: u16,
    /// Bytes of it.
    pub(crate) len: u16,
    /// How many vectors there are.
    pub(crate) vectors: u16,
}

/// The parts that do not.
pub(crate) struct Layout {
    pub(crate) msix: Option<MsixLayout>,
    pub(crate) msi: Option<MsiLayout>,
    pub(crate) emulated: Emulated,
}

impl Front {
    /// Reads the device's configuration space and sets up what the guest is to see, with vectors of
    /// `fabric` for the device's interrupts.
    pub(crate) fn new(
        backend: &dyn Backend,
        fabric: &dyn MsiFabric,
    ) -> Result<(Self, Layout, Irqs), FrontError> {
        let size = backend.region(PCI_CONFIG_REGION)?.size;
        let len = usize::try_from(size).map_or(CONFIG_SPACE_SIZE, |n| n.min(CONFIG_SPACE_SIZE));
        let mut image = vec![0; len];
        backend.region_read(PCI_CONFIG_REGION, 0, &mut image)?;
        let mut config = ConfigSpace::from_image(&image)?;
        add_bars(&mut config, &image, backend)?;
        let mut emulated = Emulated(Box::new([false; CONFIG_SPACE_SIZE]));
        emulated.mark(0, usize::from(offset::HEADER_END));
        // One way to interrupt by messages is enough, and MSI-X is the better one.
        let has_msix = config.find_capability(Capability::MSIX).is_some();
        for (at, id) in config.capabilities() {
            if id == Capability::MSI && has_msix {
                config.hide_capability(at);
            }
            emulated.mark(at, 2);
        }
        hide_extended(&mut config, &mut emulated)?;
        forget_volatile(&mut config, &emulated)?;
        let (msix, msix_layout, mut lines) = match config.find_capability(Capability::MSIX) {
            Some(at) => {
                let layout = msix_layout(&config, at)?;
                emulated.mark(at, 12);
                let vectors = (config.u16(at.saturating_add(2)) & 0x7ff) + 1;
                let lines = fabric.allocate(vectors)?;
                (Some(Msix::new(lines.clone())?), Some(layout), lines)
            }
            None => (None, None, Vec::new()),
        };
        let (mut msi, mut msi_layout) = (None, None);
        if let Some(at) = config.find_capability(Capability::MSI) {
            let registers = MsiRegisters::new(&config, at);
            emulated.mark(at, registers.len().into());
            lines = fabric.allocate(registers.vectors())?;
            msi = Some(Msi::new(registers, lines.clone(), &mut config)?);
            msi_layout = Some(MsiLayout {
                capability: at,
                len: registers.len(),
                vectors: registers.vectors(),
            });
        }
        let layout = Layout {
            msix: msix_layout,
            msi: msi_layout,
            emulated,
        };
        let front = Self { config, msix, msi };
        Ok((front, layout, Irqs::new(lines)))
    }

    /// How the guest wants the device to interrupt.
    pub(crate) fn wanted_irqs(&self) -> Wanted {
        let msix = self.msix.as_ref().filter(|msix| msix.is_enabled());
        let msi = self.msi.as_ref();
        let msi = msi.and_then(|msi| Some((IrqKind::Msi, msi.enabled(&self.config)?)));
        msix.map(|msix| (IrqKind::Msix, msix.vectors())).or(msi)
    }

    /// Lets the vectors follow the registers of MSI and MSI-X.
    pub(crate) fn follow_registers(&mut self) {
        if let (Some(msix), Some(control)) = (&mut self.msix, self.config.msix_control()) {
            msix.set_control(control);
        }
        if let Some(msi) = &self.msi {
            msi.follow(&self.config);
        }
    }

    /// Reads what is the VMM's of configuration space.
    pub(crate) fn read_config(&mut self, at: u16, data: &mut [u8]) {
        if let Some(msi) = &self.msi
            && let Err(error) = msi.show_pending(&mut self.config)
        {
            // Its place was checked when it was made.
            tracing::debug!(%error, "pending bits of MSI are not shown");
        }
        self.config.read(at, data);
    }

    pub(crate) fn reset(&mut self) {
        self.config.reset();
        if let Some(msix) = &mut self.msix {
            msix.reset();
        }
        if let Some(msi) = &self.msi {
            msi.follow(&self.config);
        }
    }

    pub(crate) fn save(&mut self) -> FrontState {
        let mut pending = Vec::new();
        if let Some(msi) = &self.msi {
            pending = msi.pending();
            if let Err(error) = msi.hide_pending(&mut self.config) {
                tracing::debug!(%error, "pending bits of MSI are not hidden");
            }
        }
        FrontState {
            version: STATE_VERSION,
            config: self.config.save(),
            msix: self.msix.as_ref().map(Msix::save),
            msi: pending,
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
        if let Some(msi) = &self.msi {
            msi.follow(&self.config);
            msi.restore_pending(&state.msi)
                .map_err(|error| error.to_string())?;
        }
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
            low if low & 0b110 == 0b100 => BarKind::Memory64 {
                prefetchable: low & 0b1000 != 0,
            },
            _ => BarKind::Memory32,
        };
        let is_io = low & 1 != 0;
        if is_io && size != 0 {
            // The root has no ports to give, and an Express device must do without (PCI Express
            // 5.0, 7.5.1.2.1).
            tracing::info!(bar = index, "a BAR of I/O ports is not shown to the guest");
        }
        if size != 0 && !is_io {
            config.add_bar(index, kind, size)?;
        }
        index += match kind {
            BarKind::Memory64 { .. } if size != 0 && !is_io => 2,
            _ => 1,
        };
    }
    Ok(())
}

/// Where extended capabilities start (PCI Express 5.0, 7.6).
const EXTENDED: u16 = 0x100;
/// Those that would let a guest make functions or move BARs behind the VMM's back, or that say
/// something of a bus which is not the guest's (PCI Code and ID Assignment, section 3): alternative
/// routing, SR-IOV, resizable BARs.
const HIDDEN: [u16; 3] = [0x0e, 0x10, 0x15];

/// Takes what the guest must not see out of the list of extended capabilities.
fn hide_extended(config: &mut ConfigSpace, emulated: &mut Emulated) -> Result<(), FrontError> {
    let end = u16::try_from(CONFIG_SPACE_SIZE).unwrap_or(u16::MAX);
    // The last one that stays.
    let mut before = None;
    let mut at = EXTENDED;
    // Each has four bytes at least and lies behind the one before it, so the walk ends.
    while at >= EXTENDED && at <= end - 4 {
        let header = config.u32(at);
        if header == 0 || header == u32::MAX {
            break;
        }
        let [id, version_next] = [header & 0xffff, header >> 16];
        let next = u16::try_from(version_next >> 4).unwrap_or(0);
        if HIDDEN.iter().any(|hidden| u32::from(*hidden) == id) {
            let (place, id_version) = match before {
                Some(before) => (before, config.u32(before) & 0xf_ffff),
                // The head of the list stays where it is, as an empty one.
                None => (at, 0),
            };
            let header = id_version | u32::from(next) << 20;
            config.set_bytes(place, &header.to_le_bytes())?;
            emulated.mark(place, 4);
            before = before.or(Some(at));
        } else {
            before = Some(at);
        }
        if next <= at {
            break;
        }
        at = next;
    }
    Ok(())
}

/// Bytes of capabilities that change by themselves or with what is around the device: control and
/// status of power management (PCI Power Management 1.2, 3.2), address and data of vital product
/// data (PCI Local Bus 3.0, appendix I), control and status of device, link and slot (PCI Express
/// 5.0, 7.5.3).
const VOLATILE: [(Capability, &[(u16, u16)]); 3] = [
    (Capability::POWER_MANAGEMENT, &[(4, 4)]),
    (Capability(0x03), &[(2, 6)]),
    (
        Capability::EXPRESS,
        &[(8, 4), (16, 4), (24, 4), (40, 4), (48, 4), (56, 4)],
    ),
];

/// Clears here what is the device's to tell and need not be the same in two equal devices, as this
/// image is compared with the one at the other end of a migration.
fn forget_volatile(config: &mut ConfigSpace, emulated: &Emulated) -> Result<(), FrontError> {
    for (at, id) in config.capabilities() {
        let known = VOLATILE.iter().find(|(known, _)| *known == id);
        for &(offset, len) in known.map(|(_, fields)| *fields).unwrap_or_default() {
            let at = at.saturating_add(offset);
            // A capability that is shorter than that ends where the next one starts.
            let own = (at..at.saturating_add(len)).take_while(|at| !emulated.has((*at).into()));
            for at in own {
                config.set_bytes(at, &[0])?;
            }
        }
    }
    // Serial numbers and error logs are among the extended capabilities.
    let end = u16::try_from(CONFIG_SPACE_SIZE).unwrap_or(u16::MAX);
    for at in (EXTENDED..end).filter(|at| !emulated.has((*at).into())) {
        config.set_bytes(at, &[0])?;
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
