//! Tests of MSI-X over lines that record what they are told.

use devices::MsiLine;
use parking_lot::Mutex;
use proptest::prelude::*;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;

struct Line {
    eventfd: EventFd,
    route: Mutex<Option<MsiMessage>>,
    delivered: Mutex<u64>,
}

impl Line {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            eventfd: EventFd::new(EFD_NONBLOCK).unwrap(),
            route: Mutex::new(None),
            delivered: Mutex::new(0),
        })
    }

    /// What the kernel does: takes the count whenever there is a route.
    fn deliver(&self) {
        if self.route.lock().is_some() && self.eventfd.read().is_ok() {
            *self.delivered.lock() += 1;
        }
    }
}

impl MsiLine for Line {
    fn trigger(&self) -> Result<(), InterruptError> {
        self.eventfd.write(1).unwrap();
        self.deliver();
        Ok(())
    }
    fn eventfd(&self) -> &EventFd {
        &self.eventfd
    }
    fn route(&self, message: Option<MsiMessage>) -> Result<(), InterruptError> {
        *self.route.lock() = message;
        self.deliver();
        Ok(())
    }
    fn is_pending(&self) -> bool {
        match self.eventfd.read() {
            Ok(count) => self.eventfd.write(count).is_ok(),
            Err(_) => false,
        }
    }
}

fn sample(count: usize) -> (Vec<Arc<Line>>, Msix) {
    let lines: Vec<_> = (0..count).map(|_| Line::new()).collect();
    let shared = lines.iter().map(|l| Arc::clone(l) as Arc<dyn MsiLine>);
    let msix = Msix::new(shared.collect()).unwrap();
    (lines, msix)
}

fn unmask(msix: &mut Msix, vector: u64) {
    msix.write_table(vector * 16, &0xfee0_1000_u32.to_le_bytes());
    msix.write_table(vector * 16 + 8, &(0x30 + vector).to_le_bytes());
}

#[test]
fn routes_only_when_nothing_masks() {
    let (lines, mut msix) = sample(3);
    unmask(&mut msix, 1);
    assert_eq!(*lines[1].route.lock(), None, "MSI-X is off");
    msix.set_control(0x8000 | 0x4000);
    assert_eq!(*lines[1].route.lock(), None, "function mask");
    msix.set_control(0x8000);
    let message = MsiMessage {
        address: 0xfee0_1000,
        data: 0x31,
    };
    assert_eq!(*lines[1].route.lock(), Some(message));
    assert_eq!(*lines[0].route.lock(), None, "vector mask");
    msix.write_table(16 + 12, &1_u32.to_le_bytes());
    assert_eq!(*lines[1].route.lock(), None);
}

#[test]
fn masked_trigger_is_pending_then_delivered() {
    let (lines, mut msix) = sample(70);
    msix.set_control(0x8000);
    msix.trigger(65).unwrap();
    let mut pending = [0; 16];
    msix.read_pending(0, &mut pending);
    assert_eq!(u128::from_le_bytes(pending), 1 << 65);
    unmask(&mut msix, 65);
    msix.read_pending(0, &mut pending);
    assert_eq!(pending, [0; 16]);
    assert_eq!(*lines[65].delivered.lock(), 1);
    assert!(matches!(msix.trigger(70), Err(MsixError::Vector { .. })));
}

#[test]
fn pending_moves_with_the_state() {
    let (_, mut source) = sample(4);
    source.set_control(0x8000);
    unmask(&mut source, 2);
    source.trigger(3).unwrap();
    let state = source.save();
    assert_eq!(state.pending, [3]);
    let (lines, mut target) = sample(4);
    target.restore(&state).unwrap();
    assert!(lines[2].route.lock().is_some());
    assert!(lines[3].is_pending());
    unmask(&mut target, 3);
    assert_eq!(*lines[3].delivered.lock(), 1);
    assert_eq!(
        target.save(),
        MsixState {
            pending: vec![],
            ..target.save()
        }
    );

    let (_, mut small) = sample(3);
    assert!(matches!(
        small.restore(&state),
        Err(MsixError::Size { saved: 4, here: 3 })
    ));
    let hostile = MsixState {
        pending: vec![9],
        ..state.clone()
    };
    assert!(matches!(
        target.restore(&hostile),
        Err(MsixError::Vector { vector: 9, .. })
    ));
    let newer = MsixState {
        version: 9,
        ..state
    };
    assert!(matches!(
        target.restore(&newer),
        Err(MsixError::Version { found: 9, .. })
    ));
}

#[test]
fn limits_and_reset() {
    assert!(matches!(
        Msix::new(vec![]),
        Err(MsixError::Count { count: 0 })
    ));
    assert_eq!(Msix::table_bytes(2048), 32768);
    assert_eq!(Msix::pending_bytes(65), 16);
    let (lines, mut msix) = sample(1);
    msix.set_control(0x8000);
    unmask(&mut msix, 0);
    msix.reset();
    assert!(!msix.is_enabled() && lines[0].route.lock().is_none());
    let mut entry = [0; 16];
    msix.read_table(0, &mut entry);
    assert_eq!(entry[12], 1);
}

proptest! {
    #[test]
    fn table_reads_back_what_was_written(
        accesses in prop::collection::vec((0_u64..200, any::<u64>(), any::<bool>()), 0..64)
    ) {
        let (lines, mut msix) = sample(5);
        let mut model = [0_u8; 80];
        for vector in 0..5 {
            model[vector * 16 + 12] = 1;
        }
        msix.set_control(0x8000);
        for (offset, value, wide) in accesses {
            let bytes = value.to_le_bytes();
            let data = if wide { &bytes[..] } else { &bytes[..4] };
            msix.write_table(offset, data);
            let (at, len) = (usize::try_from(offset).unwrap(), data.len());
            if at % len == 0 && at + len <= 80 {
                model[at..at + len].copy_from_slice(data);
            }
        }
        let mut table = [0; 80];
        msix.read_table(0, &mut table);
        prop_assert_eq!(table, model);
        for (vector, line) in lines.iter().enumerate() {
            let masked = model[vector * 16 + 12] & 1 != 0;
            prop_assert_eq!(line.route.lock().is_none(), masked);
        }
        let mut past = [0; 4];
        msix.read_table(u64::MAX - 1, &mut past[..1]);
        prop_assert_eq!(past[0], 0xff);
    }
}

#[test]
fn a_function_has_between_one_and_2048_vectors() {
    let lines = |count| vec![Line::new() as Arc<dyn MsiLine>; count];
    for count in [0, 2049] {
        let error = Msix::new(lines(count)).err().unwrap().to_string();
        assert!(error.contains("1 to 2048"), "{error}");
    }
    assert_eq!(Msix::new(lines(2048)).unwrap().vectors(), 2048);
}
