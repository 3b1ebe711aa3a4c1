//! A network namespace for the calling thread and the processes it starts.

use std::io;
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Moves the calling thread into a new, empty network namespace with loopback up.
///
/// Taps, addresses and neighbours made from here on, and processes started, belong to it; it goes
/// away with the last of them. Tests that run at the same time do not see each other's.
///
/// # Errors
/// When the caller may not (it takes root), or loopback cannot be brought up.
pub fn isolate() -> Result<()> {
    // SAFETY: unshare changes only which namespace this thread is in.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        return Err(io::Error::last_os_error()).context("a network namespace needs root");
    }
    ip(&["link", "set", "lo", "up"])
}

/// Runs `ip` with these arguments.
///
/// # Errors
/// When it cannot be run or fails; its complaint is in the error.
pub fn ip(arguments: &[&str]) -> Result<()> {
    let output = Command::new("ip")
        .args(arguments)
        .output()
        .context("cannot run ip (iproute2)")?;
    if !output.status.success() {
        bail!(
            "ip {}: {}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}

/// Makes a tap that VMMs may open, up, with these addresses (`10.0.0.1/24`, `fd00::1/64`).
///
/// # Errors
/// When `ip` fails.
pub fn add_tap(name: &str, queues: u16, addresses: &[&str]) -> Result<()> {
    let mut arguments = vec!["tuntap", "add", name, "mode", "tap", "vnet_hdr"];
    if queues > 1 {
        arguments.push("multi_queue");
    }
    ip(&arguments)?;
    for address in addresses {
        let mut add = vec!["addr", "add", address, "dev", name];
        if address.contains(':') {
            add.push("nodad");
        }
        ip(&add)?;
    }
    ip(&["link", "set", name, "up"])
}
