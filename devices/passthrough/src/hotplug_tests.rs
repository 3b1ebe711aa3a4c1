//! A device on a bus that it comes to and leaves while the guest runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use devices::{Bus, BusDevice, InterruptError, IrqLine};
use parking_lot::Mutex;
use pci::{BusBarMapper, Doorbell, DoorbellBinder, DoorbellSpace, EcamWindow, HotPlug, PciBus};
use proptest::prelude::*;
use vm_migration::memory::{Backing, RamMapping, map_ram};
use vm_migration::{Gpa, RamRegion};

use crate::backend::IrqKind;
use crate::device::Passthrough;
use crate::fake::{FakeBackend, FakeFabric, MSIX_CAP, VECTORS, device};

const SLOT: u8 = 5;
const BAR: u64 = 0xc000_0000;
/// Registers of the device's configuration space, and of hot plug.
const COMMAND: u16 = 4;
const BAR2: u16 = 0x18;
const EJECT: u64 = 8;

struct NoDoorbells;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

impl DoorbellBinder for NoDoorbells {
    fn bind(&self, _: DoorbellSpace, _: u64, _: &Doorbell) -> Result<(), BoxError> {
        Ok(())
    }
    fn unbind(&self, _: DoorbellSpace, _: u64, _: &Doorbell) -> Result<(), BoxError> {
        Ok(())
    }
}

#[derive(Default)]
struct Told(AtomicU32);

impl IrqLine for Told {
    fn trigger(&self) -> Result<(), InterruptError> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// A machine's buses, and a device that came to them.
struct Scene {
    memory: Arc<Bus>,
    pci: Arc<PciBus>,
    ecam: EcamWindow,
    plug: Arc<HotPlug>,
    told: Arc<Told>,
    backend: Arc<FakeBackend>,
    device: Passthrough,
    fabric: FakeFabric,
}

impl Scene {
    fn new() -> Self {
        let memory = Arc::new(Bus::new());
        let mapper = BusBarMapper::new(
            memory.clone(),
            Arc::new(Bus::new()),
            vec![BAR..=BAR + 0xff_ffff],
            Vec::new(),
            Arc::new(NoDoorbells),
        );
        let pci = PciBus::new(Arc::new(mapper));
        let told = Arc::new(Told::default());
        let plug = HotPlug::new(pci.clone(), told.clone(), Box::new(|| {}));
        let backend = FakeBackend::new(None);
        let (device, fabric) = device(&backend);
        device.reset().unwrap();
        let file = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, 0x10_0000).unwrap();
        let ram = RamMapping {
            gpa: Gpa(0),
            len: 0x10_0000,
            backing: Backing::File {
                file: file.into(),
                offset: 0,
            },
        };
        device.map_memory(&map_ram(vec![ram]).unwrap()).unwrap();
        pci.add_at(SLOT, Arc::new(Mutex::new(device.clone())))
            .unwrap();
        plug.announce(SLOT).unwrap();
        Self {
            ecam: EcamWindow::new(pci.clone()),
            memory,
            pci,
            plug,
            told,
            backend,
            device,
            fabric,
        }
    }

    fn config(&self, at: u16, data: &[u8]) {
        let offset = (u64::from(SLOT) << 15) + u64::from(at);
        self.ecam.write(offset, data);
    }

    fn vendor(&self) -> u16 {
        let mut data = [0; 2];
        self.ecam.read(u64::from(SLOT) << 15, &mut data);
        u16::from_le_bytes(data)
    }

    fn bar(&self) -> u8 {
        let mut data = [0];
        self.memory.read(BAR + 2, &mut data);
        data[0]
    }

    /// What a driver does.
    fn drive(&self) {
        self.config(BAR2, &u32::try_from(BAR).unwrap().to_le_bytes());
        self.config(COMMAND, &6_u16.to_le_bytes());
        self.config(MSIX_CAP + 2, &0x8002_u16.to_le_bytes());
    }

    fn mapped(&self) -> Vec<RamRegion> {
        let seen = self.backend.seen.lock();
        seen.mapped.iter().map(|(ram, _)| *ram).collect()
    }

    /// What the VMM does when the guest has ejected.
    fn take_away(self) -> (Arc<FakeBackend>, FakeFabric) {
        self.pci.remove(SLOT).unwrap();
        self.device.reset().unwrap();
        self.device.unmap_memory().unwrap();
        self.plug.freed(SLOT);
        (self.backend, self.fabric)
    }
}

#[test]
fn a_device_comes_and_leaves_nothing_behind() {
    let scene = Scene::new();
    assert_eq!(scene.told.0.load(Ordering::Relaxed), 1);
    assert_eq!((scene.vendor(), scene.bar()), (0x1af4, 0xff));
    scene.drive();
    assert_eq!(scene.bar(), 2);
    let all = Some((IrqKind::Msix, usize::from(VECTORS)));
    assert_eq!(scene.backend.seen.lock().irqs, all);

    scene.plug.ask(SLOT).unwrap();
    // Part of a register, another's bit, another register: no eject.
    scene.plug.write(EJECT, &[1 << SLOT]);
    scene.plug.write(EJECT, &(1_u64 << SLOT).to_le_bytes());
    scene.plug.write(EJECT, &(!(1_u32 << SLOT)).to_le_bytes());
    scene.plug.write(EJECT + 1, &(1_u32 << SLOT).to_le_bytes());
    assert_eq!((scene.vendor(), scene.bar()), (0x1af4, 2));

    scene.plug.write(EJECT, &(1_u32 << SLOT).to_le_bytes());
    assert_eq!((scene.vendor(), scene.bar()), (0xffff, 0xff));
    // The guest does not reach it any more; memory and interrupts are the VMM's to take.
    let before = scene.backend.seen.lock().config.clone();
    scene.drive();
    scene.memory.write(BAR, &[0xee]);
    assert_eq!(scene.backend.seen.lock().config, before);
    assert_eq!(scene.mapped().len(), 1);
    let (backend, fabric) = scene.take_away();
    {
        let seen = backend.seen.lock();
        assert!(seen.mapped.is_empty());
        assert_eq!((seen.irqs, seen.resets), (None, 2));
    }
    assert_eq!(Arc::strong_count(&backend), 1, "it is closed");
    let lines = fabric.0.lock();
    assert!(lines.iter().all(|line| Arc::strong_count(line) == 1));
}

#[test]
fn a_dead_device_can_be_ejected() {
    let scene = Scene::new();
    scene.drive();
    scene.backend.seen.lock().gone = true;
    // It is noticed at the next access; the rest of the bus goes on.
    assert_eq!((scene.bar(), scene.vendor()), (0xff, 0xffff));
    scene.plug.ask(SLOT).unwrap();
    scene.plug.write(EJECT, &(1_u32 << SLOT).to_le_bytes());
    assert_eq!(scene.plug.ejected(), [SLOT]);
    scene.pci.remove(SLOT).unwrap();
    assert!(scene.device.reset().is_err());
    let Scene {
        backend, device, ..
    } = scene;
    drop(device);
    assert_eq!(Arc::strong_count(&backend), 1);
}

proptest! {
    /// Whatever a guest does before, it has nothing of the device after the eject.
    #[test]
    fn nothing_of_an_ejected_device_is_left(
        accesses in prop::collection::vec(
            (0_u64..0x1000, prop::sample::select(vec![1, 2, 4, 8]), any::<u64>(), any::<bool>()),
            0..40,
        )
    ) {
        let scene = Scene::new();
        scene.drive();
        let play = |ejected: bool| {
            for (at, length, value, is_bar) in &accesses {
                let data = &value.to_le_bytes()[..*length];
                // The fake has no more of configuration space.
                let register = (u64::from(SLOT) << 15) + (at & 0xf8);
                match is_bar {
                    true => scene.memory.write(BAR + at, data),
                    false => scene.ecam.write(register, data),
                }
                if ejected {
                    let mut back = [0; 8];
                    scene.ecam.read(register, &mut back);
                    assert_eq!(back, [0xff; 8]);
                }
            }
        };
        play(false);
        scene.plug.write(EJECT, &(1_u32 << SLOT).to_le_bytes());
        let now = |scene: &Scene| {
            let seen = scene.backend.seen.lock();
            (seen.config.clone(), seen.bar.clone(), seen.irqs)
        };
        let before = now(&scene);
        play(true);
        prop_assert_eq!(now(&scene), before);
        let (backend, _) = scene.take_away();
        prop_assert_eq!(Arc::strong_count(&backend), 1);
    }
}
