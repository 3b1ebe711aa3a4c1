//! The mock device, driven from user space: its registers (scripts/lab.d/modules/mock/registers.h).

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;

use anyhow::{Context, ensure};

use super::memory::Words;

const VENDOR: &str = "0x1234";
const DEVICE: &str = "0xfe77";
const MAGIC: u32 = 0x4456_4d46;
const BAR_BYTES: usize = 4096;

/// `Register::Engine`: on, but only as long as the device does not move.
const ENGINE_ON_HERE: u32 = 3;

/// PCI command register: memory space, bus mastering.
const COMMAND: u64 = 4;
const COMMAND_BITS: u16 = 6;

/// A register of 32 bits, by its offset.
#[derive(Clone, Copy, Debug)]
pub(super) enum Register {
    Magic = 0x00,
    Instance = 0x08,
    DmaBytes = 0x18,
    DmaPattern = 0x1c,
    Doorbell = 0x20,
    Status = 0x28,
    Failures = 0x2c,
    Engine = 0x40,
    Rate = 0x44,
    Bytes = 0x48,
    Step = 0x4c,
    Segment = 0x50,
    SegmentPages = 0x54,
}

/// A register of 64 bits.
#[derive(Clone, Copy, Debug)]
pub(super) enum Wide {
    DmaAddress = 0x10,
    Stamp = 0x30,
    Pattern = 0x38,
    SegmentAddress = 0x58,
    PeerAddress = 0x70,
    PeerStamp = 0x78,
    PeerRefused = 0x80,
}

/// What the engine shall do.
#[derive(Clone, Copy, Debug)]
pub(super) struct Engine {
    /// Records per second.
    pub(super) rate: u32,
    /// Bytes of a record.
    pub(super) bytes: u32,
    /// From page to page.
    pub(super) step: u32,
    /// What records are made of.
    pub(super) pattern: u64,
}

/// One of the devices.
#[derive(Debug)]
pub(super) struct Device {
    registers: NonNull<u32>,
    /// Its mailbox, to which its peer writes.
    pub(super) mailbox: Words,
    /// Where the mailbox is on the bus.
    pub(super) mailbox_address: u64,
}

impl Device {
    /// All of them, in the order of their places on the bus, ready for DMA.
    pub(super) fn all() -> anyhow::Result<Vec<Self>> {
        let mut paths: Vec<PathBuf> = fs::read_dir("/sys/bus/pci/devices")
            .context("this machine has no PCI")?
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<Result<_, _>>()?;
        paths.sort();
        let is_ours = |path: &PathBuf| {
            let says = |name: &str| fs::read_to_string(path.join(name)).unwrap_or_default();
            says("vendor").trim() == VENDOR && says("device").trim() == DEVICE
        };
        paths
            .into_iter()
            .filter(is_ours)
            .map(|path| Self::open(&path))
            .collect()
    }

    fn open(path: &Path) -> anyhow::Result<Self> {
        let told = || format!("cannot use {}", path.display());
        fs::write(path.join("enable"), "1").with_context(told)?;
        enable_dma(path).with_context(told)?;
        let registers = map(&path.join("resource0")).with_context(told)?.cast();
        let mailbox = map(&path.join("resource2")).with_context(told)?.cast();
        let device = Self {
            registers,
            // SAFETY: the whole mapping, which is never taken away.
            mailbox: unsafe { Words::new(mailbox, BAR_BYTES / 8) },
            mailbox_address: bar_address(path, 2).with_context(told)?,
        };
        let magic = device.get(Register::Magic);
        ensure!(
            magic == MAGIC,
            "{} is no mock device (it says {magic:#x})",
            path.display()
        );
        Ok(device)
    }

    /// Reads a register.
    pub(super) fn get(&self, register: Register) -> u32 {
        self.read(register as usize)
    }

    /// Writes a register.
    pub(super) fn set(&self, register: Register, value: u32) {
        self.write(register as usize, value);
    }

    /// Reads a register that counts, by its halves.
    pub(super) fn get_wide(&self, register: Wide) -> u64 {
        let at = register as usize;
        loop {
            let high = self.read(at + 4);
            let low = self.read(at);
            // Else the low half ran over in between.
            if self.read(at + 4) == high {
                return u64::from(high) << 32 | u64::from(low);
            }
        }
    }

    /// Writes a register.
    pub(super) fn set_wide(&self, register: Wide, value: u64) {
        let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
        self.write(register as usize, u32::from_le_bytes([a, b, c, d]));
        self.write(register as usize + 4, u32::from_le_bytes([e, f, g, h]));
    }

    /// Has the engine write the pages of `segments` (address, pages), from record 1 on.
    pub(super) fn start(&self, segments: &[(u64, u32)], engine: Engine) {
        self.stop();
        self.set_wide(Wide::Stamp, 0);
        for (number, (address, pages)) in (0..).zip(segments) {
            self.set(Register::Segment, number);
            self.set_wide(Wide::SegmentAddress, *address);
            self.set(Register::SegmentPages, *pages);
        }
        self.set(Register::Rate, engine.rate);
        self.set(Register::Bytes, engine.bytes);
        self.set(Register::Step, engine.step);
        self.set_wide(Wide::Pattern, engine.pattern);
        self.resume();
    }

    /// Has the engine go on, until it is stopped or a migration has moved the device.
    pub(super) fn resume(&self) {
        self.set(Register::Engine, ENGINE_ON_HERE);
    }

    /// Has it write no more.
    pub(super) fn stop(&self) {
        self.set(Register::Engine, 0);
    }

    /// One DMA write of `bytes` of `pattern`; the errno it ended with.
    pub(super) fn ring(&self, address: u64, bytes: u32, pattern: u32) -> u32 {
        self.set(Register::Status, 0);
        self.set_wide(Wide::DmaAddress, address);
        self.set(Register::DmaBytes, bytes);
        self.set(Register::DmaPattern, pattern);
        self.set(Register::Doorbell, 1);
        self.get(Register::Status)
    }

    fn read(&self, at: usize) -> u32 {
        // SAFETY: offsets are those of `Register` and `Wide`, all within the mapping, which is never
        // taken away.
        unsafe { self.registers.add(at / 4).read_volatile() }
    }

    fn write(&self, at: usize, value: u32) {
        // SAFETY: as in `read`.
        unsafe { self.registers.add(at / 4).write_volatile(value) }
    }
}

/// Lets the function answer and do DMA: no driver of the kernel does it for us.
fn enable_dma(path: &Path) -> anyhow::Result<()> {
    let config = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path.join("config"))?;
    let mut command = [0; 2];
    config.read_exact_at(&mut command, COMMAND)?;
    let command = u16::from_le_bytes(command) | COMMAND_BITS;
    config.write_all_at(&command.to_le_bytes(), COMMAND)?;
    Ok(())
}

/// The first page of a BAR.
fn map(path: &Path) -> anyhow::Result<NonNull<u8>> {
    let file: File = OpenOptions::new().read(true).write(true).open(path)?;
    // SAFETY: a new mapping of device memory, at no address in use.
    let start = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            BAR_BYTES,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        )
    };
    ensure!(
        start != libc::MAP_FAILED,
        "cannot map {}: {}",
        path.display(),
        std::io::Error::last_os_error()
    );
    NonNull::new(start.cast()).context("a mapping at address 0")
}

/// The address that a BAR has on the bus: the first number of its line.
fn bar_address(path: &Path, bar: usize) -> anyhow::Result<u64> {
    let lines = fs::read_to_string(path.join("resource"))?;
    let start = lines
        .lines()
        .nth(bar)
        .and_then(|line| line.split_whitespace().next())
        .and_then(|number| number.strip_prefix("0x"))
        .with_context(|| format!("no BAR {bar}"))?;
    let start = u64::from_str_radix(start, 16)?;
    ensure!(start != 0, "BAR {bar} has no address");
    Ok(start)
}
