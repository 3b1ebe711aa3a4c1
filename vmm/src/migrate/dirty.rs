//! vCPUs as a writer of guest memory: KVM's dirty log.

use std::sync::Arc;

use hypervisor::{MemorySlot, Vm};
use vm_migration::memory::RamRegion;
use vm_migration::{
    Clearing, DirtyError, DirtySource, Iova, IovaBitmap, IovaRange, PageSize, Precision, Reported,
};

/// Identifier of the source.
pub(super) const VCPU_SOURCE_ID: &str = "vcpu";

/// The dirty log of one memory slot.
struct Slot {
    slot: MemorySlot,
    range: IovaRange,
    /// The kernel's answer, which is of the whole slot; as long as the source, so that no report
    /// allocates.
    words: Vec<u64>,
}

/// All vCPUs' writes.
pub(super) struct VcpuDirty {
    vm: Arc<dyn Vm>,
    slots: Vec<Slot>,
}

fn failed(operation: &'static str) -> impl FnOnce(hypervisor::Error) -> DirtyError {
    move |cause| DirtyError::Backend {
        source_id: VCPU_SOURCE_ID.into(),
        operation,
        cause: Box::new(cause),
    }
}

impl VcpuDirty {
    /// The log of `slots`, which hold `regions` in the same order.
    pub(super) fn new(vm: Arc<dyn Vm>, slots: &[MemorySlot], regions: &[RamRegion]) -> Self {
        let slots = slots
            .iter()
            .zip(regions)
            .filter_map(|(slot, region)| {
                let range = IovaRange::new(Iova(region.gpa.0), region.len)?;
                Some(Slot {
                    slot: *slot,
                    range,
                    words: Vec::new(),
                })
            })
            .collect();
        Self { vm, slots }
    }
}

impl DirtySource for VcpuDirty {
    fn id(&self) -> &str {
        VCPU_SOURCE_ID
    }

    fn granularity(&self) -> PageSize {
        PageSize::SIZE_4K
    }

    fn precision(&self) -> Precision {
        Precision::Exact
    }

    fn start(&mut self, _: &[IovaRange]) -> Result<(), DirtyError> {
        for slot in &mut self.slots {
            self.vm
                .set_dirty_logging(slot.slot, true)
                .map_err(failed("start"))?;
            let words = self
                .vm
                .dirty_log_words(slot.slot)
                .map_err(failed("start"))?;
            slot.words.resize(words, 0);
        }
        Ok(())
    }

    fn report(
        &mut self,
        window: IovaRange,
        bitmap: &mut IovaBitmap,
    ) -> Result<Reported, DirtyError> {
        let within = |slot: &&mut Slot| slot.range.intersection(window) == Some(window);
        let Some(slot) = self.slots.iter_mut().find(within) else {
            return Err(DirtyError::NotTracked {
                source_id: VCPU_SOURCE_ID.into(),
                first: window.first(),
                last: window.last(),
            });
        };
        if slot.range.first() == window.first() {
            self.vm
                .read_dirty_log(slot.slot, &mut slot.words)
                .map_err(failed("report"))?;
        }
        bitmap
            .or_words(slot.range.first(), PageSize::SIZE_4K, &slot.words)
            .map(Reported::counted)
            .map_err(|cause| DirtyError::Backend {
                source_id: VCPU_SOURCE_ID.into(),
                operation: "report",
                cause: Box::new(cause),
            })
    }

    fn clearing(&mut self) -> Clearing<'_> {
        Clearing::AtReport
    }

    fn stop(&mut self) -> Result<(), DirtyError> {
        for slot in &self.slots {
            self.vm
                .set_dirty_logging(slot.slot, false)
                .map_err(failed("stop"))?;
        }
        Ok(())
    }
}
