//! The VMM's process.

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use clap::Parser;
use devices::ThreadSpawner;
use event_monitor::EventMonitor;
use hypervisor::KvmHypervisor;
use vmm::api::{self, ApiError, ApiListener, ApiServer};
use vmm::cli::Cli;
use vmm::control::Control;
use vmm::machine::Host;
use vmm::signals::Signals;
use vmm::notice;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = tracing_subscriber::EnvFilter::new(cli.level().name());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ferry: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    let signals = Signals::take().context("cannot take over signals")?;
    let config = cli.vm_config()?;
    if config.is_none() && cli.api_socket.is_none() {
        return Err(anyhow!("nothing to do: give --kernel to boot a VM, or --api-socket to wait for requests"));
    }
    let spawner = ThreadSpawner::unconfined();
    let (exit_sender, exits) = notice::channel()?;
    let (handle, inbox) = api::channel()?;
    let host = Host {
        hypervisor: Arc::new(KvmHypervisor::open()?),
        spawner: spawner.clone(),
        events: EventMonitor::disabled(),
        exits: exit_sender,
    };
    let server = match &cli.api_socket {
        Some(socket) => Some(ApiServer::start(ApiListener::open(socket)?, handle, &spawner)?),
        None => None,
    };
    let mut control = Control::new(host, inbox, exits, signals, config.is_some());
    if let Some(config) = config {
        control.create_and_boot(config).map_err(chain)?;
    }
    control.run().context("the control loop failed")?;
    if let Some(server) = server {
        server.stop();
    }
    Ok(())
}

fn chain(error: ApiError) -> anyhow::Error {
    anyhow!("{}", error.chain.join(": "))
}
