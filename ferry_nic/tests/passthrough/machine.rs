//! What stands around a device: guest memory, interrupt vectors, a network, a server.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use devices::{InterruptError, MsiFabric, MsiLine, MsiMessage, ThreadSpawner};
use ferry_nic::NicDevice;
use net_util::hash::HashTypes;
use net_util::header::HeaderSize;
use net_util::tap::{HashAbi, KernelHash, Offloads};
use parking_lot::Mutex;
use passthrough::{Passthrough, VfioUserBackend, client_config};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vfio_user::{Client, ServerError};
use virtio_devices::{Net, NetBackend, NetOptions};
use vm_memory::GuestAddressSpace;
use vm_migration::memory::{Backing, MemoryHandle, RamMapping, map_ram};
use vm_migration::{Gpa, GuestMemory};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Guest RAM: so much from 0 and as much from 4 GiB.
pub(crate) const RAM: u64 = 8 << 20;
pub(crate) const HIGH: u64 = 1 << 32;

/// A file for guest RAM.
pub(crate) fn ram_file() -> OwnedFd {
    let fd = memfd_create("ram", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, 2 * RAM).unwrap();
    fd
}

fn map(file: &OwnedFd) -> MemoryHandle {
    let region = |gpa, offset| RamMapping {
        gpa: Gpa(gpa),
        len: RAM,
        backing: Backing::File {
            file: file.try_clone().unwrap().into(),
            offset,
        },
    };
    MemoryHandle::new(map_ram(vec![region(0, 0), region(HIGH, RAM)]).unwrap())
}

/// A network of one cable: a packet per datagram, behind its virtio-net header.
struct Cable(UnixDatagram);

impl AsFd for Cable {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl NetBackend for Cable {
    fn set_header(&self, _size: HeaderSize) -> std::io::Result<()> {
        Ok(())
    }

    fn set_offloads(&self, _offloads: Offloads) -> std::io::Result<()> {
        Ok(())
    }

    fn set_attached(&self, _attached: bool) -> std::io::Result<()> {
        Ok(())
    }

    fn set_kernel_hash(
        &self,
        _abi: HashAbi,
        _hash: Option<&KernelHash<'_>>,
    ) -> std::io::Result<()> {
        Err(std::io::ErrorKind::Unsupported.into())
    }
}

/// A card on a cable, and the cable's other end.
pub(crate) fn card(pairs: usize) -> (Net, UnixDatagram) {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    ours.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut backends: Vec<Arc<dyn NetBackend>> = vec![Arc::new(Cable(theirs))];
    for _ in 1..pairs {
        let (_, unused) = UnixDatagram::pair().unwrap();
        unused.set_nonblocking(true).unwrap();
        backends.push(Arc::new(Cable(unused)));
    }
    (make_card(backends), ours)
}

/// A card on `backends`.
pub(crate) fn make_card(backends: Vec<Arc<dyn NetBackend>>) -> Net {
    let options = NetOptions {
        id: "nic".to_owned(),
        mac: [0x52, 0x54, 0, 1, 2, 3],
        mtu: None,
        queue_size: 64,
        offloads: false,
        hash_report: false,
        rss: false,
        hash_types: HashTypes::ALL,
    };
    Net::new(options, backends).unwrap()
}

/// A vector as KVM has it: routed, it delivers; not routed, the count stays.
pub(crate) struct Line {
    event: EventFd,
    pub(crate) route: Mutex<Option<MsiMessage>>,
}

impl Line {
    /// Whether it was signalled since last asked; waits a while.
    pub(crate) fn signalled(&self) -> bool {
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(5) {
            if self.event.read().is_ok() {
                return true;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        false
    }

    /// Forgets signals.
    pub(crate) fn clear(&self) {
        let _ = self.event.read();
    }
}

impl MsiLine for Line {
    fn trigger(&self) -> Result<(), InterruptError> {
        self.event
            .write(1)
            .map_err(|cause| InterruptError::Backend {
                operation: "trigger",
                cause,
            })
    }

    fn eventfd(&self) -> &EventFd {
        &self.event
    }

    fn route(&self, message: Option<MsiMessage>) -> Result<(), InterruptError> {
        *self.route.lock() = message;
        Ok(())
    }

    fn is_pending(&self) -> bool {
        false
    }
}

#[derive(Default)]
struct Fabric(Mutex<Vec<Arc<Line>>>);

impl MsiFabric for Fabric {
    fn allocate(&self, count: u16) -> Result<Vec<Arc<dyn MsiLine>>, InterruptError> {
        let lines: Vec<_> = (0..count)
            .map(|_| {
                Arc::new(Line {
                    event: EventFd::new(EFD_NONBLOCK).unwrap(),
                    route: Mutex::default(),
                })
            })
            .collect();
        self.0.lock().extend(lines.iter().cloned());
        Ok(lines.into_iter().map(|line| line as _).collect())
    }
}

/// One VMM's view of the device, and the server behind it.
pub(crate) struct Machine {
    pub(crate) nic: Passthrough,
    pub(crate) lines: Vec<Arc<Line>>,
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) gone: Receiver<String>,
    /// The socket, to cut it.
    pub(crate) wire: UnixStream,
    pub(crate) served: JoinHandle<Result<(), ServerError>>,
}

impl Machine {
    /// A machine whose RAM is `file`, with `card` behind a server.
    pub(crate) fn new(file: &OwnedFd, card: Net) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let wire = theirs.try_clone().unwrap();
        let served = std::thread::spawn(move || {
            let spawner = ThreadSpawner::unconfined();
            let mut device = NicDevice::new(Box::new(card), spawner).unwrap();
            vfio_user::serve(theirs, &mut device)
        });
        let handle = map(file);
        let (tell, gone) = channel();
        let on_gone = Box::new(move |error: &passthrough::BackendError| {
            let cause = std::error::Error::source(error).map(ToString::to_string);
            // The test may have ended.
            let _ = tell.send(cause.unwrap_or_default());
        });
        let config = client_config(handle.clone(), &ThreadSpawner::unconfined(), on_gone);
        let client = Client::from_stream(ours, Path::new("nic.sock"), config).unwrap();
        let backend = Arc::new(VfioUserBackend::from_client(client));
        let fabric = Fabric::default();
        let nic = Passthrough::new("_nic0", backend, &fabric).unwrap();
        let memory = handle.memory().into_inner();
        nic.map_memory(&memory).unwrap();
        Self {
            nic,
            lines: fabric.0.into_inner(),
            memory,
            gone,
            wire,
            served,
        }
    }
}
