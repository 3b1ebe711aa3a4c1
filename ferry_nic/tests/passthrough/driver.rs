//! The least driver of a virtio network card: one ring each way, polled or by interrupt.

use std::sync::atomic::Ordering;

use pci::PciDevice;
use vm_memory::{Bytes, GuestAddress};
use vm_migration::GuestMemory;

use crate::machine::Machine;

/// Descriptors of each ring.
const SIZE: u16 = 64;
/// Bytes of a buffer.
const BUFFER: u64 = 2048;
/// Each buffer has two pages of its own, so that the dirty log tells them apart: the header is at
/// the end of the first, so that the packet is in one that the card writes by `readv` only.
const BUFFER_STEP: u64 = 0x2000;
const BUFFER_OFFSET: u64 = 0x1000 - HEADER as u64;
/// Bytes of the virtio-net header.
pub(crate) const HEADER: usize = 12;
/// Where a queue's ring is: descriptors, available and used each on a page.
const RINGS: u64 = 0x10_0000;
/// Where buffers of a queue are.
pub(crate) const BUFFERS: u64 = 0x20_0000;
const STEP: u64 = 0x10_0000;

/// Vectors the card has: receive, transmit, control, configuration.
const VECTORS: u16 = 4;

/// One ring. All but the positions is in guest memory, so a driver moves with its memory.
#[derive(Clone, Copy)]
struct Ring {
    queue: u16,
    available: u16,
    used: u16,
}

impl Ring {
    fn base(&self) -> u64 {
        RINGS + u64::from(self.queue) * 0x1_0000
    }

    fn buffer(&self, index: u16) -> u64 {
        let place = u64::from(index) * BUFFER_STEP + BUFFER_OFFSET;
        BUFFERS + u64::from(self.queue) * STEP + place
    }

    /// The page that holds the used ring.
    fn used_at(&self) -> u64 {
        self.base() + 0x2000
    }

    /// Makes buffer `index` of `len` bytes available.
    fn add(&mut self, memory: &GuestMemory, index: u16, len: u32, writable: bool) {
        let mut raw = self.buffer(index).to_le_bytes().to_vec();
        raw.extend_from_slice(&len.to_le_bytes());
        raw.extend_from_slice(&[u8::from(writable) << 1, 0, 0, 0]);
        let at = self.base() + u64::from(index) * 16;
        memory.write_slice(&raw, GuestAddress(at)).unwrap();
        let available = self.base() + 0x1000;
        let slot = u64::from(self.available % SIZE);
        memory
            .write_obj(index, GuestAddress(available + 4 + slot * 2))
            .unwrap();
        self.available = self.available.wrapping_add(1);
        memory
            .store(
                self.available,
                GuestAddress(available + 2),
                Ordering::Release,
            )
            .unwrap();
    }

    /// Takes the next used buffer: its index and the bytes written to it.
    fn take(&mut self, memory: &GuestMemory) -> Option<(u16, u32)> {
        let index: u16 = memory
            .load(GuestAddress(self.used_at() + 2), Ordering::Acquire)
            .unwrap();
        if index == self.used {
            return None;
        }
        let slot = u64::from(self.used % SIZE);
        let [id, len]: [u32; 2] = memory
            .read_obj(GuestAddress(self.used_at() + 4 + slot * 8))
            .unwrap();
        self.used = self.used.wrapping_add(1);
        Some((u16::try_from(id).unwrap(), len))
    }
}

/// The driver. It copies like the guest's memory does when a guest migrates.
#[derive(Clone, Copy)]
pub(crate) struct Driver {
    rx: Ring,
    tx: Ring,
}

fn read(machine: &mut Machine, at: u64, data: &mut [u8]) {
    machine.nic.read_bar(0, at, data);
}

fn write(machine: &mut Machine, at: u64, data: &[u8]) {
    machine.nic.write_bar(0, at, data);
}

/// The device status register.
pub(crate) fn status(machine: &mut Machine) -> u8 {
    let mut status = [0];
    read(machine, 20, &mut status);
    status[0]
}

impl Driver {
    /// Brings the card up with all receive buffers available.
    pub(crate) fn start(machine: &mut Machine) -> Self {
        machine.nic.write_config(4, &6_u16.to_le_bytes());
        write(machine, 20, &[0]);
        write(machine, 20, &[1]);
        write(machine, 20, &[3]);
        // VIRTIO_F_VERSION_1, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MAC.
        for (select, half) in [(0_u32, 1_u32 << 17 | 1 << 5), (1, 1)] {
            write(machine, 8, &select.to_le_bytes());
            write(machine, 12, &half.to_le_bytes());
        }
        write(machine, 20, &[11]);
        assert_eq!(status(machine), 11, "features were refused");
        for vector in 0..VECTORS {
            let entry = 0x4000 + u64::from(vector) * 16;
            write(machine, entry, &0xfee0_0000_u64.to_le_bytes());
            write(machine, entry + 8, &u64::from(vector).to_le_bytes());
        }
        let msix = find_msix(machine);
        machine
            .nic
            .write_config(msix + 2, &0x8000_u16.to_le_bytes());
        for queue in 0..3_u16 {
            let ring = Ring {
                queue,
                available: 0,
                used: 0,
            };
            write(machine, 22, &queue.to_le_bytes());
            write(machine, 24, &SIZE.to_le_bytes());
            write(machine, 26, &queue.to_le_bytes());
            for (at, address) in [
                (32, ring.base()),
                (40, ring.base() + 0x1000),
                (48, ring.used_at()),
            ] {
                write(machine, at, &address.to_le_bytes()[..4]);
                write(machine, at + 4, &address.to_le_bytes()[4..]);
            }
            write(machine, 28, &1_u16.to_le_bytes());
        }
        write(machine, 20, &[15]);
        assert_eq!(status(machine), 15);
        let ring = |queue| Ring {
            queue,
            available: 0,
            used: 0,
        };
        let mut driver = Self {
            rx: ring(0),
            tx: ring(1),
        };
        for index in 0..SIZE {
            let len = u32::try_from(BUFFER).unwrap();
            driver.rx.add(&machine.memory, index, len, true);
        }
        driver.kick(machine, 0);
        driver
    }

    fn kick(&self, machine: &Machine, queue: u64) {
        let bells = machine.nic.doorbells();
        let bell = bells.iter().find(|bell| bell.offset == 0x3000 + queue * 4);
        bell.unwrap().eventfd.write(1).unwrap();
    }

    /// Sends a packet and waits until the card has taken it.
    pub(crate) fn send(&mut self, machine: &Machine, packet: &[u8]) {
        let memory = &machine.memory;
        let index = self.tx.available % SIZE;
        let bytes = [&[0; HEADER][..], packet].concat();
        let at = GuestAddress(self.tx.buffer(index));
        memory.write_slice(&bytes, at).unwrap();
        let len = u32::try_from(bytes.len()).unwrap();
        self.tx.add(memory, index, len, false);
        self.kick(machine, 1);
        let taken = wait(|| self.tx.take(memory));
        assert_eq!(taken, Some((index, 0)));
    }

    /// Waits for the next packet; its address (at the start of a page, behind its header) and its
    /// bytes.
    pub(crate) fn receive(&mut self, machine: &Machine) -> Option<(u64, Vec<u8>)> {
        let memory = &machine.memory;
        let (index, len) = wait(|| self.rx.take(memory))?;
        let at = self.rx.buffer(index);
        let mut bytes = vec![0; usize::try_from(len).unwrap()];
        memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        let len = u32::try_from(BUFFER).unwrap();
        self.rx.add(memory, index, len, true);
        Some((at + HEADER as u64, bytes.split_off(HEADER)))
    }

    /// Whether no packet has come.
    pub(crate) fn has_nothing(mut self, machine: &Machine) -> bool {
        self.rx.take(&machine.memory).is_none()
    }

    /// The page of the receive ring that the card writes.
    pub(crate) fn used_page(&self) -> u64 {
        self.rx.used_at()
    }

    /// The pages of all used rings, which also hold what the card asks of the driver.
    pub(crate) fn used_pages(&self) -> [u64; 3] {
        let control = Ring {
            queue: 2,
            ..self.tx
        };
        [self.rx.used_at(), self.tx.used_at(), control.used_at()]
    }
}

fn wait<T>(mut poll: impl FnMut() -> Option<T>) -> Option<T> {
    for _ in 0..20_000 {
        if let Some(value) = poll() {
            return Some(value);
        }
        std::thread::sleep(std::time::Duration::from_micros(200));
    }
    None
}

fn find_msix(machine: &mut Machine) -> u16 {
    let mut header = [0; 2];
    machine.nic.read_config(0x34, &mut header[1..]);
    loop {
        let at = u16::from(header[1]);
        assert_ne!(at, 0, "no MSI-X");
        machine.nic.read_config(at, &mut header);
        if header[0] == 0x11 {
            return at;
        }
    }
}
