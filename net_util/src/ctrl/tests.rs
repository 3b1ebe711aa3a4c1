use proptest::prelude::*;

use super::*;
use crate::hash::KEY_BYTES;

const LIMITS: MqLimits = MqLimits {
    max_pairs: 8,
    hash_types: HashTypes::ALL,
    multi_queue: true,
    rss: true,
    hash_report: true,
};

fn parse(command: u8, body: &[u8]) -> Result<MqCommand, CtrlError> {
    MqCommand::parse(command, body, &LIMITS)
}

fn hash_body(types: u32, reserved: [u8; 8], key: &[u8]) -> Vec<u8> {
    let len = u8::try_from(key.len()).unwrap();
    [&types.to_le_bytes()[..], &reserved, &[len], key].concat()
}

/// The body of RSS_CONFIG as its fields.
#[derive(Clone)]
struct RssBody {
    types: u32,
    mask: u16,
    unclassified: u16,
    table: Vec<u16>,
    max_tx_vq: u16,
    key: Vec<u8>,
}

impl RssBody {
    fn sound() -> Self {
        Self {
            types: 0x3f,
            mask: 3,
            unclassified: 5,
            table: vec![0, 1, 2, 7],
            max_tx_vq: 8,
            key: vec![0xaa; KEY_BYTES],
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.types.to_le_bytes().to_vec();
        for number in [self.mask, self.unclassified].iter().chain(&self.table) {
            bytes.extend(number.to_le_bytes());
        }
        bytes.extend(self.max_tx_vq.to_le_bytes());
        bytes.push(u8::try_from(self.key.len()).unwrap());
        bytes.extend(&self.key);
        bytes
    }

    fn parse(&self) -> Result<RssConfig, CtrlError> {
        match parse(MQ_RSS_CONFIG, &self.bytes())? {
            MqCommand::Rss(config) => Ok(config),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn hash_config_with_key() {
    let key: [u8; KEY_BYTES] = std::array::from_fn(|i| i.to_le_bytes()[0]);
    let body = hash_body(0x3f, [0; 8], &key);
    let expected = HashConfig {
        types: HashTypes::from_bits(0x3f),
        key: HashKey::from(key),
    };
    assert_eq!(parse(MQ_HASH_CONFIG, &body), Ok(MqCommand::Hash(expected)));
}

#[test]
fn hash_config_of_linux_has_max_tx_vq_in_reserved() {
    let body = hash_body(0x3f, [0, 0, 0, 0, 0, 0, 4, 0], &[1; KEY_BYTES]);
    assert!(parse(MQ_HASH_CONFIG, &body).is_ok());
}

#[test]
fn hash_config_off_needs_no_key() {
    let expected = HashConfig::default();
    assert_eq!(
        parse(MQ_HASH_CONFIG, &hash_body(0, [0; 8], &[])),
        Ok(MqCommand::Hash(expected))
    );
    let refused = Err(CtrlError::NoKey {
        asked: HashTypes::IPV4,
    });
    assert_eq!(parse(MQ_HASH_CONFIG, &hash_body(1, [0; 8], &[])), refused);
}

#[test]
fn short_keys_are_padded() {
    let Ok(MqCommand::Hash(config)) = parse(MQ_HASH_CONFIG, &hash_body(1, [0; 8], &[9; 16])) else {
        panic!("refused");
    };
    assert_eq!(config.key.as_bytes()[..16], [9; 16]);
    assert_eq!(config.key.as_bytes()[16..], [0; 24]);
}

#[test]
fn long_keys_are_refused() {
    let refused = Err(CtrlError::KeyLength { len: 41 });
    assert_eq!(
        parse(MQ_HASH_CONFIG, &hash_body(1, [0; 8], &[9; 41])),
        refused
    );
}

#[test]
fn hash_types_not_offered_are_refused() {
    let body = hash_body(0x40, [0; 8], &[1; KEY_BYTES]);
    let limits = MqLimits {
        hash_types: HashTypes::from_bits(0x3f),
        ..LIMITS
    };
    let refused = CtrlError::HashTypes {
        asked: HashTypes::IP_EX,
        supported: limits.hash_types,
    };
    assert_eq!(
        MqCommand::parse(MQ_HASH_CONFIG, &body, &limits),
        Err(refused)
    );
    assert!(parse(MQ_HASH_CONFIG, &body).is_ok());
    assert!(parse(MQ_HASH_CONFIG, &hash_body(0x200, [0; 8], &[1; KEY_BYTES])).is_err());
}

#[test]
fn every_cut_body_is_short() {
    let hash = hash_body(0x3f, [0; 8], &[1; KEY_BYTES]);
    let rss = RssBody::sound().bytes();
    for (command, body) in [
        (MQ_HASH_CONFIG, hash),
        (MQ_RSS_CONFIG, rss),
        (MQ_VQ_PAIRS_SET, vec![1, 0]),
    ] {
        assert!(parse(command, &body).is_ok());
        for len in 0..body.len() {
            let error = parse(command, &body[..len]).unwrap_err();
            assert!(
                matches!(error, CtrlError::Short { len: is, .. } if is == len),
                "{error}"
            );
        }
        let longer = [&body[..], &[0xff; 7]].concat();
        assert_eq!(parse(command, &longer), parse(command, &body));
    }
}

#[test]
fn rss_config_is_understood() {
    let config = RssBody::sound().parse().unwrap();
    assert_eq!(config.hash().types, HashTypes::from_bits(0x3f));
    assert_eq!(config.hash().key, HashKey::from([0xaa; KEY_BYTES]));
    assert_eq!((config.transmit_queues(), config.receive_queues()), (8, 8));
    let queue = |value, report| config.queue_for(PacketHash { value, report });
    assert_eq!(queue(0xffff_fff8, HashReport::IpV4), 0);
    assert_eq!(queue(0xffff_fffd, HashReport::TcpV6), 1);
    assert_eq!(queue(0x1234_5672, HashReport::UdpV4), 2);
    assert_eq!(queue(0xffff_ffff, HashReport::IpV6Ex), 7);
    assert_eq!(queue(0, HashReport::None), 5);
}

#[test]
fn rss_tables_have_a_length_that_fits_a_mask() {
    let with_entries = |entries: usize| {
        let mask = u16::try_from(entries - 1).unwrap();
        RssBody {
            mask,
            table: vec![0; entries],
            ..RssBody::sound()
        }
        .parse()
    };
    for entries in [1, 2, 64, 128] {
        assert!(with_entries(entries).is_ok(), "{entries}");
    }
    for entries in [3, 127, 129, 256, 65536] {
        let refused = CtrlError::Rss(RssError::TableLength { entries });
        assert_eq!(with_entries(entries), Err(refused));
    }
}

#[test]
fn rss_queues_have_to_exist() {
    let sound = RssBody::sound();
    let body = RssBody {
        table: vec![0, 1, 8, 7],
        ..sound.clone()
    };
    let refused = RssError::Entry {
        index: 2,
        queue: 8,
        queues: 8,
    };
    assert_eq!(body.parse(), Err(CtrlError::Rss(refused)));
    let body = RssBody {
        unclassified: 8,
        ..sound.clone()
    };
    let refused = RssError::Unclassified {
        queue: 8,
        queues: 8,
    };
    assert_eq!(body.parse(), Err(CtrlError::Rss(refused)));
    for pairs in [0, 9] {
        let body = RssBody {
            max_tx_vq: pairs,
            ..sound.clone()
        };
        assert_eq!(body.parse(), Err(CtrlError::Pairs { pairs, max: 8 }));
    }
    let body = RssBody {
        key: vec![],
        ..sound
    };
    assert_eq!(
        body.parse(),
        Err(CtrlError::NoKey {
            asked: HashTypes::from_bits(0x3f)
        })
    );
}

#[test]
fn longest_body_is_as_long_as_said() {
    let body = RssBody {
        mask: 127,
        table: vec![0; 128],
        ..RssBody::sound()
    };
    assert_eq!(body.bytes().len(), MAX_MQ_BODY_BYTES);
    assert!(body.parse().is_ok());
}

#[test]
fn pairs_are_bounded() {
    assert_eq!(parse(MQ_VQ_PAIRS_SET, &[1, 0]), Ok(MqCommand::Pairs(1)));
    assert_eq!(parse(MQ_VQ_PAIRS_SET, &[8, 0]), Ok(MqCommand::Pairs(8)));
    assert_eq!(
        parse(MQ_VQ_PAIRS_SET, &[0, 0]),
        Err(CtrlError::Pairs { pairs: 0, max: 8 })
    );
    assert_eq!(
        parse(MQ_VQ_PAIRS_SET, &[0, 8]),
        Err(CtrlError::Pairs {
            pairs: 2048,
            max: 8
        })
    );
}

#[test]
fn commands_need_their_feature() {
    let bodies = [
        (
            MQ_VQ_PAIRS_SET,
            vec![1, 0],
            MqLimits {
                multi_queue: false,
                ..LIMITS
            },
        ),
        (
            MQ_RSS_CONFIG,
            RssBody::sound().bytes(),
            MqLimits {
                rss: false,
                ..LIMITS
            },
        ),
        (
            MQ_HASH_CONFIG,
            hash_body(1, [0; 8], &[1; 40]),
            MqLimits {
                hash_report: false,
                ..LIMITS
            },
        ),
    ];
    for (command, body, limits) in bodies {
        assert!(parse(command, &body).is_ok());
        let refused = CtrlError::Unavailable {
            class: CLASS_MQ,
            command,
        };
        assert_eq!(MqCommand::parse(command, &body, &limits), Err(refused));
    }
    assert_eq!(
        parse(3, &[0; 400]),
        Err(CtrlError::Unavailable {
            class: CLASS_MQ,
            command: 3
        })
    );
}

#[test]
fn guest_offloads_are_bounded_by_what_was_negotiated() {
    let negotiated = 1 << 7 | 1 << 1;
    assert_eq!(
        parse_guest_offloads(&0x82_u64.to_le_bytes(), negotiated),
        Ok(0x82)
    );
    assert_eq!(parse_guest_offloads(&[0; 8], negotiated), Ok(0));
    let refused = CtrlError::Offloads {
        asked: 0x102,
        negotiated,
    };
    assert_eq!(
        parse_guest_offloads(&0x102_u64.to_le_bytes(), negotiated),
        Err(refused)
    );
    assert!(matches!(
        parse_guest_offloads(&[0; 7], negotiated),
        Err(CtrlError::Short { .. })
    ));
}

#[test]
fn constants_are_those_of_the_uapi() {
    use virtio_bindings::virtio_net as uapi;
    for (ours, theirs) in [
        (CLASS_RX, uapi::VIRTIO_NET_CTRL_RX),
        (CLASS_MAC, uapi::VIRTIO_NET_CTRL_MAC),
        (CLASS_VLAN, uapi::VIRTIO_NET_CTRL_VLAN),
        (CLASS_ANNOUNCE, uapi::VIRTIO_NET_CTRL_ANNOUNCE),
        (CLASS_MQ, uapi::VIRTIO_NET_CTRL_MQ),
        (CLASS_GUEST_OFFLOADS, uapi::VIRTIO_NET_CTRL_GUEST_OFFLOADS),
        (MQ_VQ_PAIRS_SET, uapi::VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET),
        (MQ_RSS_CONFIG, uapi::VIRTIO_NET_CTRL_MQ_RSS_CONFIG),
        (MQ_HASH_CONFIG, uapi::VIRTIO_NET_CTRL_MQ_HASH_CONFIG),
        (GUEST_OFFLOADS_SET, uapi::VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET),
        (ACK_OK, uapi::VIRTIO_NET_OK),
        (ACK_ERR, uapi::VIRTIO_NET_ERR),
    ] {
        assert_eq!(u32::from(ours), theirs);
    }
}

/// A deserialiser of saved state sees what `Serialize` gave; JSON stands for any format.
#[test]
fn saved_configurations_come_back_checked() {
    let config = RssBody::sound().parse().unwrap();
    let saved = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<RssConfig>(&saved).unwrap(), config);
    let hostile = saved.replace("[0,1,2,7]", "[0,1,2]");
    assert_ne!(hostile, saved);
    let error = serde_json::from_str::<RssConfig>(&hostile).unwrap_err();
    assert!(error.to_string().contains("3 entries"), "{error}");
    assert!(config.check_queues(8).is_ok());
    assert!(config.check_queues(7).is_err());
}

proptest! {
    /// Whatever is accepted steers every packet to a queue that exists.
    #[test]
    fn accepted_bodies_are_sound(
        command in 0_u8..4,
        mut body in prop::collection::vec(any::<u8>(), 0..400),
        tame: bool,
        values: Vec<u32>,
    ) {
        if tame {
            // Bring the numbers into reach: few types, a small mask, low queues.
            for (i, byte) in body.iter_mut().enumerate() {
                *byte &= match i { 4 => 3, _ if i % 2 == 0 => 7, _ => 0 };
            }
        }
        match parse(command, &body) {
            Ok(MqCommand::Pairs(pairs)) => prop_assert!((1..=8).contains(&pairs)),
            Ok(MqCommand::Hash(config)) => prop_assert!(config.types.is_subset_of(HashTypes::ALL)),
            Ok(MqCommand::Rss(config)) => {
                for value in values {
                    for report in [HashReport::None, HashReport::IpV4] {
                        let hash = PacketHash { value, report };
                        prop_assert!(config.queue_for(hash) < LIMITS.max_pairs);
                    }
                }
            }
            Err(error) => prop_assert!(!error.to_string().is_empty()),
        }
    }
}
