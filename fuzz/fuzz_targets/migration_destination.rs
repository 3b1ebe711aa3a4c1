//! A destination whose source says anything.
//!
//! The input is a list of frames: kind, length (u16, little endian), payload. They are sealed with
//! good checksums and numbers, which no fuzzer would find; kind 0 sends its payload as it is. The
//! destination must neither panic nor hang, must drop what it made if it fails, and may run the
//! guest only if it says so.

#![no_main]

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use libfuzzer_sys::fuzz_target;
use vm_migration::memory::{Backing, RamMapping, map_ram};
use vm_migration::migrate::frame::{FrameBuffer, Kind};
use vm_migration::migrate::{
    CancelHandle, Connection, DestinationHost, DestinationParts, Manifest, MigrationEvent, Refusal,
    Status, destination,
};
use vm_migration::{Gpa, MemoryHandle, Pause, StateError, StateSink};

/// Most bytes sent: they must fit the socket, as nobody reads while they are written.
const MOST_BYTES: usize = 64 << 10;

const REGIONS: [(u64, u64); 2] = [(0, 0x8000), (0x10_0000, 0x4000)];

struct Vcpus(Arc<AtomicBool>);

impl Pause for Vcpus {
    fn pause(&mut self) -> Result<(), StateError> {
        self.0.store(false, Ordering::Relaxed);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), StateError> {
        self.0.store(true, Ordering::Relaxed);
        Ok(())
    }
}

#[derive(PartialEq)]
enum Place {
    Fresh,
    Prepared,
    Loaded,
    Awake,
    Running,
}

struct Sink(&'static str, Place);

impl StateSink for Sink {
    fn id(&self) -> &str {
        self.0
    }

    fn is_streamed(&self) -> bool {
        self.0 == "b"
    }

    fn prepare(&mut self) -> Result<(), StateError> {
        assert!(self.1 == Place::Fresh);
        self.1 = Place::Prepared;
        Ok(())
    }

    fn write(&mut self, _: &[u8]) -> Result<(), StateError> {
        assert!(self.1 == Place::Prepared);
        Ok(())
    }

    fn finish_load(&mut self) -> Result<(), StateError> {
        assert!(self.1 == Place::Prepared);
        self.1 = Place::Loaded;
        Ok(())
    }

    fn wake(&mut self) -> Result<(), StateError> {
        assert!(self.1 == Place::Loaded);
        self.1 = Place::Awake;
        Ok(())
    }

    fn run(&mut self) -> Result<(), StateError> {
        assert!(self.1 == Place::Awake);
        self.1 = Place::Running;
        Ok(())
    }

    fn abort(&mut self) -> Result<(), StateError> {
        assert!(self.1 != Place::Fresh);
        Ok(())
    }
}

#[derive(Default)]
struct Host {
    running: Arc<AtomicBool>,
    prepared: bool,
    aborted: bool,
}

impl DestinationHost for Host {
    fn prepare(&mut self, _: &Manifest) -> Result<DestinationParts, Vec<Refusal>> {
        self.prepared = true;
        let mappings = REGIONS.map(|(gpa, len)| RamMapping {
            gpa: Gpa(gpa),
            len,
            backing: Backing::Anonymous,
        });
        Ok(DestinationParts {
            memory: MemoryHandle::new(map_ram(mappings.into()).expect("a little memory")),
            sinks: vec![
                Box::new(Sink("b", Place::Fresh)),
                Box::new(Sink("a", Place::Fresh)),
            ],
            vcpus: Box::new(Vcpus(self.running.clone())),
        })
    }

    fn abort(&mut self, _: &str) {
        assert!(self.prepared && !self.aborted);
        self.aborted = true;
    }
}

/// The frames of the input, as they go on the wire.
fn conversation(mut input: &[u8]) -> Vec<u8> {
    let mut wire = Vec::new();
    let mut sequence = 0;
    while let Some(([code, low, high], rest)) = input.split_first_chunk() {
        let length = usize::from(u16::from_le_bytes([*low, *high])).min(rest.len());
        let (payload, rest) = rest.split_at(length);
        input = rest;
        match Kind::from_code(*code) {
            None => wire.extend_from_slice(payload),
            Some(kind) => {
                let mut frame = FrameBuffer::default();
                frame.extend(payload);
                if let Ok(sealed) = frame.seal(kind, sequence) {
                    wire.extend_from_slice(sealed);
                    sequence += 1;
                }
            }
        }
        if wire.len() > MOST_BYTES {
            break;
        }
    }
    wire.truncate(MOST_BYTES);
    wire
}

fuzz_target!(|input: &[u8]| {
    let (ours, mut theirs) = UnixStream::pair().expect("a socket pair");
    theirs.write_all(&conversation(input)).expect("it fits");
    theirs.shutdown(Shutdown::Write).expect("our own socket");
    let cancel = CancelHandle::new().expect("an eventfd");
    let connection = Connection::from_socket(ours.into(), "fuzzer", &cancel);
    let mut host = Host::default();
    let mut nobody = |_: &MigrationEvent| {};
    let ran = destination::run(connection, &mut host, &Status::destination(), &mut nobody);
    assert_eq!(ran.is_ok(), host.running.load(Ordering::Relaxed));
    assert_eq!(ran.is_err() && host.prepared, host.aborted);
});
