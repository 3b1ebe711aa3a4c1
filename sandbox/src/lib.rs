//! System-call filters: each kind of thread may make the calls it needs and no others.
//!
//! A guest that breaks out of its virtual CPU or a device into a program's address space finds that
//! the thread it broke into can do little more than what it did before.
//!
//! # How to use it
//! - [`Filters::new`], early in `main`, compiles one program per [`ThreadKind`] the program has.
//! - [`Filters::spawner`] starts threads that are confined before their first line of code.
//! - [`Filters::confine`] confines the thread it is called on: `main` does that to itself last,
//!   when all that needs more rights is open.
//!
//! A thread inherits the filter of the thread that starts it, in addition to its own, so a thread
//! that starts others is allowed whatever they are.
//!
//! A forbidden call ends the process ([`FORBIDDEN_CALL_STATUS`]) with a line on standard error that
//! names program, thread, kind and call. A panic's message is written, but its backtrace
//! (`RUST_BACKTRACE=1`) would read files: to have one, run with `--seccomp false`.
//!
//! # Where things are
//! `profile.rs` is the one table of who may do what; `filter.rs` makes a program of a profile;
//! `handler.rs` says what was forbidden; `names.rs` knows the system calls.

mod allocator;
mod filter;
mod handler;
mod mode;
mod names;
mod profile;

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use devices::{ThreadKind, ThreadSpawner};
use seccompiler::{BackendError, BpfProgram};
use thiserror::Error;

pub use handler::FORBIDDEN_CALL_STATUS;
pub use mode::{SeccompMode, SeccompModeError};

/// Why a thread could not be confined.
#[derive(Debug, Error)]
pub enum SeccompError {
    /// A profile names a system call this architecture does not have.
    #[error("system call `{name}` of a seccomp profile is unknown; correct sandbox/src/profile.rs")]
    UnknownCall {
        /// The name.
        name: &'static str,
    },
    /// A profile makes no program.
    #[error(
        "the seccomp profile of {kind:?} threads does not compile; correct sandbox/src/profile.rs"
    )]
    Compile {
        /// The kind of thread.
        kind: ThreadKind,
        /// The compiler's reason.
        #[source]
        source: BackendError,
    },
    /// The kernel did not take the program.
    #[error(
        "the kernel refused the seccomp filter of {kind:?} threads; a kernel without CONFIG_SECCOMP_FILTER needs --seccomp false"
    )]
    Install {
        /// The kind of thread.
        kind: ThreadKind,
        /// The kernel's reason.
        #[source]
        source: seccompiler::Error,
    },
    /// `SIGSYS` could not be caught.
    #[error("cannot handle SIGSYS")]
    Signal(#[source] io::Error),
    /// The allocator could not be kept from opening files.
    #[error("cannot prepare the allocator for confined threads")]
    Allocator(#[source] io::Error),
    /// There is no program for the kind: no thread of this program is known to start it.
    #[error(
        "there is no seccomp filter for {kind:?} threads; add the kind to what its maker `starts` in sandbox/src/profile.rs"
    )]
    NoFilter {
        /// The kind of thread.
        kind: ThreadKind,
    },
}

/// The filters of all kinds of threads of one program, compiled. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Filters {
    mode: SeccompMode,
    programs: Arc<HashMap<ThreadKind, BpfProgram>>,
}

impl Filters {
    /// Compiles the filters for a main thread of kind `main`, for all it starts, and so on, and
    /// catches `SIGSYS` if they are to be enforced. `program` is what messages begin with; the
    /// first call of a process decides. To be called before there are other threads.
    ///
    /// # Errors
    /// [`SeccompError`] if a profile is wrong or the signal cannot be caught.
    pub fn new(
        program: &'static str,
        main: ThreadKind,
        mode: SeccompMode,
    ) -> Result<Self, SeccompError> {
        if mode == SeccompMode::Enforce {
            handler::install(program).map_err(SeccompError::Signal)?;
        }
        if mode != SeccompMode::Off {
            allocator::keep_to_one_arena().map_err(SeccompError::Allocator)?;
            // rustix asks for the auxiliary vector (prctl, or its file in /proc) at first use.
            rustix::param::page_size();
        }
        let programs = profile::reachable(main)
            .into_iter()
            .map(|kind| Ok((kind, filter::compile(kind, mode)?)))
            .collect::<Result<_, SeccompError>>()?;
        Ok(Self {
            mode,
            programs: Arc::new(programs),
        })
    }

    /// Confines the calling thread for good. Does nothing if filters are off.
    ///
    /// # Errors
    /// [`SeccompError`] if the kernel refuses.
    pub fn confine(&self, kind: ThreadKind) -> Result<(), SeccompError> {
        if self.mode == SeccompMode::Off {
            return Ok(());
        }
        handler::set_kind(name(kind));
        handler::unblock().map_err(SeccompError::Signal)?;
        let program = self
            .programs
            .get(&kind)
            .ok_or(SeccompError::NoFilter { kind })?;
        seccompiler::apply_filter(program).map_err(|source| SeccompError::Install { kind, source })
    }

    /// A spawner whose threads are confined before they do anything else.
    pub fn spawner(&self) -> ThreadSpawner {
        let filters = self.clone();
        ThreadSpawner::new(move |kind| filters.confine(kind).map_err(io::Error::other))
    }
}

/// A kind's name, for messages.
fn name(kind: ThreadKind) -> &'static str {
    match kind {
        ThreadKind::Vmm => "vmm",
        ThreadKind::Vcpu => "vcpu",
        ThreadKind::Api => "api",
        ThreadKind::MigrationSend => "migration-send",
        ThreadKind::MigrationReceive => "migration-receive",
        ThreadKind::VirtioNet => "virtio-net",
        ThreadKind::VirtioNetControl => "virtio-net-control",
        ThreadKind::VhostUser => "vhost-user",
        ThreadKind::VirtioConsole => "virtio-console",
        ThreadKind::VirtioRng => "virtio-rng",
        ThreadKind::Serial => "serial",
        ThreadKind::VfioUser => "vfio-user",
        ThreadKind::DeviceNews => "device-news",
        ThreadKind::VfioServer => "vfio-server",
        ThreadKind::Signal => "signal",
        ThreadKind::EventMonitor => "event-monitor",
    }
}
