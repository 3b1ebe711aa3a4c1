//! Child processes that never outlive their test and whose last words are in its errors.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// A running child whose output goes to a file. Killed when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: String,
    log: PathBuf,
}

impl Process {
    /// Starts `command`, with stdout and stderr in `log`.
    ///
    /// # Errors
    /// When the log cannot be made or the program cannot be started.
    pub fn start(name: &str, mut command: Command, log: &Path) -> Result<Self> {
        let out = File::create(log).with_context(|| format!("cannot make {}", log.display()))?;
        let err = out.try_clone()?;
        let child = command
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err)
            .spawn()
            .with_context(|| format!("cannot start {name}: {command:?}"))?;
        Ok(Self {
            child,
            name: name.to_owned(),
            log: log.to_owned(),
        })
    }

    /// Starts `command`, with stderr in `log`, stdout at the end of `console`, and its stdin to
    /// write to.
    ///
    /// # Errors
    /// When a file cannot be made or the program cannot be started.
    pub fn start_with_console(
        name: &str,
        mut command: Command,
        log: &Path,
        console: &Path,
    ) -> Result<(Self, ChildStdin)> {
        let open = |path: &Path| {
            let file = File::create(path);
            file.with_context(|| format!("cannot make {}", path.display()))
        };
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(open(console)?)
            .stderr(open(log)?)
            .spawn()
            .with_context(|| format!("cannot start {name}: {command:?}"))?;
        let stdin = child.stdin.take().context("no stdin")?;
        let process = Self {
            child,
            name: name.to_owned(),
            log: log.to_owned(),
        };
        Ok((process, stdin))
    }

    /// Process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it has printed so far.
    pub fn output(&self) -> String {
        fs::read(&self.log)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Fails, with the end of its output, unless it still runs.
    ///
    /// # Errors
    /// When it has ended.
    pub fn check(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("{} ended with {status}:\n{}", self.name, self.tail()),
        }
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!("{} still runs after {limit:?}:\n{}", self.name, self.tail());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Kills it as a power cut would.
    pub fn kill(&mut self) {
        // It may have ended by itself, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Asks it to end.
    ///
    /// # Errors
    /// When the signal cannot be sent.
    pub fn terminate(&self) -> Result<()> {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        Ok(())
    }

    fn tail(&self) -> String {
        let output = self.output();
        let lines: Vec<&str> = output.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("--- output of {} ---\n{}", self.name, self.tail());
        }
    }
}

/// Waits until `ready` gives a value.
///
/// # Errors
/// `what` when `limit` passes first, or the error of `ready`.
pub fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut ready: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(value) = ready()? {
            return Ok(value);
        }
        let elapsed = start.elapsed();
        if elapsed > limit {
            bail!("{what}: not within {limit:?}");
        }
        // What takes long need not be looked at often: the machine may have but one CPU.
        let pause = (elapsed / 20).clamp(Duration::from_millis(2), Duration::from_millis(200));
        std::thread::sleep(pause);
    }
}
