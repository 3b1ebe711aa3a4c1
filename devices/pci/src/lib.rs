//! PCI: configuration space, base address registers, MSI-X, and the bus that joins them to the
//! guest's address spaces.

pub mod device;

pub use device::{BarInfo, BarKind, Doorbell, PciDevice};
