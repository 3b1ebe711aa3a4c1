//! Threads that take in the devices' states, one for each device whose state is streamed.
//!
//! A device may take its time to take its state in. Chunks of it wait for that in a queue of
//! bounded length, while memory and the other devices' chunks are received; once all is there, the
//! devices load it at the same time.

use std::collections::VecDeque;
use std::thread::Scope;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::migrate::link::{Link, LinkError};
use crate::migrate::protocol::chunk_open;
use crate::state::{StateError, StateSink};

/// Chunks of one device that wait to be taken in: 4 MiB as the source sends them.
const DEPTH: usize = 8;

/// Longest wait for a device before the operator is listened to.
const LISTEN: Duration = Duration::from_millis(50);

/// One device's loader, as both sides of it see it.
#[derive(Debug, Default)]
struct Lane {
    /// The device's place in the manifest.
    index: usize,
    /// Payloads of chunks.
    queue: VecDeque<Vec<u8>>,
    spare: Vec<Vec<u8>>,
    /// All chunks are in the queue or taken in: load.
    finish: bool,
    /// It is taking a chunk in.
    busy: bool,
    loaded: bool,
    failure: Option<Failure>,
    /// Since the last round.
    took: Duration,
}

/// Why a device did not take its state in.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) doing: &'static str,
    pub(super) cause: StateError,
}

/// Why a wait for a device ended.
#[derive(Debug)]
pub(super) enum Stopped {
    Device(Failure),
    Link(LinkError),
}

#[derive(Debug, Default)]
struct Lanes {
    lanes: Vec<Lane>,
    quit: bool,
}

/// The loaders of all devices that are streamed.
#[derive(Debug, Default)]
pub(super) struct Loaders {
    lanes: Mutex<Lanes>,
    /// To the loaders.
    orders: Condvar,
    /// To the receiver.
    news: Condvar,
}

/// What a loader is to do.
enum Work {
    Chunk(Vec<u8>),
    Finish,
    Quit,
}

/// Ends the loaders when it is dropped, each after what it is doing.
pub(super) struct QuitOnDrop<'a>(&'a Loaders);

impl Drop for QuitOnDrop<'_> {
    fn drop(&mut self) {
        self.0.lanes.lock().quit = true;
        self.0.orders.notify_all();
    }
}

impl Loaders {
    pub(super) fn quit_on_drop(&self) -> QuitOnDrop<'_> {
        QuitOnDrop(self)
    }

    /// Starts a loader for the sink of the device at `index`. Its thread inherits the caller's
    /// system-call filter.
    pub(super) fn start<'scope, 'env>(
        &'env self,
        scope: &'scope Scope<'scope, 'env>,
        index: usize,
        sink: &'env mut dyn StateSink,
    ) -> std::io::Result<()> {
        let place = {
            let mut lanes = self.lanes.lock();
            lanes.lanes.push(Lane {
                index,
                ..Lane::default()
            });
            lanes.lanes.len().saturating_sub(1)
        };
        let thread = std::thread::Builder::new().name("migrate-load".into());
        thread
            .spawn_scoped(scope, move || self.run(place, sink))
            .map(drop)
    }

    fn run(&self, place: usize, sink: &mut dyn StateSink) {
        loop {
            match self.next(place) {
                Work::Quit => return,
                Work::Chunk(payload) => {
                    let began = Instant::now();
                    // The receiver has looked at it.
                    let data = chunk_open(&payload).map_or(&[][..], |(_, data)| data);
                    let taken = sink.write(data);
                    self.done(place, began, |lane| {
                        lane.busy = false;
                        lane.spare.push(payload);
                        lane.fail("taking its state", taken);
                    });
                }
                Work::Finish => {
                    let began = Instant::now();
                    let loaded = sink.finish_load();
                    return self.done(place, began, |lane| {
                        lane.loaded = loaded.is_ok();
                        lane.fail("loading its state", loaded);
                    });
                }
            }
        }
    }

    fn next(&self, place: usize) -> Work {
        let mut lanes = self.lanes.lock();
        loop {
            let Lanes { lanes: all, quit } = &mut *lanes;
            let Some(lane) = all.get_mut(place).filter(|_| !*quit) else {
                return Work::Quit;
            };
            if lane.failure.is_none() {
                if let Some(payload) = lane.queue.pop_front() {
                    lane.busy = true;
                    return Work::Chunk(payload);
                }
                if lane.finish {
                    return Work::Finish;
                }
            }
            self.orders.wait(&mut lanes);
        }
    }

    fn done(&self, place: usize, began: Instant, change: impl FnOnce(&mut Lane)) {
        let took = began.elapsed();
        if let Some(lane) = self.lanes.lock().lanes.get_mut(place) {
            lane.took = lane.took.saturating_add(took);
            change(lane);
        }
        self.news.notify_all();
    }

    /// Has the device at `index` take in the chunk that is `payload`, for which there is an empty
    /// buffer afterwards. Waits for room.
    pub(super) fn push(
        &self,
        index: usize,
        payload: &mut Vec<u8>,
        link: &Link,
    ) -> Result<(), Stopped> {
        self.wait(link, |lanes| {
            let own = lanes.iter().find(|lane| lane.index == index);
            own.is_some_and(|lane| lane.queue.len() >= DEPTH)
        })?;
        if let Some(lane) = self.lane(&mut self.lanes.lock().lanes, index) {
            let spare = lane.spare.pop().unwrap_or_default();
            lane.queue.push_back(std::mem::replace(payload, spare));
        }
        self.orders.notify_all();
        Ok(())
    }

    /// Has the device at `index` load once it has taken in all.
    pub(super) fn finish(&self, index: usize) {
        if let Some(lane) = self.lane(&mut self.lanes.lock().lanes, index) {
            lane.finish = true;
        }
        self.orders.notify_all();
    }

    /// Waits until every device has taken in what there is of it.
    pub(super) fn wait_taken(&self, link: &Link) -> Result<(), Stopped> {
        self.wait(link, |lanes| {
            lanes.iter().any(|lane| lane.busy || !lane.queue.is_empty())
        })
    }

    /// Waits until every device before `index` has loaded; all of them have been told to.
    pub(super) fn wait_loaded(&self, index: usize, link: &Link) -> Result<(), Stopped> {
        self.wait(link, |lanes| {
            let mut before = lanes.iter().filter(|lane| lane.index < index);
            before.any(|lane| !lane.loaded)
        })
    }

    /// What each device took since this was last asked.
    pub(super) fn take_times(&self) -> Vec<(usize, Duration)> {
        let mut lanes = self.lanes.lock();
        let lanes = lanes.lanes.iter_mut();
        lanes
            .map(|lane| (lane.index, std::mem::take(&mut lane.took)))
            .collect()
    }

    fn lane<'l>(&self, lanes: &'l mut [Lane], index: usize) -> Option<&'l mut Lane> {
        lanes.iter_mut().find(|lane| lane.index == index)
    }

    /// Waits as long as `more` holds, no device fails and nobody cancels.
    fn wait(&self, link: &Link, more: impl Fn(&[Lane]) -> bool) -> Result<(), Stopped> {
        let mut lanes = self.lanes.lock();
        loop {
            let failed = lanes.lanes.iter_mut().find_map(|lane| lane.failure.take());
            if let Some(failure) = failed {
                return Err(Stopped::Device(failure));
            }
            if !more(&lanes.lanes) {
                return Ok(());
            }
            link.check_cancel().map_err(Stopped::Link)?;
            self.news.wait_for(&mut lanes, LISTEN);
        }
    }
}

impl Lane {
    fn fail(&mut self, doing: &'static str, outcome: Result<(), StateError>) {
        self.failure = outcome.err().map(|cause| Failure { doing, cause });
    }
}
