//! `scripts/demo` runs this; see there and in [`e2e::demo`].

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Parser;
use e2e::demo::report::Full;
use e2e::demo::{
    Guest, LinuxFiles, Options, Outcome, Progress, Transport, can_run_linux, run_in_lab, run_linux,
    run_native,
};
use e2e::netns;

/// Moves a running guest with its NICs from one Ferry process to another, and checks everything.
#[derive(Debug, Parser)]
#[command(name = "demo", max_term_width = 100)]
struct Cli {
    /// Print one JSON object instead of a report.
    #[arg(long)]
    json: bool,
    /// Print one JSON object with everything in it, for a demo that runs this one in the lab.
    #[arg(long, hide = true)]
    full_json: bool,
    /// Which guest to show.
    #[arg(long, value_enum, default_value = "auto")]
    guest: Guest,
    /// Guest RAM in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    memory: u64,
    /// MiB/s that the guest writes, or max.
    #[arg(long, default_value = "100")]
    rate: String,
    /// How the two processes talk.
    #[arg(long, value_enum, default_value = "unix")]
    transport: Transport,
    /// The longest the guest may stand still, in ms.
    #[arg(long, value_name = "MS", default_value_t = 100)]
    downtime: u64,
    /// Packets per second through each NIC.
    #[arg(long, value_name = "N", default_value_t = 500)]
    packets: u32,
    /// Seconds of work before and after the move.
    #[arg(long, default_value_t = 2)]
    seconds: u64,
    /// A stock Linux kernel, for the Linux guest.
    #[arg(long, value_name = "FILE", requires_all = ["linux_initramfs", "guest_net"])]
    linux_kernel: Option<PathBuf>,
    /// Its initramfs.
    #[arg(long, value_name = "FILE")]
    linux_initramfs: Option<PathBuf>,
    /// The checker that runs in it.
    #[arg(long, value_name = "FILE")]
    guest_net: Option<PathBuf>,
    /// scripts/lab, to run the Linux guest in where KVM here cannot.
    #[arg(long, value_name = "FILE")]
    lab: Option<PathBuf>,
}

impl Cli {
    fn options(&self) -> Options {
        Options {
            memory_mib: self.memory,
            rate: self.rate.clone(),
            transport: self.transport,
            downtime_ms: self.downtime,
            packets_per_second: self.packets,
            seconds: self.seconds,
        }
    }

    fn linux_files(&self) -> Option<LinuxFiles> {
        Some(LinuxFiles {
            kernel: self.linux_kernel.clone()?,
            initramfs: self.linux_initramfs.clone()?,
            guest_net: self.guest_net.clone()?,
        })
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli).and_then(|outcome| show(&cli, &outcome)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(cli: &Cli) -> Result<Outcome> {
    let options = cli.options();
    options.check()?;
    netns::isolate()?;
    let dir = tempfile::tempdir().context("no temporary folder")?;
    let mut progress = Progress::new();
    let files = cli.linux_files();
    let linux_here = match (cli.guest, &files) {
        (Guest::Native, _) | (Guest::Auto, None) => false,
        (Guest::Linux, _) => true,
        (Guest::Auto, Some(files)) => {
            progress.step("trying whether KVM here boots a stock Linux kernel");
            let can = can_run_linux(dir.path(), files)?;
            progress.step(if can { "it does" } else { "it does not" });
            can
        }
    };
    if linux_here {
        let Some(files) = &files else {
            bail!("the Linux guest needs --linux-kernel, --linux-initramfs and --guest-net");
        };
        return run_linux(dir.path(), &options, files, &mut progress);
    }
    let mut outcome = run_native(dir.path(), &options, &mut progress)?;
    if let (Guest::Auto, Some(files), Some(lab)) = (cli.guest, &files, &cli.lab) {
        progress.step("the same with a stock Linux guest, in the lab (an emulated host)");
        outcome.lab = Some(Box::new(run_in_lab(lab, files)?));
    }
    Ok(outcome)
}

/// Prints it; whether all is well.
fn show(cli: &Cli, outcome: &Outcome) -> Result<bool> {
    let problems = outcome.all_problems();
    if cli.full_json {
        println!("{}", serde_json::to_string(&Full::from(outcome.clone()))?);
    } else if cli.json {
        println!("{}", serde_json::to_string(outcome)?);
    } else {
        print!("\n{outcome}");
        let verdict = if problems.is_empty() {
            "PASS: nothing corrupt, nothing wrong, nothing lost but what the links' move explains"
        } else {
            "FAIL"
        };
        println!("\n{verdict}");
    }
    for problem in &problems {
        eprintln!("demo: {problem}");
    }
    Ok(problems.is_empty())
}
