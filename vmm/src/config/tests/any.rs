//! Any configuration survives JSON, option strings and validation; any text survives parsing.

use std::path::PathBuf;

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;

use crate::config::*;

/// Paths the command line can carry: UTF-8 without quotes.
fn path() -> impl Strategy<Value = PathBuf> {
    "[a-zA-Z0-9/_.,= -]{1,20}".prop_map(PathBuf::from)
}

fn console() -> impl Strategy<Value = ConsoleConfig> {
    prop_oneof![
        Just(ConsoleConfig::Off),
        Just(ConsoleConfig::Null),
        Just(ConsoleConfig::Tty),
        Just(ConsoleConfig::Pty),
        path().prop_map(ConsoleConfig::File),
        path().prop_map(ConsoleConfig::Socket),
    ]
}

prop_compose! {
    fn net()(
        id in "[a-z_]{0,8}",
        tap in option::of("[a-z0-9]{1,15}"),
        fds in vec(3..100i32, 0..4),
        mac in option::of(any::<[u8; 6]>()),
        mtu in option::of(any::<u16>()),
        num_queues: u16,
        queue_size: u16,
        (hash_report, rss, types, by) in (0_u8..3, any::<bool>(), 0_u32..0x200, 0_u8..3),
        (vhost_user, vhost_socket) in (any::<bool>(), option::of(path())),
        pci_device_id in option::of(any::<u8>()),
    ) -> NetConfig {
        let mac = mac.map(MacAddress);
        let hash_report = [Offer::Off, Offer::On, Offer::Auto][usize::from(hash_report)];
        let names = ["ipv4", "tcpv4", "udpv4", "ipv6", "tcpv6", "udpv6", "ip_ex", "tcp_ex", "udp_ex"];
        let on = (0..).zip(names).filter(|(bit, _)| types >> bit & 1 != 0);
        let names: Vec<String> = on.map(|(_, name)| name.to_owned()).collect();
        let hash_types = names.try_into().ok();
        let backends = [HashBackend::Auto, HashBackend::Kernel, HashBackend::Software];
        let hash_backend = backends[usize::from(by)];
        NetConfig {
            id, tap, fds, vhost_user, vhost_socket, mac, mtu, num_queues, queue_size, hash_report,
            rss, hash_types, hash_backend, pci_device_id,
        }
    }
}

prop_compose! {
    fn user_device()(
        id in "[a-z_]{0,8}",
        socket in path(),
        pci_device_id in option::of(any::<u8>()),
    ) -> UserDeviceConfig {
        UserDeviceConfig { id, socket, pci_device_id }
    }
}

prop_compose! {
    fn device()(
        id in "[a-z_]{0,8}",
        (path, fd) in (path(), option::of(any::<i32>())),
        dirty in select(vec![DirtyConfig::Auto, DirtyConfig::All]),
        give_back: bool,
        pci_device_id in option::of(any::<u8>()),
    ) -> DeviceConfig {
        DeviceConfig { id, path, fd, dirty, give_back, pci_device_id }
    }
}

prop_compose! {
    fn memory()(
        size: u64,
        shared: bool,
        hugepages: bool,
        hugepage_size in option::of(any::<u64>()),
        dirty_log in select(vec![
            DirtyLogConfig::Bitmap,
            DirtyLogConfig::BitmapAutoClear,
            DirtyLogConfig::Ring,
        ]),
        dirty_ring_entries in option::of(any::<u32>()),
    ) -> MemoryConfig {
        MemoryConfig { size, shared, hugepages, hugepage_size, dirty_log, dirty_ring_entries }
    }
}

prop_compose! {
    fn config()(
        (boot_vcpus, max_vcpus) in any::<(u32, u32)>(),
        memory in memory(),
        (iommufd, iommufd_fd) in (
            select(vec![IommufdConfig::Auto, IommufdConfig::On, IommufdConfig::Off]),
            option::of(any::<i32>()),
        ),
        kernel in option::of(path()),
        initramfs in option::of(path()),
        cmdline in option::of(".{0,40}"),
        net in vec(net(), 0..3),
        src in path(),
        serial in console(),
        console in console(),
        devices in vec(device(), 0..3),
        user_devices in vec(user_device(), 0..3),
    ) -> VmConfig {
        VmConfig {
            cpus: CpusConfig { boot_vcpus, max_vcpus },
            memory,
            payload: PayloadConfig { kernel, initramfs, cmdline },
            platform: PlatformConfig { iommufd, iommufd_fd },
            net,
            rng: RngConfig { src },
            serial,
            console,
            devices,
            user_devices,
        }
    }
}

fn through_options(config: &VmConfig) -> Result<VmConfig, ConfigError> {
    let nets = config.net.iter().map(|net| net.to_string().parse());
    let devices = config
        .devices
        .iter()
        .map(|device| device.to_string().parse());
    let users = config
        .user_devices
        .iter()
        .map(|device| device.to_string().parse());
    Ok(VmConfig {
        cpus: config.cpus.to_string().parse()?,
        memory: config.memory.to_string().parse()?,
        payload: config.payload.clone(),
        platform: config.platform.to_string().parse()?,
        net: nets.collect::<Result<_, _>>()?,
        rng: config.rng.to_string().parse()?,
        serial: ConsoleConfig::parse("--serial", &config.serial.to_string())?,
        console: ConsoleConfig::parse("--console", &config.console.to_string())?,
        devices: devices.collect::<Result<_, _>>()?,
        user_devices: users.collect::<Result<_, _>>()?,
    })
}

proptest! {
    #[test]
    fn json_and_options_carry_the_same_vm(config in config()) {
        let json = serde_json::to_string(&config).unwrap();
        prop_assert_eq!(&serde_json::from_str::<VmConfig>(&json).unwrap(), &config);
        prop_assert_eq!(&through_options(&config).unwrap(), &config);
    }

    #[test]
    fn validation_is_idempotent_and_never_panics(config in config()) {
        if let Ok(valid) = config.validate() {
            prop_assert_eq!(valid.clone().validate().unwrap(), valid);
        }
    }

    #[test]
    fn no_text_makes_a_parser_panic(text in ".{0,60}") {
        parse_all(&text);
    }

    #[test]
    fn no_near_miss_makes_a_parser_panic(
        text in "((size|boot|tap|fd|mac|id|socket|src|file)?=?[\"\\[\\]0-9a-gKMGT:,=€]{0,6},?){0,5}"
    ) {
        parse_all(&text);
    }

    #[test]
    fn sizes_survive_printing(size: u64) {
        prop_assert_eq!(parse_size(&format_size(size)), Some(size));
    }
}

fn parse_all(text: &str) {
    let _ = text.parse::<CpusConfig>();
    let _ = text.parse::<MemoryConfig>();
    let _ = text.parse::<NetConfig>();
    let _ = text.parse::<DeviceConfig>();
    let _ = text.parse::<PlatformConfig>();
    let _ = text.parse::<UserDeviceConfig>();
    let _ = text.parse::<RngConfig>();
    let _ = text.parse::<ConsoleConfig>();
    let _ = text.parse::<MacAddress>();
    let _ = parse_size(text);
}
