//! Which guest memory the addresses of a device lead to.

use std::collections::BTreeMap;

use crate::addr::{Gpa, Iova, IovaRange, PageSize};

/// What mappings start and end on: the smallest page of any IOMMU, 4 KiB.
pub const MAP_PAGE: PageSize = PageSize::SIZE_4K;

/// Why a mapping cannot be made, or taken away.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum MapError {
    /// The device's addresses are none, or run past the end of the 64-bit space.
    #[error("{len:#x} bytes from IOVA {iova} are no range: give 1 page or more, within 2^64")]
    BadIova {
        /// First address.
        iova: Iova,
        /// Length in bytes.
        len: u64,
    },
    /// The guest's addresses run past the end of the 64-bit space.
    #[error("{len:#x} bytes from GPA {gpa} run past 2^64: map less")]
    BadGpa {
        /// First address.
        gpa: Gpa,
        /// Length in bytes.
        len: u64,
    },
    /// It does not start and end with a page, see [`MAP_PAGE`].
    #[error(
        "{len:#x} bytes from IOVA {iova} to GPA {gpa} are not whole pages of 4 KiB: align them"
    )]
    Misaligned {
        /// First address of the device.
        iova: Iova,
        /// First address of the guest.
        gpa: Gpa,
        /// Length in bytes.
        len: u64,
    },
    /// Some of its IOVAs are mapped already.
    #[error("IOVA {first} to {last} is mapped already: unmap it first")]
    Overlap {
        /// First address of the mapping that is there.
        first: Iova,
        /// Its last address.
        last: Iova,
    },
    /// Its IOVAs are not all in one range that the log is started for.
    #[error("IOVA {first} to {last} is outside of the aperture, where writes are not logged")]
    OutsideAperture {
        /// First address of the mapping.
        first: Iova,
        /// Its last address.
        last: Iova,
    },
    /// Only a part of a mapping would go.
    #[error("the mapping of IOVA {first} to {last} can only be unmapped whole")]
    Splits {
        /// First address of the mapping.
        first: Iova,
        /// Its last address.
        last: Iova,
    },
    /// There is nothing for a log to be started for.
    #[error("a map needs an address: give at least one range, or one mapping")]
    Empty,
}

/// Addresses of the guest next to each other, both ends inclusive; never empty.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct GpaRange {
    pub(super) first: Gpa,
    pub(super) last: Gpa,
}

/// A range of a device's addresses, and where in guest memory it leads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mapping {
    iova: IovaRange,
    gpa: Gpa,
}

impl Mapping {
    /// `len` bytes from `iova` lead to as many from `gpa`.
    ///
    /// # Errors
    /// [`MapError::BadIova`], [`MapError::BadGpa`], [`MapError::Misaligned`].
    pub fn new(iova: Iova, gpa: Gpa, len: u64) -> Result<Self, MapError> {
        let range = IovaRange::new(iova, len).ok_or(MapError::BadIova { iova, len })?;
        let more = range.last().0 - range.first().0;
        if gpa.0.checked_add(more).is_none() {
            return Err(MapError::BadGpa { gpa, len });
        }
        if (iova.0 | gpa.0 | len) & (MAP_PAGE.bytes() - 1) != 0 {
            return Err(MapError::Misaligned { iova, gpa, len });
        }
        Ok(Self { iova: range, gpa })
    }

    /// The device's addresses.
    pub const fn iova(self) -> IovaRange {
        self.iova
    }

    /// Where the first of them leads.
    pub const fn gpa(self) -> Gpa {
        self.gpa
    }

    /// Where those addresses of `part` lead that are in this mapping.
    pub(super) fn translate(self, part: IovaRange) -> Option<GpaRange> {
        let part = part.intersection(self.iova)?;
        // Neither sum wraps: `part` is within, and the end of all was checked when this was made.
        let at = |iova: Iova| Gpa(self.gpa.0 + (iova.0 - self.iova.first().0));
        Some(GpaRange {
            first: at(part.first()),
            last: at(part.last()),
        })
    }
}

/// The mappings of one device, in rising order of its addresses; see the [module](super).
#[derive(Clone, Debug)]
pub struct IovaMap {
    /// What a log is started for: sorted, with gaps between.
    aperture: Vec<IovaRange>,
    /// By their first address; none overlaps another.
    mappings: BTreeMap<Iova, Mapping>,
    /// The OR of all addresses at which mappings ever started and ended.
    ends: u64,
}

impl IovaMap {
    /// These mappings, in any order; the aperture is just their addresses.
    ///
    /// # Errors
    /// [`MapError::Overlap`], [`MapError::Empty`].
    pub fn ranges(mappings: &[Mapping]) -> Result<Self, MapError> {
        let iovas: Vec<IovaRange> = mappings.iter().map(|mapping| mapping.iova).collect();
        let mut map = Self::live(&iovas)?;
        for mapping in mappings {
            map.check(*mapping)?;
            map.insert(*mapping);
        }
        Ok(map)
    }

    /// No mapping yet, but room for some in `aperture`.
    ///
    /// # Errors
    /// [`MapError::Empty`].
    pub fn live(aperture: &[IovaRange]) -> Result<Self, MapError> {
        let mut sorted = aperture.to_vec();
        sorted.sort_unstable();
        let mut merged: Vec<IovaRange> = Vec::with_capacity(sorted.len());
        for range in sorted {
            let joined = merged
                .last()
                .filter(|before| range.first().0 <= before.last().0.saturating_add(1))
                .and_then(|before| {
                    IovaRange::from_ends(before.first(), before.last().max(range.last()))
                });
            match (joined, merged.last_mut()) {
                (Some(joined), Some(last)) => *last = joined,
                _ => merged.push(range),
            }
        }
        if merged.is_empty() {
            return Err(MapError::Empty);
        }
        Ok(Self {
            aperture: merged,
            mappings: BTreeMap::new(),
            ends: 0,
        })
    }

    /// The addresses in which mappings can be, sorted, with gaps between.
    pub fn aperture(&self) -> &[IovaRange] {
        &self.aperture
    }

    /// The mappings that have an address in `range`, in rising order.
    pub fn touching(&self, range: IovaRange) -> impl Iterator<Item = Mapping> + '_ {
        let before = self.mappings.range(..range.first()).next_back();
        let from = match before {
            Some((first, mapping)) if mapping.iova.last() >= range.first() => *first,
            _ => range.first(),
        };
        self.mappings
            .range(from..=range.last())
            .map(|(_, mapping)| *mapping)
    }

    /// Whether `mapping` can be added.
    pub(super) fn check(&self, mapping: Mapping) -> Result<(), MapError> {
        let (first, last) = (mapping.iova.first(), mapping.iova.last());
        let within = |range: &IovaRange| range.first() <= first && last <= range.last();
        if !self.aperture.iter().any(within) {
            return Err(MapError::OutsideAperture { first, last });
        }
        match self.touching(mapping.iova).next() {
            Some(there) => Err(MapError::Overlap {
                first: there.iova.first(),
                last: there.iova.last(),
            }),
            None => Ok(()),
        }
    }

    /// Adds what was [checked](Self::check).
    pub(super) fn insert(&mut self, mapping: Mapping) {
        self.ends |= mapping.iova.first().0 | mapping.gpa.0 | !mapping.iova.last().0;
        self.mappings.insert(mapping.iova.first(), mapping);
    }

    /// Whether no mapping lies partly in `range`.
    pub(super) fn check_whole(&self, range: IovaRange) -> Result<(), MapError> {
        let split = self
            .touching(range)
            .find(|mapping| mapping.iova.intersection(range) != Some(mapping.iova));
        match split {
            Some(mapping) => Err(MapError::Splits {
                first: mapping.iova.first(),
                last: mapping.iova.last(),
            }),
            None => Ok(()),
        }
    }

    /// Takes away the mappings in `range`, which was [checked](Self::check_whole).
    pub(super) fn remove(&mut self, range: IovaRange) {
        let next = |map: &Self| map.touching(range).next();
        while let Some(mapping) = next(self) {
            self.mappings.remove(&mapping.iova.first());
        }
    }

    /// Whether all mappings there ever were start and end with pages of this size, in both spaces.
    pub(super) fn is_aligned_to(&self, page: PageSize) -> bool {
        self.ends & (page.bytes() - 1) == 0
    }

    /// The next addresses at or after `from`, up to `until`, to ask a log of this page size for:
    /// mapped throughout, whole pages of the log, and at most `most` bytes, which is a multiple of
    /// such pages.
    pub(super) fn stretch(
        &self,
        from: Iova,
        until: Iova,
        page: PageSize,
        most: u64,
    ) -> Option<IovaRange> {
        let within = page.bytes() - 1;
        let mut mappings = self.touching(IovaRange::from_ends(from, until)?);
        let mapping = mappings.next()?;
        let start = mapping.iova.first().max(from).0 & !within;
        let limit = start.saturating_add(most.saturating_sub(1)) | within;
        let mut last = mapping.iova.last().0 | within;
        for next in mappings {
            if last >= limit || next.iova.first().0 > last.saturating_add(1) {
                break;
            }
            last = last.max(next.iova.last().0 | within);
        }
        let last = last.min(limit).min(until.0 | within);
        IovaRange::from_ends(Iova(start), Iova(last))
    }
}
