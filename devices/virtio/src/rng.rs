//! Entropy device (virtio 1.2, section 5.4): the guest's buffers are filled with random bytes
//! from the host's generator, or a file.
//!
//! It has no state: a restored device goes on with its queue, and the destination's source.

use std::fs::File;
use std::sync::Arc;

use devices::ThreadKind;
use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};
use vm_migration::memory::GuestMemory;

use crate::device::{
    Activation, DeviceError, DeviceType, VirtioDevice, feature, read_config_bytes,
};
use crate::queue::{Chain, Queue, RingError};
use crate::server::{Handler, QueueServer};
use crate::worker::Worker;

/// Size of the request queue.
const QUEUE_SIZE: u16 = 256;
/// Most bytes given for one request; a driver that wants more asks again. It keeps one request
/// from holding up a pause.
pub const MAX_REQUEST_BYTES: usize = 64 << 10;
/// Bytes taken from the host at once.
const PIECE: usize = 256;

/// Where random bytes come from.
#[derive(Clone, Debug)]
pub enum EntropySource {
    /// The kernel's generator, by `getrandom`.
    Kernel,
    /// A file, which should not block: a read that has nothing gives the driver a short answer.
    File(Arc<File>),
}

impl EntropySource {
    /// Bytes put into `piece`; 0 if there are none now.
    fn read(&self, piece: &mut [u8]) -> Result<usize, Errno> {
        let read = match self {
            Self::Kernel => getrandom(piece, GetRandomFlags::empty()),
            Self::File(file) => rustix::io::read(file, piece),
        };
        match read {
            Err(Errno::AGAIN) => Ok(0),
            read => read,
        }
    }
}

/// The entropy device.
#[derive(Debug)]
pub struct Rng {
    id: String,
    source: EntropySource,
    worker: Option<Worker<QueueServer<Entropy>>>,
}

impl Rng {
    /// A device called `id` that gives bytes of `source`.
    pub fn new(id: impl Into<String>, source: EntropySource) -> Self {
        Self {
            id: id.into(),
            source,
            worker: None,
        }
    }

    fn require_inactive(&self, operation: &'static str) -> Result<(), DeviceError> {
        match self.worker {
            None => Ok(()),
            Some(_) => Err(DeviceError::WrongState {
                device: self.id.clone(),
                operation,
                state: "active",
            }),
        }
    }
}

impl VirtioDevice for Rng {
    fn id(&self) -> &str {
        &self.id
    }

    fn device_type(&self) -> DeviceType {
        DeviceType::Entropy
    }

    fn features(&self) -> u64 {
        feature::VERSION_1 | feature::RING_INDIRECT_DESC | feature::RING_EVENT_IDX
    }

    fn check_features(&self, _features: u64) -> Result<(), &'static str> {
        // The ring features are independent of each other.
        Ok(())
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn config_len(&self) -> u16 {
        0
    }

    fn read_config(&self, offset: u16, data: &mut [u8]) {
        read_config_bytes(&[], offset, data);
    }

    fn write_config(&mut self, _offset: u16, _data: &[u8]) {
        // There is no configuration to write.
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.require_inactive("activate")?;
        let Activation {
            memory,
            queues,
            interrupt,
            spawner,
            ..
        } = activation;
        let Some(requests) = queues.into_iter().next() else {
            return Err(DeviceError::MissingQueue {
                device: self.id.clone(),
                index: 0,
            });
        };
        let entropy = Entropy(self.source.clone());
        let server = QueueServer::new(requests, memory, interrupt, entropy);
        let worker = Worker::start(&spawner, ThreadKind::VirtioRng, self.id.clone(), server)
            .map_err(|cause| DeviceError::Host {
                device: self.id.clone(),
                operation: "starting its thread",
                cause,
            })?;
        self.worker = Some(worker);
        Ok(())
    }

    fn deactivate(&mut self) -> Result<Vec<Queue>, DeviceError> {
        let Some(worker) = self.worker.take() else {
            return Ok(Vec::new());
        };
        match worker.stop() {
            Ok(server) => Ok(vec![server.queue]),
            Err(thread) => Err(DeviceError::ThreadLost {
                device: self.id.clone(),
                thread,
            }),
        }
    }

    fn reset(&mut self) {
        // Dropping the worker joins it.
        self.worker = None;
    }

    fn save(&self) -> Result<Vec<u8>, DeviceError> {
        self.require_inactive("save")?;
        Ok(Vec::new())
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), DeviceError> {
        self.require_inactive("restore")?;
        if state.is_empty() {
            return Ok(());
        }
        Err(DeviceError::BadState {
            device: self.id.clone(),
            reason: format!("{} bytes where an entropy device has none", state.len()),
        })
    }
}

/// Fills requests.
#[derive(Debug)]
struct Entropy(EntropySource);

impl Handler for Entropy {
    fn handle(&mut self, memory: &GuestMemory, chain: &Chain) -> Result<u32, RingError> {
        let wanted = crate::queue::to_usize(chain.writable_len()).min(MAX_REQUEST_BYTES);
        let mut piece = [0; PIECE];
        let mut done = 0_u32;
        while crate::queue::to_usize(done) < wanted {
            let take = (wanted - crate::queue::to_usize(done)).min(PIECE);
            let Some(piece) = piece.get_mut(..take) else {
                break;
            };
            match self.0.read(piece) {
                Err(Errno::INTR) => continue,
                Ok(0) => {
                    tracing::debug!("the source of random bytes has none now");
                    break;
                }
                Ok(got) => {
                    let got = piece.get(..got).unwrap_or_default();
                    let written = chain.write_at(memory, done, got)?;
                    done = done.saturating_add(u32::try_from(written).unwrap_or(u32::MAX));
                }
                Err(error) => {
                    // The driver sees a short answer.
                    tracing::error!(%error, "the source gives no random bytes");
                    break;
                }
            }
        }
        Ok(done)
    }
}

#[cfg(test)]
mod tests;
