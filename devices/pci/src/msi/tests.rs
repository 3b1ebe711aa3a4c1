//! Tests of MSI over lines that record what they are told.

use parking_lot::Mutex;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::config::Capability;

struct Line {
    eventfd: EventFd,
    route: Mutex<Option<MsiMessage>>,
}

impl MsiLine for Line {
    fn trigger(&self) -> Result<(), InterruptError> {
        self.eventfd.write(1).unwrap();
        Ok(())
    }
    fn eventfd(&self) -> &EventFd {
        &self.eventfd
    }
    fn route(&self, message: Option<MsiMessage>) -> Result<(), InterruptError> {
        *self.route.lock() = message;
        Ok(())
    }
    fn is_pending(&self) -> bool {
        match self.eventfd.read() {
            Ok(count) => self.eventfd.write(count).is_ok(),
            Err(_) => false,
        }
    }
}

/// A function with a capability at 0x50 whose control register is `control`.
fn sample(control: u16) -> (ConfigSpace, Msi, Vec<Arc<Line>>) {
    let mut image = [0; 256];
    image[6] = 0x10;
    image[0x34] = 0x50;
    image[0x50] = Capability::MSI.0;
    image[0x52..0x54].copy_from_slice(&control.to_le_bytes());
    let mut config = ConfigSpace::from_image(&image).unwrap();
    let registers = MsiRegisters::new(&config, 0x50);
    let lines: Vec<_> = (0..registers.vectors())
        .map(|_| {
            Arc::new(Line {
                eventfd: EventFd::new(EFD_NONBLOCK).unwrap(),
                route: Mutex::new(None),
            })
        })
        .collect();
    let shared = lines
        .iter()
        .map(|line| Arc::clone(line) as Arc<dyn MsiLine>);
    let msi = Msi::new(registers, shared.collect(), &mut config).unwrap();
    (config, msi, lines)
}

fn routes(lines: &[Arc<Line>]) -> Vec<Option<(u64, u32)>> {
    let route = |line: &Arc<Line>| line.route.lock().map(|m| (m.address, m.data));
    lines.iter().map(route).collect()
}

#[test]
fn lengths_and_counts_follow_from_the_control_register() {
    for (control, vectors, len) in [
        (0, 1, 10),
        (WIDE, 1, 14),
        (MASKABLE | 2 << 1, 4, 20),
        (WIDE | MASKABLE | 5 << 1, 32, 24),
        // More than there can be.
        (7 << 1, 32, 10),
    ] {
        let (config, ..) = sample(control);
        let registers = MsiRegisters::new(&config, 0x50);
        assert_eq!((registers.vectors(), registers.len()), (vectors, len));
    }
}

#[test]
fn vectors_are_routed_as_the_guest_writes() {
    let (mut config, msi, lines) = sample(WIDE | MASKABLE | 2 << 1);
    config.write(0x54, &0xfee0_1003_u32.to_le_bytes());
    config.write(0x58, &1_u32.to_le_bytes());
    config.write(0x5c, &0x4043_u16.to_le_bytes());
    msi.follow(&config);
    assert_eq!(
        (msi.enabled(&config), routes(&lines)),
        (None, vec![None; 4])
    );
    // On, with two of its four vectors.
    config.write(0x52, &(1_u16 | 1 << 4).to_le_bytes());
    msi.follow(&config);
    let at = 0x1_fee0_1000;
    assert_eq!(msi.enabled(&config), Some(2));
    assert_eq!(
        routes(&lines),
        [Some((at, 0x4042)), Some((at, 0x4043)), None, None]
    );
    // Masked: a trigger waits, and the register says so.
    config.write(0x60, &2_u32.to_le_bytes());
    msi.follow(&config);
    assert_eq!(routes(&lines)[1], None);
    lines[1].trigger().unwrap();
    msi.show_pending(&mut config).unwrap();
    assert_eq!((config.u32(0x64), msi.pending()), (2, vec![1]));
    // What the function asks for is not the guest's to write, and it gets no more.
    config.write(0x52, &0xffff_u16.to_le_bytes());
    assert_eq!(msi.enabled(&config), Some(4));
    assert_eq!(MsiRegisters::new(&config, 0x50).vectors(), 4);
    config.reset();
    msi.follow(&config);
    assert_eq!(routes(&lines), [None; 4]);
    msi.restore_pending(&[3, 99]).unwrap();
    assert_eq!(msi.pending(), [1, 3]);
}

#[test]
fn without_masks_and_high_address_nothing_else_is_touched() {
    let (mut config, msi, lines) = sample(0);
    config.write(0x54, &0xfee0_0000_u32.to_le_bytes());
    config.write(0x58, &[0x31, 0, 0xff, 0xff]);
    config.write(0x52, &[1]);
    msi.follow(&config);
    assert_eq!(routes(&lines), [Some((0xfee0_0000, 0x31))]);
    assert_eq!(config.u16(0x5a), 0, "behind the capability");
    lines[0].trigger().unwrap();
    let before = config.save();
    msi.show_pending(&mut config).unwrap();
    assert_eq!(config.save(), before);
}
