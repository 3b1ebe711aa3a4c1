//! Packets, interrupts, the dirty log, and what happens when either side goes away.

use std::collections::BTreeSet;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::time::Duration;

use net_util::tap::{Tap, TapName};
use passthrough::Passthrough;
use pci::PciDevice;
use rustix::thread::{UnshareFlags, unshare_unsafe};
use virtio_devices::NetBackend;
use vm_migration::dirty::{Collect, GuestDirty};
use vm_migration::memory::ram_regions;
use vm_migration::{DirtySource, Iova, IovaBitmap, IovaRange, PageSize, Pause};

use crate::driver::{BUFFERS, Driver, HEADER, status};
use crate::machine::{HIGH, Machine, RAM, card, make_card, ram_file};

/// Where the pages that `nic` writes are learnt.
fn dirty_source(nic: &Passthrough) -> Box<dyn DirtySource> {
    passthrough::dirty_sources([(nic, false)])
        .unwrap()
        .remove(0)
}

/// A frame from the network's side.
fn inject(cable: &UnixDatagram, frame: &[u8]) {
    cable.send(&[&[0; HEADER], frame].concat()).unwrap();
}

/// The next frame the guest sent.
fn taken(cable: &UnixDatagram) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    let len = cable.recv(&mut bytes).unwrap();
    bytes[HEADER..len].to_vec()
}

#[test]
fn packets_and_interrupts_pass_in_both_directions() {
    let (net, cable) = card(1);
    let mut machine = Machine::new(&ram_file(), net);
    let mut driver = Driver::start(&mut machine);
    for round in 0..200_u8 {
        driver.send(&machine, &[round; 60]);
        assert_eq!(taken(&cable), [round; 60]);
        machine.lines[0].clear();
        inject(&cable, &[!round; 1500]);
        let (_, packet) = driver.receive(&machine).unwrap();
        assert_eq!(packet, [!round; 1500]);
        assert!(machine.lines[0].signalled(), "round {round}");
    }
    let route = machine.lines[0].route.lock().unwrap();
    assert_eq!((route.address, route.data), (0xfee0_0000, 0));
}

#[test]
fn the_dirty_log_has_the_pages_the_card_wrote_and_no_other() {
    let (net, cable) = card(1);
    let mut machine = Machine::new(&ram_file(), net);
    let mut driver = Driver::start(&mut machine);
    inject(&cable, &[1; 60]);
    driver.receive(&machine).unwrap();

    let low = IovaRange::new(Iova(0), RAM).unwrap();
    let high = IovaRange::new(Iova(HIGH), RAM).unwrap();
    let mut source = dirty_source(&machine.nic);
    source.start(&[low, high]).unwrap();
    let mut bitmap = IovaBitmap::over(low, PageSize::SIZE_4K).unwrap();
    let mut none = IovaBitmap::over(high, PageSize::SIZE_4K).unwrap();
    source.report(low, &mut bitmap).unwrap();
    bitmap.clear();

    inject(&cable, &[2; 1000]);
    let (at, _) = driver.receive(&machine).unwrap();
    assert!(at >= BUFFERS);
    source.report(low, &mut bitmap).unwrap();
    assert!(bitmap.contains(Iova(at)), "the packet");
    assert!(bitmap.contains(Iova(at - 1)), "its header");
    assert!(bitmap.contains(Iova(driver.used_page())), "the used ring");
    assert_eq!(bitmap.count(), 3);
    source.report(high, &mut none).unwrap();
    assert!(none.is_empty());
    bitmap.clear();
    source.report(low, &mut bitmap).unwrap();
    assert!(bitmap.is_empty(), "a report clears");
    source.stop().unwrap();
}

/// Through the engine's bookkeeping, as a migration of the whole VM has it.
#[test]
fn what_the_card_writes_is_sent_again() {
    let (net, cable) = card(1);
    let mut machine = Machine::new(&ram_file(), net);
    let mut driver = Driver::start(&mut machine);
    let mut dirty = GuestDirty::new(&ram_regions(&machine.memory), PageSize::SIZE_4K).unwrap();
    let mut source = dirty_source(&machine.nic);
    // What came before the start is not told of: all memory is sent then.
    inject(&cable, &[1; 60]);
    driver.receive(&machine).unwrap();
    machine.nic.pause().unwrap();
    source.start(dirty.ranges()).unwrap();
    let mut sources: Vec<Box<dyn DirtySource>> = vec![source];
    let mut round = || {
        dirty.collect(&mut sources, Collect::default()).unwrap();
        let mut pages = BTreeSet::new();
        while let Some(run) = dirty.next_run(u64::MAX, &mut sources).unwrap() {
            pages.extend((run.gpa.0..run.gpa.0 + run.len).step_by(0x1000));
        }
        dirty.acknowledge();
        pages
    };
    assert_eq!(round(), BTreeSet::new());
    machine.nic.resume().unwrap();
    for n in 0..3 {
        inject(&cable, &[n; 1000]);
        let (at, _) = driver.receive(&machine).unwrap();
        // The driver knows of the packet, so the log does, though the card still runs.
        let mut sent = round();
        for page in [at, at - 0x1000] {
            assert!(sent.contains(&page), "{page:#x} of {sent:x?}");
        }
        machine.nic.pause().unwrap();
        sent.append(&mut round());
        machine.nic.resume().unwrap();
        for page in [at, at - 0x1000, driver.used_page()] {
            assert!(sent.remove(&page), "{page:#x}");
        }
        // A card that is resumed asks for kicks, beside the used rings.
        sent.retain(|page| !driver.used_pages().contains(page));
        assert_eq!(sent, BTreeSet::new());
    }
}

#[test]
fn memory_with_unreported_writes_is_not_given_back_while_it_is_logged() {
    let (net, cable) = card(1);
    let mut machine = Machine::new(&ram_file(), net);
    let mut driver = Driver::start(&mut machine);
    let low = IovaRange::new(Iova(0), RAM).unwrap();
    let high = IovaRange::new(Iova(HIGH), RAM).unwrap();
    let mut source = dirty_source(&machine.nic);
    source.start(&[low, high]).unwrap();
    inject(&cable, &[2; 1000]);
    driver.receive(&machine).unwrap();
    // The upper one is clean and goes; the lower one is not.
    assert!(machine.nic.unmap_memory().is_err());
    // The card goes on: it was stopped for the attempt only.
    inject(&cable, &[3; 99]);
    assert_eq!(driver.receive(&machine).unwrap().1, [3; 99]);
    let mut bitmap = IovaBitmap::over(low, PageSize::SIZE_4K).unwrap();
    assert!(
        source.report(high, &mut bitmap).is_err(),
        "nothing can be told of memory that is gone"
    );
}

#[test]
fn a_reset_leaves_a_card_that_can_be_started_again() {
    let (net, cable) = card(1);
    let mut machine = Machine::new(&ram_file(), net);
    Driver::start(&mut machine);
    machine.nic.reset().unwrap();
    assert!(!machine.nic.memory_enabled());
    assert_eq!(status(&mut machine), 0);
    let mut driver = Driver::start(&mut machine);
    driver.send(
        &machine,
        b"again, sixty bytes or so, for the sake of a frame's length",
    );
    assert!(taken(&cable).starts_with(b"again"));
}

#[test]
fn a_server_that_dies_is_told_of_and_reads_as_all_ones() {
    let (net, _cable) = card(1);
    let mut machine = Machine::new(&ram_file(), net);
    Driver::start(&mut machine);
    machine.wire.shutdown(std::net::Shutdown::Both).unwrap();
    let cause = machine.gone.recv_timeout(Duration::from_secs(5)).unwrap();
    assert!(cause.contains("nic.sock"), "{cause}");
    let mut word = [0; 4];
    machine.nic.read_bar(0, 0, &mut word);
    assert_eq!(word, [0xff; 4]);
    machine.nic.read_config(0, &mut word);
    assert_eq!(word, [0xff; 4]);
    machine.nic.write_bar(0, 20, &[1]);
    assert!(passthrough::dirty_sources([(&machine.nic, false)]).is_err());
    drop(machine.nic);
    machine.served.join().unwrap().unwrap();
}

/// Runs `test` in a network namespace of its own, or says why not.
fn in_namespace(name: &str, test: fn()) {
    let thread = std::thread::spawn(move || {
        #[expect(unsafe_code, reason = "rustix has no safe call for it")]
        // SAFETY: the thread is new and shares no file descriptor table by this flag.
        let unshared = unsafe { unshare_unsafe(UnshareFlags::NEWNET) };
        unshared.map_err(std::io::Error::from)?;
        std::fs::metadata("/dev/net/tun")?;
        test();
        Ok::<(), std::io::Error>(())
    });
    match thread.join() {
        Ok(Ok(())) => {}
        Ok(Err(error)) => println!("SKIP: {name}: no network namespace with taps: {error}"),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// Packets the kernel took from the tap.
fn received_by_host(tap: &str) -> u64 {
    let table = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let line = table.lines().find_map(|line| {
        let (name, counters) = line.split_once(':')?;
        (name.trim() == tap).then_some(counters)
    });
    line.unwrap()
        .split_whitespace()
        .nth(1)
        .unwrap()
        .parse()
        .unwrap()
}

#[test]
fn a_real_tap_carries_the_cards_packets() {
    in_namespace("a_real_tap_carries_the_cards_packets", || {
        let name = TapName::new("vnic0").unwrap();
        let tap = Tap::open(&name, std::num::NonZeroU16::MIN).unwrap();
        tap.set_up().unwrap();
        let queue = tap.into_queues().remove(0);
        let net = make_card(vec![Arc::new(queue) as Arc<dyn NetBackend>]);
        let mut machine = Machine::new(&ram_file(), net);
        let mut driver = Driver::start(&mut machine);
        // An interface that comes up speaks: IPv6 asks for routers and joins groups.
        let (_, packet) = driver.receive(&machine).unwrap();
        assert_eq!(packet[12..14], [0x86, 0xdd], "{packet:?}");
        let before = received_by_host("vnic0");
        let mut frame = vec![0xff; 6];
        frame.extend([0x52, 0x54, 0, 1, 2, 3, 0x88, 0xb5]);
        frame.resize(64, 0);
        driver.send(&machine, &frame);
        assert_eq!(received_by_host("vnic0"), before + 1);
    });
}
