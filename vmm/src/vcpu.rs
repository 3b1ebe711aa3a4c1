//! The vCPU threads: running, standing still, ending.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use devices::bus::Bus;
use devices::thread::{ThreadKind, ThreadSpawner};
use hypervisor::{Error as HypervisorError, Vcpu, VcpuExit, VcpuKicker};
use parking_lot::{Condvar, Mutex};
use vm_migration::ErrorChain;

use crate::notice::{ExitReason, ExitSender};

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
}

struct Shared {
    gate: Mutex<Gate>,
    changed: Condvar,
    pio: Arc<Bus>,
    mmio: Arc<Bus>,
    exits: ExitSender,
    kickers: Vec<VcpuKicker>,
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
            }),
            kickers: cpus.iter().map(|cpu| cpu.kicker()).collect(),
            changed: Condvar::new(),
            pio: around.pio,
            mmio: around.mmio,
            exits: around.exits,
        });
        let mut this = Self {
            shared,
            cpus: Vec::new(),
            threads: Vec::new(),
        };
        for (id, cpu) in cpus.into_iter().enumerate() {
            let cpu = Arc::new(Mutex::new(cpu));
            let (shared, own) = (Arc::clone(&this.shared), Arc::clone(&cpu));
            let thread = spawner
                .spawn(ThreadKind::Vcpu, &format!("vcpu{id}"), move || {
                    shared.serve(id, &own)
                })
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
        self.shared.kick_all();
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
            self.shared.kick_all();
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
    fn kick_all(&self) {
        for kicker in &self.kickers {
            if let Err(error) = kicker.kick() {
                tracing::error!(%error, "cannot signal a vCPU; it stops at its next exit");
            }
        }
    }

    /// The life of a vCPU's thread.
    fn serve(&self, id: usize, cpu: &Mutex<Box<dyn Vcpu>>) {
        let leave = self.serve_until_end(id, cpu);
        self.note(&mut self.gate.lock(), id, Doing::Ended);
        if let Some(reason) = leave {
            self.exits.send(reason);
        }
    }

    fn serve_until_end(&self, id: usize, cpu: &Mutex<Box<dyn Vcpu>>) -> Option<ExitReason> {
        let attached = cpu.lock().kicker().attach();
        if let Err(error) = &attached {
            return Some(ExitReason::Failed(ErrorChain(error).to_string()));
        }
        loop {
            let mut gate = self.gate.lock();
            while gate.wanted == Wanted::Stand {
                self.changed.wait(&mut gate);
            }
            if gate.wanted == Wanted::End {
                return None;
            }
            self.note(&mut gate, id, Doing::Running);
            drop(gate);
            match self.stay_in_guest(&mut **cpu.lock()) {
                Ok(Leave::Asked) => self.note(&mut self.gate.lock(), id, Doing::Standing),
                Ok(Leave::Done(reason)) => return Some(reason),
                Err(error) => return Some(ExitReason::Failed(ErrorChain(&error).to_string())),
            }
        }
    }

    fn note(&self, gate: &mut Gate, id: usize, doing: Doing) {
        if let Some(slot) = gate.doing.get_mut(id) {
            *slot = doing;
        }
        self.changed.notify_all();
    }

    fn stay_in_guest(&self, cpu: &mut dyn Vcpu) -> Result<Leave, HypervisorError> {
        let leave = loop {
            match self.answer(cpu.run()?) {
                Step::Again => {}
                Step::Interrupted if self.gate.lock().wanted == Wanted::Run => {}
                Step::Interrupted => break Leave::Asked,
                Step::Done(reason) => return Ok(Leave::Done(reason)),
            }
        };
        // An access that the guest began must not be half done when its state is read; one
        // access may take several exits.
        loop {
            match self.answer(cpu.complete_pending_io()?) {
                Step::Again => {}
                Step::Interrupted => return Ok(leave),
                Step::Done(reason) => return Ok(Leave::Done(reason)),
            }
        }
    }

    fn answer(&self, exit: VcpuExit<'_>) -> Step {
        match exit {
            VcpuExit::IoIn { port, size, data } => {
                for access in data.chunks_mut(size.max(1)) {
                    self.pio.read(u64::from(port), access);
                }
            }
            VcpuExit::IoOut { port, size, data } => {
                for access in data.chunks(size.max(1)) {
                    self.pio.write(u64::from(port), access);
                }
            }
            VcpuExit::MmioRead { address, data } => self.mmio.read(address.0, data),
            VcpuExit::MmioWrite { address, data } => self.mmio.write(address.0, data),
            VcpuExit::Interrupted => return Step::Interrupted,
            // A guest resets by a triple fault as its last resort.
            VcpuExit::Shutdown => return Step::Done(ExitReason::Reset),
            VcpuExit::SystemEvent { kind } => {
                return Step::Done(ExitReason::from_system_event(kind));
            }
            failure @ (VcpuExit::Hlt
            | VcpuExit::InternalError { .. }
            | VcpuExit::FailEntry { .. }
            | VcpuExit::MemoryFault { .. }
            | VcpuExit::Other(_)) => {
                return Step::Done(ExitReason::Failed(format!(
                    "vCPU cannot go on: {failure:x?}"
                )));
            }
        }
        Step::Again
    }
}

/// What follows from an exit.
enum Step {
    Again,
    Interrupted,
    Done(ExitReason),
}
