//! How the cost of dirty tracking grows with the guest, its devices and its dirty pages: guests of
//! 1 GiB to 12 TiB as bitmaps, without the memory behind them.
//!
//! `cargo bench -p vm-migration --bench size` prints tables and writes `size.json` and the chart
//! `size.svg` to the folder `size` of the target folder; `-- --quick` is short, `-- --help` tells
//! the rest. One thread does it all.
//!
//! - [`layout`]: the guests. [`fill`]: which pages are dirty. [`sources`]: who reports them.
//! - [`measure`]: what a sample is. [`plan`]: what is measured.
//! - [`table`], [`chart`]: what is made of it.

mod chart;
mod fill;
mod layout;
mod measure;
mod plan;
#[path = "../common/random.rs"]
mod random;
#[path = "../common/source.rs"]
mod source;
mod sources;
mod table;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use serde::Serialize;
use vm_migration::dirty::WINDOW_BYTES;

use layout::GIB;
use plan::{Options, Results};

/// Measures how dirty tracking grows with guests, devices and dirty pages.
#[derive(Debug, Parser)]
#[command(name = "size", max_term_width = 100)]
struct Cli {
    /// Print one JSON object instead of tables.
    #[arg(long)]
    json: bool,
    /// A short run: up to 64 GiB, three samples.
    #[arg(long)]
    quick: bool,
    /// Samples of each row (7, or 3 with --quick); fewer, but not below 3, of those that take long.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    samples: Option<u32>,
    /// The largest guest, in GiB.
    #[arg(long, value_name = "GIB", default_value_t = 12 << 10, value_parser = clap::value_parser!(u64).range(1..=32 << 10))]
    largest: u64,
    /// Guest memory that all sources report before the next is asked for, in GiB; what
    /// `GuestDirty::new` takes if not given.
    #[arg(long, value_name = "GIB", value_parser = clap::value_parser!(u64).range(1..=64))]
    window: Option<u64>,
    /// Where size.json and size.svg go.
    #[arg(long, value_name = "DIR", default_value_os_t = default_out())]
    out: PathBuf,
    /// What `cargo bench` adds.
    #[arg(long, hide = true)]
    bench: bool,
}

/// `size` in the target folder.
fn default_out() -> PathBuf {
    // Cargo's folder for what tests and benches write is one below the target folder.
    let scratch = Path::new(env!("CARGO_TARGET_TMPDIR"));
    scratch.parent().unwrap_or(scratch).join("size")
}

/// Where it was measured.
#[derive(Debug, Serialize)]
struct Machine {
    /// `model name` of the first CPU.
    cpu: String,
    /// CPUs this process may use; one was used.
    cpus: usize,
    /// `uname -r`.
    kernel: String,
    /// Load average of the last minute, at start and end.
    load: [String; 2],
}

impl Machine {
    fn new(load_before: String) -> Self {
        let info = text("/proc/cpuinfo");
        let model = info.lines().find(|line| line.starts_with("model name"));
        Self {
            cpu: model
                .and_then(|line| line.split_once(": "))
                .map_or_else(|| "unknown".to_owned(), |(_, model)| model.to_owned()),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: text("/proc/sys/kernel/osrelease"),
            load: [load_before, load()],
        }
    }
}

fn text(path: &str) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.trim().to_owned()
}

fn load() -> String {
    let load = text("/proc/loadavg");
    load.split(' ').next().unwrap_or_default().to_owned()
}

/// What is written to `size.json`.
#[derive(Debug, Serialize)]
struct Report<'a> {
    machine: Machine,
    #[serde(flatten)]
    results: &'a Results,
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("size: {error}");
            ExitCode::from(2)
        }
    }
}

/// Whether every page was found.
fn run(cli: &Cli) -> Result<bool, Box<dyn Error>> {
    let before = load();
    let results = plan::run(Options {
        samples: cli.samples.unwrap_or(if cli.quick { 3 } else { 7 }),
        window_bytes: cli
            .window
            .map_or(WINDOW_BYTES, |gib| gib.saturating_mul(GIB)),
        largest_gib: cli.largest.min(if cli.quick { 64 } else { u64::MAX }),
    })?;
    let report = Report {
        machine: Machine::new(before),
        results: &results,
    };
    std::fs::create_dir_all(&cli.out)?;
    let json = serde_json::to_string_pretty(&report)?;
    std::fs::write(cli.out.join("size.json"), json)?;
    chart::draw(&cli.out.join("size.svg"), &results)?;
    if cli.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{}", table::render(&report.machine, &results));
        println!("\nfiles: {0}/size.json, {0}/size.svg", cli.out.display());
    }
    Ok(results.rows().all(|row| row.wrong.is_none()))
}
