//! The driver's side of rings and transport, for tests.

mod pci;
mod ring;
mod rounds;

use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::{InterruptError, MsiFabric, MsiLine, MsiMessage};
use parking_lot::Mutex;
use vm_memory::GuestAddressSpace;
use vm_migration::addr::Gpa;
use vm_migration::memory::{Backing, GuestMemory, MemoryHandle, RamMapping, map_ram};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub(crate) use pci::{Driver, pci_device};
pub(crate) use ring::{Ring, RingLayout, Used};
pub(crate) use rounds::{Rounds, pages, two_views};

/// Bytes of test memory.
pub(crate) const RAM: u64 = 16 << 20;

/// Guest memory of [`RAM`] bytes from 0.
pub(crate) fn memory() -> MemoryHandle {
    let ram = map_ram(vec![RamMapping {
        gpa: Gpa(0),
        len: RAM,
        backing: Backing::Anonymous,
    }])
    .unwrap();
    MemoryHandle::new(ram)
}

/// The same in a file that another process can map.
pub(crate) fn shared_memory() -> MemoryHandle {
    let file = tempfile::tempfile().unwrap();
    file.set_len(RAM).unwrap();
    let ram = map_ram(vec![RamMapping {
        gpa: Gpa(0),
        len: RAM,
        backing: Backing::File { file, offset: 0 },
    }])
    .unwrap();
    MemoryHandle::new(ram)
}

/// The memory as it is now.
pub(crate) fn snapshot(memory: &MemoryHandle) -> Arc<GuestMemory> {
    memory.memory().into_inner()
}

/// Whether the log of writes has the page at `gpa`.
pub(crate) fn is_logged(memory: &GuestMemory, gpa: u64) -> bool {
    use vm_memory::bitmap::Bitmap;
    use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
    let (region, offset) = memory.to_region_addr(GuestAddress(gpa)).unwrap();
    region.bitmap().dirty_at(usize::try_from(offset.0).unwrap())
}

/// Waits until `done`, for a few seconds; says what for if it does not come.
#[track_caller]
pub(crate) fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(10), "no {what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// `len` bytes that differ from place to place.
pub(crate) fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len)
        .map(|i| u8::try_from((i * 7 + i / 251 + seed) % 256).unwrap())
        .collect()
}

/// A vector that counts its triggers in an eventfd.
pub(crate) struct TestLine {
    event: EventFd,
    route: Mutex<Option<MsiMessage>>,
}

impl TestLine {
    /// Triggers since last asked.
    pub(crate) fn take(&self) -> u64 {
        self.event.read().unwrap_or(0)
    }

    /// The route now.
    pub(crate) fn routed(&self) -> Option<MsiMessage> {
        *self.route.lock()
    }
}

impl MsiLine for TestLine {
    fn trigger(&self) -> Result<(), InterruptError> {
        self.event
            .write(1)
            .map_err(|cause| InterruptError::Backend {
                operation: "trigger",
                cause,
            })
    }

    fn eventfd(&self) -> &EventFd {
        &self.event
    }

    fn route(&self, message: Option<MsiMessage>) -> Result<(), InterruptError> {
        *self.route.lock() = message;
        Ok(())
    }

    fn is_pending(&self) -> bool {
        false
    }
}

/// Hands out [`TestLine`]s and keeps them.
#[derive(Default)]
pub(crate) struct TestFabric {
    pub(crate) lines: Mutex<Vec<Arc<TestLine>>>,
}

impl TestFabric {
    pub(crate) fn line(&self, vector: usize) -> Arc<TestLine> {
        Arc::clone(&self.lines.lock()[vector])
    }
}

impl MsiFabric for TestFabric {
    fn allocate(&self, count: u16) -> Result<Vec<Arc<dyn MsiLine>>, InterruptError> {
        let mut lines = self.lines.lock();
        let fresh: Vec<_> = (0..count)
            .map(|_| {
                Arc::new(TestLine {
                    event: EventFd::new(EFD_NONBLOCK).unwrap(),
                    route: Mutex::new(None),
                })
            })
            .collect();
        lines.extend(fresh.iter().cloned());
        Ok(fresh
            .into_iter()
            .map(|line| line as Arc<dyn MsiLine>)
            .collect())
    }
}
