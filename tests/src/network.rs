//! The network that a guest moves in: a bridge with the host's addresses, and a tap for each end
//! of a migration.

use anyhow::Result;
use serde_json::{Value, json};

use crate::netns;
use crate::traffic::{Traffic, TrafficConfig};

/// The network of one NIC of the guest's. Its interfaces are in this thread's namespace.
#[derive(Clone, Copy, Debug)]
pub struct Network {
    /// The NIC's place among the guest's, below 10.
    pub index: u8,
}

impl Network {
    /// Makes the bridge and the taps.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn new(index: u8) -> Result<Self> {
        let this = Self { index };
        let bridge = this.bridge();
        netns::ip(&["link", "add", &bridge, "type", "bridge"])?;
        netns::ip(&["link", "set", &bridge, "up"])?;
        for end in 0..2 {
            let tap = this.tap(end);
            netns::add_tap(&tap, 1, &[])?;
            netns::ip(&["link", "set", &tap, "master", &bridge])?;
        }
        let v4 = format!("10.77.{index}.1/24");
        let v6 = format!("fd77:{index}::1/64");
        netns::ip(&["addr", "add", &v4, "dev", &bridge])?;
        netns::ip(&["addr", "add", &v6, "dev", &bridge, "nodad"])?;
        Ok(this)
    }

    /// The bridge's name.
    pub fn bridge(self) -> String {
        format!("ftbr{}", self.index)
    }

    /// The name of one end's tap; even ends have the first, odd ones the second.
    pub fn tap(self, end: usize) -> String {
        format!("ft{}{}", self.index, ["a", "b"][end % 2])
    }

    /// The guest's MAC address.
    pub fn mac(self) -> String {
        format!("52:54:00:77:00:0{}", self.index)
    }

    /// The identifier of the device.
    pub fn id(self) -> String {
        format!("net{}", self.index)
    }

    /// A virtio-net device with hash reports on one end's tap, as `vm.create` takes it.
    pub fn device(self, end: usize) -> Value {
        json!({
            "id": self.id(),
            "tap": self.tap(end),
            "mac": self.mac(),
            "hash_report": true,
        })
    }

    /// Its counterpart for `vm.receive-migration`.
    pub fn received(self, end: usize) -> Value {
        json!({"id": self.id(), "tap": self.tap(end)})
    }

    /// Four flows to the guest, IPv4 and IPv6.
    ///
    /// # Errors
    /// As [`Traffic::start`].
    pub fn traffic(self, packets_per_second: u32) -> Result<Traffic> {
        let index = self.index;
        Traffic::start(&TrafficConfig {
            interface: self.bridge(),
            guest_mac: self.mac(),
            addresses: vec![
                (
                    format!("10.77.{index}.1").parse()?,
                    format!("10.77.{index}.2").parse()?,
                ),
                (
                    format!("fd77:{index}::1").parse()?,
                    format!("fd77:{index}::2").parse()?,
                ),
            ],
            flows: 4,
            payload: 900,
            packets_per_second,
        })
    }
}
