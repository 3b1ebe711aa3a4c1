//! The demo: a running guest and its two NICs move from one `ferry` to another while the guest
//! writes memory and packets flow, and afterwards everything is checked.
//!
//! - `native`: with the native guest, wherever there is `/dev/kvm`.
//! - `linux`: with a stock Debian guest, where KVM runs one; elsewhere in the lab, where this same
//!   program runs once more.
//! - `lab`: that run in the lab.
//! - `link`: the network both guests are in, whose links move with the guest.
//! - `progress`, [`report`]: what one sees.

mod lab;
mod link;
mod linux;
mod linux_words;
mod native;
mod progress;
pub mod report;

use std::path::PathBuf;

use anyhow::{Result, bail};

pub use lab::{in_lab, run as run_in_lab};
pub use linux::{can_run as can_run_linux, run as run_linux};
pub use native::run as run_native;
pub use progress::Progress;
pub use report::Outcome;

/// How the two processes talk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Transport {
    /// A unix socket.
    Unix,
    /// TCP over loopback.
    Tcp,
}

impl Transport {
    /// The migration's URL, with its socket in `dir`.
    pub fn url(self, dir: &std::path::Path) -> String {
        match self {
            Self::Unix => format!("unix:{}", dir.join("migration.sock").display()),
            // In a network namespace of its own every port is free.
            Self::Tcp => "tcp:127.0.0.1:4100".to_owned(),
        }
    }
}

/// What to show.
#[derive(Clone, Debug)]
pub struct Options {
    /// Guest RAM in MiB.
    pub memory_mib: u64,
    /// MiB/s that the guest dirties, or `max`.
    pub rate: String,
    /// How the two processes talk.
    pub transport: Transport,
    /// The longest the guest may stand still, in ms.
    pub downtime_ms: u64,
    /// Packets per second through each NIC.
    pub packets_per_second: u32,
    /// Seconds of work before and after the move.
    pub seconds: u64,
}

impl Options {
    /// Checks what the guest would otherwise misread.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&self) -> Result<()> {
        if self.rate != "max" && self.rate.parse::<u32>().is_err() {
            bail!("--rate {}: use a number of MiB/s, or max", self.rate);
        }
        if self.packets_per_second == 0 {
            bail!("--packets 0: packets must flow");
        }
        Ok(())
    }
}

/// Which guest to show.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Guest {
    /// A stock Linux guest where KVM can run one; else the native guest here and the Linux guest
    /// in the lab.
    Auto,
    /// The native guest.
    Native,
    /// A stock Debian guest on this machine's KVM.
    Linux,
}

/// What a stock Linux guest is made of, as `scripts/demo` makes it.
#[derive(Clone, Debug)]
pub struct LinuxFiles {
    /// Debian's cloud kernel, as it is in its package.
    pub kernel: PathBuf,
    /// An initramfs by `scripts/guest-image` with the checker and `scripts/demo.d/guest.sh`.
    pub initramfs: PathBuf,
    /// The checker, for the host's end.
    pub guest_net: PathBuf,
}
