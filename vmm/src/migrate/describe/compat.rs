//! Whether a device here can go on where one at the source stops, by what both manifests say.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use passthrough::{DeviceProfile, MigrationFlags, VirtioOffer};
use pci::{BarInfo, BarKind};
use vm_migration::migrate::{DeviceManifest, Refusal};

use crate::machine::{NET_ON_TAP, NetOffer};

/// What is known of a device, by name.
pub(super) type Compat = BTreeMap<String, String>;

/// Features that a virtio device of the VMM's own offers.
pub(super) const FEATURES: &str = "features";
/// Types of hashes that a network card offers, by the bits of the specification.
const HASH_TYPES: &str = "hash_types";
/// Features that a passthrough virtio device offers.
const VIRTIO_FEATURES: &str = "virtio_features";
/// What a passthrough device's migration can do.
const MIGRATION: &str = "migration";
/// Digest of what the guest cannot write in configuration space: the last resort, as it cannot
/// tell what is different.
const CONFIG_SPACE: &str = "config_space";

/// Named values as a map.
pub(super) fn compat<const N: usize>(pairs: [(&str, String); N]) -> Compat {
    pairs
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
}

/// What a destination is told of a passthrough device.
pub(super) fn of_passthrough(profile: &DeviceProfile) -> Compat {
    let identity = profile.identity;
    let mut all = compat([
        ("vendor", format!("{:#06x}", identity.vendor)),
        ("device", format!("{:#06x}", identity.device)),
        (
            "subsystem_vendor",
            format!("{:#06x}", identity.subsystem_vendor),
        ),
        ("subsystem", format!("{:#06x}", identity.subsystem)),
        ("revision", format!("{:#04x}", identity.revision)),
        ("bars", bars(&profile.bars)),
        ("vectors", profile.vectors.to_string()),
        (CONFIG_SPACE, format!("{:#010x}", profile.config_digest)),
        (MIGRATION, flags(profile.migration)),
    ]);
    if let Some(offer) = &profile.virtio {
        all.extend(of_offer(offer));
    }
    all
}

/// What a destination is told of a network card on a tap, besides its features.
pub(super) fn of_net(offer: &NetOffer) -> Compat {
    let mut all = compat([("queue_pairs", offer.pairs.to_string())]);
    if let Some(types) = offer.hash_types {
        all.insert(HASH_TYPES.to_owned(), format!("{:#x}", types.bits()));
    }
    all
}

fn of_offer(offer: &VirtioOffer) -> Compat {
    let mtu = offer.mtu.map_or("none".to_owned(), |mtu| mtu.to_string());
    compat([
        (VIRTIO_FEATURES, format!("{:#x}", offer.features)),
        ("queue_sizes", sizes(&offer.queue_sizes)),
        ("mtu", mtu),
    ])
}

fn bars(bars: &[BarInfo]) -> String {
    let each = bars.iter().map(|bar| {
        let kind = match bar.kind {
            BarKind::Memory32 => "32-bit memory",
            BarKind::Memory64 {
                prefetchable: false,
            } => "64-bit memory",
            BarKind::Memory64 { prefetchable: true } => "64-bit prefetchable memory",
            BarKind::Io => "ports",
        };
        format!("{} of {:#x} bytes {kind}", bar.index, bar.size)
    });
    each.collect::<Vec<_>>().join(", ")
}

/// The flags as words, sorted by their bits.
fn flags(flags: Option<MigrationFlags>) -> String {
    let Some(flags) = flags else {
        return "none".to_owned();
    };
    flags
        .iter_names()
        .map(|(name, _)| name)
        .collect::<Vec<_>>()
        .join(" ")
}

/// Queue sizes, equal neighbours counted: `4 x 256, 64`.
fn sizes(sizes: &[u16]) -> String {
    let mut text = String::new();
    for run in sizes.chunk_by(|a, b| a == b) {
        let Some(size) = run.first() else {
            continue;
        };
        let comma = if text.is_empty() { "" } else { ", " };
        // Writing to a string does not fail.
        let _ = match run.len() {
            1 => write!(text, "{comma}{size}"),
            count => write!(text, "{comma}{count} x {size}"),
        };
    }
    text
}

/// What the device here lacks of the one at the source.
pub(super) fn misfits(here: &DeviceManifest, there: &DeviceManifest) -> Vec<Refusal> {
    let remedy = match here.kind.as_str() {
        super::PASSTHROUGH => format!(
            "give the destination a device of the same kind, its server started with the same \
             options as at the source; or {}",
            super::unplug(&here.id)
        ),
        NET_ON_TAP => "run a release of Ferry there that offers the same, and let the \
                              configuration that moves decide what is offered"
            .to_owned(),
        _ => "migrate to a host with an equal device".to_owned(),
    };
    let refuse = |reason| Refusal::new(&here.id, reason, &remedy);
    if here.kind != there.kind {
        let reason = format!(
            "it is a {} at the source and a {} here",
            there.kind, here.kind
        );
        return vec![Refusal::new(
            &here.id,
            reason,
            "give both sides the same devices",
        )];
    }
    let compare = |(name, value): (&String, &String)| {
        let own = here.compat.get(name).map_or("nothing", String::as_str);
        misfit(name, value, own).map(refuse)
    };
    let (last_resort, named): (Vec<_>, Vec<_>) = there
        .compat
        .iter()
        .partition(|(name, _)| *name == CONFIG_SPACE);
    let mut refusals: Vec<Refusal> = named.into_iter().filter_map(compare).collect();
    if refusals.is_empty() {
        refusals.extend(last_resort.into_iter().filter_map(compare));
    }
    if there.max_state_bytes > here.max_state_bytes {
        refusals.push(refuse(format!(
            "its state may take {} bytes at the source, here there is room for {}",
            there.max_state_bytes, here.max_state_bytes
        )));
    }
    refusals
}

/// Why `own`, here, cannot stand for `value`, at the source.
fn misfit(name: &str, value: &str, own: &str) -> Option<String> {
    if value == own {
        return None;
    }
    let plain = format!("its {name} is {value} at the source and {own} here");
    match name {
        // A guest that goes on with a subset of what is offered does not notice more.
        VIRTIO_FEATURES => match (bits(value), bits(own)) {
            (Some(wanted), Some(offered)) if wanted & !offered == 0 => None,
            (Some(wanted), Some(offered)) => {
                let missing = wanted & !offered;
                let list = (0..u64::BITS).filter(|bit| missing >> bit & 1 != 0);
                let list: Vec<_> = list.map(|bit| bit.to_string()).collect();
                Some(format!(
                    "{plain}: feature bits {} are missing",
                    list.join(", ")
                ))
            }
            _ => Some(plain),
        },
        // What was possible for this VM stays so: it may have to move on.
        MIGRATION => {
            let has = |word: &str| own.split(' ').any(|other| other == word);
            let missing: Vec<_> = value.split(' ').filter(|word| !has(word)).collect();
            (!missing.is_empty()).then(|| format!("{plain}: {} is missing", missing.join(", ")))
        }
        _ => Some(plain),
    }
}

fn bits(text: &str) -> Option<u64> {
    u64::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}

#[cfg(test)]
mod tests;
