mod any;

use std::path::PathBuf;

use net_util::hash::HashTypes;

use super::*;

fn bootable() -> VmConfig {
    serde_json::from_str(r#"{"payload": {"kernel": "/boot/vmlinux"}}"#).unwrap()
}

fn refusal(change: impl FnOnce(&mut VmConfig)) -> ConfigError {
    let mut config = bootable();
    change(&mut config);
    config.validate().unwrap_err()
}

#[test]
fn a_kernel_alone_is_a_vm_with_documented_defaults() {
    let config = bootable().validate().unwrap();
    assert_eq!(config.cpus.to_string(), "boot=1,max=1");
    assert_eq!(
        config.memory.to_string(),
        "size=512M,shared=off,hugepages=off,dirty_log=bitmap"
    );
    assert_eq!(config.serial, ConsoleConfig::Null);
    assert_eq!(config.console, ConsoleConfig::Tty);
    assert_eq!(config.rng.src, PathBuf::from("/dev/urandom"));
    assert!(config.net.is_empty() && config.user_devices.is_empty());
}

#[test]
fn unknown_keys_are_refused_by_name() {
    let json = r#"{"payload": {"kernel": "k"}, "disks": []}"#;
    let error = serde_json::from_str::<VmConfig>(json)
        .unwrap_err()
        .to_string();
    assert!(error.contains("unknown field `disks`"), "{error}");
    let error = "size=1G,mergeable=on".parse::<MemoryConfig>().unwrap_err();
    assert_eq!(
        error.to_string(),
        "--memory: unknown key `mergeable`; it takes size, shared, hugepages, hugepage_size, \
         dirty_log, dirty_ring_entries"
    );
}

#[test]
fn option_strings_in_cloud_hypervisors_shapes() {
    let memory: MemoryConfig =
        "size=1G,shared=on,hugepages=on,hugepage_size=2M,dirty_log=ring,dirty_ring_entries=1024"
            .parse()
            .unwrap();
    assert_eq!(
        memory,
        MemoryConfig {
            size: 1 << 30,
            shared: true,
            hugepages: true,
            hugepage_size: Some(2 << 20),
            dirty_log: DirtyLogConfig::Ring,
            dirty_ring_entries: Some(1024),
        }
    );
    let memory: MemoryConfig = "size=1G,dirty_log=bitmap-auto-clear".parse().unwrap();
    assert_eq!(memory.dirty_log, DirtyLogConfig::BitmapAutoClear);
    let error = "size=1G,dirty_log=rings"
        .parse::<MemoryConfig>()
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "--memory: `dirty_log=rings` is not bitmap, bitmap-auto-clear or ring"
    );
    let cpus: CpusConfig = "boot=2".parse().unwrap();
    assert_eq!((cpus.boot_vcpus, cpus.max_vcpus), (2, 2));
    let net: NetConfig =
        "tap=tap0,mac=52:54:00:12:34:56,num_queues=4,queue_size=512,hash_report=on,mtu=9000,id=eth"
            .parse()
            .unwrap();
    assert_eq!(net.tap.as_deref(), Some("tap0"));
    assert_eq!(net.mac, Some(MacAddress([0x52, 0x54, 0, 0x12, 0x34, 0x56])));
    assert_eq!((net.queue_pairs(), net.queue_size), (2, 512));
    assert_eq!(
        (net.hash_report, net.mtu, net.id.as_str()),
        (Offer::On, Some(9000), "eth")
    );
    let net: NetConfig =
        "tap=t,hash_report=auto,rss=on,hash_types=[tcpv4,udpv6],hash_backend=software"
            .parse()
            .unwrap();
    assert_eq!((net.hash_report, net.rss), (Offer::Auto, true));
    assert_eq!(
        net.offered_hash_types(),
        HashTypes::TCPV4 | HashTypes::UDPV6
    );
    assert!(net.reports_hashes());
    assert_eq!(net.hash_backend, HashBackend::Software);
    let net: NetConfig = "fd=[3,4],num_queues=4".parse().unwrap();
    assert_eq!(net.fds, [3, 4]);
    let device: UserDeviceConfig = "socket=\"/tmp/a,b\",id=nic".parse().unwrap();
    assert_eq!(device.socket, PathBuf::from("/tmp/a,b"));
    for (text, mode) in [
        ("off", ConsoleConfig::Off),
        ("null", ConsoleConfig::Null),
        ("tty", ConsoleConfig::Tty),
        ("pty", ConsoleConfig::Pty),
        ("file=/tmp/log", ConsoleConfig::File("/tmp/log".into())),
        ("socket=/tmp/s", ConsoleConfig::Socket("/tmp/s".into())),
    ] {
        assert_eq!(ConsoleConfig::parse("--serial", text).unwrap(), mode);
    }
}

#[test]
fn option_strings_that_are_wrong_say_where() {
    for (text, part) in [
        ("size", "`size` has no value"),
        ("size=", "`size` has no value"),
        ("size=1G,size=2G", "more than once"),
        ("size=1X", "a size such as"),
        ("size=99999999999999999999", "a size such as"),
        ("size=17179869184G", "a size such as"),
        ("shared=maybe", "on or off"),
        ("size=\"1G", "do not pair up"),
        (",", "unknown key ``"),
    ] {
        let error = text.parse::<MemoryConfig>().unwrap_err().to_string();
        assert!(
            error.contains(part) && error.contains("--memory"),
            "{text}: {error}"
        );
    }
    for text in ["", "off,tty", "file=a,socket=b", "loud", "tty=1", "file"] {
        assert!(ConsoleConfig::parse("--serial", text).is_err(), "{text}");
    }
    for text in [
        "1:2:3:4:5:6",
        "52:54:00:12:34",
        "52:54:00:12:34:56:78",
        "+2:54:00:12:34:56",
    ] {
        assert!(text.parse::<MacAddress>().is_err(), "{text}");
    }
    let long = format!("src={}", "x".repeat(20_000));
    assert!(matches!(
        long.parse::<RngConfig>(),
        Err(ConfigError::TooLong { .. })
    ));
}

#[test]
fn consoles_in_json_are_mode_and_path() {
    let file = ConsoleConfig::File("/tmp/log".into());
    let json = serde_json::to_string(&file).unwrap();
    assert_eq!(json, r#"{"mode":"File","file":"/tmp/log"}"#);
    assert_eq!(serde_json::from_str::<ConsoleConfig>(&json).unwrap(), file);
    for (json, part) in [
        (r#"{"mode":"File"}"#, "needs `file`"),
        (r#"{"mode":"Socket","file":"x"}"#, "needs `socket`"),
        (r#"{"mode":"Tty","file":"x"}"#, "takes no `file`"),
        (
            r#"{"mode":"File","file":"x","socket":"y"}"#,
            "takes no `socket`",
        ),
    ] {
        let error = serde_json::from_str::<ConsoleConfig>(json)
            .unwrap_err()
            .to_string();
        assert!(error.contains(part), "{json}: {error}");
    }
}

#[test]
fn ids_and_addresses_are_filled_in_and_stay() {
    let mut config = bootable();
    config.memory.shared = true;
    let tap = |id: &str| NetConfig {
        id: id.to_owned(),
        tap: Some("tap0".to_owned()),
        ..NetConfig::default()
    };
    config.net = vec![tap(""), tap("_net0"), tap("")];
    config.user_devices = vec![UserDeviceConfig {
        id: String::new(),
        socket: "/tmp/nic".into(),
        pci_device_id: None,
    }];
    let config = config.validate().unwrap();
    let ids: Vec<&str> = config.device_ids().collect();
    assert_eq!(ids, ["_net1", "_net0", "_net2", "_user0"]);
    assert!(config.net.iter().all(|net| net.mac.unwrap().is_station()));
    assert_eq!(config.clone().validate().unwrap(), config);
}

#[test]
fn nonsense_is_refused_with_the_remedy() {
    assert_eq!(refusal(|c| c.payload.kernel = None), ConfigError::NoKernel);
    assert!(matches!(
        refusal(|c| c.cpus.boot_vcpus = 0),
        ConfigError::CpuCount { .. }
    ));
    assert!(matches!(
        refusal(|c| c.cpus.max_vcpus = 2),
        ConfigError::CpuHotplug { .. }
    ));
    assert!(matches!(
        refusal(|c| c.memory.size = 0),
        ConfigError::MemorySize { .. }
    ));
    assert!(matches!(
        refusal(|c| c.memory.size = 4097),
        ConfigError::MemorySize { .. }
    ));
    assert_eq!(
        refusal(|c| c.memory.hugepage_size = Some(2 << 20)),
        ConfigError::HugepagesOff
    );
    let error = refusal(|c| {
        c.memory.hugepages = true;
        c.memory.hugepage_size = Some(1 << 30);
    });
    assert!(
        error.to_string().contains("1073741824-byte page"),
        "{error}"
    );
    assert_eq!(
        refusal(|c| c.memory.dirty_ring_entries = Some(4096)),
        ConfigError::DirtyRingOff
    );
    assert_eq!(
        refusal(|c| {
            c.memory.dirty_log = DirtyLogConfig::Ring;
            c.memory.dirty_ring_entries = Some(1000);
        }),
        ConfigError::DirtyRingEntries { entries: 1000 }
    );
    assert_eq!(
        refusal(|c| c.serial = ConsoleConfig::Tty),
        ConfigError::TwoTtys
    );
    let error = refusal(|c| c.payload.cmdline = Some("x".repeat(2048)));
    assert!(matches!(error, ConfigError::Cmdline { len: 2048, .. }));
    let error = refusal(|c| {
        c.serial = ConsoleConfig::File("/tmp/x".into());
        c.console = ConsoleConfig::File("/tmp/x".into());
    });
    assert!(matches!(error, ConfigError::PathTwice { .. }));
    let error = refusal(|c| {
        c.user_devices = vec![UserDeviceConfig {
            id: "nic".to_owned(),
            socket: "/tmp/nic".into(),
            pci_device_id: None,
        }];
    });
    assert!(error.to_string().contains("shared=on"), "{error}");
}

#[test]
fn slots_are_of_the_bus_and_of_one_device() {
    let with = |first: &str, second: &str| {
        refusal(|c| {
            c.net = vec![first.parse().unwrap()];
            c.devices = vec![second.parse().unwrap()];
        })
    };
    for slot in [0, 32, 255] {
        let device = format!("path=/sys/x,pci_device_id={slot}");
        let error = with("tap=t", &device);
        assert!(matches!(error, ConfigError::Slot { .. }), "{error}");
    }
    let twice = with("tap=t,pci_device_id=5", "path=/sys/x,pci_device_id=5");
    assert!(matches!(twice, ConfigError::RepeatedSlot { slot: 5, .. }));
}

#[test]
fn devices_come_and_go_and_the_others_stay_where_they_are() {
    let json = r#"{"payload": {"kernel": "k"}, "net": [{"tap": "t"}],
        "user_devices": [{"socket": "/s", "id": "nic"}], "memory": {"size": 536870912, "shared": true}}"#;
    let config: VmConfig = serde_json::from_str(json).unwrap();
    let mut config = config.validate().unwrap();
    config.pin_slots(|id| match id {
        "_net0" => Some(3),
        "nic" => Some(4),
        _ => None,
    });
    assert!(config.remove_device("_net0"));
    assert!(!config.remove_device("_net0"));
    assert_eq!(config.user_devices[0].pci_device_id, Some(4));
    let host: DeviceConfig = "path=/sys/x".parse().unwrap();
    let (with, added) = config.clone().with_device(NewDevice::Host(host)).unwrap();
    let NewDevice::Host(added) = added else {
        panic!("{added:?}");
    };
    assert_eq!((added.id.as_str(), added.pci_device_id), ("_vfio0", None));
    assert_eq!(with.devices, [added]);
    let again: UserDeviceConfig = "socket=/t,id=nic".parse().unwrap();
    let refused = config.with_device(NewDevice::User(again));
    assert!(matches!(refused, Err(ConfigError::RepeatedId { .. })));
}

#[test]
fn a_nic_that_cannot_work_is_refused() {
    let with = |text: &str| {
        let net: NetConfig = text.parse().unwrap();
        refusal(|c| c.net = vec![net])
    };
    assert!(matches!(with("id=a"), ConfigError::NetBackend { .. }));
    assert!(matches!(with("tap=t,fd=3"), ConfigError::NetBackend { .. }));
    for text in [
        "tap=t,vhost_user=on,socket=/s",
        "fd=3,vhost_user=on,socket=/s",
    ] {
        assert!(matches!(with(text), ConfigError::NetBackend { .. }));
    }
    for text in ["vhost_user=on", "tap=t,socket=/s"] {
        assert!(matches!(with(text), ConfigError::VhostSocket { .. }));
    }
    for text in [
        "hash_report=on",
        "rss=on",
        "hash_types=ipv4",
        "hash_backend=software",
    ] {
        let error = with(&format!("vhost_user=on,socket=/s,{text}"));
        assert!(matches!(error, ConfigError::VhostHash { .. }), "{text}");
    }
    for text in [
        "tap=t,hash_types=ipv4",
        "tap=t,hash_report=off,hash_types=[ipv4]",
    ] {
        assert!(matches!(with(text), ConfigError::HashTypesUnused { .. }));
    }
    for text in [
        "rss=on",
        "num_queues=4,hash_report=on",
        "num_queues=2,rss=on",
    ] {
        let error = with(&format!("tap=t,hash_backend=kernel,{text}"));
        assert!(matches!(error, ConfigError::KernelHash { .. }), "{text}");
    }
    // Where hashes cannot be reported, auto is off.
    let text = "vhost_user=on,socket=/s,hash_report=auto";
    assert!(!text.parse::<NetConfig>().unwrap().reports_hashes());
    let error = with("vhost_user=on,socket=/s").to_string();
    assert!(
        error.contains("--net _net0") && error.contains("shared=on"),
        "{error}"
    );
    assert!(matches!(
        with("fd=2"),
        ConfigError::NetFdNumber { fd: 2, .. }
    ));
    assert!(matches!(
        with("fd=3,num_queues=4"),
        ConfigError::NetFds {
            fds: 1,
            pairs: 2,
            ..
        }
    ));
    assert!(matches!(
        with("tap=t,num_queues=3"),
        ConfigError::NetQueues { .. }
    ));
    assert!(matches!(
        with("tap=t,num_queues=0"),
        ConfigError::NetQueues { .. }
    ));
    // The card's limit is the configuration's, so that nothing is left to fail at boot.
    assert_eq!(MAX_NET_QUEUES, 254);
    let many: NetConfig = "tap=t,num_queues=254".parse().unwrap();
    let mut config = bootable();
    config.net = vec![many];
    config.validate().unwrap();
    let error = with("tap=t,num_queues=256");
    assert!(
        matches!(error, ConfigError::NetQueues { limit: 254, .. }),
        "{error}"
    );
    assert!(matches!(
        with("tap=t,queue_size=100"),
        ConfigError::NetQueueSize { .. }
    ));
    assert!(matches!(
        with("tap=t,queue_size=2048"),
        ConfigError::NetQueueSize { .. }
    ));
    assert!(matches!(
        with("tap=t,mac=01:00:5e:00:00:01"),
        ConfigError::MacGroup { .. }
    ));
    assert!(matches!(with("tap=t,mtu=67"), ConfigError::Mtu { .. }));
    assert!(matches!(
        with("tap=a-name-too-long-for-linux"),
        ConfigError::TapName { .. }
    ));
    assert!(matches!(with("tap=t,id=a/b"), ConfigError::DeviceId { .. }));
    let twice = refusal(|c| {
        c.net = vec!["tap=t,id=x".parse().unwrap(), "tap=u,id=x".parse().unwrap()];
    });
    assert_eq!(twice, ConfigError::RepeatedId { id: "x".to_owned() });
}

#[test]
fn sizes_print_as_they_parse() {
    assert_eq!(parse_size("1T"), Some(1 << 40));
    assert_eq!(parse_size("512k"), Some(512 << 10));
    for bad in ["", "G", "-1", "+1", "1.5G", "1 G", "1GB", "𝟙"] {
        assert_eq!(parse_size(bad), None, "{bad}");
    }
}
