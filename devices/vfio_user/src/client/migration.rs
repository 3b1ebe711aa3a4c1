//! Migration states, migration data and the dirty log, from the VMM's end.

use zerocopy::{FromBytes, IntoBytes};

use super::{Client, ClientError, fixed};
use crate::link::Outgoing;
use crate::region::{Area, Malformed};
use crate::state::{DeviceState, MigrationFlags, PrecopyInfo};
use crate::wire::{
    AreaMsg, Command, FEATURE_GET, FEATURE_PROBE, FEATURE_SET, Feature, FeatureMsg, LogReportMsg,
    LogStartMsg, MAX_LOG_RANGES, MAX_REPORT_BITMAP, MigDataMsg, MigStateMsg, PRECOPY_INFO_REINIT,
    PrecopyInfoMsg, argsz, bitmap_bytes, split,
};

/// What to do with a feature.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FeatureOperation {
    /// Ask for its data.
    Get,
    /// Set it.
    Set,
}

impl FeatureOperation {
    const fn bits(self) -> u32 {
        match self {
            Self::Get => FEATURE_GET,
            Self::Set => FEATURE_SET,
        }
    }
}

const COMMAND: Command = Command::DeviceFeature;

impl Client {
    /// Whether the device has `feature` for `operation`.
    ///
    /// # Errors
    /// [`ClientError`] other than a refusal, which is the answer no.
    pub fn probe_feature(
        &self,
        feature: Feature,
        operation: FeatureOperation,
    ) -> Result<bool, ClientError> {
        let message = FeatureMsg {
            argsz: argsz(size_of::<FeatureMsg>()),
            flags: feature.number() | FEATURE_PROBE | operation.bits(),
        };
        let expect = self.expect(size_of::<FeatureMsg>());
        match self.call(COMMAND, fixed(&message), expect, |_, _| Ok(())) {
            Ok(()) => Ok(true),
            Err(ClientError::Refused { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Gets or sets a feature whose data has a fixed size; `room` bytes of reply data are taken.
    fn feature<T>(
        &self,
        feature: Feature,
        operation: FeatureOperation,
        data: &[u8],
        room: usize,
        parse: impl FnOnce(&[u8]) -> Result<T, Malformed>,
    ) -> Result<T, ClientError> {
        let payload = size_of::<FeatureMsg>() + room;
        let message = FeatureMsg {
            argsz: argsz(payload),
            flags: feature.number() | operation.bits(),
        };
        let outgoing = Outgoing {
            data,
            ..fixed(&message)
        };
        // State changes may save or load much; the rest answers at once.
        let expect = match operation {
            FeatureOperation::Get => self.expect(payload),
            FeatureOperation::Set => self.expect_slow(payload),
        };
        self.call(COMMAND, outgoing, expect, |reply, _| {
            let (head, data) = split::<FeatureMsg>(reply).ok_or(Malformed("it is too short"))?;
            if head.flags != message.flags {
                return Err(Malformed("it is of another feature"));
            }
            parse(data)
        })
    }

    /// What the device's migration can do; `None` if it has none.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn migration_flags(&self) -> Result<Option<MigrationFlags>, ClientError> {
        let got = self.feature(Feature::Migration, FeatureOperation::Get, &[], 8, structure);
        let bits: u64 = match got {
            Ok(bits) => bits,
            Err(ClientError::Refused { .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        let flags = MigrationFlags::from_bits_truncate(bits);
        if !flags.contains(MigrationFlags::STOP_COPY) {
            return Err(ClientError::BadReply {
                command: COMMAND,
                reason: "the device migrates without STOP_COPY",
            });
        }
        Ok(Some(flags))
    }

    /// The device's migration state.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn device_state(&self) -> Result<DeviceState, ClientError> {
        self.feature(
            Feature::MigDeviceState,
            FeatureOperation::Get,
            &[],
            size_of::<MigStateMsg>(),
            parse_state,
        )
    }

    /// Brings the device to `state`.
    ///
    /// # Errors
    /// [`ClientError`]; the state may be any on the way then: ask [`device_state`](Self::device_state).
    pub fn set_device_state(&self, state: DeviceState) -> Result<(), ClientError> {
        let message = MigStateMsg {
            device_state: state.number(),
            data_fd: -1,
        };
        self.feature(
            Feature::MigDeviceState,
            FeatureOperation::Set,
            message.as_bytes(),
            size_of::<MigStateMsg>(),
            |_| Ok(()),
        )
    }

    /// The server's estimate of the data to read once the device is stopped; `None` if it gives
    /// none (our extension of vfio-user by the kernel's feature).
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn stop_copy_size(&self) -> Result<Option<u64>, ClientError> {
        let feature = Feature::MigDataSize;
        match self.feature(feature, FeatureOperation::Get, &[], 8, structure) {
            Ok(size) => Ok(Some(size)),
            Err(ClientError::Refused { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// What there is to read of a device in PRE_COPY; `None` if the server does not tell (our
    /// extension of vfio-user by the kernel's structure).
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn precopy_info(&self) -> Result<Option<PrecopyInfo>, ClientError> {
        let room = size_of::<PrecopyInfoMsg>();
        let feature = Feature::MigPrecopyInfo;
        let got = self.feature(feature, FeatureOperation::Get, &[], room, structure);
        let message: PrecopyInfoMsg = match got {
            Ok(message) => message,
            Err(ClientError::Refused { .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        Ok(Some(PrecopyInfo {
            initial_bytes: message.initial_bytes,
            dirty_bytes: message.dirty_bytes,
            reinit: message.flags & PRECOPY_INFO_REINIT != 0,
        }))
    }

    /// Reads migration data; fewer bytes than `data` holds mean that there is no more, now
    /// (pre-copy) or at all (stop-copy). At most one message's worth
    /// ([`Capabilities::data_xfer`](crate::Capabilities::data_xfer)) is read, so give no more.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn read_migration_data(&self, data: &mut [u8]) -> Result<usize, ClientError> {
        let command = Command::MigDataRead;
        if data.len() > self.server().data_xfer() {
            return Err(ClientError::Argument {
                command,
                reason: "more data is asked for than goes into one message",
            });
        }
        let payload = size_of::<MigDataMsg>() + data.len();
        let message = MigDataMsg {
            argsz: argsz(payload),
            size: argsz(data.len()),
        };
        let expect = self.expect(payload);
        self.call(command, fixed(&message), expect, |reply, _| {
            let (head, bytes) = split::<MigDataMsg>(reply).ok_or(Malformed("it is too short"))?;
            if usize::try_from(head.size) != Ok(bytes.len()) {
                return Err(Malformed("its size is not that of its data"));
            }
            let target = data
                .get_mut(..bytes.len())
                .ok_or(Malformed("it has more data than was asked for"))?;
            target.copy_from_slice(bytes);
            Ok(bytes.len())
        })
    }

    /// Writes migration data, in as many messages as it takes.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn write_migration_data(&self, data: &[u8]) -> Result<(), ClientError> {
        for chunk in data.chunks(self.server().data_xfer()) {
            let message = MigDataMsg {
                argsz: argsz(size_of::<MigDataMsg>() + chunk.len()),
                size: argsz(chunk.len()),
            };
            let outgoing = Outgoing {
                data: chunk,
                ..fixed(&message)
            };
            // Servers may echo the head.
            let expect = self.expect(size_of::<MigDataMsg>());
            self.call(Command::MigDataWrite, outgoing, expect, |_, _| Ok(()))?;
        }
        Ok(())
    }

    /// Starts the log of the device's writes to `ranges` (aligned to `page_size`, apart, not
    /// empty; none for all memory) and gives the page size it chose.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn start_dma_logging(&self, page_size: u64, ranges: &[Area]) -> Result<u64, ClientError> {
        if ranges.len() > MAX_LOG_RANGES {
            return Err(ClientError::Argument {
                command: COMMAND,
                reason: "there are more than 256 ranges to log: merge some",
            });
        }
        let message = LogStartMsg {
            page_size,
            num_ranges: argsz(ranges.len()),
            reserved: 0,
        };
        let mut data = message.as_bytes().to_vec();
        for range in ranges {
            let area = AreaMsg {
                offset: range.offset,
                size: range.size,
            };
            data.extend_from_slice(area.as_bytes());
        }
        let room = data.len();
        let feature = Feature::DmaLoggingStart;
        self.feature(feature, FeatureOperation::Set, &data, room, |reply| {
            let (reply, _) = split::<LogStartMsg>(reply).ok_or(Malformed("it is too short"))?;
            if !reply.page_size.is_power_of_two() {
                return Err(Malformed("its page size is not a power of two"));
            }
            Ok(reply.page_size)
        })
    }

    /// Stops the log.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn stop_dma_logging(&self) -> Result<(), ClientError> {
        let feature = Feature::DmaLoggingStop;
        self.feature(feature, FeatureOperation::Set, &[], 0, |_| Ok(()))
    }

    /// ORs into `words` which pages of `page_size` in a range the device wrote since the last
    /// report; bit n is the page at `iova + n * page_size`. The log is cleared. Some servers want
    /// the range to be exactly one DMA mapping.
    ///
    /// # Errors
    /// [`ClientError`]: what was written is unknown then.
    pub fn report_dma_log(
        &self,
        iova: u64,
        length: u64,
        page_size: u64,
        words: &mut [u64],
    ) -> Result<(), ClientError> {
        let refused = |reason| ClientError::Argument {
            command: COMMAND,
            reason,
        };
        let bytes = bitmap_bytes(length, page_size)
            .filter(|bytes| *bytes <= MAX_REPORT_BITMAP)
            .ok_or_else(|| refused("the dirty bitmap would be larger than 64 MiB"))?;
        if bytes != size_of_val(words) {
            return Err(refused("the buffer for the dirty bitmap has another size"));
        }
        let message = LogReportMsg {
            iova,
            length,
            page_size,
        };
        let room = size_of::<LogReportMsg>() + bytes;
        let feature = Feature::DmaLoggingReport;
        let data = message.as_bytes();
        self.feature(feature, FeatureOperation::Get, data, room, |reply| {
            let (head, bitmap) =
                split::<LogReportMsg>(reply).ok_or(Malformed("it is too short"))?;
            if head != message || bitmap.len() != bytes {
                return Err(Malformed("it reports another range than was asked for"));
            }
            for (word, bits) in words.iter_mut().zip(bitmap.chunks_exact(8)) {
                *word |= u64::read_from_bytes(bits).unwrap_or(u64::MAX);
            }
            Ok(())
        })
    }
}

fn structure<T: FromBytes>(data: &[u8]) -> Result<T, Malformed> {
    T::read_from_bytes(data).map_err(|_| Malformed("it has another length"))
}

fn parse_state(data: &[u8]) -> Result<DeviceState, Malformed> {
    let message: MigStateMsg = structure(data)?;
    DeviceState::from_number(message.device_state).ok_or(Malformed("it names an unknown state"))
}
