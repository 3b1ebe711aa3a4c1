//! Saved state of a network card: any bytes are refused, or give a card whose own state says the
//! same and is taken again.

#![no_main]

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, LazyLock};

use libfuzzer_sys::fuzz_target;
use net_util::hash::HashTypes;
use net_util::header::HeaderSize;
use net_util::tap::{HashAbi, KernelHash, Offloads};
use virtio_devices::{Net, NetBackend, NetOptions, VirtioDevice};

/// Pairs of the card.
const PAIRS: usize = 3;
/// Offset of `max_virtqueue_pairs` and of `supported_hash_types` in the configuration.
const CONFIG: [(u16, [u8; 4]); 2] = [(8, [3, 0, 0xdc, 5]), (20, [0xff, 1, 0, 0])];

/// An end that is never asked for anything: the card is not activated.
struct Idle(UnixDatagram);

impl AsFd for Idle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl NetBackend for Idle {
    fn set_header(&self, _size: HeaderSize) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn set_offloads(&self, _offloads: Offloads) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn set_attached(&self, _attached: bool) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn set_kernel_hash(&self, _abi: HashAbi, _hash: Option<&KernelHash<'_>>) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Ends for all cards: descriptors are not to be used up.
static ENDS: LazyLock<Vec<Arc<dyn NetBackend>>> = LazyLock::new(|| {
    (0..PAIRS)
        .map(|_| Arc::new(Idle(UnixDatagram::unbound().unwrap())) as Arc<dyn NetBackend>)
        .collect()
});

fn card() -> Net {
    let options = NetOptions {
        id: "net".to_owned(),
        mac: [2, 0, 0, 0, 0, 1],
        mtu: Some(1500),
        queue_size: 64,
        offloads: true,
        hash_report: true,
        rss: true,
        hash_types: HashTypes::ALL,
    };
    Net::new(options, ENDS.clone()).unwrap()
}

fuzz_target!(|state: &[u8]| {
    let mut first = card();
    if first.restore(state).is_err() {
        return;
    }
    let saved = first.save().unwrap();
    let mut second = card();
    second.restore(&saved).unwrap();
    assert_eq!(second.save().unwrap(), saved);
    // The configuration is the card's own, but for the guest's address and the wish to announce.
    for (offset, bytes) in CONFIG {
        let mut read = [0; 4];
        second.read_config(offset, &mut read);
        assert_eq!(read, bytes);
    }
    // A reset forgets it.
    second.reset();
    let mut fresh = [0; 2];
    second.read_config(6, &mut fresh);
    assert_eq!(fresh, [1, 0]);
});
