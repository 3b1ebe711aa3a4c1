//! What must hold of any manifest, on both sides, before anything is changed.

use std::collections::BTreeSet;

use super::frame::PROTOCOL_VERSION;
use super::pages::LARGEST_PAGE;
use super::protocol::{Manifest, MemoryRegion, Migratable, Refusal};
use crate::addr::{Iova, IovaRange, PageSize};
use crate::memory::GuestMemory;

/// Most devices of a VM; far below what a chunk's index can say.
const MAX_DEVICES: usize = 1024;

/// Most regions of guest RAM.
const MAX_REGIONS: usize = 4096;

const REPORT: &str = "this is a fault of the source's Ferry: please report it";

/// The manifest's memory as ranges.
pub(super) fn ranges(manifest: &Manifest) -> Vec<IovaRange> {
    manifest
        .memory
        .iter()
        .filter_map(|region| IovaRange::new(Iova(region.gpa), region.len))
        .collect()
}

fn page_size(manifest: &Manifest) -> Option<PageSize> {
    PageSize::new(manifest.page_size)
        .filter(|size| (PageSize::SIZE_4K..=LARGEST_PAGE).contains(size))
}

/// Checks a manifest for itself.
pub(super) fn manifest(manifest: &Manifest) -> Vec<Refusal> {
    let mut found = Vec::new();
    if manifest.protocol != PROTOCOL_VERSION {
        found.push(Refusal::new(
            "protocol",
            format!(
                "the source speaks version {}, this side {PROTOCOL_VERSION}",
                manifest.protocol
            ),
            "use the same release of Ferry on both hosts",
        ));
    }
    if page_size(manifest).is_none() {
        found.push(Refusal::new(
            "page size",
            format!("pages of {} bytes cannot be sent", manifest.page_size),
            "the host's pages must be of 4 KiB to 64 KiB",
        ));
    }
    if manifest.vcpus == 0 {
        found.push(Refusal::new("vcpus", "the VM has none", REPORT));
    }
    regions(manifest, &mut found);
    devices(manifest, &mut found);
    found
}

fn regions(manifest: &Manifest, found: &mut Vec<Refusal>) {
    if manifest.memory.is_empty() || manifest.memory.len() > MAX_REGIONS {
        let count = manifest.memory.len();
        let reason = format!("{count} regions; there must be 1 to {MAX_REGIONS}");
        found.push(Refusal::new("memory", reason, REPORT));
        return;
    }
    let page = manifest.page_size.max(1);
    let mut end = 0;
    for region in &manifest.memory {
        let whole = region.len > 0 && region.len % page == 0 && region.gpa % page == 0;
        match region.gpa.checked_add(region.len) {
            Some(next) if whole && region.gpa >= end => end = next,
            _ => found.push(Refusal::new(
                "memory",
                format!("the region of {region} overlaps another or is not made of whole pages"),
                REPORT,
            )),
        }
    }
}

fn devices(manifest: &Manifest, found: &mut Vec<Refusal>) {
    if manifest.devices.len() > MAX_DEVICES {
        let count = manifest.devices.len();
        let reason = format!("{count} devices; at most {MAX_DEVICES} can move");
        found.push(Refusal::new("devices", reason, "remove some"));
        return;
    }
    let mut seen = BTreeSet::new();
    for device in &manifest.devices {
        if device.id.is_empty() {
            found.push(Refusal::new(
                format!("a device of kind {}", device.kind),
                "it has no identifier",
                REPORT,
            ));
        } else if !seen.insert(device.id.as_str()) {
            found.push(Refusal::new(
                &device.id,
                "two devices have this identifier",
                "give each device its own id",
            ));
        }
        if let Migratable::No { reason, remedy } = &device.migratable {
            found.push(Refusal::new(&device.id, reason, remedy));
        }
    }
}

/// Checks a manifest against the memory and the devices that one side has.
pub(super) fn fits<'a>(
    manifest: &Manifest,
    side: &str,
    memory: &GuestMemory,
    devices: impl Iterator<Item = &'a str>,
) -> Vec<Refusal> {
    let mut found = Vec::new();
    let wanted: BTreeSet<_> = manifest.memory.iter().copied().collect();
    let present: BTreeSet<_> = MemoryRegion::all(memory).into_iter().collect();
    let same_memory = "give the destination's VM the same memory layout";
    for region in wanted.difference(&present) {
        let reason = format!("{side} has no region of {region}");
        found.push(Refusal::new("memory", reason, same_memory));
    }
    for region in present.difference(&wanted) {
        let reason = format!("{side} has a region of {region} which the manifest does not name");
        found.push(Refusal::new("memory", reason, same_memory));
    }
    let wanted: BTreeSet<_> = manifest.devices.iter().map(|one| one.id.as_str()).collect();
    let mut present = BTreeSet::new();
    for id in devices {
        if !present.insert(id) {
            let reason = format!("{side} has two devices of this identifier");
            found.push(Refusal::new(id, reason, "give each device its own id"));
        }
    }
    for id in wanted.difference(&present) {
        let reason = format!("{side} has no such device");
        found.push(Refusal::new(*id, reason, "configure the device there"));
    }
    for id in present.difference(&wanted) {
        let reason = format!("{side} has this device, the manifest does not name it");
        found.push(Refusal::new(*id, reason, "remove the device there"));
    }
    found
}
