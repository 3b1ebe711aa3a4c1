//! `ferry` with its guest on a [`Console`], as demo and bench drive it.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;
use vm_migration::migrate::{DestinationPhase, MigrationStatus, Side, SourcePhase};

use crate::api::Api;
use crate::console::Console;
use crate::ferry::program;
use crate::process::wait_for;

/// How long ferry may take to answer its first request.
const START_LIMIT: Duration = Duration::from_secs(20);
/// How long the destination may take to say that the guest runs after the source said so.
const SETTLE_LIMIT: Duration = Duration::from_secs(10);

/// A `ferry` process.
#[derive(Debug)]
pub struct FerryConsole {
    /// The process, and its guest's serial port where that is `tty`.
    pub console: Console,
    /// Its REST API.
    pub api: Api,
    /// From its start until the API answered.
    pub api_ready: Duration,
}

impl FerryConsole {
    /// Starts `ferry` with `arguments`; its API socket, events (`NAME.events`) and standard error
    /// (`NAME.log`) are in `dir`. Waits until the API answers.
    ///
    /// # Errors
    /// When it does not start or answer.
    pub fn start(dir: &Path, name: &str, arguments: &[String]) -> Result<Self> {
        let socket = dir.join(format!("{name}.sock"));
        let mut command = Command::new(program("ferry")?);
        command
            .args(["--api-socket", &format!("path={}", socket.display())])
            .args([
                "--event-monitor",
                &format!("path={}", dir.join(format!("{name}.events")).display()),
            ])
            .args(arguments);
        let console = Console::start(name, command, &dir.join(format!("{name}.log")))?;
        let mut this = Self {
            console,
            api: Api::new(&socket),
            api_ready: Duration::ZERO,
        };
        wait_for("the API", START_LIMIT, || {
            this.console.check()?;
            Ok(this.api.get("vmm.ping").ok())
        })?;
        this.api_ready = this.console.started().elapsed();
        Ok(this)
    }

    /// How the migration that runs or ran last is doing.
    ///
    /// # Errors
    /// When the API does not answer.
    pub fn migration(&self) -> Result<MigrationStatus> {
        Ok(serde_json::from_value(self.api.get("vm.migration")?)?)
    }

    /// Asks for the guest to be moved away; `downtime_ms` is the longest it may stand still.
    ///
    /// # Errors
    /// When ferry refuses.
    pub fn send(&self, url: &str, downtime_ms: u64) -> Result<()> {
        let body = json!({"destination_url": url, "downtime_ms": downtime_ms});
        self.api.put("vm.send-migration", Some(&body)).map(drop)
    }

    /// Follows a migration away from here, telling `tell` how it is doing every `interval`, until
    /// the guest runs at `destination`.
    ///
    /// # Errors
    /// Why it failed, or that it took longer than `limit`.
    pub fn follow(
        &mut self,
        destination: &mut Self,
        (interval, limit): (Duration, Duration),
        mut tell: impl FnMut(&MigrationStatus),
    ) -> Result<MigrationStatus> {
        let deadline = Instant::now() + limit;
        let status = loop {
            let status = self
                .migration()
                .with_context(|| self.console.words())
                .context("the source does not answer")?;
            tell(&status);
            match &status.side {
                Side::Source(SourcePhase::Done) => break status,
                Side::Source(SourcePhase::Aborted { why }) => {
                    let other = destination.console.words();
                    bail!("the migration failed: {why}; {other}")
                }
                Side::Source(_) | Side::Destination(_) => {}
            }
            if Instant::now() > deadline {
                bail!("the migration is not over after {limit:?}: {status:?}");
            }
            std::thread::sleep(interval);
        };
        wait_for("the guest at the destination", SETTLE_LIMIT, || {
            destination.console.check()?;
            let side = destination.migration()?.side;
            Ok((side == Side::Destination(DestinationPhase::Running)).then_some(()))
        })?;
        Ok(status)
    }
}
