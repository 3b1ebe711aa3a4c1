//! What a front end asks.

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVirtioFeatures,
    VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::log::Log;
use crate::rings::{Ring, used_index};
use crate::{Faults, Port};

/// Longest queue.
const QUEUE_SIZE: u16 = 1024;
/// `VIRTIO_F_VERSION_1`.
const VERSION_1: u64 = 1 << 32;
/// `VIRTIO_F_EVENT_IDX`.
const EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_INDIRECT_DESC`.
const INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_NET_F_MRG_RXBUF`.
const MRG_RXBUF: u64 = 1 << 15;

/// The backend as its front end knows it.
pub(crate) struct Device {
    pub(crate) ports: Vec<Port>,
    pub(crate) rings: Vec<Ring>,
    pub(crate) memory: Option<Arc<GuestMemoryMmap>>,
    pub(crate) log: Option<Log>,
    pub(crate) faults: Faults,
    features: u64,
    /// For others to see.
    logging: Arc<AtomicBool>,
    /// By which addresses the front end speaks of memory: theirs, length, GPA.
    spoken: Vec<(u64, u64, u64)>,
}

fn refused<T>(what: &'static str) -> Result<T> {
    Err(Error::InvalidOperation(what))
}

fn other(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::ReqHandlerError(io::Error::other(error))
}

fn event(file: Option<File>) -> Option<EventFd> {
    // SAFETY: the descriptor is owned by `file`, which gives it up.
    file.map(|file| unsafe { EventFd::from_raw_fd(file.into_raw_fd()) })
}

impl Device {
    pub(crate) fn new(ports: Vec<Port>, faults: Faults, logging: Arc<AtomicBool>) -> Self {
        let mut device = Self {
            ports,
            rings: Vec::new(),
            memory: None,
            log: None,
            faults,
            features: 0,
            logging,
            spoken: Vec::new(),
        };
        device.forget();
        device
    }

    /// As before any front end came.
    pub(crate) fn forget(&mut self) {
        self.rings = (0..self.ports.len() * 2)
            .filter_map(|_| Ring::new(QUEUE_SIZE).ok())
            .collect();
        (self.memory, self.log, self.features) = (None, None, 0);
        self.spoken.clear();
        self.show_logging();
    }

    fn show_logging(&self) {
        let logs = self.features & VhostUserVirtioFeatures::LOG_ALL.bits() != 0
            || self.rings.iter().any(|ring| ring.log_at.is_some());
        self.logging.store(logs, Ordering::SeqCst);
    }

    /// Whether what is written to the driver's buffers is logged.
    pub(crate) fn logs_buffers(&self) -> bool {
        self.features & VhostUserVirtioFeatures::LOG_ALL.bits() != 0 && !self.faults.forgets_buffers
    }

    fn ring(&mut self, index: u32) -> Result<&mut Ring> {
        let index = usize::try_from(index).map_err(|_| Error::InvalidParam)?;
        self.rings.get_mut(index).ok_or(Error::InvalidParam)
    }

    fn gpa(&self, address: u64) -> Result<u64> {
        let mut spoken = self.spoken.iter();
        let found = spoken.find(|(start, len, _)| {
            address
                .checked_sub(*start)
                .is_some_and(|offset| offset < *len)
        });
        let (start, _, gpa) = found.ok_or(Error::InvalidParam)?;
        Ok(gpa + (address - start))
    }
}

impl VhostUserBackendReqHandlerMut for Device {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        refused("reset owner")
    }

    fn reset_device(&mut self) -> Result<()> {
        refused("reset device")
    }

    fn get_features(&mut self) -> Result<u64> {
        let mut features = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
            | VERSION_1
            | EVENT_IDX
            | INDIRECT_DESC
            | MRG_RXBUF;
        if !self.faults.cannot_log {
            features |= VhostUserVirtioFeatures::LOG_ALL.bits();
        }
        Ok(features)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !self.get_features()? != 0 {
            return Err(Error::InvalidParam);
        }
        let log = features & VhostUserVirtioFeatures::LOG_ALL.bits() != 0;
        if log && self.log.is_none() && self.rings.iter().any(|ring| ring.runs()) {
            return refused("to log where there is no log");
        }
        self.features = features;
        self.show_logging();
        for ring in &mut self.rings {
            ring.queue.set_event_idx(features & EVENT_IDX != 0);
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let mut mapped = Vec::new();
        self.spoken.clear();
        for (region, file) in regions.iter().zip(files) {
            let start = GuestAddress(region.guest_phys_addr);
            let region_map = GuestRegionMmap::new(region.mmap_region(file)?, start);
            mapped.push(region_map.ok_or(Error::InvalidParam)?);
            let (user, len) = (region.user_addr, region.memory_size);
            self.spoken.push((user, len, region.guest_phys_addr));
        }
        let memory = GuestMemoryMmap::from_regions(mapped).map_err(other)?;
        self.memory = Some(Arc::new(memory));
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let size = u16::try_from(num).map_err(|_| Error::InvalidParam)?;
        let queue = &mut self.ring(index)?.queue;
        queue.try_set_size(size).map_err(other)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> Result<()> {
        let [descriptor, used, available] = [descriptor, used, available].map(|at| self.gpa(at));
        let (descriptor, used, available) = (descriptor?, used?, available?);
        let ring = self.ring(index)?;
        let queue = &mut ring.queue;
        queue
            .try_set_desc_table_address(GuestAddress(descriptor))
            .and_then(|()| queue.try_set_used_ring_address(GuestAddress(used)))
            .and_then(|()| queue.try_set_avail_ring_address(GuestAddress(available)))
            .map_err(other)?;
        let logged = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG);
        ring.log_at = logged.then_some(log);
        self.show_logging();
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        self.ring(index)?.queue.set_next_avail(base);
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let ring = self.ring(index)?;
        ring.queue.set_ready(false);
        (ring.kick, ring.call) = (None, None);
        Ok(VhostUserVringState::new(
            index,
            ring.queue.next_avail().into(),
        ))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let memory = self.memory.clone().ok_or(Error::InvalidParam)?;
        let ring = self.ring(index.into())?;
        ring.kick = event(file);
        let used = used_index(&ring.queue, &memory).map_err(other)?;
        ring.queue.set_next_used(used);
        ring.queue.set_ready(true);
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        self.ring(index.into())?.call = event(file);
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, _file: Option<File>) -> Result<()> {
        self.ring(index.into()).map(drop)
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        let mut features = VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::LOG_SHMFD;
        if !self.faults.no_acknowledgements {
            features |= VhostUserProtocolFeatures::REPLY_ACK;
        }
        Ok(features)
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        u64::try_from(self.rings.len()).map_err(other)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.ring(index)?.enabled = enable;
        Ok(())
    }

    fn get_config(&mut self, _: u32, _: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        refused("configuration")
    }

    fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        refused("configuration")
    }

    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        refused("graphics")
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        refused("shared objects")
    }

    fn get_inflight_fd(&mut self, _: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        refused("inflight buffers")
    }

    fn set_inflight_fd(&mut self, _: &VhostUserInflight, _: File) -> Result<()> {
        refused("inflight buffers")
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        refused("memory slots")
    }

    fn add_mem_region(
        &mut self,
        _: &VhostUserSingleMemoryRegion,
        _: File,
        _: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        refused("memory slots")
    }

    fn remove_mem_region(&mut self, _: &VhostUserSingleMemoryRegion) -> Result<()> {
        refused("memory slots")
    }

    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        refused("device state")
    }

    fn check_device_state(&mut self) -> Result<()> {
        refused("device state")
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        refused("shared memory")
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        self.log = Some(Log::map(file, log.mmap_offset, log.mmap_size).map_err(other)?);
        Ok(())
    }
}
