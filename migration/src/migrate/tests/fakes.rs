//! A guest, its devices, and a place for it to go.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use crate::addr::{Gpa, Iova, IovaRange, PageSize};
use crate::memory::{Backing, MemoryHandle, RamMapping, map_ram};
use crate::source::{Clearing, DirtyError, DirtySource, Precision, Reported};
use crate::state::{Pause, PrecopyRead, StateError, StateSink, StateSize, StateSource};
use iova_bitmap::IovaBitmap;

/// The guest's RAM: two regions with a hole.
pub(super) const REGIONS: [(u64, u64); 2] = [(0, 3 << 20), (1 << 32, 5 << 20)];
pub(super) const PAGE: u64 = 4096;

pub(super) fn new_memory() -> MemoryHandle {
    let mappings = REGIONS.map(|(gpa, len)| RamMapping {
        gpa: Gpa(gpa),
        len,
        backing: Backing::Anonymous,
    });
    MemoryHandle::new(map_ram(mappings.into()).unwrap())
}

/// All pages of the guest.
pub(super) fn pages() -> impl Iterator<Item = u64> {
    REGIONS
        .into_iter()
        .flat_map(|(gpa, len)| (gpa..gpa + len).step_by(4096))
}

pub(super) fn read_page(memory: &MemoryHandle, gpa: u64) -> [u8; 4096] {
    let mut page = [0; 4096];
    memory
        .memory()
        .read_slice(&mut page, GuestAddress(gpa))
        .unwrap();
    page
}

/// Pages that differ.
pub(super) fn differences(a: &MemoryHandle, b: &MemoryHandle) -> Vec<u64> {
    pages()
        .filter(|gpa| read_page(a, *gpa) != read_page(b, *gpa))
        .collect()
}

/// What parts were told, in order: who, and what.
pub(super) type Events = Arc<Mutex<Vec<(String, &'static str)>>>;

/// Where a part is told to fail.
#[derive(Clone, Default)]
pub(super) struct Failure(pub(super) Option<&'static str>);

impl Failure {
    fn check(&self, id: &str, operation: &'static str) -> Result<(), StateError> {
        if self.0 == Some(operation) {
            return Err(StateError::Failed {
                id: id.to_owned(),
                operation,
                cause: "told to".into(),
            });
        }
        Ok(())
    }
}

/// Who writes guest memory: a thread, and devices in their last moments.
#[derive(Default)]
pub(super) struct Writer {
    pending: Mutex<BTreeSet<u64>>,
    tracking: AtomicBool,
    reports: AtomicU64,
    fail_report: AtomicU64,
    lossy: AtomicBool,
    stop_thread: AtomicBool,
    paused: Mutex<bool>,
    counter: AtomicU64,
}

impl Writer {
    /// Writes one word of memory and logs it.
    pub(super) fn write(&self, memory: &MemoryHandle, gpa: u64) {
        let value = self.counter.fetch_add(1, Ordering::Relaxed) + 1;
        memory.memory().write_obj(value, GuestAddress(gpa)).unwrap();
        self.pending.lock().insert(gpa & !(PAGE - 1));
    }

    pub(super) fn pending(&self) -> BTreeSet<u64> {
        self.pending.lock().clone()
    }

    pub(super) fn is_tracking(&self) -> bool {
        self.tracking.load(Ordering::SeqCst)
    }

    /// Keeps its reports to itself: for a test of the tests.
    pub(super) fn lose_reports(&self) {
        self.lossy.store(true, Ordering::SeqCst);
    }

    /// While the guard is held the thread writes nothing.
    pub(super) fn hold_still(&self) -> parking_lot::MutexGuard<'_, bool> {
        self.paused.lock()
    }

    pub(super) fn is_paused(&self) -> bool {
        *self.paused.lock()
    }

    /// Makes the report of this number (from 1) fail.
    pub(super) fn fail_report(&self, number: u64) {
        self.fail_report.store(number, Ordering::SeqCst);
    }

    /// Writes pages all over memory until dropped, a few per millisecond.
    pub(super) fn run(self: &Arc<Self>, memory: &MemoryHandle) -> WriterThread {
        let (writer, memory) = (self.clone(), memory.clone());
        let thread = std::thread::spawn(move || {
            let all: Vec<u64> = pages().collect();
            let mut at = 12345usize;
            while !writer.stop_thread.load(Ordering::SeqCst) {
                {
                    let paused = writer.paused.lock();
                    if !*paused {
                        for _ in 0..4 {
                            at = at
                                .wrapping_mul(6364136223846793005)
                                .wrapping_add(1442695040888963407);
                            let page = all[(at >> 33) % all.len()];
                            writer.write(&memory, page + 8 * ((at as u64 >> 20) % 512));
                        }
                    }
                }
                std::thread::sleep(Duration::from_micros(500));
            }
        });
        WriterThread(self.clone(), Some(thread))
    }
}

pub(super) struct WriterThread(Arc<Writer>, Option<JoinHandle<()>>);

impl Drop for WriterThread {
    fn drop(&mut self) {
        self.0.stop_thread.store(true, Ordering::SeqCst);
        self.1.take().unwrap().join().unwrap();
    }
}

/// The writer as a dirty source.
pub(super) struct WriterSource(pub(super) Arc<Writer>);

impl DirtySource for WriterSource {
    fn id(&self) -> &str {
        "writer"
    }

    fn granularity(&self) -> PageSize {
        PageSize::SIZE_4K
    }

    fn precision(&self) -> Precision {
        Precision::Exact
    }

    fn start(&mut self, _ranges: &[IovaRange]) -> Result<(), DirtyError> {
        self.0.pending.lock().clear();
        self.0.tracking.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn report(
        &mut self,
        window: IovaRange,
        bitmap: &mut IovaBitmap,
    ) -> Result<Reported, DirtyError> {
        let number = self.0.reports.fetch_add(1, Ordering::SeqCst) + 1;
        if number == self.0.fail_report.load(Ordering::SeqCst) {
            return Err(DirtyError::backend("writer", "report", "told to"));
        }
        let mut pending = self.0.pending.lock();
        let before = pending.len();
        pending.retain(|gpa| {
            let inside = (window.first().0..=window.last().0).contains(gpa);
            if inside && !self.0.lossy.load(Ordering::SeqCst) {
                bitmap.set(Iova(*gpa), PAGE);
            }
            !inside
        });
        Ok(Reported::counted((before - pending.len()) as u64))
    }

    fn clearing(&mut self) -> Clearing<'_> {
        Clearing::AtReport
    }

    fn stop(&mut self) -> Result<(), DirtyError> {
        self.0.tracking.store(false, Ordering::SeqCst);
        Ok(())
    }
}

/// The vCPUs of the source: pausing them stops the writer.
pub(super) struct SourceVcpus(pub(super) Arc<Writer>, pub(super) Failure);

impl Pause for SourceVcpus {
    fn pause(&mut self) -> Result<(), StateError> {
        *self.0.paused.lock() = true;
        self.1.check("vcpus", "pause")
    }

    fn resume(&mut self) -> Result<(), StateError> {
        *self.0.paused.lock() = false;
        Ok(())
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) enum Mode {
    #[default]
    Running,
    Precopy,
    Quiesced,
    Stopped,
    Gone,
}

/// What a test sees of a fake device.
#[derive(Clone, Default)]
pub(super) struct DeviceView {
    pub(super) mode: Arc<Mutex<Mode>>,
}

/// A device with state that grows while the guest runs.
pub(super) struct FakeDevice {
    pub(super) id: String,
    pub(super) view: DeviceView,
    pub(super) state: Vec<u8>,
    /// The part that can be read while running.
    pub(super) precopy: usize,
    pub(super) sent: usize,
    pub(super) failure: Failure,
    /// A page it writes when it comes to rest and when it stops.
    pub(super) last_write: Option<(Arc<Writer>, MemoryHandle, u64)>,
    pub(super) streamed: bool,
    pub(super) pace: Pace,
    pub(super) events: Events,
}

/// How fast a device gives or takes its state.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pace {
    /// Each read or write.
    pub(super) each: Duration,
    /// The first of them.
    pub(super) first: Duration,
}

impl Pace {
    fn take(&mut self) {
        std::thread::sleep(std::mem::take(&mut self.first) + self.each);
    }
}

impl FakeDevice {
    fn last_write(&self, offset: u64) {
        if let Some((writer, memory, gpa)) = &self.last_write {
            writer.write(memory, gpa + offset);
        }
    }

    fn tell(&self, what: &'static str) {
        self.events.lock().push((self.id.clone(), what));
    }

    fn read(&mut self, end: usize, buffer: &mut [u8]) -> usize {
        self.pace.take();
        let rest = &self.state[self.sent.min(end)..end];
        let count = rest.len().min(buffer.len());
        buffer[..count].copy_from_slice(&rest[..count]);
        self.sent += count;
        count
    }
}

impl StateSource for FakeDevice {
    fn id(&self) -> &str {
        &self.id
    }

    fn is_streamed(&self) -> bool {
        self.streamed
    }

    fn size(&mut self) -> Result<StateSize, StateError> {
        self.failure.check(&self.id, "size")?;
        let precopy = self.precopy.saturating_sub(self.sent);
        Ok(StateSize {
            precopy_bytes: precopy as u64,
            initial_bytes: precopy as u64,
            stop_copy_bytes: (self.state.len() - self.sent - precopy) as u64,
        })
    }

    fn start_precopy(&mut self) -> Result<(), StateError> {
        *self.view.mode.lock() = Mode::Precopy;
        self.sent = 0;
        self.failure.check(&self.id, "start_precopy")
    }

    fn read_precopy(&mut self, buffer: &mut [u8]) -> Result<PrecopyRead, StateError> {
        assert_eq!(*self.view.mode.lock(), Mode::Precopy);
        self.failure.check(&self.id, "read_precopy")?;
        match self.read(self.precopy, buffer) {
            0 => Ok(PrecopyRead::Empty),
            count => Ok(PrecopyRead::Data(count)),
        }
    }

    fn quiesce(&mut self) -> Result<(), StateError> {
        assert_eq!(*self.view.mode.lock(), Mode::Precopy);
        *self.view.mode.lock() = Mode::Quiesced;
        self.tell("quiesce");
        self.last_write(0);
        self.failure.check(&self.id, "quiesce")
    }

    fn stop(&mut self) -> Result<(), StateError> {
        assert_eq!(*self.view.mode.lock(), Mode::Quiesced);
        self.last_write(PAGE);
        *self.view.mode.lock() = Mode::Stopped;
        self.tell("stop");
        self.failure.check(&self.id, "stop")
    }

    fn read_stop_copy(&mut self, buffer: &mut [u8]) -> Result<usize, StateError> {
        assert_eq!(*self.view.mode.lock(), Mode::Stopped);
        self.failure.check(&self.id, "read_stop_copy")?;
        Ok(self.read(self.state.len(), buffer))
    }

    fn wake(&mut self) {
        self.tell("wake");
        let mut mode = self.view.mode.lock();
        if *mode == Mode::Stopped {
            *mode = Mode::Quiesced;
        }
    }

    fn abort(&mut self) -> Result<(), StateError> {
        self.tell("abort");
        let before = std::mem::replace(&mut *self.view.mode.lock(), Mode::Running);
        assert_ne!(before, Mode::Stopped, "it was not woken");
        if self.failure.0 == Some("reset") {
            return Err(StateError::Reset {
                id: self.id.clone(),
                operation: "going on",
                cause: "told to".into(),
            });
        }
        self.failure.check(&self.id, "abort")
    }

    fn finish(&mut self) -> Result<(), StateError> {
        assert_eq!(*self.view.mode.lock(), Mode::Stopped);
        *self.view.mode.lock() = Mode::Gone;
        Ok(())
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) enum SinkMode {
    #[default]
    Fresh,
    Prepared,
    Loaded,
    Awake,
    Running,
    Aborted,
}

/// What a test sees of a fake sink.
#[derive(Clone, Default)]
pub(super) struct SinkView {
    pub(super) mode: Arc<Mutex<SinkMode>>,
    pub(super) state: Arc<Mutex<Vec<u8>>>,
}

pub(super) struct FakeSink {
    pub(super) id: String,
    /// How long it takes to load.
    pub(super) delay: Duration,
    pub(super) streamed: bool,
    pub(super) pace: Pace,
    pub(super) events: Events,
    pub(super) view: SinkView,
    pub(super) failure: Failure,
}

impl StateSink for FakeSink {
    fn id(&self) -> &str {
        &self.id
    }

    fn is_streamed(&self) -> bool {
        self.streamed
    }

    fn prepare(&mut self) -> Result<(), StateError> {
        *self.view.mode.lock() = SinkMode::Prepared;
        self.failure.check(&self.id, "prepare")
    }

    fn write(&mut self, chunk: &[u8]) -> Result<(), StateError> {
        assert_eq!(*self.view.mode.lock(), SinkMode::Prepared);
        self.pace.take();
        self.view.state.lock().extend_from_slice(chunk);
        self.failure.check(&self.id, "write")
    }

    fn finish_load(&mut self) -> Result<(), StateError> {
        assert_eq!(*self.view.mode.lock(), SinkMode::Prepared);
        self.events.lock().push((self.id.clone(), "load"));
        std::thread::sleep(self.delay);
        self.events.lock().push((self.id.clone(), "loaded"));
        *self.view.mode.lock() = SinkMode::Loaded;
        self.failure.check(&self.id, "finish_load")
    }

    fn wake(&mut self) -> Result<(), StateError> {
        assert_eq!(*self.view.mode.lock(), SinkMode::Loaded);
        *self.view.mode.lock() = SinkMode::Awake;
        self.events.lock().push((self.id.clone(), "wake"));
        self.failure.check(&self.id, "wake")
    }

    fn run(&mut self) -> Result<(), StateError> {
        assert_eq!(*self.view.mode.lock(), SinkMode::Awake);
        *self.view.mode.lock() = SinkMode::Running;
        self.events.lock().push((self.id.clone(), "run"));
        self.failure.check(&self.id, "run")
    }

    fn abort(&mut self) -> Result<(), StateError> {
        *self.view.mode.lock() = SinkMode::Aborted;
        self.failure.check(&self.id, "abort")
    }
}

/// The vCPUs of the destination.
pub(super) struct DestinationVcpus(pub(super) Arc<AtomicBool>, pub(super) Failure);

impl Pause for DestinationVcpus {
    fn pause(&mut self) -> Result<(), StateError> {
        self.0.store(false, Ordering::SeqCst);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), StateError> {
        self.0.store(true, Ordering::SeqCst);
        self.1.check("vcpus", "resume")
    }
}
