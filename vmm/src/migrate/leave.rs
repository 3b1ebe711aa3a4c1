//! Taking down what a guest leaves behind.

use std::thread::JoinHandle;

use devices::thread::{ThreadKind, ThreadSpawner};
use vm_migration::migrate::{MigrationStatus, Side, SourcePhase};

use crate::machine::Machine;
use crate::notice::NoticeSender;

/// A machine whose guest runs elsewhere, taken down by a thread: to unmap the memory of a large
/// guest takes seconds, in which the control loop is to answer. The migration is not over before,
/// so that who sees its end finds taps, sockets and huge pages free.
pub struct Leaving {
    status: Box<MigrationStatus>,
    thread: Option<JoinHandle<()>>,
}

impl Leaving {
    /// Takes `machine` down; its end is told to `done`. Without a thread it is done at once.
    pub fn start(
        machine: Box<Machine>,
        status: Box<MigrationStatus>,
        spawner: &ThreadSpawner,
        done: NoticeSender<()>,
    ) -> Self {
        let fallback = done.clone();
        let body = move || {
            drop(machine);
            done.send(());
        };
        // What takes a machine down is among what a migration's thread may do.
        let thread = spawner
            .spawn(ThreadKind::MigrationSend, "migration-leave", body)
            .inspect_err(|error| {
                // The machine was dropped with the closure.
                tracing::warn!(%error, "no thread to take the VM down");
                fallback.send(());
            });
        Self {
            status,
            thread: thread.ok(),
        }
    }

    /// How the migration is doing: all but over.
    pub fn status(&self) -> MigrationStatus {
        MigrationStatus {
            side: Side::Source(SourcePhase::Finalize),
            ..(*self.status).clone()
        }
    }

    /// Waits until the machine is gone; gives the migration's last status.
    pub fn finish(&mut self) -> Box<MigrationStatus> {
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("taking the VM down panicked");
        }
        self.status.clone()
    }
}
