//! The program `ferry-nic`: see the library's page and `ferry-nic --help`.

use std::io::IsTerminal;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use devices::{ThreadKind, ThreadSpawner};
use ferry_nic::options::Options;
use ferry_nic::{NicDevice, block_signals, wait_for_signal};
use sandbox::Filters;
use tracing_subscriber::EnvFilter;
use vfio_user::{Server, Stopper};

/// Signals that end the program.
const END: [i32; 2] = [libc::SIGTERM, libc::SIGINT];

fn main() -> ExitCode {
    let options = Options::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ferry-nic: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> anyhow::Result<()> {
    // Before there is a second thread, so that all inherit it and one waits.
    block_signals(&END).context("cannot block signals")?;
    let filters = Filters::new("ferry-nic", ThreadKind::VfioServer, options.seccomp)
        .context("cannot prepare system-call filters")?;
    let spawner = filters.spawner();
    let card = options.card()?;
    let mut device = NicDevice::new(Box::new(card), spawner.clone())?;
    let server = Server::bind(&options.socket)?;
    stop_on_signal(&spawner, server.stopper())?;
    filters
        .confine(ThreadKind::VfioServer)
        .context("cannot confine the main thread")?;
    tracing::info!(socket = %options.socket.display(), tap = %options.tap, "ready");
    server.run(&mut device)?;
    tracing::info!("ended");
    Ok(())
}

fn stop_on_signal(spawner: &ThreadSpawner, stopper: Stopper) -> anyhow::Result<()> {
    spawner
        .spawn(ThreadKind::Signal, "signal", move || {
            match wait_for_signal(&END) {
                Ok(signal) => tracing::info!(signal, "ending"),
                Err(error) => tracing::error!(%error, "cannot wait for signals; ending"),
            }
            if let Err(error) = stopper.stop() {
                tracing::error!(%error, "cannot end in order");
                std::process::exit(1);
            }
        })
        .map(drop)
        .context("cannot start the signal thread")
}
