//! A server that reaches guest memory by message, because it has no file for it: what it writes is
//! in the next round of a migration, from the VMM's own log.

use std::collections::BTreeSet;
use std::os::unix::net::UnixStream;

use vfio_user::{
    ClientMemory, DeviceFlags, DmaLogDevice, DmaMapping, IrqInfo, IrqRequest, MigrationDevice,
    RegionFlags, ServerDevice,
};
use vm_migration::dirty::{Collect, GuestDirty, VmmWriteSource};
use vm_migration::memory::{Backing, RamMapping, map_ram, ram_regions};
use vm_migration::{DirtySource, Gpa};

use super::*;

/// Guest RAM: so much from 0, with nothing behind it, and as much from 4 GiB.
const RAM: u64 = 4 << 20;
const HIGH: u64 = 1 << 32;

/// A device whose one region is a letter box: what is written at an offset goes to that IOVA.
#[derive(Default)]
struct Letterbox(Option<ClientMemory>);

impl ServerDevice for Letterbox {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            flags: DeviceFlags::PCI | DeviceFlags::RESET,
            num_regions: 1,
            num_irqs: 0,
        }
    }

    fn region_info(&mut self, _index: u32) -> Result<RegionInfo, Errno> {
        Ok(RegionInfo {
            flags: RegionFlags::READ | RegionFlags::WRITE,
            size: 2 * HIGH,
            mapping: None,
        })
    }

    fn region_io_fds(&mut self, _index: u32) -> Result<Vec<IoEventFd>, Errno> {
        Ok(Vec::new())
    }

    fn irq_info(&mut self, _index: u32) -> Result<IrqInfo, Errno> {
        Err(Errno::INVAL)
    }

    fn set_irqs(&mut self, _request: IrqRequest) -> Result<(), Errno> {
        Err(Errno::INVAL)
    }

    fn region_read(&mut self, _region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.0.as_ref().ok_or(Errno::NOTCONN)?.read(offset, data)
    }

    fn region_write(&mut self, _region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        self.0.as_ref().ok_or(Errno::NOTCONN)?.write(offset, data)
    }

    fn dma_map(&mut self, _mapping: DmaMapping) -> Result<(), Errno> {
        Ok(())
    }

    fn dma_unmap(&mut self, _iova: u64, _size: u64) -> Result<(), Errno> {
        Ok(())
    }

    fn reset(&mut self) -> Result<(), Errno> {
        Ok(())
    }

    fn migration(&mut self) -> Option<&mut dyn MigrationDevice> {
        None
    }

    fn dma_log(&mut self) -> Option<&mut dyn DmaLogDevice> {
        None
    }

    fn attach(&mut self, memory: ClientMemory) {
        self.0 = Some(memory);
    }

    fn detach(&mut self) {
        self.0 = None;
    }
}

fn memory() -> MemoryHandle {
    let region = |gpa| RamMapping {
        gpa: Gpa(gpa),
        len: RAM,
        backing: Backing::Anonymous,
    };
    MemoryHandle::new(map_ram(vec![region(0), region(HIGH)]).unwrap())
}

fn connect(memory: &MemoryHandle) -> Client {
    let (ours, theirs) = UnixStream::pair().unwrap();
    std::thread::spawn(move || vfio_user::serve(theirs, &mut Letterbox::default()));
    let spawner = ThreadSpawner::unconfined();
    let config = client_config(memory.clone(), &spawner, Box::new(|_| ()));
    Client::from_stream(ours, Path::new("letterbox.sock"), config).unwrap()
}

/// What a migration would send.
struct Rounds {
    dirty: GuestDirty,
    sources: Vec<Box<dyn DirtySource>>,
}

impl Rounds {
    fn start(memory: &MemoryHandle) -> Self {
        let dirty = GuestDirty::new(&ram_regions(&memory.memory()), PageSize::SIZE_4K).unwrap();
        let mut source = VmmWriteSource::new(memory.clone());
        source.start(dirty.ranges()).unwrap();
        Self {
            dirty,
            sources: vec![Box::new(source)],
        }
    }

    fn next(&mut self) -> BTreeSet<u64> {
        let how = Collect::default();
        self.dirty.collect(&mut self.sources, how).unwrap();
        let mut pages = BTreeSet::new();
        while let Some(run) = self.dirty.next_run(u64::MAX, &mut self.sources).unwrap() {
            pages.extend((run.gpa.0..run.gpa.0 + run.len).step_by(0x1000));
        }
        self.dirty.acknowledge();
        pages
    }
}

fn refused(result: Result<(), ClientError>) -> Errno {
    match result {
        Err(ClientError::Refused { errno, .. }) => errno,
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn what_a_server_writes_by_message_is_sent_again() {
    let memory = memory();
    let client = connect(&memory);
    let all = DmaFlags::READ | DmaFlags::WRITE;
    client.dma_map(0, RAM, all, None).unwrap();
    client.dma_map(HIGH, RAM, all, None).unwrap();
    let mut rounds = Rounds::start(&memory);
    assert_eq!(rounds.next(), BTreeSet::new());

    // Within a page; over three; in the other region. The device's answer comes after its write.
    client.region_write(0, 0x5010, &[1; 8]).unwrap();
    assert_eq!(rounds.next(), [0x5000].into());
    client.region_write(0, 0x8fff, &[2; 0x1002]).unwrap();
    client.region_write(0, HIGH + RAM - 1, &[3]).unwrap();
    let expected = [0x8000, 0x9000, 0xa000, HIGH + RAM - 0x1000];
    assert_eq!(rounds.next(), expected.into());
    let mut back = [0; 0x1002];
    client.region_read(0, 0x8fff, &mut back).unwrap();
    assert_eq!(back, [2; 0x1002]);
    assert_eq!(rounds.next(), BTreeSet::new(), "to read is not to write");
}

#[test]
fn a_server_reaches_only_what_was_mapped_for_it() {
    let memory = memory();
    let client = connect(&memory);
    let mut rounds = Rounds::start(&memory);
    let write = |at: u64, len: usize| refused(client.region_write(0, at, &vec![7; len]));
    assert_eq!(write(0x1000, 8), Errno::FAULT, "nothing is mapped yet");
    client.dma_map(0, RAM, DmaFlags::READ, None).unwrap();
    assert_eq!(write(0x1000, 8), Errno::ACCESS);
    let all = DmaFlags::READ | DmaFlags::WRITE;
    client.dma_map(HIGH, RAM, all, None).unwrap();
    assert_eq!(write(HIGH + RAM - 4, 8), Errno::FAULT, "half of it");
    assert_eq!(write(HIGH - 4, 8), Errno::FAULT);
    assert_eq!(write(2 * RAM, 8), Errno::FAULT, "a hole");
    // Mapped, but no RAM: a mistake of ours, and still nothing is written.
    client.dma_map(RAM, RAM, all, None).unwrap();
    assert_eq!(write(RAM + 8, 8), Errno::FAULT);
    client.dma_unmap(HIGH, RAM).unwrap();
    assert_eq!(write(HIGH, 8), Errno::FAULT, "taken away again");
    assert_eq!(rounds.next(), BTreeSet::new());
    let mut tail = [1; 4];
    let ram = memory.memory();
    ram.read_slice(&mut tail, GuestAddress(HIGH + RAM - 4))
        .unwrap();
    assert_eq!(tail, [0; 4]);
}
