//! How each VMM is started, and told to move its guest.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::json;

use super::qmp::Qmp;
use crate::console::Console;
use crate::vmm_process::FerryConsole;

/// How often a VMM is asked how its migration is doing.
const POLL: Duration = Duration::from_millis(20);
/// QEMU's default is 128 MiB/s; this is no limit.
const NO_LIMIT: u64 = 20_000 << 20;
const QEMU: &str = "qemu-system-x86_64";

/// A virtual machine monitor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Vmm {
    /// Ours.
    Ferry,
    /// QEMU with its `microvm` machine.
    Qemu,
}

/// What guest RAM is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Backing {
    /// A memfd that other processes may map: what passthrough needs.
    Memfd,
    /// Anonymous memory, with transparent huge pages where the kernel gives them.
    Anon,
    /// A memfd of 2 MiB pages from the pool.
    Huge,
}

/// A VMM with a kind of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Contender {
    /// The VMM.
    pub vmm: Vmm,
    /// Its guest's memory.
    pub backing: Backing,
}

impl Contender {
    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match (self.vmm, self.backing) {
            (Vmm::Ferry, Backing::Memfd) => "Ferry memfd",
            (Vmm::Ferry, Backing::Anon) => "Ferry anon",
            (Vmm::Ferry, Backing::Huge) => "Ferry 2M pages",
            (Vmm::Qemu, Backing::Memfd) => "QEMU memfd",
            (Vmm::Qemu, Backing::Anon) => "QEMU anon",
            (Vmm::Qemu, Backing::Huge) => "QEMU 2M pages",
        }
    }
}

/// What is booted.
#[derive(Clone, Debug)]
pub(super) struct Boot<'a> {
    pub(super) elf: &'a Path,
    pub(super) command_line: &'a str,
    pub(super) memory_mib: u64,
}

/// What a VMM says of a migration it did.
#[derive(Clone, Copy, Debug)]
pub(super) struct Said {
    pub(super) total_ms: f64,
    pub(super) downtime_ms: f64,
    pub(super) rounds: u64,
    pub(super) bytes: u64,
}

/// Order to move.
#[derive(Clone, Copy, Debug)]
pub(super) struct Order<'a> {
    pub(super) url: &'a str,
    pub(super) downtime_ms: u64,
    pub(super) limit: Duration,
}

/// A running VMM.
pub(super) enum Running {
    Ferry(FerryConsole),
    Qemu(Console, Qmp),
}

impl Running {
    pub(super) fn console(&mut self) -> &mut Console {
        match self {
            Self::Ferry(ferry) => &mut ferry.console,
            Self::Qemu(console, _) => console,
        }
    }
}

impl Contender {
    /// Starts the VMM with a guest.
    pub(super) fn start(self, dir: &Path, name: &str, boot: &Boot<'_>) -> Result<Running> {
        match self.vmm {
            Vmm::Ferry => {
                let arguments = self.ferry_arguments(boot);
                Ok(Running::Ferry(FerryConsole::start(dir, name, &arguments)?))
            }
            Vmm::Qemu => self.start_qemu(dir, name, boot, &[]),
        }
    }

    /// Starts the VMM that a guest like `boot` will come to.
    pub(super) fn start_empty(self, dir: &Path, name: &str, boot: &Boot<'_>) -> Result<Running> {
        match self.vmm {
            Vmm::Ferry => Ok(Running::Ferry(FerryConsole::start(dir, name, &[])?)),
            Vmm::Qemu => self.start_qemu(dir, name, boot, &["-incoming", "defer"]),
        }
    }

    /// Ferry's options for a guest.
    pub(super) fn ferry_arguments(self, boot: &Boot<'_>) -> Vec<String> {
        let memory = match self.backing {
            Backing::Memfd => "shared=on",
            Backing::Anon => "shared=off",
            Backing::Huge => "shared=on,hugepages=on,hugepage_size=2M",
        };
        let memory = format!("size={}M,{memory}", boot.memory_mib);
        let elf = boot.elf.display().to_string();
        [
            ["--kernel", &elf],
            ["--cmdline", boot.command_line],
            ["--memory", &memory],
            ["--cpus", "boot=1"],
            ["--serial", "tty"],
            ["--console", "off"],
        ]
        .concat()
        .into_iter()
        .map(str::to_owned)
        .collect()
    }

    /// QEMU's command for a guest, without what controls it.
    pub(super) fn qemu_command(self, boot: &Boot<'_>) -> Command {
        let mut command = Command::new(QEMU);
        let mib = boot.memory_mib;
        let backend = match self.backing {
            Backing::Anon => None,
            Backing::Memfd => Some(""),
            Backing::Huge => Some(",hugetlb=on,hugetlbsize=2M"),
        };
        let mut machine = "microvm,acpi=off".to_owned();
        if let Some(rest) = backend {
            let object = format!("memory-backend-memfd,id=m0,size={mib}M,share=on{rest}");
            command.args(["-object", &object]);
            machine += ",memory-backend=m0";
        }
        command
            .args(["-accel", "kvm", "-machine", &machine])
            .args(["-cpu", "host,-arch-capabilities", "-smp", "1"])
            .args(["-m", &format!("{mib}M")])
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .arg("-kernel")
            .arg(boot.elf)
            .args(["-append", boot.command_line, "-serial", "stdio"]);
        command
    }

    fn start_qemu(self, dir: &Path, name: &str, boot: &Boot<'_>, rest: &[&str]) -> Result<Running> {
        let socket = dir.join(format!("{name}.qmp"));
        let mut command = self.qemu_command(boot);
        command.args(["-qmp", &qmp_option(&socket)]).args(rest);
        let mut console = Console::start(name, command, &dir.join(format!("{name}.log")))?;
        let qmp = Qmp::connect(&socket).with_context(|| console.words())?;
        console.check()?;
        Ok(Running::Qemu(console, qmp))
    }
}

/// The option that has QEMU listen on `socket`.
pub(super) fn qmp_option(socket: &Path) -> String {
    format!("unix:{},server=on,wait=off", socket.display())
}

/// Moves the guest of `source` to `destination`; `None` if that was not done in time.
pub(super) fn migrate(
    source: &mut Running,
    destination: &mut Running,
    order: Order<'_>,
) -> Result<Option<Said>> {
    match (source, destination) {
        (Running::Ferry(source), Running::Ferry(destination)) => {
            migrate_ferry(source, destination, order)
        }
        (Running::Qemu(_, source), Running::Qemu(_, destination)) => {
            migrate_qemu(source, destination, order)
        }
        _ => bail!("a guest cannot move between different VMMs"),
    }
}

fn migrate_ferry(
    source: &mut FerryConsole,
    destination: &mut FerryConsole,
    order: Order<'_>,
) -> Result<Option<Said>> {
    let receive = json!({"receiver_url": order.url});
    destination
        .api
        .put("vm.receive-migration", Some(&receive))?;
    source.send(order.url, order.downtime_ms)?;
    let began = Instant::now();
    let followed = source.follow(destination, (POLL, order.limit), |_| {});
    let status = match followed {
        Ok(status) => status,
        Err(_) if began.elapsed() >= order.limit => return Ok(None),
        Err(error) => return Err(error),
    };
    let ms = |us: u64| crate::demo::report::ms(us);
    Ok(Some(Said {
        total_ms: ms(status.elapsed_ms * 1000),
        downtime_ms: ms(status
            .downtime
            .as_ref()
            .map_or(0, |downtime| downtime.total)),
        rounds: status.rounds.into(),
        bytes: status.bytes,
    }))
}

fn migrate_qemu(source: &mut Qmp, destination: &mut Qmp, order: Order<'_>) -> Result<Option<Said>> {
    let limits = json!({"max-bandwidth": NO_LIMIT, "downtime-limit": order.downtime_ms});
    source.execute("migrate-set-parameters", &limits)?;
    let uri = json!({"uri": order.url});
    destination.execute("migrate-incoming", &uri)?;
    source.execute("migrate", &uri)?;
    let deadline = Instant::now() + order.limit;
    loop {
        let now = source.execute("query-migrate", &json!({}))?;
        let number = |value: &serde_json::Value| value.as_u64().unwrap_or(0);
        match now["status"].as_str() {
            Some("completed") => {
                let ms = |key: &str| crate::demo::report::ms(number(&now[key]) * 1000);
                return Ok(Some(Said {
                    total_ms: ms("total-time"),
                    downtime_ms: ms("downtime"),
                    rounds: number(&now["ram"]["dirty-sync-count"]),
                    bytes: number(&now["ram"]["transferred"]),
                }));
            }
            Some("failed" | "cancelled") => bail!("QEMU: the migration failed: {now}"),
            _ if Instant::now() > deadline => return Ok(None),
            _ => std::thread::sleep(POLL),
        }
    }
}

/// First line of what QEMU says of itself; empty without QEMU.
pub(super) fn qemu_version() -> String {
    let output = Command::new(QEMU).arg("--version").output();
    let text = output.map_or_else(
        |_| String::new(),
        |output| String::from_utf8_lossy(&output.stdout).into_owned(),
    );
    text.lines().next().unwrap_or_default().to_owned()
}

/// A file of this run that is not there yet.
pub(super) fn fresh(dir: &Path, name: &str) -> PathBuf {
    let path = dir.join(name);
    // It may well not be there.
    let _ = std::fs::remove_file(&path);
    path
}
