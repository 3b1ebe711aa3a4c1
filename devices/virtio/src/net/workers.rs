//! The threads of a network card, and which queue goes to which.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use devices::{ThreadKind, ThreadSpawner};
use net_util::ctrl::MqLimits;

use super::announce::Announcer;
use super::counters::NetCounters;
use super::ctrl::Control;
use super::features;
use super::header::{Hashed, PLAIN, Plain, RxHeader, WITH_HASH};
use super::pair::{PairContext, PairParts, PairWork};
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
    Report(Vec<Worker<PairWork<Report>>>),
    Rss(Vec<Worker<PairWork<Rss>>>),
    RssReport(Vec<Worker<PairWork<RssReport>>>),
}

/// Hashes are reported.
type Report = Hashed<WITH_HASH, false>;
/// Hashes choose the queue.
type Rss = Hashed<PLAIN, true>;
/// Both.
type RssReport = Hashed<WITH_HASH, true>;

/// What stopped workers leave.
pub(super) struct Stopped {
    /// All queues in order of their numbers.
    pub(super) queues: Vec<Queue>,
    /// Announces the guest, if that is not done yet.
    pub(super) announcer: Option<Announcer>,
}

impl Workers {
    /// Starts a thread for each pair of queues the driver enabled and one for the control queue.
    pub(super) fn start(
        id: &str,
        activation: Activation,
        limits: MqLimits,
        shared: &Arc<Shared>,
        counters: &Arc<NetCounters>,
        announcer: Option<Announcer>,
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
        let report = features & features::HASH_REPORT != 0;
        // With one pair there is nothing to choose.
        let steers = limits.rss && layout.pairs > 1;
        let context = PairContext {
            memory: memory.clone(),
            interrupt: Arc::clone(&interrupt),
            counters: Arc::clone(counters),
            mergeable: features & features::MRG_RXBUF != 0,
            exchange: shared.exchange.clone().filter(|_| steers),
            pairs: layout.pairs,
        };
        let starter = Starter {
            spawner: &spawner,
            context: &context,
            shared,
        };
        let cell = || Arc::clone(&shared.classifier);
        let pairs = match (report, steers) {
            (false, false) => Pairs::Plain(layout.start_pairs(&starter, announcer, || Plain)?),
            (true, false) => {
                let header = || Report::new(cell());
                Pairs::Report(layout.start_pairs(&starter, announcer, header)?)
            }
            (false, true) => {
                let header = || Rss::new(cell());
                Pairs::Rss(layout.start_pairs(&starter, announcer, header)?)
            }
            (true, true) => {
                let header = || RssReport::new(cell());
                Pairs::RssReport(layout.start_pairs(&starter, announcer, header)?)
            }
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

    /// Stops all threads. Packets on their way are left in `shared`.
    pub(super) fn stop(self, id: &str, shared: &Shared) -> Result<Stopped, DeviceError> {
        let lost = |thread| DeviceError::ThreadLost {
            device: id.to_owned(),
            thread,
        };
        let mut stopped = Stopped {
            queues: self.unused,
            announcer: None,
        };
        // First the control queue, so that nothing changes the pairs while they stop.
        if let Some(control) = self.control {
            stopped.queues.push(control.stop().map_err(lost)?.queue);
        }
        match self.pairs {
            Pairs::Plain(workers) => stop_pairs(workers, shared, &mut stopped),
            Pairs::Report(workers) => stop_pairs(workers, shared, &mut stopped),
            Pairs::Rss(workers) => stop_pairs(workers, shared, &mut stopped),
            Pairs::RssReport(workers) => stop_pairs(workers, shared, &mut stopped),
        }
        .map_err(lost)?;
        // What a worker left came before what others had just given to it.
        shared.collect();
        stopped.queues.sort_by_key(Queue::index);
        Ok(stopped)
    }
}

fn stop_pairs<H: RxHeader>(
    workers: Vec<Worker<PairWork<H>>>,
    shared: &Shared,
    stopped: &mut Stopped,
) -> Result<(), String> {
    for worker in &workers {
        worker.tell();
    }
    for worker in workers {
        let (pair, parts) = worker.stop()?.into_parts();
        if let Some(parts) = parts {
            stopped.queues.extend([parts.rx, parts.tx]);
            shared.put_waiting(pair, parts.kept);
            stopped.announcer = stopped.announcer.take().or(parts.announcer);
        }
    }
    Ok(())
}

/// What starting a pair's worker takes.
struct Starter<'a> {
    spawner: &'a ThreadSpawner,
    context: &'a PairContext,
    shared: &'a Shared,
}

fn host(id: &str, operation: &'static str, cause: io::Error) -> DeviceError {
    DeviceError::Host {
        device: id.to_owned(),
        operation,
        cause,
    }
}

/// The queues of section 5.1.2: receive and transmit alternate, then the control queue, which
/// comes after the first pair if neither `VIRTIO_NET_F_MQ` nor `VIRTIO_NET_F_RSS` was negotiated.
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
            pairs: if limits.multi_queue || limits.rss {
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

    /// Whether the driver enabled both queues of a pair. The first pair must be.
    fn is_served(&self, pair: u16) -> bool {
        let both = [pair * 2, pair * 2 + 1];
        pair < self.pairs && both.iter().all(|queue| self.queues.contains_key(queue))
    }

    /// Starts a worker for every pair of which both queues are enabled. The first announces the
    /// guest. Packets that wait for a pair without a worker are dropped.
    fn start_pairs<H: RxHeader>(
        &mut self,
        starter: &Starter<'_>,
        mut announcer: Option<Announcer>,
        header: impl Fn() -> H,
    ) -> Result<Vec<Worker<PairWork<H>>>, DeviceError> {
        let Starter {
            spawner,
            context,
            shared,
        } = starter;
        if let Some(exchange) = &context.exchange {
            exchange.open(|pair| self.is_served(pair));
        }
        let mut workers = Vec::new();
        for (pair, backend) in (0..self.pairs).zip(shared.backends()) {
            let kept = shared.take_waiting(pair);
            if pair != 0 && !self.is_served(pair) {
                if let Some(counters) = context.counters.pair(usize::from(pair)) {
                    (0..kept.len()).for_each(|_| counters.receive_dropped());
                }
                continue;
            }
            let (rx, tx) = (self.take(pair * 2)?, self.take(pair * 2 + 1)?);
            let parts = PairParts {
                rx: rx.queue,
                tx: tx.queue,
                header: header(),
                kept,
                announcer: announcer.take(),
            };
            let backend = Arc::clone(backend);
            let kicks = (rx.kick, tx.kick);
            let work = PairWork::new(pair, (*context).clone(), backend, kicks, parts);
            let name = format!("{}-{pair}", self.id);
            let worker = Worker::start(spawner, ThreadKind::VirtioNet, name, work)
                .map_err(|cause| host(self.id, "starting a thread", cause))?;
            workers.push(worker);
        }
        Ok(workers)
    }
}
