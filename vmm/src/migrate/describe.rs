//! What a destination is told of a VM before it moves, and whether a VM built here fits that.

mod compat;

use devices::rtc::{self, Rtc};
use devices::serial::{self, Serial};
use hypervisor::Cpuid;
use passthrough::MigrationFlags;
use virtio_devices::VirtioPciDevice;
use vm_migration::migrate::{DeviceManifest, Manifest, MemoryRegion, Migratable, Refusal};
use vm_migration::{ErrorChain, MemoryHandle, SaveRestore};

use compat::{Compat, compat};

use super::MigrateError;
use crate::config::VmConfig;
use crate::machine::{
    BusState, CHIPS_ID, CPUS_ID, CpuState, HOTPLUG_ID, Machine, PCI_ID, PassthroughFunction,
    PlugState, VirtioFunction, VmChips,
};

/// Most that a passthrough device's state may be, in bytes. The device does not tell a bound, and
/// states of real NICs reach hundreds of megabytes.
const MAX_PASSTHROUGH_STATE: u64 = 16 << 30;

/// The kind of a passthrough device.
const PASSTHROUGH: &str = "passthrough";

/// Describes `machine` to a destination.
pub(super) fn manifest(machine: &Machine, config: &VmConfig) -> Result<Manifest, MigrateError> {
    let mut manifest = Manifest::new(machine.ram().page_size().bytes());
    manifest.memory = machine
        .ram()
        .regions()
        .iter()
        .map(|region| MemoryRegion {
            gpa: region.gpa.0,
            len: region.len,
        })
        .collect();
    manifest.vcpus = config.cpus.boot_vcpus;
    manifest.cpuid = postcard::to_stdvec(machine.cpuid()).map_err(MigrateError::Cpuid)?;
    manifest.config = serde_json::to_vec(config).map_err(MigrateError::Config)?;
    manifest.devices = devices(machine);
    Ok(manifest)
}

/// All parts with state, in the order in which they are stopped, sent and loaded: the CPUs and
/// chips first, so that devices can raise interrupts when they are loaded; the bus after the devices,
/// as it maps what their own states say; then what of them the guest has ejected.
fn devices(machine: &Machine) -> Vec<DeviceManifest> {
    let capabilities = machine.vm().capabilities();
    let chips = compat([("timer", capabilities.timer.to_string())]);
    let cpus = compat([
        ("xsave_bytes", capabilities.xsave_bytes.to_string()),
        ("count", machine.vcpus().cpus().len().to_string()),
    ]);
    let mut all = vec![
        entry(CHIPS_ID, "vm", chips, VmChips::MAX_STATE_BYTES),
        entry(CPUS_ID, "vcpus", cpus, CpuState::MAX_STATE_BYTES),
    ];
    all.push(entry(rtc::ID, "rtc", Compat::new(), Rtc::MAX_STATE_BYTES));
    if machine.devices().serial().is_some() {
        all.push(entry(
            serial::ID,
            "serial",
            Compat::new(),
            Serial::MAX_STATE_BYTES,
        ));
    }
    for function in machine.devices().virtio() {
        all.push(virtio_entry(function, machine.ram().handle()));
    }
    let functions = machine.devices().passthrough();
    for function in functions {
        all.push(passthrough_entry(function, functions.len()));
    }
    all.push(entry(
        PCI_ID,
        "pci",
        Compat::new(),
        BusState::MAX_STATE_BYTES,
    ));
    all.push(entry(
        HOTPLUG_ID,
        "hotplug",
        Compat::new(),
        PlugState::MAX_STATE_BYTES,
    ));
    all
}

fn entry(id: &str, kind: &str, compat: Compat, max_state: usize) -> DeviceManifest {
    DeviceManifest {
        id: id.to_owned(),
        kind: kind.to_owned(),
        compat,
        migratable: Migratable::Yes,
        max_state_bytes: u64::try_from(max_state).unwrap_or(u64::MAX),
    }
}

fn virtio_entry(function: &VirtioFunction, memory: &MemoryHandle) -> DeviceManifest {
    let features = function.device.lock().offered_features();
    let mut compat = compat([(compat::FEATURES, format!("{features:#x}"))]);
    if let Some(net) = &function.net {
        compat.extend(compat::of_net(&net.offer));
    }
    let max_state = VirtioPciDevice::MAX_STATE_BYTES;
    let entry = entry(&function.id, function.kind, compat, max_state);
    let dirty_source = function
        .vhost
        .as_ref()
        .map(|vhost| vhost.dirty_source(memory));
    match dirty_source {
        Some(Err(error)) => DeviceManifest {
            migratable: Migratable::No {
                reason: ErrorChain(&error).to_string(),
                remedy: format!(
                    "give a vhost-user backend that runs and logs its writes, and boot with it; or \
                     {}",
                    unplug(&function.id)
                ),
            },
            ..entry
        },
        Some(Ok(_)) | None => entry,
    }
}

/// What an operator can do with a device that keeps the VM here.
fn unplug(id: &str) -> String {
    format!("unplug it before the migration (ferryctl remove-device {id})")
}

/// Whether the manifest says that device `id` can be moved.
pub(super) fn is_movable(manifest: &Manifest, id: &str) -> bool {
    let mut devices = manifest.devices.iter();
    let device = devices.find(|device| device.id == id);
    device.is_some_and(|device| matches!(device.migratable, Migratable::Yes))
}

/// A passthrough device, one of `count`.
fn passthrough_entry(function: &PassthroughFunction, count: usize) -> DeviceManifest {
    let device = &function.device;
    let migratable = match device.state_source().and_then(|_| function.rung()) {
        Ok(_) => beside_others(&function.id, device.profile().migration, count),
        Err(error) => Migratable::No {
            reason: ErrorChain(&error).to_string(),
            remedy: format!(
                "{}, or give a device that can migrate",
                unplug(&function.id)
            ),
        },
    };
    DeviceManifest {
        id: function.id.clone(),
        kind: PASSTHROUGH.to_owned(),
        compat: compat::of_passthrough(device.profile()),
        migratable,
        max_state_bytes: MAX_PASSTHROUGH_STATE,
    }
}

/// Whether device `id`, one of `count` passthrough devices, with these features can move. Devices
/// may do DMA to each other, and one of them stops first: with several, each must be able to stop
/// that before it stops itself (uAPI of VFIO, "The RUNNING_P2P state").
fn beside_others(id: &str, flags: Option<MigrationFlags>, count: usize) -> Migratable {
    let quiesces = flags.is_some_and(|flags| flags.contains(MigrationFlags::P2P));
    if count < 2 || quiesces {
        return Migratable::Yes;
    }
    Migratable::No {
        reason: format!(
            "it is one of {count} passthrough devices and cannot be kept from peer-to-peer DMA \
             while they stop one after the other (it has no RUNNING_P2P)"
        ),
        remedy: format!("{}, or all others", unplug(id)),
    }
}

/// What keeps the VM of `theirs` from running on `machine`, built here from its configuration.
pub(super) fn misfits(theirs: &Manifest, machine: &Machine) -> Vec<Refusal> {
    let mut refusals = cpu_misfits(theirs, machine);
    let here = machine.vcpus().cpus().len();
    if usize::try_from(theirs.vcpus) != Ok(here) {
        refusals.push(Refusal::new(
            "vcpus",
            format!(
                "the source names {}, its configuration {here}",
                theirs.vcpus
            ),
            "run the same release of Ferry on both sides",
        ));
    }
    for here in devices(machine) {
        let Some(there) = theirs.devices.iter().find(|there| there.id == here.id) else {
            // The engine compares the sets and names what is missing.
            continue;
        };
        refusals.extend(compat::misfits(&here, there));
        // A VM that has arrived must be able to leave again.
        if let Migratable::No { reason, remedy } = &here.migratable {
            refusals.push(Refusal::new(&here.id, reason, remedy));
        }
    }
    refusals
}

fn cpu_misfits(theirs: &Manifest, machine: &Machine) -> Vec<Refusal> {
    let remedy = "migrate to a host whose CPU has all of the source's features";
    match postcard::from_bytes::<Cpuid>(&theirs.cpuid) {
        Err(error) => vec![Refusal::new(
            "cpuid",
            format!("the source's CPU features cannot be read: {error}"),
            "run the same release of Ferry on both sides",
        )],
        Ok(cpuid) => cpuid
            .missing_on(machine.cpuid())
            .into_iter()
            .map(|missing| Refusal::new("cpuid", missing.to_string(), remedy))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_cannot_quiesce_moves_only_alone() {
        for flags in MigrationFlags::LEGAL {
            assert_eq!(beside_others("nic", Some(flags), 1), Migratable::Yes);
            let quiesces = flags.contains(MigrationFlags::P2P);
            match beside_others("nic", Some(flags), 3) {
                Migratable::Yes => assert!(quiesces, "{flags:?}"),
                Migratable::No { reason, remedy } => {
                    assert!(!quiesces, "{flags:?}");
                    assert!(reason.contains("one of 3 passthrough devices"), "{reason}");
                    assert!(remedy.contains("ferryctl remove-device nic"), "{remedy}");
                }
            }
        }
    }
}
