//! Frames of the migration protocol: any bytes are survived, no length passes its limit, and what
//! opens is what was sealed.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vm_migration::migrate::frame::{Envelope, FrameBuffer, HEADER_BYTES, Kind};

fuzz_target!(|bytes: &[u8]| {
    if let Some((header, payload)) = bytes.split_first_chunk::<HEADER_BYTES>()
        && let Ok(envelope) = Envelope::parse(header)
    {
        assert!(envelope.length <= envelope.kind.limit());
        // A frame that passes the checksum is, byte for byte, what sealing makes.
        if let Some(payload) = payload.get(..envelope.length)
            && envelope.verify(payload).is_ok()
        {
            let mut frame = FrameBuffer::default();
            frame.extend(payload);
            let sealed = frame
                .seal(envelope.kind, envelope.sequence)
                .expect("it fits");
            assert_eq!(sealed, &bytes[..HEADER_BYTES + envelope.length]);
        }
    }
    if let Some((code, payload)) = bytes.split_first()
        && let Some(kind) = Kind::from_code(*code)
    {
        let mut frame = FrameBuffer::default();
        frame.extend(payload);
        let sealed = match frame.seal(kind, u64::from(*code)) {
            Ok(sealed) => sealed,
            Err(_) => {
                assert!(payload.len() > kind.limit());
                return;
            }
        };
        let (header, sent) = sealed
            .split_first_chunk::<HEADER_BYTES>()
            .expect("a header");
        let envelope = Envelope::parse(header).expect("a good header");
        assert_eq!((envelope.kind, envelope.length), (kind, payload.len()));
        envelope.verify(sent).expect("a good checksum");
    }
});
