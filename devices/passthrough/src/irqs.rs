//! Interrupts of the device, switched on and off as the guest does.
//!
//! A real device may hold vectors of the host while they are on, and its pin is silent meanwhile, so
//! they are on only while the guest wants them.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use devices::MsiLine;
use parking_lot::Mutex;

use crate::backend::{Backend, BackendError, IrqKind};

/// Interrupts that are on: of a kind, and how many.
pub(crate) type Wanted = Option<(IrqKind, u16)>;

/// What interrupts of the device are on, and what they signal.
pub(crate) struct Irqs {
    vectors: Vec<Arc<dyn MsiLine>>,
    on: Mutex<Wanted>,
}

impl Irqs {
    /// None are on. The first so many of `vectors` are signalled when there are.
    pub(crate) fn new(vectors: Vec<Arc<dyn MsiLine>>) -> Self {
        Self {
            vectors,
            on: Mutex::new(None),
        }
    }

    /// Has the device interrupt in the way that is wanted, and no other.
    ///
    /// # Errors
    /// The device's; none are on then, or those before.
    pub(crate) fn follow(&self, backend: &dyn Backend, wanted: Wanted) -> Result<(), BackendError> {
        let mut on = self.on.lock();
        if *on == wanted {
            return Ok(());
        }
        if let Some((kind, _)) = *on {
            backend.disable_irqs(kind)?;
            *on = None;
        }
        if let Some((kind, count)) = wanted {
            let eventfds: Vec<BorrowedFd<'_>> = self
                .vectors
                .iter()
                .take(usize::from(count))
                .map(|line| crate::fd::borrow(line.eventfd()))
                .collect();
            backend.enable_irqs(kind, &eventfds)?;
            *on = wanted;
        }
        Ok(())
    }
}
