//! Whoever drives `GuestDirty`, as the engine does, in all ways in which a migration can go.

use std::sync::Arc;
use std::sync::MutexGuard;

use vm_migration::{
    Clearing, Collect, DirtySource, GpaRun, GuestDirty, Iova, IovaBitmap, IovaRange, PageSize,
    VmmWriteSource,
};

use super::explore::{Count, Counts};
use super::faults::Fault;
use super::guest::{Guest, PAGE, WINDOW_PAGES, WINDOWS, below, gpa, one_in, page_at, place};
use super::ledger::Ledger;
use super::link::{Arrived, Link};
use super::sources::{DeviceSource, VcpuSource};
use super::writers;

/// What the guest does; while it runs, pages are cleared at their sources before they are read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum GuestIs {
    Running,
    StandingStill,
}

/// How a round ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    /// The destination has everything.
    Acknowledged,
    /// The connection broke; another was made, and pages in flight are dirty again.
    Broken,
    /// A source failed; everything was started anew.
    Failed,
}

pub(crate) struct Migration {
    guest: Arc<Guest>,
    counts: &'static Counts,
    dirty: GuestDirty,
    sources: Vec<Box<dyn DirtySource>>,
    arrived: Arrived,
    /// Is there from the start on.
    link: Option<Link>,
}

/// A migration that may be broken off and begun again, to its end; what was lost or invented.
pub(crate) fn run(fault: Option<Fault>, counts: &'static Counts) -> Result<(), String> {
    let guest = Guest::new(fault);
    let mut migration = Migration::new(&guest, counts);
    loop {
        let threads = writers::start(&guest);
        migration.start();
        for _ in 0..1 + below(4) {
            migration.round(GuestIs::Running);
        }
        if guest.is(Fault::ReportBeforeStop) {
            migration.collect();
            writers::stop(&guest, threads);
            while migration.send(GuestIs::StandingStill) != End::Acknowledged {}
            return migration.finish();
        }
        writers::stop(&guest, threads);
        let end = migration.round(GuestIs::StandingStill);
        // Sometimes the guest runs on and all begins again.
        if one_in(4) {
            counts.count(Count::Restart);
            continue;
        }
        migration.stop_copy(end);
        return migration.finish();
    }
}

impl Migration {
    fn new(guest: &Arc<Guest>, counts: &'static Counts) -> Self {
        let window = u64::try_from(WINDOW_PAGES).unwrap() * PAGE;
        Self {
            counts,
            dirty: GuestDirty::with_window(&Guest::regions(), PageSize::SIZE_4K, window).unwrap(),
            sources: vec![
                Box::new(VcpuSource(Arc::clone(guest))),
                Box::new(DeviceSource(Arc::clone(guest))),
                Box::new(VmmWriteSource::new(guest.memory.clone())),
            ],
            arrived: Arrived::new(),
            link: None,
            guest: Arc::clone(guest),
        }
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.guest.ledger.lock().unwrap()
    }

    fn link(&self) -> &Link {
        self.link.as_ref().unwrap()
    }

    /// Begins, perhaps after a failure, perhaps with a new destination.
    fn start(&mut self) {
        self.reconnect(one_in(2));
        self.put_back();
        if self.guest.is(Fault::LateStart) {
            self.mark_all();
            self.hand_out(GuestIs::StandingStill);
        }
        for source in &mut self.sources {
            source.stop().unwrap();
        }
        for source in &mut self.sources {
            source.start(self.dirty.ranges()).unwrap();
        }
        if !self.guest.is(Fault::LateStart) {
            self.mark_all();
        }
    }

    fn mark_all(&mut self) {
        self.dirty.mark_all();
        self.ledger().all_dirty();
    }

    fn put_back(&mut self) {
        if !self.guest.is(Fault::ForgetInFlight) {
            self.dirty.put_back();
        }
        self.ledger().put_back();
    }

    /// Another connection, to the same destination or to one that has nothing yet.
    fn reconnect(&mut self, anew: bool) {
        if let Some(link) = self.link.take() {
            link.cut();
        }
        if anew {
            self.arrived = Arrived::new();
        }
        self.link = Some(Link::new(&self.arrived));
    }

    fn round(&mut self, guest: GuestIs) -> End {
        if !self.collect() {
            return End::Failed;
        }
        self.send(guest)
    }

    /// After a first round that ended so: until the destination has everything. Nothing is written,
    /// so sources are asked again only if they were started anew.
    fn stop_copy(&mut self, mut end: End) {
        loop {
            end = match end {
                End::Acknowledged => return,
                End::Broken => self.send(GuestIs::StandingStill),
                End::Failed => self.round(GuestIs::StandingStill),
            };
        }
    }

    /// False if a source failed and everything was started anew.
    fn collect(&mut self) -> bool {
        let how = Collect {
            restarts: u32::from(one_in(2)),
            threads: usize::try_from(1 + below(3)).unwrap(),
        };
        self.ledger().collect_begins();
        let collected = self.dirty.collect(&mut self.sources, how);
        self.counts.count(if how.threads > 1 {
            Count::CollectTogether
        } else {
            Count::CollectInTurn
        });
        match collected {
            Ok(reports) => {
                if reports.iter().any(|report| report.failure.is_some()) {
                    self.counts.count(Count::FailureMended);
                    self.ledger().all_dirty();
                }
                true
            }
            Err(_) => {
                self.fail();
                false
            }
        }
    }

    /// What the engine does when a source fails: the migration ends, and is tried again.
    fn fail(&mut self) {
        self.counts.count(Count::Failure);
        self.ledger().all_dirty();
        self.start();
    }

    /// Sends what is dirty, to the acknowledgement.
    fn send(&mut self, guest: GuestIs) -> End {
        let end = self.hand_out(guest);
        if end != End::Acknowledged {
            return end;
        }
        self.link().end_round();
        if self.guest.is(Fault::AcknowledgeAtOnce) {
            self.dirty.acknowledge();
        }
        if one_in(8) {
            return self.lose_connection();
        }
        self.link().wait();
        self.dirty.acknowledge();
        self.ledger().acknowledged();
        End::Acknowledged
    }

    fn lose_connection(&mut self) -> End {
        self.counts.count(Count::Broken);
        self.reconnect(false);
        self.put_back();
        End::Broken
    }

    fn hand_out(&mut self, guest: GuestIs) -> End {
        let late = self.guest.is(Fault::ClearAfterRead);
        let mut put_back = self.guest.is(Fault::PutBackWithinRound);
        loop {
            let sources: &mut [Box<dyn DirtySource>] = match guest {
                GuestIs::Running if !late => &mut self.sources,
                GuestIs::Running | GuestIs::StandingStill => &mut [],
            };
            let run = match self.dirty.next_run((1 + below(6)) * PAGE, sources) {
                Ok(Some(run)) => run,
                Ok(None) => return End::Acknowledged,
                Err(_) => {
                    self.fail();
                    return End::Failed;
                }
            };
            let pages = pages(run);
            for page in pages.clone() {
                self.counts.count(Count::Page);
                self.ledger().given(page);
            }
            let contents = pages.map(|page| (page, self.guest.read(page))).collect();
            self.link().send(contents);
            if late && guest == GuestIs::Running {
                self.clear_late(run);
            }
            if std::mem::take(&mut put_back) {
                self.dirty.put_back();
            }
            if one_in(60) {
                return self.lose_connection();
            }
        }
    }

    /// As it must not be done: after the pages were read.
    fn clear_late(&mut self, run: GpaRun) {
        let (window, _) = place(page_at(run.gpa.0));
        let (first, pages) = WINDOWS[window];
        let len = u64::try_from(pages).unwrap() * PAGE;
        let range = IovaRange::new(Iova(gpa(first)), len).unwrap();
        let mut bitmap = IovaBitmap::over(range, PageSize::SIZE_4K).unwrap();
        bitmap.set(Iova(run.gpa.0), run.len);
        for source in &mut self.sources {
            if let Clearing::BeforeSend(log) = source.clearing() {
                let _ = log.clear(range, &bitmap);
            }
        }
    }

    /// Compares, when nothing writes any more and all is sent.
    fn finish(mut self) -> Result<(), String> {
        if let Some(link) = self.link.take() {
            link.close();
        }
        let left = (self.dirty.dirty_pages(), self.dirty.in_flight_pages());
        if left != (0, 0) {
            self.ledger()
                .violates(format!("{left:?} pages are dirty and in flight at the end"));
        }
        let arrived = self.arrived.0.lock().unwrap().clone();
        for (page, arrived) in arrived.into_iter().enumerate() {
            let content = self.guest.read(page);
            if arrived != Some(content) {
                self.ledger().violates(format!(
                    "page {page} was lost: it holds {content:?}, at the destination {arrived:?}"
                ));
            }
        }
        let violation = self.ledger().violation();
        violation.map_or(Ok(()), Err)
    }
}

fn pages(run: GpaRun) -> std::ops::Range<usize> {
    let first = page_at(run.gpa.0);
    first..first + usize::try_from(run.len / PAGE).unwrap()
}
