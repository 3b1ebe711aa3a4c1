//! Interrupt lines as devices see them: pin-based lines and message-signalled vectors.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

/// An MSI address and data pair as a guest wrote it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
pub struct MsiMessage {
    /// Message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
}

/// Why an interrupt could not be set up or sent.
#[derive(Debug, thiserror::Error)]
pub enum InterruptError {
    /// No more interrupt numbers.
    #[error("no interrupt vectors left: {wanted} asked for, {free} free")]
    Exhausted {
        /// How many were asked for.
        wanted: u16,
        /// How many are left.
        free: u16,
    },
    /// The interrupt controller refused.
    #[error("interrupt {operation} failed")]
    Backend {
        /// What was tried.
        operation: &'static str,
        /// Why it failed.
        #[source]
        cause: std::io::Error,
    },
}

/// One MSI-X vector of a device.
///
/// A trigger while the vector is masked (no route) stays pending and is delivered when it gets a
/// route: an eventfd that keeps its count gives just that.
pub trait MsiLine: Send + Sync {
    /// Signals the vector.
    fn trigger(&self) -> Result<(), InterruptError>;
    /// The eventfd that signals the vector when written, for other processes and the kernel.
    fn eventfd(&self) -> &EventFd;
    /// Routes the vector to `message`, or masks it with `None`. Setting the route it has is cheap.
    fn route(&self, message: Option<MsiMessage>) -> Result<(), InterruptError>;
    /// Whether a trigger waits for a route.
    fn is_pending(&self) -> bool;
}

/// Where devices get their MSI-X vectors from.
pub trait MsiFabric: Send + Sync {
    /// `count` fresh vectors, all masked.
    fn allocate(&self, count: u16) -> Result<Vec<Arc<dyn MsiLine>>, InterruptError>;
}

/// An edge-triggered pin of the interrupt controller (ISA IRQs).
pub trait IrqLine: Send + Sync {
    /// Raises and lowers the line.
    fn trigger(&self) -> Result<(), InterruptError>;
}
