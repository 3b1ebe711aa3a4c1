//! The real-time clock and its battery-backed memory (an MC146818 at ports 0x70 and 0x71).
//!
//! The clock shows the host's UTC and cannot be set: what the guest writes to the time is dropped,
//! so that the clock is right again after a migration or a long pause. There are no alarms and no
//! periodic interrupts; the registers for them hold what was written. The memory tells firmware
//! and boot loaders how much RAM there is, as they expect it since the PC AT.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use vm_migration::{SaveRestore, StateError, saved};

use crate::bus::BusDevice;

/// First port: the index; the second is the data.
pub const BASE_PORT: u16 = 0x70;
/// Number of ports.
pub const PORTS: u16 = 2;
/// Identifier of the clock's state in a migration.
pub const ID: &str = "rtc";

/// Registers (MC146818 data sheet; memory sizes as in Bochs' `rombios`, which firmware follows).
mod register {
    pub(super) const SECONDS: usize = 0x00;
    pub(super) const MINUTES: usize = 0x02;
    pub(super) const HOURS: usize = 0x04;
    pub(super) const WEEKDAY: usize = 0x06;
    pub(super) const DAY: usize = 0x07;
    pub(super) const MONTH: usize = 0x08;
    pub(super) const YEAR: usize = 0x09;
    pub(super) const STATUS_A: usize = 0x0a;
    pub(super) const STATUS_B: usize = 0x0b;
    pub(super) const STATUS_C: usize = 0x0c;
    pub(super) const STATUS_D: usize = 0x0d;
    /// Low memory in KiB, two bytes.
    pub(super) const BASE_MEMORY: usize = 0x15;
    /// Memory above 1 MiB in KiB up to 64 MiB, two bytes; and the same again.
    pub(super) const EXTENDED: usize = 0x17;
    pub(super) const EXTENDED_AGAIN: usize = 0x30;
    pub(super) const CENTURY: usize = 0x32;
    /// Memory above 16 MiB and below 4 GiB in 64 KiB, two bytes.
    pub(super) const ABOVE_16M: usize = 0x34;
    /// Memory above 4 GiB in 64 KiB, three bytes.
    pub(super) const ABOVE_4G: usize = 0x5b;
}

/// Status A: divider running at 32768 Hz, no update in progress.
const STATUS_A: u8 = 0x26;
/// Status B: binary instead of BCD.
const BINARY: u8 = 1 << 2;
/// Status B: 24-hour instead of 12-hour.
const HOURS_24: u8 = 1 << 1;
/// Status D: time and memory are valid.
const VALID: u8 = 0x80;
/// In 12-hour mode the bit that says "afternoon".
const AFTERNOON: u8 = 0x80;
/// Bytes of clock and memory.
const SIZE: usize = 128;

type Now = dyn Fn() -> SystemTime + Send + Sync;

struct State {
    index: usize,
    bytes: [u8; SIZE],
}

#[derive(Serialize, Deserialize)]
struct Saved {
    index: u8,
    bytes: Vec<u8>,
}

const STATE_VERSION: u16 = 1;

/// The clock. Clones are the same clock: one goes on the bus, one to the migration.
#[derive(Clone)]
pub struct Rtc {
    state: Arc<Mutex<State>>,
    now: Arc<Now>,
}

impl Rtc {
    /// A clock of a machine with so many bytes of RAM below and above 4 GiB.
    pub fn new(below_4g: u64, above_4g: u64) -> Self {
        Self::with_clock(below_4g, above_4g, Arc::new(SystemTime::now))
    }

    fn with_clock(below_4g: u64, above_4g: u64, now: Arc<Now>) -> Self {
        const KIB: u64 = 1 << 10;
        const MIB: u64 = 1 << 20;
        let mut bytes = [0; SIZE];
        let mut put = |at: usize, value: u64, width: usize| {
            let value = value.min((1 << (8 * width)) - 1).to_le_bytes();
            for (to, from) in bytes.iter_mut().skip(at).zip(value).take(width) {
                *to = from;
            }
        };
        let extended = below_4g.saturating_sub(MIB).min(63 * MIB) / KIB;
        put(register::BASE_MEMORY, 640, 2);
        put(register::EXTENDED, extended, 2);
        put(register::EXTENDED_AGAIN, extended, 2);
        let above_16m = below_4g.saturating_sub(16 * MIB) / (64 * KIB);
        put(register::ABOVE_16M, above_16m, 2);
        put(register::ABOVE_4G, above_4g / (64 * KIB), 3);
        put(register::STATUS_A, STATUS_A.into(), 1);
        put(register::STATUS_B, HOURS_24.into(), 1);
        put(register::STATUS_D, VALID.into(), 1);
        Self {
            state: Arc::new(Mutex::new(State { index: 0, bytes })),
            now,
        }
    }

    fn read_register(&self) -> u8 {
        // Copied first: the host's clock is not asked under the lock.
        let (index, held, mode) = {
            let state = self.state.lock();
            let byte = |at: usize| state.bytes.get(at).copied().unwrap_or(0xff);
            (state.index, byte(state.index), byte(register::STATUS_B))
        };
        let since = (self.now)()
            .duration_since(UNIX_EPOCH)
            .unwrap_or(Duration::ZERO);
        let time = Time::since_epoch(since.as_secs());
        match index {
            register::SECONDS => coded(time.second, mode),
            register::MINUTES => coded(time.minute, mode),
            register::HOURS => hours(time.hour, mode),
            register::WEEKDAY => coded(time.weekday, mode),
            register::DAY => coded(time.day, mode),
            register::MONTH => coded(time.month, mode),
            register::YEAR => coded(time.year % 100, mode),
            register::CENTURY => coded(time.year / 100, mode),
            _ => held,
        }
    }

    fn write_register(&self, value: u8) {
        let mut state = self.state.lock();
        let index = state.index;
        if writable(index)
            && let Some(byte) = state.bytes.get_mut(index)
        {
            *byte = value;
        }
    }
}

/// Whether the guest may change a byte: alarms, the mode, and the memory but for its sizes.
fn writable(index: usize) -> bool {
    match index {
        register::SECONDS | register::MINUTES | register::HOURS => false,
        register::WEEKDAY..=register::STATUS_A => false,
        register::STATUS_C | register::STATUS_D | register::CENTURY => false,
        register::BASE_MEMORY..=0x18 | register::EXTENDED_AGAIN..=0x31 => false,
        register::ABOVE_16M..=0x35 | register::ABOVE_4G..=0x5d => false,
        _ => index < SIZE,
    }
}

impl BusDevice for Rtc {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (1, [byte]) = (offset, data) {
            *byte = self.read_register();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, data) {
            // The top bit masks NMIs on a PC.
            (0, [index]) => self.state.lock().index = usize::from(index & 0x7f),
            (1, [value]) => self.write_register(*value),
            _ => {}
        }
    }
}

impl SaveRestore for Rtc {
    const MAX_STATE_BYTES: usize = 256;

    fn expected_bytes(&self) -> usize {
        Self::MAX_STATE_BYTES
    }

    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        let saved = {
            let state = self.state.lock();
            Saved {
                index: u8::try_from(state.index).unwrap_or(0),
                bytes: state.bytes.to_vec(),
            }
        };
        saved::encode(ID, STATE_VERSION, &saved)
    }

    /// Only what a guest can write is taken over; memory sizes are this machine's.
    fn restore(&mut self, bytes: &[u8]) -> Result<(), StateError> {
        let saved: Saved = saved::decode(ID, STATE_VERSION, Self::MAX_STATE_BYTES, bytes)?;
        if saved.bytes.len() != SIZE {
            return Err(StateError::BadState {
                id: ID.into(),
                reason: format!("{} bytes of memory, {SIZE} are there", saved.bytes.len()),
            });
        }
        let mut state = self.state.lock();
        state.index = usize::from(saved.index & 0x7f);
        let pairs = state.bytes.iter_mut().zip(saved.bytes).enumerate();
        for (_, (to, from)) in pairs.filter(|(index, _)| writable(*index)) {
            *to = from;
        }
        Ok(())
    }
}

/// A moment in UTC; all fields as a person writes them but the weekday, which is 1 for Sunday.
struct Time {
    second: u64,
    minute: u64,
    hour: u64,
    weekday: u64,
    day: u64,
    month: u64,
    year: u64,
}

impl Time {
    fn since_epoch(seconds: u64) -> Self {
        let days = seconds / 86_400;
        let (year, month, day) = date(days);
        Self {
            second: seconds % 60,
            minute: seconds / 60 % 60,
            hour: seconds / 3_600 % 24,
            // The epoch was a Thursday.
            weekday: (days + 4) % 7 + 1,
            day,
            month,
            year,
        }
    }
}

/// Year, month and day of a number of days since 1970-01-01 (Gregorian). Years are counted from
/// March here, so that the leap day is the last of its year and months have a fixed pattern.
fn date(days: u64) -> (u64, u64, u64) {
    /// Days from 0000-03-01 to 1970-01-01.
    const EPOCH: u64 = 719_468;
    const DAYS_PER_400_YEARS: u64 = 146_097;
    let days = days + EPOCH;
    let era = days / DAYS_PER_400_YEARS;
    let of_era = days % DAYS_PER_400_YEARS;
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = match month_from_march {
        0..10 => month_from_march + 3,
        _ => month_from_march - 9,
    };
    let year = year_of_era + 400 * era + u64::from(month <= 2);
    (year, month, day)
}

/// A number below 100 as status B wants it.
fn coded(value: u64, mode: u8) -> u8 {
    let value = match mode & BINARY {
        0 => value / 10 % 10 * 16 + value % 10,
        _ => value,
    };
    u8::try_from(value).unwrap_or(0xff)
}

/// The hour as status B wants it.
fn hours(hour: u64, mode: u8) -> u8 {
    if mode & HOURS_24 != 0 {
        return coded(hour, mode);
    }
    let twelve = match hour % 12 {
        0 => 12,
        other => other,
    };
    let half = if hour >= 12 { AFTERNOON } else { 0 };
    coded(twelve, mode) | half
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// 2024-02-29 13:45:09 UTC, a Thursday.
    const LEAP_DAY: u64 = 1_709_214_309;

    fn clock(seconds: u64) -> Rtc {
        let now = move || UNIX_EPOCH + Duration::from_secs(seconds);
        Rtc::with_clock(3 << 30, 5 << 30, Arc::new(now))
    }

    fn get(rtc: &Rtc, index: u8) -> u8 {
        let mut data = [0];
        rtc.write(0, &[index]);
        rtc.read(1, &mut data);
        data[0]
    }

    fn set(rtc: &Rtc, index: u8, value: u8) {
        rtc.write(0, &[index | 0x80]);
        rtc.write(1, &[value]);
    }

    #[test]
    fn time_in_every_mode() {
        let rtc = clock(LEAP_DAY);
        let time = |rtc: &Rtc| [0x32, 9, 8, 7, 6, 4, 2, 0].map(|index| get(rtc, index));
        assert_eq!(time(&rtc), [0x20, 0x24, 0x02, 0x29, 5, 0x13, 0x45, 0x09]);
        set(&rtc, 0x0b, BINARY | HOURS_24);
        assert_eq!(time(&rtc), [20, 24, 2, 29, 5, 13, 45, 9]);
        set(&rtc, 0x0b, 0);
        assert_eq!(get(&rtc, 4), 0x81, "1 in the afternoon");
        set(&rtc, 0x04, 0x05);
        assert_eq!(get(&rtc, 4), 0x81, "the time cannot be set");
        assert_eq!([get(&rtc, 0x0a) & 0x80, get(&rtc, 0x0d)], [0, 0x80]);
        assert_eq!(get(&clock(0), 6), 0x05, "the epoch was a Thursday");
    }

    #[test]
    fn memory_sizes() {
        let rtc = clock(0);
        let word = |at| u16::from_le_bytes([get(&rtc, at), get(&rtc, at + 1)]);
        assert_eq!(word(0x15), 640);
        assert_eq!(word(0x17), 63 * 1024);
        assert_eq!(u64::from(word(0x34)) * 65536 + (16 << 20), 3 << 30);
        let above = u64::from(word(0x5b)) | (u64::from(get(&rtc, 0x5d)) << 16);
        assert_eq!(above * 65536, 5 << 30);
        set(&rtc, 0x34, 1);
        assert_eq!(u64::from(word(0x34)) * 65536 + (16 << 20), 3 << 30);
    }

    #[test]
    fn state_moves() {
        let mut source = clock(LEAP_DAY);
        set(&source, 0x0f, 0x0a);
        set(&source, 0x0b, BINARY | HOURS_24);
        source.write(0, &[0x0f]);
        let state = source.save().unwrap();
        assert!(state.len() <= Rtc::MAX_STATE_BYTES);
        let mut target = clock(LEAP_DAY);
        target.restore(&state).unwrap();
        let mut data = [0];
        target.read(1, &mut data);
        assert_eq!(data, [0x0a], "index and shutdown status");
        assert_eq!(get(&target, 2), 45);
        let mut other = Rtc::new(1 << 30, 0);
        let sizes = [get(&other, 0x34), get(&other, 0x35)];
        other.restore(&state).unwrap();
        assert_eq!([get(&other, 0x34), get(&other, 0x35)], sizes);
        let bad = |bytes: &[u8]| clock(0).restore(bytes);
        assert!(matches!(bad(&[]), Err(StateError::BadState { .. })));
        assert!(matches!(bad(&[9; 200]), Err(StateError::BadState { .. })));
        assert!(matches!(
            bad(&[1, 0, 1, 7]),
            Err(StateError::BadState { .. })
        ));
    }

    proptest! {
        #[test]
        fn dates_follow_the_calendar(days in 0_u64..1_000_000) {
            let (year, month, day) = date(days);
            let leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
            let length = match month {
                2 => 28 + u64::from(leap),
                4 | 6 | 9 | 11 => 30,
                _ => 31,
            };
            prop_assert!((1..=12).contains(&month) && (1..=length).contains(&day));
            let next = match (month, day == length) {
                (_, false) => (year, month, day + 1),
                (12, true) => (year + 1, 1, 1),
                (_, true) => (year, month + 1, 1),
            };
            prop_assert_eq!(date(days + 1), next);
        }

        #[test]
        fn any_access_is_served(accesses in prop::collection::vec((0_u64..3, any::<u16>()), 0..50)) {
            let rtc = clock(LEAP_DAY);
            for (offset, value) in accesses {
                let mut data = value.to_le_bytes();
                let length = usize::from(value % 2) + 1;
                rtc.write(offset, &data[..length]);
                rtc.read(offset, &mut data[..length]);
            }
            prop_assert_eq!(get(&rtc, 0x0d), VALID);
        }
    }
}
