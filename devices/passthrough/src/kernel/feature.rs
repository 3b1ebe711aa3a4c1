//! `VFIO_DEVICE_FEATURE`: what a device can besides being a device.

use std::os::fd::BorrowedFd;

use rustix::io::Errno;
use vfio_user::wire::{FEATURE_GET, FEATURE_PROBE, FEATURE_SET, FeatureMsg, MigStateMsg};
use vfio_user::{DeviceState, Feature, Malformed, MigrationFlags};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::error::KernelError;
use super::sys::Kernel;
use super::uapi::{Message, NO_FD};

/// The features of a device.
pub(crate) struct Features<'a> {
    kernel: &'a dyn Kernel,
    device: BorrowedFd<'a>,
}

impl<'a> Features<'a> {
    pub(crate) fn new(kernel: &'a dyn Kernel, device: BorrowedFd<'a>) -> Self {
        Self { kernel, device }
    }

    /// One feature call; `data` goes with it and takes the answer.
    fn call<T: FromBytes + IntoBytes + Immutable>(&self, flags: u32, data: &T) -> Result<T, Errno> {
        let head = FeatureMsg { argsz: 0, flags };
        let mut message = [head.as_bytes(), data.as_bytes()].concat();
        self.kernel
            .message(self.device, Message::DeviceFeature, &mut message)?;
        let answer = message.get(size_of::<FeatureMsg>()..).unwrap_or_default();
        T::read_from_bytes(answer).map_err(|_| Errno::INVAL)
    }

    /// Whether the device has `feature`, whichever way it is used.
    pub(crate) fn has(&self, feature: Feature) -> Result<bool, KernelError> {
        match self.call(FEATURE_PROBE | feature.number(), &[0_u8; 0]) {
            Ok(_) => Ok(true),
            // No such feature; or a kernel that knows none at all.
            Err(Errno::NOTTY | Errno::OPNOTSUPP) => Ok(false),
            Err(cause) => Err(KernelError::refused("tell what the device can")(cause)),
        }
    }

    /// What its migration can do; `None` if it has none.
    pub(crate) fn migration(&self) -> Result<Option<MigrationFlags>, KernelError> {
        let flags = match self.call(FEATURE_GET | Feature::Migration.number(), &0_u64) {
            Ok(flags) => MigrationFlags::from_bits_truncate(flags),
            Err(Errno::NOTTY | Errno::OPNOTSUPP) => return Ok(None),
            Err(cause) => {
                return Err(KernelError::refused("tell what the device's migration can")(cause));
            }
        };
        // Legal are STOP_COPY alone and with either or both of the others.
        match flags.contains(MigrationFlags::STOP_COPY) {
            true => Ok(Some(flags)),
            false => Err(KernelError::Malformed {
                what: "the device's migration",
                cause: Malformed("it has no STOP_COPY"),
            }),
        }
    }

    /// Its migration state.
    pub(crate) fn state(&self) -> Result<DeviceState, KernelError> {
        let question = MigStateMsg {
            device_state: 0,
            data_fd: NO_FD,
        };
        let answer = self
            .call(FEATURE_GET | Feature::MigDeviceState.number(), &question)
            .map_err(KernelError::refused("tell the device's migration state"))?;
        DeviceState::from_number(answer.device_state)
            .ok_or(KernelError::UnknownState(answer.device_state))
    }

    /// What it says of its stop-copy data in bytes; `None` if it says nothing.
    pub(crate) fn stop_copy_size(&self) -> Result<Option<u64>, KernelError> {
        match self.call(FEATURE_GET | Feature::MigDataSize.number(), &0_u64) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(Errno::NOTTY | Errno::OPNOTSUPP) => Ok(None),
            Err(cause) => Err(KernelError::refused("tell the size of the device's state")(
                cause,
            )),
        }
    }

    /// Stops its dirty log; no error if there is none.
    pub(crate) fn stop_log(&self) -> Result<(), KernelError> {
        match self.call(FEATURE_SET | Feature::DmaLoggingStop.number(), &[0_u8; 0]) {
            // Drivers differ in what they say of a log that was not started.
            Ok(_) | Err(Errno::INVAL) => Ok(()),
            Err(cause) => Err(KernelError::refused("stop the device's dirty log")(cause)),
        }
    }
}
