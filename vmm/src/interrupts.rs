//! Interrupts of devices over the hypervisor: MSI-X vectors and ISA lines, each an eventfd bound
//! to a global interrupt number (GSI) in the kernel.

use std::collections::{BTreeMap, BTreeSet};
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
    /// Numbers of vectors that exist, routed or not.
    taken: BTreeSet<u32>,
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
                taken: BTreeSet::new(),
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
        let wanted = usize::from(count);
        let numbers: Vec<u32> = {
            let mut table = self.0.table.lock();
            let all = layout::FIRST_MSI_GSI..MAX_GSI;
            let free = all.filter(|gsi| !table.taken.contains(gsi));
            let numbers: Vec<u32> = free.take(wanted).collect();
            if numbers.len() < wanted {
                let free = u16::try_from(numbers.len()).unwrap_or(u16::MAX);
                return Err(InterruptError::Exhausted {
                    wanted: count,
                    free,
                });
            }
            table.taken.extend(&numbers);
            numbers
        };
        // Before anything can fail, so that they are given back then. Not under the table's lock.
        let numbers: Vec<_> = numbers.into_iter().map(|gsi| self.number(gsi)).collect();
        let vector = |number| -> Result<Arc<dyn MsiLine>, InterruptError> {
            Ok(Arc::new(Vector {
                event: new_event()?,
                route: Mutex::new(None),
                number,
            }))
        };
        numbers.into_iter().map(vector).collect()
    }
}

impl Fabric {
    fn number(&self, gsi: u32) -> TakenNumber {
        TakenNumber {
            manager: Arc::clone(&self.0),
            gsi,
        }
    }
}

/// One vector: its eventfd is bound in the kernel while it has a route; while it has none the
/// eventfd's count is the pending bit, which the kernel delivers when it is bound again.
struct Vector {
    event: EventFd,
    route: Mutex<Option<MsiMessage>>,
    /// Given back when nothing is bound to it any more.
    number: TakenNumber,
}

impl Drop for Vector {
    fn drop(&mut self) {
        if let Err(error) = self.route(None) {
            tracing::error!(%error, gsi = self.number.gsi, "a vector stays bound");
        }
    }
}

/// An interrupt number, which is given back when this is dropped.
struct TakenNumber {
    manager: Arc<InterruptManager>,
    gsi: u32,
}

impl Drop for TakenNumber {
    fn drop(&mut self) {
        self.manager.table.lock().taken.remove(&self.gsi);
    }
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
        let TakenNumber { manager, gsi } = &self.number;
        manager.set_message(*gsi, message, |vm| match (was_bound, message) {
            (false, Some(_)) => vm.register_irqfd(&self.event, *gsi),
            (true, None) => vm.unregister_irqfd(&self.event, *gsi),
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use hypervisor::{Hypervisor, KvmHypervisor, VmOptions};

    use super::*;

    #[test]
    fn numbers_of_vectors_that_are_gone_are_given_again() {
        if !Path::new("/dev/kvm").exists() {
            println!("SKIP: numbers_of_vectors_that_are_gone: there is no /dev/kvm");
            return;
        }
        let kvm = KvmHypervisor::open().unwrap();
        let vm = kvm.create_vm(&VmOptions::default()).unwrap();
        let manager = InterruptManager::new(vm).unwrap();
        let fabric = Fabric(Arc::clone(&manager));
        let message = MsiMessage {
            address: 0xfee0_0000,
            data: 0x31,
        };
        let stays = fabric.allocate(3).unwrap();
        for line in &stays {
            line.route(Some(message)).unwrap();
        }
        // More devices come and go than there are numbers.
        for _ in 0..100 {
            let lines = fabric.allocate(1000).unwrap();
            lines[0].route(Some(message)).unwrap();
            lines[999].route(Some(message)).unwrap();
            assert_eq!(manager.table.lock().messages.len(), 5);
        }
        let table = manager.table.lock();
        let numbers: Vec<u32> = table.taken.iter().copied().collect();
        assert_eq!(numbers, [24, 25, 26]);
        assert_eq!(table.messages.len(), 3, "routes of those that stay");
        drop(table);
        let refused = fabric.allocate(4096);
        assert!(matches!(
            refused.map(|_| ()),
            Err(InterruptError::Exhausted { free: 4069, .. })
        ));
    }
}
