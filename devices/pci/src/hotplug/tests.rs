//! Tests of the hot-plug registers over a bus with devices.

use std::sync::atomic::{AtomicU32, Ordering};

use proptest::prelude::*;

use super::*;
use crate::bus::tests::{Card, HIGH, Machine, byte, ecam, machine, word};

/// Counts interrupts; fails if told to.
#[derive(Default)]
struct Line {
    count: AtomicU32,
    broken: bool,
}

impl IrqLine for Line {
    fn trigger(&self) -> Result<(), InterruptError> {
        if self.broken {
            return Err(InterruptError::Exhausted { wanted: 1, free: 0 });
        }
        self.count.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// Registers over a machine, what interrupts there were, and how often an eject was told.
struct Rig {
    machine: Machine,
    line: Arc<Line>,
    told: Arc<AtomicU32>,
    plug: Arc<HotPlug>,
}

impl Rig {
    fn new() -> Self {
        Self::with(Line::default())
    }

    fn with(line: Line) -> Self {
        let (machine, line) = (machine(), Arc::new(line));
        let told = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&told);
        let on_eject = Box::new(move || {
            count.fetch_add(1, Ordering::Relaxed);
        });
        let plug = HotPlug::new(machine.pci.clone(), line.clone(), on_eject);
        Self {
            machine,
            line,
            told,
            plug,
        }
    }

    fn write(&self, register: u64, value: u32) {
        self.plug.write(register, &value.to_le_bytes());
    }

    fn read(&self, register: u64) -> u32 {
        word(&*self.plug, register)
    }

    fn interrupts(&self) -> u32 {
        self.line.count.load(Ordering::Relaxed)
    }

    fn told(&self) -> u32 {
        self.told.load(Ordering::Relaxed)
    }

    fn vendor(&self, slot: u64) -> u32 {
        word(&self.machine.ecam, ecam(slot, 0))
    }
}

#[test]
fn a_device_comes_and_goes() {
    let rig = Rig::new();
    rig.machine.pci.add_at(5, Card::shared("a")).unwrap();
    rig.plug.announce(5).unwrap();
    assert_eq!((rig.interrupts(), rig.read(0), rig.read(4)), (1, 1 << 5, 0));
    assert_eq!(rig.read(0), 1 << 5, "reading does not clear");
    rig.write(0, 1 << 5);
    assert_eq!(rig.read(0), 0);
    rig.machine.ecam.write(ecam(5, 0x10), &HIGH.to_le_bytes());
    rig.machine.ecam.write(ecam(5, 4), &2_u16.to_le_bytes());
    assert_eq!(byte(&rig.machine.memory, HIGH), 0xb0);

    rig.plug.ask(5).unwrap();
    assert_eq!((rig.interrupts(), rig.read(4)), (2, 1 << 5));
    rig.write(4, u32::MAX);
    // Taken note of, not done: asked again, the guest is told again.
    assert_eq!((rig.read(4), rig.plug.asked()), (0, vec![5]));
    rig.plug.ask(5).unwrap();
    assert_eq!((rig.interrupts(), rig.read(4)), (3, 1 << 5));
    assert_eq!(rig.vendor(5), 0x1041_1af4, "nothing is taken before");
    assert_eq!(byte(&rig.machine.memory, HIGH), 0xb0);

    rig.write(8, 1 << 5);
    assert_eq!((rig.vendor(5), rig.told()), (u32::MAX, 1));
    assert_eq!(byte(&rig.machine.memory, HIGH), 0xff);
    assert_eq!((rig.plug.ejected(), rig.plug.asked()), (vec![5], vec![]));
    assert_eq!(rig.read(4), 0);
    // Nothing more can be asked of it, or ejected, before it is away.
    rig.plug.ask(5).unwrap();
    rig.write(8, 1 << 5);
    assert_eq!((rig.interrupts(), rig.told(), rig.read(4)), (3, 1, 0));

    assert_eq!(rig.machine.pci.remove(5).unwrap().lock().id(), "a");
    rig.plug.freed(5);
    assert_eq!(rig.plug.ejected(), vec![]);
    let empty = rig.plug.ask(5);
    assert!(matches!(empty, Err(HotPlugError::Fixed { slot: 5 })));
    rig.machine.pci.add_at(5, Card::shared("b")).unwrap();
    rig.plug.announce(5).unwrap();
    assert_eq!((rig.vendor(5), rig.read(0)), (0x1041_1af4, 1 << 5));
}

#[test]
fn what_is_part_of_the_machine_stays() {
    let rig = Rig::new();
    rig.machine.pci.add_at(1, Card::shared("console")).unwrap();
    rig.machine.pci.add_at(2, Card::shared("card")).unwrap();
    rig.plug.manage(2);
    for slot in [0, 1, 3, 31, 32, 255] {
        let refused = rig.plug.ask(slot);
        assert!(matches!(refused, Err(HotPlugError::Fixed { .. })), "{slot}");
    }
    assert_eq!(rig.interrupts(), 0, "it was there before the guest");
    rig.write(8, !(1 << 2));
    assert_eq!((rig.told(), rig.plug.ejected()), (0, vec![]));
    assert_eq!(rig.vendor(0), 0x0008_1b36);
    assert_eq!([rig.vendor(1), rig.vendor(2)], [0x1041_1af4; 2]);
    // The guest may eject by itself, several at once.
    rig.write(8, u32::MAX);
    assert_eq!((rig.told(), rig.plug.ejected()), (1, vec![2]));
    assert_eq!([rig.vendor(1), rig.vendor(2)], [0x1041_1af4, u32::MAX]);
}

#[test]
fn an_interrupt_that_fails_loses_no_request() {
    let rig = Rig::with(Line {
        broken: true,
        ..Line::default()
    });
    rig.machine.pci.add_at(5, Card::shared("a")).unwrap();
    let told = rig.plug.announce(5);
    assert!(matches!(told, Err(HotPlugError::Interrupt { slot: 5, .. })));
    let asked = rig.plug.ask(5);
    assert!(matches!(
        asked,
        Err(HotPlugError::Interrupt { slot: 5, .. })
    ));
    assert_eq!((rig.read(0), rig.read(4)), (1 << 5, 1 << 5));
}

#[test]
fn requests_and_ejects_move() {
    let source = Rig::new();
    for (slot, id) in [(3, "a"), (4, "b"), (5, "c"), (6, "d")] {
        source.machine.pci.add_at(slot, Card::shared(id)).unwrap();
        source.plug.manage(slot);
    }
    source.plug.announce(3).unwrap();
    source.plug.ask(4).unwrap();
    source.plug.ask(5).unwrap();
    source.write(4, 1 << 5);
    source.write(8, 1 << 6);
    let state = source.plug.save();

    let target = Rig::new();
    for (slot, id) in [(3, "a"), (4, "b"), (5, "c"), (6, "d")] {
        target.machine.pci.add_at(slot, Card::shared(id)).unwrap();
        target.plug.manage(slot);
    }
    target.plug.restore(&state).unwrap();
    assert_eq!(target.plug.save(), state);
    assert_eq!((target.read(0), target.read(4)), (1 << 3, 1 << 4));
    assert_eq!(target.plug.asked(), [4, 5]);
    assert_eq!(target.plug.ejected(), [6]);
    assert_eq!(target.vendor(6), u32::MAX, "the guest has ejected it");
    assert_eq!(target.interrupts(), 1);
    assert_eq!(target.told(), 0, "whoever restores looks by himself");

    // Slots that are none, or hold nothing to eject, mean nothing.
    let hostile = HotPlugState {
        version: STATE_VERSION,
        came: u32::MAX,
        goes: u32::MAX,
        asked: u32::MAX,
        ejected: u32::MAX,
    };
    let other = Rig::new();
    other.machine.pci.add_at(3, Card::shared("a")).unwrap();
    other.plug.manage(3);
    other.plug.restore(&hostile).unwrap();
    assert_eq!((other.read(0), other.plug.asked()), (0, vec![]));
    assert_eq!(other.plug.ejected(), [3]);
    let newer = HotPlugState {
        version: STATE_VERSION + 1,
        ..hostile
    };
    let refused = other.plug.restore(&newer);
    assert!(matches!(refused, Err(HotPlugError::Version { .. })));
}

/// What host and guest do, in any order.
#[derive(Clone, Debug)]
enum Step {
    Write(u64, Vec<u8>),
    Read(u64, usize),
    Add(u8),
    Ask(u8),
    TakeAway,
    Move,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let length = prop::sample::select(vec![1, 2, 4, 4, 4, 8]);
    let write = (0_u64..16, any::<u64>(), length.clone())
        .prop_map(|(at, value, len)| Step::Write(at, value.to_le_bytes()[..len].to_vec()));
    let register = prop::sample::select(vec![0_u64, 4, 8]);
    let whole = (register, any::<u32>())
        .prop_map(|(at, value)| Step::Write(at, value.to_le_bytes().to_vec()));
    prop::collection::vec(
        prop_oneof![
            write,
            whole,
            (0_u64..16, length).prop_map(|(at, len)| Step::Read(at, len)),
            (0_u8..32).prop_map(Step::Add),
            (0_u8..34).prop_map(Step::Ask),
            Just(Step::TakeAway),
            Just(Step::Move),
        ],
        0..60,
    )
}

proptest! {
    /// Whatever the guest writes: the device of a slot is there for it just until it ejects it, and
    /// is taken away only then; a slot is used again only when it is free.
    #[test]
    fn nothing_goes_that_was_not_ejected(steps in steps()) {
        let mut rig = Rig::new();
        rig.machine.pci.add_at(1, Card::shared("fixed")).unwrap();
        // Devices the guest should see, and those it ejected.
        let (mut here, mut ejected) = (0_u32, 0_u32);
        let mut number = 0;
        for step in steps {
            match step {
                Step::Write(at, data) => {
                    rig.plug.write(at, &data);
                    if let (8, Ok(value)) = (at, <[u8; 4]>::try_from(&*data)) {
                        let new = u32::from_le_bytes(value) & here;
                        here &= !new;
                        ejected |= new;
                    }
                }
                Step::Read(at, len) => {
                    let mut data = vec![0; len];
                    rig.plug.read(at, &mut data);
                    let known = [0, 4, 8].contains(&at) && len == 4;
                    prop_assert!(known || data.iter().all(|byte| *byte == 0xff));
                }
                Step::Add(slot) => {
                    number += 1;
                    let card = Card::shared(&format!("card{number}"));
                    let added = rig.machine.pci.add_at(slot, card).is_ok();
                    let free = slot > 1 && (here | ejected) & bit(slot) == 0;
                    prop_assert_eq!(added, free);
                    if added {
                        rig.plug.announce(slot).unwrap();
                        here |= bit(slot);
                    }
                }
                Step::Ask(slot) => {
                    let asked = rig.plug.ask(slot).is_ok();
                    prop_assert_eq!(asked, (here | ejected) & bit(slot) != 0);
                }
                Step::TakeAway => {
                    for slot in rig.plug.ejected() {
                        rig.machine.pci.remove(slot).unwrap();
                        rig.plug.freed(slot);
                    }
                    ejected = 0;
                }
                Step::Move => {
                    let target = Rig::new();
                    for (slot, device) in rig.machine.pci.devices().into_iter().skip(1) {
                        target.machine.pci.add_at(slot, device).unwrap();
                        if slot != 1 {
                            target.plug.manage(slot);
                        }
                    }
                    let state = rig.plug.save();
                    target.plug.restore(&state).unwrap();
                    prop_assert_eq!(target.plug.save(), state);
                    rig = target;
                }
            }
            for slot in 2..SLOTS {
                let there = rig.vendor(slot.into()) != u32::MAX;
                prop_assert_eq!(there, here & bit(slot) != 0, "slot {}", slot);
            }
            prop_assert_eq!(rig.vendor(1), 0x1041_1af4);
            prop_assert_eq!(rig.plug.ejected(), numbers(ejected));
            let asked = rig.plug.asked();
            prop_assert!(asked.iter().all(|slot| here & bit(*slot) != 0));
        }
    }
}
