//! Tests of configuration space.

use proptest::prelude::*;

use super::*;

fn identity() -> Identity {
    Identity {
        vendor: 0x1af4,
        device: 0x1041,
        revision: 1,
        class: [2, 0, 0],
        subsystem_vendor: 0x1af4,
        subsystem: 1,
    }
}

fn sample() -> ConfigSpace {
    let mut config = ConfigSpace::new(&identity());
    let wide = BarKind::Memory64 { prefetchable: true };
    config.add_bar(0, wide, 0x8_0000).unwrap();
    config.add_bar(2, BarKind::Memory32, 0x1000).unwrap();
    config.add_bar(3, BarKind::Io, 0x40).unwrap();
    config
        .add_vendor_capability(&[1, 2, 3, 4], &[0; 4])
        .unwrap();
    config.add_msix_capability(5, (2, 0), (2, 0x800)).unwrap();
    config
}

#[test]
fn header_has_identity() {
    let config = sample();
    let mut word = [0; 4];
    config.read(0, &mut word);
    assert_eq!(word, [0xf4, 0x1a, 0x41, 0x10]);
    config.read(8, &mut word);
    assert_eq!(word, [1, 0, 0, 2]);
    assert_eq!(config.u16(offset::STATUS), 0x10);
}

#[test]
fn sizing_protocol() {
    let mut config = sample();
    config.write(0x10, &[0xff; 8]);
    assert_eq!(config.u32(0x10), 0xfff8_000c);
    assert_eq!(config.u32(0x14), 0xffff_ffff);
    config.write(0x18, &[0xff; 4]);
    assert_eq!(config.u32(0x18), 0xffff_f000);
    config.write(0x1c, &[0xff; 4]);
    assert_eq!(config.u32(0x1c), 0xffff_ffc1);
    config.write(0x20, &[0xff; 4]);
    assert_eq!(config.u32(0x20), 0, "an absent BAR reads zero");
    config.set_bar_address(0, 0x12_3456_789a_bcde);
    assert_eq!(config.bar(0).unwrap().address, 0x12_3456_7898_0000);
    config.set_bar_address(3, 0xc040);
    assert_eq!(config.bar(3).unwrap().address, 0xc040);
    assert_eq!(config.bars().len(), 3);
}

#[test]
fn bar_refusals() {
    let mut config = sample();
    let wide = BarKind::Memory64 {
        prefetchable: false,
    };
    let size = |index, size| Err(BarError::Size { index, size });
    assert_eq!(
        config.add_bar(4, BarKind::Memory32, 0x1001),
        size(4, 0x1001)
    );
    assert_eq!(config.add_bar(4, BarKind::Memory32, 8), size(4, 8));
    assert_eq!(config.add_bar(4, BarKind::Io, 512), size(4, 512));
    assert_eq!(
        config.add_bar(5, wide, 0x1000),
        Err(BarError::Index { index: 5 })
    );
    assert_eq!(
        config.add_bar(9, wide, 0x1000),
        Err(BarError::Index { index: 9 })
    );
    let in_use = Err(BarError::InUse { index: 1 });
    assert_eq!(config.add_bar(1, BarKind::Memory32, 0x1000), in_use);
    config.add_bar(4, wide, 0x1000).unwrap();
}

#[test]
fn capabilities_chain() {
    let mut config = sample();
    assert_eq!(
        config.capabilities(),
        [(0x40, Capability::VENDOR), (0x48, Capability::MSIX)]
    );
    assert_eq!(config.u8(0x42), 7, "vendor length covers the header");
    assert_eq!(config.msix_control(), Some(4));
    config.write(0x4a, &[0xff, 0xff]);
    assert_eq!(config.msix_control(), Some(0xc004));
    assert_eq!(config.u32(0x4c), 2);
    assert_eq!(config.u32(0x50), 0x802);
    assert!(config.hide_capability(0x40));
    assert_eq!(config.capabilities(), [(0x48, Capability::MSIX)]);
    assert!(!config.hide_capability(0x40));
    let too_long = config.add_capability(Capability::EXPRESS, &[0; 200], &[0; 200]);
    assert!(matches!(too_long, Err(ConfigError::CapabilityRoom { .. })));
    let unequal = config.add_capability(Capability::EXPRESS, &[0; 2], &[0; 1]);
    assert!(matches!(unequal, Err(ConfigError::CapabilityMask { .. })));
}

#[test]
fn image_of_a_real_device() {
    let source = sample();
    let mut image = [0; 256];
    source.read(0, &mut image);
    image[usize::from(offset::COMMAND)] = 7;
    let mut config = ConfigSpace::from_image(&image).unwrap();
    assert_eq!(config.command(), 0);
    assert!(config.bars().is_empty());
    assert_eq!(config.find_capability(Capability::MSIX), Some(0x48));
    config.write(0x4a, &0x8000_u16.to_le_bytes());
    assert_eq!(config.msix_control(), Some(0x8004));
    image[0x49] = 0x40;
    let looped = ConfigSpace::from_image(&image);
    assert!(matches!(looped, Err(ConfigError::CapabilityChain { .. })));
    image[0x49] = 0x02;
    let in_header = ConfigSpace::from_image(&image);
    assert!(matches!(
        in_header,
        Err(ConfigError::CapabilityChain { .. })
    ));
    let short = ConfigSpace::from_image(&image[..63]);
    assert!(matches!(
        short,
        Err(ConfigError::ImageLength { length: 63 })
    ));
    image[usize::from(offset::HEADER_TYPE)] = 1;
    let bridge = ConfigSpace::from_image(&image);
    assert!(matches!(
        bridge,
        Err(ConfigError::HeaderType { header_type: 1 })
    ));
}

#[test]
fn save_and_restore() {
    let mut source = sample();
    source.write(offset::COMMAND, &[6, 0]);
    source.set_bar_address(0, 0x1_0000_0000);
    let state = source.save();
    let mut target = sample();
    target.restore(&state).unwrap();
    assert_eq!(target.command(), command::MEMORY | command::BUS_MASTER);
    assert_eq!(target.bar(0).unwrap().address, 0x1_0000_0000);

    let mut other = ConfigSpace::new(&Identity {
        device: 0x1042,
        ..identity()
    });
    let refused = other.restore(&state);
    let expected = ConfigError::Mismatch {
        offset: 2,
        saved: 0x41,
        here: 0x42,
    };
    assert_eq!(refused, Err(expected));
    let long = ConfigState {
        version: 1,
        bytes: vec![0; 4097],
    };
    assert!(matches!(
        target.restore(&long),
        Err(ConfigError::Range { .. })
    ));
    let new = ConfigState {
        version: 2,
        bytes: vec![],
    };
    assert!(matches!(
        target.restore(&new),
        Err(ConfigError::Version { .. })
    ));
    target.reset();
    assert_eq!(target.command(), 0);
    assert_eq!(target.bar(0).unwrap().address, 0);
}

proptest! {
    #[test]
    fn guest_accesses_keep_read_only_bits(
        accesses in prop::collection::vec((0_u16.., prop::collection::vec(any::<u8>(), 0..9)), 0..64)
    ) {
        let fresh = sample();
        let mut config = sample();
        for (offset, data) in &accesses {
            config.write(*offset, data);
            let mut back = vec![0; data.len()];
            config.read(*offset, &mut back);
        }
        for at in 0..CONFIG_SPACE_SIZE {
            let fixed = !fresh.writable[at];
            prop_assert_eq!(config.bytes[at] & fixed, fresh.bytes[at] & fixed);
        }
        prop_assert_eq!(config.bars().len(), 3);
        let mut copy = sample();
        prop_assert_eq!(copy.restore(&config.save()), Ok(()));
        prop_assert_eq!(&copy.bytes, &config.bytes);
    }

    #[test]
    fn any_image_is_taken_or_refused(image in prop::collection::vec(any::<u8>(), 0..300)) {
        if let Ok(config) = ConfigSpace::from_image(&image) {
            prop_assert!(config.capabilities().len() <= MAX_CAPABILITIES);
        }
    }
}
