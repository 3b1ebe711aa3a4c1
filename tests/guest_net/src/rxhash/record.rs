//! What is noted of a packet.

/// Bytes of each packet that are noted.
pub(super) const HEAD: i16 = 100;
const HEAD_BYTES: usize = HEAD as usize;
/// Bytes of a record: four numbers, then the packet's first bytes.
pub(super) const RECORD: i16 = 16 + HEAD;
/// The same.
pub(super) const RECORD_BYTES: usize = RECORD as usize;

/// Where the numbers are.
pub(super) mod field {
    pub(in super::super) const HASH: i16 = 0;
    pub(in super::super) const QUEUE_MAPPING: i16 = 4;
    pub(in super::super) const LENGTH: i16 = 8;
    pub(in super::super) const REPORT: i16 = 12;
}

/// What a filter noted of a packet.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    /// The hash, as the driver set it (`skb->hash`) or got it; 0 if there is none.
    pub(crate) hash: u32,
    /// One more than the receive queue; 0 if the driver did not say.
    queue_mapping: u32,
    /// The packet's length in bytes.
    pub(crate) length: u32,
    /// `hash_report` of the packet's header, if it was seen: the network stack has no place for it.
    pub(crate) report: u32,
    head: [u8; HEAD_BYTES],
}

impl Record {
    pub(super) fn parse(bytes: &[u8; RECORD_BYTES]) -> Self {
        let (numbers, head) = bytes.split_at(RECORD_BYTES - HEAD_BYTES);
        let number = |field: i16| {
            let at = usize::from(field.unsigned_abs());
            let mut number = [0; 4];
            number.copy_from_slice(&numbers[at..at + 4]);
            u32::from_ne_bytes(number)
        };
        let mut noted = [0; HEAD_BYTES];
        noted.copy_from_slice(head);
        Self {
            hash: number(field::HASH),
            queue_mapping: number(field::QUEUE_MAPPING),
            length: number(field::LENGTH),
            report: number(field::REPORT),
            head: noted,
        }
    }

    /// The packet's first bytes.
    pub(crate) fn head(&self) -> &[u8] {
        let length = usize::try_from(self.length).unwrap_or(HEAD_BYTES);
        &self.head[..length.min(HEAD_BYTES)]
    }

    /// The receive queue, if the driver said.
    pub(crate) const fn queue(&self) -> Option<u32> {
        self.queue_mapping.checked_sub(1)
    }
}
