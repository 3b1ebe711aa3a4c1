//! A guest without an operating system that runs at privilege level 3 from its first instruction,
//! where every KVM runs it on the CPU itself (some emulate the others), and writes pages.

use std::sync::Arc;

use hypervisor::{
    DirtyLogChoice, Error, Hypervisor, KvmHypervisor, MemorySlot, Registers, Segment, SlotFlags,
    Vcpu, VcpuExit, Vm, VmOptions,
};
use vm_memory::GuestAddress;
use vm_memory::mmap::MmapRegion;

pub(crate) const PAGE: usize = 4096;
/// Where the pages lie that it writes. Code and page tables lie in a memory slot below.
pub(crate) const DATA: u64 = 1 << 30;

const CODE: u64 = 0x1000;
const PML4: u64 = 0x2000;
const PDPT: u64 = 0x3000;
const PDS: u64 = 0x4000;
const GIBS: u64 = 4;
const LOW_PAGES: usize = 16;
/// Nothing is there: a write says that a pass over the pages is complete.
const DOORBELL: u64 = 0xd000_0000;

/// Present, writable, for all privilege levels, accessed; bits 0, 1, 2 and 5 of an entry (Intel
/// SDM, volume 3, section 4.5). That it was accessed (and written) is said beforehand, so that
/// nobody writes the tables.
const TABLE: u64 = 0x27;
/// The same with dirty and page size: bits 6 and 7.
const LARGE_PAGE: u64 = 0xe7;

/// Writes RAX to RSI pages from RBX, RDX bytes apart, and reports; RAX counts the
/// passes.
const WRITER: [u8; 26] = [
    0x48, 0xff, 0xc0, // inc rax
    0x48, 0x89, 0xdf, // mov rdi, rbx
    0x48, 0x89, 0xf1, // mov rcx, rsi
    0x48, 0x89, 0x07, // mov [rdi], rax
    0x48, 0x01, 0xd7, // add rdi, rdx
    0x48, 0xff, 0xc9, // dec rcx
    0x75, 0xf5, // jnz to the mov
    0x41, 0x89, 0x00, // mov [r8], eax
    0xeb, 0xe7, // jmp to the start
    0xf4, // hlt
];

/// One vCPU and the pages it writes.
pub(crate) struct Guest {
    pub(crate) vm: Arc<dyn Vm>,
    pub(crate) vcpu: Box<dyn Vcpu>,
    pub(crate) slot: MemorySlot,
    pub(crate) data: Arc<MmapRegion<()>>,
}

impl Guest {
    /// With `pages` pages of data.
    pub(crate) fn new(
        host: &KvmHypervisor,
        dirty_log: DirtyLogChoice,
        pages: usize,
    ) -> Result<Self, Error> {
        let vm = host.create_vm(&VmOptions {
            dirty_log,
            ..VmOptions::default()
        })?;
        let low = Arc::new(MmapRegion::<()>::new(LOW_PAGES * PAGE).unwrap());
        fill(&low);
        let data = Arc::new(MmapRegion::new(pages * PAGE).unwrap());
        vm.add_memory(GuestAddress(0), low, SlotFlags::default())?;
        let slot = vm.add_memory(
            GuestAddress(DATA),
            Arc::clone(&data) as _,
            SlotFlags::default(),
        )?;
        let mut vcpu = vm.create_vcpu(0)?;
        vcpu.set_cpuid(&host.supported_cpuid()?.for_vcpu(0, 1))?;
        let mut sregs = vcpu.special_registers()?;
        let segment = |kind: u8, selector: u16, long: u8| Segment {
            limit: u32::MAX,
            selector,
            type_: kind,
            present: 1,
            dpl: 3,
            db: 1 - long,
            s: 1,
            l: long,
            g: 1,
            ..Segment::default()
        };
        sregs.cs = segment(0xb, 0x33, 1);
        for data in [&mut sregs.ss, &mut sregs.ds, &mut sregs.es] {
            *data = segment(0x3, 0x2b, 0);
        }
        // Paging with protection, in long mode.
        sregs.cr0 = 0x8000_0033;
        sregs.cr3 = PML4;
        sregs.cr4 = 0x20;
        sregs.efer = 0x500;
        vcpu.set_special_registers(&sregs)?;
        Ok(Self {
            vm,
            vcpu,
            slot,
            data,
        })
    }

    /// Has it write `count` pages from page `first`, `stride` pages apart, when it runs next, and
    /// so on for ever.
    pub(crate) fn aim(&mut self, first: usize, count: usize, stride: usize) {
        let wide = |n: usize| u64::try_from(n).unwrap();
        let registers = Registers {
            rip: CODE,
            rflags: 2,
            rbx: DATA + wide(first * PAGE),
            rsi: wide(count),
            rdx: wide(stride * PAGE),
            r8: DOORBELL,
            rax: self.vcpu.registers().unwrap().rax,
            ..Registers::default()
        };
        self.vcpu.set_registers(&registers).unwrap();
    }

    /// Writes once each of `count` pages from page `first`, `stride` pages apart.
    pub(crate) fn write(&mut self, first: usize, count: usize, stride: usize) {
        self.aim(first, count, stride);
        self.pass();
    }

    /// Runs to the end of a pass over the pages.
    pub(crate) fn pass(&mut self) {
        match self.vcpu.run().unwrap() {
            VcpuExit::MmioWrite { address, .. } => assert_eq!(address.0, DOORBELL),
            other => panic!("unexpected exit {other:?}"),
        }
        assert_eq!(
            self.vcpu.complete_pending_io().unwrap(),
            VcpuExit::Interrupted
        );
    }
}

/// Puts the code and the page tables in place, which map the first 4 GiB one to one.
fn fill(low: &MmapRegion<()>) {
    let put = |at: u64, bytes: &[u8]| {
        let at = usize::try_from(at).unwrap();
        assert!(at + bytes.len() <= low.size());
        // SAFETY: inside the region, as just checked; nothing else uses it yet.
        unsafe {
            let to = low.as_ptr().add(at);
            to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
        }
    };
    put(CODE, &WRITER);
    put(PML4, &(PDPT | TABLE).to_le_bytes());
    for gib in 0..GIBS {
        let table = PDS + gib * 0x1000;
        put(PDPT + 8 * gib, &(table | TABLE).to_le_bytes());
        for large in 0..512 {
            let page = (gib << 30) + (large << 21);
            put(table + 8 * large, &(page | LARGE_PAGE).to_le_bytes());
        }
    }
}

/// The device, or `None` with a note that `test` is skipped.
pub(crate) fn host(test: &str) -> Option<KvmHypervisor> {
    match KvmHypervisor::open() {
        Ok(host) => Some(host),
        Err(error) => {
            println!("SKIP: {test}: {error}");
            None
        }
    }
}
