//! The dirty pages that are being handed out.

use iova_bitmap::{BitmapError, IovaBitmap};

use super::layout::Window;
use crate::addr::{Iova, IovaRange, PageSize};

/// Bytes of guest memory in a chunk. Large enough that clearing a source's record of it (a system
/// call) does not show beside the sending of its pages; small enough that pages are cleared shortly
/// before they are sent, as each write in between sends them once more.
const CHUNK_BYTES: u64 = 64 << 20;

/// Dirty pages taken out of one window, of which some are still to be handed out.
#[derive(Debug)]
pub(super) struct Chunk {
    pages: IovaBitmap,
    /// The window they are from, if any are left.
    window: usize,
    /// Where the next run is looked for.
    from: Iova,
    /// Pages not yet handed out.
    left: u64,
}

impl Chunk {
    /// An empty chunk of pages of `page` bytes: 64 of them at least, for words are taken whole.
    pub(super) fn new(page: PageSize) -> Result<Self, BitmapError> {
        let bytes = CHUNK_BYTES.max(page.bytes().saturating_mul(64));
        Ok(Self {
            pages: IovaBitmap::new(Iova(0), bytes, page)?,
            window: 0,
            from: Iova(0),
            left: 0,
        })
    }

    /// Pages not yet handed out.
    pub(super) fn left(&self) -> u64 {
        self.left
    }

    /// The window they are from; `None` if there are none.
    pub(super) fn window(&self) -> Option<usize> {
        (self.left > 0).then_some(self.window)
    }

    /// The pages not yet handed out.
    pub(super) fn pages(&self) -> &IovaBitmap {
        &self.pages
    }

    /// The next pages, at most `max_bytes` but at least one page, and the window they are from.
    pub(super) fn next_run(&mut self, max_bytes: u64) -> Option<(usize, IovaRange)> {
        if self.left == 0 {
            return None;
        }
        let run = self.pages.next_run(self.from, max_bytes)?;
        let pages = ((run.last().0 - run.first().0) >> self.pages.page_size().shift()) + 1;
        self.pages.clear_range(run);
        self.left = self.left.saturating_sub(pages);
        self.from = Iova(run.last().0.saturating_add(1));
        Some((self.window, run))
    }

    /// Moves here the dirty pages of the first chunk of `window` (number `index`) that has some at
    /// or after `from`; gives the addresses the chunk is about.
    ///
    /// Only for an empty chunk.
    pub(super) fn take_from(
        &mut self,
        index: usize,
        window: &mut Window,
        from: Iova,
    ) -> Option<IovaRange> {
        let dirty = window.dirty.next_run(from, 0)?;
        let within = window.range();
        let bytes = CHUNK_BYTES.max(self.pages.page_size().bytes().saturating_mul(64));
        // Chunks are aligned to the window, and with it to the words of its bitmap.
        let offset = dirty.first().0 - within.first().0;
        let first = within.first().0 + (offset - offset % bytes);
        let last = first.saturating_add(bytes - 1).min(within.last().0);
        let range = IovaRange::from_ends(Iova(first), Iova(last))?;
        // It was made for a whole chunk, so this one fits.
        self.pages.retarget(range).ok()?;
        self.left = window.dirty.take_into(&mut self.pages);
        window.dirty_pages = window.dirty_pages.saturating_sub(self.left);
        self.window = index;
        self.from = range.first();
        Some(range)
    }

    /// Moves what was not handed out back to the window it is from.
    pub(super) fn give_back(&mut self, window: &mut Window) {
        self.pages.take_into(&mut window.dirty);
        self.left = 0;
        window.recount();
    }

    /// Forgets what was not handed out: all is dirty anyway.
    pub(super) fn forget(&mut self) {
        self.pages.clear();
        self.left = 0;
    }
}
