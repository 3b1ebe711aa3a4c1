//! A whole migration, both sides in this process, over a unix socket pair: what memory costs.

#![expect(
    clippy::expect_used,
    reason = "a benchmark that cannot be set up has nothing to measure"
)]

use std::os::unix::net::UnixStream;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use vm_migration::MemoryHandle;
use vm_migration::migrate::{
    CancelHandle, Connection, DestinationHost, DestinationParts, Manifest, MemoryRegion,
    MigrationEvent, MigrationParams, Refusal, SourceParts, Status, destination, source,
};

#[path = "common/guest.rs"]
mod guest;

use guest::{Vcpus, memory};

const BYTES: u64 = 256 << 20;

struct Host(MemoryHandle);

impl DestinationHost for Host {
    fn prepare(&mut self, _: &Manifest) -> Result<DestinationParts, Vec<Refusal>> {
        Ok(DestinationParts {
            memory: self.0.clone(),
            sinks: Vec::new(),
            vcpus: Box::new(Vcpus),
        })
    }

    fn abort(&mut self, why: &str) {
        eprintln!("aborted: {why}");
    }
}

fn migrate(from: &MemoryHandle, to: &MemoryHandle) {
    let mut manifest = Manifest::new(4096);
    manifest.vcpus = 1;
    manifest.memory = MemoryRegion::all(&from.memory());
    let (memory, vcpus) = (from.clone(), Box::new(Vcpus));
    let mut parts = SourceParts::new(manifest, memory, Vec::new(), Vec::new(), vcpus)
        .expect("parts that fit together");
    let (a, b) = UnixStream::pair().expect("a socket pair");
    let cancel = CancelHandle::new().expect("an eventfd");
    let there = Connection::from_socket(b.into(), "source", &cancel);
    let cancel = CancelHandle::new().expect("an eventfd");
    let here = Connection::from_socket(a.into(), "destination", &cancel);
    let mut host = Host(to.clone());
    let thread = std::thread::spawn(move || {
        let mut nobody = |_: &MigrationEvent| {};
        destination::run(there, &mut host, &Status::destination(), &mut nobody).map(drop)
    });
    let mut nobody = |_: &MigrationEvent| {};
    let params = MigrationParams::default();
    source::run(&mut parts, here, &params, &Status::source(), &mut nobody).expect("it moves");
    thread.join().expect("no panic").expect("it arrives");
}

fn engine(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("migration");
    group.sample_size(10).throughput(Throughput::Bytes(BYTES));
    for (name, every) in [("data", 1), ("half-zero", 2), ("zero", u64::MAX)] {
        let (from, to) = (memory(BYTES), memory(BYTES));
        for page in (0..BYTES / 4096).filter(|page| page % every == every - 1) {
            let at = GuestAddress(page * 4096 + 2048);
            from.memory().write_obj(page | 1, at).expect("guest memory");
        }
        group.bench_function(BenchmarkId::from_parameter(name), |bench| {
            bench.iter(|| migrate(&from, &to));
        });
    }
    group.finish();
}

criterion_group!(benches, engine);
criterion_main!(benches);
