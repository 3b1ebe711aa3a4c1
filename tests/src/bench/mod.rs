//! Whole-VM measurements: Ferry beside QEMU, the native guest in both, in the same run.
//!
//! What makes the figures comparable:
//! - both get the same downtime target and no limit of bandwidth, and the same guest: its pages are
//!   incompressible and all of them written before;
//! - runs of all contenders take turns, so that a busy moment of the machine meets all of them;
//! - memory is warm: the pages a destination will take have been touched just before, as the first
//!   touch of memory that an outer host has not backed costs ten times as much (a pool of huge
//!   pages, touched once, where there is one);
//! - beside the downtime a VMM reports stands the gap that the guest measured itself;
//! - after every migration the guest checks every page.
//!
//! - `contender`: how each VMM is started and told to migrate; `qmp`: QEMU's control socket.
//! - [`migration`], [`startup`], [`tracking`]: what is measured.
//! - [`stats`], `table`, `chart`: what is made of it.

mod chart;
mod contender;
pub mod migration;
mod qmp;
pub mod startup;
pub mod stats;
mod table;
pub mod tracking;
mod warm;

use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

pub use contender::{Backing, Contender, Vmm};

use migration::{MigrationRow, Plan};
use startup::StartupRow;
use tracking::TrackingRow;

/// What to measure.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// A short run: one downtime target, unix only, fewer runs.
    pub quick: bool,
    /// Runs of each migration; a default by `quick` if not given.
    pub runs: Option<u32>,
    /// Guest RAM of the migrations in MiB.
    pub memory_mib: u64,
    /// Whether to measure start-up and memory use.
    pub startup: bool,
    /// Whether to measure migrations.
    pub migration: bool,
    /// Whether to measure what dirty tracking costs.
    pub tracking: bool,
}

/// Where it was measured.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// `model name` of the first CPU.
    pub cpu: String,
    /// CPUs this process may use.
    pub cpus: usize,
    /// `uname -r`.
    pub kernel: String,
    /// First line of `qemu-system-x86_64 --version`.
    pub qemu: String,
    /// Load average at start and end: of the last minute.
    pub load: [f64; 2],
}

/// Everything.
#[derive(Clone, Debug, Serialize)]
pub struct Results {
    /// Where.
    pub machine: Machine,
    /// Start-up and memory use.
    pub startup: Vec<StartupRow>,
    /// Migrations.
    pub migrations: Vec<MigrationRow>,
    /// What dirty tracking costs.
    pub tracking: Vec<TrackingRow>,
}

/// Measures; progress goes to standard error, files to `dir`.
///
/// # Errors
/// When a VMM cannot be started at all. A migration that fails is a result.
pub fn run(options: Options, dir: &Path) -> Result<Results> {
    let _priority = raise_priority();
    let before = load();
    let startup = if options.startup {
        startup::measure(dir, if options.quick { 5 } else { 15 })?
    } else {
        Vec::new()
    };
    let runs = options.runs.unwrap_or(if options.quick { 1 } else { 3 });
    let migrations = if options.migration {
        migration::measure(dir, &Plan::new(options.quick, runs, options.memory_mib))?
    } else {
        Vec::new()
    };
    let tracking = if options.tracking {
        // Four times that of the other migrations: 4 GiB, unless something else is asked for.
        tracking::measure(dir, runs, options.memory_mib.saturating_mul(4))
    } else {
        Vec::new()
    };
    Ok(Results {
        machine: Machine {
            cpu: cpu_model(),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: text("/proc/sys/kernel/osrelease"),
            qemu: contender::qemu_version(),
            load: [before, load()],
        },
        startup,
        migrations,
        tracking,
    })
}

impl Results {
    /// The results as text.
    pub fn table(&self) -> String {
        table::render(self)
    }

    /// Writes `bench.json` and `bench.svg` into `dir`.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn write(&self, dir: &Path) -> Result<()> {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let json = serde_json::to_string_pretty(self)?;
        std::fs::write(dir.join("bench.json"), json)?;
        std::fs::write(dir.join("bench.svg"), chart::render(&self.migrations))?;
        Ok(())
    }
}

/// Other work on the machine shall disturb as little as may be; children inherit it.
fn raise_priority() -> SessionPriority {
    // SAFETY: it changes only this process's priority.
    let result = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -20) };
    let session = SessionPriority::raise();
    if result != 0 || session.0.is_none() {
        eprintln!("bench: cannot raise the priority (not root?); figures may be noisier");
    }
    session
}

/// The session's weight among others, sched(7): where sessions are scheduled as groups, a
/// process's own priority counts within its session only. Goes back to what it was when dropped.
struct SessionPriority(Option<String>);

impl SessionPriority {
    const FILE: &str = "/proc/self/autogroup";

    fn raise() -> Self {
        let Ok(before) = std::fs::read_to_string(Self::FILE) else {
            // A kernel without such groups: nothing to do.
            return Self(Some(String::new()));
        };
        let nice = before.split_ascii_whitespace().last().unwrap_or("0");
        Self(
            std::fs::write(Self::FILE, "-20")
                .is_ok()
                .then(|| nice.to_owned()),
        )
    }
}

impl Drop for SessionPriority {
    fn drop(&mut self) {
        if let Some(nice) = self.0.as_deref().filter(|nice| !nice.is_empty()) {
            // At worst the session stays a little more important.
            let _ = std::fs::write(Self::FILE, nice);
        }
    }
}

fn text(path: &str) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.trim().to_owned()
}

fn cpu_model() -> String {
    let info = text("/proc/cpuinfo");
    let line = info.lines().find(|line| line.starts_with("model name"));
    line.and_then(|line| line.split_once(": "))
        .map_or_else(|| "unknown".to_owned(), |(_, model)| model.to_owned())
}

fn load() -> f64 {
    let load = text("/proc/loadavg");
    load.split(' ')
        .next()
        .and_then(|load| load.parse().ok())
        .unwrap_or(0.0)
}
