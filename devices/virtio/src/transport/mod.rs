//! virtio over PCI, modern only (virtio 1.2, section 4.1).
//!
//! [`VirtioPciDevice`] puts any [`VirtioDevice`] behind a PCI function with one 64-bit BAR of
//! 32 KiB, each part on a page of its own:
//!
//! | Offset | Part |
//! |---|---|
//! | 0x0000 | common configuration |
//! | 0x1000 | interrupt status |
//! | 0x2000 | device configuration |
//! | 0x3000 | doorbells, 4 bytes per queue |
//! | 0x4000 | MSI-X table |
//! | 0x5000 | MSI-X pending bits |
//!
//! It knows neither KVM nor the VMM: memory, interrupt vectors and threads come from outside, so
//! the same device serves in a VMM and behind a vfio-user server.
//!
//! # Interrupts
//! One MSI-X vector per queue and one for configuration changes. The function has no interrupt
//! pin: a driver that does not enable MSI-X finds the ISR bits set and has to poll.
//!
//! # Pause and migration
//! [`pause`](vm_migration::state::Pause::pause) stops the device's threads; from then on guest memory is still.
//! [`resume`](vm_migration::state::Pause::resume) starts them again, kicks every queue and signals every queue's interrupt
//! once, so that nothing that was under way when the device paused (a kick not yet taken, an
//! interrupt raised by the other host) is lost. Drivers take spurious ones as nothing.

mod common;
mod interrupt;
mod layout;
mod state;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;

use devices::{InterruptError, MsiFabric, ThreadSpawner};
use pci::{BarInfo, ConfigSpace, Doorbell, Msix, MsixError, PciDevice};
use vm_memory::GuestAddressSpace;
use vm_migration::ErrorChain;
use vm_migration::memory::MemoryHandle;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::device::{Activation, ActiveQueue, DeviceError, DeviceInterrupt, VirtioDevice};
use crate::queue::Queue;

use common::{Effect, Phase, Registers};
use interrupt::Interrupts;
pub use layout::LayoutError;
use layout::{BAR, MAX_QUEUES, NOTIFY, NOTIFY_STEP, Place, Window};

/// Why a virtio PCI function could not be made.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// A device has 1 to 255 queues.
    #[error("{device}: {queues} queues; a virtio PCI function here has 1 to {MAX_QUEUES}")]
    Queues {
        /// Which device.
        device: String,
        /// How many it has.
        queues: usize,
    },
    /// The PCI function could not be laid out.
    #[error("{device}: PCI function")]
    Layout {
        /// Which device.
        device: String,
        /// Why.
        #[source]
        cause: LayoutError,
    },
    /// There are no interrupt vectors for it.
    #[error("{device}: MSI-X vectors")]
    Vectors {
        /// Which device.
        device: String,
        /// Why.
        #[source]
        cause: InterruptError,
    },
    /// The vector table could not be made.
    #[error("{device}: MSI-X table")]
    Msix {
        /// Which device.
        device: String,
        /// Why.
        #[source]
        cause: MsixError,
    },
    /// A doorbell eventfd could not be made.
    #[error("{device}: doorbell eventfd; is the limit of open files too low?")]
    Doorbell {
        /// Which device.
        device: String,
        /// Why.
        #[source]
        cause: io::Error,
    },
}

/// What a [`VirtioPciDevice`] is made of.
pub struct VirtioPciParts {
    /// The device proper.
    pub device: Box<dyn VirtioDevice>,
    /// Guest memory.
    pub memory: MemoryHandle,
    /// Where its interrupt vectors come from.
    pub fabric: Arc<dyn MsiFabric>,
    /// Where its threads come from.
    pub spawner: ThreadSpawner,
}

/// Whether the device's threads run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Run {
    /// The driver is not ready, or has been given up on.
    Idle,
    /// Serving the driver.
    Serving,
    /// Paused by the VMM; whether to serve on resume follows from the registers.
    Paused,
}

/// A virtio device as a PCI function.
pub struct VirtioPciDevice {
    id: String,
    device: Box<dyn VirtioDevice>,
    memory: MemoryHandle,
    spawner: ThreadSpawner,
    config: ConfigSpace,
    window: Window,
    msix: Msix,
    registers: Registers,
    interrupts: Arc<Interrupts>,
    kicks: Vec<EventFd>,
    run: Run,
}

impl VirtioPciDevice {
    /// A function with a freshly reset device.
    ///
    /// # Errors
    /// See [`TransportError`].
    pub fn new(parts: VirtioPciParts) -> Result<Self, TransportError> {
        let VirtioPciParts {
            device,
            memory,
            fabric,
            spawner,
        } = parts;
        let id = device.id().to_owned();
        let sizes = device.queue_sizes();
        let queues = match u16::try_from(sizes.len()) {
            Ok(n) if (1..=MAX_QUEUES).contains(&usize::from(n)) => n,
            _ => {
                let queues = sizes.len();
                return Err(TransportError::Queues { device: id, queues });
            }
        };
        let vectors = queues + 1;
        let (config, window) =
            layout::config_space(device.device_type(), device.config_len(), queues, vectors)
                .map_err(|cause| TransportError::Layout {
                    device: id.clone(),
                    cause,
                })?;
        let lines = fabric
            .allocate(vectors)
            .map_err(|cause| TransportError::Vectors {
                device: id.clone(),
                cause,
            })?;
        let msix = Msix::new(lines.clone()).map_err(|cause| TransportError::Msix {
            device: id.clone(),
            cause,
        })?;
        let kicks = (0..queues)
            .map(|_| EventFd::new(EFD_NONBLOCK))
            .collect::<io::Result<Vec<_>>>()
            .map_err(|cause| TransportError::Doorbell {
                device: id.clone(),
                cause,
            })?;
        Ok(Self {
            registers: Registers::new(sizes),
            interrupts: Arc::new(Interrupts::new(id.clone(), lines, kicks.len())),
            id,
            device,
            memory,
            spawner,
            config,
            window,
            msix,
            kicks,
            run: Run::Idle,
        })
    }

    /// Resets the function as a PCI function-level reset does: the virtio device, the MSI-X
    /// table and every writable register, BAR addresses included.
    pub fn reset(&mut self) {
        self.reset_virtio();
        self.msix.reset();
        self.config.reset();
        self.follow_msix_control();
    }

    /// The features offered to the driver, whether or not it took them. A migration's destination
    /// must offer the same.
    pub fn offered_features(&self) -> u64 {
        self.device.features()
    }

    /// Whether the device has stopped because its driver broke the protocol or the host failed
    /// it, and waits for a reset.
    pub fn is_broken(&self) -> bool {
        self.interrupts.is_broken()
    }

    fn reset_virtio(&mut self) {
        self.device.reset();
        if self.run == Run::Serving {
            self.run = Run::Idle;
        }
        self.registers = Registers::new(self.device.queue_sizes());
        self.interrupts.reset();
        for kick in &self.kicks {
            // Drops a kick meant for the old driver; an empty eventfd says so, which is fine.
            let _ = kick.read();
        }
    }

    /// Whether the driver is to be served as far as the registers tell.
    fn wants_service(&self) -> bool {
        self.registers.phase == Phase::Live && !self.interrupts.is_broken()
    }

    /// Starts serving if the driver is ready.
    fn start(&mut self) {
        if self.run != Run::Idle || !self.wants_service() {
            return;
        }
        match self.activate() {
            Ok(()) => self.run = Run::Serving,
            Err(error) => {
                // The queues are lost; whatever started must not go on with part of them.
                self.device.reset();
                self.interrupts.needs_reset(&ErrorChain(&error));
            }
        }
    }

    fn activate(&mut self) -> Result<(), DeviceError> {
        let memory = self.memory.memory();
        let mut queues = Vec::new();
        for (index, setup, position) in self.registers.enabled_queues() {
            let device = || self.id.clone();
            let queue =
                Queue::new(index, setup, position, &memory).map_err(|cause| DeviceError::Ring {
                    device: device(),
                    index,
                    cause,
                })?;
            let Some(kick) = self.kicks.get(usize::from(index)) else {
                continue;
            };
            let kick = kick.try_clone().map_err(|cause| DeviceError::Host {
                device: device(),
                operation: "duplicating a doorbell eventfd",
                cause,
            })?;
            queues.push(ActiveQueue { queue, kick });
        }
        self.device.activate(Activation {
            memory: self.memory.clone(),
            queues,
            interrupt: Arc::clone(&self.interrupts) as Arc<dyn DeviceInterrupt>,
            features: self.registers.driver_features,
            spawner: self.spawner.clone(),
        })
    }

    /// Stops serving and notes how far the queues have come.
    fn stop(&mut self) -> Result<(), DeviceError> {
        if self.run != Run::Serving {
            return Ok(());
        }
        self.run = Run::Idle;
        let queues = match self.device.deactivate() {
            Ok(queues) => queues,
            Err(error) => {
                self.interrupts.needs_reset(&error);
                return Err(error);
            }
        };
        for queue in queues {
            if let Some(registers) = self.registers.queues.get_mut(usize::from(queue.index())) {
                registers.position = queue.position();
            }
        }
        Ok(())
    }

    /// Wakes both sides of every queue, in case a wake-up was on its way when the device paused.
    fn wake_all(&self) {
        for (index, _, _) in self.registers.enabled_queues() {
            self.kick(index);
            self.interrupts.queue_used(index);
        }
    }

    fn kick(&self, index: u16) {
        let Some(kick) = self.kicks.get(usize::from(index)) else {
            return;
        };
        // The one error is a full counter: then it is readable anyway.
        let _ = kick.write(1);
    }

    fn follow_msix_control(&mut self) {
        if let Some(control) = self.config.msix_control() {
            self.msix.set_control(control);
            self.interrupts.set_msix_enabled(self.msix.is_enabled());
            self.follow_vectors();
        }
    }

    /// Starts a device anew that signals vectors which the driver has changed.
    fn follow_vectors(&mut self) {
        if !self.interrupts.take_stale() || self.run != Run::Serving {
            return;
        }
        if let Err(error) = self.stop() {
            tracing::error!(device = self.id, %error, "device did not stop cleanly");
        }
        self.start();
        self.wake_all();
    }

    fn apply(&mut self, effect: Effect) {
        match effect {
            Effect::None => {}
            Effect::Reset => self.reset_virtio(),
            Effect::Start => self.start(),
            Effect::Stop => {
                if let Err(error) = self.stop() {
                    tracing::error!(device = self.id, %error, "device did not stop cleanly");
                }
            }
        }
    }
}

impl PciDevice for VirtioPciDevice {
    fn id(&self) -> &str {
        &self.id
    }

    fn read_config(&mut self, offset: u16, data: &mut [u8]) {
        if self.window.covers(offset, data.len())
            && let Some((target, size)) = self.window.target(&self.config)
        {
            let mut value = [0; 4];
            if let Some(value) = value.get_mut(..size) {
                self.read_bar(BAR, target, value);
            }
            if let Err(error) = self.config.set_bytes(self.window.data(), &value) {
                tracing::error!(device = self.id, %error, "configuration window");
            }
        }
        self.config.read(offset, data);
    }

    fn write_config(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
        if self.window.covers(offset, data.len())
            && let Some((target, size)) = self.window.target(&self.config)
        {
            let mut value = [0; 4];
            self.config.read(self.window.data(), &mut value);
            self.write_bar(BAR, target, value.get(..size).unwrap_or_default());
        }
        self.follow_msix_control();
    }

    fn bars(&self) -> Vec<BarInfo> {
        self.config.bars()
    }

    fn set_bar_address(&mut self, index: u8, address: u64) {
        self.config.set_bar_address(index, address);
    }

    fn memory_enabled(&self) -> bool {
        self.config.memory_enabled()
    }

    fn read_bar(&mut self, bar: u8, offset: u64, data: &mut [u8]) {
        if bar != BAR {
            data.fill(0xff);
            return;
        }
        match Place::at(offset) {
            Place::Common(at) => {
                self.registers
                    .read(self.device.as_ref(), &self.interrupts, at, data);
            }
            Place::Isr(at) => {
                data.fill(0);
                if let (0, Some(first)) = (at, data.first_mut()) {
                    *first = self.interrupts.take_isr();
                }
            }
            Place::Device(at) => {
                let at = u16::try_from(at).unwrap_or(u16::MAX);
                self.device.read_config(at, data);
            }
            Place::MsixTable(at) => self.msix.read_table(at, data),
            Place::MsixPending(at) => self.msix.read_pending(at, data),
            // Doorbells are for writing.
            Place::Notify(_) | Place::Nothing => data.fill(0),
        }
    }

    fn write_bar(&mut self, bar: u8, offset: u64, data: &[u8]) {
        if bar != BAR {
            return;
        }
        match Place::at(offset) {
            Place::Common(at) => {
                let effect = self
                    .registers
                    .write(self.device.as_ref(), &self.interrupts, at, data);
                self.apply(effect);
                self.follow_vectors();
            }
            Place::Device(at) => {
                let at = u16::try_from(at).unwrap_or(u16::MAX);
                self.device.write_config(at, data);
            }
            Place::Notify(at) => {
                // The address tells the queue, whatever the value says (section 4.1.5.2).
                if let Ok(index) = u16::try_from(at / u64::from(NOTIFY_STEP)) {
                    self.kick(index);
                }
            }
            Place::MsixTable(at) => self.msix.write_table(at, data),
            Place::Isr(_) | Place::MsixPending(_) | Place::Nothing => {}
        }
    }

    fn doorbells(&self) -> Vec<Doorbell> {
        let mut doorbells = Vec::with_capacity(self.kicks.len());
        for (index, kick) in (0_u64..).zip(&self.kicks) {
            match kick.try_clone() {
                Ok(eventfd) => doorbells.push(Doorbell {
                    bar: BAR,
                    offset: u64::from(NOTIFY) + index * u64::from(NOTIFY_STEP),
                    size: 0,
                    datamatch: None,
                    eventfd,
                }),
                // Not bound in the kernel, the doorbell still works through `write_bar`.
                Err(error) => {
                    tracing::warn!(device = self.id, index, %error, "doorbell stays in user space");
                }
            }
        }
        doorbells
    }
}
