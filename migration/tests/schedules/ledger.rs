//! What happened, to judge what is handed out by. No thread of the model reads it to decide what to
//! do.

use super::guest::PAGES;

/// The ledger; pages are numbered through both regions.
#[derive(Debug)]
pub(crate) struct Ledger {
    /// Counts events.
    now: u64,
    /// When the last collection began.
    collected: u64,
    pages: Vec<Page>,
    /// What went wrong first.
    violation: Option<String>,
}

#[derive(Clone, Debug, Default)]
struct Page {
    /// Marks that have begun and not ended.
    marking: u32,
    /// When the last mark ended.
    marked: u64,
    /// When the last collection before the page was last handed out began.
    taken: u64,
    /// It was made dirty by other than a mark, and not handed out since.
    owed: bool,
    /// Handed out in this round.
    given: bool,
    /// Handed out and not acknowledged.
    in_flight: bool,
}

impl Ledger {
    pub(crate) fn new() -> Self {
        Self {
            now: 0,
            collected: 0,
            pages: vec![Page::default(); PAGES],
            violation: None,
        }
    }

    fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    /// A writer begins to mark `pages`.
    pub(crate) fn mark_begins(&mut self, pages: &[usize]) {
        for page in pages {
            self.pages[*page].marking += 1;
        }
    }

    /// The bits are set.
    pub(crate) fn mark_ends(&mut self, pages: &[usize]) {
        let now = self.tick();
        for page in pages {
            self.pages[*page].marking -= 1;
            self.pages[*page].marked = now;
        }
    }

    pub(crate) fn collect_begins(&mut self) {
        self.collected = self.tick();
        self.new_round();
    }

    fn new_round(&mut self) {
        for page in &mut self.pages {
            page.given = false;
        }
    }

    /// Everything is dirty, and a new round begins.
    pub(crate) fn all_dirty(&mut self) {
        for page in &mut self.pages {
            page.owed = true;
        }
        self.new_round();
    }

    /// `page` was handed out.
    pub(crate) fn given(&mut self, page: usize) {
        let entry = &mut self.pages[page];
        let wrong = if entry.given {
            Some("was handed out twice in a round")
        } else if entry.owed || entry.marking > 0 || entry.marked > entry.taken {
            None
        } else {
            Some("was invented: nobody wrote it")
        };
        entry.given = true;
        entry.owed = false;
        entry.in_flight = true;
        entry.taken = self.collected;
        if let Some(wrong) = wrong {
            self.violates(format!("page {page} {wrong}"));
        }
    }

    pub(crate) fn acknowledged(&mut self) {
        for page in &mut self.pages {
            page.in_flight = false;
        }
    }

    /// What was in flight is dirty, and a new round begins.
    pub(crate) fn put_back(&mut self) {
        for page in &mut self.pages {
            page.owed |= std::mem::take(&mut page.in_flight);
        }
        self.new_round();
    }

    pub(crate) fn violates(&mut self, what: String) {
        self.violation.get_or_insert(what);
    }

    pub(crate) fn violation(&self) -> Option<String> {
        self.violation.clone()
    }
}
