//! Streams in any pieces, and broken ones.

use proptest::prelude::*;

use super::*;

const IDENTITY: DeviceIdentity = DeviceIdentity {
    vendor: 0x1af4,
    device: 0x1041,
    subsystem_vendor: 0,
    subsystem: 0,
    revision: 1,
};

fn data(bytes: &[u8]) -> Vec<u8> {
    [&data_header(bytes.len())[..], bytes].concat()
}

fn parse(stream: &[u8], step: usize) -> Result<(Vec<u8>, Vec<u8>), StreamError> {
    let mut parser = Parser::new(IDENTITY);
    let mut seen = Vec::new();
    for piece in stream.chunks(step.max(1)) {
        parser.take(piece, |bytes| {
            seen.extend_from_slice(bytes);
            Ok::<(), StreamError>(())
        })?;
    }
    Ok((seen, parser.finish()?))
}

fn good() -> Vec<u8> {
    [
        preamble(IDENTITY),
        data(b"first"),
        data(b"second"),
        front_frame(b"front"),
        data(b"last"),
        end_frame(15),
    ]
    .concat()
}

#[test]
fn a_stream_survives_any_cut_into_pieces() {
    let stream = good();
    for step in 1..=stream.len() {
        let (seen, front) = parse(&stream, step).unwrap();
        assert_eq!(seen, b"firstsecondlast");
        assert_eq!(front, b"front");
    }
}

#[test]
fn a_stream_cut_short_is_noticed_wherever_it_is() {
    let stream = good();
    for len in 0..stream.len() {
        assert_eq!(parse(&stream[..len], 7).unwrap_err(), StreamError::Short);
    }
}

#[test]
fn broken_streams_are_refused() {
    let head = preamble(IDENTITY);
    let other = DeviceIdentity {
        device: 0x1042,
        ..IDENTITY
    };
    let with = |tail: &[u8]| [head.as_slice(), tail].concat();
    let front = front_frame(b"x");
    for (stream, expected) in [
        (b"GARBAGE, GARBAGE".to_vec(), StreamError::Magic),
        (
            [&b"FPTD\x09\0"[..], &[0; 6]].concat(),
            StreamError::Version(9),
        ),
        (
            preamble(other),
            StreamError::OtherDevice {
                vendor: 0x1af4,
                device: 0x1042,
            },
        ),
        (with(&[9, 0, 0, 0, 0]), StreamError::Kind(9)),
        (with(&[DATA, 0, 0, 0, 0]), StreamError::Length(0)),
        (
            with(&[DATA, 0, 0, 0, 0xff]),
            StreamError::Length(0xff00_0000),
        ),
        (with(&[FRONT, 0, 0, 0, 1]), StreamError::Length(0x0100_0000)),
        (with(&end_frame(0)), StreamError::Order),
        (
            with(&[front.clone(), front.clone()].concat()),
            StreamError::Order,
        ),
        (
            with(&[front.clone(), end_frame(3)].concat()),
            StreamError::Count { told: 3, seen: 0 },
        ),
        (
            with(&[front, end_frame(0), vec![0]].concat()),
            StreamError::Order,
        ),
    ] {
        assert_eq!(parse(&stream, 5).unwrap_err(), expected);
    }
}

proptest! {
    #[test]
    fn any_bytes_are_taken_or_refused(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        step in 1_usize..40,
        whole in any::<bool>(),
    ) {
        let stream = if whole { bytes } else { [preamble(IDENTITY), bytes].concat() };
        let _ = parse(&stream, step);
    }
}
