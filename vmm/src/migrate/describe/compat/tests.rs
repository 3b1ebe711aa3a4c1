//! What a card must have at the destination.

use net_util::hash::HashTypes;
use passthrough::DeviceIdentity;
use vm_migration::migrate::Migratable;

use super::*;

fn profile() -> DeviceProfile {
    DeviceProfile {
        identity: DeviceIdentity {
            vendor: 0x1af4,
            device: 0x1041,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1041,
            revision: 1,
        },
        bars: vec![BarInfo {
            index: 0,
            kind: BarKind::Memory64 {
                prefetchable: false,
            },
            size: 0x8000,
            address: 0,
        }],
        vectors: 4,
        config_digest: 0x1234,
        migration: Some(MigrationFlags::all()),
        virtio: Some(VirtioOffer {
            features: 1 << 57 | 1 << 32,
            queue_sizes: vec![256, 256, 64],
            mtu: None,
        }),
    }
}

fn device(profile: &DeviceProfile) -> DeviceManifest {
    DeviceManifest {
        id: "nic0".into(),
        kind: super::super::PASSTHROUGH.into(),
        compat: of_passthrough(profile),
        migratable: Migratable::Yes,
        max_state_bytes: 1000,
    }
}

/// The reasons to refuse, with `change` made to the card here.
fn reasons(change: impl Fn(&mut DeviceProfile)) -> Vec<String> {
    let mut here = profile();
    change(&mut here);
    let refusals = misfits(&device(&here), &device(&profile()));
    for refusal in &refusals {
        let text = refusal.to_string();
        assert!(
            text.contains("same options") && text.contains("ferryctl remove-device nic0"),
            "{text}"
        );
    }
    refusals
        .into_iter()
        .map(|refusal| refusal.to_string())
        .collect()
}

#[test]
fn equal_cards_fit() {
    assert_eq!(reasons(|_| {}), Vec::<String>::new());
}

#[test]
fn each_thing_that_differs_is_named() {
    type Change = fn(&mut DeviceProfile);
    let all: [(Change, &[&str]); 12] = [
        (
            |p| p.identity.vendor = 0x8086,
            &["vendor", "0x1af4", "0x8086"],
        ),
        (|p| p.identity.device = 0x1042, &["device", "0x1042"]),
        (
            |p| p.identity.subsystem_vendor = 1,
            &["subsystem_vendor", "0x0001"],
        ),
        (|p| p.identity.subsystem = 2, &["subsystem", "0x0002"]),
        (|p| p.identity.revision = 3, &["revision", "0x03"]),
        (|p| p.bars[0].size = 0x4000, &["bars", "0x8000", "0x4000"]),
        (|p| p.vectors = 3, &["vectors", "4", "3"]),
        (|p| p.config_digest = 1, &["config_space", "0x00000001"]),
        (
            |p| p.migration = Some(MigrationFlags::STOP_COPY | MigrationFlags::PRE_COPY),
            &["migration", "P2P is missing"],
        ),
        (
            |p| p.migration = None,
            &["STOP_COPY, P2P, PRE_COPY is missing"],
        ),
        (
            |p| p.virtio.as_mut().unwrap().features = 1 << 32,
            &["virtio_features", "feature bits 57 are missing"],
        ),
        (
            |p| p.virtio.as_mut().unwrap().queue_sizes = vec![128, 128, 64],
            &["queue_sizes", "2 x 256, 64", "2 x 128, 64"],
        ),
    ];
    for (change, words) in all {
        let found = reasons(change);
        assert_eq!(found.len(), 1, "{found:?}");
        for word in words {
            assert!(found[0].contains(word), "no {word:?} in {found:?}");
        }
    }
    let mtu = reasons(|p| p.virtio.as_mut().unwrap().mtu = Some(9000));
    assert!(
        mtu[0].contains("mtu is none at the source and 9000"),
        "{mtu:?}"
    );
    assert_eq!(reasons(|p| p.virtio = None).len(), 3);
}

#[test]
fn a_digest_that_differs_is_told_only_if_nothing_else_explains_it() {
    let found = reasons(|p| {
        p.identity.subsystem = 2;
        p.config_digest = 1;
    });
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].contains("subsystem"), "{found:?}");
}

#[test]
fn a_digest_is_told_of_only_if_nothing_better_is_known() {
    let found = reasons(|p| {
        p.config_digest = 1;
        p.bars.clear();
    });
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].contains("bars"), "{found:?}");
}

#[test]
fn a_card_that_can_more_fits() {
    assert_eq!(
        reasons(|p| p.virtio.as_mut().unwrap().features |= 1 << 22),
        Vec::<String>::new()
    );
    let mut poor = profile();
    poor.migration = Some(MigrationFlags::STOP_COPY);
    let refusals = misfits(&device(&profile()), &device(&poor));
    assert!(refusals.is_empty(), "{refusals:?}");
}

#[test]
fn a_state_that_has_no_room_is_refused() {
    let mut there = device(&profile());
    there.max_state_bytes += 1;
    let refusals = misfits(&device(&profile()), &there);
    assert_eq!(refusals.len(), 1);
    assert!(refusals[0].to_string().contains("1001"), "{refusals:?}");
}

#[test]
fn a_card_on_a_tap_needs_one_with_the_same_queues_and_hashes() {
    let card = |pairs, hash_types| DeviceManifest {
        id: "_net0".into(),
        kind: NET_ON_TAP.into(),
        compat: of_net(&NetOffer { pairs, hash_types }),
        migratable: Migratable::Yes,
        max_state_bytes: 1000,
    };
    let all = Some(HashTypes::ALL);
    let source = card(2, all);
    assert_eq!(misfits(&card(2, all), &source), []);
    // A source of the release before says nothing about it.
    let before = DeviceManifest {
        compat: Compat::new(),
        ..card(2, all)
    };
    assert_eq!(misfits(&card(2, all), &before), []);
    for (here, reason) in [
        (card(1, all), "queue_pairs is 2 at the source and 1 here"),
        (
            card(2, Some(HashTypes::IPV4)),
            "hash_types is 0x1ff at the source and 0x1 here",
        ),
        (
            card(2, None),
            "hash_types is 0x1ff at the source and nothing here",
        ),
    ] {
        let refusals = misfits(&here, &source);
        let [refusal] = refusals.as_slice() else {
            panic!("{refusals:?}");
        };
        let text = refusal.to_string();
        assert!(text.contains(reason), "{text}");
        assert!(
            text.contains("same release") || text.contains("release of Ferry"),
            "{text}"
        );
    }
}
