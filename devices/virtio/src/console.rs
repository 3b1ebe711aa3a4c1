//! Console with one port (virtio 1.2, section 5.3), connected to a [`Terminal`] like the serial
//! port.
//!
//! One thread writes what the guest sends; another, if the terminal has input, fills the guest's
//! buffers. There is no state besides the queues: output is written before its buffer is used,
//! and input waits at the host until there is a buffer.

use std::io::Write;
use std::sync::Arc;

use devices::ThreadKind;
use devices::terminal::{Terminal, TerminalWriter};
use vm_memory::GuestAddressSpace;
use vm_migration::memory::{GuestMemory, MemoryHandle};
use vmm_sys_util::eventfd::EventFd;

use crate::device::{
    Activation, ActiveQueue, DeviceError, DeviceInterrupt, DeviceType, VirtioDevice, feature,
    read_config_bytes,
};
use crate::queue::{Chain, Queue, RingError, to_usize};
use crate::server::{Handler, QueueServer, WorkError};
use crate::worker::Work;
use crate::worker::Worker;

/// Sizes of the receive and the transmit queue.
const QUEUE_SIZES: [u16; 2] = [128, 128];
/// Number of the receive queue.
const RX: u16 = 0;
/// Number of the transmit queue.
const TX: u16 = 1;
/// Bytes of `struct virtio_console_config`. None of its fields' features is offered: it is zero.
const CONFIG_LEN: u16 = 12;
/// Most bytes of one of the guest's buffers that are written out; no driver sends nearly as much
/// at once. It keeps a hostile one from holding up a pause.
pub const MAX_OUTPUT_BYTES: usize = 1 << 20;
/// Bytes written out at once.
const PIECE: usize = 4096;

/// The console.
pub struct Console {
    id: String,
    terminal: Arc<Terminal>,
    active: Option<Active>,
}

/// Threads and queues of an active console.
struct Active {
    output: Worker<QueueServer<Output>>,
    input: Option<Worker<Input>>,
    /// The receive queue of a console without input.
    unused: Vec<Queue>,
}

impl Console {
    /// A console called `id` on `terminal`.
    pub fn new(id: impl Into<String>, terminal: Arc<Terminal>) -> Self {
        Self {
            id: id.into(),
            terminal,
            active: None,
        }
    }

    fn require_inactive(&self, operation: &'static str) -> Result<(), DeviceError> {
        match self.active {
            None => Ok(()),
            Some(_) => Err(DeviceError::WrongState {
                device: self.id.clone(),
                operation,
                state: "active",
            }),
        }
    }

    fn start<W: Work>(
        &self,
        activation: &Context,
        name: &str,
        work: W,
    ) -> Result<Worker<W>, DeviceError> {
        let name = format!("{}-{name}", self.id);
        Worker::start(&activation.spawner, ThreadKind::VirtioConsole, name, work).map_err(|cause| {
            DeviceError::Host {
                device: self.id.clone(),
                operation: "starting a thread",
                cause,
            }
        })
    }
}

/// What both threads get of an activation.
struct Context {
    memory: MemoryHandle,
    interrupt: Arc<dyn DeviceInterrupt>,
    spawner: devices::ThreadSpawner,
}

impl VirtioDevice for Console {
    fn id(&self) -> &str {
        &self.id
    }

    fn device_type(&self) -> DeviceType {
        DeviceType::Console
    }

    fn features(&self) -> u64 {
        feature::VERSION_1 | feature::RING_INDIRECT_DESC | feature::RING_EVENT_IDX
    }

    fn check_features(&self, _features: u64) -> Result<(), &'static str> {
        // The ring features are independent of each other.
        Ok(())
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config_len(&self) -> u16 {
        CONFIG_LEN
    }

    fn read_config(&self, offset: u16, data: &mut [u8]) {
        read_config_bytes(&[], offset, data);
    }

    fn write_config(&mut self, _offset: u16, _data: &[u8]) {
        // The one writable field, emerg_wr, belongs to a feature that is not offered.
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.require_inactive("activate")?;
        let mut rx = None;
        let mut tx = None;
        for active in activation.queues {
            match active.queue.index() {
                RX => rx = Some(active),
                _ => tx = Some(active),
            }
        }
        let missing = |index| DeviceError::MissingQueue {
            device: self.id.clone(),
            index,
        };
        let rx = rx.ok_or_else(|| missing(RX))?;
        let tx = tx.ok_or_else(|| missing(TX))?;
        let context = Context {
            memory: activation.memory,
            interrupt: activation.interrupt,
            spawner: activation.spawner,
        };
        let output = QueueServer::new(
            tx,
            context.memory.clone(),
            Arc::clone(&context.interrupt),
            Output(self.terminal.writer()),
        );
        let output = self.start(&context, "out", output)?;
        let (input, unused) = if self.terminal.has_input() {
            let input = Input::new(rx, &context, Arc::clone(&self.terminal));
            (Some(self.start(&context, "in", input)?), Vec::new())
        } else {
            (None, vec![rx.queue])
        };
        self.active = Some(Active {
            output,
            input,
            unused,
        });
        Ok(())
    }

    fn deactivate(&mut self) -> Result<Vec<Queue>, DeviceError> {
        let Some(active) = self.active.take() else {
            return Ok(Vec::new());
        };
        let lost = |thread| DeviceError::ThreadLost {
            device: self.id.clone(),
            thread,
        };
        let mut queues = active.unused;
        if let Some(input) = active.input {
            queues.push(input.stop().map_err(lost)?.queue);
        }
        queues.push(active.output.stop().map_err(lost)?.queue);
        Ok(queues)
    }

    fn reset(&mut self) {
        // Dropping the workers joins them.
        self.active = None;
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
            reason: format!("{} bytes where a console has none", state.len()),
        })
    }
}

/// Writes out what the guest sends.
struct Output(TerminalWriter);

impl Handler for Output {
    fn handle(&mut self, memory: &GuestMemory, chain: &Chain) -> Result<u32, RingError> {
        let mut piece = [0; PIECE];
        let mut done = 0;
        while done < MAX_OUTPUT_BYTES {
            let offset = u32::try_from(done).unwrap_or(u32::MAX);
            let len = chain.read_at(memory, offset, &mut piece)?;
            if len == 0 {
                break;
            }
            done += len;
            if let Err(error) = self.0.write_all(piece.get(..len).unwrap_or_default()) {
                tracing::debug!(%error, "console output is dropped");
            }
        }
        Ok(0)
    }
}

/// Fills the guest's buffers with input.
struct Input {
    queue: Queue,
    kick: EventFd,
    memory: MemoryHandle,
    interrupt: Arc<dyn DeviceInterrupt>,
    terminal: Arc<Terminal>,
    chain: Chain,
    /// `chain` is a buffer taken and not yet used.
    taken: bool,
}

impl Input {
    fn new(active: ActiveQueue, context: &Context, terminal: Arc<Terminal>) -> Self {
        Self {
            queue: active.queue,
            kick: active.kick,
            memory: context.memory.clone(),
            interrupt: Arc::clone(&context.interrupt),
            terminal,
            chain: Chain::default(),
            taken: false,
        }
    }

    /// Bytes the guest has room for; if none, it kicks when it has.
    fn room(&mut self) -> Result<usize, RingError> {
        let memory = self.memory.memory();
        // Empty buffers are used up; more of them than the queue holds wait for the next kick.
        for _ in 0..self.queue.size() {
            if self.taken {
                return Ok(to_usize(self.chain.writable_len()));
            }
            if !self.queue.pop(&memory, &mut self.chain)? {
                if self.queue.enable_kicks(&memory)? {
                    continue;
                }
                return Ok(0);
            }
            self.queue.disable_kicks(&memory)?;
            if self.chain.writable_len() == 0 {
                self.queue.complete(&memory, self.chain.head(), 0)?;
            } else {
                self.taken = true;
            }
        }
        Ok(0)
    }

    /// Puts `bytes` into the buffer whose room was told.
    fn put(&mut self, bytes: &[u8]) -> Result<(), RingError> {
        if !std::mem::take(&mut self.taken) {
            return Ok(());
        }
        let memory = self.memory.memory();
        let written = self.chain.write_at(&memory, 0, bytes)?;
        let written = u32::try_from(written).unwrap_or(u32::MAX);
        self.queue.complete(&memory, self.chain.head(), written)?;
        if self.queue.needs_interrupt(&memory)? {
            self.interrupt.queue_used(self.queue.index());
        }
        Ok(())
    }
}

impl Work for Input {
    fn run(&mut self, stop: &EventFd) {
        let terminal = Arc::clone(&self.terminal);
        let interrupt = Arc::clone(&self.interrupt);
        let Ok(kick) = self.kick.try_clone() else {
            interrupt.needs_reset(&"no file descriptor is left for its doorbell");
            return;
        };
        let mut broken = false;
        let result = terminal.read_input(stop, &kick, |bytes| {
            if broken {
                return 0;
            }
            let result = match bytes {
                None => self.room(),
                Some(bytes) => self.put(bytes).map(|()| 0),
            };
            result.unwrap_or_else(|cause| {
                broken = true;
                interrupt.needs_reset(&WorkError::Ring { queue: RX, cause });
                0
            })
        });
        if std::mem::take(&mut self.taken) {
            self.queue.unpop(1);
        }
        if let Err(error) = result {
            // The guest loses its keyboard, not its console.
            tracing::error!(%error, "console input failed; it ends");
        }
    }
}

#[cfg(test)]
mod tests;
