//! Messages of a hostile client: the server keeps every promise of `ServerDevice` to the device,
//! answers each command at most once and in order, and ends when the client is gone.

#![no_main]

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use arbitrary::{Arbitrary, Unstructured};
use libfuzzer_sys::fuzz_target;
use vfio_user::wire::{HEADER_SIZE, Header, MAX_DATA_XFER, TYPE_REPLY};
use vfio_user::{
    ArcFailure, Area, ClientMemory, DeviceFlags, DeviceInfo, DeviceState, DmaLogDevice, DmaMapping,
    Errno, IoEventFd, IrqData, IrqFlags, IrqInfo, IrqRequest, MigrationDevice, MigrationFlags,
    PrecopyInfo, RegionFlags, RegionInfo, ServerDevice, StateArc,
};
use zerocopy::{FromBytes, IntoBytes};

/// Sizes of the regions: small, none, one message and a bit, odd.
const REGIONS: [u64; 4] = [0x100, 0, (MAX_DATA_XFER + 9) as u64, 0xfff];
const IRQS: [u32; 3] = [0, 1, 70];
const PAGE: u64 = 0x1000;

/// A device that holds the server to its word.
struct Device {
    state: DeviceState,
    flags: MigrationFlags,
    logging: bool,
    mappings: BTreeMap<u64, u64>,
    attached: bool,
}

impl Device {
    fn check_access(&self, region: u32, offset: u64, len: usize) {
        let size = REGIONS[usize::try_from(region).unwrap()];
        let end = offset.checked_add(u64::try_from(len).unwrap()).unwrap();
        assert!(end <= size && len <= MAX_DATA_XFER);
    }
}

impl ServerDevice for Device {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            flags: DeviceFlags::PCI,
            num_regions: u32::try_from(REGIONS.len()).unwrap(),
            num_irqs: u32::try_from(IRQS.len()).unwrap(),
        }
    }

    fn region_info(&mut self, index: u32) -> Result<RegionInfo, Errno> {
        Ok(RegionInfo {
            flags: RegionFlags::READ,
            size: REGIONS[usize::try_from(index).unwrap()],
            mapping: None,
        })
    }

    fn region_io_fds(&mut self, index: u32) -> Result<Vec<IoEventFd>, Errno> {
        assert!(usize::try_from(index).unwrap() < REGIONS.len());
        Ok(Vec::new())
    }

    fn irq_info(&mut self, index: u32) -> Result<IrqInfo, Errno> {
        Ok(IrqInfo {
            flags: IrqFlags::EVENTFD,
            count: IRQS[usize::try_from(index).unwrap()],
        })
    }

    fn set_irqs(&mut self, request: IrqRequest) -> Result<(), Errno> {
        let total = IRQS[usize::try_from(request.index).unwrap()];
        assert!(request.start.checked_add(request.count).unwrap() <= total);
        match request.data {
            IrqData::All => {}
            IrqData::Some(which) => assert_eq!(u32::try_from(which.len()), Ok(request.count)),
            // No descriptors come with the bytes of this target.
            IrqData::EventFds(fds) => assert!(fds.is_empty()),
        }
        Ok(())
    }

    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.check_access(region, offset, data.len());
        Ok(())
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        self.check_access(region, offset, data.len());
        Ok(())
    }

    fn dma_map(&mut self, mapping: DmaMapping) -> Result<(), Errno> {
        assert!(mapping.size > 0 && !mapping.flags.is_empty());
        mapping.iova.checked_add(mapping.size - 1).unwrap();
        self.mappings.insert(mapping.iova, mapping.size);
        Ok(())
    }

    fn dma_unmap(&mut self, iova: u64, size: u64) -> Result<(), Errno> {
        match self.mappings.get(&iova) {
            Some(mapped) if *mapped == size => {
                self.mappings.remove(&iova);
                Ok(())
            }
            _ => Err(Errno::NOENT),
        }
    }

    fn reset(&mut self) -> Result<(), Errno> {
        self.state = DeviceState::Running;
        Ok(())
    }

    fn migration(&mut self) -> Option<&mut dyn MigrationDevice> {
        (!self.flags.is_empty()).then_some(self)
    }

    fn dma_log(&mut self) -> Option<&mut dyn DmaLogDevice> {
        Some(self)
    }

    fn attach(&mut self, _memory: ClientMemory) {
        assert!(!self.attached);
        self.attached = true;
    }

    fn detach(&mut self) {
        self.attached = false;
    }
}

impl MigrationDevice for Device {
    fn flags(&self) -> MigrationFlags {
        self.flags
    }

    fn arc(&mut self, arc: StateArc) -> Result<(), ArcFailure> {
        let (from, to) = arc.ends();
        assert_eq!(from, self.state, "arcs follow each other");
        assert!(arc.exists_with(self.flags), "{arc} with {:?}", self.flags);
        self.state = to;
        Ok(())
    }

    fn read_data(&mut self, data: &mut [u8]) -> Result<usize, Errno> {
        assert!(self.state.is_saving() && data.len() <= MAX_DATA_XFER);
        Ok(data.len() / 2)
    }

    fn write_data(&mut self, data: &[u8]) -> Result<(), Errno> {
        assert!(self.state == DeviceState::Resuming && data.len() <= MAX_DATA_XFER);
        Ok(())
    }

    fn stop_copy_size(&mut self) -> Result<u64, Errno> {
        Ok(1)
    }

    fn precopy_info(&mut self) -> Result<PrecopyInfo, Errno> {
        let precopy = matches!(self.state, DeviceState::PreCopy | DeviceState::PreCopyP2p);
        assert!(precopy, "asked in {}", self.state);
        Ok(PrecopyInfo::default())
    }
}

impl DmaLogDevice for Device {
    fn start(&mut self, page_size: u64, ranges: &[Area]) -> Result<u64, Errno> {
        assert!(!self.logging && page_size.is_power_of_two());
        let mut end = 0;
        for range in ranges {
            assert!(range.size > 0 && range.offset >= end);
            assert!((range.offset | range.size) & (page_size - 1) == 0);
            end = range.offset.checked_add(range.size).unwrap();
        }
        self.logging = true;
        Ok(PAGE)
    }

    fn stop(&mut self) -> Result<(), Errno> {
        self.logging = false;
        Ok(())
    }

    fn report(
        &mut self,
        iova: u64,
        length: u64,
        page_size: u64,
        words: &mut [u64],
    ) -> Result<(), Errno> {
        assert!(self.logging && page_size.is_power_of_two() && page_size >= PAGE);
        iova.checked_add(length - 1).unwrap();
        let pages = length.div_ceil(page_size);
        assert_eq!(u64::try_from(words.len()).unwrap(), pages.div_ceil(64));
        Ok(())
    }
}

/// A command of which only the payload's contents are free, most of the time.
#[derive(Arbitrary, Debug)]
struct Message {
    id: u16,
    command: u8,
    no_reply: bool,
    /// Puts this into the size field instead of the true size.
    size: Option<u32>,
    payload: Vec<u8>,
}

fn encode(messages: &[Message]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for message in messages {
        let whole = u32::try_from(HEADER_SIZE + message.payload.len()).unwrap();
        let header = Header {
            id: message.id,
            command: u16::from(message.command % 20),
            size: message.size.unwrap_or(whole),
            flags: u32::from(message.no_reply) << 4,
            error: 0,
        };
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(&message.payload);
    }
    bytes
}

/// Reads replies to the end: each whole, a reply, and to a command not answered yet (which cannot
/// be told when a false size makes a payload look like commands).
fn check_replies(stream: &mut UnixStream, messages: &[Message]) {
    let mut answers = Vec::new();
    // A server that closes with commands unread resets the connection after its last reply.
    let _ = stream.read_to_end(&mut answers);
    let mut rest = answers.as_slice();
    let mut expected = messages.iter();
    let sizes_are_true = messages.iter().all(|message| message.size.is_none());
    while let Ok((header, after)) = Header::read_from_prefix(rest) {
        assert_eq!(header.flags & 0xf, TYPE_REPLY);
        let payload = usize::try_from(header.size).unwrap() - HEADER_SIZE;
        rest = &after[payload..];
        let answered = expected.any(|message| {
            !message.no_reply
                && message.id == header.id
                && u16::from(message.command % 20) == header.command
        });
        assert!(answered || !sizes_are_true, "a reply to nothing");
    }
    assert!(rest.is_empty());
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Unstructured::new(bytes);
    let Ok((flags, hello, mut messages)) = input.arbitrary::<(u8, bool, Vec<Message>)>() else {
        return;
    };
    if hello {
        messages.insert(
            0,
            Message {
                id: 0,
                command: 1,
                no_reply: false,
                size: None,
                payload: b"\0\0\x01\0{\"capabilities\":{\"max_msg_fds\":4}}\0".to_vec(),
            },
        );
    }
    let sent = encode(&messages);
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        let mut writing = ours.try_clone().unwrap();
        scope.spawn(move || {
            // A server that has had enough closes early.
            let _ = writing.write_all(&sent);
            let _ = writing.shutdown(Shutdown::Write);
        });
        scope.spawn(move || {
            let mut device = Device {
                state: DeviceState::Running,
                flags: MigrationFlags::from_bits_truncate(match flags % 5 {
                    0 => 0,
                    n => u64::from(n) * 2 - 1,
                }),
                logging: false,
                mappings: BTreeMap::new(),
                attached: false,
            };
            let _ = vfio_user::serve(theirs, &mut device);
            assert!(!device.attached);
        });
        check_replies(&mut ours, &messages);
    });
});
