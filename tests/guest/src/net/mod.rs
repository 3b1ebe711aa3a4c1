//! virtio-net functions: finding them, and driving all of them together.

mod device;
mod nic;
mod pool;
mod queue;

use guest_logic::args::Args;

use crate::memory::Ram;
use crate::pci::Access;
use crate::serial::say;

use self::device::Device;
pub(crate) use self::nic::Nic;

/// Most NICs driven.
pub(crate) const MAX_NICS: usize = 8;

/// All NICs, in the order of their slots.
pub(crate) struct Nics {
    nics: [Option<Nic>; MAX_NICS],
}

impl Nics {
    /// Finds every virtio-net function and takes memory for it from `ram`.
    pub(crate) fn find(args: &Args<'_>, ram: &mut Ram) -> Self {
        let mut found = Self {
            nics: [const { None }; MAX_NICS],
        };
        let devices = Access::find(args).into_iter().flat_map(Access::functions);
        let mut slots = found.nics.iter_mut().zip(0..);
        for function in devices.filter(device::is_net) {
            let Some((slot, index)) = slots.next() else {
                break;
            };
            let (number, part) = function.slot();
            let nic = Device::new(function).and_then(|device| Nic::new(device, index, args, ram));
            match nic {
                Ok(nic) => {
                    say!("NIC {{\"index\":{index},\"slot\":\"{number:02x}.{part}\",{nic}}}");
                    *slot = Some(nic);
                }
                Err(why) => say!("FAIL nic {index} at {number:02x}.{part}: {why}"),
            }
        }
        found
    }

    /// Lets all NICs receive.
    pub(crate) fn start(&mut self) {
        self.iter_mut().for_each(Nic::start);
    }

    /// Serves all NICs; whether any had work.
    pub(crate) fn poll(&mut self, now: u64) -> bool {
        self.iter_mut()
            .fold(false, |busy, nic| nic.poll(now) | busy)
    }

    /// Stops the NICs in these slots (bit n for slot n) and forgets them.
    pub(crate) fn let_go(&mut self, slots: u32) {
        for place in &mut self.nics {
            if let Some(nic) = place
                && slots >> nic.slot() & 1 != 0
            {
                nic.stop();
                *place = None;
            }
        }
    }

    /// The NICs that work.
    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Nic> {
        self.nics.iter_mut().flatten()
    }
}
