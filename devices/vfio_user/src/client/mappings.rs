//! What memory the device may access: the client's own record of its DMA mappings.
//!
//! A server reaches memory without a file by message. It is not trusted to stay within what was
//! mapped for it, nor to have understood an unmap.

use parking_lot::Mutex;
use rustix::io::Errno;

use crate::wire::DmaFlags;

/// One mapping.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Mapping {
    pub(super) iova: u64,
    pub(super) size: u64,
    pub(super) flags: DmaFlags,
}

impl Mapping {
    /// Bytes of it from `iova` on; 0 if that lies outside.
    fn left(&self, iova: u64) -> u64 {
        match iova.checked_sub(self.iova) {
            Some(offset) => self.size.saturating_sub(offset),
            None => 0,
        }
    }
}

/// All mappings of a client.
#[derive(Debug, Default)]
pub(super) struct Mappings(Mutex<Vec<Mapping>>);

impl Mappings {
    /// A mapping the server is about to be told of, and may use at once.
    pub(super) fn add(&self, mapping: Mapping) {
        self.0.lock().push(mapping);
    }

    /// A mapping the server does not have (any more).
    pub(super) fn remove(&self, iova: u64, size: u64) {
        let mut all = self.0.lock();
        let last = |mapping: &Mapping| (mapping.iova, mapping.size) == (iova, size);
        if let Some(at) = all.iter().rposition(last) {
            all.swap_remove(at);
        }
    }

    /// Whether the server may access `len` bytes at `iova` in the way of `access`; they may lie in
    /// several mappings side by side.
    ///
    /// # Errors
    /// EFAULT for what is not mapped, EACCES for what is mapped for another kind of access.
    pub(super) fn check(&self, iova: u64, len: u64, access: DmaFlags) -> Result<(), Errno> {
        let all = self.0.lock();
        let (mut at, mut left) = (iova, len);
        while left > 0 {
            let here = all.iter().filter(|mapping| mapping.left(at) > 0);
            let Some(found) = here.max_by_key(|mapping| mapping.flags.contains(access)) else {
                return Err(Errno::FAULT);
            };
            if !found.flags.contains(access) {
                return Err(Errno::ACCESS);
            }
            let step = found.left(at).min(left);
            left -= step;
            // The whole access was found not to run past 2^64.
            at = at.saturating_add(step);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READ: DmaFlags = DmaFlags::READ;
    const WRITE: DmaFlags = DmaFlags::WRITE;

    fn mappings(all: &[(u64, u64, DmaFlags)]) -> Mappings {
        let mappings = Mappings::default();
        for (iova, size, flags) in all.iter().copied() {
            mappings.add(Mapping { iova, size, flags });
        }
        mappings
    }

    #[test]
    fn an_access_must_lie_in_mappings_that_allow_it() {
        let both = READ | WRITE;
        let map = mappings(&[
            (0x2000, 0x1000, both),
            (0x1000, 0x1000, both),
            (0x3000, 0x1000, READ),
        ]);
        for (iova, len, access, result) in [
            (0x1000, 0x2000, WRITE, Ok(())),
            (0x1fff, 2, WRITE, Ok(())),
            (0x1000, 0x3000, READ, Ok(())),
            (0x2fff, 2, WRITE, Err(Errno::ACCESS)),
            (0xfff, 2, READ, Err(Errno::FAULT)),
            (0x3fff, 2, READ, Err(Errno::FAULT)),
            (0x4000, 1, READ, Err(Errno::FAULT)),
            (u64::MAX, 1, READ, Err(Errno::FAULT)),
            (0, 0, WRITE, Ok(())),
        ] {
            assert_eq!(map.check(iova, len, access), result, "{iova:#x} {len:#x}");
        }
        map.remove(0x2000, 0x800);
        assert_eq!(map.check(0x2000, 1, WRITE), Ok(()), "no such mapping");
        map.remove(0x2000, 0x1000);
        assert_eq!(map.check(0x2000, 1, WRITE), Err(Errno::FAULT));
        assert_eq!(map.check(0x1fff, 1, WRITE), Ok(()));
    }

    #[test]
    fn the_end_of_the_address_space_can_be_mapped() {
        let map = mappings(&[(u64::MAX - 0xfff, 0x1000, WRITE)]);
        assert_eq!(map.check(u64::MAX - 1, 1, WRITE), Ok(()));
        assert_eq!(map.check(u64::MAX - 0x1000, 2, WRITE), Err(Errno::FAULT));
    }
}
