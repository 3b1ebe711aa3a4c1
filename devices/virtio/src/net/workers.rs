//! The threads of a network card, and which queue goes to which.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use devices::{ThreadKind, ThreadSpawner};
use net_util::ctrl::MqLimits;

use super::counters::NetCounters;
use super::ctrl::Control;
use super::features;
use super::header::{Hashed, Plain, RxHeader};
use super::pair::{PairContext, PairWork};
use super::runtime::Shared;
use crate::device::{Activation, ActiveQueue, DeviceError};
use crate::queue::Queue;
use crate::server::QueueServer;
use crate::worker::Worker;

/// All threads of an active card.
pub(super) struct Workers {
    pairs: Pairs,
    control: Option<Worker<QueueServer<Control<Arc<Shared>>>>>,
    /// Queues that the driver enabled but the negotiated features give no use.
    unused: Vec<Queue>,
}

/// Workers of the pairs, by the kind of header they write.
enum Pairs {
    Plain(Vec<Worker<PairWork<Plain>>>),
    Hashed(Vec<Worker<PairWork<Hashed>>>),
}

impl Workers {
    /// Starts a thread for each pair of queues the driver enabled and one for the control queue.
    pub(super) fn start(
        id: &str,
        activation: Activation,
        limits: MqLimits,
        shared: &Arc<Shared>,
        counters: &Arc<NetCounters>,
    ) -> Result<Self, DeviceError> {
        let Activation {
            memory,
            queues,
            interrupt,
            features,
            spawner,
        } = activation;
        let mut layout = Layout::new(id, queues, limits);
        let control_queue = layout.control(features);
        let context = PairContext {
            memory: memory.clone(),
            interrupt: Arc::clone(&interrupt),
            counters: Arc::clone(counters),
            mergeable: features & features::MRG_RXBUF != 0,
        };
        let pairs = if features & features::HASH_REPORT != 0 {
            let header = || Hashed::new(Arc::clone(&shared.hash));
            Pairs::Hashed(layout.start_pairs(&spawner, &context, shared, header)?)
        } else {
            Pairs::Plain(layout.start_pairs(&spawner, &context, shared, || Plain)?)
        };
        let control = control_queue
            .map(|queue| {
                let control = Control::new(Arc::clone(shared), limits, features);
                let server = QueueServer::new(queue, memory, interrupt, control);
                Worker::start(
                    &spawner,
                    ThreadKind::VirtioNetControl,
                    format!("{id}-ctrl"),
                    server,
                )
                .map_err(|cause| host(id, "starting a thread", cause))
            })
            .transpose()?;
        Ok(Self {
            pairs,
            control,
            unused: layout.queues.into_values().map(|q| q.queue).collect(),
        })
    }

    /// Stops all threads and gives back all queues in order of their numbers.
    pub(super) fn stop(self, id: &str) -> Result<Vec<Queue>, DeviceError> {
        let lost = |thread| DeviceError::ThreadLost {
            device: id.to_owned(),
            thread,
        };
        let mut queues = self.unused;
        // First the control queue, so that nothing changes the pairs while they stop.
        if let Some(control) = self.control {
            queues.push(control.stop().map_err(lost)?.queue);
        }
        match self.pairs {
            Pairs::Plain(workers) => stop_pairs(workers, &mut queues),
            Pairs::Hashed(workers) => stop_pairs(workers, &mut queues),
        }
        .map_err(lost)?;
        queues.sort_by_key(Queue::index);
        Ok(queues)
    }
}

fn stop_pairs<H: RxHeader>(
    workers: Vec<Worker<PairWork<H>>>,
    queues: &mut Vec<Queue>,
) -> Result<(), String> {
    for worker in &workers {
        worker.tell();
    }
    for worker in workers {
        queues.extend(worker.stop()?.into_queues());
    }
    Ok(())
}

fn host(id: &str, operation: &'static str, cause: io::Error) -> DeviceError {
    DeviceError::Host {
        device: id.to_owned(),
        operation,
        cause,
    }
}

/// The queues of section 5.1.2: receive and transmit alternate, then the control queue, which
/// comes after the first pair if `VIRTIO_NET_F_MQ` was not negotiated.
struct Layout<'a> {
    id: &'a str,
    queues: BTreeMap<u16, ActiveQueue>,
    pairs: u16,
}

impl<'a> Layout<'a> {
    fn new(id: &'a str, queues: Vec<ActiveQueue>, limits: MqLimits) -> Self {
        Self {
            id,
            queues: queues.into_iter().map(|q| (q.queue.index(), q)).collect(),
            pairs: if limits.multi_queue {
                limits.max_pairs
            } else {
                1
            },
        }
    }

    /// The control queue if it was negotiated and the driver enabled it.
    fn control(&mut self, features: u64) -> Option<ActiveQueue> {
        if features & features::CTRL_VQ == 0 {
            return None;
        }
        self.queues.remove(&(self.pairs * 2))
    }

    fn take(&mut self, index: u16) -> Result<ActiveQueue, DeviceError> {
        self.queues
            .remove(&index)
            .ok_or_else(|| DeviceError::MissingQueue {
                device: self.id.to_owned(),
                index,
            })
    }

    /// Starts a worker for every pair of which both queues are enabled. The first must be.
    fn start_pairs<H: RxHeader>(
        &mut self,
        spawner: &ThreadSpawner,
        context: &PairContext,
        shared: &Shared,
        header: impl Fn() -> H,
    ) -> Result<Vec<Worker<PairWork<H>>>, DeviceError> {
        let mut workers = Vec::new();
        for (pair, backend) in (0..self.pairs).zip(shared.backends()) {
            let (rx, tx) = (pair * 2, pair * 2 + 1);
            let enabled = self.queues.contains_key(&rx) && self.queues.contains_key(&tx);
            if pair != 0 && !enabled {
                continue;
            }
            let queues = (self.take(rx)?, self.take(tx)?);
            let work = PairWork::new(
                usize::from(pair),
                context.clone(),
                Arc::clone(backend),
                queues,
                header(),
            );
            let name = format!("{}-{pair}", self.id);
            let worker = Worker::start(spawner, ThreadKind::VirtioNet, name, work)
                .map_err(|cause| host(self.id, "starting a thread", cause))?;
            workers.push(worker);
        }
        Ok(workers)
    }
}
