//! The native guest in a `ferry` process, and wherever it moves to.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::ferry::Ferry;
use crate::guest;
use crate::guest_output::{GuestLog, Tick, Verify};
use crate::process::wait_for;

/// How the guest powers a machine of Ferry's off: SLP_EN and sleep type 5 to the sleep control
/// register.
const POWER_OFF: &str = "poweroff_port=0x600 poweroff_value=0x34";

/// How long the guest may take to say what it was asked for, on a loaded machine.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// What guest RAM is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ram {
    /// Private anonymous memory.
    Anonymous,
    /// A memfd.
    Shared,
    /// Huge pages of 2 MiB.
    Huge,
}

/// A VM with the native guest.
#[derive(Clone, Debug)]
pub struct VmSpec {
    /// RAM in MiB.
    pub mib: u64,
    /// What it is made of.
    pub ram: Ram,
    /// vCPUs.
    pub cpus: u32,
    /// The guest's words (`tests/guest/src/main.rs` lists them); power-off and 100 ms between
    /// reports go without saying.
    pub words: String,
    /// `net` of the configuration.
    pub nets: Vec<Value>,
    /// `user_devices` of the configuration.
    pub user_devices: Vec<Value>,
    /// `memory.dirty_log`.
    pub dirty_log: &'static str,
    /// `memory.dirty_ring_entries`.
    pub dirty_ring_entries: Option<u32>,
}

impl VmSpec {
    /// One CPU, shared memory, no NIC.
    pub fn new(mib: u64, words: &str) -> Self {
        Self {
            mib,
            ram: Ram::Shared,
            cpus: 1,
            words: words.to_owned(),
            nets: Vec::new(),
            user_devices: Vec::new(),
            dirty_log: "bitmap",
            dirty_ring_entries: None,
        }
    }

    /// As `vm.create` takes it.
    ///
    /// # Errors
    /// When the guest cannot be built.
    pub fn config(&self) -> Result<Value> {
        let cpus = self.cpus;
        Ok(json!({
            "cpus": {"boot_vcpus": cpus, "max_vcpus": cpus},
            "memory": {
                "size": self.mib << 20,
                "shared": self.ram == Ram::Shared,
                "hugepages": self.ram == Ram::Huge,
                "dirty_log": self.dirty_log,
                "dirty_ring_entries": self.dirty_ring_entries,
            },
            "payload": {
                "kernel": guest::elf()?,
                "cmdline": format!("tick=100 smp={cpus} {POWER_OFF} {}", self.words),
            },
            "net": self.nets,
            "user_devices": self.user_devices,
            "serial": {"mode": "Tty"},
            "console": {"mode": "Off"},
        }))
    }
}

/// A running native guest and all it has said, here and where it was before.
#[derive(Debug)]
pub struct Vm {
    /// Where it runs.
    pub ferry: Ferry,
    /// What it said.
    pub log: GuestLog,
}

impl Vm {
    /// Boots the guest in a new process and waits until it works.
    ///
    /// # Errors
    /// When it does not get that far.
    pub fn boot(dir: &Path, name: &str, spec: &VmSpec) -> Result<Self> {
        Self::boot_in(Ferry::start(dir, name, &[])?, spec)
    }

    /// The same in a process without a VM.
    ///
    /// # Errors
    /// As [`Vm::boot`].
    pub fn boot_in(ferry: Ferry, spec: &VmSpec) -> Result<Self> {
        ferry.boot(&spec.config()?)?;
        let mut vm = Self {
            ferry,
            log: GuestLog::default(),
        };
        vm.wait_log("READY", GuestLog::is_ready)?;
        Ok(vm)
    }

    /// Adds what the guest said to the log.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn pull(&mut self) -> Result<()> {
        let bytes = self.ferry.take_serial()?;
        self.log.feed(&bytes)
    }

    /// Reads until `seen` is true of the log.
    ///
    /// # Errors
    /// When it does not become true in time, or the process ends.
    pub fn wait_log(&mut self, what: &str, seen: impl Fn(&GuestLog) -> bool) -> Result<()> {
        let waited = wait_for(what, ANSWER_LIMIT, || {
            self.pull()?;
            let seen = seen(&self.log);
            if !seen {
                self.ferry.process.check()?;
            }
            Ok(seen.then_some(()))
        });
        waited.with_context(|| self.ferry.last_words())
    }

    /// The guest's last report.
    ///
    /// # Errors
    /// When there was none.
    pub fn last_tick(&self) -> Result<&Tick> {
        self.log.ticks().next_back().context("no report yet")
    }

    /// Waits for `count` more reports; gives the last.
    ///
    /// # Errors
    /// When they do not come.
    pub fn wait_ticks(&mut self, count: usize) -> Result<Tick> {
        self.pull()?;
        let enough = self.log.ticks().count() + count;
        self.wait_log("reports", |log| log.ticks().count() >= enough)?;
        self.last_tick().cloned()
    }

    /// Audits the guest's memory.
    ///
    /// # Errors
    /// When no result comes.
    pub fn verify(&mut self) -> Result<Verify> {
        self.pull()?;
        let before = self.log.verifies().count();
        self.ferry.type_in(b"v")?;
        self.wait_log("VERIFY", |log| log.verifies().count() > before)?;
        self.log.verifies().next_back().copied().context("no audit")
    }

    /// Audits the guest's memory and finds that it and all it said are as they must be.
    ///
    /// # Errors
    /// What is wrong.
    pub fn verify_clean(&mut self) -> Result<Verify> {
        let found = self.verify()?;
        self.check_complaints()?;
        ensure!(found.pages > 0 && found.corrupt == 0, "{found:?}");
        ensure!(found.rx_pages_corrupt == 0, "{found:?}");
        Ok(found)
    }

    /// Finds that the guest has nothing to complain about.
    ///
    /// # Errors
    /// Its complaints.
    pub fn check_complaints(&mut self) -> Result<()> {
        self.pull()?;
        let complaints = self.log.complaints();
        ensure!(
            complaints.is_empty(),
            "{complaints:?}\n{}",
            self.ferry.last_words()
        );
        Ok(())
    }

    /// Finds that the guest runs here, does its work and has nothing to complain about.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check_runs(&mut self) -> Result<Tick> {
        let state = self.ferry.state()?;
        ensure!(state == "Running", "the VM is {state}");
        let tick = self.wait_ticks(3)?;
        self.check_complaints()?;
        Ok(tick)
    }

    /// Makes the guest forget its longest gap, so that the next report has those from now on.
    ///
    /// # Errors
    /// When it does not hear.
    pub fn reset_gap(&mut self) -> Result<()> {
        self.ferry.type_in(b"r")?;
        // It listens every 20 ms.
        self.wait_ticks(2).map(drop)
    }

    /// The guest went to `to`: goes on reading there. Gives the process it left.
    ///
    /// # Errors
    /// When the rest of what it said cannot be read.
    pub fn follow(&mut self, to: Ferry) -> Result<Ferry> {
        self.pull()?;
        Ok(std::mem::replace(&mut self.ferry, to))
    }

    /// Ends the guest, whose last report is then in the log. Gives the process without a VM.
    ///
    /// # Errors
    /// When it does not power off.
    pub fn power_off(mut self) -> Result<(Ferry, GuestLog)> {
        self.ferry.type_in(b"q")?;
        self.ferry.wait_event("shutdown", ANSWER_LIMIT)?;
        self.pull()?;
        Ok((self.ferry, self.log))
    }
}
