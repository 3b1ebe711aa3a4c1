//! KVM's own device of type VFIO, which is told of the files that a VM's devices come by: it then
//! lets the guest's cache attributes count where a device does not snoop, and tells the drivers that
//! ask for it which VM they work for.

use std::os::fd::{AsRawFd, BorrowedFd};

use kvm_bindings::{
    KVM_DEV_VFIO_FILE, KVM_DEV_VFIO_FILE_ADD, KVM_DEV_VFIO_FILE_DEL, kvm_create_device,
    kvm_device_attr, kvm_device_type_KVM_DEV_TYPE_VFIO,
};
use kvm_ioctls::{DeviceFd, VmFd};
use parking_lot::Mutex;

use crate::Error;

/// The device, once it is needed. There is one to a VM.
#[derive(Default)]
pub(super) struct VfioDevice(Mutex<Option<DeviceFd>>);

impl VfioDevice {
    pub(super) fn add(&self, vm: &VmFd, file: BorrowedFd<'_>) -> Result<(), Error> {
        let mut made = self.0.lock();
        let device = match made.take() {
            Some(device) => device,
            None => create(vm)?,
        };
        let told = tell(&device, KVM_DEV_VFIO_FILE_ADD, file);
        *made = Some(device);
        told
    }

    pub(super) fn remove(&self, file: BorrowedFd<'_>) -> Result<(), Error> {
        match &*self.0.lock() {
            Some(device) => tell(device, KVM_DEV_VFIO_FILE_DEL, file),
            // None was added.
            None => Ok(()),
        }
    }
}

fn create(vm: &VmFd) -> Result<DeviceFd, Error> {
    let mut request = kvm_create_device {
        type_: kvm_device_type_KVM_DEV_TYPE_VFIO,
        ..Default::default()
    };
    vm.create_device(&mut request)
        .map_err(|cause| match cause.errno() {
            libc::ENODEV | libc::ENOTTY => Error::Unsupported {
                operation: "telling KVM of devices behind VFIO",
                capability: "KVM_DEV_TYPE_VFIO",
            },
            _ => Error::ioctl("KVM_CREATE_DEVICE (VFIO)")(cause),
        })
}

fn tell(device: &DeviceFd, attribute: u32, file: BorrowedFd<'_>) -> Result<(), Error> {
    let file = file.as_raw_fd();
    let attribute = kvm_device_attr {
        group: KVM_DEV_VFIO_FILE,
        attr: attribute.into(),
        // An address always fits 64 bits. The kernel reads an int there during the call.
        addr: std::ptr::from_ref(&file) as u64,
        flags: 0,
    };
    device
        .set_device_attr(&attribute)
        .map_err(Error::ioctl("KVM_SET_DEVICE_ATTR (VFIO)"))
}
