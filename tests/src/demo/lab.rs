//! The Linux guest in the lab: this same program once more, inside an emulated host whose KVM runs
//! stock kernels.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::report::Full;
use super::{LinuxFiles, Outcome};

/// The emulated host's memory in MiB: two guests, and what runs them.
const HOST_MIB: &str = "1536";
/// Everything there is emulated: minutes, where a machine takes seconds.
const LIMIT_S: &str = "900";
/// The emulated host's kernel loads no module by itself.
const LOAD_AND_RUN: &str = "modprobe -a tun bridge && exec \"$@\"";
/// What the guest there can do: an emulated CPU writes little.
const GUEST: [&str; 10] = [
    "--memory",
    "256",
    "--rate",
    "4",
    "--packets",
    "50",
    "--downtime",
    "500",
    "--seconds",
    "5",
];

/// Whether this program runs in the lab.
pub fn in_lab() -> bool {
    std::env::var_os("FERRY_LAB").is_some()
}

/// Runs the demo with a stock Linux guest through `lab` (`scripts/lab`).
///
/// # Errors
/// When the lab does not work, or there is no report at the end.
pub fn run(lab: &Path, files: &LinuxFiles) -> Result<Outcome> {
    let own = std::env::current_exe().context("cannot tell this program's path")?;
    let mut child = Command::new(lab)
        .args(["run", "--memory", HOST_MIB, "--timeout", LIMIT_S, "--"])
        .args(["sh", "-c", LOAD_AND_RUN, "sh"])
        .arg(own)
        .args(["--guest", "linux", "--full-json"])
        .args(GUEST)
        .arg("--linux-kernel")
        .arg(&files.kernel)
        .arg("--linux-initramfs")
        .arg(&files.initramfs)
        .arg("--guest-net")
        .arg(&files.guest_net)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {}", lab.display()))?;
    let output = child.stdout.take().context("no pipe from the lab")?;
    let mut outcome = None;
    for line in BufReader::new(output).lines() {
        let line = line?;
        // Output and errors of the lab's command come as one stream.
        match serde_json::from_str::<Full>(&line) {
            Ok(found) => outcome = Some(Outcome::from(found)),
            Err(_) => eprintln!("    lab: {}", line.trim_end()),
        }
    }
    let status = child.wait()?;
    let Some(mut outcome) = outcome else {
        bail!("the demo in the lab ended with {status} and no report");
    };
    if !status.success() {
        outcome
            .problems
            .push(format!("the demo there ended with {status}"));
    }
    Ok(outcome)
}
