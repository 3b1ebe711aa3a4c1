//! Backends that answer wrongly, late or not at all.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use parking_lot::Mutex;
use proptest::prelude::*;
use vm_migration::{DirtySource, Iova, IovaRange, Pause, SaveRestore};
use zerocopy::FromBytes;

use super::*;
use crate::testing::RAM;
use crate::vhost_user::message::{F_LOG_ALL, Header, NEED_REPLY, REPLY, VERSION, protocol};

/// What operations may take here, long enough for a loaded machine.
const LIMIT: Duration = Duration::from_millis(1500);
/// What they may take where a peer lets it pass.
const SHORT: Duration = Duration::from_millis(400);

/// How a peer goes wrong.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Fault {
    /// It hangs up.
    Close,
    /// It says nothing.
    Silence,
    /// It sends a byte now and then.
    Drip,
    /// It answers another request.
    WrongRequest,
    /// Its answer is no reply.
    NoReply,
    /// Its answer has another size than it should.
    Size(u32),
    /// It answers with these bytes.
    Bytes(Vec<u8>),
}

/// A backend by hand: does all right but for `fault` at the request of number `at`.
struct Peer {
    fault: Fault,
    at: usize,
    requests: Arc<AtomicUsize>,
    /// It has gone wrong.
    struck: Arc<AtomicBool>,
}

/// What a backend that behaves answers to `header` and `body`; nothing if it needs no answer.
fn answer(header: Header, body: &[u8]) -> Option<Vec<u8>> {
    let number = |value: u64| Some(value.to_ne_bytes().to_vec());
    match header.request {
        1 => number(F_PROTOCOL_FEATURES | F_LOG_ALL | feature::VERSION_1 | features::MTU),
        15 => number(protocol::KNOWN),
        17 => number(2),
        // As DPDK does.
        6 => Some(Vec::new()),
        11 => Some(body.to_vec()),
        24 => Some([&body[..12], &[0; 10], &1500_u16.to_le_bytes()].concat()),
        _ if header.flags & NEED_REPLY != 0 => number(0),
        _ => None,
    }
}

impl Peer {
    fn run(self, mut stream: UnixStream) {
        loop {
            let mut bytes = [0; size_of::<Header>()];
            if stream.read_exact(&mut bytes).is_err() {
                return;
            }
            let header = Header::read_from_bytes(&bytes).unwrap();
            let mut body = vec![0; header.size as usize];
            if stream.read_exact(&mut body).is_err() {
                return;
            }
            let number = self.requests.fetch_add(1, Ordering::SeqCst);
            let Some(payload) = answer(header, &body) else {
                continue;
            };
            let mut reply = Header {
                request: header.request,
                flags: VERSION | REPLY,
                size: u32::try_from(payload.len()).unwrap(),
            };
            if number == self.at {
                self.struck.store(true, Ordering::SeqCst);
                match &self.fault {
                    Fault::Close => return,
                    Fault::Silence => continue,
                    Fault::Drip => {
                        for byte in [reply.as_bytes(), &payload].concat() {
                            std::thread::sleep(SHORT / 8);
                            if stream.write_all(&[byte]).is_err() {
                                return;
                            }
                        }
                        continue;
                    }
                    Fault::WrongRequest => reply.request += 1,
                    Fault::NoReply => reply.flags = VERSION,
                    Fault::Size(size) => reply.size = *size,
                    Fault::Bytes(bytes) => {
                        if stream.write_all(bytes).is_err() {
                            return;
                        }
                        continue;
                    }
                }
            }
            if stream
                .write_all(&[reply.as_bytes(), &payload].concat())
                .is_err()
            {
                return;
            }
        }
    }
}

/// What became of a card.
#[derive(Debug, Default)]
struct Outcome {
    /// Requests that the peer got.
    requests: usize,
    /// Whether the peer went wrong; it does not if the request needs no answer.
    struck: bool,
    /// Whether anything failed.
    failed: bool,
    /// Whether its maker was told that the backend is lost.
    told: bool,
    /// What the making of the card failed with.
    error: Option<String>,
}

/// The whole life of a card with a peer that has `fault` at its request of number `at`. Ends soon,
/// whatever the peer does.
fn live(fault: Fault, at: usize, limit: Duration) -> Outcome {
    let (requests, struck) = (Arc::default(), Arc::default());
    let peer = Peer {
        fault,
        at,
        requests: Arc::clone(&requests),
        struck: Arc::clone(&struck),
    };
    let (ours, theirs) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || peer.run(theirs));
    let told = Arc::new(AtomicBool::new(false));
    let tell = Arc::clone(&told);
    let on_lost = Box::new(move |reason: &str| {
        assert!(!reason.is_empty());
        tell.store(true, Ordering::SeqCst);
    });
    let options = VhostUserOptions {
        mtu: None,
        ..options(2)
    };
    let spawner = ThreadSpawner::unconfined();
    let mut outcome = Outcome::default();
    match VhostUserNet::over(options, ours, limit, &spawner, on_lost) {
        Ok(net) => outcome.failed = use_it(net),
        Err(error) => {
            outcome.failed = true;
            outcome.error = Some(ErrorChain(&error).to_string());
        }
    }
    thread.join().unwrap();
    outcome.struck = struck.load(Ordering::SeqCst);
    outcome.requests = requests.load(Ordering::SeqCst);
    outcome.told = told.load(Ordering::SeqCst);
    outcome
}

/// Does everything with a card; whether something failed.
fn use_it(net: VhostUserNet) -> bool {
    let memory = shared_memory();
    let handle = net.handle();
    let device = pci_device(net, &memory, &Arc::default());
    let mut driver = Driver::new(device, &memory);
    let mut failed = false;
    let all = IovaRange::new(Iova(0), RAM).unwrap();
    driver.bring_up_unserved(features::MQ | features::CTRL_VQ, &[256, 256, 256, 256, 64]);
    failed |= driver.device.is_broken();
    match handle.dirty_source(&memory) {
        Ok(mut source) => {
            failed |= source.start(&[all]).is_err();
            let mut bitmap = vm_migration::IovaBitmap::over(all, vm_migration::PageSize::SIZE_4K);
            failed |= source.report(all, bitmap.as_mut().unwrap()).is_err();
            failed |= driver.device.pause().is_err();
            failed |= driver.device.save().is_err();
            failed |= driver.device.resume().is_err();
            failed |= source.stop().is_err();
        }
        Err(_) => failed = true,
    }
    driver.bring_up_unserved(0, &[256; 2]);
    failed | driver.device.is_broken()
}

#[track_caller]
fn check(outcome: &Outcome, fault: &Fault, at: usize) {
    assert_eq!(
        outcome.failed, outcome.struck,
        "{fault:?} at {at}: {outcome:?}"
    );
    let known = outcome.told || outcome.error.is_some();
    assert_eq!(known, outcome.struck, "{fault:?} at {at}: {outcome:?}");
}

#[test]
fn a_peer_that_behaves_is_taken() {
    let outcome = live(Fault::Close, usize::MAX, LIMIT);
    assert!(!outcome.failed && !outcome.told, "{outcome:?}");
    assert!(outcome.requests > 80, "{outcome:?}");
}

#[test]
fn any_fault_at_any_request_ends_in_an_error() {
    let requests = live(Fault::Close, usize::MAX, LIMIT).requests;
    let faults = [
        Fault::Close,
        Fault::WrongRequest,
        Fault::NoReply,
        Fault::Size(7),
        Fault::Size(u32::MAX),
        Fault::Bytes(vec![0; 64]),
        Fault::Bytes(vec![0xff; 64]),
    ];
    std::thread::scope(|scope| {
        for fault in faults {
            scope.spawn(move || {
                for at in 0..requests {
                    check(&live(fault.clone(), at, LIMIT), &fault, at);
                }
            });
        }
    });
}

#[test]
fn silence_and_dripping_are_bounded() {
    let requests = live(Fault::Close, usize::MAX, LIMIT).requests;
    std::thread::scope(|scope| {
        for fault in [Fault::Silence, Fault::Drip] {
            for at in (0..requests).step_by(7) {
                let fault = fault.clone();
                scope.spawn(move || {
                    let started = Instant::now();
                    check(&live(fault.clone(), at, SHORT), &fault, at);
                    // One operation waits for its limit; a peer that drips ends when it is hung up
                    // on.
                    assert!(started.elapsed() < SHORT * 10, "{fault:?} at {at}");
                });
            }
        }
    });
    let outcome = live(Fault::Silence, 0, SHORT);
    assert!(
        outcome
            .error
            .unwrap()
            .contains("did not answer GET_FEATURES within 400ms")
    );
}

#[test]
fn a_refusal_is_told_and_the_connection_lives_on() {
    // SET_FEATURES of the first activation.
    let refusal = Header {
        request: 2,
        flags: VERSION | REPLY,
        size: 8,
    };
    let bytes = [refusal.as_bytes(), &5_u64.to_ne_bytes()].concat();
    let first = (0..30).find(|at| {
        let outcome = live(Fault::Bytes(bytes.clone()), *at, LIMIT);
        outcome.failed && !outcome.told && outcome.error.is_none()
    });
    assert!(first.is_some());
}

#[test]
fn what_is_not_offered_is_named() {
    let good = F_PROTOCOL_FEATURES | feature::VERSION_1;
    for (features, protocol, queues, pairs, told) in [
        (
            feature::VERSION_1,
            0,
            0,
            1,
            "VHOST_USER_F_PROTOCOL_FEATURES",
        ),
        (F_PROTOCOL_FEATURES, 0, 0, 1, "VIRTIO_F_VERSION_1"),
        (good, 0, 0, 2, "VHOST_USER_PROTOCOL_F_MQ"),
        (
            good,
            protocol::MQ,
            1,
            2,
            "2 queue pairs asked for, the backend has 1 queues",
        ),
    ] {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let answers = Mutex::new(vec![queues, protocol, features]);
        let thread = std::thread::spawn(move || {
            let mut bytes = [0; size_of::<Header>()];
            while theirs.read_exact(&mut bytes).is_ok() {
                let header = Header::read_from_bytes(&bytes).unwrap();
                theirs
                    .read_exact(&mut vec![0; header.size as usize])
                    .unwrap();
                if matches!(header.request, 1 | 15 | 17) {
                    let value: u64 = answers.lock().pop().unwrap();
                    let reply = Header {
                        request: header.request,
                        flags: VERSION | REPLY,
                        size: 8,
                    };
                    let bytes = [reply.as_bytes(), &value.to_ne_bytes()].concat();
                    theirs.write_all(&bytes).unwrap();
                }
            }
        });
        let spawner = ThreadSpawner::unconfined();
        let made = VhostUserNet::over(options(pairs), ours, LIMIT, &spawner, Box::new(|_| ()));
        let error = made.map(drop).unwrap_err().to_string();
        assert!(error.contains(told), "{error}");
        thread.join().unwrap();
    }
}

#[test]
fn a_backend_that_takes_no_connection_is_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("full.sock");
    let address = rustix::net::SocketAddrUnix::new(&path).unwrap();
    let listener = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    rustix::net::bind(&listener, &address).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let _first = connection::connect(&path, LIMIT).unwrap();
    let started = Instant::now();
    assert!(connection::connect(&path, SHORT).is_err());
    assert!(started.elapsed() < SHORT * 10);
}

#[test]
fn a_backend_without_configuration_tells_no_mtu() {
    let nothing = Header {
        request: 24,
        flags: VERSION | REPLY,
        size: 0,
    };
    let bytes = nothing.as_bytes().to_vec();
    let taken = (0..10).any(|at| {
        let outcome = live(Fault::Bytes(bytes.clone()), at, LIMIT);
        outcome.struck && !outcome.failed
    });
    assert!(taken);
}

/// A backend that does all right, but refuses the requests of which `refuses` says so.
fn obey(mut stream: UnixStream, mut refuses: impl FnMut(u32, &[u8]) -> bool) {
    let mut bytes = [0; size_of::<Header>()];
    while stream.read_exact(&mut bytes).is_ok() {
        let header = Header::read_from_bytes(&bytes).unwrap();
        let mut body = vec![0; header.size as usize];
        stream.read_exact(&mut body).unwrap();
        let Some(mut payload) = answer(header, &body) else {
            continue;
        };
        if refuses(header.request, &body) {
            payload = 7_u64.to_ne_bytes().to_vec();
        }
        let reply = Header {
            request: header.request,
            flags: VERSION | REPLY,
            size: u32::try_from(payload.len()).unwrap(),
        };
        stream
            .write_all(&[reply.as_bytes(), &payload].concat())
            .unwrap();
    }
}

/// A card without a driver before a backend that refuses what `refuses` says.
fn card_refused(
    pairs: u16,
    refuses: impl FnMut(u32, &[u8]) -> bool + Send + 'static,
) -> (Card, std::thread::JoinHandle<()>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let backend = std::thread::spawn(move || obey(theirs, refuses));
    let memory = shared_memory();
    let spawner = ThreadSpawner::unconfined();
    let net = VhostUserNet::over(options(pairs), ours, LIMIT, &spawner, Box::new(|_| ())).unwrap();
    let (handle, fabric) = (net.handle(), Arc::default());
    let device = pci_device(net, &memory, &fabric);
    let card = Card {
        driver: Driver::new(device, &memory),
        rings: Vec::new(),
        fabric,
        handle,
    };
    (card, backend)
}

/// A pair that cannot be enabled is not in use, and the driver is told.
#[test]
fn a_refused_pair_stays_disabled() {
    let enabled = Arc::new(Mutex::new([false; 4]));
    let noted = Arc::clone(&enabled);
    let (mut card, backend) = card_refused(2, move |request, body| {
        if request != Request::SetVringEnable.code() {
            return false;
        }
        let refused = (body[0], body[4]) == (3, 1);
        if !refused {
            noted.lock()[usize::from(body[0])] = body[4] == 1;
        }
        refused
    });
    let features = features::MQ | features::CTRL_VQ;
    card.rings = card.driver.bring_up(features, &[256, 256, 256, 256, 64]);
    assert_eq!(*enabled.lock(), [true, true, false, false]);
    assert_eq!(card.command(4, &[4, 0, 2, 0]), 1);
    assert_eq!(*enabled.lock(), [true, true, false, false]);
    drop(card);
    backend.join().unwrap();
}

#[test]
fn a_backend_announces_for_a_driver_that_cannot() {
    for refuses in [false, true] {
        let announced = Arc::new(Mutex::new(Vec::new()));
        let rarp = move |told: &Mutex<Vec<Vec<u8>>>, request, body: &[u8]| {
            let is = request == Request::SendRarp.code();
            if is {
                told.lock().push(body.to_vec());
            }
            is && refuses
        };
        let told = Arc::clone(&announced);
        let (mut here, first) = card_refused(1, move |request, body| rarp(&told, request, body));
        here.driver.bring_up(0, &[256, 256]);
        here.driver.device.pause().unwrap();
        let state = here.driver.device.save().unwrap();
        // Who stays has nothing to announce.
        here.driver.device.resume().unwrap();
        assert_eq!(*announced.lock(), [[0; 0]; 0]);

        let told = Arc::clone(&announced);
        let (mut there, second) = card_refused(1, move |request, body| rarp(&told, request, body));
        there.driver.device.restore(&state).unwrap();
        for _ in 0..2 {
            there.driver.device.resume().unwrap();
            assert_eq!(*announced.lock(), [[&MAC[..], &[0, 0]].concat()], "once");
            assert!(!there.driver.device.is_broken());
            there.driver.device.pause().unwrap();
        }
        drop((here, there));
        first.join().unwrap();
        second.join().unwrap();
    }
}

#[test]
fn an_error_of_a_ring_asks_for_a_reset() {
    let host = Host::new(1, Faults::default());
    let mut card = host.card(0, &[256, 256]);
    card.handle.session.errors.write(1).unwrap();
    wait_for("a request for a reset", || card.driver.device.is_broken());
    card.rings = card.driver.bring_up(0, &[256, 256]);
    card.post(RX, 0, 2048);
    host.send(0, &pattern(60, 1));
    card.used(RX);
    card.handle.session.errors.write(1).unwrap();
    wait_for("a request for a reset", || card.driver.device.is_broken());
    // Nobody read the count: a backend shares the eventfd, and could make a reader wait for ever.
    assert_eq!(card.handle.session.errors.read().unwrap(), 2);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_bytes_are_survived(
        at in 0_usize..100,
        bytes in proptest::collection::vec(any::<u8>(), 0..80),
    ) {
        live(Fault::Bytes(bytes), at, SHORT);
    }
}
