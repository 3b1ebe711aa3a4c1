//! `ferryctl`: one verb per endpoint of ferry's API, and `migrate`, which drives both ends.

mod cli;
mod migrate;
mod report;
mod top;

use std::error::Error;
use std::io::{self, Read, Write};
use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use vmm::api::{ApiClient, PciDeviceInfo, RemoveDeviceConfig, SendMigrationInfo};
use vmm::config::VmConfig;

use cli::{Cli, Verb};

/// What can go wrong here, kept whole until it is printed.
type Failure = Box<dyn Error + Send + Sync>;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            print_chain(error.as_ref());
            ExitCode::FAILURE
        }
    }
}

/// Prints an error and its sources, one a line. Nobody is left to tell if that fails.
fn print_chain(error: &(dyn Error + 'static)) {
    let mut out = io::stderr().lock();
    let _ = writeln!(out, "ferryctl: {error}");
    let mut source = error.source();
    while let Some(inner) = source {
        let _ = writeln!(out, "  because: {inner}");
        source = inner.source();
    }
}

fn run(cli: &Cli) -> Result<(), Failure> {
    match &cli.verb {
        Verb::Ping => show(cli, "vmm.ping"),
        Verb::Info => show(cli, "vm.info"),
        Verb::Counters => show(cli, "vm.counters"),
        Verb::Migration => show(cli, "vm.migration"),
        Verb::Metrics => print(&client(cli)?.get_text("vm.metrics")?),
        Verb::Top(watch) => top::run(&client(cli)?, watch),
        Verb::Create { config } => Ok(client(cli)?.put_json("vm.create", &read_config(config)?)?),
        Verb::Boot => tell(cli, "vm.boot"),
        Verb::Pause => tell(cli, "vm.pause"),
        Verb::Resume => tell(cli, "vm.resume"),
        Verb::Shutdown => tell(cli, "vm.shutdown"),
        Verb::Delete => tell(cli, "vm.delete"),
        Verb::AddDevice { device } => ask::<PciDeviceInfo>(cli, "vm.add-device", device),
        Verb::AddUserDevice { device } => ask::<PciDeviceInfo>(cli, "vm.add-user-device", device),
        Verb::AddNet { net } => ask::<PciDeviceInfo>(cli, "vm.add-net", net),
        Verb::RemoveDevice { id } => {
            let request = RemoveDeviceConfig { id: id.clone() };
            Ok(client(cli)?.put_json("vm.remove-device", &request)?)
        }
        Verb::ShutdownVmm => tell(cli, "vmm.shutdown"),
        Verb::CancelMigration => tell(cli, "vm.cancel-migration"),
        Verb::SendMigration { url, limits } => {
            ask::<SendMigrationInfo>(cli, "vm.send-migration", &limits.send_config(url))
        }
        Verb::ReceiveMigration { url, devices } => {
            Ok(client(cli)?.put_json("vm.receive-migration", &devices.receive_config(url))?)
        }
        Verb::Migrate(order) => migrate::run(order),
    }
}

fn client(cli: &Cli) -> Result<ApiClient, Failure> {
    let socket = cli.api_socket.as_ref().ok_or(
        "--api-socket is missing; give the path that ferry was started with (--api-socket path=…)",
    )?;
    Ok(ApiClient::new(socket.clone())?)
}

/// `GET endpoint`, printed.
fn show(cli: &Cli, endpoint: &str) -> Result<(), Failure> {
    print_json(&client(cli)?.get::<Value>(endpoint)?)
}

/// `PUT endpoint` with `body`; the answer is printed, if there is one.
fn ask<T: Serialize + DeserializeOwned>(
    cli: &Cli,
    endpoint: &str,
    body: &impl Serialize,
) -> Result<(), Failure> {
    match client(cli)?.put_for::<T>(endpoint, body)? {
        Some(answer) => print_json(&answer),
        None => Ok(()),
    }
}

/// `PUT endpoint`.
fn tell(cli: &Cli, endpoint: &str) -> Result<(), Failure> {
    Ok(client(cli)?.put(endpoint)?)
}

/// Reads a VM's configuration from `path`, or standard input for `-`.
fn read_config(path: &Path) -> Result<VmConfig, Failure> {
    let text = if path == Path::new("-") {
        let mut text = String::new();
        io::stdin().lock().read_to_string(&mut text)?;
        text
    } else {
        std::fs::read_to_string(path)
            .map_err(|error| format!("cannot read {}: {error}", path.display()))?
    };
    serde_json::from_str(&text)
        .map_err(|error| format!("{} is not a VM's configuration: {error}", path.display()).into())
}

fn print_json(value: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value)?;
    print(&format!("{text}\n"))
}

fn print(text: &str) -> Result<(), Failure> {
    match io::stdout().lock().write_all(text.as_bytes()) {
        // Whoever reads has read enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result?),
    }
}
