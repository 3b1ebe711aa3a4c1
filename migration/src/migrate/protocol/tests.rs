use proptest::prelude::*;

use super::*;

fn text() -> impl Strategy<Value = String> {
    "[a-z0-9.é-]{0,12}"
}

fn device() -> impl Strategy<Value = DeviceManifest> {
    let migratable = prop_oneof![
        Just(Migratable::Yes),
        (text(), text()).prop_map(|(reason, remedy)| Migratable::No { reason, remedy }),
    ];
    let compat = prop::collection::btree_map(text(), text(), 0..4);
    (text(), text(), compat, migratable, any::<u64>()).prop_map(
        |(id, kind, compat, migratable, max_state_bytes)| DeviceManifest {
            id,
            kind,
            compat,
            migratable,
            max_state_bytes,
        },
    )
}

prop_compose! {
    fn manifest()(
        protocol: u16,
        ferry_version in text(),
        page_size: u64,
        memory in prop::collection::vec((any::<u64>(), any::<u64>()), 0..4),
        vcpus: u32,
        cpuid: Vec<u8>,
        required_kvm_features in prop::collection::vec(text(), 0..4),
        devices in prop::collection::vec(device(), 0..4),
        config: Vec<u8>,
    ) -> Manifest {
        let memory = memory.into_iter().map(|(gpa, len)| MemoryRegion { gpa, len }).collect();
        Manifest {
            protocol,
            ferry_version,
            page_size,
            memory,
            vcpus,
            cpuid,
            required_kvm_features,
            devices,
            config,
        }
    }
}

fn round_trip<T>(kind: Kind, message: &T)
where
    T: Serialize + DeserializeOwned + PartialEq + fmt::Debug,
{
    let mut frame = FrameBuffer::default();
    encode(kind, message, &mut frame).unwrap();
    frame.seal(kind, 0).unwrap();
    assert_eq!(decode::<T>(kind, frame.payload()).unwrap(), *message);
    frame.extend(&[0]);
    assert!(matches!(
        decode::<T>(kind, frame.payload()),
        Err(FrameError::Malformed { .. })
    ));
}

proptest! {
    #[test]
    fn messages_round_trip(
        manifest in manifest(),
        reason in text(),
        numbers: (u16, u32, u64, u64),
    ) {
        let (index, round, bytes, load_us) = numbers;
        let checksum = round;
        round_trip(Kind::Manifest, &manifest);
        round_trip(Kind::Accept, &Accept { ferry_version: reason.clone() });
        let refusals = vec![Refusal::new("a", &reason, "c")];
        round_trip(Kind::Refuse, &Refuse { refusals });
        round_trip(Kind::RoundEnd, &Round { round, memory_bytes: bytes });
        round_trip(Kind::DeviceEnd, &DeviceEnd { index, bytes, checksum });
        round_trip(Kind::Complete, &Complete { memory_bytes: bytes });
        round_trip(Kind::Ready, &Ready { load_us, devices_us: vec![load_us; 3] });
        round_trip(Kind::Commit, &Commit);
        round_trip(Kind::Running, &Running { run_us: load_us });
        round_trip(Kind::Abort, &Abort { reason });
    }

    #[test]
    fn any_manifest_is_survived(payload in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = decode::<Manifest>(Kind::Manifest, &payload);
    }

    #[test]
    fn chunks_round_trip(device: u16, data: Vec<u8>) {
        let mut frame = FrameBuffer::default();
        chunk_room(&mut frame, device, CHUNK_BYTES)[..data.len()].copy_from_slice(&data);
        chunk_trim(&mut frame, data.len());
        prop_assert_eq!(chunk_open(frame.payload()), Ok((device, data.as_slice())));
    }
}

#[test]
fn the_largest_chunk_fits_a_frame() {
    let mut frame = FrameBuffer::default();
    chunk_room(&mut frame, 0, CHUNK_BYTES);
    frame.seal(Kind::DeviceChunk, 0).unwrap();
}
