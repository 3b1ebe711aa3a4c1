//! Threads that serve devices, each of a kind that names its system-call filter.

use std::io;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

/// What a thread does, hence which system calls it may make.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ThreadKind {
    /// The VMM's control loop.
    Vmm,
    /// Runs a virtual CPU.
    Vcpu,
    /// Serves the REST API.
    Api,
    /// Drives an outgoing migration.
    MigrationSend,
    /// Drives an incoming migration.
    MigrationReceive,
    /// Moves packets of one virtio-net queue pair.
    VirtioNet,
    /// Serves virtio-net's control queue.
    VirtioNetControl,
    /// Watches the backend of a vhost-user device, or serves its control queue.
    VhostUser,
    /// Serves virtio-console.
    VirtioConsole,
    /// Serves virtio-rng.
    VirtioRng,
    /// Feeds serial input to the guest.
    Serial,
    /// Reads messages of a vfio-user server.
    VfioUser,
    /// Waits for news of a device of the host.
    DeviceNews,
    /// Serves a device to the client of a vfio-user socket.
    VfioServer,
    /// Handles process signals.
    Signal,
    /// Writes events to their sink.
    EventMonitor,
}

type Enter = dyn Fn(ThreadKind) -> io::Result<()> + Send + Sync;

/// Starts threads and confines each before it does anything else.
#[derive(Clone)]
pub struct ThreadSpawner {
    enter: Arc<Enter>,
}

impl ThreadSpawner {
    /// A spawner that calls `enter` first on each new thread (to install its system-call filter).
    /// A thread whose `enter` fails does not run.
    pub fn new(enter: impl Fn(ThreadKind) -> io::Result<()> + Send + Sync + 'static) -> Self {
        Self {
            enter: Arc::new(enter),
        }
    }

    /// A spawner that confines nothing, for unit tests and tools.
    pub fn unconfined() -> Self {
        Self::new(|_| Ok(()))
    }

    /// Runs `body` on a new thread called `name`.
    ///
    /// # Errors
    /// The operating system's, if the thread cannot be made.
    pub fn spawn<F>(&self, kind: ThreadKind, name: &str, body: F) -> io::Result<JoinHandle<()>>
    where
        F: FnOnce() + Send + 'static,
    {
        let enter = Arc::clone(&self.enter);
        Builder::new()
            .name(name.to_owned())
            .spawn(move || match enter(kind) {
                Ok(()) => body(),
                Err(error) => {
                    tracing::error!(?kind, %error, "thread could not be confined; it ends")
                }
            })
    }
}
