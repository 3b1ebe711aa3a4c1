//! Interrupts of devices over the hypervisor: MSI-X vectors and ISA lines, each an eventfd bound
//! to a global interrupt number (GSI) in the kernel.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use devices::interrupt::{InterruptError, IrqLine, MsiFabric, MsiLine, MsiMessage};
use hypervisor::{Error as HypervisorError, MsiRoute, Vm};
use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::os::fd::{AsRawFd, BorrowedFd};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::layout;

/// `KVM_MAX_IRQ_ROUTES` (linux/kvm_host.h): interrupt numbers are below it.
const MAX_GSI: u32 = 4096;

fn backend(operation: &'static str) -> impl FnOnce(HypervisorError) -> InterruptError {
    move |error| InterruptError::Backend {
        operation,
        cause: io::Error::other(error),
    }
}

/// The interrupt routing table and the numbers that are taken.
pub struct InterruptManager {
    vm: Arc<dyn Vm>,
    table: Mutex<Table>,
}

struct Table {
    /// Routed vectors.
    messages: BTreeMap<u32, MsiMessage>,
    next_gsi: u32,
}

impl InterruptManager {
    /// The manager of `vm`'s interrupts, with the legacy pins routed.
    ///
    /// # Errors
    /// When the hypervisor refuses the routes.
    pub fn new(vm: Arc<dyn Vm>) -> Result<Arc<Self>, InterruptError> {
        let manager = Arc::new(Self {
            vm,
            table: Mutex::new(Table {
                messages: BTreeMap::new(),
                next_gsi: layout::FIRST_MSI_GSI,
            }),
        });
        manager.commit(&manager.table.lock())?;
        Ok(manager)
    }

    /// An edge-triggered ISA line on pin `irq`.
    ///
    /// # Errors
    /// When there is no eventfd, or the hypervisor refuses.
    pub fn isa_line(&self, irq: u32) -> Result<Arc<dyn IrqLine>, InterruptError> {
        let event = new_event()?;
        self.vm
            .register_irqfd(&event, irq)
            .map_err(backend("binding an ISA line"))?;
        Ok(Arc::new(IsaLine { event }))
    }

    fn commit(&self, table: &Table) -> Result<(), InterruptError> {
        let routes: Vec<MsiRoute> = table
            .messages
            .iter()
            .map(|(&gsi, message)| MsiRoute {
                gsi,
                address: message.address,
                data: message.data,
            })
            .collect();
        self.vm.set_msi_routes(&routes).map_err(backend("routing"))
    }

    /// Sets or removes the message of `gsi`. `bind` runs between the new route and the unlock, so
    /// that the eventfd's binding and its route change as one.
    fn set_message(
        &self,
        gsi: u32,
        message: Option<MsiMessage>,
        bind: impl FnOnce(&dyn Vm) -> Result<(), HypervisorError>,
    ) -> Result<(), InterruptError> {
        let mut table = self.table.lock();
        match message {
            Some(message) => {
                table.messages.insert(gsi, message);
                self.commit(&table)?;
                bind(&*self.vm).map_err(backend("binding a vector"))
            }
            None => {
                bind(&*self.vm).map_err(backend("masking a vector"))?;
                table.messages.remove(&gsi);
                self.commit(&table)
            }
        }
    }
}

/// The manager as the source of MSI-X vectors.
pub struct Fabric(pub Arc<InterruptManager>);

impl MsiFabric for Fabric {
    fn allocate(&self, count: u16) -> Result<Vec<Arc<dyn MsiLine>>, InterruptError> {
        let mut table = self.0.table.lock();
        let first = table.next_gsi;
        let free = MAX_GSI.saturating_sub(first);
        if u32::from(count) > free {
            let free = u16::try_from(free).unwrap_or(u16::MAX);
            return Err(InterruptError::Exhausted {
                wanted: count,
                free,
            });
        }
        let mut lines: Vec<Arc<dyn MsiLine>> = Vec::with_capacity(usize::from(count));
        for gsi in first..first + u32::from(count) {
            lines.push(Arc::new(Vector {
                manager: Arc::clone(&self.0),
                gsi,
                event: new_event()?,
                route: Mutex::new(None),
            }));
        }
        table.next_gsi = first + u32::from(count);
        Ok(lines)
    }
}

/// One vector: its eventfd is bound in the kernel while it has a route; while it has none the
/// eventfd's count is the pending bit, which the kernel delivers when it is bound again.
struct Vector {
    manager: Arc<InterruptManager>,
    gsi: u32,
    event: EventFd,
    route: Mutex<Option<MsiMessage>>,
}

impl MsiLine for Vector {
    fn trigger(&self) -> Result<(), InterruptError> {
        signal(&self.event)
    }

    fn eventfd(&self) -> &EventFd {
        &self.event
    }

    fn route(&self, message: Option<MsiMessage>) -> Result<(), InterruptError> {
        let mut route = self.route.lock();
        if *route == message {
            return Ok(());
        }
        let was_bound = route.is_some();
        self.manager
            .set_message(self.gsi, message, |vm| match (was_bound, message) {
                (false, Some(_)) => vm.register_irqfd(&self.event, self.gsi),
                (true, None) => vm.unregister_irqfd(&self.event, self.gsi),
                (true, Some(_)) | (false, None) => Ok(()),
            })?;
        *route = message;
        Ok(())
    }

    fn is_pending(&self) -> bool {
        // SAFETY: the eventfd lives as long as the borrow.
        let fd = unsafe { BorrowedFd::borrow_raw(self.event.as_raw_fd()) };
        let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        self.route.lock().is_none() && matches!(poll(&mut fds, Some(&now)), Ok(1))
    }
}

struct IsaLine {
    event: EventFd,
}

impl IrqLine for IsaLine {
    fn trigger(&self) -> Result<(), InterruptError> {
        signal(&self.event)
    }
}

fn new_event() -> Result<EventFd, InterruptError> {
    EventFd::new(EFD_NONBLOCK).map_err(|cause| InterruptError::Backend {
        operation: "making an eventfd",
        cause,
    })
}

fn signal(event: &EventFd) -> Result<(), InterruptError> {
    match event.write(1) {
        // The count is at its end: it is pending already.
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
        Err(cause) => Err(InterruptError::Backend {
            operation: "signalling",
            cause,
        }),
        Ok(()) => Ok(()),
    }
}
