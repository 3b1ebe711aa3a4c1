//! Tests of the bus, its windows and the usual mapper together.

use devices::{Bus, BusDevice};
use proptest::prelude::*;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::config::{ConfigSpace, Identity};
use crate::device::{Doorbell, PciDevice};
use crate::mapper::{BusBarMapper, DoorbellBinder, DoorbellSpace};
use crate::windows::{ConfigPorts, EcamWindow};

const LOW: u64 = 0xc000_0000;
pub(crate) const HIGH: u64 = 0x10_0000_0000;

/// 64-bit BAR 0 (4 KiB, doorbell at 0x100), 32-bit BAR 2 (256 B), port BAR 3 (16).
pub(crate) struct Card {
    id: String,
    config: ConfigSpace,
    eventfd: EventFd,
    written: Vec<(u8, u64, Vec<u8>)>,
}

impl Card {
    pub(crate) fn shared(id: &str) -> Arc<Mutex<Self>> {
        let mut config = ConfigSpace::new(&Identity {
            vendor: 0x1af4,
            device: 0x1041,
            revision: 1,
            class: [2, 0, 0],
            subsystem_vendor: 0,
            subsystem: 0,
        });
        let wide = BarKind::Memory64 {
            prefetchable: false,
        };
        config.add_bar(0, wide, 0x1000).unwrap();
        config.add_bar(2, BarKind::Memory32, 0x100).unwrap();
        config.add_bar(3, BarKind::Io, 0x10).unwrap();
        Arc::new(Mutex::new(Self {
            id: id.to_owned(),
            config,
            eventfd: EventFd::new(EFD_NONBLOCK).unwrap(),
            written: Vec::new(),
        }))
    }
}

impl PciDevice for Card {
    fn id(&self) -> &str {
        &self.id
    }
    fn read_config(&mut self, offset: u16, data: &mut [u8]) {
        assert!(data.len() <= 4 && usize::from(offset % 4) + data.len() <= 4);
        self.config.read(offset, data);
    }
    fn write_config(&mut self, offset: u16, data: &[u8]) {
        assert!(data.len() <= 4 && usize::from(offset % 4) + data.len() <= 4);
        self.config.write(offset, data);
    }
    fn bars(&self) -> Vec<BarInfo> {
        self.config.bars()
    }
    fn set_bar_address(&mut self, index: u8, address: u64) {
        self.config.set_bar_address(index, address);
    }
    fn memory_enabled(&self) -> bool {
        self.config.memory_enabled()
    }
    fn read_bar(&mut self, bar: u8, _: u64, data: &mut [u8]) {
        data.fill(0xb0 + bar);
    }
    fn write_bar(&mut self, bar: u8, offset: u64, data: &[u8]) {
        self.written.push((bar, offset, data.to_vec()));
    }
    fn doorbells(&self) -> Vec<Doorbell> {
        vec![Doorbell {
            bar: 0,
            offset: 0x100,
            size: 2,
            datamatch: Some(1),
            eventfd: self.eventfd.try_clone().unwrap(),
        }]
    }
}

/// Remembers what is bound.
#[derive(Default)]
pub(crate) struct Binder(pub(crate) Mutex<Vec<(DoorbellSpace, u64)>>);

impl DoorbellBinder for Binder {
    fn bind(
        &self,
        space: DoorbellSpace,
        address: u64,
        _: &Doorbell,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        self.0.lock().push((space, address));
        Ok(())
    }
    fn unbind(
        &self,
        space: DoorbellSpace,
        address: u64,
        _: &Doorbell,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let mut bound = self.0.lock();
        let at = bound.iter().position(|b| *b == (space, address));
        bound.swap_remove(at.expect("only what was bound is unbound"));
        Ok(())
    }
}

pub(crate) struct Machine {
    pub(crate) memory: Arc<Bus>,
    ports: Arc<Bus>,
    pub(crate) binder: Arc<Binder>,
    pub(crate) pci: Arc<PciBus>,
    pub(crate) ecam: EcamWindow,
    config: ConfigPorts,
}

pub(crate) fn machine() -> Machine {
    let (memory, ports) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
    let binder = Arc::new(Binder::default());
    let mapper = BusBarMapper::new(
        memory.clone(),
        ports.clone(),
        vec![LOW..=LOW + 0xffff, HIGH..=HIGH + 0xfffff],
        vec![0x1000..=0xffff],
        binder.clone(),
    );
    let pci = PciBus::new(Arc::new(mapper));
    Machine {
        ecam: EcamWindow::new(pci.clone()),
        config: ConfigPorts::new(pci.clone()),
        memory,
        ports,
        binder,
        pci,
    }
}

pub(crate) fn ecam(slot: u64, offset: u64) -> u64 {
    (slot << 15) + offset
}

pub(crate) fn byte(bus: &Bus, address: u64) -> u8 {
    let mut data = [0];
    bus.read(address, &mut data);
    data[0]
}

pub(crate) fn word(device: &impl BusDevice, offset: u64) -> u32 {
    let mut data = [0; 4];
    device.read(offset, &mut data);
    u32::from_le_bytes(data)
}

#[test]
fn both_windows_see_the_devices() {
    let m = machine();
    assert_eq!(m.pci.add(Card::shared("_net0")).unwrap(), 1);
    assert_eq!(word(&m.ecam, ecam(0, 0)), 0x0008_1b36, "host bridge");
    assert_eq!(word(&m.ecam, ecam(1, 0)), 0x1041_1af4);
    assert_eq!(word(&m.ecam, ecam(2, 0)), u32::MAX, "absent");
    assert_eq!(word(&m.ecam, ecam(1, 0x1000)), u32::MAX, "function 1");
    assert_eq!(word(&m.ecam, ecam(1, 0x100)), 0, "no extended capabilities");
    m.config.write(0, &0x8000_0800_u32.to_le_bytes());
    assert_eq!(word(&m.config, 0), 0x8000_0800);
    assert_eq!(word(&m.config, 4), 0x1041_1af4);
    let mut half = [0; 2];
    m.config.read(6, &mut half);
    assert_eq!(half, [0x41, 0x10]);
    m.config.read(7, &mut half);
    assert_eq!(half, [0xff, 0xff], "runs past the dword");
    m.config.write(0, &0x0000_0800_u32.to_le_bytes());
    assert_eq!(word(&m.config, 4), u32::MAX, "latch not enabled");
    m.config.write(0, &0x8001_0800_u32.to_le_bytes());
    assert_eq!(word(&m.config, 4), u32::MAX, "bus 1");
    let mut eight = [0; 8];
    m.ecam.read(ecam(1, 0), &mut eight);
    assert_eq!(eight[..4], [0xf4, 0x1a, 0x41, 0x10]);
}

#[test]
fn bars_follow_the_registers() {
    let m = machine();
    let card = Card::shared("_net0");
    m.pci.add(card.clone()).unwrap();
    let at = |offset| ecam(1, offset);
    m.ecam.write(at(0x10), &HIGH.to_le_bytes());
    m.ecam.write(at(0x18), &0xc000_0000_u32.to_le_bytes());
    m.ecam.write(at(0x1c), &0x1000_u32.to_le_bytes());
    assert_eq!(byte(&m.memory, HIGH), 0xff, "not decoded yet");
    m.ecam.write(at(4), &[command::MEMORY.to_le_bytes()[0], 0]);
    assert_eq!([byte(&m.memory, HIGH), byte(&m.memory, LOW)], [0xb0, 0xb2]);
    assert_eq!(byte(&m.ports, 0x1000), 0xff);
    assert_eq!(*m.binder.0.lock(), [(DoorbellSpace::Memory, HIGH + 0x100)]);
    m.ecam.write(at(4), &3_u16.to_le_bytes());
    assert_eq!(byte(&m.ports, 0x1000), 0xb3);
    m.memory.write(HIGH + 8, &[1, 2]);
    m.memory.write(HIGH + 0xfff, &[1, 2]);
    assert_eq!(
        card.lock().written,
        [(0, 8, vec![1, 2])],
        "not past the end"
    );

    // Sizing while decoding, as Linux does for some devices: gone, and back where it was.
    m.ecam.write(at(0x10), &[0xff; 4]);
    assert_eq!(byte(&m.memory, HIGH), 0xff);
    assert!(m.binder.0.lock().is_empty());
    m.ecam.write(at(0x10), &(HIGH + 0x2000).to_le_bytes());
    assert_eq!(byte(&m.memory, HIGH + 0x2000), 0xb0);
    assert_eq!(*m.binder.0.lock(), [(DoorbellSpace::Memory, HIGH + 0x2100)]);

    m.ecam.write(at(4), &[0, 0]);
    assert_eq!(byte(&m.memory, HIGH + 0x2000), 0xff);
    assert!(m.binder.0.lock().is_empty());
}

#[test]
fn devices_come_and_go() {
    let m = machine();
    m.pci.add_at(5, Card::shared("a")).unwrap();
    assert_eq!(m.pci.add(Card::shared("b")).unwrap(), 1);
    assert_eq!((m.pci.slot_of("a"), m.pci.slot_of("c")), (Some(5), None));
    let again = m.pci.add(Card::shared("a"));
    assert!(matches!(again, Err(PciBusError::Duplicate { slot: 5, .. })));
    let taken = m.pci.add_at(5, Card::shared("c"));
    assert!(matches!(taken, Err(PciBusError::Taken { slot: 5, .. })));
    let beyond = m.pci.add_at(32, Card::shared("c"));
    assert!(matches!(beyond, Err(PciBusError::Taken { slot: 32, .. })));
    for n in 0..29 {
        m.pci.add(Card::shared(&format!("x{n}"))).unwrap();
    }
    assert!(matches!(
        m.pci.add(Card::shared("c")),
        Err(PciBusError::Full { .. })
    ));
    assert_eq!(m.pci.devices().len(), 32);

    m.ecam.write(ecam(5, 0x10), &HIGH.to_le_bytes());
    m.ecam.write(ecam(5, 4), &2_u16.to_le_bytes());
    assert_eq!(byte(&m.memory, HIGH), 0xb0);
    assert_eq!(m.pci.remove(5).unwrap().lock().id(), "a");
    assert_eq!(byte(&m.memory, HIGH), 0xff);
    assert!(m.binder.0.lock().is_empty());
    assert!(m.pci.remove(0).is_none(), "the bridge stays");
    assert!(m.pci.remove(5).is_none());
}

#[test]
fn a_hidden_device_is_gone_for_the_guest_only() {
    let m = machine();
    m.pci.add_at(5, Card::shared("a")).unwrap();
    m.ecam.write(ecam(5, 0x10), &HIGH.to_le_bytes());
    m.ecam.write(ecam(5, 4), &2_u16.to_le_bytes());
    let before = m.pci.save();
    m.pci.hide(5);
    m.pci.hide(0);
    m.pci.hide(6);
    assert_eq!(word(&m.ecam, ecam(5, 0)), u32::MAX);
    assert_eq!(word(&m.ecam, ecam(0, 0)), 0x0008_1b36, "the bridge stays");
    assert_eq!(byte(&m.memory, HIGH), 0xff);
    assert!(m.binder.0.lock().is_empty());
    // Nothing that the guest or a restore does brings it back.
    m.ecam.write(ecam(5, 4), &2_u16.to_le_bytes());
    m.pci.refresh(5);
    assert_eq!(byte(&m.memory, HIGH), 0xff);
    assert_eq!(m.pci.save(), before, "its state moves");
    assert_eq!(m.pci.device(5).unwrap().lock().id(), "a");
    m.pci.remove(5).unwrap();
    m.pci.add_at(5, Card::shared("b")).unwrap();
    assert_eq!(word(&m.ecam, ecam(5, 0)), 0x1041_1af4);
}

#[test]
fn two_bars_at_one_place_do_not_break_each_other() {
    let m = machine();
    for (slot, id) in [(1, "a"), (2, "b")] {
        m.pci.add(Card::shared(id)).unwrap();
        m.ecam.write(ecam(slot, 0x10), &HIGH.to_le_bytes());
        m.ecam.write(ecam(slot, 4), &2_u16.to_le_bytes());
    }
    assert_eq!(m.binder.0.lock().len(), 1, "the first has it");
    m.ecam.write(ecam(2, 4), &0_u16.to_le_bytes());
    assert_eq!(byte(&m.memory, HIGH), 0xb0, "still the first's");
    m.ecam.write(ecam(1, 4), &0_u16.to_le_bytes());
    assert_eq!(byte(&m.memory, HIGH), 0xff);
}

#[test]
fn state_moves_to_a_bus_with_the_same_devices() {
    let source = machine();
    let card = Card::shared("_net0");
    source.pci.add(card.clone()).unwrap();
    source.config.write(0, &0x8000_0804_u32.to_le_bytes());
    source.ecam.write(ecam(1, 0x10), &HIGH.to_le_bytes());
    source.ecam.write(ecam(1, 4), &2_u16.to_le_bytes());
    let state = source.pci.save();

    let target = machine();
    let empty = target.pci.restore(&state);
    assert!(matches!(
        empty,
        Err(PciBusError::Layout {
            slot: 1,
            here: None,
            ..
        })
    ));
    let same = Card::shared("_net0");
    target.pci.add(same.clone()).unwrap();
    same.lock()
        .config
        .restore(&card.lock().config.save())
        .unwrap();
    target.pci.restore(&state).unwrap();
    assert_eq!(byte(&target.memory, HIGH), 0xb0);
    assert_eq!(word(&target.config, 0), 0x8000_0804);
    let newer = PciBusState {
        version: 2,
        ..state
    };
    assert!(matches!(
        target.pci.restore(&newer),
        Err(PciBusError::Version { .. })
    ));
}

proptest! {
    #[test]
    fn any_accesses_are_served(
        accesses in prop::collection::vec(
            (any::<bool>(), any::<bool>(), 0_u64..0x18000, prop::sample::select(vec![1, 2, 4, 8]),
             any::<u64>()),
            0..80,
        )
    ) {
        let m = machine();
        m.pci.add(Card::shared("a")).unwrap();
        m.pci.add(Card::shared("b")).unwrap();
        for (through_ports, write, offset, length, value) in accesses {
            let offset = if through_ports { offset % 8 } else { offset };
            let device: &dyn BusDevice = if through_ports { &m.config } else { &m.ecam };
            let mut data = value.to_le_bytes()[..length].to_vec();
            if write {
                device.write(offset, &data);
            } else {
                device.read(offset, &mut data);
            }
        }
        for slot in [1, 2] {
            prop_assert_eq!(word(&m.ecam, ecam(slot, 0)), 0x1041_1af4);
            m.ecam.write(ecam(slot, 4), &[0, 0]);
        }
        prop_assert!(m.binder.0.lock().is_empty(), "what was mapped is unmapped");
    }
}
