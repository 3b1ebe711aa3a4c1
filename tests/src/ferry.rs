//! Ferry's own processes as tests drive them: `ferry` and `ferry-nic`.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hyper::Method;
use serde_json::Value;

use crate::api::Api;
use crate::process::{Process, wait_for};

/// How long a process may take until it serves.
const START_LIMIT: Duration = Duration::from_secs(20);

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

/// A `ferry` process. A VM whose serial port is `Tty` talks through it.
#[derive(Debug)]
pub struct Ferry {
    /// The process.
    pub process: Process,
    /// Its REST API.
    pub api: Api,
    /// From starting the process until its API answered.
    pub start_time: Duration,
    stdin: ChildStdin,
    dir: PathBuf,
    name: String,
    serial_taken: u64,
}

impl Ferry {
    /// Starts `ferry` with an API socket, an event file and `arguments`, its files in `dir`, and
    /// waits until the API answers.
    ///
    /// # Errors
    /// When it does not start or its API does not answer.
    pub fn start(dir: &Path, name: &str, arguments: &[&str]) -> Result<Self> {
        let socket = dir.join(format!("{name}.sock"));
        let events = dir.join(format!("{name}.events"));
        let mut command = Command::new(program("ferry")?);
        command
            .arg("--api-socket")
            .arg(format!("path={}", socket.display()))
            .arg("--event-monitor")
            .arg(format!("path={}", events.display()))
            .args(arguments);
        let log = dir.join(format!("{name}.log"));
        let console = Self::serial_path(dir, name);
        let begun = Instant::now();
        let (mut process, stdin) = Process::start_with_console(name, command, &log, &console)?;
        let api = Api::new(&socket);
        wait_for("the API", START_LIMIT, || {
            process.check()?;
            let answer = api.get("vmm.ping").ok();
            Ok(answer.filter(|ping| ping["pid"] == process.id()))
        })?;
        Ok(Self {
            process,
            api,
            start_time: begun.elapsed(),
            stdin,
            dir: dir.to_owned(),
            name: name.to_owned(),
            serial_taken: 0,
        })
    }

    /// Where the standard output of a process goes, which is its guest's voice.
    pub fn serial_path(dir: &Path, name: &str) -> PathBuf {
        dir.join(format!("{name}.serial"))
    }

    /// What it is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What guests here have printed so far.
    pub fn serial(&self) -> String {
        let bytes = std::fs::read(Self::serial_path(&self.dir, &self.name)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// What guests here have printed since the last call.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn take_serial(&mut self) -> Result<Vec<u8>> {
        let mut file = File::open(Self::serial_path(&self.dir, &self.name))?;
        file.seek(SeekFrom::Start(self.serial_taken))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        self.serial_taken += u64::try_from(bytes.len())?;
        Ok(bytes)
    }

    /// Types `bytes` at the guest's serial port.
    ///
    /// # Errors
    /// When the process does not listen any more.
    pub fn type_in(&mut self, bytes: &[u8]) -> Result<()> {
        self.stdin.write_all(bytes)?;
        Ok(self.stdin.flush()?)
    }

    /// Waits until the guest has printed a line with `text`; gives that line.
    ///
    /// # Errors
    /// When it does not in time, or the process ends.
    pub fn wait_serial(&mut self, text: &str, limit: Duration) -> Result<String> {
        let result = wait_for(&format!("{text:?} from the guest"), limit, || {
            let serial = self.serial();
            // A line without its end may be half of one.
            let mut lines = serial.split_inclusive('\n');
            let found = lines.find(|line| line.ends_with('\n') && line.contains(text));
            if found.is_none() {
                self.process.check()?;
            }
            Ok(found.map(|line| line.trim_end().to_owned()))
        });
        result.with_context(|| self.last_words())
    }

    /// The ends of what the guest and the process have said, for errors.
    pub fn last_words(&self) -> String {
        let serial = self.serial();
        let lines: Vec<&str> = serial.lines().collect();
        format!(
            "the guest's last words:\n{}\n{} said:\n{}",
            lines[lines.len().saturating_sub(15)..].join("\n"),
            self.name,
            self.process.output()
        )
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

    /// The names of the events so far.
    pub fn event_names(&self) -> Vec<String> {
        let events = self.events();
        let names = events.iter().filter_map(|event| event["event"].as_str());
        names.map(str::to_owned).collect()
    }

    /// The phases of migrations that this side's events tell, in order.
    pub fn phases(&self) -> Vec<String> {
        let events = self.events();
        let phases = events
            .iter()
            .filter(|event| event["event"] == "migration-phase")
            .filter_map(|event| event["properties"]["phase"].as_str());
        phases.map(str::to_owned).collect()
    }

    /// Waits until an event of this name was told; gives the last such.
    ///
    /// # Errors
    /// When it is not told in time.
    pub fn wait_event(&self, name: &str, limit: Duration) -> Result<Value> {
        let found = wait_for(&format!("event {name}"), limit, || {
            let mut events = self.events().into_iter().rev();
            Ok(events.find(|event| event["event"] == name))
        });
        found.with_context(|| format!("{:?}", self.event_names()))
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
    /// When the API does not answer, or there is no VM.
    pub fn state(&self) -> Result<String> {
        let info = self.api.get("vm.info")?;
        info["state"]
            .as_str()
            .map(str::to_owned)
            .context("vm.info without a state")
    }

    /// Whether there is a VM.
    ///
    /// # Errors
    /// When the API does not answer.
    pub fn has_vm(&self) -> Result<bool> {
        Ok(self.api.request(Method::GET, "vm.info", None)?.status != 404)
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
            Ok(is_over(&status).then_some(status))
        })
        .with_context(|| self.last_words())
    }

    /// Ends the process by its API.
    ///
    /// # Errors
    /// When it does not end soon, or not well.
    pub fn shut_down(mut self) -> Result<()> {
        self.api.put("vmm.shutdown", None)?;
        let status = self.process.wait(Duration::from_secs(10))?;
        if !status.success() {
            bail!("{}: {status}: {}", self.name, self.process.output());
        }
        Ok(())
    }
}

/// The name of the phase in a migration status.
pub fn phase_name(status: &Value) -> &str {
    status["phase"]["name"].as_str().unwrap_or_default()
}

/// Whether this is the last status of a migration.
pub fn is_over(status: &Value) -> bool {
    matches!(phase_name(status), "done" | "running" | "aborted")
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
        wait_for("the NIC's socket", START_LIMIT, || {
            process.check()?;
            Ok(socket.exists().then_some(()))
        })?;
        Ok(Self { process, socket })
    }
}
