//! `scripts/bench` runs this; see there and in [`e2e::bench`].

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use e2e::bench::{self, Options};
use e2e::netns;

/// Measures Ferry beside QEMU on this machine.
#[derive(Debug, Parser)]
#[command(name = "bench", max_term_width = 100)]
struct Cli {
    /// Print one JSON object instead of tables.
    #[arg(long)]
    json: bool,
    /// A short run: unix only, one downtime target, one run each.
    #[arg(long)]
    quick: bool,
    /// Runs of each migration (3, or 1 with --quick).
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    runs: Option<u32>,
    /// Guest RAM of the migrations in MiB; that of dirty tracking is four times as large.
    #[arg(long, value_name = "MIB", default_value_t = 1024, value_parser = clap::value_parser!(u64).range(256..))]
    memory: u64,
    /// Only start-up times and memory use.
    #[arg(long, conflicts_with = "only_migration")]
    only_startup: bool,
    /// Only migrations.
    #[arg(long)]
    only_migration: bool,
    /// Only what dirty tracking costs.
    #[arg(long, conflicts_with_all = ["only_startup", "only_migration"])]
    only_tracking: bool,
    /// Where bench.json and bench.svg go.
    #[arg(long, value_name = "DIR", default_value = "target/bench")]
    out: PathBuf,
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Whether no guest found a wrong page.
fn run(cli: &Cli) -> Result<bool> {
    netns::isolate()?;
    let dir = tempfile::tempdir().context("no temporary folder")?;
    let options = Options {
        quick: cli.quick,
        runs: cli.runs,
        memory_mib: cli.memory,
        startup: !(cli.only_migration || cli.only_tracking),
        migration: !(cli.only_startup || cli.only_tracking),
        tracking: !(cli.only_startup || cli.only_migration),
    };
    let results = bench::run(options, dir.path())?;
    results.write(&cli.out)?;
    if cli.json {
        println!("{}", serde_json::to_string(&results)?);
    } else {
        print!("{}", results.table());
        println!("\nfiles: {0}/bench.json, {0}/bench.svg", cli.out.display());
    }
    let moved = results.migrations.iter().flat_map(|row| &row.samples);
    let tracked = results.tracking.iter().flat_map(|row| &row.samples);
    let mut wrong = moved
        .map(|sample| sample.corrupt)
        .chain(tracked.map(|sample| sample.corrupt));
    Ok(wrong.all(|pages| pages == 0))
}
