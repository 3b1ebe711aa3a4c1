//! What a destination calls differently than the source.

use std::path::PathBuf;

use crate::api::ReceiveMigrationConfig;
use crate::config::{PlatformConfig, VmConfig};

#[test]
fn a_destination_replaces_only_what_it_names() {
    let text = r#"{"payload": {"kernel": "k"}, "memory": {"size": 4096, "shared": true},
        "net": [{"fds": [9]}, {"tap": "t"}, {"vhost_user": true, "vhost_socket": "/c"}],
        "devices": [{"path": "/sys/a"}],
        "user_devices": [{"socket": "/a"}]}"#;
    let config: VmConfig = serde_json::from_str(text).unwrap();
    let source = config.validate().unwrap();
    let mut here = source.clone();
    let text = r#"{"receiver_url": "unix:/x", "user_devices": [{"id": "_user0", "socket": "/b"}],
        "devices": [{"id": "_vfio0", "path": "/sys/b"}],
        "net": [{"id": "_net0", "tap": "u"}, {"id": "_net2", "vhost_socket": "/d"}], "serial": {"mode": "Pty"}}"#;
    let receive: ReceiveMigrationConfig = serde_json::from_str(text).unwrap();
    receive.apply_to(&mut here).unwrap();
    assert_eq!(
        (here.net[0].tap.as_deref(), here.net[0].fds.len()),
        (Some("u"), 0)
    );
    assert_eq!(here.net[0].mac, source.net[0].mac);
    assert_eq!(here.net[1], source.net[1]);
    assert_eq!(here.net[2].vhost_socket, Some(PathBuf::from("/d")));
    assert_eq!(here.user_devices[0].socket, PathBuf::from("/b"));
    assert_eq!(here.devices[0].path, PathBuf::from("/sys/b"));
    assert_eq!(here.platform, source.platform);
    assert_eq!(here.console, source.console);
    let mut receive = receive;
    for (id, told) in [
        ("_net1", "at the source it has a tap; give its `tap`"),
        ("other", "no device `other`"),
    ] {
        receive.net[1].id = id.to_owned();
        let error = receive.apply_to(&mut here).unwrap_err();
        assert!(error.to_string().contains(told), "{error}");
    }
    receive.net[1].id = "_net1".to_owned();
    receive.net[1].tap = Some("t".to_owned());
    let error = receive.clone().validate().unwrap_err();
    assert!(error.to_string().contains("exactly one"), "{error}");
    receive.net.truncate(1);
    receive.net[0].id = "_net2".to_owned();
    let error = receive.apply_to(&mut source.clone()).unwrap_err();
    assert!(error.to_string().contains("give its `vhost_socket`"));
}

#[test]
fn a_card_on_descriptors_gets_those_of_the_destination() {
    let text = r#"{"payload": {"kernel": "k"}, "net": [{"fds": [9, 10], "num_queues": 4}]}"#;
    let source: VmConfig = serde_json::from_str(text).unwrap();
    let source = source.validate().unwrap();
    let receive = |net: &str| -> ReceiveMigrationConfig {
        let text = format!(r#"{{"receiver_url": "unix:/x", "net": [{net}]}}"#);
        serde_json::from_str(&text).unwrap()
    };
    // Not named, their numbers would be taken for others here.
    let error = receive("").apply_to(&mut source.clone()).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("net _net0 has a descriptor at the source"),
        "{error}"
    );
    let here = |net| {
        let mut here = source.clone();
        receive(net).validate()?.apply_to(&mut here)?;
        here.validate()
    };
    let moved = here(r#"{"id": "_net0", "fds": [7, 8]}"#).unwrap();
    assert_eq!(
        (moved.net[0].fds.as_slice(), &moved.net[0].tap),
        ([7, 8].as_slice(), &None)
    );
    assert_eq!(moved.net[0].mac, source.net[0].mac);
    let to_tap = here(r#"{"id": "_net0", "tap": "t"}"#).unwrap();
    assert!(to_tap.net[0].fds.is_empty());
    for (net, told) in [
        (r#"{"id": "_net0", "fds": [7]}"#, "one per pair"),
        (r#"{"id": "_net0", "fds": [1, 7]}"#, "fd=1"),
        (
            r#"{"id": "_net0", "fds": [7, 8], "tap": "t"}"#,
            "exactly one",
        ),
        (r#"{"id": "_net0"}"#, "exactly one"),
        (r#"{"id": "_net0", "vhost_socket": "/s"}"#, "give its `tap`"),
    ] {
        let error = here(net).unwrap_err().to_string();
        assert!(error.contains(told), "{net}: {error}");
    }
}

#[test]
fn descriptors_of_the_source_mean_nothing_at_the_destination() {
    let text = r#"{"payload": {"kernel": "k"}, "devices": [{"fd": 5}, {"path": "/sys/a"}],
        "platform": {"iommufd": "on", "iommufd_fd": 6}}"#;
    let source: VmConfig = serde_json::from_str(text).unwrap();
    let source = source.validate().unwrap();
    let receive = |rest: &str| -> ReceiveMigrationConfig {
        serde_json::from_str(&format!("{{\"receiver_url\": \"unix:/x\"{rest}}}")).unwrap()
    };
    for (rest, told) in [
        ("", "device _vfio0 has a descriptor at the source"),
        (
            r#", "devices": [{"id": "_vfio0", "path": "/sys/b"}]"#,
            "the iommufd has a descriptor",
        ),
    ] {
        let error = receive(rest).apply_to(&mut source.clone()).unwrap_err();
        assert!(error.to_string().contains(told), "{error}");
    }
    let all = receive(
        r#", "devices": [{"id": "_vfio0", "path": "/sys/b"}, {"id": "_vfio1", "fd": 7}],
        "platform": {"iommufd": "auto"}"#,
    );
    let mut here = source.clone();
    all.validate().unwrap().apply_to(&mut here).unwrap();
    let here = here.validate().unwrap();
    assert_eq!(here.devices[0].path, PathBuf::from("/sys/b"));
    assert_eq!((here.devices[0].fd, here.devices[1].fd), (None, Some(7)));
    assert_eq!(here.devices[1].path, PathBuf::new());
    assert_eq!(here.platform, PlatformConfig::default());
    for place in ["", r#", "path": "/sys/b", "fd": 7"#, r#", "fd": 1"#] {
        let rest = format!(r#", "devices": [{{"id": "_vfio0"{place}}}]"#);
        assert!(receive(&rest).validate().is_err(), "{place}");
    }
}
