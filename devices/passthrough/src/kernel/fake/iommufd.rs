//! The part of the kernel within the test that is iommufd: objects with numbers, and who is
//! attached to which.

use std::collections::BTreeMap;
use std::os::fd::RawFd;

use rustix::io::Errno;
use zerocopy::FromBytes;

use crate::kernel::uapi::Message;
use crate::kernel::uapi::iommufd::{
    AttachMsg, BindMsg, DestroyMsg, HwInfoMsg, HwptAllocMsg, IoasAllocMsg, IoasUnmapMsg,
    SetDirtyTrackingMsg,
};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Object {
    Device,
    Ioas,
    /// And whether it tracks.
    Hwpt(bool),
}

/// iommufd.
#[derive(Default)]
pub(crate) struct Model {
    pub(crate) objects: BTreeMap<u32, Object>,
    pub(crate) last: u32,
    /// Which table each device is attached to.
    pub(crate) attached: BTreeMap<RawFd, u32>,
    /// All requests, in order.
    pub(crate) calls: Vec<Message>,
    /// What GET_HW_INFO says a device's IOMMU can; None: it is emulated.
    pub(crate) capabilities: Option<u64>,
    /// So many next ATTACH to a table are refused.
    pub(crate) refuse_tables: u32,
    /// First and last addresses, and how many of them there are said to be if that is not so.
    pub(crate) ranges: Vec<[u64; 2]>,
    pub(crate) ranges_told: Option<u32>,
    pub(crate) alignment: u64,
}

impl Model {
    fn make(&mut self, object: Object) -> u32 {
        self.last += 1;
        self.objects.insert(self.last, object);
        self.last
    }

    /// A request with a structure; `mapped` are the mappings.
    pub(super) fn request(
        &mut self,
        fd: RawFd,
        request: Message,
        message: &mut [u8],
        mapped: &mut Vec<vm_migration::RamRegion>,
    ) -> Result<i32, Errno> {
        self.calls.push(request);
        match request {
            Message::BindIommufd => {
                let bind = BindMsg::mut_from_bytes(message).unwrap();
                assert!(bind.iommufd >= 0);
                bind.out_devid = self.make(Object::Device);
            }
            Message::IoasAlloc => {
                let alloc = IoasAllocMsg::mut_from_bytes(message).unwrap();
                alloc.out_ioas_id = self.make(Object::Ioas);
            }
            Message::HwInfo => {
                let info = HwInfoMsg::mut_from_bytes(message).unwrap();
                assert_eq!(self.objects[&info.dev_id], Object::Device);
                info.out_capabilities = self.capabilities.ok_or(Errno::NOENT)?;
            }
            Message::HwptAlloc => {
                let alloc = HwptAllocMsg::mut_from_bytes(message).unwrap();
                assert_eq!(self.objects[&alloc.pt_id], Object::Ioas);
                assert_eq!(self.objects[&alloc.dev_id], Object::Device);
                assert_eq!(alloc.flags, 2, "DIRTY_TRACKING");
                alloc.out_hwpt_id = self.make(Object::Hwpt(false));
            }
            Message::AttachPt => {
                let attach = AttachMsg::mut_from_bytes(message).unwrap();
                let table = self.objects[&attach.pt_id];
                if let (Object::Hwpt(_), Some(left)) = (table, self.refuse_tables.checked_sub(1)) {
                    self.refuse_tables = left;
                    return Err(Errno::INVAL);
                }
                assert_ne!(table, Object::Device);
                self.attached.insert(fd, attach.pt_id);
            }
            Message::DetachPt => assert!(self.attached.remove(&fd).is_some()),
            Message::Destroy => {
                let destroy = DestroyMsg::mut_from_bytes(message).unwrap();
                if self.attached.values().any(|table| *table == destroy.id) {
                    return Err(Errno::BUSY);
                }
                self.objects.remove(&destroy.id).unwrap();
            }
            Message::IoasUnmap => {
                let unmap = IoasUnmapMsg::mut_from_bytes(message).unwrap();
                assert_eq!(self.objects[&unmap.ioas_id], Object::Ioas);
                mapped.retain(|ram| (ram.gpa.0, ram.len) != (unmap.iova, unmap.length));
            }
            Message::SetDirtyTracking => {
                let set = SetDirtyTrackingMsg::mut_from_bytes(message).unwrap();
                let there = self.objects.get_mut(&set.hwpt_id).unwrap();
                assert!(matches!(there, Object::Hwpt(_)));
                *there = Object::Hwpt(set.flags == 1);
            }
            _ => unreachable!("{request:?} is not of iommufd"),
        }
        Ok(0)
    }
}
