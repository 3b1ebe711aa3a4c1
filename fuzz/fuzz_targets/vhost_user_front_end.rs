//! Answers of a hostile vhost-user backend: every operation of the card ends, what it tells the
//! driver keeps to the specification, and a lost backend is never taken for one that logged.

#![no_main]

use std::fmt;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use arbitrary::{Arbitrary, Unstructured};
use devices::ThreadSpawner;
use libfuzzer_sys::fuzz_target;
use virtio_devices::queue::{Queue, QueuePosition, QueueSetup};
use virtio_devices::{
    Activation, ActiveQueue, DeviceInterrupt, VhostUserNet, VhostUserOptions, VirtioDevice,
};
use vm_migration::memory::{Backing, MemoryHandle, RamMapping, map_ram};
use vm_migration::{DirtySource, Gpa, Iova, IovaBitmap, IovaRange, PageSize};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Bytes of guest memory.
const RAM: u64 = 1 << 20;
/// Queue pairs of the card.
const PAIRS: u16 = 2;

/// One answer: like the right one but for what is given here.
#[derive(Arbitrary, Debug)]
struct Answer {
    request: Option<u32>,
    flags: Option<u32>,
    size: Option<u32>,
    payload: Option<Vec<u8>>,
    hangs_up: bool,
}

/// What a backend that behaves answers; nothing if it needs no answer.
fn right_answer(request: u32, flags: u32, body: &[u8]) -> Option<Vec<u8>> {
    let number = |value: u64| Some(value.to_ne_bytes().to_vec());
    match request {
        // All features, the log and VIRTIO_F_VERSION_1 among them.
        1 => number(u64::MAX),
        15 => number(u64::MAX),
        17 => number(PAIRS.into()),
        6 => Some(Vec::new()),
        11 => Some(body.to_vec()),
        24 => Some([body.get(..12)?, &[0; 10], &1500_u16.to_le_bytes()].concat()),
        _ if flags & 8 != 0 => number(0),
        _ => None,
    }
}

fn serve(mut stream: UnixStream, answers: Vec<Answer>) {
    let mut answers = answers.into_iter();
    loop {
        let mut header = [0; 12];
        if stream.read_exact(&mut header).is_err() {
            return;
        }
        let [request, flags, size] =
            [0, 4, 8].map(|at| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap()));
        let mut body = vec![0; usize::try_from(size).unwrap()];
        if stream.read_exact(&mut body).is_err() {
            return;
        }
        let Some(right) = right_answer(request, flags, &body) else {
            continue;
        };
        // When no more are given, it behaves.
        let wrong = answers.next();
        let (mut head, mut payload) = ((request, 5, None), right);
        if let Some(answer) = wrong {
            if answer.hangs_up {
                return;
            }
            head = (
                answer.request.unwrap_or(request),
                answer.flags.unwrap_or(5),
                answer.size,
            );
            payload = answer.payload.unwrap_or(payload);
        }
        let size = head.2.unwrap_or(u32::try_from(payload.len()).unwrap());
        let mut out: Vec<u8> = [head.0, head.1, size]
            .iter()
            .flat_map(|word| word.to_ne_bytes())
            .collect();
        out.extend_from_slice(&payload);
        if stream.write_all(&out).is_err() {
            return;
        }
    }
}

/// Takes what is told, and does nothing.
struct Deaf;

impl DeviceInterrupt for Deaf {
    fn queue_used(&self, _: u16) {}
    fn queue_event(&self, _: u16) -> Option<EventFd> {
        None
    }
    fn config_changed(&self) {}
    fn needs_reset(&self, reason: &dyn fmt::Display) {
        assert!(!reason.to_string().is_empty());
    }
}

fn memory() -> MemoryHandle {
    let file = rustix::fs::memfd_create("fuzz", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, RAM).unwrap();
    let ram = RamMapping {
        gpa: Gpa(0),
        len: RAM,
        backing: Backing::File {
            file: file.into(),
            offset: 0,
        },
    };
    MemoryHandle::new(map_ram(vec![ram]).unwrap())
}

fn queues(memory: &MemoryHandle) -> Vec<ActiveQueue> {
    use vm_memory::GuestAddressSpace;
    (0..=PAIRS * 2)
        .map(|index| {
            let base = 0x1_0000 * u64::from(index + 1);
            let setup = QueueSetup {
                size: 16,
                descriptors: base,
                available: base + 0x1000,
                used: base + 0x2000,
                event_idx: false,
                indirect: false,
            };
            let position = QueuePosition::default();
            ActiveQueue {
                queue: Queue::new(index, setup, position, &memory.memory()).unwrap(),
                kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            }
        })
        .collect()
}

/// The life of a card.
fn live(mut card: VhostUserNet, lost: &AtomicBool) {
    let spawner = ThreadSpawner::unconfined();
    let memory = memory();
    let all = IovaRange::new(Iova(0), RAM).unwrap();
    let handle = card.handle();
    let mut source = handle.dirty_source(&memory).ok();
    let mut mtu = [0; 2];
    card.read_config(10, &mut mtu);
    let told = card.features() & 8 != 0;
    assert!(!told || u16::from_le_bytes(mtu) >= 68);
    for round in 0..3 {
        let activation = Activation {
            memory: memory.clone(),
            queues: queues(&memory),
            interrupt: Arc::new(Deaf),
            features: card.features(),
            spawner: spawner.clone(),
        };
        if card.activate(activation).is_err() {
            card.reset();
            continue;
        }
        if let Some(source) = &mut source {
            if round != 1 {
                let _ = source.start(&[all]);
            }
            let was_lost = lost.load(Ordering::SeqCst);
            let mut bitmap = IovaBitmap::over(all, PageSize::SIZE_4K).unwrap();
            assert!(!was_lost || source.report(all, &mut bitmap).is_err());
            if round == 1 {
                let _ = source.stop();
            }
        }
        let queues = card.deactivate().unwrap();
        assert_eq!(queues.len(), usize::from(PAIRS * 2 + 1));
        let was_lost = lost.load(Ordering::SeqCst);
        assert!(!was_lost || card.save().is_err());
    }
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Unstructured::new(bytes);
    let Ok(answers) = input.arbitrary::<Vec<Answer>>() else {
        return;
    };
    let (ours, theirs) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || serve(theirs, answers));
        let options = VhostUserOptions {
            id: "fuzz".into(),
            socket: PathBuf::from("fuzz.sock"),
            mac: [2, 0, 0, 0, 0, 1],
            mtu: None,
            pairs: PAIRS,
            queue_size: 16,
        };
        let lost = Arc::new(AtomicBool::new(false));
        let tell = Arc::clone(&lost);
        let on_lost = Box::new(move |_: &str| tell.store(true, Ordering::SeqCst));
        // A size that promises more than comes costs this much.
        let limit = Duration::from_millis(20);
        let spawner = ThreadSpawner::unconfined();
        if let Ok(card) = VhostUserNet::over(options, ours, limit, &spawner, on_lost) {
            live(card, &lost);
        }
    });
});
