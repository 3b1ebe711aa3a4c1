//! Moving a guest from one process to another, and what it cost.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::channel_proxy::{ChannelProxy, Judge};
use crate::ferry::{Ferry, phase_name};
use crate::vm::Vm;

/// How long a migration may take on a loaded machine.
const LIMIT: Duration = Duration::from_secs(120);

/// Which way, and how.
#[derive(Clone, Debug)]
pub struct Route {
    /// Where the destination listens.
    pub listen: String,
    /// Where the source sends; differs when there is a proxy between.
    pub send_to: String,
    /// More of the body of `vm.send-migration`.
    pub send: Value,
    /// More of the body of `vm.receive-migration`.
    pub receive: Value,
}

impl Route {
    /// By a unix socket in `dir`.
    pub fn unix(dir: &Path) -> Self {
        Self::direct(format!("unix:{}", dir.join("migration").display()))
    }

    /// By TCP on loopback, on a port that is free now.
    ///
    /// # Errors
    /// When there is none.
    pub fn tcp() -> Result<Self> {
        let port = free_port()?;
        Ok(Self::direct(format!("tcp:127.0.0.1:{port}")))
    }

    fn direct(url: String) -> Self {
        Self {
            listen: url.clone(),
            send_to: url,
            send: json!({}),
            receive: json!({}),
        }
    }

    /// The same with a man in the middle.
    ///
    /// # Errors
    /// As [`ChannelProxy::start`].
    pub fn through(mut self, dir: &Path, judge: Judge) -> Result<(Self, ChannelProxy)> {
        let proxy = ChannelProxy::start(dir, &self.listen, judge)?;
        self.send_to.clone_from(&proxy.url);
        Ok((self, proxy))
    }

    /// The same with these properties of `vm.send-migration`.
    #[must_use]
    pub fn sending(mut self, properties: Value) -> Self {
        self.send = properties;
        self
    }

    /// The same with these properties of `vm.receive-migration`.
    #[must_use]
    pub fn receiving(mut self, properties: Value) -> Self {
        self.receive = properties;
        self
    }

    /// Has `destination` listen.
    ///
    /// # Errors
    /// When it refuses.
    pub fn open(&self, destination: &Ferry) -> Result<()> {
        let mut body = self.receive.clone();
        body["receiver_url"] = json!(self.listen);
        destination.api.put("vm.receive-migration", Some(&body))?;
        Ok(())
    }

    /// Has `source` send its guest.
    ///
    /// # Errors
    /// When it refuses.
    pub fn go(&self, source: &Ferry) -> Result<()> {
        let mut body = self.send.clone();
        body["destination_url"] = json!(self.send_to);
        source.api.put("vm.send-migration", Some(&body))?;
        Ok(())
    }
}

/// A TCP port that nobody listens on.
///
/// # Errors
/// When there is none.
pub fn free_port() -> Result<u16> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    Ok(listener.local_addr()?.port())
}

/// What a migration cost.
#[derive(Clone, Debug)]
pub struct Moved {
    /// From the start to the guest running at the destination.
    pub total: Duration,
    /// How long it stood still, as the source has it.
    pub downtime: Duration,
    /// The longest time that the guest stood still, as it felt.
    pub gap: Duration,
    /// The source's last status.
    pub status: Value,
}

impl Moved {
    /// One line of a table.
    pub fn line(&self) -> String {
        let number = |key: &str| self.status[key].as_u64().unwrap_or_default();
        format!(
            "total {:>5} ms, downtime {:>6.1} ms, guest's gap {:>6.1} ms, rounds {}, {:>5} MiB sent",
            self.total.as_millis(),
            self.downtime.as_secs_f64() * 1e3,
            self.gap.as_secs_f64() * 1e3,
            number("rounds"),
            number("bytes") >> 20,
        )
    }
}

/// The middle one of some durations.
pub fn median(mut durations: Vec<Duration>) -> Duration {
    durations.sort_unstable();
    durations
        .get(durations.len() / 2)
        .copied()
        .unwrap_or_default()
}

impl Vm {
    /// Moves the guest to `destination`; gives the process it left. On return the guest runs
    /// there and has spoken.
    ///
    /// # Errors
    /// When the migration fails, naming both sides' reasons.
    pub fn migrate(&mut self, destination: Ferry, route: &Route) -> Result<(Ferry, Moved)> {
        self.reset_gap()?;
        route.open(&destination)?;
        route.go(&self.ferry)?;
        self.arrive(destination)
    }

    /// Waits for a migration that was started, follows the guest, and sums up.
    ///
    /// # Errors
    /// When the migration fails.
    pub fn arrive(&mut self, destination: Ferry) -> Result<(Ferry, Moved)> {
        let status = self.ferry.wait_migration(LIMIT)?;
        if phase_name(&status) != "done" {
            let there = destination.migration().unwrap_or_default();
            bail!(
                "source: {}\ndestination: {}\n{}",
                status["aborted"],
                there["aborted"],
                destination.process.output()
            );
        }
        let there = destination.wait_migration(LIMIT)?;
        ensure!(phase_name(&there) == "running", "destination: {there}");
        let left = self.follow(destination)?;
        let tick = self.check_runs()?;
        let total = status["elapsed_ms"].as_u64().context("no elapsed_ms")?;
        let downtime = status["downtime"]["total"].as_u64();
        let moved = Moved {
            total: Duration::from_millis(total),
            downtime: Duration::from_micros(downtime.context("no downtime.total")?),
            gap: Duration::from_micros(tick.max_gap_us),
            status,
        };
        Ok((left, moved))
    }

    /// Starts a migration that shall fail and waits until it has; gives the reason the source
    /// tells. The guest must run on here as if nothing had been.
    ///
    /// # Errors
    /// When it succeeds, does not end within `limit`, or leaves the guest other than it was.
    pub fn migrate_in_vain(
        &mut self,
        destination: &Ferry,
        route: &Route,
        limit: Duration,
    ) -> Result<String> {
        self.pull()?;
        route.open(destination)?;
        route.go(&self.ferry)?;
        let why = self.stays(limit)?;
        Ok(why)
    }

    /// Waits until a migration that was started has failed, and finds the guest unharmed; gives
    /// the reason.
    ///
    /// # Errors
    /// As [`Vm::migrate_in_vain`].
    pub fn stays(&mut self, limit: Duration) -> Result<String> {
        let status = self.ferry.wait_migration(limit)?;
        let phase = phase_name(&status);
        ensure!(phase == "aborted", "the migration ended {phase}: {status}");
        self.check_runs()?;
        self.verify_clean()?;
        let why = status["aborted"].as_str().context("no reason")?;
        Ok(why.to_owned())
    }
}

/// Finds that nothing arrived at `destination`, which is alive and ready for another try.
///
/// # Errors
/// What is wrong.
pub fn check_nothing_arrived(destination: &mut Ferry) -> Result<()> {
    destination.process.check()?;
    let status = destination.wait_migration(Duration::from_secs(30))?;
    ensure!(phase_name(&status) == "aborted", "destination: {status}");
    ensure!(!destination.has_vm()?, "there is a VM at the destination");
    Ok(())
}

/// Finds that a migration has succeeded, by what the source and the destination say of it.
///
/// # Errors
/// When it has not; both sides' last words are in the error.
pub fn ensure_moved(source: (&Ferry, &Value), destination: (&Ferry, &Value)) -> Result<()> {
    let ((left, here), (arrived, there)) = (source, destination);
    ensure!(
        phase_name(here) == "done" && phase_name(there) == "running",
        "source: {here}\n{}\ndestination: {there}\n{}",
        left.last_words(),
        arrived.last_words()
    );
    Ok(())
}
