//! The command line of `ferryctl`.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand, ValueEnum};
use vmm::api::{
    ReceiveDeviceConfig, ReceiveMigrationConfig, ReceiveNetConfig, ReceiveUserDeviceConfig,
    SendMigrationConfig, TimeoutStrategy,
};
use vmm::config::{
    ConsoleConfig, DeviceConfig, NetConfig, PlatformConfig, UserDeviceConfig, parse_size,
};

/// Drives a ferry over its API socket.
///
/// Each verb is one request (see openapi.json), except `migrate`, which drives both ends of a live
/// migration and reports on it.
#[derive(Debug, Parser)]
#[command(
    name = "ferryctl",
    version,
    max_term_width = 100,
    after_help = "\
Examples:
  ferryctl --api-socket /run/a.sock create vm.json && ferryctl --api-socket /run/a.sock boot
  ferryctl --api-socket /run/a.sock info
  ferryctl --api-socket /run/a.sock top --interval-ms 2000
  ferryctl migrate --from /run/a.sock --to /run/b.sock --url unix:/run/move.sock"
)]
pub(crate) struct Cli {
    /// The API socket of the ferry to talk to.
    #[arg(long, global = true, value_name = "SOCKET", value_parser = socket)]
    pub(crate) api_socket: Option<PathBuf>,
    /// What to ask.
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

/// What can be asked.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Says which ferry is there (GET vmm.ping).
    Ping,
    /// Shows the VM's configuration and state (GET vm.info).
    Info,
    /// Shows the devices' counters (GET vm.counters).
    Counters,
    /// Configures a VM; it is not started (PUT vm.create).
    Create {
        /// The configuration as JSON; `-` reads standard input.
        config: PathBuf,
    },
    /// Starts the configured VM (PUT vm.boot).
    Boot,
    /// Stops vCPUs and devices (PUT vm.pause).
    Pause,
    /// Lets vCPUs and devices run again (PUT vm.resume).
    Resume,
    /// Switches the VM off; it may be booted again (PUT vm.shutdown).
    Shutdown,
    /// Switches the VM off and forgets its configuration (PUT vm.delete).
    Delete,
    /// Gives the VM a device of the host (PUT vm.add-device).
    AddDevice {
        /// The device, as `ferry --device` takes it.
        device: DeviceConfig,
    },
    /// Gives the VM a device of a vfio-user server (PUT vm.add-user-device).
    AddUserDevice {
        /// The device, as `ferry --user-device` takes it.
        device: UserDeviceConfig,
    },
    /// Gives the VM a network card (PUT vm.add-net).
    AddNet {
        /// The card, as `ferry --net` takes it.
        net: NetConfig,
    },
    /// Asks the guest to eject a device, which is gone when it has (PUT vm.remove-device).
    RemoveDevice {
        /// The device's id, as `info` shows it.
        id: String,
    },
    /// Ends the ferry, and with it the VM (PUT vmm.shutdown).
    ShutdownVmm,
    /// Starts to move the VM to a ferry that waits for it (PUT vm.send-migration).
    SendMigration {
        /// Where it waits: unix:PATH or tcp:HOST:PORT.
        url: String,
        #[command(flatten)]
        limits: SendLimits,
    },
    /// Waits for a VM from another ferry (PUT vm.receive-migration).
    ReceiveMigration {
        /// Where to wait: unix:PATH or tcp:HOST:PORT.
        url: String,
        #[command(flatten)]
        devices: ReceiveDevices,
    },
    /// Shows the migration that runs or ran last (GET vm.migration).
    Migration,
    /// Gives the running migration up; the VM runs on at the source (PUT vm.cancel-migration).
    CancelMigration,
    /// Shows metrics as Prometheus text (GET vm.metrics).
    Metrics,
    /// Shows what the devices do, queue by queue, per second (vm.info and vm.counters in turn).
    ///
    /// For each queue pair of a network card: frames and bytes received and sent, frames moved to
    /// another queue because the tap gave them to the wrong one, and hash reports by type, all per
    /// second; and frames dropped since the start. Beside the card's name is who hashes and who
    /// chooses the queue, and why. Ends with Ctrl-C.
    Top(Watch),
    /// Moves a VM from one ferry to another, shows how it goes, and reports.
    ///
    /// Interrupted (Ctrl-C), the migration goes on; cancel-migration at the source ends it.
    Migrate(Order),
}

/// How to watch.
#[derive(Debug, Args)]
pub(crate) struct Watch {
    /// Milliseconds from one screen to the next.
    #[arg(long, value_name = "MS", default_value_t = 1000,
          value_parser = clap::value_parser!(u64).range(10..=3_600_000))]
    pub(crate) interval_ms: u64,
    /// End after so many screens.
    #[arg(long, value_name = "N")]
    pub(crate) count: Option<u64>,
}

/// A whole migration.
#[derive(Debug, Args)]
pub(crate) struct Order {
    /// The API socket of the ferry that has the VM.
    #[arg(long, value_name = "SOCKET", value_parser = socket)]
    pub(crate) from: PathBuf,
    /// The API socket of the ferry that shall have it; it must have no VM.
    #[arg(long, value_name = "SOCKET", value_parser = socket)]
    pub(crate) to: PathBuf,
    /// The way between them: unix:PATH or tcp:HOST:PORT, as the source reaches it.
    #[arg(long)]
    pub(crate) url: String,
    /// Where the destination listens, if that is written differently there.
    #[arg(long, value_name = "URL")]
    pub(crate) listen_url: Option<String>,
    #[command(flatten)]
    pub(crate) limits: SendLimits,
    #[command(flatten)]
    pub(crate) devices: ReceiveDevices,
    /// Print the report as one JSON object, and no progress bar.
    #[arg(long)]
    pub(crate) json: bool,
}

/// What the source is told.
#[derive(Debug, Args)]
pub(crate) struct SendLimits {
    /// The longest the guest shall stand still, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 300)]
    pub(crate) downtime_ms: u64,
    /// The longest memory may be copied before --timeout-strategy decides, in seconds.
    #[arg(long, value_name = "S", default_value_t = 3600)]
    pub(crate) timeout_s: u64,
    /// What then: cancel the migration, or ignore the downtime and move the VM.
    #[arg(long, value_enum, value_name = "WHAT", default_value = "cancel")]
    pub(crate) timeout_strategy: Strategy,
    /// The most to send while the guest runs, per second, in bytes or with K, M, G.
    #[arg(long, value_name = "SIZE", value_parser = bandwidth)]
    pub(crate) max_bandwidth: Option<u64>,
    /// How often a dirty log that fails is started anew, all memory being sent again, before the
    /// migration fails.
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub(crate) dirty_log_restarts: u32,
}

/// [`TimeoutStrategy`] on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Strategy {
    /// The VM runs on at the source.
    Cancel,
    /// The VM is moved whatever the downtime.
    Ignore,
}

impl SendLimits {
    pub(crate) fn send_config(&self, url: &str) -> SendMigrationConfig {
        SendMigrationConfig {
            destination_url: url.to_owned(),
            downtime_ms: self.downtime_ms,
            timeout_s: self.timeout_s,
            timeout_strategy: match self.timeout_strategy {
                Strategy::Cancel => TimeoutStrategy::Cancel,
                Strategy::Ignore => TimeoutStrategy::Ignore,
            },
            max_bandwidth: self.max_bandwidth,
            dirty_log_restarts: self.dirty_log_restarts,
        }
    }
}

/// What the destination is told: what is called differently on its host.
#[derive(Debug, Args)]
pub(crate) struct ReceiveDevices {
    /// The tap a virtio-net device has at the destination, or the tap descriptors that ferry
    /// inherited there, one per queue pair; may be repeated.
    #[arg(long, value_name = "ID@TAP|ID@fd=[N,…]")]
    pub(crate) net: Vec<Placed>,
    /// The socket of the vhost-user backend a virtio-net device has at the destination; may be
    /// repeated.
    #[arg(long, value_name = "ID@SOCKET")]
    pub(crate) net_socket: Vec<Placed>,
    /// The folder in sysfs of the host's device at the destination, or the descriptor of its open
    /// file that ferry inherited there; may be repeated.
    #[arg(long, value_name = "ID@DIR|ID@fd=N")]
    pub(crate) device: Vec<Placed>,
    /// The server's socket a passthrough device has at the destination; may be repeated.
    #[arg(long, value_name = "ID@SOCKET")]
    pub(crate) user_device: Vec<Placed>,
    /// How the host's devices are opened at the destination, as `ferry --platform` takes it.
    #[arg(long, value_name = "iommufd=MODE,…")]
    pub(crate) platform: Option<PlatformConfig>,
    /// The serial port at the destination, as `ferry --serial` takes it.
    #[arg(long, value_name = "MODE", value_parser = |text: &str| ConsoleConfig::parse("--serial", text))]
    pub(crate) serial: Option<ConsoleConfig>,
    /// The virtio console at the destination, as `ferry --console` takes it.
    #[arg(long, value_name = "MODE", value_parser = |text: &str| ConsoleConfig::parse("--console", text))]
    pub(crate) console: Option<ConsoleConfig>,
}

impl ReceiveDevices {
    pub(crate) fn receive_config(&self, url: &str) -> ReceiveMigrationConfig {
        let taps = self.net.iter().map(|placed| {
            let fds = placed.fds();
            ReceiveNetConfig {
                id: placed.id.clone(),
                tap: fds.is_none().then(|| placed.place.clone()),
                fds: fds.unwrap_or_default(),
                vhost_socket: None,
            }
        });
        let sockets = self.net_socket.iter().map(|placed| ReceiveNetConfig {
            id: placed.id.clone(),
            tap: None,
            fds: Vec::new(),
            vhost_socket: Some(PathBuf::from(&placed.place)),
        });
        let devices = self.device.iter().map(|placed| {
            // A folder in sysfs starts with a slash.
            let fd = placed.place.strip_prefix("fd=");
            let fd = fd.and_then(|number| number.parse().ok());
            ReceiveDeviceConfig {
                id: placed.id.clone(),
                path: fd.is_none().then(|| PathBuf::from(&placed.place)),
                fd,
            }
        });
        let user_devices = self
            .user_device
            .iter()
            .map(|placed| ReceiveUserDeviceConfig {
                id: placed.id.clone(),
                socket: PathBuf::from(&placed.place),
            });
        ReceiveMigrationConfig {
            receiver_url: url.to_owned(),
            net: taps.chain(sockets).collect(),
            devices: devices.collect(),
            user_devices: user_devices.collect(),
            platform: self.platform,
            serial: self.serial.clone(),
            console: self.console.clone(),
        }
    }
}

/// A device and what serves it: `ID@PLACE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Placed {
    id: String,
    place: String,
}

impl Placed {
    /// The numbers in `fd=N` and `fd=[N,…]`.
    fn fds(&self) -> Option<Vec<i32>> {
        let list = self.place.strip_prefix("fd=")?;
        let inner = match list.strip_prefix('[') {
            Some(rest) => rest.strip_suffix(']')?,
            None => list,
        };
        inner
            .split(',')
            .map(|number| number.trim().parse().ok())
            .collect()
    }
}

impl FromStr for Placed {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('@') {
            Some((id, place)) if !id.is_empty() && !place.is_empty() => Ok(Self {
                id: id.to_owned(),
                place: place.to_owned(),
            }),
            _ => {
                Err("write the device's id, an @, and what serves it, as in _net0@tap1".to_owned())
            }
        }
    }
}

/// A socket's path, with or without the `path=` that ferry's own option has.
fn socket(text: &str) -> Result<PathBuf, String> {
    let path = text.strip_prefix("path=").unwrap_or(text);
    if path.is_empty() {
        return Err("the path is empty".to_owned());
    }
    Ok(PathBuf::from(path))
}

fn bandwidth(text: &str) -> Result<u64, String> {
    match parse_size(text) {
        Some(0) | None => Err("write a size above zero, such as 100M".to_owned()),
        Some(bytes) => Ok(bytes),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(arguments: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("ferryctl").chain(arguments.split_whitespace()))
    }

    #[test]
    fn the_definition_is_consistent_and_all_arguments_have_help() {
        let command = Cli::command();
        command.clone().debug_assert();
        for verb in command.get_subcommands() {
            assert!(verb.get_about().is_some(), "{}", verb.get_name());
            for argument in verb.get_arguments() {
                let known = argument.get_help().is_some();
                assert!(known, "{} {}", verb.get_name(), argument.get_id());
            }
        }
    }

    #[test]
    fn defaults_are_those_of_the_api() {
        let cli = parse("--api-socket path=/s send-migration unix:/x").unwrap();
        assert_eq!(cli.api_socket, Some(PathBuf::from("/s")));
        let Verb::SendMigration { url, limits } = cli.verb else {
            panic!("{:?}", cli.verb);
        };
        assert_eq!(
            limits.send_config(&url),
            SendMigrationConfig::new("unix:/x")
        );
        let cli = parse("receive-migration unix:/x --api-socket /s").unwrap();
        let Verb::ReceiveMigration { url, devices } = cli.verb else {
            panic!("{:?}", cli.verb);
        };
        assert_eq!(
            devices.receive_config(&url),
            ReceiveMigrationConfig::new("unix:/x")
        );
    }

    #[test]
    fn a_whole_migration_on_one_line() {
        let cli = parse(
            "migrate --from /a --to /b --url tcp:h:1 --net _net0@tap1 --net _net1@tap2 \
             --net _net3@fd=[7,8] --net _net4@fd=9 --net-socket _net2@/vhost --user-device _user0@/nic --device _vfio0@/sys/x --device _vfio1@fd=7 --platform iommufd=on \
             --serial file=/log --downtime-ms 50 --max-bandwidth 10M --json",
        )
        .unwrap();
        let Verb::Migrate(order) = cli.verb else {
            panic!("{:?}", cli.verb);
        };
        let receive = order.devices.receive_config(&order.url).validate().unwrap();
        assert_eq!(receive.net[1].tap.as_deref(), Some("tap2"));
        assert_eq!(
            (receive.net[2].fds.as_slice(), &receive.net[2].tap),
            ([7, 8].as_slice(), &None)
        );
        assert_eq!(receive.net[3].fds, [9]);
        assert_eq!(receive.net[4].vhost_socket, Some(PathBuf::from("/vhost")));
        assert_eq!(receive.user_devices[0].socket, PathBuf::from("/nic"));
        assert_eq!(receive.devices[0].path, Some(PathBuf::from("/sys/x")));
        assert_eq!(receive.devices[1].fd, Some(7));
        assert!(receive.platform.is_some());
        let send = order.limits.send_config(&order.url);
        assert_eq!((send.downtime_ms, send.max_bandwidth), (50, Some(10 << 20)));
    }

    #[test]
    fn mistakes_are_named() {
        for (arguments, part) in [
            ("migrate --from /a --to /b", "--url"),
            (
                "migrate --from /a --to /b --url unix:/x --net tap1",
                "_net0@tap1",
            ),
            ("send-migration unix:/x --max-bandwidth 0", "above zero"),
            ("--api-socket path= ping", "empty"),
            ("reboot", "unrecognized subcommand"),
            ("top --interval-ms 0", "10..="),
        ] {
            let error = parse(arguments).unwrap_err().to_string();
            assert!(error.contains(part), "{arguments}: {error}");
        }
    }
}
