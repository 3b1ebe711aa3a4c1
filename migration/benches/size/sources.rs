//! Those who report what is dirty, as far as cost goes.
//!
//! All report the same pages each time they are asked, so that samples compare.

use std::sync::Arc;

use vm_memory::bitmap::{Bitmap, NewBitmap};
use vm_migration::memory::WriteLog;
use vm_migration::{BitmapError, DirtySource, Iova, IovaBitmap, IovaRange, PageSize, Reported};

use crate::fill::Pattern;
use crate::layout::PAGE;
use crate::source::Simulated;

/// A device whose driver in a kernel reports into the bitmap it is given, as VFIO's do: it sets the
/// bits of the pages that were written and touches nothing else, and counts nothing. Without a
/// pattern it wrote nothing.
pub(crate) fn device(
    number: u64,
    page: PageSize,
    pattern: Option<Pattern>,
) -> Box<dyn DirtySource> {
    let report = move |window, bitmap: &mut IovaBitmap| {
        if let Some(pattern) = &pattern {
            set_bits(pattern, window, bitmap);
        }
        Ok(Reported { pages: None })
    };
    Box::new(Simulated::new(format!("device{number}"), page, report))
}

fn set_bits(pattern: &Pattern, window: IovaRange, bitmap: &mut IovaBitmap) {
    let bytes = pattern.unit_bytes();
    if bytes != PAGE.bytes() {
        for place in pattern.places(window) {
            bitmap.set(Iova(place), bytes);
        }
        return;
    }
    let words = bitmap.words_mut();
    for place in pattern.places(window) {
        let page = (place - window.first().0) >> PAGE.shift();
        let word = usize::try_from(page / 64).unwrap_or(usize::MAX);
        if let Some(word) = words.get_mut(word) {
            *word |= 1 << (page % 64);
        }
    }
}

/// A log that comes as a copy of all its words, set or not: KVM's, or that of another process. At
/// the first window of a range the range's words are copied, and then merged window by window. It
/// says of `ranges` what `pattern` does.
pub(crate) fn copied(
    ranges: &[IovaRange],
    pattern: &Pattern,
    pages_before: u64,
) -> Result<Box<dyn DirtySource>, BitmapError> {
    let mut log = Copied::new(ranges, pattern, pages_before)?;
    let report = move |window, bitmap: &mut IovaBitmap| log.report(window, bitmap);
    Ok(Box::new(Simulated::new("copied", PAGE, report)))
}

/// One range of a [`Copied`] log.
#[derive(Debug)]
struct Piece {
    range: IovaRange,
    /// What the kernel or the other process has.
    theirs: Vec<u64>,
    /// What was copied from there.
    ours: Vec<u64>,
}

/// See [`copied`].
#[derive(Debug)]
struct Copied {
    /// How many pages before the guest's ranges its own start: by 5, no word lies over one of ours.
    pages_before: u64,
    pieces: Vec<Piece>,
}

impl Copied {
    fn new(
        ranges: &[IovaRange],
        pattern: &Pattern,
        pages_before: u64,
    ) -> Result<Self, BitmapError> {
        let piece = |range: &IovaRange| {
            let mut bitmap = IovaBitmap::over(*range, PAGE)?;
            for place in pattern.places(*range) {
                bitmap.set(Iova(place), pattern.unit_bytes());
            }
            Ok(Piece {
                range: *range,
                theirs: bitmap.words().to_vec(),
                ours: bitmap.words().to_vec(),
            })
        };
        Ok(Self {
            pages_before,
            pieces: ranges.iter().map(piece).collect::<Result<_, _>>()?,
        })
    }

    fn report(
        &mut self,
        window: IovaRange,
        bitmap: &mut IovaBitmap,
    ) -> Result<Reported, BitmapError> {
        let mut reported = Reported::counted(0);
        for piece in &mut self.pieces {
            if piece.range.intersection(window).is_none() {
                continue;
            }
            if piece.range.first() == window.first() {
                piece.ours.copy_from_slice(&piece.theirs);
            }
            let word = |address: Iova| {
                let page = (address.0 - piece.range.first().0) >> PAGE.shift();
                usize::try_from(page / 64).unwrap_or(usize::MAX)
            };
            let words = piece.ours.get(word(window.first())..=word(window.last()));
            let base = Iova(
                window
                    .first()
                    .0
                    .saturating_sub(self.pages_before << PAGE.shift()),
            );
            let named = bitmap.or_words(base, PAGE, words.unwrap_or_default());
            reported = Reported::counted(named?);
        }
        Ok(reported)
    }
}

/// The log of the VMM's own writes as it is in guest memory, without the memory. Unlike the other
/// sources it forgets what it reported; [`refill`](Self::refill) writes the same pages again.
#[derive(Clone, Debug)]
pub(crate) struct OwnWrites {
    logs: Arc<[(IovaRange, WriteLog)]>,
    pattern: Pattern,
}

impl OwnWrites {
    pub(crate) fn new(ranges: &[IovaRange], pattern: Pattern) -> Self {
        let log = |range: &IovaRange| {
            let len = range.len().and_then(|len| usize::try_from(len).ok());
            (*range, WriteLog::with_len(len.unwrap_or(0)))
        };
        Self {
            logs: ranges.iter().map(log).collect(),
            pattern,
        }
    }

    /// Writes all pages of the pattern.
    pub(crate) fn refill(&self) {
        for (range, log) in &*self.logs {
            for place in self.pattern.places(*range) {
                let offset = place.saturating_sub(range.first().0);
                let len = usize::try_from(self.pattern.unit_bytes()).unwrap_or(0);
                log.mark_dirty(usize::try_from(offset).unwrap_or(usize::MAX), len);
            }
        }
    }

    /// The source that reports them.
    pub(crate) fn into_source(self) -> Box<dyn DirtySource> {
        let report = move |window, bitmap: &mut IovaBitmap| self.report(window, bitmap);
        Box::new(Simulated::new("vmm", PAGE, report))
    }

    fn report(&self, window: IovaRange, bitmap: &mut IovaBitmap) -> Result<Reported, BitmapError> {
        let mut reported = Reported::counted(0);
        for (range, log) in &*self.logs {
            let Some(part) = range.intersection(window) else {
                continue;
            };
            let offset = usize::try_from(part.first().0 - range.first().0);
            let len = part.len().map(usize::try_from);
            let (Ok(offset), Some(Ok(len))) = (offset, len) else {
                continue;
            };
            let named = log.drain(offset, len, range.first(), bitmap);
            reported = Reported::counted(named?);
        }
        Ok(reported)
    }
}
