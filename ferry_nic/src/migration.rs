//! How the device's state goes through MIG_DATA_READ and MIG_DATA_WRITE.
//!
//! The stream is of records: magic `FNIC`, version (2 bytes), kind (2), length (4), all little
//! endian, then the saved state of the PCI function. An *early* record is made when pre-copy
//! begins; the destination loads it at once, so that a mismatch of the two ends shows while the
//! guest still runs. The *final* record is made when the device stands still, and is what counts:
//! a stream without one is refused.

use rustix::io::Errno;

/// First bytes of a record.
const MAGIC: [u8; 4] = *b"FNIC";
/// Version of this format.
const VERSION: u16 = 1;
/// Bytes before a record's state.
const HEADER: usize = 12;

/// What a record is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// A first cut, of a running device.
    Early,
    /// The state.
    Final,
}

impl Kind {
    const fn number(self) -> u16 {
        match self {
            Self::Early => 1,
            Self::Final => 2,
        }
    }

    const fn from_number(number: u16) -> Option<Self> {
        match number {
            1 => Some(Self::Early),
            2 => Some(Self::Final),
            _ => None,
        }
    }
}

/// State on its way out.
#[derive(Debug, Default)]
pub struct Outgoing {
    bytes: Vec<u8>,
    at: usize,
}

impl Outgoing {
    /// Adds a record behind what is still unread.
    pub fn push(&mut self, kind: Kind, state: &[u8]) {
        if self.at == self.bytes.len() {
            self.clear();
        }
        self.bytes.extend_from_slice(&MAGIC);
        self.bytes.extend_from_slice(&VERSION.to_le_bytes());
        self.bytes.extend_from_slice(&kind.number().to_le_bytes());
        let len = u32::try_from(state.len()).unwrap_or(u32::MAX);
        self.bytes.extend_from_slice(&len.to_le_bytes());
        self.bytes.extend_from_slice(state);
    }

    /// Forgets everything: the data session is over.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.at = 0;
    }

    /// Bytes not read yet.
    pub const fn left(&self) -> usize {
        self.bytes.len().saturating_sub(self.at)
    }

    /// Moves as much as there is to `data`; how many bytes.
    pub fn read(&mut self, data: &mut [u8]) -> usize {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let len = rest.len().min(data.len());
        if let (Some(to), Some(from)) = (data.get_mut(..len), rest.get(..len)) {
            to.copy_from_slice(from);
        }
        self.at += len;
        len
    }
}

/// State on its way in.
#[derive(Debug, Default)]
pub struct Incoming {
    held: Vec<u8>,
    finished: bool,
}

impl Incoming {
    /// Takes the next bytes of the stream and gives each whole record's state to `load`.
    /// `most` bounds the state's length.
    ///
    /// # Errors
    /// EINVAL for what is no stream of records; `load`'s.
    pub fn take(
        &mut self,
        data: &[u8],
        most: usize,
        mut load: impl FnMut(&[u8]) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        let mut rest = data;
        while !rest.is_empty() {
            let need = match self.held.len() {
                have if have < HEADER => HEADER,
                _ => HEADER + self.check_header(most)?.1,
            };
            let here = need.saturating_sub(self.held.len()).min(rest.len());
            let (now, after) = rest.split_at(here);
            rest = after;
            self.held.extend_from_slice(now);
            if self.held.len() < HEADER {
                continue;
            }
            let (kind, len) = self.check_header(most)?;
            if self.held.len() == HEADER + len {
                let record = std::mem::take(&mut self.held);
                load(record.get(HEADER..).unwrap_or_default())?;
                self.finished = kind == Kind::Final;
            }
        }
        Ok(())
    }

    /// Whether a final record came, and nothing after it.
    pub fn is_complete(&self) -> bool {
        self.finished && self.held.is_empty()
    }

    fn check_header(&self, most: usize) -> Result<(Kind, usize), Errno> {
        let (magic, fields) = self.held.split_first_chunk::<4>().ok_or(Errno::INVAL)?;
        let (version, fields) = fields.split_first_chunk::<2>().ok_or(Errno::INVAL)?;
        let (kind, fields) = fields.split_first_chunk::<2>().ok_or(Errno::INVAL)?;
        let (len, _) = fields.split_first_chunk::<4>().ok_or(Errno::INVAL)?;
        let kind = Kind::from_number(u16::from_le_bytes(*kind)).ok_or(Errno::INVAL)?;
        let len = usize::try_from(u32::from_le_bytes(*len)).map_err(|_| Errno::INVAL)?;
        let good = *magic == MAGIC
            && u16::from_le_bytes(*version) == VERSION
            && (1..=most).contains(&len)
            && !self.finished;
        good.then_some((kind, len)).ok_or(Errno::INVAL)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(records: &[(Kind, &[u8])]) -> Vec<u8> {
        let mut out = Outgoing::default();
        for (kind, state) in records {
            out.push(*kind, state);
        }
        let mut bytes = vec![0; out.left()];
        assert_eq!(out.read(&mut bytes), bytes.len());
        assert_eq!(out.left(), 0);
        bytes
    }

    fn parse(bytes: &[u8], step: usize) -> Result<(Vec<Vec<u8>>, bool), Errno> {
        let mut incoming = Incoming::default();
        let mut states = Vec::new();
        for piece in bytes.chunks(step) {
            incoming.take(piece, 100, |state| {
                states.push(state.to_vec());
                Ok(())
            })?;
        }
        Ok((states, incoming.is_complete()))
    }

    #[test]
    fn records_survive_any_cut() {
        let bytes = stream(&[(Kind::Early, b"first"), (Kind::Final, b"last!!")]);
        for step in 1..=bytes.len() {
            let (states, complete) = parse(&bytes, step).unwrap();
            assert_eq!(states, [b"first".to_vec(), b"last!!".to_vec()]);
            assert!(complete);
        }
        for len in 0..bytes.len() {
            assert!(!parse(&bytes[..len], 9).unwrap().1, "cut at {len}");
        }
    }

    #[test]
    fn an_early_record_is_not_enough() {
        let bytes = stream(&[(Kind::Early, b"first")]);
        assert!(!parse(&bytes, 8).unwrap().1);
    }

    #[test]
    fn broken_streams_are_refused() {
        let good = stream(&[(Kind::Final, b"state")]);
        for at in [0, 4, 6, 11] {
            let mut bad = good.clone();
            bad[at] ^= 0x40;
            assert_eq!(parse(&bad, 5), Err(Errno::INVAL), "byte {at}");
        }
        let long = stream(&[(Kind::Final, &[0; 101])]);
        assert_eq!(parse(&long, 5), Err(Errno::INVAL));
        let empty = stream(&[(Kind::Final, &[])]);
        assert_eq!(parse(&empty, 5), Err(Errno::INVAL));
        let twice = stream(&[(Kind::Final, b"one"), (Kind::Final, b"two")]);
        assert_eq!(parse(&twice, 5), Err(Errno::INVAL));
    }

    #[test]
    fn unread_early_data_comes_before_the_final_record() {
        let mut out = Outgoing::default();
        out.push(Kind::Early, b"first");
        let mut piece = [0; 7];
        out.read(&mut piece);
        out.push(Kind::Final, b"last");
        let mut rest = vec![0; 100];
        let len = out.read(&mut rest);
        let bytes = [&piece[..], &rest[..len]].concat();
        let (states, complete) = parse(&bytes, 100).unwrap();
        assert_eq!(states, [b"first".to_vec(), b"last".to_vec()]);
        assert!(complete);
    }
}
