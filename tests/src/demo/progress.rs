//! What the demo says while it works, on standard error.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use vm_migration::migrate::{MigrationStatus, Side, SourcePhase};

use super::report::bytes;

/// How often a line is printed where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(2);
/// Bytes of a page, as the status counts pages.
const PAGE: u64 = 4096;

/// Tells what goes on.
#[derive(Debug)]
pub struct Progress {
    bar: Option<ProgressBar>,
    last_line: Option<Instant>,
    last_phase: String,
}

impl Progress {
    /// A bar if standard error is a terminal, else lines.
    pub fn new() -> Self {
        Self {
            bar: std::io::stderr().is_terminal().then(ProgressBar::hidden),
            last_line: None,
            last_phase: String::new(),
        }
    }

    /// Says that a step begins.
    pub fn step(&self, what: &str) {
        eprintln!("==> {what}");
    }

    /// Shows how the migration is doing.
    pub fn migration(&mut self, status: &MigrationStatus) {
        let remaining = status.remaining_pages.saturating_mul(PAGE);
        let there = status.memory_bytes.saturating_sub(remaining);
        let message = message(status);
        match &mut self.bar {
            Some(bar) => {
                if bar.is_hidden() {
                    *bar = shown(status.memory_bytes);
                }
                bar.set_length(status.memory_bytes);
                bar.set_position(there);
                bar.set_message(message);
            }
            None => {
                let phase = phase(status);
                let due = self.last_line.is_none_or(|at| at.elapsed() >= LINE_EVERY);
                if due || phase != self.last_phase {
                    let percent = there.saturating_mul(100) / status.memory_bytes.max(1);
                    eprintln!("    {:>6} ms  {percent:>3} %  {message}", status.elapsed_ms);
                    self.last_line = Some(Instant::now());
                    self.last_phase = phase;
                }
            }
        }
    }

    /// The migration is over.
    pub fn migration_over(&mut self) {
        if let Some(bar) = &self.bar {
            bar.abandon();
        }
    }
}

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}

fn shown(length: u64) -> ProgressBar {
    let bar = ProgressBar::new(length);
    // A template that is wrong only costs the looks.
    if let Ok(style) = ProgressStyle::with_template("    [{bar:30}] {percent:>3} %  {msg}") {
        bar.set_style(style.progress_chars("=> "));
    }
    bar
}

fn phase(status: &MigrationStatus) -> String {
    match &status.side {
        Side::Source(SourcePhase::Precopy { round }) => format!("precopy, round {round}"),
        Side::Source(phase) => phase.name().to_owned(),
        Side::Destination(phase) => phase.name().to_owned(),
    }
}

fn message(status: &MigrationStatus) -> String {
    let mut text = phase(status);
    text += &format!(", {} sent", bytes(status.bytes));
    if let Some(rate) = status.bandwidth {
        text += &format!(" at {}/s", bytes(rate));
    }
    if let Some(estimate) = status.downtime_estimate_us {
        text += &format!(", guest would stop for {} ms", estimate.div_ceil(1000));
    }
    text
}
