//! What the state of devices costs while the guest stands still: devices that give and take it at
//! a bounded rate, read and loaded one after the other or all at once, with and without pre-copy.
//!
//! Prints a table of medians. `cargo bench -p vm-migration --bench devices`; a minute.

#![expect(
    clippy::expect_used,
    reason = "a benchmark that cannot be set up has nothing to measure"
)]

use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vm_memory::GuestAddressSpace;
use vm_migration::migrate::{
    CancelHandle, Connection, DestinationHost, DestinationParts, DeviceManifest, Downtime,
    Manifest, MemoryRegion, Migratable, MigrationEvent, MigrationParams, Refusal, SourceParts,
    Status, destination, source,
};
use vm_migration::{PrecopyRead, StateError, StateSink, StateSize, StateSource};

#[path = "common/guest.rs"]
mod guest;

use guest::{Vcpus, memory};

/// RAM of the guest, in bytes: little, as it is not what is measured.
const RAM: u64 = 16 << 20;

/// Runs of each case.
const RUNS: usize = 5;

/// What is measured.
#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    devices: u16,
    /// State of each device in bytes, and the part of it that can be sent early.
    bytes: usize,
    early: usize,
    /// Bytes per second that a device gives, and takes.
    rate: u64,
    /// Whether each device has a thread of its own.
    streamed: bool,
}

/// Holds a device to its rate.
struct Pace {
    rate: u64,
    due: Option<Instant>,
}

impl Pace {
    fn pay(&mut self, bytes: usize) {
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        let cost = Duration::from_nanos(bytes.saturating_mul(1_000_000_000) / self.rate);
        let now = Instant::now();
        // A sleep that was too long is made up for.
        let from = self.due.map_or(now, |due| due.max(now - cost));
        let due = from + cost;
        self.due = Some(due);
        std::thread::sleep(due.saturating_duration_since(now));
    }
}

struct Source {
    id: String,
    case: Case,
    sent: usize,
    pace: Pace,
}

impl Source {
    fn read(&mut self, end: usize, buffer: &mut [u8]) -> usize {
        let count = end.saturating_sub(self.sent).min(buffer.len());
        self.sent += count;
        if count > 0 {
            self.pace.pay(count);
        }
        count
    }
}

fn wide(bytes: usize) -> u64 {
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

impl StateSource for Source {
    fn id(&self) -> &str {
        &self.id
    }

    fn is_streamed(&self) -> bool {
        self.case.streamed
    }

    fn size(&mut self) -> Result<StateSize, StateError> {
        let early = wide(self.case.early.saturating_sub(self.sent));
        Ok(StateSize {
            precopy_bytes: early,
            initial_bytes: early,
            stop_copy_bytes: wide(self.case.bytes - self.case.early.max(self.sent)),
        })
    }

    fn start_precopy(&mut self) -> Result<(), StateError> {
        Ok(())
    }

    fn read_precopy(&mut self, buffer: &mut [u8]) -> Result<PrecopyRead, StateError> {
        Ok(match self.read(self.case.early, buffer) {
            0 => PrecopyRead::Empty,
            count => PrecopyRead::Data(count),
        })
    }

    fn quiesce(&mut self) -> Result<(), StateError> {
        Ok(())
    }

    fn stop(&mut self) -> Result<(), StateError> {
        Ok(())
    }

    fn read_stop_copy(&mut self, buffer: &mut [u8]) -> Result<usize, StateError> {
        Ok(self.read(self.case.bytes, buffer))
    }

    fn wake(&mut self) {}

    fn abort(&mut self) -> Result<(), StateError> {
        Ok(())
    }

    fn finish(&mut self) -> Result<(), StateError> {
        Ok(())
    }
}

struct Sink {
    id: String,
    streamed: bool,
    pace: Pace,
}

impl StateSink for Sink {
    fn id(&self) -> &str {
        &self.id
    }

    fn is_streamed(&self) -> bool {
        self.streamed
    }

    fn prepare(&mut self) -> Result<(), StateError> {
        Ok(())
    }

    fn write(&mut self, chunk: &[u8]) -> Result<(), StateError> {
        self.pace.pay(chunk.len());
        Ok(())
    }

    fn finish_load(&mut self) -> Result<(), StateError> {
        Ok(())
    }

    fn wake(&mut self) -> Result<(), StateError> {
        Ok(())
    }

    fn run(&mut self) -> Result<(), StateError> {
        Ok(())
    }

    fn abort(&mut self) -> Result<(), StateError> {
        Ok(())
    }
}

struct Host(Case);

impl DestinationHost for Host {
    fn prepare(&mut self, manifest: &Manifest) -> Result<DestinationParts, Vec<Refusal>> {
        let sink = |device: &DeviceManifest| {
            Box::new(Sink {
                id: device.id.clone(),
                streamed: self.0.streamed,
                pace: Pace {
                    rate: self.0.rate,
                    due: None,
                },
            }) as Box<dyn StateSink>
        };
        Ok(DestinationParts {
            memory: memory(RAM),
            sinks: manifest.devices.iter().map(sink).collect(),
            vcpus: Box::new(Vcpus),
        })
    }

    fn abort(&mut self, why: &str) {
        eprintln!("aborted: {why}");
    }
}

fn migrate(case: Case) -> Downtime {
    let memory = memory(RAM);
    let mut manifest = Manifest::new(4096);
    manifest.vcpus = 1;
    manifest.memory = MemoryRegion::all(&memory.memory());
    let mut devices = Vec::new();
    for number in 0..case.devices {
        let id = format!("device{number}");
        manifest.devices.push(DeviceManifest {
            id: id.clone(),
            kind: "bench".to_owned(),
            compat: BTreeMap::new(),
            migratable: Migratable::Yes,
            max_state_bytes: u64::MAX,
        });
        devices.push(Box::new(Source {
            id,
            case,
            sent: 0,
            pace: Pace {
                rate: case.rate,
                due: None,
            },
        }) as Box<dyn StateSource>);
    }
    let mut parts = SourceParts::new(manifest, memory, Vec::new(), devices, Box::new(Vcpus))
        .expect("parts that fit together");
    let (a, b) = UnixStream::pair().expect("a socket pair");
    let cancel = CancelHandle::new().expect("an eventfd");
    let there = Connection::from_socket(b.into(), "source", &cancel);
    let cancel = CancelHandle::new().expect("an eventfd");
    let here = Connection::from_socket(a.into(), "destination", &cancel);
    let mut host = Host(case);
    let thread = std::thread::spawn(move || {
        let mut nobody = |_: &MigrationEvent| {};
        destination::run(there, &mut host, &Status::destination(), &mut nobody).map(drop)
    });
    let mut nobody = |_: &MigrationEvent| {};
    // It moves once the early data is there, whatever the downtime.
    let params = MigrationParams {
        downtime_ms: 3_600_000,
        ..MigrationParams::default()
    };
    let moved = source::run(&mut parts, here, &params, &Status::source(), &mut nobody);
    thread.join().expect("no panic").expect("it arrives");
    moved.expect("it moves").downtime
}

fn median(case: Case) -> u64 {
    let mut totals: Vec<u64> = (0..RUNS).map(|_| migrate(case).total / 1000).collect();
    totals.sort_unstable();
    let middle = totals.get(RUNS / 2).copied().unwrap_or_default();
    println!("{:<44} {middle:>6} ms  of {totals:?}", case.name);
    middle
}

/// Tenths, for people.
fn tenths(part: u64, whole: u64) -> String {
    let tenths = part.saturating_mul(10) / whole.max(1);
    format!("{}.{}", tenths / 10, tenths % 10)
}

fn main() {
    const MIB: usize = 1 << 20;
    let one = Case {
        name: "1 device of 256 MiB at 1 GiB/s",
        devices: 1,
        bytes: 256 * MIB,
        early: 0,
        rate: 1 << 30,
        streamed: true,
    };
    let early = Case {
        name: "  the same, 240 MiB of it by pre-copy",
        early: 240 * MIB,
        ..one
    };
    let (without, with) = (median(one), median(early));
    println!(
        "  downtime with pre-copy is {} %",
        with * 100 / without.max(1)
    );
    for (rate, together, apart) in [
        (
            256 << 20,
            "4 devices of 32 MiB at 256 MiB/s, together",
            "  the same, one after the other",
        ),
        (
            1 << 30,
            "4 devices of 32 MiB at 1 GiB/s, together",
            "  the same, one after the other",
        ),
    ] {
        let case = Case {
            name: together,
            devices: 4,
            bytes: 32 * MIB,
            early: 0,
            rate,
            streamed: true,
        };
        let serial = Case {
            name: apart,
            streamed: false,
            ..case
        };
        let (together, apart) = (median(case), median(serial));
        println!("  together is {} times as fast", tenths(apart, together));
    }
}
