//! Ferry's hot-plug registers (`devices/pci/src/hotplug.rs`), which an operating
//! system reaches by ACPI.

use crate::cpu::{inl, outl};
use crate::net::Nics;
use crate::serial::say;

const CAME: u16 = 0x610;
const GOES: u16 = 0x614;
const EJECT: u16 = 0x618;

/// Takes note of what came, and ejects what shall go.
pub(crate) fn serve(nics: &mut Nics) {
    let (came, goes) = (inl(CAME), inl(GOES));
    outl(CAME, came);
    outl(GOES, goes);
    nics.let_go(goes);
    outl(EJECT, goes);
    say!("HOTPLUG {{\"came\":{came},\"goes\":{goes}}}");
}
