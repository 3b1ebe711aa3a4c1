//! Ferry's own processes as tests drive them: `ferry` and `ferry-nic`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::api::Api;
use crate::process::{Process, wait_for};

/// Where the programs under test are: `FERRY_BIN_DIR`, or beside this program.
///
/// # Errors
/// When the folder cannot be told.
pub fn bin_dir() -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("FERRY_BIN_DIR") {
        return Ok(PathBuf::from(dir));
    }
    let own = std::env::current_exe()?;
    let dir = own.parent().context("no folder")?;
    // Test programs are one folder further down than the others.
    let dir = if dir.ends_with("deps") {
        dir.parent().context("no folder")?
    } else {
        dir
    };
    Ok(dir.to_owned())
}

/// One of the programs under test.
///
/// # Errors
/// When it has not been built.
pub fn program(name: &str) -> Result<PathBuf> {
    let path = bin_dir()?.join(name);
    if !path.exists() {
        bail!(
            "{} is missing: build the workspace first (cargo build --workspace)",
            path.display()
        );
    }
    Ok(path)
}

/// A `ferry` process.
#[derive(Debug)]
pub struct Ferry {
    /// The process.
    pub process: Process,
    /// Its REST API.
    pub api: Api,
    dir: PathBuf,
    name: String,
}

impl Ferry {
    /// Starts `ferry` with an API socket, an event file and `arguments`, its files in `dir`, and
    /// waits until the API answers.
    ///
    /// # Errors
    /// When it does not start or its API does not answer.
    pub fn start(dir: &Path, name: &str, arguments: &[String]) -> Result<Self> {
        let socket = dir.join(format!("{name}.sock"));
        let mut command = Command::new(program("ferry")?);
        command
            .arg("--api-socket")
            .arg(format!("path={}", socket.display()))
            .arg("--event-monitor")
            .arg(format!(
                "path={}",
                dir.join(format!("{name}.events")).display()
            ))
            .args(arguments);
        let process = Process::start(name, command, &dir.join(format!("{name}.log")))?;
        let mut ferry = Self {
            process,
            api: Api::new(&socket),
            dir: dir.to_owned(),
            name: name.to_owned(),
        };
        wait_for("the API", Duration::from_secs(20), || {
            ferry.process.check()?;
            Ok(ferry.api.get("vmm.ping").ok())
        })?;
        Ok(ferry)
    }

    /// The file that `--serial file=` should name for this process.
    pub fn serial_path(dir: &Path, name: &str) -> PathBuf {
        dir.join(format!("{name}.serial"))
    }

    /// What the guest has printed.
    pub fn serial(&self) -> String {
        let bytes = std::fs::read(Self::serial_path(&self.dir, &self.name)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits until the guest has printed a line with `text`; gives that line.
    ///
    /// # Errors
    /// When it does not in time, or the process ends.
    pub fn wait_serial(&mut self, text: &str, limit: Duration) -> Result<String> {
        let result = wait_for(&format!("{text:?} from the guest"), limit, || {
            let found = self
                .serial()
                .lines()
                .find(|line| line.contains(text))
                .map(str::to_owned);
            if found.is_none() {
                self.process.check()?;
            }
            Ok(found)
        });
        result.with_context(|| {
            let serial = self.serial();
            let lines: Vec<&str> = serial.lines().collect();
            format!(
                "the guest's last words:\n{}\n{} said:\n{}",
                lines[lines.len().saturating_sub(15)..].join("\n"),
                self.name,
                self.process.output()
            )
        })
    }

    /// Events so far, one JSON object each.
    pub fn events(&self) -> Vec<Value> {
        let path = self.dir.join(format!("{}.events", self.name));
        std::fs::read_to_string(path)
            .unwrap_or_default()
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect()
    }

    /// Creates and boots a VM.
    ///
    /// # Errors
    /// When the API refuses either.
    pub fn boot(&self, config: &Value) -> Result<()> {
        self.api.put("vm.create", Some(config))?;
        self.api.put("vm.boot", None)?;
        Ok(())
    }

    /// State of the VM as `vm.info` has it (`Running`, `Paused`, …).
    ///
    /// # Errors
    /// When the API does not answer.
    pub fn state(&self) -> Result<String> {
        let info = self.api.get("vm.info")?;
        info["state"]
            .as_str()
            .map(str::to_owned)
            .context("vm.info without a state")
    }

    /// Progress of the migration.
    ///
    /// # Errors
    /// When the API does not answer.
    pub fn migration(&self) -> Result<Value> {
        self.api.get("vm.migration")
    }

    /// Waits until the migration on this side has ended; gives its last status.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn wait_migration(&self, limit: Duration) -> Result<Value> {
        wait_for("the end of the migration", limit, || {
            let status = self.migration()?;
            let phase = phase_name(&status);
            Ok(matches!(phase.as_str(), "done" | "running" | "aborted").then_some(status))
        })
    }
}

/// The name of the phase in a migration status, whatever data it carries.
pub fn phase_name(status: &Value) -> String {
    match &status["phase"] {
        Value::String(name) => name.to_lowercase(),
        Value::Object(map) => map
            .keys()
            .next()
            .cloned()
            .unwrap_or_default()
            .to_lowercase(),
        _ => String::new(),
    }
}

/// A `ferry-nic` process.
#[derive(Debug)]
pub struct Nic {
    /// The process.
    pub process: Process,
    /// Its socket.
    pub socket: PathBuf,
}

impl Nic {
    /// Starts `ferry-nic` on `tap`, and waits for its socket.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start(dir: &Path, name: &str, tap: &str, arguments: &[&str]) -> Result<Self> {
        let socket = dir.join(format!("{name}.nic"));
        let mut command = Command::new(program("ferry-nic")?);
        command
            .arg("--socket")
            .arg(&socket)
            .args(["--tap", tap])
            .args(arguments);
        let mut process = Process::start(name, command, &dir.join(format!("{name}.log")))?;
        wait_for("the NIC's socket", Duration::from_secs(20), || {
            process.check()?;
            Ok(socket.exists().then_some(()))
        })?;
        Ok(Self { process, socket })
    }
}

/// Starts a migration from `source` to `destination`, which need not have ended on return.
///
/// # Errors
/// When either refuses to start.
pub fn start_migration(
    source: &Ferry,
    destination: &Ferry,
    url: &str,
    send: Value,
    receive: Value,
) -> Result<()> {
    let mut receive = receive;
    receive["receiver_url"] = json!(url);
    let mut send = send;
    send["destination_url"] = json!(url);
    destination
        .api
        .put("vm.receive-migration", Some(&receive))?;
    source.api.put("vm.send-migration", Some(&send))?;
    Ok(())
}
