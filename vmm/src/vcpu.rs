//! The vCPU threads: running, standing still, ending.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use devices::bus::Bus;
use devices::thread::{ThreadKind, ThreadSpawner};
use hypervisor::kick::Kicker;
use hypervisor::{HypervisorError, Vcpu, VcpuExit};
use parking_lot::{Condvar, Mutex};

use crate::exit::{ExitReason, ExitSender};

/// Why the vCPUs could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// A thread could not be made.
    #[error("cannot start the thread of vCPU {id}")]
    Spawn {
        /// Which vCPU.
        id: usize,
        /// What the system said.
        #[source]
        cause: io::Error,
    },
    /// A vCPU ended and cannot run again.
    #[error("vCPU {id} has stopped")]
    Stopped {
        /// Which vCPU.
        id: usize,
    },
    /// The hypervisor refused.
    #[error("vCPU {id}: {operation}")]
    Hypervisor {
        /// Which vCPU.
        id: usize,
        /// What was asked.
        operation: &'static str,
        /// Why it refused.
        #[source]
        cause: HypervisorError,
    },
}

/// What the vCPUs shall do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Wanted {
    Stand,
    Run,
    End,
}

/// What a vCPU's thread is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Doing {
    Standing,
    Running,
    Ended,
}

struct Gate {
    wanted: Wanted,
    doing: Vec<Doing>,
    kickers: Vec<Option<Kicker>>,
}

struct Shared {
    gate: Mutex<Gate>,
    changed: Condvar,
    pio: Arc<Bus>,
    mmio: Arc<Bus>,
    exits: ExitSender,
}

/// All vCPUs of a VM. They stand still at first.
pub struct Vcpus {
    shared: Arc<Shared>,
    cpus: Vec<Arc<Mutex<Box<dyn Vcpu>>>>,
    threads: Vec<JoinHandle<()>>,
}

/// The address spaces vCPUs reach and where they report what the guest asks of the VMM.
pub struct Surroundings {
    /// Port I/O.
    pub pio: Arc<Bus>,
    /// Memory-mapped I/O.
    pub mmio: Arc<Bus>,
    /// Reset, power-off, crashes.
    pub exits: ExitSender,
}

impl Vcpus {
    /// Starts one thread per vCPU; none enters the guest before [`resume`](Self::resume).
    ///
    /// # Errors
    /// When a thread cannot be made.
    pub fn start(
        cpus: Vec<Box<dyn Vcpu>>,
        around: Surroundings,
        spawner: &ThreadSpawner,
    ) -> Result<Self, VcpuError> {
        let count = cpus.len();
        let shared = Arc::new(Shared {
            gate: Mutex::new(Gate {
                wanted: Wanted::Stand,
                doing: vec![Doing::Standing; count],
                kickers: vec![None; count],
            }),
            changed: Condvar::new(),
            pio: around.pio,
            mmio: around.mmio,
            exits: around.exits,
        });
        let mut this = Self { shared, cpus: Vec::new(), threads: Vec::new() };
        for (id, cpu) in cpus.into_iter().enumerate() {
            let cpu = Arc::new(Mutex::new(cpu));
            let (shared, own) = (Arc::clone(&this.shared), Arc::clone(&cpu));
            let thread = spawner
                .spawn(ThreadKind::Vcpu, &format!("vcpu{id}"), move || shared.serve(id, &own))
                .map_err(|cause| VcpuError::Spawn { id, cause })?;
            this.cpus.push(cpu);
            this.threads.push(thread);
        }
        Ok(this)
    }

    /// The vCPUs, to be used only while they stand still: a running one holds its lock.
    pub fn cpus(&self) -> &[Arc<Mutex<Box<dyn Vcpu>>>] {
        &self.cpus
    }

    /// Makes all leave the guest; on return none runs, and no access is half done.
    ///
    /// # Errors
    /// [`VcpuError::Stopped`] if one has ended: its state is lost.
    pub fn pause(&self) -> Result<(), VcpuError> {
        let mut gate = self.shared.gate.lock();
        gate.wanted = Wanted::Stand;
        for kicker in gate.kickers.iter().flatten() {
            kicker.kick();
        }
        while gate.doing.contains(&Doing::Running) {
            self.shared.changed.wait(&mut gate);
        }
        all_alive(&gate)
    }

    /// Lets all run.
    ///
    /// # Errors
    /// [`VcpuError::Stopped`] if one has ended.
    pub fn resume(&self) -> Result<(), VcpuError> {
        let mut gate = self.shared.gate.lock();
        all_alive(&gate)?;
        gate.wanted = Wanted::Run;
        self.shared.changed.notify_all();
        Ok(())
    }
}

fn all_alive(gate: &Gate) -> Result<(), VcpuError> {
    match gate.doing.iter().position(|doing| *doing == Doing::Ended) {
        Some(id) => Err(VcpuError::Stopped { id }),
        None => Ok(()),
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        {
            let mut gate = self.shared.gate.lock();
            gate.wanted = Wanted::End;
            for kicker in gate.kickers.iter().flatten() {
                kicker.kick();
            }
            self.shared.changed.notify_all();
        }
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a vCPU thread panicked");
            }
        }
    }
}

/// How one stay in the guest ended.
enum Leave {
    /// Someone wants something else than running.
    Asked,
    /// This vCPU cannot go on, or the guest wants no more.
    Done(ExitReason),
}

impl Shared {
    /// The life of a vCPU's thread.
    fn serve(&self, id: usize, cpu: &Mutex<Box<dyn Vcpu>>) {
        if let Some(slot) = self.gate.lock().kickers.get_mut(id) {
            *slot = Some(Kicker::current_thread());
        }
        loop {
            let mut gate = self.gate.lock();
            while gate.wanted == Wanted::Stand {
                self.changed.wait(&mut gate);
            }
            if gate.wanted == Wanted::End {
                break;
            }
            self.note(&mut gate, id, Doing::Running);
            drop(gate);
            let leave = self.stay_in_guest(cpu);
            let mut gate = self.gate.lock();
            match leave {
                Leave::Asked => self.note(&mut gate, id, Doing::Standing),
                Leave::Done(reason) => {
                    self.note(&mut gate, id, Doing::Ended);
                    drop(gate);
                    self.exits.send(reason);
                    break;
                }
            }
        }
        let mut gate = self.gate.lock();
        if let Some(slot) = gate.kickers.get_mut(id) {
            *slot = None;
        }
        self.note(&mut gate, id, Doing::Ended);
    }

    fn note(&self, gate: &mut Gate, id: usize, doing: Doing) {
        if let Some(slot) = gate.doing.get_mut(id) {
            *slot = doing;
        }
        self.changed.notify_all();
    }

    fn stay_in_guest(&self, cpu: &Mutex<Box<dyn Vcpu>>) -> Leave {
        let mut cpu = cpu.lock();
        let bound = cpu.bind_to_thread();
        // A kick from before the binding was lost, but what it was for was set before it came.
        let mut leave = (self.gate.lock().wanted != Wanted::Run).then_some(Leave::Asked);
        let leave = loop {
            if let Some(leave) = leave {
                break leave;
            }
            leave = match self.step(&mut **cpu) {
                Ok(leave) => leave,
                Err(error) => Some(Leave::Done(ExitReason::Failed(describe(&error)))),
            };
        };
        drop(bound);
        // An access that the guest began must not be half done when the state is read.
        match cpu.complete_pending_io() {
            Ok(()) => leave,
            Err(error) => Leave::Done(ExitReason::Failed(describe(&error))),
        }
    }

    /// Runs to the next exit and answers it.
    fn step(&self, cpu: &mut dyn Vcpu) -> Result<Option<Leave>, HypervisorError> {
        let done = |reason| Ok(Some(Leave::Done(reason)));
        match cpu.run()? {
            VcpuExit::IoIn(port, data) => self.pio.read(u64::from(port), data),
            VcpuExit::IoOut(port, data) => self.pio.write(u64::from(port), data),
            VcpuExit::MmioRead(address, data) => self.mmio.read(address.0, data),
            VcpuExit::MmioWrite(address, data) => self.mmio.write(address.0, data),
            VcpuExit::Interrupted => {
                cpu.clear_kick();
                if self.gate.lock().wanted != Wanted::Run {
                    return Ok(Some(Leave::Asked));
                }
            }
            // The guest resets by a triple fault as a last resort.
            VcpuExit::Shutdown => return done(ExitReason::Reset),
            VcpuExit::SystemEvent(kind) => return done(ExitReason::from_system_event(kind)),
            VcpuExit::Hlt => return done(ExitReason::Failed("halted without an interrupt chip".into())),
            VcpuExit::FailEntry { reason } => {
                return done(ExitReason::Failed(format!("the processor refused entry, reason {reason:#x}")));
            }
            VcpuExit::Other(exit) => return done(ExitReason::Failed(format!("exit {exit}"))),
            VcpuExit::InternalError => {
                let (suberror, data) = cpu.internal_error();
                let rip = cpu.regs().map(|regs| regs.rip).unwrap_or_default();
                return done(ExitReason::Failed(format!(
                    "KVM internal error {suberror} at rip {rip:#x}, data {data:x?}"
                )));
            }
        }
        Ok(None)
    }
}

fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
