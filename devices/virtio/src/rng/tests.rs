//! Tests of the entropy device.

use vm_memory::{Bytes, GuestAddress};
use vm_migration::state::Pause;

use super::*;
use crate::testing::{Driver, Rounds, pages, pci_device, two_views, wait_for};

#[test]
fn what_an_entropy_device_writes_is_sent_again() {
    for event_idx in [feature::RING_EVENT_IDX, 0] {
        let (ours, theirs) = two_views();
        let rng = Rng::new("_rng", EntropySource::Kernel);
        let mut driver = Driver::new(pci_device(rng, &ours, &Arc::default()), &theirs);
        let mut rings = driver.bring_up(event_idx, &[16]);
        let used = rings[0].layout.used;
        driver.device.pause().unwrap();
        let mut rounds = Rounds::start(&ours);
        assert_eq!(rounds.next(), pages([]));
        driver.device.resume().unwrap();

        // Parts of four pages that are not side by side.
        rings[0].add(&[], &[(0x8f00, 0x200), (0xb000, 0x1001)]);
        driver.kick(0);
        wait_for("random bytes", || rings[0].used_index() == 1);
        let mut sent = rounds.next();
        for page in [0x8000, 0x9000, 0xb000, 0xc000] {
            assert!(sent.contains(&page), "{page:#x} of {sent:x?}");
        }
        driver.device.pause().unwrap();
        sent.append(&mut rounds.next());
        assert_eq!(sent, pages([0x8000, 0x9000, 0xb000, 0xc000, used]));
        assert_eq!(rings[0].pop_used().unwrap().len, 0x1201);
        let mut bytes = [0; 0x100];
        let memory = &rings[0].memory;
        memory.read_slice(&mut bytes, GuestAddress(0x8f00)).unwrap();
        assert_ne!(bytes, [0; 0x100]);
        assert_eq!(rounds.next(), pages([]));
    }
}
