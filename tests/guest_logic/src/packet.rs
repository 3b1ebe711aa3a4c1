//! The payload of a test packet: who sent it, and bytes that follow from that.
//!
//! All integers are little-endian:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 4 | [`MAGIC`] |
//! | 4 | 4 | run: a sender's start, so that counting can begin anew |
//! | 8 | 2 | flow |
//! | 10 | 2 | 0 |
//! | 12 | 4 | length of the payload |
//! | 16 | 8 | sequence number within the flow |
//! | 24 | 8 | stamp: the sender's to use |
//! | 32 | … | pattern, from all fields above |

/// First bytes of every test packet: `FRY1`.
pub const MAGIC: u32 = 0x3159_5246;

/// Bytes before the pattern: the least payload.
pub const HEADER_BYTES: usize = 32;

/// What identifies a test packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label {
    /// A sender's start; a new number makes receivers count anew.
    pub run: u32,
    /// Flow, for which sequence numbers are counted.
    pub flow: u16,
    /// Number within the flow, without holes.
    pub sequence: u64,
    /// Anything; comes back in the echo.
    pub stamp: u64,
}

/// What a payload turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Payload {
    /// No test packet.
    Foreign,
    /// A test packet with a wrong length or pattern.
    Damaged,
    /// A test packet as its sender made it.
    Good(Label),
}

/// The pattern's words, in order (splitmix64 seeded with the header's fields).
fn pattern(label: Label) -> impl Iterator<Item = u64> {
    let origin = u64::from(label.run) << 16 | u64::from(label.flow);
    let mut state = origin.rotate_left(24) ^ label.sequence.rotate_left(8) ^ label.stamp;
    core::iter::repeat_with(move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    })
}

/// Writes a whole payload; false when it is too short for its header or too
/// long for its length field.
#[must_use]
pub fn write(payload: &mut [u8], label: Label) -> bool {
    let Ok(len) = u32::try_from(payload.len()) else {
        return false;
    };
    let Some((header, body)) = payload.split_at_mut_checked(HEADER_BYTES) else {
        return false;
    };
    header[0..4].copy_from_slice(&MAGIC.to_le_bytes());
    header[4..8].copy_from_slice(&label.run.to_le_bytes());
    header[8..10].copy_from_slice(&label.flow.to_le_bytes());
    header[10..12].fill(0);
    header[12..16].copy_from_slice(&len.to_le_bytes());
    header[16..24].copy_from_slice(&label.sequence.to_le_bytes());
    header[24..32].copy_from_slice(&label.stamp.to_le_bytes());
    for (chunk, word) in body.chunks_mut(8).zip(pattern(label)) {
        let bytes = word.to_le_bytes();
        chunk.copy_from_slice(&bytes[..chunk.len()]);
    }
    true
}

fn word<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    let mut word = [0; N];
    word.copy_from_slice(&bytes[offset..offset + N]);
    word
}

/// Reads and checks a payload, every byte of it.
#[must_use]
pub fn read(payload: &[u8]) -> Payload {
    let Some((header, body)) = payload.split_at_checked(HEADER_BYTES) else {
        return Payload::Foreign;
    };
    if u32::from_le_bytes(word(header, 0)) != MAGIC {
        return Payload::Foreign;
    }
    let label = Label {
        run: u32::from_le_bytes(word(header, 4)),
        flow: u16::from_le_bytes(word(header, 8)),
        sequence: u64::from_le_bytes(word(header, 16)),
        stamp: u64::from_le_bytes(word(header, 24)),
    };
    let as_sent = u32::try_from(payload.len()) == Ok(u32::from_le_bytes(word(header, 12)))
        && header[10..12] == [0, 0]
        && body
            .chunks(8)
            .zip(pattern(label))
            .all(|(chunk, word)| chunk == &word.to_le_bytes()[..chunk.len()]);
    if as_sent {
        Payload::Good(label)
    } else {
        Payload::Damaged
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LABEL: Label = Label {
        run: 7,
        flow: 3,
        sequence: 0x0123_4567_89ab,
        stamp: 42,
    };

    #[test]
    fn a_payload_of_any_length_comes_back() {
        let mut buffer = [0; 100];
        for len in HEADER_BYTES..buffer.len() {
            assert!(write(&mut buffer[..len], LABEL));
            assert_eq!(read(&buffer[..len]), Payload::Good(LABEL));
        }
        assert!(!write(&mut buffer[..HEADER_BYTES - 1], LABEL));
    }

    #[test]
    fn no_bit_can_change_unseen() {
        let mut buffer = [0; 77];
        assert!(write(&mut buffer, LABEL));
        for bit in 0..buffer.len() * 8 {
            buffer[bit / 8] ^= 1 << (bit % 8);
            assert!(!matches!(read(&buffer), Payload::Good(_)), "bit {bit}");
            buffer[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn truncated_is_damaged_and_other_traffic_is_foreign() {
        let mut buffer = [0; 64];
        assert_eq!(read(&buffer), Payload::Foreign);
        assert_eq!(read(&[]), Payload::Foreign);
        assert!(write(&mut buffer, LABEL));
        assert_eq!(read(&buffer[..63]), Payload::Damaged);
    }
}
