//! A device whose writes, mappings and failures a test makes.

use std::collections::BTreeSet;
use std::sync::Arc;

use iova_bitmap::IovaBitmap;
use parking_lot::Mutex;

use super::{AfterUnmap, IovaLog, Mapping};
use crate::addr::{Gpa, Iova, IovaRange, PageSize};
use crate::source::{DirtyError, Precision, Reported};

pub(super) const PAGE: u64 = 4096;

pub(super) fn mapping(iova: u64, gpa: u64, pages: u64) -> Mapping {
    Mapping::new(Iova(iova), Gpa(gpa), pages * PAGE).unwrap()
}

pub(super) fn range(first: u64, pages: u64) -> IovaRange {
    IovaRange::new(Iova(first), pages * PAGE).unwrap()
}

/// What the device is in, seen and scripted by the test.
#[derive(Debug)]
pub(super) struct Device {
    /// The size its log tracks at.
    pub(super) page: PageSize,
    /// First addresses of the pages in the log.
    pub(super) logged: BTreeSet<u64>,
    pub(super) started: Option<Vec<IovaRange>>,
    /// Whether its log forgets what is unmapped.
    pub(super) after_unmap: AfterUnmap,
    /// So many reports succeed, then one fails and loses what it took.
    pub(super) fail_report: Option<u32>,
    pub(super) fail_start: bool,
    /// The windows it was asked for.
    pub(super) windows: Vec<IovaRange>,
}

impl Device {
    /// Logs a write to `iova`, mapped or not.
    pub(super) fn write(&mut self, iova: u64) {
        if self.started.is_some() {
            self.logged.insert(iova & !(self.page.bytes() - 1));
        }
    }
}

/// The log of a [`Device`].
#[derive(Clone, Debug)]
pub(super) struct FakeLog(pub(super) Arc<Mutex<Device>>);

impl FakeLog {
    pub(super) fn new(page: u64) -> Self {
        Self(Arc::new(Mutex::new(Device {
            page: PageSize::new(page).unwrap(),
            logged: BTreeSet::new(),
            started: None,
            after_unmap: AfterUnmap::Kept,
            fail_report: None,
            fail_start: false,
            windows: Vec::new(),
        })))
    }
}

fn failed(operation: &'static str) -> DirtyError {
    DirtyError::backend("nic0", operation, "unplugged")
}

/// What an IOMMU says that does not do as it is told.
pub(super) fn refusal() -> DirtyError {
    DirtyError::backend("iommu", "change", "refused by the test")
}

impl IovaLog for FakeLog {
    fn id(&self) -> &str {
        "nic0"
    }

    fn granularity(&self) -> PageSize {
        self.0.lock().page
    }

    fn precision(&self) -> Precision {
        Precision::Exact
    }

    fn after_unmap(&self) -> AfterUnmap {
        self.0.lock().after_unmap
    }

    fn start(&mut self, ranges: &[IovaRange]) -> Result<(), DirtyError> {
        let mut device = self.0.lock();
        if std::mem::take(&mut device.fail_start) {
            return Err(failed("start"));
        }
        device.logged.clear();
        device.started = Some(ranges.to_vec());
        Ok(())
    }

    fn report(
        &mut self,
        window: IovaRange,
        bitmap: &mut IovaBitmap,
    ) -> Result<Reported, DirtyError> {
        let mut device = self.0.lock();
        assert!(bitmap.covers(window) && device.started.is_some());
        device.windows.push(window);
        let pages = window.first().0..=window.last().0;
        let taken: Vec<u64> = device.logged.range(pages).copied().collect();
        for page in &taken {
            device.logged.remove(page);
        }
        match device.fail_report.as_mut() {
            Some(0) => {
                device.fail_report = None;
                return Err(failed("report"));
            }
            Some(left) => *left -= 1,
            None => {}
        }
        for page in &taken {
            bitmap.set(Iova(*page), device.page.bytes());
        }
        Ok(Reported::counted(taken.len() as u64))
    }

    fn stop(&mut self) -> Result<(), DirtyError> {
        self.0.lock().started = None;
        Ok(())
    }
}
