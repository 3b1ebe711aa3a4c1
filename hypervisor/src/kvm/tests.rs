//! Tests on the real device, with snippets of real-mode code.
//!
//! Ports the snippets use: 0x10 reports a value, 0x12 an interrupt, 0x30 is a doorbell.

use std::os::fd::AsFd;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use proptest::prelude::*;
use vm_memory::GuestAddress;
use vm_memory::mmap::MmapRegion;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::{
    HostMapping, Hva, IoAddress, MemorySlot, MsiRoute, SlotFlags, Vcpu, VcpuExit, VcpuState,
    VmState,
};

mod dirty_log;

const CODE: u64 = 0x1000;
const PAGES: usize = 100;
const PAGE: usize = 4096;
const PATIENCE: Duration = Duration::from_secs(20);

/// Memory with code in it.
fn memory(code: &[(u64, &[u8])]) -> Arc<MmapRegion<()>> {
    let region = MmapRegion::new(PAGES * PAGE).unwrap();
    for (at, bytes) in code {
        let at = usize::try_from(*at).unwrap();
        assert!(at + bytes.len() <= region.size());
        // SAFETY: inside the region, as just checked; nothing else uses it yet.
        unsafe {
            let to = region.as_ptr().add(at);
            to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
        }
    }
    Arc::new(region)
}

struct Machine {
    vm: Arc<dyn Vm>,
    vcpu: Box<dyn Vcpu>,
    slot: MemorySlot,
}

/// The device, or `None` with a note.
fn host(test: &str) -> Option<KvmHypervisor> {
    match KvmHypervisor::open() {
        Ok(host) => Some(host),
        Err(error) => {
            println!("SKIP: {test}: {error}");
            None
        }
    }
}

/// A machine that is about to run `CODE` in real mode, its data segment based at `data`.
fn machine(host: &KvmHypervisor, memory: Arc<MmapRegion<()>>, data: u64) -> Machine {
    machine_with(host, memory, data, &VmOptions::default())
}

fn machine_with(
    host: &KvmHypervisor,
    memory: Arc<MmapRegion<()>>,
    data: u64,
    options: &VmOptions,
) -> Machine {
    let vm = host.create_vm(options).unwrap();
    let slot = vm
        .add_memory(GuestAddress(0), memory, SlotFlags::default())
        .unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let cpuid = host.supported_cpuid().unwrap().for_vcpu(0, 1);
    vcpu.set_cpuid(&cpuid).unwrap();
    let mut sregs = vcpu.special_registers().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    sregs.ds.base = data;
    vcpu.set_special_registers(&sregs).unwrap();
    let mut regs = vcpu.registers().unwrap();
    (regs.rip, regs.rflags, regs.rsp) = (CODE, 2, 0x8000);
    vcpu.set_registers(&regs).unwrap();
    Machine { vm, vcpu, slot }
}

/// Runs until the next write to a port.
fn next_out(vcpu: &mut dyn Vcpu) -> (u16, Vec<u8>) {
    match vcpu.run().unwrap() {
        VcpuExit::IoOut { port, data, .. } => (port, data.to_vec()),
        other => panic!("unexpected exit {other:?}"),
    }
}

#[test]
fn capabilities_make_sense() {
    let Some(host) = host("capabilities_make_sense") else {
        return;
    };
    let caps = host.capabilities();
    assert!(caps.max_vcpus >= 1 && caps.memory_slots >= 32 && caps.xsave_bytes >= 4096);
    let cpuid = host.supported_cpuid().unwrap();
    assert!(cpuid.get(0x4000_0000, 0).is_some(), "KVM's signature");
    assert_eq!(cpuid.for_vcpu(0, 2).missing_on(&cpuid), []);
    let vm = host.create_vm(&VmOptions::default()).unwrap();
    let refused = vm.create_vcpu(caps.max_vcpus);
    assert!(matches!(refused.err(), Some(Error::VcpuIndex { .. })));
}

#[test]
fn snippet_runs_and_its_accesses_arrive() {
    let Some(host) = host("snippet_runs_and_its_accesses_arrive") else {
        return;
    };
    let code = [
        0xb0, 0x41, // mov al, 0x41
        0xe6, 0x10, // out 0x10, al
        0xe5, 0x10, // in ax, 0x10
        0xa3, 0x00, 0x01, // mov [0x100], ax
        0xa1, 0x00, 0x02, // mov ax, [0x200]
        0xe7, 0x10, // out 0x10, ax
        0xbe, 0x00, 0x20, // mov si, 0x2000
        0xb9, 0x03, 0x00, // mov cx, 3
        0xba, 0x10, 0x00, // mov dx, 0x10
        0x2e, 0xf3, 0x6e, // rep outs dx, byte cs:[si]
    ];
    let memory = memory(&[(CODE, &code), (0x2000, b"abc")]);
    let mut machine = machine(&host, memory, 0xd000_0000);
    let vcpu = machine.vcpu.as_mut();
    assert_eq!(next_out(vcpu), (0x10, vec![0x41]));
    match vcpu.run().unwrap() {
        VcpuExit::IoIn { port, size, data } => {
            assert_eq!((port, size), (0x10, 2));
            data.copy_from_slice(&0x1234_u16.to_le_bytes());
        }
        other => panic!("unexpected exit {other:?}"),
    }
    let word = 0x1234_u16.to_le_bytes();
    let address = GuestAddress(0xd000_0100);
    let written = VcpuExit::MmioWrite {
        address,
        data: &word,
    };
    assert_eq!(vcpu.run().unwrap(), written);
    match vcpu.run().unwrap() {
        VcpuExit::MmioRead { address, data } => {
            assert_eq!(address, GuestAddress(0xd000_0200));
            data.copy_from_slice(&0x5678_u16.to_le_bytes());
        }
        other => panic!("unexpected exit {other:?}"),
    }
    assert_eq!(next_out(vcpu), (0x10, vec![0x78, 0x56]));
    let mut string = Vec::new();
    while string.len() < 3 {
        match vcpu.run().unwrap() {
            VcpuExit::IoOut { size: 1, data, .. } => string.extend_from_slice(data),
            other => panic!("unexpected exit {other:?}"),
        }
    }
    assert_eq!(string, b"abc");
}

#[test]
fn pending_input_reaches_its_register_before_a_save() {
    let Some(host) = host("pending_input_reaches_its_register_before_a_save") else {
        return;
    };
    let code = [0xe4, 0x10, 0xeb, 0xfe]; // in al, 0x10; jmp $
    let mut machine = machine(&host, memory(&[(CODE, &code)]), 0);
    match machine.vcpu.run().unwrap() {
        VcpuExit::IoIn { data, .. } => data.fill(0x5a),
        other => panic!("unexpected exit {other:?}"),
    }
    assert_eq!(
        machine.vcpu.complete_pending_io().unwrap(),
        VcpuExit::Interrupted
    );
    let regs = machine.vcpu.registers().unwrap();
    assert_eq!((regs.rax & 0xff, regs.rip), (0x5a, CODE + 2));
}

#[test]
fn memory_slots_are_checked() {
    let Some(host) = host("memory_slots_are_checked") else {
        return;
    };
    struct Odd;
    // SAFETY: never mapped, as its length is refused.
    unsafe impl HostMapping for Odd {
        fn hva(&self) -> Hva {
            Hva(0x1000)
        }
        fn len(&self) -> u64 {
            0x1001
        }
    }
    let vm = host.create_vm(&VmOptions::default()).unwrap();
    let flags = SlotFlags::default();
    let refused = vm.add_memory(GuestAddress(0), Arc::new(Odd), flags);
    assert!(matches!(refused, Err(Error::Unaligned { .. })));
    let first = vm.add_memory(GuestAddress(0), memory(&[]), flags).unwrap();
    let overlap = vm.add_memory(GuestAddress(0x1000), memory(&[]), flags);
    assert!(matches!(overlap, Err(Error::Ioctl { .. })));
    vm.remove_memory(first).unwrap();
    let again = vm
        .add_memory(GuestAddress(0x1000), memory(&[]), flags)
        .unwrap();
    assert_eq!(again, first, "numbers are used again");
}

/// Counts in CX and reports each number.
const COUNTER: [u8; 8] = [
    0x41, // inc cx
    0x88, 0xc8, // mov al, cl
    0xe6, 0x10, // out 0x10, al
    0xeb, 0xf9, // jmp to the start
    0xf4, // hlt
];

#[test]
fn a_vcpu_goes_on_in_another_vm() {
    let Some(host) = host("a_vcpu_goes_on_in_another_vm") else {
        return;
    };
    let memory = memory(&[(CODE, &COUNTER)]);
    let mut source = machine(&host, Arc::clone(&memory), 0);
    let first = next_out(source.vcpu.as_mut()).1[0];
    for n in 1..5 {
        assert_eq!(next_out(source.vcpu.as_mut()).1, [first + n]);
    }
    assert_eq!(
        source.vcpu.complete_pending_io().unwrap(),
        VcpuExit::Interrupted
    );
    source.vcpu.mark_paused().unwrap();
    let vcpu_bytes = source.vcpu.save().unwrap().encode().unwrap();
    let vm_bytes = source.vm.save().unwrap().encode().unwrap();
    assert!(vcpu_bytes.len() <= VcpuState::MAX_BYTES && vm_bytes.len() <= VmState::MAX_BYTES);

    let mut target = machine(&host, memory, 0);
    target
        .vm
        .restore(&VmState::decode(&vm_bytes).unwrap())
        .unwrap();
    let state = VcpuState::decode(&vcpu_bytes).unwrap();
    target.vcpu.restore(&state).unwrap();
    for n in 5..8 {
        assert_eq!(next_out(target.vcpu.as_mut()).1, [first + n]);
    }
    assert_eq!(
        target.vcpu.complete_pending_io().unwrap(),
        VcpuExit::Interrupted
    );
    let after = target.vcpu.save().unwrap();
    assert_eq!(after.cpuid(), state.cpuid());
    assert_eq!(after.special_registers, state.special_registers);
    assert_eq!(after.xsave, state.xsave);
    assert_eq!(after.xcrs, state.xcrs);
    assert_eq!(after.msrs.len(), state.msrs.len());
    // The source can go on too: saving does not disturb it.
    assert_eq!(next_out(source.vcpu.as_mut()).1, [first + 5]);
}

#[test]
fn state_that_does_not_fit_is_refused() {
    let Some(host) = host("state_that_does_not_fit_is_refused") else {
        return;
    };
    let mut machine = machine(&host, memory(&[(CODE, &COUNTER)]), 0);
    let state = machine.vcpu.save().unwrap();
    let small = VcpuState {
        xsave: vec![0; 100],
        ..state.clone()
    };
    let refused = machine.vcpu.restore(&small);
    assert!(matches!(refused, Err(Error::XsaveSize { saved: 100, .. })));
    let newer = VcpuState {
        version: 7,
        ..state.clone()
    };
    let refused = machine.vcpu.restore(&newer);
    assert!(matches!(refused, Err(Error::StateVersion { found: 7, .. })));
    let refused = VcpuState::decode(&newer.encode().unwrap());
    assert!(matches!(refused, Err(Error::StateVersion { found: 7, .. })));
    let mut odd = state.clone();
    odd.msrs[0].index = 0xdead_0000;
    let refused = machine.vcpu.restore(&odd);
    assert!(
        matches!(
            refused,
            Err(Error::Msr {
                index: 0xdead_0000,
                ..
            })
        ),
        "{refused:?}"
    );
    if host.capabilities().tsc_frequency && !host.capabilities().tsc_control {
        let slow = VcpuState {
            tsc_khz: Some(1000),
            ..state.clone()
        };
        let refused = machine.vcpu.restore(&slow);
        assert!(matches!(
            refused,
            Err(Error::TscFrequency { saved: 1000, .. })
        ));
    }
    machine.vcpu.restore(&state).unwrap();
    let mut vm_state = machine.vm.save().unwrap();
    vm_state.chips.pop();
    let refused = machine.vm.restore(&vm_state);
    assert!(matches!(refused, Err(Error::StateFormat { .. })));
    let long = vec![0; VmState::MAX_BYTES + 1];
    assert!(matches!(
        VmState::decode(&long),
        Err(Error::StateFormat { .. })
    ));
}

proptest! {
    #[test]
    fn any_bytes_are_decoded_or_refused(mut bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        if let Some(version) = bytes.first_mut() {
            *version = 1;
        }
        if let Ok(state) = VcpuState::decode(&bytes) {
            prop_assert_eq!(state.encode().unwrap(), bytes.clone());
        }
        if let Ok(state) = VmState::decode(&bytes) {
            prop_assert_eq!(state.encode().unwrap(), bytes);
        }
    }
}

#[test]
fn doorbells_do_not_exit() {
    let Some(host) = host("doorbells_do_not_exit") else {
        return;
    };
    let code = [
        0xb8, 0x07, 0x00, // mov ax, 7
        0xe7, 0x30, // out 0x30, ax
        0xa3, 0x00, 0x00, // mov [0], ax
        0xa2, 0x04, 0x00, // mov [4], al
        0xb0, 0x08, // mov al, 8
        0xe7, 0x30, // out 0x30, ax
        0xe6, 0x10, // out 0x10, al
        0xe7, 0x30, // out 0x30, ax
    ];
    let mut machine = machine(&host, memory(&[(CODE, &code)]), 0xd000_0000);
    let vm = &machine.vm;
    let [port, word, any] = [(); 3].map(|()| EventFd::new(EFD_NONBLOCK).unwrap());
    let at = |offset: u64| IoAddress::Mmio(GuestAddress(0xd000_0000 + offset));
    vm.register_ioeventfd(&port, IoAddress::Pio(0x30), 2, Some(7))
        .unwrap();
    vm.register_ioeventfd(&word, at(0), 2, None).unwrap();
    let any_length = if host.capabilities().doorbell_any_length {
        0
    } else {
        1
    };
    vm.register_ioeventfd(&any, at(4), any_length, None)
        .unwrap();
    let vcpu = machine.vcpu.as_mut();
    assert_eq!(
        next_out(vcpu),
        (0x30, vec![8, 0]),
        "only the value 7 matches"
    );
    assert_eq!(next_out(vcpu), (0x10, vec![8]));
    assert_eq!(port.read().unwrap(), 1);
    assert_eq!(word.read().unwrap(), 1);
    assert_eq!(any.read().unwrap(), 1);
    vm.unregister_ioeventfd(&port, IoAddress::Pio(0x30), 2, Some(7))
        .unwrap();
    let twice = vm.unregister_ioeventfd(&port, IoAddress::Pio(0x30), 2, Some(7));
    assert!(matches!(twice, Err(Error::Ioctl { .. })));
    let odd = vm.register_ioeventfd(&port, at(8), 3, None);
    assert!(matches!(
        odd,
        Err(Error::IoEventLength {
            length: 3,
            datamatch: false
        })
    ));
    let vague = vm.register_ioeventfd(&port, at(8), 0, Some(1));
    assert!(matches!(
        vague,
        Err(Error::IoEventLength {
            length: 0,
            datamatch: true
        })
    ));
}

/// Switches the local APIC on (data segment at 0xfee00000), reports, and waits for interrupts.
const WAITER: [u8; 15] = [
    0x66, 0xc7, 0x06, 0xf0, 0x00, 0xff, 0x01, 0x00, 0x00, // mov dword [0xf0], 0x1ff
    0xe6, 0x10, // out 0x10, al
    0xfb, // sti
    0xf4, // hlt
    0xeb, 0xfd, // jmp to the hlt
];
/// Reports an interrupt and ends it.
const HANDLER: [u8; 12] = [
    0xe6, 0x12, // out 0x12, al
    0x66, 0xc7, 0x06, 0xb0, 0x00, 0x00, 0x00, 0x00, 0x00, // mov dword [0xb0], 0
    0xcf, // iret
];

#[test]
fn irqfd_interrupts_a_halted_guest() {
    let Some(host) = host("irqfd_interrupts_a_halted_guest") else {
        return;
    };
    let vector = 0x40;
    let entry = [0x00, 0x11, 0x00, 0x00]; // 0000:1100
    let code: [(u64, &[u8]); 3] = [(CODE, &WAITER), (0x1100, &HANDLER), (vector * 4, &entry)];
    let Machine { vm, mut vcpu, .. } = machine(&host, memory(&code), 0xfee0_0000);
    let eventfd = EventFd::new(EFD_NONBLOCK).unwrap();
    let route = MsiRoute {
        gsi: 24,
        address: 0xfee0_0000,
        data: 0x40,
    };
    vm.set_msi_routes(&[route]).unwrap();
    eventfd.write(1).unwrap();

    let kicker = vcpu.kicker();
    let (ports, seen) = mpsc::channel();
    let runner = thread::spawn(move || {
        let _attached = vcpu.kicker().attach().unwrap();
        loop {
            match vcpu.run().unwrap() {
                VcpuExit::IoOut { port, .. } => ports.send(port).unwrap(),
                VcpuExit::Interrupted => break,
                other => panic!("unexpected exit {other:?}"),
            }
        }
    });
    assert_eq!(seen.recv_timeout(PATIENCE), Ok(0x10));
    vm.register_irqfd(&eventfd, 24).unwrap();
    assert_eq!(
        seen.recv_timeout(PATIENCE),
        Ok(0x12),
        "what was pending at registration"
    );
    for _ in 0..3 {
        eventfd.write(1).unwrap();
        assert_eq!(seen.recv_timeout(PATIENCE), Ok(0x12));
    }
    vm.unregister_irqfd(&eventfd, 24).unwrap();
    eventfd.write(1).unwrap();
    assert!(seen.recv_timeout(Duration::from_millis(50)).is_err());
    assert_eq!(eventfd.read().unwrap(), 1, "stays pending");
    kicker.kick().unwrap();
    runner.join().unwrap();
    kicker.kick().unwrap();
}

#[test]
fn no_kick_is_lost() {
    let Some(host) = host("no_kick_is_lost") else {
        return;
    };
    // Exits all the time, so that kicks fall on every side of the entry.
    for code in [&COUNTER[..], &[0xeb, 0xfe]] {
        let Machine { mut vcpu, .. } = machine(&host, memory(&[(CODE, code)]), 0);
        let kicker = vcpu.kicker();
        let (requests, wanted) = mpsc::channel::<u32>();
        let (done, answers) = mpsc::channel();
        // Before the thread is known: the first entry returns at once.
        requests.send(0).unwrap();
        kicker.kick().unwrap();
        let runner = thread::spawn(move || {
            let _attached = vcpu.kicker().attach().unwrap();
            loop {
                match vcpu.run().unwrap() {
                    VcpuExit::IoOut { .. } => {}
                    VcpuExit::Interrupted => {
                        for request in wanted.try_iter() {
                            if request == u32::MAX {
                                return;
                            }
                            done.send(request).unwrap();
                        }
                    }
                    other => panic!("unexpected exit {other:?}"),
                }
            }
        });
        assert_eq!(answers.recv_timeout(PATIENCE), Ok(0));
        for n in 1..100 {
            requests.send(n).unwrap();
            kicker.kick().unwrap();
            assert_eq!(answers.recv_timeout(PATIENCE), Ok(n));
        }
        requests.send(u32::MAX).unwrap();
        kicker.kick().unwrap();
        runner.join().unwrap();
    }
}

#[test]
fn files_that_are_not_of_vfio_are_not_taken_for_such() {
    let Some(host) = host("files_that_are_not_of_vfio_are_not_taken_for_such") else {
        return;
    };
    let vm = host.create_vm(&VmOptions::default()).unwrap();
    let file = std::fs::File::open("/dev/null").unwrap();
    // Nothing was added yet.
    vm.remove_vfio_file(file.as_fd()).unwrap();
    match vm.add_vfio_file(file.as_fd()) {
        Err(Error::Ioctl { operation, .. }) => {
            assert_eq!(operation, "KVM_SET_DEVICE_ATTR (VFIO)");
            assert!(vm.remove_vfio_file(file.as_fd()).is_err());
        }
        Err(Error::Unsupported { capability, .. }) => assert_eq!(capability, "KVM_DEV_TYPE_VFIO"),
        other => panic!("{other:?}"),
    }
}
