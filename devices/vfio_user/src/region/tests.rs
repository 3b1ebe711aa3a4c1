//! Descriptions survive the wire, and malformed ones are refused.

use proptest::prelude::*;
use rustix::event::{EventfdFlags, eventfd};

use super::*;
use crate::wire::MAX_REGION_INFO;

fn fd() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC).unwrap()
}

fn region(size: u64, areas: &[(u64, u64)]) -> RegionInfo {
    RegionInfo {
        flags: RegionFlags::READ | RegionFlags::WRITE,
        size,
        mapping: Some(RegionMapping {
            fd: fd(),
            offset: 0x2000,
            areas: areas
                .iter()
                .map(|(offset, size)| Area {
                    offset: *offset,
                    size: *size,
                })
                .collect(),
        }),
    }
}

#[test]
fn whole_and_sparse_regions_survive() {
    for areas in [
        &[(0, 0x4000)][..],
        &[(0x1000, 0x1000), (0x3000, 0x1000)],
        &[],
    ] {
        let sent = region(0x4000, areas);
        let expected = sent.mapping.as_ref().unwrap().areas.clone();
        let (payload, fds) = encode_region(2, sent, MAX_REGION_INFO);
        let got = decode_region(2, &payload, fds).unwrap();
        assert_eq!(got.size, 0x4000);
        assert_eq!(got.flags, RegionFlags::READ | RegionFlags::WRITE);
        let mapping = got.mapping.unwrap();
        assert_eq!((mapping.offset, mapping.areas), (0x2000, expected));
    }
}

#[test]
fn a_client_with_too_little_room_learns_the_size() {
    let sent = region(0x4000, &[(0x1000, 0x1000)]);
    let (payload, fds) = encode_region(2, sent, size_of::<RegionInfoMsg>());
    assert_eq!(payload.len(), size_of::<RegionInfoMsg>());
    assert!(fds.is_empty());
    let (head, _) = split::<RegionInfoMsg>(&payload).unwrap();
    assert_eq!(head.argsz, 32 + 8 + 8 + 16);
}

#[test]
fn areas_outside_of_the_region_are_refused() {
    for (offset, size) in [(0x4000, 1), (0, 0x4001), (u64::MAX, 2), (0x3fff, 2)] {
        let (payload, fds) = encode_region(0, region(0x4000, &[(offset, size)]), 4096);
        assert!(decode_region(0, &payload, fds).is_err(), "{offset:#x}");
    }
}

#[test]
fn a_capability_list_that_runs_in_circles_ends() {
    let (mut payload, fds) = encode_region(0, region(0x4000, &[(0, 1)]), 4096);
    // An unknown capability that names itself as the next.
    payload[32..34].copy_from_slice(&99_u16.to_ne_bytes());
    payload[36..40].copy_from_slice(&32_u32.to_ne_bytes());
    assert!(decode_region(0, &payload, fds).is_err());
}

#[test]
fn io_descriptors_survive_and_are_cut_to_what_the_client_takes() {
    let entries = || -> Vec<IoEventFd> {
        (0..5)
            .map(|n| IoEventFd {
                offset: n * 4,
                size: 2,
                datamatch: (n == 3).then_some(7),
                fd: fd(),
            })
            .collect()
    };
    let (payload, fds) = encode_io_fds(1, entries(), MAX_IO_FDS_REPLY, 64);
    let got = decode_io_fds(1, 0x1000, &payload, &fds).unwrap();
    assert_eq!(got.len(), 5);
    assert_eq!((got[3].offset, got[3].size), (12, 2));
    assert_eq!((got[2].datamatch, got[3].datamatch), (None, Some(7)));

    let (payload, fds) = encode_io_fds(1, entries(), MAX_IO_FDS_REPLY, 2);
    assert_eq!(fds.len(), 2);
    assert_eq!(decode_io_fds(1, 0x1000, &payload, &fds).unwrap().len(), 2);

    // Outside of the region, no descriptor, another region.
    let (payload, fds) = encode_io_fds(1, entries(), MAX_IO_FDS_REPLY, 64);
    assert!(decode_io_fds(1, 17, &payload, &fds).is_err());
    assert!(decode_io_fds(1, 0x1000, &payload, &fds[..2]).is_err());
    assert!(decode_io_fds(0, 0x1000, &payload, &fds).is_err());
}

proptest! {
    #[test]
    fn any_bytes_are_decoded_or_refused(payload in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Ok(info) = decode_region(0, &payload, vec![fd()])
            && let Some(mapping) = info.mapping
        {
            for area in mapping.areas {
                prop_assert!(area.offset + area.size <= info.size);
            }
        }
        let _ = decode_io_fds(0, 0x1000, &payload, &[fd()]);
    }
}
