//! Address spaces (port I/O, MMIO) and their dispatch.

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
