//! Counting what of a numbered stream came, came twice, and did not come.

/// Flows told apart; higher numbers share.
pub const FLOWS: usize = 64;

/// How far behind the newest packet a late one is still told from a duplicate.
pub const WINDOW: u64 = 1024;

const WINDOW_WORDS: usize = 16;

/// What a packet's number says about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// Its first time.
    New,
    /// Came before, or is too late to tell.
    Duplicate,
}

#[derive(Clone, Copy)]
struct Flow {
    received: u64,
    first: u64,
    highest: u64,
    /// Bit `n % WINDOW` tells whether packet `n` of the last [`WINDOW`] came.
    window: [u64; WINDOW_WORDS],
}

impl Flow {
    const NONE: Self = Self {
        received: 0,
        first: 0,
        highest: 0,
        window: [0; WINDOW_WORDS],
    };

    const fn slot(sequence: u64) -> (usize, u64) {
        let [low, high, ..] = (sequence % WINDOW).to_le_bytes();
        let bit = u16::from_le_bytes([low, high]);
        ((bit / 64) as usize, 1 << (bit % 64))
    }

    fn observe(&mut self, sequence: u64) -> Arrival {
        if self.received == 0 {
            *self = Self {
                first: sequence,
                highest: sequence,
                ..Self::NONE
            };
        } else if sequence > self.highest {
            let ahead = (sequence - self.highest).min(WINDOW);
            for skipped in sequence - ahead + 1..=sequence {
                let (word, bit) = Self::slot(skipped);
                self.window[word] &= !bit;
            }
            self.highest = sequence;
        } else if self.highest - sequence >= WINDOW {
            return Arrival::Duplicate;
        }
        let (word, bit) = Self::slot(sequence);
        if self.window[word] & bit != 0 {
            return Arrival::Duplicate;
        }
        self.window[word] |= bit;
        self.received += 1;
        self.first = self.first.min(sequence);
        Arrival::New
    }

    const fn lost(&self) -> u64 {
        if self.received == 0 {
            0
        } else {
            self.highest - self.first + 1 - self.received
        }
    }
}

/// The state of all flows of one sender. All zero bits are its start.
pub struct Tracker {
    run: u32,
    /// What earlier runs lost.
    lost_before: u64,
    flows: [Flow; FLOWS],
}

impl Default for Tracker {
    fn default() -> Self {
        Self {
            run: 0,
            lost_before: 0,
            flows: [Flow::NONE; FLOWS],
        }
    }
}

impl Tracker {
    /// Notes a packet. A new run number makes all flows begin anew.
    pub fn observe(&mut self, run: u32, flow: u16, sequence: u64) -> Arrival {
        if run != self.run {
            self.lost_before = self.lost();
            self.flows = [Flow::NONE; FLOWS];
            self.run = run;
        }
        self.flows[usize::from(flow) % FLOWS].observe(sequence)
    }

    /// Packets missing between the first and the newest of each flow.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.lost_before + self.flows.iter().map(Flow::lost).sum::<u64>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_count_until_they_are_filled() {
        let mut tracker = Tracker::default();
        for sequence in [10, 11, 14] {
            assert_eq!(tracker.observe(1, 0, sequence), Arrival::New);
        }
        assert_eq!(tracker.lost(), 2);
        assert_eq!(tracker.observe(1, 0, 12), Arrival::New);
        assert_eq!(tracker.observe(1, 0, 12), Arrival::Duplicate);
        assert_eq!(tracker.lost(), 1);
    }

    #[test]
    fn flows_are_apart_and_runs_begin_anew() {
        let mut tracker = Tracker::default();
        tracker.observe(1, 0, 0);
        tracker.observe(1, 1, 5);
        assert_eq!(tracker.lost(), 0);
        tracker.observe(1, 1, 9);
        assert_eq!(tracker.lost(), 3);
        assert_eq!(tracker.observe(2, 1, 9), Arrival::New);
        assert_eq!(tracker.lost(), 3, "an earlier run's losses stay");
    }

    #[test]
    fn window_moves_with_the_newest() {
        let mut tracker = Tracker::default();
        tracker.observe(1, 0, 0);
        tracker.observe(1, 0, WINDOW);
        assert_eq!(
            tracker.observe(1, 0, 0),
            Arrival::Duplicate,
            "too late to tell"
        );
        assert_eq!(tracker.observe(1, 0, 1), Arrival::New);
        assert_eq!(tracker.observe(1, 0, 10 * WINDOW), Arrival::New);
        for sequence in 9 * WINDOW + 1..10 * WINDOW {
            assert_eq!(tracker.observe(1, 0, sequence), Arrival::New, "{sequence}");
        }
        // Of numbers 0 to 10 W came 0, 1, W, and the last W.
        assert_eq!(tracker.lost(), 9 * WINDOW - 2);
    }

    #[test]
    fn agrees_with_a_set_on_a_shuffled_stream() {
        let mut tracker = Tracker::default();
        let mut seen = [false; 4096];
        let (mut state, mut fresh) = (1u64, 0);
        for base in 0..3500u64 {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let sequence = base + (state >> 33) % 500;
            let slot = &mut seen[usize::try_from(sequence).unwrap()];
            let expected = if *slot {
                Arrival::Duplicate
            } else {
                Arrival::New
            };
            fresh += u64::from(!*slot);
            *slot = true;
            assert_eq!(tracker.observe(1, 9, sequence), expected);
        }
        let first = seen.iter().position(|&came| came).unwrap();
        let last = seen.iter().rposition(|&came| came).unwrap();
        assert_eq!(
            tracker.lost(),
            u64::try_from(last - first + 1).unwrap() - fresh
        );
    }
}
