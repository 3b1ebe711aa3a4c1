//! The dirty pages that are being handed out.

use iova_bitmap::{BitmapError, IovaBitmap};

use super::layout::Window;
use crate::addr::{Iova, IovaRange, PageSize};

/// Bytes of guest memory in a chunk. Large enough that clearing a source's record of it (a system
/// call) does not show beside the sending of its pages; small enough that pages are cleared shortly
/// before they are sent, as each write in between sends them once more.
const CHUNK_BYTES: u64 = 64 << 20;

/// Dirty pages taken out of one window. What is handed out of it is in flight, as what the window
/// says is; a word at a time, once all of it is.
#[derive(Debug)]
pub(super) struct Chunk {
    /// All pages taken. Those before `from` have been handed out, unless none is left: then all
    /// have been.
    pages: IovaBitmap,
    /// The window they are from; `None` if there are none.
    window: Option<usize>,
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
            window: None,
            from: Iova(0),
            left: 0,
        })
    }

    /// Pages not yet handed out.
    pub(super) fn left(&self) -> u64 {
        self.left
    }

    /// The window the pages are from; `None` if there are none.
    pub(super) fn window(&self) -> Option<usize> {
        self.window
    }

    /// All pages taken, handed out or not.
    pub(super) fn pages(&self) -> &IovaBitmap {
        &self.pages
    }

    /// The next pages, at most `max_bytes` but at least one page.
    pub(super) fn next_run(&mut self, max_bytes: u64) -> Option<IovaRange> {
        if self.left == 0 {
            return None;
        }
        let run = self.pages.next_run(self.from, max_bytes)?;
        self.left = self.left.saturating_sub(self.pages_of(run));
        self.from = Iova(run.last().0.saturating_add(1));
        Some(run)
    }

    /// How many pages a run has.
    fn pages_of(&self, run: IovaRange) -> u64 {
        ((run.last().0 - run.first().0) >> self.pages.page_size().shift()) + 1
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
        self.window = Some(index);
        self.from = range.first();
        Some(range)
    }

    /// Empties it into the window it is from: what was handed out is in flight, the rest is dirty.
    pub(super) fn give_back(&mut self, window: &mut Window) {
        if self.left > 0 {
            while let Some(run) = self.next_run(u64::MAX) {
                self.pages.clear_range(run);
                window.dirty.set_range(run);
            }
            window.recount();
        }
        window.send(&mut self.pages);
        self.window = None;
    }

    /// What was handed out has arrived.
    pub(super) fn acknowledge(&mut self) {
        if let Some(range) = self.handed_out() {
            self.pages.clear_range(range);
        }
    }

    /// The pages handed out that `window`, which they are from, does not count as in flight.
    pub(super) fn in_flight_beside(&self, window: &Window) -> u64 {
        let Some(range) = self.handed_out() else {
            return 0;
        };
        let runs = self.pages.runs();
        runs.filter_map(|run| run.intersection(range))
            .map(|run| self.pages_of(run).saturating_sub(window.in_flight_in(run)))
            .sum()
    }

    /// Which part of the chunk has been handed out.
    fn handed_out(&self) -> Option<IovaRange> {
        let all = self.pages.range();
        if self.left == 0 {
            return Some(all);
        }
        IovaRange::new(all.first(), self.from.0.checked_sub(all.first().0)?)
    }
}
