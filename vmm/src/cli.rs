//! The command line of `ferry`.

use std::path::PathBuf;

use clap::{ArgAction, Parser, ValueEnum};
use event_monitor::Sink;
use sandbox::SeccompMode;

use crate::api::ApiSocket;
use crate::config::{
    ConfigError, ConsoleConfig, CpusConfig, DeviceConfig, MemoryConfig, NetConfig, PayloadConfig,
    PlatformConfig, RngConfig, UserDeviceConfig, VmConfig, default_console, default_serial,
};

/// How much `ferry` says on standard error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogLevel {
    /// Nothing.
    Off,
    /// What failed.
    Error,
    /// And what is odd.
    Warn,
    /// And what was done.
    Info,
    /// And how.
    Debug,
    /// And every step.
    Trace,
}

impl LogLevel {
    /// Its name, which is also a filter directive of `tracing-subscriber`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

/// A KVM virtual machine monitor that live-migrates guests with their passthrough NICs.
///
/// With --kernel, a VM is made and booted at once. Without, ferry waits on --api-socket for
/// vm.create or vm.receive-migration (see `ferryctl --help`). Options and JSON keys are Cloud
/// Hypervisor's.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "ferry",
    version,
    max_term_width = 100,
    after_help = "\
A value that holds a comma is quoted (--rng 'src=\"/tmp/a,b\"'); sizes take K, M, G or T.

Examples:
  ferry --kernel vmlinux --cmdline console=ttyS0 --serial tty --console off --memory size=1G
  ferry --api-socket path=/run/ferry.sock --kernel bzImage --initramfs initrd --cpus boot=2 \\
        --memory size=1G,shared=on --net tap=tap0,hash_report=on --user-device socket=/run/nic.sock
  ferry --api-socket path=/run/ferry2.sock     # then: ferryctl migrate --from … --to …"
)]
pub struct Cli {
    /// Virtual CPUs.
    #[arg(
        long,
        value_name = "boot=N",
        help = "Virtual CPUs: boot=N[,max=N]",
        long_help = "Virtual CPUs: boot=N[,max=N]\n\n\
            max must equal boot: vCPUs cannot be added to a running VM. Default: boot=1.",
        help_heading = "The VM"
    )]
    pub cpus: Option<CpusConfig>,

    /// Guest RAM.
    #[arg(
        long,
        value_name = "size=SIZE,…",
        help = "Guest RAM: size=SIZE[,shared=on|off][,hugepages=on|off][,hugepage_size=2M|1G]\
            [,dirty_log=bitmap|bitmap-auto-clear|ring][,dirty_ring_entries=N]",
        long_help = "Guest RAM: size=SIZE[,shared=on|off][,hugepages=on|off][,hugepage_size=2M|1G]\
            [,dirty_log=bitmap|bitmap-auto-clear|ring][,dirty_ring_entries=N]\
            \n\n\
            shared=on makes it a memfd that other processes may map; passthrough devices \
            and vhost_user=on need that.\n\n\
            dirty_log is how KVM logs the pages that vCPUs write during a migration: in a bitmap \
            that is cleared just before pages are sent, or as a whole each time it is read (also \
            where KVM cannot do the former); or in a ring for each vCPU, of N entries, a power of \
            two (default 4096), which costs by pages written and not by guest size.\n\n\
            Default: size=512M,dirty_log=bitmap.",
        help_heading = "The VM"
    )]
    pub memory: Option<MemoryConfig>,

    /// Kernel: an ELF vmlinux with a PVH note, or a bzImage.
    #[arg(long, value_name = "FILE", help_heading = "The VM")]
    pub kernel: Option<PathBuf>,

    /// Initial RAM disk.
    #[arg(
        long,
        value_name = "FILE",
        requires = "kernel",
        help_heading = "The VM"
    )]
    pub initramfs: Option<PathBuf>,

    /// The kernel's command line.
    #[arg(
        long,
        value_name = "TEXT",
        requires = "kernel",
        allow_hyphen_values = true,
        help_heading = "The VM"
    )]
    pub cmdline: Option<String>,

    /// Serial port: off|null|tty|pty|file=FILE|socket=SOCKET.
    ///
    /// Default: null.
    #[arg(
        long,
        value_name = "MODE",
        value_parser = |text: &str| ConsoleConfig::parse("--serial", text),
        help_heading = "Devices"
    )]
    pub serial: Option<ConsoleConfig>,

    /// virtio console: off|null|tty|pty|file=FILE|socket=SOCKET.
    ///
    /// Default: tty.
    #[arg(
        long,
        value_name = "MODE",
        value_parser = |text: &str| ConsoleConfig::parse("--console", text),
        help_heading = "Devices"
    )]
    pub console: Option<ConsoleConfig>,

    /// virtio-net devices.
    #[arg(
        long,
        value_name = "tap=NAME,…",
        num_args = 1..,
        help = "virtio-net device: tap=NAME|fd=N|fd=[N,…]|vhost_user=on,socket=SOCKET and more; \
            may be repeated",
        long_help = "virtio-net device; may be repeated: \
            tap=NAME|fd=N|fd=[N,…]|vhost_user=on,socket=SOCKET[,mac=ADDRESS]\
            [,mtu=BYTES][,num_queues=N][,queue_size=N][,hash_report=on|off|auto][,rss=on|off]\
            [,hash_types=[TYPE,…]][,hash_backend=auto|kernel|software][,pci_device_id=SLOT]\
            [,id=NAME]\n\n\
            vhost_user=on lets the process that listens on the socket serve the queues; it needs \
            --memory shared=on and knows no hashes. \
            num_queues counts receive and transmit queues together (2 to 254, default 2); queue_size \
            is a power of two (default 256); hash_report=on offers the guest each received packet's \
            hash, auto does so on a tap; rss=on lets the guest steer packets to its queues by their \
            hashes; hash_types narrows the types of hashes offered with either: ipv4, tcpv4, udpv4, \
            ipv6, tcpv6, udpv6, ip_ex, tcp_ex, udp_ex (default: all); hash_backend=software keeps the host's kernel from \
            hashing and steering, kernel refuses a host that cannot hash.",
        help_heading = "Devices"
    )]
    pub net: Vec<NetConfig>,

    /// Devices of the host.
    #[arg(
        long,
        value_name = "path=DIR,…",
        num_args = 1..,
        help = "PCI device of the host: path=/sys/bus/pci/devices/ADDRESS|fd=N[,id=NAME]\
            [,dirty=auto|all]; may be repeated",
        long_help = "PCI device of the host, bound to vfio-pci or a driver of its kind; may be \
            repeated: path=/sys/bus/pci/devices/ADDRESS|fd=N[,id=NAME][,dirty=auto|all]\
            [,give_back=on|off][,pci_device_id=SLOT]\n\n\
            fd is the device's own file, /dev/vfio/devices/NAME, opened read-write by whoever starts \
            ferry and used by nobody else; ferry then needs no rights to it (see also --platform).\n\n\
            dirty=all lets the VM migrate although nobody can tell which pages the device wrote: \
            all memory is then copied while the guest stands still. Without it (auto) such a \
            migration is refused.\n\n\
            give_back=on has the guest asked to eject the device when the host wants it back \
            (its driver is unbound, say). pci_device_id is its slot on the guest's bus, 1 to 31.\n\n\
            All of the guest's RAM is locked in memory for it (see ulimit -l).",
        help_heading = "Devices"
    )]
    pub device: Vec<DeviceConfig>,

    /// Passthrough devices.
    #[arg(
        long,
        value_name = "socket=SOCKET,…",
        num_args = 1..,
        help = "Passthrough device served over vfio-user: socket=SOCKET[,id=NAME]; may be repeated",
        long_help = "Passthrough device served over vfio-user; may be repeated: \
            socket=SOCKET[,id=NAME][,pci_device_id=SLOT]\n\nNeeds --memory shared=on.",
        help_heading = "Devices"
    )]
    pub user_device: Vec<UserDeviceConfig>,

    /// How devices of the host are opened.
    #[arg(
        long,
        value_name = "iommufd=MODE,…",
        help = "How devices of the host are opened: iommufd=on|off|auto[,iommufd_fd=N]",
        long_help = "How devices of the host are opened: iommufd=on|off|auto[,iommufd_fd=N]\n\n\
            on: by their own files in /dev/vfio/devices and /dev/iommu; off: by their groups and \
            /dev/vfio/vfio; auto: as on where both files can be opened, else as off. iommufd_fd is an \
            open /dev/iommu that ferry inherits, and then keeps for all its VMs.\n\n\
            Default: iommufd=auto.",
        help_heading = "Devices"
    )]
    pub platform: Option<PlatformConfig>,

    /// Entropy source: src=FILE.
    ///
    /// Default: src=/dev/urandom.
    #[arg(long, value_name = "src=FILE", help_heading = "Devices")]
    pub rng: Option<RngConfig>,

    /// Where to serve the REST API: path=SOCKET, fd=N, or a bare path.
    ///
    /// The socket is made for this user alone; fd is a listening socket that ferry inherits.
    #[arg(long, value_name = "path=SOCKET", help_heading = "The process")]
    pub api_socket: Option<ApiSocket>,

    /// Where to write events, one JSON object per line: path=FILE or fd=N.
    #[arg(long, value_name = "path=FILE", help_heading = "The process")]
    pub event_monitor: Option<Sink>,

    /// What a system call that its thread has no use for does: true|false|log.
    ///
    /// true ends ferry with a message that names thread and call; log writes to the kernel's audit
    /// log; false installs no filters.
    #[arg(
        long,
        value_name = "MODE",
        default_value_t,
        help_heading = "The process"
    )]
    pub seccomp: SeccompMode,

    /// How much to say on standard error. Default: warn.
    #[arg(
        long,
        value_name = "LEVEL",
        conflicts_with = "verbose",
        help_heading = "The process"
    )]
    pub log_level: Option<LogLevel>,

    /// Say more on standard error: -v info, -vv debug, -vvv trace.
    #[arg(short, long, action = ArgAction::Count, help_heading = "The process")]
    pub verbose: u8,
}

impl Cli {
    /// How much to say.
    pub fn level(&self) -> LogLevel {
        match (self.log_level, self.verbose) {
            (Some(level), _) => level,
            (None, 0) => LogLevel::Warn,
            (None, 1) => LogLevel::Info,
            (None, 2) => LogLevel::Debug,
            (None, _) => LogLevel::Trace,
        }
    }

    /// The VM to boot at once, validated; `None` if the options describe none.
    ///
    /// # Errors
    /// [`ConfigError`] if the options describe a VM that cannot be, or parts of one without a
    /// kernel.
    pub fn vm_config(&self) -> Result<Option<VmConfig>, ConfigError> {
        if self.kernel.is_none() && !self.has_vm_options() {
            return Ok(None);
        }
        let config = VmConfig {
            cpus: self.cpus.unwrap_or_default(),
            memory: self.memory.unwrap_or_default(),
            payload: PayloadConfig {
                kernel: self.kernel.clone(),
                initramfs: self.initramfs.clone(),
                cmdline: self.cmdline.clone(),
            },
            platform: self.platform.unwrap_or_default(),
            net: self.net.clone(),
            rng: self.rng.clone().unwrap_or_default(),
            serial: self.serial.clone().unwrap_or_else(default_serial),
            console: self.console.clone().unwrap_or_else(default_console),
            devices: self.device.clone(),
            user_devices: self.user_device.clone(),
        };
        config.validate().map(Some)
    }

    /// Whether any option besides `--kernel` describes a VM.
    fn has_vm_options(&self) -> bool {
        self.cpus.is_some()
            || self.memory.is_some()
            || self.serial.is_some()
            || self.console.is_some()
            || self.rng.is_some()
            || self.platform.is_some()
            || !self.net.is_empty()
            || !self.device.is_empty()
            || !self.user_device.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(arguments: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("ferry").chain(arguments.split_whitespace()))
    }

    #[test]
    fn the_definition_is_consistent_and_all_options_have_help() {
        let command = Cli::command();
        command.clone().debug_assert();
        for argument in command.get_arguments() {
            assert!(argument.get_help().is_some(), "{}", argument.get_id());
        }
    }

    #[test]
    fn a_whole_vm_on_one_line() {
        let cli = parse(
            "--kernel k --initramfs i --cmdline console=ttyS0 --cpus boot=2,max=2 \
             --memory size=1G,shared=on --serial file=/tmp/log --console off \
             --net tap=tap0 tap=tap1 --net tap=tap2 --user-device socket=/nic,id=nic \
             --device path=/sys/bus/pci/devices/0000:01:00.0 \
             --rng src=/dev/random --api-socket path=/s --event-monitor fd=5 --seccomp log -vv",
        )
        .unwrap();
        let config = cli.vm_config().unwrap().unwrap();
        let ids: Vec<&str> = config.device_ids().collect();
        assert_eq!(ids, ["_net0", "_net1", "_net2", "_vfio0", "nic"]);
        assert_eq!(config.cpus.boot_vcpus, 2);
        assert_eq!(config.console, ConsoleConfig::Off);
        assert_eq!(cli.api_socket, Some(ApiSocket::Path("/s".into())));
        assert_eq!(cli.event_monitor, Some(Sink::Fd(5)));
        assert_eq!(cli.seccomp, SeccompMode::Log);
        assert_eq!(cli.level(), LogLevel::Debug);
    }

    #[test]
    fn no_vm_options_mean_no_vm() {
        let cli = parse("--api-socket /s").unwrap();
        assert_eq!(cli.vm_config().unwrap(), None);
        assert_eq!(cli.seccomp, SeccompMode::Enforce);
        assert_eq!(cli.level(), LogLevel::Warn);
        let error = parse("--cpus boot=2").unwrap().vm_config().unwrap_err();
        assert_eq!(error, ConfigError::NoKernel);
    }

    #[test]
    fn mistakes_are_named() {
        for (arguments, part) in [
            ("--memory size=1Q", "a size such as"),
            ("--serial loud", "--serial: unknown key `loud`"),
            ("--net tap=t,rps=on", "unknown key `rps`"),
            ("--net tap=t,hash_types=ipv5", "one of ipv4, tcpv4"),
            ("--seccomp maybe", "no seccomp mode"),
            ("--initramfs i", "--kernel"),
            ("--log-level info -v", "cannot be used with"),
            ("--api-socket port=1", "no API socket"),
        ] {
            let error = parse(arguments).unwrap_err().to_string();
            assert!(error.contains(part), "{arguments}: {error}");
        }
    }
}
