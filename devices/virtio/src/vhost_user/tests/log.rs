//! What a migration learns of a backend's writes.

use std::collections::BTreeSet;

use vm_migration::{
    DirtySource, Iova, IovaBitmap, IovaRange, PageSize, Pause, SaveRestore, VmmWriteSource,
};

use super::*;
use crate::testing::RAM;

const PAGE: usize = 4096;

fn all() -> IovaRange {
    IovaRange::new(Iova(0), RAM).unwrap()
}

/// The pages that `source` reports.
fn report(source: &mut dyn DirtySource) -> BTreeSet<u64> {
    let mut bitmap = IovaBitmap::over(all(), PageSize::SIZE_4K).unwrap();
    let named = source.report(all(), &mut bitmap).unwrap().pages.unwrap();
    let pages: BTreeSet<u64> = bitmap
        .runs()
        .flat_map(|run| run.first().0 >> 12..=run.last().0 >> 12)
        .collect();
    assert_eq!(named, u64::try_from(pages.len()).unwrap());
    pages
}

#[test]
fn the_log_has_the_pages_that_the_backend_wrote_and_no_other() {
    for features in [0, feature::RING_EVENT_IDX] {
        let host = Host::new(1, Faults::default());
        let mut card = host.card(features, &[256, 256]);
        // Before the start nothing is logged.
        card.post(RX, 0, 2048);
        host.send(0, &pattern(60, 0));
        card.used(RX);
        let memory = card.driver.memory.clone();
        let mut source = card.handle.dirty_source(&memory).unwrap();
        source.start(&[all()]).unwrap();
        let rings = [RX, TX].map(|ring| card.rings[ring].layout.used >> 12);
        // The backend may have looked for kicks meanwhile, which it writes into used rings.
        assert!(report(&mut source).iter().all(|page| rings.contains(page)));

        for round in 0..100_u64 {
            let buffer = 1 + round % 40;
            // Two pages and more.
            let at = BUFFERS + buffer * STRIDE + 0xf00;
            card.rings[RX].add(&[], &[(at, 0x80), (at + 0x80, 0x1000)]);
            card.kick_if_wanted(RX);
            let payload = pattern(0x400, 3);
            host.send(0, &payload);
            card.used(RX);
            assert_eq!(card.bytes(at + 12, 0x400), payload);
            card.transmit(TX, 60, &pattern(80, 5));
            card.used(TX);
            let pages = report(&mut source);
            let must = [at >> 12, (at >> 12) + 1, rings[0], rings[1]];
            assert_eq!(pages, must.into_iter().collect(), "round {round}");
        }
        assert!(host.backend.is_logging());
        source.stop().unwrap();
        source.stop().unwrap();
        assert!(!host.backend.is_logging());
        let mut bitmap = IovaBitmap::over(all(), PageSize::SIZE_4K).unwrap();
        assert!(source.report(all(), &mut bitmap).is_err());
        // It works on, unlogged.
        card.post(RX, 0, 2048);
        host.send(0, &pattern(60, 9));
        card.used(RX);
        host.receive(0);
    }
}

/// A migration that fails ends with the log's stop, after a card that was paused went on.
#[test]
fn the_backend_logs_while_there_is_a_log_and_no_longer() {
    for faults in [
        Faults::default(),
        Faults {
            no_acknowledgements: true,
            ..Faults::default()
        },
    ] {
        let host = Host::new(1, faults);
        let mut card = host.card(0, &[256, 256]);
        let memory = card.driver.memory.clone();
        let mut source = card.handle.dirty_source(&memory).unwrap();
        for _ in 0..3 {
            source.start(&[all()]).unwrap();
            assert!(host.backend.is_logging());
            card.driver.device.pause().unwrap();
            card.driver.device.resume().unwrap();
            assert!(host.backend.is_logging(), "a card that goes on is logged");
            source.stop().unwrap();
            assert!(!host.backend.is_logging());

            source.start(&[all()]).unwrap();
            card.driver.device.pause().unwrap();
            source.stop().unwrap();
            card.driver.device.resume().unwrap();
            assert!(!host.backend.is_logging());
            card.post(RX, 0, 2048);
            host.send(0, &pattern(60, 9));
            card.used(RX);
        }
    }
}

/// What was logged before the start that failed is not given out after it.
#[test]
fn a_start_that_fails_leaves_no_log() {
    let host = Host::new(1, Faults::default());
    let card = host.card(0, &[256, 256]);
    let memory = card.driver.memory.clone();
    let mut source = card.handle.dirty_source(&memory).unwrap();
    source.start(&[all()]).unwrap();
    let hole = IovaRange::new(Iova(RAM), 4096).unwrap();
    let error = source.start(&[all(), hole]).unwrap_err().to_string();
    assert!(error.contains("not tracked"), "{error}");
    let mut bitmap = IovaBitmap::over(all(), PageSize::SIZE_4K).unwrap();
    assert!(source.report(all(), &mut bitmap).is_err());
    source.stop().unwrap();
    assert!(!host.backend.is_logging());
}

/// Copies memory as a migration does, while packets come and go and pairs of drivers come and go,
/// and gives the pages in which the copy is not the memory.
fn migrate(faults: Faults) -> BTreeSet<u64> {
    let host = Host::new(1, faults);
    let memory = shared_memory();
    let mut card = host.silent_card(&memory);
    let mut backend = card.handle.dirty_source(&memory).unwrap();
    let mut vmm = VmmWriteSource::new(memory.clone());
    // Started before there is a driver.
    backend.start(&[all()]).unwrap();
    vmm.start(&[all()]).unwrap();
    card.rings = card.driver.bring_up(feature::RING_EVENT_IDX, &[256, 256]);
    let mut copy = card.bytes(0, usize::try_from(RAM).unwrap());
    for round in 0..20_usize {
        for packet in 0..10 {
            card.post(RX, packet, 2048);
            host.send(
                0,
                &pattern(900, round * 10 + usize::try_from(packet).unwrap()),
            );
            card.used(RX);
            card.transmit(TX, 30 + packet, &pattern(500, round));
            card.used(TX);
            host.receive(0);
        }
        match round {
            // The guest boots again in the middle.
            9 => card.rings = card.driver.bring_up(0, &[256, 256]),
            // So does the migration, after it failed.
            14 => {
                backend.stop().unwrap();
                backend.start(&[all()]).unwrap();
                vmm.start(&[all()]).unwrap();
                copy = card.bytes(0, usize::try_from(RAM).unwrap());
            }
            // The last round.
            19 => card.driver.device.pause().unwrap(),
            _ => {}
        }
        for page in report(&mut backend).into_iter().chain(report(&mut vmm)) {
            let at = usize::try_from(page).unwrap() * PAGE;
            copy[at..at + PAGE].copy_from_slice(&card.bytes(page << 12, PAGE));
        }
    }
    card.driver.device.save().unwrap();
    let now = card.bytes(0, usize::try_from(RAM).unwrap());
    let pages = (0..).zip(now.chunks(PAGE).zip(copy.chunks(PAGE)));
    pages
        .filter_map(|(page, (now, copy))| (now != copy).then_some(page))
        .collect()
}

#[test]
fn a_copy_of_memory_becomes_equal() {
    assert_eq!(migrate(Faults::default()), BTreeSet::new());
    let unacknowledged = Faults {
        no_acknowledgements: true,
        ..Faults::default()
    };
    assert_eq!(migrate(unacknowledged), BTreeSet::new());
}

#[test]
fn a_backend_that_forgets_is_noticed() {
    let lost = migrate(Faults {
        forgets_buffers: true,
        ..Faults::default()
    });
    // Its ten receive buffers.
    let buffers = (0..10).map(|buffer| (BUFFERS + buffer * STRIDE) >> 12);
    assert_eq!(lost, buffers.collect());
    let lost = migrate(Faults {
        forgets_used_rings: true,
        ..Faults::default()
    });
    assert!((1..=2).contains(&lost.len()), "the used rings: {lost:?}");
}

#[test]
fn a_backend_without_a_log_cannot_move_and_says_so() {
    let host = Host::new(
        1,
        Faults {
            cannot_log: true,
            ..Faults::default()
        },
    );
    let card = host.card(0, &[256, 256]);
    let memory = card.driver.memory.clone();
    let error = card.handle.dirty_source(&memory).map(drop).unwrap_err();
    assert!(error.to_string().contains("VHOST_F_LOG_ALL"), "{error}");
    assert!(card.handle.facts()["dirty_source"].contains("VHOST_F_LOG_ALL"));
}

#[test]
fn a_backend_that_dies_fails_reports_and_save_but_no_pause() {
    let mut host = Host::new(1, Faults::default());
    let mut card = host.card(0, &[256, 256]);
    let memory = card.driver.memory.clone();
    let mut source = card.handle.dirty_source(&memory).unwrap();
    source.start(&[all()]).unwrap();
    host.backend = Host::new(1, Faults::default()).backend;
    wait_for("notice of its death", || card.driver.device.is_broken());
    let mut bitmap = IovaBitmap::over(all(), PageSize::SIZE_4K).unwrap();
    let error = source.report(all(), &mut bitmap).unwrap_err();
    let told = ErrorChain(&error).to_string();
    assert!(told.contains("closed the connection"), "{told}");
    source.stop().unwrap();
    card.driver.device.pause().unwrap();
    let error = card.driver.device.save().unwrap_err();
    assert!(ErrorChain(&error).to_string().contains("lost"));
    card.driver.device.resume().unwrap();
    // A reset finds nobody.
    card.driver.bring_up_unserved(0, &[256, 256]);
    assert!(card.driver.device.is_broken());
    assert!(card.handle.dirty_source(&memory).is_err());
}
