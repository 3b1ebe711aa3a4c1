//! The client's memory and the log of what the device writes to it.
//!
//! Each DMA mapping of the client becomes a region of guest memory with its own always-on log
//! ([`vm_migration::WriteLog`]); IOVA is GPA. DMA logging therefore needs nothing of its own:
//! to start it is to forget what was logged so far, to report is to drain.
//!
//! A file that is too short is refused when it is mapped. A client that truncates one later kills
//! this process (SIGBUS), and with it no more than its own card.

use std::sync::Arc;

use rustix::io::Errno;
use vfio_user::{Area, DmaFlags, DmaMapping};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};
use vm_migration::memory::{
    Backing, GuestMemory, LOG_PAGE, MemoryHandle, RamMapping, drain_writes, forget_writes, is_ram,
    map_ram, ram_regions,
};
use vm_migration::{Gpa, Iova, IovaBitmap, IovaRange, PageSize};

/// Most mappings of a client.
const MAX_MAPPINGS: usize = 1024;

/// All that the client has mapped.
pub struct ClientMemory {
    handle: MemoryHandle,
    logging: bool,
    /// Kept from report to report while windows are alike.
    bitmap: Option<IovaBitmap>,
}

impl Default for ClientMemory {
    fn default() -> Self {
        Self {
            handle: MemoryHandle::new(GuestMemory::new()),
            logging: false,
            bitmap: None,
        }
    }
}

impl ClientMemory {
    /// The handle for the device: it sees mappings as they come and go.
    pub fn handle(&self) -> MemoryHandle {
        self.handle.clone()
    }

    fn replace(&self, memory: GuestMemory) {
        match self.handle.lock() {
            Ok(guard) => guard.replace(memory),
            // Somebody panicked while replacing; the map itself is swapped as a whole.
            Err(poisoned) => poisoned.into_inner().replace(memory),
        }
    }

    /// Maps client memory.
    ///
    /// # Errors
    /// EOPNOTSUPP without a file or without write access, EEXIST over a present mapping, ENOSPC
    /// for too many, EINVAL for what cannot be mapped.
    pub fn map(&self, mapping: DmaMapping) -> Result<(), Errno> {
        let Some((file, offset)) = mapping.file else {
            // The card moves packets straight between tap and guest memory.
            return Err(Errno::OPNOTSUPP);
        };
        if mapping.flags != DmaFlags::READ | DmaFlags::WRITE {
            return Err(Errno::OPNOTSUPP);
        }
        let memory = self.handle.memory();
        if memory.num_regions() >= MAX_MAPPINGS {
            return Err(Errno::NOSPC);
        }
        let one = map_ram(vec![RamMapping {
            gpa: Gpa(mapping.iova),
            len: mapping.size,
            backing: Backing::File {
                file: file.into(),
                offset,
            },
        }])
        .map_err(|error| {
            tracing::warn!(iova = mapping.iova, size = mapping.size, %error, "memory not mapped");
            Errno::INVAL
        })?;
        let (_, region) = one
            .remove_region(GuestAddress(mapping.iova), mapping.size)
            .map_err(|_| Errno::INVAL)?;
        let all = memory.insert_region(region).map_err(|_| Errno::EXIST)?;
        self.replace(all);
        Ok(())
    }

    /// Takes a mapping away. The device must stand still.
    ///
    /// # Errors
    /// ENOENT if there is no such mapping; EBUSY while it is logged and has writes that were not
    /// reported, which would be lost.
    pub fn unmap(&mut self, iova: u64, size: u64) -> Result<(), Errno> {
        let memory = self.handle.memory();
        let (rest, region) = memory
            .remove_region(GuestAddress(iova), size)
            .map_err(|_| Errno::NOENT)?;
        if self.logging && has_writes(&region)? {
            tracing::warn!(
                iova,
                size,
                "mapping stays: its last writes were not reported"
            );
            return Err(Errno::BUSY);
        }
        self.replace(rest);
        self.bitmap = None;
        Ok(())
    }

    /// Forgets all mappings and the log: the client has gone.
    pub fn clear(&mut self) {
        self.replace(GuestMemory::new());
        self.logging = false;
        self.bitmap = None;
    }

    /// Starts the log with everything in `ranges` clean (all memory if there are none) and gives
    /// its page size.
    pub fn start_log(&mut self, ranges: &[Area]) -> u64 {
        let memory = self.handle.memory();
        if ranges.is_empty() {
            for ram in ram_regions(&memory) {
                if let Some(range) = IovaRange::new(Iova(ram.gpa.0), ram.len) {
                    forget_writes(&memory, range);
                }
            }
        }
        for area in ranges {
            if let Some(range) = IovaRange::new(Iova(area.offset), area.size) {
                forget_writes(&memory, range);
            }
        }
        self.logging = true;
        LOG_PAGE.bytes()
    }

    /// Stops the log.
    pub fn stop_log(&mut self) {
        self.logging = false;
        self.bitmap = None;
    }

    /// ORs the pages of `page_size` written in `length` bytes from `iova` since the last report
    /// into `words`, and forgets them.
    ///
    /// # Errors
    /// EINVAL if the log was not started, or for memory that is not all mapped: what was written
    /// there cannot be told. ENOMEM. Nothing is forgotten then.
    pub fn report(
        &mut self,
        iova: u64,
        length: u64,
        page_size: u64,
        words: &mut [u64],
    ) -> Result<(), Errno> {
        let range = IovaRange::new(Iova(iova), length).ok_or(Errno::INVAL)?;
        let page = PageSize::new(page_size).ok_or(Errno::INVAL)?;
        let memory = self.handle.memory();
        if !self.logging || !is_ram(&memory, range) {
            return Err(Errno::INVAL);
        }
        let fits = self
            .bitmap
            .as_ref()
            .is_some_and(|bitmap| bitmap.range() == range && bitmap.page_size() == page);
        if !fits {
            self.bitmap = Some(IovaBitmap::over(range, page).map_err(|_| Errno::INVAL)?);
        }
        let bitmap = self.bitmap.as_mut().ok_or(Errno::NOMEM)?;
        if bitmap.words().len() != words.len() {
            return Err(Errno::INVAL);
        }
        bitmap.clear();
        drain_writes(&memory, range, bitmap).map_err(|error| {
            tracing::error!(%error, "dirty log could not be drained");
            Errno::IO
        })?;
        for (word, bits) in words.iter_mut().zip(bitmap.words()) {
            *word |= bits;
        }
        Ok(())
    }
}

/// Whether the log of one region has anything in it.
fn has_writes(region: &Arc<<GuestMemory as GuestMemoryBackend>::R>) -> Result<bool, Errno> {
    use vm_memory::bitmap::Bitmap;
    let log = region.bitmap();
    let mut offset = 0;
    while offset < region.size() {
        if log.dirty_at(offset) {
            return Ok(true);
        }
        offset = offset
            .checked_add(1 << LOG_PAGE.shift())
            .ok_or(Errno::OVERFLOW)?;
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use vm_memory::Bytes;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn file(len: u64) -> OwnedFd {
        let fd = memfd_create("ram", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, len).unwrap();
        fd
    }

    fn mapping(iova: u64, size: u64) -> DmaMapping {
        DmaMapping {
            iova,
            size,
            flags: DmaFlags::READ | DmaFlags::WRITE,
            file: Some((file(4 * MIB), MIB)),
        }
    }

    fn write(memory: &ClientMemory, at: u64) {
        let ram = memory.handle().memory();
        ram.write_slice(&[1; 16], GuestAddress(at)).unwrap();
    }

    fn report(memory: &mut ClientMemory, iova: u64, length: u64, page: u64) -> Vec<u64> {
        let pages = length.div_ceil(page);
        let mut words = vec![0; usize::try_from(pages.div_ceil(64)).unwrap()];
        memory.report(iova, length, page, &mut words).unwrap();
        words
    }

    #[test]
    fn mappings_come_and_go() {
        let mut memory = ClientMemory::default();
        memory.map(mapping(16 * MIB, MIB)).unwrap();
        memory.map(mapping(0, MIB)).unwrap();
        assert_eq!(memory.map(mapping(0, MIB)), Err(Errno::EXIST));
        assert_eq!(memory.map(mapping(MIB / 2, MIB)), Err(Errno::EXIST));
        write(&memory, 16 * MIB);
        assert_eq!(memory.unmap(0, 2 * MIB), Err(Errno::NOENT));
        memory.unmap(0, MIB).unwrap();
        assert_eq!(memory.unmap(0, MIB), Err(Errno::NOENT));
        memory.unmap(16 * MIB, MIB).unwrap();
        assert_eq!(memory.handle().memory().num_regions(), 0);
    }

    #[test]
    fn what_cannot_be_mapped_is_refused() {
        let memory = ClientMemory::default();
        let without_file = DmaMapping {
            file: None,
            ..mapping(0, MIB)
        };
        assert_eq!(memory.map(without_file), Err(Errno::OPNOTSUPP));
        let read_only = DmaMapping {
            flags: DmaFlags::READ,
            ..mapping(0, MIB)
        };
        assert_eq!(memory.map(read_only), Err(Errno::OPNOTSUPP));
        // Longer than its file, and not whole pages.
        assert_eq!(memory.map(mapping(0, 16 * MIB)), Err(Errno::INVAL));
        assert_eq!(memory.map(mapping(0, 100)), Err(Errno::INVAL));
    }

    #[test]
    fn reports_are_exact_cleared_and_of_any_page_size() {
        let mut memory = ClientMemory::default();
        memory.map(mapping(0, MIB)).unwrap();
        memory.map(mapping(16 * MIB, MIB)).unwrap();
        write(&memory, 0x5000);
        assert_eq!(memory.start_log(&[]), 4096);
        write(&memory, 0x3000);
        write(&memory, 0x8_0000);
        write(&memory, 16 * MIB + 0x1000);
        let mut expected = vec![0; 4];
        expected[0] = 1 << 3;
        expected[2] = 1;
        assert_eq!(report(&mut memory, 0, MIB, 4096), expected);
        assert_eq!(report(&mut memory, 0, MIB, 4096), [0; 4]);
        // The other region was left alone.
        assert_eq!(report(&mut memory, 16 * MIB, MIB, 0x1_0000), [1]);
        memory.stop_log();
        assert_eq!(memory.report(0, MIB, 4096, &mut [0; 4]), Err(Errno::INVAL));
    }

    #[test]
    fn a_report_of_what_is_not_mapped_is_an_error() {
        let mut memory = ClientMemory::default();
        memory.map(mapping(0, MIB)).unwrap();
        memory.start_log(&[]);
        write(&memory, 0);
        assert_eq!(
            memory.report(0, 2 * MIB, 4096, &mut [0; 8]),
            Err(Errno::INVAL)
        );
        assert_eq!(report(&mut memory, 0, MIB, 4096)[0], 1, "nothing was lost");
    }

    #[test]
    fn a_mapping_with_unreported_writes_stays_while_it_is_logged() {
        let mut memory = ClientMemory::default();
        memory.map(mapping(0, MIB)).unwrap();
        memory.start_log(&[]);
        write(&memory, 0xf_f000);
        assert_eq!(memory.unmap(0, MIB), Err(Errno::BUSY));
        report(&mut memory, 0, MIB, 4096);
        memory.unmap(0, MIB).unwrap();
    }
}
