//! Threads that read the devices' states, one for each device whose state is streamed.
//!
//! A device may take its time to give its state. So it is read ahead, by a thread of its own, into
//! a few chunks that wait for the sender: memory and the other devices go on meanwhile, and while
//! the guest stands still all devices are read at once.
//!
//! A reader does what it is ordered to and then rests. It holds its device's lock only while it
//! reads, so that the sender can have a device whose reader rests.

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::migrate::frame::FrameBuffer;
use crate::migrate::protocol::{CHUNK_BYTES, chunk_room};
use crate::state::{PrecopyRead, StateError, StateSize, StateSource};

/// Chunks of one device that are read ahead.
const DEPTH: usize = 4;

/// Fewer bytes than this do not tell how fast a device is; what it takes to begin is not its speed.
const LEAST_SAMPLE: u64 = 1 << 20;

/// A device that a reader and the sender share.
pub(super) type SharedSource = Arc<Mutex<Box<dyn StateSource>>>;

/// A piece of a device's state, as it goes into a frame.
#[derive(Debug)]
pub(super) struct Chunk {
    /// Room for a chunk, with `count` bytes of data in it.
    pub(super) frame: FrameBuffer,
    pub(super) count: usize,
}

/// What a reader is to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Order {
    /// Nothing, once the present read is over.
    Rest,
    /// Read what the device has while it runs, in pieces of at most so many bytes: as much as it
    /// says that it has now, so that one that always has more comes to an end.
    Precopy { piece: usize },
    /// Read the rest of a device that stands still.
    StopCopy,
    /// End.
    Quit,
}

/// One device's reader, as both sides of it see it.
#[derive(Debug)]
struct Lane {
    /// The device's place in the manifest.
    index: usize,
    order: Order,
    /// It has an order that is not carried out.
    busy: bool,
    ready: VecDeque<Chunk>,
    spare: Vec<FrameBuffer>,
    /// Buffers made: those ready, spare, being read into and being sent.
    buffers: usize,
    /// What was left at the end of its last turn.
    size: Option<StateSize>,
    failure: Option<StateError>,
    /// All of the state was read.
    ended: bool,
    /// Being measured: bytes read, and what that took.
    sample: (u64, Duration),
    /// The last sample that was large enough.
    measured: Option<(u64, Duration)>,
    /// What reads took since the device stands still.
    stopped_took: Duration,
}

impl Lane {
    fn new(index: usize) -> Self {
        Self {
            index,
            order: Order::Rest,
            busy: false,
            ready: VecDeque::with_capacity(DEPTH),
            spare: Vec::with_capacity(DEPTH),
            buffers: 0,
            size: None,
            failure: None,
            ended: false,
            sample: (0, Duration::ZERO),
            measured: None,
            stopped_took: Duration::ZERO,
        }
    }

    /// Bytes that were read and not yet taken by the sender.
    fn waiting(&self) -> u64 {
        let counts = self.ready.iter().map(|chunk| wide(chunk.count));
        counts.fold(0, u64::saturating_add)
    }

    /// So many bytes were read, which took so long.
    fn measure(&mut self, bytes: u64, took: Duration) {
        self.sample.0 = self.sample.0.saturating_add(bytes);
        self.sample.1 = self.sample.1.saturating_add(took);
        if self.sample.0 >= LEAST_SAMPLE {
            self.measured = Some(std::mem::take(&mut self.sample));
        }
    }

    /// How long reading so many bytes takes at the speed of late; nothing if it is not known.
    fn time_for(&self, bytes: u64) -> Duration {
        let Some((sample, took)) = self.measured else {
            return Duration::ZERO;
        };
        let nanos = took.as_nanos().saturating_mul(u128::from(bytes)) / u128::from(sample.max(1));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

#[derive(Debug)]
struct Shared {
    lanes: Mutex<Vec<Lane>>,
    /// To the readers: an order, or a buffer.
    orders: Condvar,
    /// To the sender.
    news: Condvar,
}

/// What is left to send of the devices that are streamed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Left {
    pub(super) bytes: u64,
    /// How long the slowest device takes to give its part, at its speed of late.
    pub(super) reading: Duration,
}

/// The readers of all devices that are streamed.
#[derive(Debug)]
pub(super) struct Readers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// The lane whose turn it is.
    next: usize,
}

fn wide(bytes: usize) -> u64 {
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

/// A device's number on the wire; the manifest's check holds their count far below the limit.
pub(super) fn number(index: usize) -> u16 {
    u16::try_from(index).unwrap_or(u16::MAX)
}

pub(super) fn impossible_read(id: &str) -> StateError {
    StateError::BadState {
        id: id.to_owned(),
        reason: "it says that it read more than the buffer holds".into(),
    }
}

impl Readers {
    /// No readers.
    pub(super) fn none() -> Self {
        Self {
            shared: Arc::new(Shared {
                lanes: Mutex::default(),
                orders: Condvar::new(),
                news: Condvar::new(),
            }),
            threads: Vec::new(),
            next: 0,
        }
    }

    /// Starts a reader for each of `devices` that is streamed. Their threads inherit the caller's
    /// system-call filter.
    pub(super) fn start(&mut self, devices: &[SharedSource]) -> std::io::Result<()> {
        for (index, device) in devices.iter().enumerate() {
            if !device.lock().is_streamed() {
                continue;
            }
            let place = {
                let mut lanes = self.shared.lanes.lock();
                lanes.push(Lane::new(index));
                lanes.len().saturating_sub(1)
            };
            let reader = Reader {
                shared: self.shared.clone(),
                device: device.clone(),
                place,
                index,
            };
            let thread = std::thread::Builder::new()
                .name("migrate-read".into())
                .spawn(move || reader.run())?;
            self.threads.push(thread);
        }
        Ok(())
    }

    /// Has every reader that rests read what its device has now, in pieces of at most `piece`
    /// bytes.
    pub(super) fn begin_round(&self, piece: usize) {
        self.order_where(|lane| (!lane.busy).then_some(Order::Precopy { piece }));
    }

    /// Has every reader rest, after the read it is in.
    pub(super) fn rest(&self) {
        self.order_where(|lane| lane.busy.then_some(Order::Rest));
    }

    /// Has the reader of a device that stands still read the rest.
    pub(super) fn begin_stop_copy(&self, device: usize) {
        self.order_where(|lane| (lane.index == device).then_some(Order::StopCopy));
    }

    fn order_where(&self, order: impl Fn(&Lane) -> Option<Order>) {
        for lane in self.shared.lanes.lock().iter_mut() {
            if let Some(order) = order(lane) {
                lane.busy = lane.busy || order != Order::Rest;
                lane.order = order;
            }
        }
        self.shared.orders.notify_all();
    }

    /// Whether any reader has an order that is not carried out.
    pub(super) fn is_reading(&self) -> bool {
        self.shared.lanes.lock().iter().any(|lane| lane.busy)
    }

    /// Waits until all readers rest, at most for `time`.
    pub(super) fn wait_rest(&self, time: Duration) {
        self.wait(time, |lanes| lanes.iter().any(|lane| lane.busy));
    }

    /// Waits until there is something to [`take`](Self::take) or some reader has done its work, at
    /// most for `time`.
    pub(super) fn wait_news(&self, time: Duration) {
        self.wait(time, |lanes| {
            let idle = |lane: &Lane| lane.ready.is_empty() && lane.failure.is_none();
            lanes.iter().all(idle) && lanes.iter().any(|lane| lane.busy)
        });
    }

    fn wait(&self, time: Duration, more: impl Fn(&[Lane]) -> bool) {
        let until = Instant::now() + time;
        let mut lanes = self.shared.lanes.lock();
        while more(&lanes) {
            if self.shared.news.wait_until(&mut lanes, until).timed_out() {
                return;
            }
        }
    }

    /// # Errors
    /// Of a device that failed.
    pub(super) fn check(&self) -> Result<(), StateError> {
        let mut lanes = self.shared.lanes.lock();
        let failure = lanes.iter_mut().find_map(|lane| lane.failure.take());
        failure.map_or(Ok(()), Err)
    }

    /// The next chunk that is ready, devices in turn, and whose it is.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub(super) fn take(&mut self) -> Result<Option<(usize, Chunk)>, StateError> {
        self.check()?;
        let mut lanes = self.shared.lanes.lock();
        let count = lanes.len();
        for place in (self.next..count).chain(0..self.next.min(count)) {
            let Some(lane) = lanes.get_mut(place) else {
                continue;
            };
            if let Some(chunk) = lane.ready.pop_front() {
                self.next = place.saturating_add(1);
                return Ok(Some((lane.index, chunk)));
            }
        }
        Ok(None)
    }

    /// Takes a buffer back whose chunk was sent.
    pub(super) fn give_back(&self, device: usize, frame: FrameBuffer) {
        let mut lanes = self.shared.lanes.lock();
        if let Some(lane) = lanes.iter_mut().find(|lane| lane.index == device) {
            lane.spare.push(frame);
        }
        self.shared.orders.notify_all();
    }

    /// Whether all of a device's state was read and taken.
    pub(super) fn has_ended(&self, device: usize) -> bool {
        self.shared
            .lanes
            .lock()
            .iter()
            .any(|lane| lane.index == device && lane.ended && lane.ready.is_empty())
    }

    /// Whether a device is streamed.
    pub(super) fn has(&self, device: usize) -> bool {
        let lanes = self.shared.lanes.lock();
        lanes.iter().any(|lane| lane.index == device)
    }

    /// What is left, as far as the devices have told.
    pub(super) fn left(&self) -> Left {
        let lanes = self.shared.lanes.lock();
        lanes.iter().fold(Left::default(), |left, lane| {
            let unread = lane.size.unwrap_or_default().total();
            let bytes = unread.saturating_add(lane.waiting());
            Left {
                bytes: left.bytes.saturating_add(bytes),
                reading: left.reading.max(lane.time_for(unread)),
            }
        })
    }

    /// The devices that have not sent what the destination should have before the guest stands
    /// still.
    pub(super) fn unready(&self) -> Vec<usize> {
        let lanes = self.shared.lanes.lock();
        let unready = lanes.iter().filter(|lane| {
            let known = lane.size.is_some_and(|size| size.initial_bytes == 0);
            lane.busy || !known || !lane.ready.is_empty()
        });
        unready.map(|lane| lane.index).collect()
    }

    /// How long a device took to give what it gave since it stands still.
    pub(super) fn stopped_took(&self, device: usize) -> Duration {
        let lanes = self.shared.lanes.lock();
        let lane = lanes.iter().find(|lane| lane.index == device);
        lane.map_or(Duration::ZERO, |lane| lane.stopped_took)
    }

    /// Ends all readers, each after the read it is in. Twice is once.
    pub(super) fn quit(&mut self) {
        self.order_where(|_| Some(Order::Quit));
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a reader of a device's state panicked");
            }
        }
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        self.quit();
    }
}

/// The thread's side.
struct Reader {
    shared: Arc<Shared>,
    device: SharedSource,
    /// Its lane.
    place: usize,
    /// Its device.
    index: usize,
}

impl Reader {
    fn run(&self) {
        loop {
            let outcome = match self.next_order() {
                Order::Quit => return,
                Order::Rest => Ok(()),
                Order::Precopy { piece } => self.precopy(piece),
                Order::StopCopy => self.stop_copy(),
            };
            self.change(|lane| {
                // One that nobody has seen yet stays.
                lane.failure = lane.failure.take().or(outcome.err());
                lane.busy = false;
                if lane.order != Order::Quit {
                    lane.order = Order::Rest;
                }
            });
            self.shared.news.notify_all();
        }
    }

    fn change<T: Default>(&self, change: impl FnOnce(&mut Lane) -> T) -> T {
        let mut lanes = self.shared.lanes.lock();
        lanes.get_mut(self.place).map(change).unwrap_or_default()
    }

    /// Waits on `lanes` until `found` gives something.
    fn wait<T>(&self, mut found: impl FnMut(&mut Lane) -> Option<T>, gone: T) -> T {
        let mut lanes = self.shared.lanes.lock();
        loop {
            match lanes.get_mut(self.place) {
                None => return gone,
                Some(lane) => {
                    if let Some(found) = found(lane) {
                        return found;
                    }
                }
            }
            self.shared.orders.wait(&mut lanes);
        }
    }

    fn next_order(&self) -> Order {
        let found =
            |lane: &mut Lane| (lane.busy || lane.order == Order::Quit).then_some(lane.order);
        self.wait(found, Order::Quit)
    }

    /// A buffer, once there is one; none if `order` does not hold any more.
    fn buffer(&self, order: Order) -> Option<FrameBuffer> {
        let found = |lane: &mut Lane| {
            if lane.order != order {
                return Some(None);
            }
            if let Some(frame) = lane.spare.pop() {
                return Some(Some(frame));
            }
            (lane.buffers < DEPTH).then(|| {
                lane.buffers = lane.buffers.saturating_add(1);
                Some(FrameBuffer::with_capacity(CHUNK_BYTES))
            })
        };
        self.wait(found, None)
    }

    fn device(&self) -> MutexGuard<'_, Box<dyn StateSource>> {
        self.device.lock()
    }

    /// Reads one piece with `read`; gives its bytes, 0 if there was none.
    fn piece(
        &self,
        mut frame: FrameBuffer,
        most: usize,
        stands_still: bool,
        read: impl FnOnce(&mut dyn StateSource, &mut [u8]) -> Result<usize, StateError>,
    ) -> Result<usize, StateError> {
        let room = chunk_room(&mut frame, number(self.index), most);
        let began = Instant::now();
        let count = {
            let mut device = self.device();
            match read(device.as_mut(), room)? {
                count if count > most => return Err(impossible_read(device.id())),
                count => count,
            }
        };
        let took = began.elapsed();
        self.change(|lane| {
            lane.measure(wide(count), took);
            if stands_still {
                lane.stopped_took = lane.stopped_took.saturating_add(took);
            }
            match count {
                0 => lane.spare.push(frame),
                count => lane.ready.push_back(Chunk { frame, count }),
            }
        });
        self.shared.news.notify_all();
        Ok(count)
    }

    fn precopy(&self, piece: usize) -> Result<(), StateError> {
        let mut left = self.device().size()?.precopy_bytes;
        while let Some(frame) = self.buffer(Order::Precopy { piece }) {
            let count = self.piece(frame, piece, false, |device, room| {
                Ok(match device.read_precopy(room)? {
                    PrecopyRead::Data(count) => count,
                    PrecopyRead::Empty => 0,
                })
            })?;
            left = left.saturating_sub(wide(count));
            if count == 0 || left == 0 {
                break;
            }
        }
        let size = self.device().size()?;
        self.change(|lane| lane.size = Some(size));
        Ok(())
    }

    fn stop_copy(&self) -> Result<(), StateError> {
        while let Some(frame) = self.buffer(Order::StopCopy) {
            let read = |device: &mut dyn StateSource, room: &mut [u8]| device.read_stop_copy(room);
            if self.piece(frame, CHUNK_BYTES, true, read)? == 0 {
                self.change(|lane| lane.ended = true);
                break;
            }
        }
        Ok(())
    }
}
