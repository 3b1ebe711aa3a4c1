//! Which large and unfinished packets a tap may hand over.

/// Virtio feature bits by which the driver takes such packets (VIRTIO 1.4 §5.1.3).
mod feature {
    pub(super) const GUEST_CSUM: u64 = 1 << 1;
    pub(super) const GUEST_TSO4: u64 = 1 << 7;
    pub(super) const GUEST_TSO6: u64 = 1 << 8;
    pub(super) const GUEST_ECN: u64 = 1 << 9;
    pub(super) const GUEST_UFO: u64 = 1 << 10;
    pub(super) const GUEST_USO4: u64 = 1 << 54;
    pub(super) const GUEST_USO6: u64 = 1 << 55;
}

/// `TUN_F_*` of uapi `linux/if_tun.h`.
mod tun {
    pub(super) const CSUM: u32 = 0x01;
    pub(super) const TSO4: u32 = 0x02;
    pub(super) const TSO6: u32 = 0x04;
    pub(super) const TSO_ECN: u32 = 0x08;
    pub(super) const UFO: u32 = 0x10;
    pub(super) const USO4: u32 = 0x20;
    pub(super) const USO6: u32 = 0x40;
}

/// Offloads for [`TapQueue::set_offloads`](super::TapQueue::set_offloads).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Offloads(u32);

impl Offloads {
    /// Every packet comes finished and of the MTU's size.
    pub const NONE: Self = Self(0);

    /// What the driver said it takes, by its virtio feature bits; or, at runtime, by the body of
    /// `VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET`, which has the same bits.
    ///
    /// What `tun.c` refuses in combination is left out, which is always correct towards the
    /// guest: everything without checksums, ECN without TCP, UDP segmentation of one IP version.
    pub fn from_guest_features(features: u64) -> Self {
        let has = |bits: u64| features & bits == bits;
        if !has(feature::GUEST_CSUM) {
            return Self::NONE;
        }
        let mut bits = tun::CSUM;
        if has(feature::GUEST_TSO4) {
            bits |= tun::TSO4;
        }
        if has(feature::GUEST_TSO6) {
            bits |= tun::TSO6;
        }
        if has(feature::GUEST_ECN) && bits & (tun::TSO4 | tun::TSO6) != 0 {
            bits |= tun::TSO_ECN;
        }
        if has(feature::GUEST_UFO) {
            bits |= tun::UFO;
        }
        if has(feature::GUEST_USO4 | feature::GUEST_USO6) {
            bits |= tun::USO4 | tun::USO6;
        }
        Self(bits)
    }

    /// The `TUN_F_*` bits.
    pub const fn bits(self) -> u32 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use virtio_bindings::virtio_net as uapi;

    use super::*;

    #[test]
    fn feature_bits_are_those_of_the_uapi() {
        for (mask, bit) in [
            (feature::GUEST_CSUM, uapi::VIRTIO_NET_F_GUEST_CSUM),
            (feature::GUEST_TSO4, uapi::VIRTIO_NET_F_GUEST_TSO4),
            (feature::GUEST_TSO6, uapi::VIRTIO_NET_F_GUEST_TSO6),
            (feature::GUEST_ECN, uapi::VIRTIO_NET_F_GUEST_ECN),
            (feature::GUEST_UFO, uapi::VIRTIO_NET_F_GUEST_UFO),
            (feature::GUEST_USO4, uapi::VIRTIO_NET_F_GUEST_USO4),
            (feature::GUEST_USO6, uapi::VIRTIO_NET_F_GUEST_USO6),
        ] {
            assert_eq!(mask, 1 << bit);
        }
    }

    #[test]
    fn what_the_kernel_refuses_is_left_out() {
        use feature::*;
        let bits = |features| Offloads::from_guest_features(features).bits();
        assert_eq!(bits(0), 0);
        assert_eq!(bits(GUEST_TSO4 | GUEST_UFO), 0);
        assert_eq!(bits(GUEST_CSUM), tun::CSUM);
        assert_eq!(bits(GUEST_CSUM | GUEST_ECN), tun::CSUM);
        assert_eq!(bits(GUEST_CSUM | GUEST_USO4), tun::CSUM);
        assert_eq!(
            bits(GUEST_CSUM | GUEST_TSO6 | GUEST_ECN),
            tun::CSUM | tun::TSO6 | tun::TSO_ECN
        );
        assert_eq!(bits(u64::MAX), 0x7f);
    }
}
