//! The identity map beyond what `boot.s` laid out.
//!
//! Page tables are user-accessible, so ring 3 extends them itself. Entries
//! only ever go from absent to present, which needs no TLB flush.

use core::sync::atomic::{AtomicU64, Ordering::SeqCst};

use crate::boot_info::usize_of;
use crate::sync::SpinLock;

type Table = [AtomicU64; 512];

#[repr(C, align(4096))]
struct AlignedTable(Table);

/// One page directory per GiB mapped: 256 GiB of RAM and BARs.
const SPARE_TABLES: usize = 256;
const GIB: u64 = 1 << 30;
const LARGE_PAGE: u64 = 2 << 20;
/// Present, writable, user.
const TABLE_FLAGS: u64 = 0x7;
/// The same, accessed, dirty, 2 MiB page.
const PAGE_FLAGS: u64 = 0xe7;
const ADDRESS_MASK: u64 = 0x000f_ffff_ffff_f000;

static SPARE: [AlignedTable; SPARE_TABLES] =
    [const { AlignedTable([const { AtomicU64::new(0) }; 512]) }; SPARE_TABLES];
static SPARE_USED: SpinLock<usize> = SpinLock::new(0);

unsafe extern "C" {
    /// The root table, in `boot.s`.
    static pml4: Table;
}

/// A zeroed table nobody else has.
fn spare_table() -> Option<&'static Table> {
    let mut used = SPARE_USED.lock();
    let table = SPARE.get(*used)?;
    *used += 1;
    Some(&table.0)
}

/// The table an entry points to, made and linked in when absent; whether it
/// is new.
fn descend(entry: &AtomicU64) -> Option<(&'static Table, bool)> {
    let value = entry.load(SeqCst);
    if value & 1 == 0 {
        let table = spare_table()?;
        entry.store(
            core::ptr::from_ref(table).addr() as u64 | TABLE_FLAGS,
            SeqCst,
        );
        return Some((table, true));
    }
    // SAFETY: upper entries hold identity-mapped addresses of `Table`s that
    // live for ever: those of `boot.s` and those of `SPARE`.
    let table = unsafe { &*core::ptr::without_provenance::<Table>(usize_of(value & ADDRESS_MASK)) };
    Some((table, false))
}

/// Makes `[start, start + len)` accessible at its own address; false when the
/// tables are used up or the range lies beyond 128 TiB.
pub(crate) fn map(start: u64, len: u64) -> bool {
    let Some(end) = start.checked_add(len).filter(|&end| end <= 1 << 47) else {
        return false;
    };
    let mut gib = start & !(GIB - 1);
    while gib < end {
        if map_gib(gib).is_none() {
            return false;
        }
        gib += GIB;
    }
    true
}

fn map_gib(gib: u64) -> Option<()> {
    // SAFETY: the root table of `boot.s`, in use and never freed.
    let root = unsafe { &pml4 };
    let (directory_pointers, _) = descend(&root[usize_of(gib >> 39)])?;
    let (directory, new) = descend(&directory_pointers[usize_of((gib >> 30) & 511)])?;
    if new {
        for (entry, page) in directory.iter().zip(0..) {
            entry.store((gib + page * LARGE_PAGE) | PAGE_FLAGS, SeqCst);
        }
    }
    Some(())
}
