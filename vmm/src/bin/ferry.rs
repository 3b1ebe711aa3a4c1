//! The VMM's process.

use std::io::IsTerminal;
use std::os::fd::OwnedFd;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use clap::Parser;
use devices::{ThreadKind, ThreadSpawner};
use event_monitor::{Event, EventMonitor, Sink, open_path};
use hypervisor::KvmHypervisor;
use sandbox::Filters;
use vmm::api::{self, ApiError, ApiListener, ApiServer};
use vmm::cli::Cli;
use vmm::control::Control;
use vmm::inherited;
use vmm::machine::Host;
use vmm::notice;
use vmm::signals::Signals;

/// How long the last events may take to be written.
const EVENTS_AT_EXIT: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = tracing_subscriber::EnvFilter::new(cli.level().name());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ferry: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    let config = cli.vm_config()?;
    if config.is_none() && cli.api_socket.is_none() {
        return Err(anyhow!(
            "nothing to do: give --kernel to boot a VM, or --api-socket to wait for requests"
        ));
    }
    // Before the first thread, so that all of them leave these signals to the control loop.
    let signals = Signals::take().context("cannot take over signals")?;
    let filters = Filters::new("ferry", ThreadKind::Vmm, cli.seccomp)
        .context("cannot prepare system-call filters")?;
    let spawner = filters.spawner();
    let (exit_sender, exits) = notice::channel()?;
    let (handle, inbox) = api::channel()?;
    let hypervisor = KvmHypervisor::open().context("KVM")?;
    let (events, writer) = event_monitor(cli, &spawner)?;
    events.tell(Event::VmmStarting);
    let host = Host {
        iommufd: Arc::default(),
        hypervisor: Arc::new(hypervisor),
        spawner: spawner.clone(),
        events: events.clone(),
        exits: exit_sender,
    };
    let server = match &cli.api_socket {
        Some(socket) => Some(ApiServer::start(
            ApiListener::open(socket)?,
            handle,
            &spawner,
        )?),
        None => None,
    };
    filters
        .confine(ThreadKind::Vmm)
        .context("cannot confine the control loop")?;
    let mut control = Control::new(host, inbox, exits, signals, config.is_some())?;
    if let Some(config) = config {
        control.create_and_boot(config).map_err(chain)?;
    }
    control.run().context("the control loop failed")?;
    drop(control);
    if let Some(server) = server {
        server.stop();
    }
    events.flush(EVENTS_AT_EXIT);
    drop((events, writer));
    Ok(())
}

/// The event monitor and the thread that writes for it, if events are asked for.
fn event_monitor(
    cli: &Cli,
    spawner: &ThreadSpawner,
) -> Result<(EventMonitor, Option<JoinHandle<()>>)> {
    let sink: OwnedFd = match &cli.event_monitor {
        None => return Ok((EventMonitor::disabled(), None)),
        Some(Sink::Path(path)) => open_path(path)?.into(),
        Some(Sink::Fd(fd)) => inherited::duplicate(*fd).with_context(|| {
            format!("--event-monitor fd={fd}: nothing is open under that number")
        })?,
    };
    let (monitor, writer) = EventMonitor::new(sink);
    let thread = spawner.spawn(ThreadKind::EventMonitor, "event-monitor", || writer.run())?;
    Ok((monitor, Some(thread)))
}

fn chain(error: ApiError) -> anyhow::Error {
    anyhow!("{}", error.chain.join(": "))
}
