//! Tests of the ring, from sound to hostile.

use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};
use vm_migration::memory::GuestMemory;

use super::*;
use crate::testing::{RAM, Ring, RingLayout, Used, memory, snapshot};

const SIZE: u16 = 8;

fn setup(layout: RingLayout, event_idx: bool) -> QueueSetup {
    QueueSetup {
        size: layout.size,
        descriptors: layout.descriptors,
        available: layout.available,
        used: layout.used,
        event_idx,
        indirect: true,
    }
}

fn pair(event_idx: bool) -> (Arc<GuestMemory>, Ring, Queue) {
    let memory = snapshot(&memory());
    let layout = RingLayout::at(0x10000, SIZE);
    let ring = Ring::new(Arc::clone(&memory), layout, event_idx);
    let queue = Queue::new(
        3,
        setup(layout, event_idx),
        QueuePosition::default(),
        &memory,
    )
    .unwrap();
    (memory, ring, queue)
}

#[test]
fn chains_come_in_order_direct_and_indirect() {
    let (memory, mut ring, mut queue) = pair(false);
    let mut chain = Chain::default();
    assert!(!queue.pop(&memory, &mut chain).unwrap());
    let first = ring.add(&[(0x8000, 10), (0x9000, 20)], &[(0xa000, 30)]);
    let second = ring.add_indirect(&[(0x8000, 1)], &[(0xa000, 2), (0xb000, 3), (0xc000, 0)]);
    assert!(queue.pop(&memory, &mut chain).unwrap());
    assert_eq!(chain.head(), first);
    assert_eq!((chain.readable_len(), chain.writable_len()), (30, 30));
    assert_eq!(chain.readable().len(), 2);
    queue.push_used(&memory, first, 7).unwrap();
    assert_eq!(ring.pop_used(), None, "not before it is published");
    assert!(queue.pop(&memory, &mut chain).unwrap());
    assert_eq!(chain.head(), second);
    assert_eq!((chain.readable_len(), chain.writable_len()), (1, 5));
    queue.push_used(&memory, second, 5).unwrap();
    queue.publish(&memory).unwrap();
    assert_eq!(ring.used_index(), 2, "both at once");
    let used = |head, len| Some(Used { head, len });
    assert_eq!(ring.pop_used(), used(first, 7));
    assert_eq!(ring.pop_used(), used(second, 5));
}

#[test]
fn wraps_around_many_times() {
    let (memory, mut ring, mut queue) = pair(true);
    let mut chain = Chain::default();
    for round in 0..70_000_u32 {
        let head = ring.add(&[(0x8000, 4)], &[]);
        assert!(queue.pop(&memory, &mut chain).unwrap());
        queue.complete(&memory, chain.head(), round).unwrap();
        assert_eq!(ring.pop_used(), Some(Used { head, len: round }));
    }
}

#[test]
fn what_is_given_back_comes_again() {
    let (memory, mut ring, mut queue) = pair(false);
    let mut chain = Chain::default();
    let heads = [0; 3].map(|_| ring.add(&[(0x8000, 4)], &[]));
    for head in heads {
        assert!(queue.pop(&memory, &mut chain).unwrap());
        assert_eq!(chain.head(), head);
    }
    queue.unpop(2);
    assert!(queue.pop(&memory, &mut chain).unwrap());
    assert_eq!(chain.head(), heads[1]);
}

#[test]
fn bytes_are_gathered_and_scattered() {
    let (memory, mut ring, mut queue) = pair(false);
    memory.write_slice(b"hello", GuestAddress(0x8000)).unwrap();
    memory.write_slice(b"world", GuestAddress(0x9000)).unwrap();
    ring.add(&[(0x8000, 5), (0x9000, 5)], &[(0xa000, 3), (0xb000, 4)]);
    let mut chain = Chain::default();
    assert!(queue.pop(&memory, &mut chain).unwrap());
    let mut bytes = [0; 20];
    assert_eq!(chain.read_at(&memory, 0, &mut bytes).unwrap(), 10);
    assert_eq!(&bytes[..10], b"helloworld");
    assert_eq!(chain.read_at(&memory, 4, &mut bytes[..3]).unwrap(), 3);
    assert_eq!(&bytes[..3], b"owo");
    assert_eq!(chain.read_at(&memory, 10, &mut bytes).unwrap(), 0);
    assert_eq!(chain.write_at(&memory, 2, b"abcdefgh").unwrap(), 5);
    let mut out = [0; 4];
    memory
        .read_slice(&mut out[..1], GuestAddress(0xa002))
        .unwrap();
    assert_eq!(out[0], b'a');
    memory.read_slice(&mut out, GuestAddress(0xb000)).unwrap();
    assert_eq!(&out, b"bcde");
}

#[test]
fn suppression_without_event_index() {
    let (memory, mut ring, mut queue) = pair(false);
    let mut chain = Chain::default();
    assert!(ring.needs_kick(1));
    queue.disable_kicks(&memory).unwrap();
    assert!(!ring.needs_kick(1));
    let head = ring.add(&[(0x8000, 4)], &[]);
    assert!(queue.enable_kicks(&memory).unwrap(), "there is one already");
    assert!(ring.needs_kick(1));
    assert!(queue.pop(&memory, &mut chain).unwrap());
    assert!(!queue.enable_kicks(&memory).unwrap());
    queue.complete(&memory, head, 0).unwrap();
    assert!(queue.needs_interrupt(&memory).unwrap());
    assert!(!queue.needs_interrupt(&memory).unwrap(), "nothing new");
    // VRING_AVAIL_F_NO_INTERRUPT.
    ring.set_u16(ring.layout.available, 1);
    let head = ring.add(&[(0x8000, 4)], &[]);
    assert!(queue.pop(&memory, &mut chain).unwrap());
    queue.complete(&memory, head, 0).unwrap();
    assert!(!queue.needs_interrupt(&memory).unwrap());
}

#[test]
fn suppression_with_event_index() {
    let (memory, mut ring, mut queue) = pair(true);
    let mut chain = Chain::default();
    let mut work = |ring: &mut Ring, queue: &mut Queue| {
        ring.add(&[(0x8000, 4)], &[]);
        assert!(queue.pop(&memory, &mut chain).unwrap());
        queue.complete(&memory, chain.head(), 0).unwrap();
        queue.needs_interrupt(&memory).unwrap()
    };
    assert!(
        work(&mut ring, &mut queue),
        "unknown at first: one too many"
    );
    assert!(
        !work(&mut ring, &mut queue),
        "the driver has not asked again"
    );
    while ring.pop_used().is_some() {}
    assert!(!ring.enable_interrupts());
    assert!(work(&mut ring, &mut queue), "asked for");
    assert!(!work(&mut ring, &mut queue));
    // Kicks: asked for at the next entry only.
    assert!(!queue.enable_kicks(&memory).unwrap());
    while ring.pop_used().is_some() {}
    ring.add(&[(0x8000, 4)], &[]);
    assert!(ring.needs_kick(1));
    ring.add(&[(0x8000, 4)], &[]);
    assert!(!ring.needs_kick(1));
}

#[test]
fn position_goes_on_elsewhere() {
    let (memory, mut ring, mut queue) = pair(true);
    let mut chain = Chain::default();
    let heads = [0; 4].map(|_| ring.add(&[(0x8000, 4)], &[]));
    for head in &heads[..2] {
        assert!(queue.pop(&memory, &mut chain).unwrap());
        queue.complete(&memory, *head, 0).unwrap();
    }
    let mut again = Queue::new(3, setup(ring.layout, true), queue.position(), &memory).unwrap();
    for head in &heads[2..] {
        assert!(again.pop(&memory, &mut chain).unwrap());
        assert_eq!(chain.head(), *head);
        again.complete(&memory, *head, 0).unwrap();
    }
    assert!(again.needs_interrupt(&memory).unwrap());
    let used: Vec<_> = std::iter::from_fn(|| ring.pop_used())
        .map(|u| u.head)
        .collect();
    assert_eq!(used, heads);
}

#[test]
fn bad_setups_are_refused() {
    let memory = snapshot(&memory());
    let good = setup(RingLayout::at(0x10000, SIZE), false);
    let new = |setup| Queue::new(0, setup, QueuePosition::default(), &memory);
    assert!(new(good).is_ok());
    for size in [0, 3, 0xffff] {
        let bad = QueueSetup { size, ..good };
        assert!(matches!(new(bad), Err(RingError::Size { .. })));
    }
    let descriptors = 0x10008;
    let bad = QueueSetup {
        descriptors,
        ..good
    };
    assert!(matches!(new(bad), Err(RingError::Misaligned { .. })));
    for used in [RAM - 4, u64::MAX - 3, RAM] {
        let bad = QueueSetup { used, ..good };
        assert!(matches!(new(bad), Err(RingError::NotInMemory { .. })));
    }
}

#[test]
fn broken_rings_are_told_apart() {
    let pop = |prepare: &dyn Fn(&mut Ring)| {
        let (memory, mut ring, mut queue) = pair(false);
        prepare(&mut ring);
        queue.pop(&memory, &mut Chain::default()).unwrap_err()
    };
    let table = |ring: &Ring| ring.layout.descriptors;
    let error = pop(&|ring| ring.set_u16(ring.layout.available + 2, SIZE + 1));
    assert!(matches!(error, RingError::AvailableIndex { index: 9, .. }));
    let error = pop(&|ring| ring.expose(SIZE));
    assert!(matches!(error, RingError::DescriptorIndex { index: 8, .. }));
    let error = pop(&|ring| {
        ring.set_descriptor(table(ring), 0, (0x8000, 1), 1, 0);
        ring.expose(0);
    });
    assert!(matches!(error, RingError::ChainTooLong { size: SIZE }));
    let error = pop(&|ring| {
        ring.set_descriptor(table(ring), 0, (0x8000, 1), 3, 1);
        ring.set_descriptor(table(ring), 1, (0x8000, 1), 0, 0);
        ring.expose(0);
    });
    assert!(matches!(error, RingError::ReadAfterWrite));
    let error = pop(&|ring| {
        ring.set_descriptor(table(ring), 0, (0x8000, u32::MAX), 1, 1);
        ring.set_descriptor(table(ring), 1, (0x8000, 1), 0, 0);
        ring.expose(0);
    });
    assert!(matches!(error, RingError::ChainTooBig));
    for (len, flags) in [(0, 4), (15, 4), (32, 5)] {
        let error = pop(&|ring| {
            ring.set_descriptor(table(ring), 0, (0x8000, len), flags, 0);
            ring.expose(0);
        });
        assert!(matches!(error, RingError::Indirect(_)));
    }
    let error = pop(&|ring| {
        ring.set_descriptor(0x8000, 0, (0x8000, 16), 4, 0);
        ring.set_descriptor(table(ring), 0, (0x8000, 16), 4, 0);
        ring.expose(0);
    });
    assert!(matches!(error, RingError::Indirect(_)), "nested");
    let error = pop(&|ring| {
        ring.set_descriptor(table(ring), 0, (u64::MAX - 15, 16), 4, 0);
        ring.expose(0);
    });
    assert!(matches!(error, RingError::Memory { .. }));
}

#[test]
fn longest_chain_is_as_long_as_the_queue() {
    let (memory, mut ring, mut queue) = pair(false);
    let buffers = [(0x8000, 1); 8];
    ring.add(&buffers, &[]);
    let mut chain = Chain::default();
    assert!(queue.pop(&memory, &mut chain).unwrap());
    assert_eq!(chain.readable().len(), 8);
    queue.complete(&memory, chain.head(), 0).unwrap();
    assert!(ring.pop_used().is_some());
    ring.add_indirect(&buffers, &[]);
    assert!(queue.pop(&memory, &mut chain).unwrap());
    assert_eq!(chain.readable().len(), 8);
}

proptest! {
    /// Whatever is in the rings: an answer, in bounded time, and no panic.
    #[test]
    fn garbage_is_survived(
        garbage in proptest::collection::vec(any::<u8>(), 0x400),
        small in any::<bool>(),
        indirect in any::<bool>(),
        event_idx in any::<bool>(),
    ) {
        let memory = snapshot(&memory());
        let layout = RingLayout { used: 0x100, available: 0x80, ..RingLayout::at(0, SIZE) };
        // Small numbers, so that indices and addresses are often good.
        let bytes: Vec<u8> = garbage
            .iter()
            .enumerate()
            .map(|(i, b)| if small && i % 2 == 1 { 0 } else if small { b % 12 } else { *b })
            .collect();
        memory.write_slice(&bytes, GuestAddress(0)).unwrap();
        let setup = QueueSetup { indirect, ..setup(layout, event_idx) };
        let mut queue = Queue::new(0, setup, QueuePosition::default(), &memory).unwrap();
        let mut chain = Chain::default();
        for _ in 0..64 {
            match queue.pop(&memory, &mut chain) {
                Ok(true) => {
                    let mut bytes = [0; 64];
                    let _ = chain.read_at(&memory, 0, &mut bytes);
                    let _ = chain.write_at(&memory, 0, &bytes);
                    queue.complete(&memory, chain.head(), 64).unwrap();
                    queue.needs_interrupt(&memory).unwrap();
                }
                Ok(false) | Err(_) => break,
            }
        }
        let _ = queue.enable_kicks(&memory);
    }
}
