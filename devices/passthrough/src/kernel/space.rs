//! The map of guest memory that devices share, whoever keeps it: a container of type 1, or an I/O
//! address space of an iommufd.

use parking_lot::Mutex;
use rustix::io::Errno;
use vm_migration::RamRegion;

use super::error::KernelError;
use super::memory::PinnedRam;

/// RAM that devices reach.
pub(crate) struct Mapped {
    memory: PinnedRam,
    /// How many devices asked for it.
    users: usize,
}

/// What is mapped. Kept by who maps, so that memory stays for as long as the kernel uses it.
pub(crate) type Ledger = Mutex<Vec<Mapped>>;

/// Addresses that devices use, where IOVA is GPA. RAM is mapped and pinned once for all of them.
pub(crate) trait AddressSpace: Send + Sync {
    /// What is mapped.
    fn ledger(&self) -> &Ledger;
    /// Whether all of the range from `first` to `last` can be mapped.
    fn reaches(&self, first: u64, last: u64) -> Result<bool, KernelError>;
    /// Has the kernel map `memory`.
    fn map_now(&self, memory: &PinnedRam) -> Result<(), Errno>;
    /// Has the kernel unmap `ram`; how many bytes it found mapped there.
    fn unmap_now(&self, ram: RamRegion) -> Result<u64, Errno>;

    /// Lets the devices reach `memory`, unless they do already.
    fn map(&self, memory: PinnedRam) -> Result<(), KernelError> {
        let ram = memory.ram();
        let mut mapped = self.ledger().lock();
        if let Some(there) = mapped.iter_mut().find(|there| there.memory.ram() == ram) {
            there.users = there.users.saturating_add(1);
            return Ok(());
        }
        let last = ram
            .len
            .checked_sub(1)
            .and_then(|n| ram.gpa.0.checked_add(n));
        let reached = last.map(|last| self.reaches(ram.gpa.0, last)).transpose()?;
        if reached != Some(true) {
            return Err(KernelError::OutOfReach {
                gpa: ram.gpa,
                len: ram.len,
            });
        }
        match self.map_now(&memory) {
            Ok(()) => mapped.push(Mapped { memory, users: 1 }),
            Err(cause @ (Errno::NOMEM | Errno::PERM)) => {
                return Err(KernelError::Locked {
                    len: ram.len,
                    cause,
                });
            }
            Err(cause) => return Err(KernelError::refused("map guest memory")(cause)),
        }
        Ok(())
    }

    /// Whether the range from `first` to `last` is within one mapped region.
    fn is_mapped(&self, first: u64, last: u64) -> bool {
        self.ledger().lock().iter().any(|there| {
            let ram = there.memory.ram();
            ram.gpa.0 <= first && last.checked_sub(ram.gpa.0).is_some_and(|n| n < ram.len)
        })
    }

    /// Takes RAM away when the last device lets go of it.
    fn unmap(&self, ram: RamRegion) -> Result<(), KernelError> {
        let mut mapped = self.ledger().lock();
        let missing = KernelError::NotMapped { gpa: ram.gpa };
        let Some(at) = mapped.iter().position(|there| there.memory.ram() == ram) else {
            return Err(missing);
        };
        if let Some(there) = mapped.get_mut(at).filter(|there| there.users > 1) {
            there.users -= 1;
            return Ok(());
        }
        let done = self
            .unmap_now(ram)
            .map_err(KernelError::refused("unmap guest memory"))?;
        // With less, some of it is elsewhere.
        if done != ram.len {
            return Err(missing);
        }
        mapped.swap_remove(at);
        Ok(())
    }
}
