//! What only a test inside can do to a dirty log. The rest of it: `tests/dirty_log`.

use super::*;
use crate::{DirtyLogChoice, DirtyLogMethod};

/// What KVM's emulator writes is in the log too.
#[test]
fn dirty_log_has_emulated_writes() {
    let Some(host) = host("dirty_log_has_emulated_writes") else {
        return;
    };
    let code = [
        0xa2, 0xff, 0x2f, // mov [0x2fff], al
        0xa2, 0x00, 0x50, // mov [0x5000], al
        0xa2, 0x10, 0x50, // mov [0x5010], al
        0xe6, 0x10, // out 0x10, al
        0x26, 0xa2, 0x00, 0x00, // mov es:[0], al
        0xe6, 0x10, // out 0x10, al
    ];
    for dirty_log in [
        DirtyLogChoice::BitmapAutoClear,
        DirtyLogChoice::Ring { entries: None },
    ] {
        let rings = host.capabilities().dirty_log.ring_entries;
        if rings == 0 && dirty_log != DirtyLogChoice::BitmapAutoClear {
            println!("SKIP: dirty_log_has_emulated_writes: rings are not offered here");
            continue;
        }
        let options = VmOptions {
            dirty_log,
            ..VmOptions::default()
        };
        let mut machine = machine_with(&host, memory(&[(CODE, &code)]), 0, &options);
        let mut sregs = machine.vcpu.special_registers().unwrap();
        sregs.es.base = 99 * 0x1000;
        machine.vcpu.set_special_registers(&sregs).unwrap();
        let (vm, slot) = (&machine.vm, machine.slot);
        let mut words = [u64::MAX; 2];
        assert_eq!(vm.dirty_log_words(slot).unwrap(), 2);
        vm.set_dirty_logging(slot, true).unwrap();
        next_out(machine.vcpu.as_mut());
        vm.read_dirty_log(slot, &mut words).unwrap();
        assert_eq!(words, [(1 << 2) | (1 << 5), 0]);
        next_out(machine.vcpu.as_mut());
        vm.read_dirty_log(slot, &mut words).unwrap();
        assert_eq!(words, [0, 1 << (99 - 64)]);
    }
}

#[test]
fn dirty_log_is_what_this_kvm_has_or_refused() {
    let test = "dirty_log_is_what_this_kvm_has_or_refused";
    let Some(mut host) = host(test) else {
        return;
    };
    let offered = host.capabilities.dirty_log;
    let made = |host: &KvmHypervisor, dirty_log| {
        host.create_vm(&VmOptions {
            dirty_log,
            ..VmOptions::default()
        })
    };
    host.capabilities.dirty_log.manual_clear = false;
    let vm = made(&host, DirtyLogChoice::Bitmap).unwrap();
    assert_eq!(vm.dirty_log_method(), DirtyLogMethod::BitmapAutoClear);
    let ring = DirtyLogChoice::Ring { entries: None };
    host.capabilities.dirty_log.ring_with_bitmap = true;
    host.capabilities.dirty_log.ring_entries = 1 << 16;
    let refused = made(&host, ring).err();
    assert!(matches!(refused, Some(Error::DirtyRingNotEnough)));
    host.capabilities.dirty_log.ring_entries = 0;
    let refused = made(&host, ring).err().unwrap().to_string();
    let wanted = "a dirty log in rings needs KVM_CAP_DIRTY_LOG_RING_ACQ_REL, which this KVM lacks";
    assert_eq!(refused, wanted);

    if !offered.manual_clear {
        println!("SKIP: {test}: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 is not offered here");
        return;
    }
    // As kernels from 5.0 to 5.6 have it: all is clean, and protected, at the start.
    host.capabilities.dirty_log.manual_clear = true;
    host.capabilities.dirty_log.initially_set = false;
    let code = [
        0xa2, 0x00, 0x50, // mov [0x5000], al
        0xe6, 0x10, // out 0x10, al
        0xeb, 0xf9, // jmp to the start
    ];
    let Machine { vm, mut vcpu, slot } = machine(&host, memory(&[(CODE, &code)]), 0);
    let initially_set = false;
    let method = DirtyLogMethod::BitmapManualClear { initially_set };
    assert_eq!(vm.dirty_log_method(), method);
    vm.set_dirty_logging(slot, true).unwrap();
    let mut words = [u64::MAX; 2];
    let mut dirty = || {
        vm.read_dirty_log(slot, &mut words).unwrap();
        words
    };
    assert_eq!(dirty(), [0, 0]);
    for _ in 0..2 {
        next_out(vcpu.as_mut());
        assert_eq!(dirty(), [1 << 5, 0]);
        assert_eq!(dirty(), [1 << 5, 0]);
        vm.clear_dirty_log(slot, 0, &[u64::MAX]).unwrap();
        assert_eq!(dirty(), [0, 0]);
    }
}
