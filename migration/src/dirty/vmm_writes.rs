//! The dirty source of this process's own writes.

use vm_memory::GuestAddressSpace;

use crate::addr::{IovaRange, PageSize};
use crate::memory::{self, LOG_PAGE, MemoryHandle};
use crate::source::{Clearing, DirtyError, DirtySource, Precision, Reported};
use iova_bitmap::IovaBitmap;

/// The [`DirtySource::id`] of [`VmmWriteSource`].
pub const VMM_SOURCE_ID: &str = "vmm";

/// Reports what this process wrote to guest memory, from the
/// [`WriteLog`](crate::memory::WriteLog)s of its regions.
///
/// The logs are always on; [`start`](DirtySource::start) forgets what they gathered before, and
/// [`stop`](DirtySource::stop) only ends the reports.
#[derive(Debug)]
pub struct VmmWriteSource {
    memory: MemoryHandle,
    tracked: Vec<IovaRange>,
}

impl VmmWriteSource {
    /// A source over the memory that `memory` gives at each report, so hotplugged regions count.
    pub fn new(memory: MemoryHandle) -> Self {
        Self {
            memory,
            tracked: Vec::new(),
        }
    }
}

fn not_tracked(range: IovaRange) -> DirtyError {
    DirtyError::not_tracked(VMM_SOURCE_ID, range)
}

impl DirtySource for VmmWriteSource {
    fn id(&self) -> &str {
        VMM_SOURCE_ID
    }

    fn granularity(&self) -> PageSize {
        LOG_PAGE
    }

    fn precision(&self) -> Precision {
        Precision::Exact
    }

    fn start(&mut self, ranges: &[IovaRange]) -> Result<(), DirtyError> {
        let memory = self.memory.memory();
        if let Some(hole) = ranges
            .iter()
            .find(|range| !memory::is_ram(&memory, **range))
        {
            return Err(not_tracked(*hole));
        }
        for range in ranges {
            memory::forget_writes(&memory, *range);
        }
        self.tracked = ranges.to_vec();
        Ok(())
    }

    fn report(
        &mut self,
        window: IovaRange,
        bitmap: &mut IovaBitmap,
    ) -> Result<Reported, DirtyError> {
        let within = |range: &IovaRange| range.intersection(window) == Some(window);
        if !self.tracked.iter().any(within) {
            return Err(not_tracked(window));
        }
        memory::drain_writes(&self.memory.memory(), window, bitmap)
            .map(Reported::counted)
            .map_err(|error| DirtyError::backend(VMM_SOURCE_ID, "report", error))
    }

    fn clearing(&mut self) -> Clearing<'_> {
        Clearing::AtReport
    }

    fn stop(&mut self) -> Result<(), DirtyError> {
        self.tracked.clear();
        Ok(())
    }
}
