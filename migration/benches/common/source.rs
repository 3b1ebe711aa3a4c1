//! A simulated dirty source.

use vm_migration::{
    BitmapError, Clearing, DirtyError, DirtySource, IovaBitmap, IovaRange, PageSize, Precision,
    Reported,
};

/// A source that does nothing but report, into bitmaps of 4 KiB pages that are just the window.
pub(crate) struct Simulated<F> {
    id: String,
    page: PageSize,
    report: F,
}

impl<F> Simulated<F>
where
    F: FnMut(IovaRange, &mut IovaBitmap) -> Result<Reported, BitmapError> + Send,
{
    /// Source `id`, which tracks by `page`; `report` is its [`DirtySource::report`].
    pub(crate) fn new(id: impl Into<String>, page: PageSize, report: F) -> Self {
        Self {
            id: id.into(),
            page,
            report,
        }
    }
}

impl<F> DirtySource for Simulated<F>
where
    F: FnMut(IovaRange, &mut IovaBitmap) -> Result<Reported, BitmapError> + Send,
{
    fn id(&self) -> &str {
        &self.id
    }

    fn granularity(&self) -> PageSize {
        self.page
    }

    fn precision(&self) -> Precision {
        Precision::Exact
    }

    fn start(&mut self, _ranges: &[IovaRange]) -> Result<(), DirtyError> {
        Ok(())
    }

    fn report(
        &mut self,
        window: IovaRange,
        bitmap: &mut IovaBitmap,
    ) -> Result<Reported, DirtyError> {
        if bitmap.range() != window || bitmap.page_size() != PageSize::SIZE_4K {
            return Err(DirtyError::not_tracked(&self.id, window));
        }
        (self.report)(window, bitmap)
            .map_err(|cause| DirtyError::backend(&self.id, "report", cause))
    }

    fn clearing(&mut self) -> Clearing<'_> {
        Clearing::AtReport
    }

    fn stop(&mut self) -> Result<(), DirtyError> {
        Ok(())
    }
}
