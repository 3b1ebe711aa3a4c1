//! The dirty sources of the vCPU and the device.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_migration::{
    Clearing, DeferredClear, DirtyError, DirtySource, Iova, IovaBitmap, IovaRange, PageSize,
    Precision, Reported,
};

use super::faults::Fault;
use super::guest::{Guest, WINDOWS, gpa, one_in, page_at, place};

/// One report in so many fails, and one clear.
const FAILS: u64 = 60;

fn failed(source_id: &str, operation: &'static str) -> DirtyError {
    DirtyError::backend(source_id, operation, "unplugged")
}

/// The number of a window and its pages; a source is asked for whole windows.
fn window_at(range: IovaRange) -> usize {
    let page = page_at(range.first().0);
    let (window, _) = place(page);
    let (first, pages) = WINDOWS[window];
    let last = page_at(range.last().0);
    assert_eq!((page, last), (first, first + pages - 1), "a whole window");
    window
}

fn or_word(
    id: &str,
    bits: u64,
    range: IovaRange,
    bitmap: &mut IovaBitmap,
) -> Result<Reported, DirtyError> {
    bitmap
        .or_words(range.first(), PageSize::SIZE_4K, &[bits])
        .map(Reported::counted)
        .map_err(|_| failed(id, "report"))
}

/// The log of the vCPUs, cleared in a second step.
pub(crate) struct VcpuSource(pub(crate) Arc<Guest>);

impl DirtySource for VcpuSource {
    fn id(&self) -> &str {
        "vcpu"
    }

    fn granularity(&self) -> PageSize {
        PageSize::SIZE_4K
    }

    fn precision(&self) -> Precision {
        Precision::Exact
    }

    fn start(&mut self, _ranges: &[IovaRange]) -> Result<(), DirtyError> {
        self.0.point();
        let mut log = self.0.vcpu.lock().unwrap();
        log.logging = true;
        log.dirty.fill(0);
        log.writable.fill(0);
        Ok(())
    }

    fn report(
        &mut self,
        window: IovaRange,
        bitmap: &mut IovaBitmap,
    ) -> Result<Reported, DirtyError> {
        self.0.point();
        let bits = self.0.vcpu.lock().unwrap().dirty[window_at(window)];
        if one_in(FAILS) {
            return Err(failed(self.id(), "report"));
        }
        or_word(self.id(), bits, window, bitmap)
    }

    fn clearing(&mut self) -> Clearing<'_> {
        Clearing::BeforeSend(self)
    }

    fn stop(&mut self) -> Result<(), DirtyError> {
        self.0.point();
        self.0.vcpu.lock().unwrap().logging = false;
        Ok(())
    }
}

impl DeferredClear for VcpuSource {
    fn clear(&mut self, range: IovaRange, pages: &IovaBitmap) -> Result<(), DirtyError> {
        // A window is smaller than a chunk.
        let window = window_at(range);
        let (first, count) = WINDOWS[window];
        let given = |page: &usize| pages.contains(Iova(gpa(*page)));
        let mask = (first..first + count)
            .filter(|page| self.0.is(Fault::ClearTooMuch) || given(page))
            .fold(0, |mask, page| mask | place(page).1);
        self.0.point();
        // The vCPU is stopped by its next write, and what it wrote before is visible: KVM has it
        // leave the guest to have its translations flushed.
        let mut log = self.0.vcpu.lock().unwrap();
        log.dirty[window] &= !mask;
        log.writable[window] &= !mask;
        drop(log);
        if one_in(FAILS) {
            return Err(failed(self.id(), "clear"));
        }
        Ok(())
    }
}

/// The device's log, cleared by the report.
pub(crate) struct DeviceSource(pub(crate) Arc<Guest>);

impl DirtySource for DeviceSource {
    fn id(&self) -> &str {
        "device"
    }

    fn granularity(&self) -> PageSize {
        PageSize::SIZE_4K
    }

    fn precision(&self) -> Precision {
        if self.0.granule == 1 {
            Precision::Exact
        } else {
            Precision::Coarse
        }
    }

    fn start(&mut self, _ranges: &[IovaRange]) -> Result<(), DirtyError> {
        for word in &self.0.device {
            word.store(0, Ordering::SeqCst);
        }
        Ok(())
    }

    fn report(
        &mut self,
        window: IovaRange,
        bitmap: &mut IovaBitmap,
    ) -> Result<Reported, DirtyError> {
        let word = &self.0.device[window_at(window)];
        let mut bits = if self.0.is(Fault::LoadThenClear) {
            let bits = word.load(Ordering::SeqCst);
            word.store(0, Ordering::SeqCst);
            bits
        } else {
            word.swap(0, Ordering::SeqCst)
        };
        if one_in(FAILS) {
            // What was taken is lost.
            if self.0.is(Fault::HideFailure) {
                return Ok(Reported::default());
            }
            return Err(failed(self.id(), "report"));
        }
        if self.0.is(Fault::ReportTooMuch) {
            bits |= bits << 1;
        }
        or_word(self.id(), bits, window, bitmap)
    }

    fn clearing(&mut self) -> Clearing<'_> {
        Clearing::AtReport
    }

    fn stop(&mut self) -> Result<(), DirtyError> {
        Ok(())
    }
}
