//! DEVICE_FEATURE: migration state and dirty log.

use rustix::io::Errno;

use super::dispatch::{Session, exact};
use crate::region::Area;
use crate::state::DeviceState;
use crate::wire::{
    AreaMsg, FEATURE_GET, FEATURE_MASK, FEATURE_PROBE, FEATURE_SET, Feature, FeatureMsg,
    LogReportMsg, LogStartMsg, MAX_LOG_RANGES, MAX_REPORT_BITMAP, MigStateMsg, PRECOPY_INFO_REINIT,
    PrecopyInfoMsg, argsz, bitmap_bytes, split,
};

/// Smallest page size of a report, the kernel's rule too.
const MIN_REPORT_PAGE: u64 = 4096;

impl Session<'_> {
    pub(super) fn feature(&mut self, payload: &[u8]) -> Result<(), Errno> {
        let (message, data) = split::<FeatureMsg>(payload).ok_or(Errno::INVAL)?;
        let operation = message.flags & !FEATURE_MASK;
        if operation & !(FEATURE_GET | FEATURE_SET | FEATURE_PROBE) != 0 {
            return Err(Errno::INVAL);
        }
        let feature = Feature::from_number(message.flags & FEATURE_MASK).ok_or(Errno::NOTTY)?;
        let offered = self.operations(feature).ok_or(Errno::NOTTY)?;
        if operation & FEATURE_PROBE != 0 {
            if operation & !(offered | FEATURE_PROBE) != 0 {
                return Err(Errno::INVAL);
            }
            self.put(&message);
            return Ok(());
        }
        // Without PROBE exactly one of GET and SET.
        if (operation != FEATURE_GET && operation != FEATURE_SET) || operation & offered == 0 {
            return Err(Errno::INVAL);
        }
        self.put(&message);
        match (feature, operation) {
            (Feature::Migration, _) => self.get_migration()?,
            (Feature::MigDeviceState, FEATURE_GET) => self.get_state()?,
            (Feature::MigDeviceState, _) => self.set_state(exact(data)?)?,
            (Feature::DmaLoggingStart, _) => self.log_start(data)?,
            (Feature::DmaLoggingStop, _) => self.log_stop()?,
            (Feature::DmaLoggingReport, _) => self.log_report(message.argsz, exact(data)?)?,
            (Feature::MigDataSize, _) => self.get_data_size()?,
            (Feature::MigPrecopyInfo, _) => self.get_precopy_info()?,
        }
        let full = FeatureMsg {
            argsz: argsz(self.out.len() + size_of_val(self.words.as_slice())),
            flags: message.flags,
        };
        let head = zerocopy::IntoBytes::as_bytes(&full);
        if let Some(front) = self.out.get_mut(..head.len()) {
            front.copy_from_slice(head);
        }
        Ok(())
    }

    /// The operations the device has for `feature`; `None` if it has not got the feature.
    fn operations(&mut self, feature: Feature) -> Option<u32> {
        let migrates = self.machine.is_some();
        let logs = self.device.dma_log().is_some();
        match feature {
            Feature::Migration | Feature::MigDataSize | Feature::MigPrecopyInfo => {
                migrates.then_some(FEATURE_GET)
            }
            Feature::MigDeviceState => migrates.then_some(FEATURE_GET | FEATURE_SET),
            Feature::DmaLoggingStart | Feature::DmaLoggingStop => logs.then_some(FEATURE_SET),
            Feature::DmaLoggingReport => logs.then_some(FEATURE_GET),
        }
    }

    fn get_migration(&mut self) -> Result<(), Errno> {
        let flags = self.machine.as_ref().ok_or(Errno::NOTTY)?.flags().bits();
        self.put(&flags);
        Ok(())
    }

    fn get_state(&mut self) -> Result<(), Errno> {
        let state = self.machine.as_ref().ok_or(Errno::NOTTY)?.state();
        self.put_state(state);
        Ok(())
    }

    fn put_state(&mut self, state: DeviceState) {
        self.put(&MigStateMsg {
            device_state: state.number(),
            data_fd: -1,
        });
    }

    fn set_state(&mut self, message: MigStateMsg) -> Result<(), Errno> {
        let target = DeviceState::from_number(message.device_state).ok_or(Errno::INVAL)?;
        let machine = self.machine.as_mut().ok_or(Errno::NOTTY)?;
        let migration = self.device.migration().ok_or(Errno::NOTTY)?;
        let before = machine.state();
        machine
            .transition(target, |arc| migration.arc(arc))
            .map_err(|error| {
                tracing::warn!(%error, from = %before, to = %target, "state not reached");
                error.errno()
            })?;
        self.put_state(target);
        Ok(())
    }

    fn get_data_size(&mut self) -> Result<(), Errno> {
        let size = self
            .device
            .migration()
            .ok_or(Errno::NOTTY)?
            .stop_copy_size()?;
        self.put(&size);
        Ok(())
    }

    fn get_precopy_info(&mut self) -> Result<(), Errno> {
        let state = self.machine.as_ref().ok_or(Errno::NOTTY)?.state();
        if !matches!(state, DeviceState::PreCopy | DeviceState::PreCopyP2p) {
            return Err(Errno::INVAL);
        }
        let info = self
            .device
            .migration()
            .ok_or(Errno::NOTTY)?
            .precopy_info()?;
        self.put(&PrecopyInfoMsg {
            argsz: argsz(size_of::<PrecopyInfoMsg>()),
            flags: if info.reinit { PRECOPY_INFO_REINIT } else { 0 },
            initial_bytes: info.initial_bytes,
            dirty_bytes: info.dirty_bytes,
        });
        Ok(())
    }

    fn log_start(&mut self, data: &[u8]) -> Result<(), Errno> {
        let (message, rest) = split::<LogStartMsg>(data).ok_or(Errno::INVAL)?;
        if self.logging || !message.page_size.is_power_of_two() {
            return Err(Errno::INVAL);
        }
        let ranges = parse_ranges(message, rest)?;
        let log = self.device.dma_log().ok_or(Errno::NOTTY)?;
        let chosen = log.start(message.page_size, &ranges)?;
        self.logging = true;
        self.put(&LogStartMsg {
            page_size: chosen,
            ..message
        });
        self.out.extend_from_slice(rest);
        Ok(())
    }

    fn log_stop(&mut self) -> Result<(), Errno> {
        self.device.dma_log().ok_or(Errno::NOTTY)?.stop()?;
        self.logging = false;
        Ok(())
    }

    fn log_report(&mut self, room: u32, message: LogReportMsg) -> Result<(), Errno> {
        if !self.logging
            || message.length == 0
            || message.page_size < MIN_REPORT_PAGE
            || !message.page_size.is_power_of_two()
        {
            return Err(Errno::INVAL);
        }
        if message.iova.checked_add(message.length - 1).is_none() {
            return Err(Errno::OVERFLOW);
        }
        let bytes = bitmap_bytes(message.length, message.page_size).ok_or(Errno::TOOBIG)?;
        if bytes > MAX_REPORT_BITMAP {
            return Err(Errno::TOOBIG);
        }
        // Checked before the report, because the report clears.
        let needed = size_of::<FeatureMsg>() + size_of::<LogReportMsg>() + bytes;
        if usize::try_from(room).is_ok_and(|room| room < needed) {
            return Err(Errno::INVAL);
        }
        self.put(&message);
        self.words.resize(bytes / 8, 0);
        let log = self.device.dma_log().ok_or(Errno::NOTTY)?;
        log.report(
            message.iova,
            message.length,
            message.page_size,
            &mut self.words,
        )
    }
}

/// The ranges of a START, sorted; the kernel's errnos for what is wrong with them.
fn parse_ranges(message: LogStartMsg, data: &[u8]) -> Result<Vec<Area>, Errno> {
    let count = usize::try_from(message.num_ranges).map_err(|_| Errno::TOOBIG)?;
    if count > MAX_LOG_RANGES {
        return Err(Errno::TOOBIG);
    }
    if data.len() != count * size_of::<AreaMsg>() {
        return Err(Errno::INVAL);
    }
    let mask = message.page_size - 1;
    let mut ranges = Vec::with_capacity(count);
    let mut rest = data;
    while let Some((area, after)) = split::<AreaMsg>(rest) {
        rest = after;
        if area.size == 0 || (area.offset | area.size) & mask != 0 {
            return Err(Errno::INVAL);
        }
        area.offset.checked_add(area.size).ok_or(Errno::OVERFLOW)?;
        ranges.push(Area {
            offset: area.offset,
            size: area.size,
        });
    }
    ranges.sort_unstable_by_key(|range| range.offset);
    let overlap = ranges.windows(2).any(|pair| match pair {
        [a, b] => a.offset + a.size > b.offset,
        _ => false,
    });
    if overlap {
        return Err(Errno::INVAL);
    }
    Ok(ranges)
}
